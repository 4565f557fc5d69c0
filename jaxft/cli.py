"""What every binary shares: flags that fail in one paragraph, exit codes, --help on one screen."""

import os
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxft import config, errors

LARGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")  # of Linux


def define_config() -> flags.FlagHolder:
  """Defines --config=FILE.py[:ARG] and with it --config.a.b=value for every field."""
  return config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/t5.py or configs/t5.py:t5-base.", lock_config=True
  )


def parse(define: Callable[[], Any], usage: str) -> Any:
  """Makes the flags by `define()`, reads the command line into them and returns them; --help and what is wrong end the
  process. `usage` heads the text of --help.

  A binary calls this before its slow imports; flags are made here, so that a notebook can import several binaries.
  """
  before = set(flags.FLAGS)
  made = define()
  if any(a in ("--help", "-h", "-help") for a in sys.argv[1:]):
    print(usage.strip() + "\n\nFlags:")
    for f in sorted((flags.FLAGS[n] for n in set(flags.FLAGS) - before), key=lambda f: f.name):
      default = f" [{f.default_as_str}]" if f.default not in (None, "", False) else ""
      print(f"  --{f.name:<15} {f.help}{default}")
    print("  --config.a.b=value  Any field of the config." if "config" in flags.FLAGS else "")
    sys.exit(0)
  _parse(sys.argv)
  _take_large_pages()
  return made


def _take_large_pages() -> None:
  """Starts this process again, as the same process, with a malloc that asks for pages of 2 MiB, where the kernel gives
  them to those that ask for them.

  XLA's programs for CPUs take their work space from malloc at each step; in pages of 4 KiB, a step of BERT-base takes
  1.25 times as long. Only a process that was started as `python -m jaxft.NAME` is started again.
  """
  spec, tunables = sys.modules["__main__"].__spec__, os.environ.get("GLIBC_TUNABLES", "")
  if spec is None or not spec.name.startswith("jaxft.") or "glibc.malloc.hugetlb" in tunables:
    return
  if LARGE_PAGES.exists() and "[madvise]" in LARGE_PAGES.read_text():
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[[Any], int | None], made: Any) -> None:
  """Runs `main(made)`, with the flags that `parse` returned, and exits with its code."""
  logging.set_verbosity(logging.WARNING)  # else the first line is JAX's, about the backends that are not here
  app.run(lambda _: errors.run(lambda _: main(made), []), sys.argv[:1], flags_parser=lambda argv: argv)


def _parse(argv: list[str]) -> None:
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise errors.InputError(f"unexpected words on the command line: {' '.join(rest[1:])}. Flags are --name=value.")
    return
  except errors.Stop as e:
    problem = str(e)
  except flags.Error as e:
    problem = f"command line: {e}"
  except FileNotFoundError as e:
    problem = f"config: {e}"
  except Exception as e:  # a config file is a program, and may fail in any way that a program can
    problem = _misspelt(argv) or _broken(e, argv)
  print(f"\njaxft: {problem}", file=sys.stderr)
  sys.exit(errors.InputError.code)


def _misspelt(argv: list[str]) -> str | None:
  """Returns what is wrong with the first --config.PATH=... that names no field, or None."""
  known = dict(config.flatten(config.base()))
  for word in argv[1:]:
    found = re.match(r"--?config\.([\w.]+)", word)
    path = found.group(1) if found else ""
    if path and path not in known and not any(path.startswith(p + ".") for p in config.FREE):
      return f"config: there is no {path}{config.suggest(path)}."
  return None


def _broken(e: Exception, argv: list[str]) -> str:
  """Returns what failed: the line of the config file, or else the values on the command line."""
  where, said = f"the command line ({' '.join(w for w in argv[1:] if w.startswith('--config.'))})", str(e)
  if isinstance(e, SyntaxError):
    where, said = f"{e.filename}, line {e.lineno}", f"{e.msg}: {(e.text or '').strip()}"
  else:
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(pathlib.Path(__file__).parent))
    own = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith((*libraries, "<"))]
    where = f"{own[-1].filename}, line {own[-1].lineno}" if own else where
  return f"config: {where}: {type(e).__name__}: {said}. Mend that and run the command again."


def checked(flag: flags.FlagHolder) -> ConfigDict:
  """Returns a checked copy of the value of --config; raises InputError when it is missing or does not load."""
  if flag.value is None:
    raise errors.InputError("--config=FILE is missing, for example --config=configs/t5.py.")
  try:
    c = ConfigDict(flag.value).unlock()
  except OSError as e:  # ml_collections keeps a failure to load until the first use
    text = " ".join(str(e).split())
    raise errors.InputError(text[text.rfind("] ") + 1 :].strip() if "[Errno" in text else text) from e
  return config.check(c)
