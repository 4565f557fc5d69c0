"""One job and one config a folder.

Catches: a second job let in; a dead job's lock that keeps a restart out, on this host or from another one; a live
foreign job pushed aside; a config change that passes in silence or is refused although harmless; a probe that does not
test what a run does.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from jaxft import config
from jaxft.errors import InputError, StorageError
from jaxft.train import workdir


def test_second_job_is_refused_and_the_first_one_goes_on(tmp_path):
  with workdir.Lock(tmp_path) as lock:
    code = f"from jaxft.train import workdir; workdir.Lock({str(tmp_path)!r}).__enter__()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError" in done.stderr and f"process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
  assert not lock.path.exists()
  with workdir.Lock(tmp_path):
    assert lock.path.exists()


def test_a_dead_jobs_lock_is_taken_over(tmp_path, caplog):
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  for pid, born in ((dead.pid, "1"), (os.getpid(), "another process had this number")):
    (tmp_path / "lock.json").write_text(json.dumps(dict(host=socket.gethostname(), pid=pid, born=born, time="then")))
    with workdir.Lock(tmp_path) as lock:
      assert json.loads(lock.path.read_text())["pid"] == os.getpid()
  (tmp_path / "lock.json").write_text("{half")
  with pytest.MonkeyPatch.context() as m:
    m.setattr(workdir, "FOREIGN_SECONDS", 0.2)
    with workdir.Lock(tmp_path):
      assert caplog.text.count("taking it over") == 3
  assert list(tmp_path.iterdir()) == []


def test_a_lock_from_another_host_is_watched(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "FOREIGN_SECONDS", 0.6)
  path = tmp_path / "lock.json"
  text = json.dumps(dict(host="elsewhere", pid=1, born="2", time="then"))
  path.write_text(text)
  ends = threading.Event()

  def beat():
    while not ends.wait(0.05):
      os.utime(path, ns=(time.time_ns(), time.time_ns()))

  thread = threading.Thread(target=beat)
  thread.start()
  with pytest.raises(InputError, match="in use by process 1 on elsewhere"):
    workdir.Lock(tmp_path).__enter__()
  ends.set()
  thread.join()
  assert path.read_text() == text
  with workdir.Lock(tmp_path):
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "BEAT_SECONDS", 0.05)
  with workdir.Lock(tmp_path) as lock:
    os.utime(lock.path, ns=(0, 0))
    time.sleep(0.5)
    assert lock.path.stat().st_mtime_ns > 0


def test_config_of_another_run(tmp_path, caplog):
  caplog.set_level("INFO")
  c = config.base()
  workdir.check_workdir(tmp_path, config.to_json(c))
  workdir.check_workdir(tmp_path, config.to_json(c))
  c.log.every, c.save.keep = 77, 5
  workdir.check_workdir(tmp_path, config.to_json(c))
  assert "log.every was 10 in this work directory and is 77" in caplog.text
  assert json.loads((tmp_path / "config.json").read_text())["log"]["every"] == 77
  c.optimizer.lr, c.seed = 0.5, 9
  with pytest.raises(InputError) as e:
    workdir.check_workdir(tmp_path, config.to_json(c))
  assert (
    "optimizer.lr: 0.001 there, 0.5 now" in str(e.value)
    and "seed: 0 there, 9 now" in str(e.value)
    and "log" not in str(e.value)
  )
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
  workdir.check_workdir(tmp_path, config.to_json(c), may_change=("optimizer", "seed"))


def test_a_run_of_an_older_jaxft_goes_on(tmp_path):
  """A field that it had no word of is no change with its default, and one with any other value."""
  c = config.base()
  old = json.loads(config.to_json(c))
  del old["lora"], old["model"]["frozen_dtype"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  workdir.check_workdir(tmp_path, config.to_json(c))
  c.lora.rank = 3
  with pytest.raises(InputError, match=r"lora.rank: null there, 3 now") as e:
    workdir.check_workdir(tmp_path, config.to_json(c))
  assert "lora.alpha" not in str(e.value)


def test_every_name_that_may_change_exists():
  paths = [p for p, _ in config.flatten(config.base())]
  for name in workdir.MAY_CHANGE:
    assert any(p == name or p.startswith(name + ".") for p in paths), name


def test_probe_finds_what_is_missing(tmp_path, monkeypatch):
  assert workdir.probe(tmp_path / "a" / "b").is_dir() and list((tmp_path / "a" / "b").iterdir()) == []
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match="cannot be made"):
    workdir.probe(tmp_path / "file" / "x")
  for name, text in (("replace", "cannot be renamed"), ("listdir", "cannot be listed")):
    with monkeypatch.context() as m:
      m.setattr(os, name, lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
      with pytest.raises(StorageError, match=text):
        workdir.probe(tmp_path / "a")


def test_read_only_folder():
  """As root every folder is writable, so the child gives its rights up first."""
  with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in a folder that another user cannot enter
    os.chmod(folder, 0o555)
    code = (
      "import os, sys; from jaxft.train import workdir; os.getuid() or (os.setgid(65534), os.setuid(65534))\n"
      f"try: workdir.probe({folder!r})\nexcept workdir.StorageError as e: print(e); sys.exit(e.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 44 and "cannot be written to (Permission denied)" in done.stdout, done.stderr


def test_an_address_is_refused_and_a_relative_path_made_absolute(tmp_path, monkeypatch):
  with pytest.raises(InputError, match="gcsfuse"):
    workdir.path("gs://bucket/run")
  monkeypatch.chdir(tmp_path)
  assert workdir.path("run") == tmp_path / "run"


@pytest.mark.parametrize("main", [True, False])
def test_what_process_0_refuses_all_refuse(tmp_path, monkeypatch, main):
  told = []
  monkeypatch.setattr(workdir.jax, "process_count", lambda: 2)
  broadcast = lambda x: told.append(int(x)) or (x if main else 2)
  monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", broadcast)
  (tmp_path / "config.json").write_text('{"seed": 1}')
  with pytest.raises(InputError, match="belongs to another config" if main else "Process 0 refused"):
    with workdir.held(tmp_path, '{"seed": 2}', main):
      raise AssertionError("entered")
  assert told == [2 if main else 0] and not (tmp_path / "lock.json").exists()
  assert (tmp_path / "config.json").read_text() == '{"seed": 1}'
