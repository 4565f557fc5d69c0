"""Compiled programs: where they are kept between runs, and the memory that compiling them leaves behind."""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import sys

import jax

log = logging.getLogger("jaxft")


def keep(folder: str = "") -> str:
  """Keeps compiled programs on disk between runs, and returns where ("": nowhere, as a warning says).

  `folder` empty: $JAXFT_CACHE/xla, else ~/.cache/jaxft/xla. CPU programs hold instructions of the very CPU, and a
  shared home serves several kinds, so its features are part of the path.
  """
  _give_back_memory()
  base = pathlib.Path(folder or os.path.join(os.environ.get("JAXFT_CACHE", "~/.cache/jaxft"), "xla")).expanduser()
  if jax.default_backend() == "cpu":
    info = pathlib.Path("/proc/cpuinfo")
    flags = (
      [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))][:2]
      if info.exists()
      else []
    )
    base = base / ("cpu-" + hashlib.sha256("".join([platform.machine(), *flags]).encode()).hexdigest()[:8])
  try:
    base.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    log.warning(
      "Compiled programs are not kept: %s cannot be made (%s). Set JAXFT_CACHE to a folder that can.", base, e
    )
    return ""
  jax.config.update("jax_compilation_cache_dir", str(base))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  return str(base)


@functools.cache  # once is enough
def _give_back_memory() -> None:
  """From now on, memory that the compiler has freed goes back to the system, before the program takes its own.

  glibc would keep it: 0.4 GiB for a BERT of six layers. Elsewhere this does nothing.
  """
  if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    return

  def compiled(event: str, *_, **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(compiled)
