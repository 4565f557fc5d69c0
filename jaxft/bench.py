"""Measures training: python -m jaxft.bench --config=configs/t5.py:t5-small [--case="batch=16 model.remat=block" ...]

Trains some steps of a config through the loop of jaxft.main and prints a line: samples and tokens a second, MFU, peak
memory, compile time, waits for data, what a checkpoint stops. Each --case (changes of the config, config=FILE too) is a
line and a process of its own; they take turns, --rounds times. --synthetic needs no data, weights or TensorFlow.
"""

import types

from absl import flags

from jaxft import cli
from jaxft.data import feeding


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    case=flags.DEFINE_multi_string("case", [], "Changes: batch=16 model.remat=block. Again for a second case."),
    steps=flags.DEFINE_integer("steps", 20, "Steps that are measured."),
    warmup=flags.DEFINE_integer("warmup", 3, "Steps before them, the compilation among them."),
    rounds=flags.DEFINE_integer("rounds", 1, "Processes of each case, in turns; medians and ratios are printed."),
    synthetic=flags.DEFINE_bool("synthetic", False, "Fresh weights and full rows of random tokens."),
    save_to=flags.DEFINE_string("save_to", "", "Folder for a checkpoint, removed again; empty: /tmp; none: no save."),
    output=flags.DEFINE_string("output", "", "JSON file for the results."),
    inside=flags.DEFINE_string("inside", "", "Internal: the file for the result of one case, measured here."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds
  if FLAGS.inside.value and not FLAGS.synthetic.value:
    feeding.start()

import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

from jaxft import benching, cluster, observe, programs
from jaxft.errors import InputError


def main(f: types.SimpleNamespace) -> int:
  if f.steps.value < 1 or f.warmup.value < 1 or f.rounds.value < 1:
    raise InputError("--steps, --warmup (the first step is compiled) and --rounds are 1 or more.")
  return _inside(f) if f.inside.value else _outside(f)


def _inside(f: types.SimpleNamespace) -> int:
  """Measures one case and writes the result."""
  c = cli.checked(f.config)
  cluster.join()
  observe.setup_logging(None)
  out = pathlib.Path(f.inside.value)
  programs.keep(str(out.parent / "xla"))  # so that the first round of a case compiles, and the others do not
  base = None if f.save_to.value in ("", benching.NONE) else f.save_to.value
  with tempfile.TemporaryDirectory(prefix="jaxft-bench-", dir=base) as home:
    save_to = benching.NONE if f.save_to.value == benching.NONE else home
    found = benching.measure(
      c, pathlib.Path(home), steps=f.steps.value, warmup=f.warmup.value, synthetic=f.synthetic.value, save_to=save_to,
      began=float(os.environ["JAXFT_BENCH_BEGAN"]))  # fmt: skip
  if found["process"] == 0:
    out.write_text(json.dumps(found), encoding="utf-8")
  return 0


def _outside(f: types.SimpleNamespace) -> int:
  """Runs the cases in turns, each in a process of its own, and prints what they took."""
  name = str(flags.FLAGS["config"].config_filename).removeprefix("configs/") if f.config.value is not None else ""
  cases = {x or name: shlex.split(x) for x in f.case.value or [""]}
  if not name and not all(any(w.startswith("config=") for w in words) for words in cases.values()):
    raise InputError("--config=FILE is missing, for example --config=configs/t5.py; or give each --case a config=FILE.")
  rounds: dict[str, list] = {case: [] for case in cases}
  failed: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    for i in range(f.rounds.value):
      for case, words in cases.items():
        if case in failed:
          continue
        print(f"\nround {i + 1} of {f.rounds.value}, {case}", file=sys.stderr, flush=True)
        file = pathlib.Path(folder) / "result.json"
        file.unlink(missing_ok=True)
        given = [f"--{w}" if w.startswith("config=") else f"--config.{w}" for w in words]
        command = [sys.executable, "-m", "jaxft.bench", *sys.argv[1:], *given, f"--inside={file}"]
        code = subprocess.run(command, env=dict(os.environ, JAXFT_BENCH_BEGAN=str(time.time()))).returncode
        if code:
          killed = f"was killed by signal {-code}" + ", as a machine does that has no memory left" * (code == -9)
          failed[case] = killed if code < 0 else f"ended with exit code {code}; why is said above"
        elif file.exists():  # not where this is another process than the first
          rounds[case].append(json.loads(file.read_text(encoding="utf-8")))
  done = {case: found for case, found in rounds.items() if found and case not in failed}
  results = benching.summary(done)
  print(benching.table(results, failed))
  if f.output.value and done:
    out = dict(command=f"python -m jaxft.bench {shlex.join(sys.argv[1:])}", date=datetime.date.today().isoformat(),
               versions=observe.versions(*benching.PACKAGES), summary=results, rounds=done)  # fmt: skip
    pathlib.Path(f.output.value).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
  return 1 if failed else 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
