"""Compiled programs. Catches: programs compiled anew in each run; memory of the compiler kept while they run."""

import ctypes
import os
import subprocess
import sys
import types

import jax

from jaxft import programs


def test_compile_cache_is_used_or_said(tmp_path, caplog):
  code = (
    f"from jaxft import programs; import jax; print(programs.keep({str(tmp_path / 'c')!r}));"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
    "jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
  where = done.stdout.strip()
  assert where.startswith(str(tmp_path / "c")) and os.listdir(where)
  (tmp_path / "file").write_text("")
  assert programs.keep(str(tmp_path / "file" / "x")) == "" and "not kept" in caplog.text


def test_memory_of_the_compiler_is_given_back_once_a_program(monkeypatch):
  trimmed, heard = [], []
  monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=trimmed.append))
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", heard.append)
  programs._give_back_memory.__wrapped__()
  for event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"):
    heard[0](event, 1.0, fun_name="f")
  assert trimmed == [0]


def test_jax_tells_of_each_program_it_compiles():
  """The name of the event is no promise of JAX's."""
  code = (
    "import jax; heard = []; jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: heard.append("
    "event)); jax.jit(lambda x: x + 1)(1.0); print('/jax/core/compile/backend_compile_duration' in heard)"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
