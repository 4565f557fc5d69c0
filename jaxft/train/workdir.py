"""The folder of a run: one job at a time, one config, and known to be writable before hours are spent."""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft import config, observe
from jaxft.errors import InputError, StorageError

# What may differ when a run goes on: nothing here changes the weights of a step that is already planned. `steps` and
# `epochs` are not here, as a schedule ends with them.
MAY_CHANGE = (
  "log",
  "save",
  "export",
  "evals",
  "stop",
  "numbers",
  "data.cache",
  "data.workers",
  "mesh",
  "rules",
  "model.remat",
  "model.unroll",
)
BEAT_SECONDS = 5.0  # the holder of a lock touches it this often
FOREIGN_SECONDS = 20.0  # a lock from another host that nobody touched for so long is dead


def path(folder: str) -> pathlib.Path:
  """Returns the absolute path of a run folder (Orbax takes no other); raises InputError for an address such as gs://..."""
  if not folder:
    raise InputError("--workdir=RUN, the folder of a run, is missing.")
  if re.match(r"[a-z0-9]+://", folder):
    raise InputError(
      f"The work directory {folder} is an address; jaxft writes to file systems only. Mount the bucket on every host "
      "(for gs:// with gcsfuse; launch/tpu_vm/setup.sh --bucket does so) and give the path below the mount."
    )
  return pathlib.Path(folder).expanduser().absolute()


def probe(folder: str | pathlib.Path) -> pathlib.Path:
  """Makes `folder`, then writes, renames, lists and deletes a file there; raises StorageError naming what failed."""
  folder = pathlib.Path(folder)
  name = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
  doing = "made"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    doing = "written to"
    name.write_bytes(b"jaxft" * 1000)
    doing = "used: a file there cannot be renamed"
    moved = name.with_suffix(".moved")
    os.replace(name, moved)
    doing = "listed"
    os.listdir(folder)
    doing = "used: a file there cannot be deleted"
    moved.unlink()
  except OSError as e:
    raise StorageError(
      f"The work directory {folder} cannot be {doing} ({e.strerror or e}). Nothing was started; give a --workdir "
      "with space and the right to write, rename and delete."
    ) from e
  return folder


def check_workdir(folder: str | pathlib.Path, config_json: str, may_change: Sequence[str] = MAY_CHANGE) -> None:
  """Keeps the resolved config as folder/config.json; raises InputError where the folder belongs to another config.

  Keys under `may_change` may differ: each is told, and the file is written anew.
  """
  folder = pathlib.Path(folder)
  file = folder / "config.json"
  if file.exists():
    try:
      before = config.from_json(file.read_text(encoding="utf-8"))
    except ValueError as e:
      raise StorageError(
        f"{file} is not readable JSON ({e}). Put the run's config back, or give another --workdir."
      ) from e
    changed = config.changed(config.from_json(config_json), before)
    free = {k for k in changed if any(k == m or k.startswith(m + ".") for m in may_change)}
    fixed = [f"  {k}: {_show(was)} there, {_show(now)} now" for k, (was, now) in changed.items() if k not in free]
    if fixed:
      raise InputError(
        f"The work directory {folder} belongs to another config:\n"
        + "\n".join(fixed)
        + "\nGive these values as they were, to go on with that run, or another --workdir, to start a new one."
      )
    for k in sorted(free):
      observe.log.info("config: %s was %s in this work directory and is %s from here", k, *map(_show, changed[k]))
    if not free:
      return
  fresh = folder / f".config-{socket.gethostname()}-{os.getpid()}.json"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    fresh.write_text(config_json, encoding="utf-8")
    os.replace(fresh, file)
  except OSError as e:
    raise StorageError(f"{file} cannot be written: {e}. Free some space or give another --workdir.") from e


def _show(value) -> str:
  return json.dumps(value, ensure_ascii=False, default=str)


def _born(pid: int) -> str:
  """Returns when process `pid` started (clock ticks since boot), "" if it is gone or the system does not tell."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  return "" if text.rpartition(")")[2].split()[0] == "Z" else text.rpartition(")")[2].split()[19]


def _alive(pid: int, born: str) -> bool:
  if pathlib.Path("/proc/self/stat").exists():
    return _born(pid) == born != ""  # a number that a later process got is not the same process
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


@contextlib.contextmanager
def held(folder: pathlib.Path, config_json: str, main: bool) -> Iterator[None]:
  """Holds the run folder for this job and config; what process 0 (`main`) refuses, all refuse with its code."""
  problem = None
  with contextlib.ExitStack() as stack:
    if main:
      try:
        stack.enter_context(Lock(folder))
        check_workdir(folder, config_json)
      except (InputError, StorageError) as e:
        problem = e
    if jax.process_count() > 1:
      code = int(multihost_utils.broadcast_one_to_all(np.int32(problem.code if problem else 0)))
      if code and not problem:
        kind = StorageError if code == StorageError.code else InputError
        problem = kind(f"Process 0 refused the work directory {folder}; its message says why.")
    if problem:
      raise problem
    yield


class Lock:
  """Holds folder/lock.json for this process: `with Lock(folder): ...`; raises InputError where another job holds it.

  A lock whose process is dead, on this host, is taken over at once. From another host it is watched for 20 s: its
  holder touches the file every 5 s, so one that stays still belongs to a dead machine. No clocks are compared.
  """

  def __init__(self, folder: str | pathlib.Path):
    self.path = pathlib.Path(folder) / "lock.json"
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Lock":
    mine = dict(
      host=socket.gethostname(), pid=os.getpid(), born=_born(os.getpid()), time=time.strftime("%Y-%m-%d %H:%M:%S")
    )
    for _ in range(8):
      try:
        self._create(json.dumps(mine))
      except FileExistsError:
        self._clear_or_refuse()
        continue
      except OSError as e:
        raise StorageError(f"{self.path} cannot be written: {e}. Give a --workdir that this user may write to.") from e
      self._thread = threading.Thread(target=self._beat, name="jaxft-lock", daemon=True)
      self._thread.start()
      return self
    raise InputError(f"{self.path}: several jobs want this work directory at once. Start one.")

  def __exit__(self, *_) -> None:
    self._stop.set()
    self._thread.join()
    self.path.unlink(missing_ok=True)

  def _create(self, text: str) -> None:
    handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
      os.write(handle, text.encode())
    finally:
      os.close(handle)

  def _beat(self) -> None:
    while not self._stop.wait(BEAT_SECONDS):
      try:
        os.utime(self.path)
      except OSError as e:
        observe.log.warning("The lock %s cannot be touched (%s); another job might take it for dead.", self.path, e)

  def _clear_or_refuse(self) -> None:
    """Moves a dead holder's lock away, or raises InputError."""
    try:
      text, seen = self.path.read_text(), self.path.stat().st_mtime_ns
      if not text:  # just made, and its text not yet written
        time.sleep(1.0)
        text = self.path.read_text()
    except FileNotFoundError:
      return
    try:
      holder = json.loads(text)
      host, pid, born = holder["host"], int(holder["pid"]), str(holder["born"])
    except (ValueError, KeyError, TypeError):
      host, pid, born, holder = "", 0, "", dict(time="unknown")
    if host == socket.gethostname():
      live = _alive(pid, born)
    else:
      observe.log.info("%s is held by %s; watching it for %.0f s", self.path, host or "nobody named", FOREIGN_SECONDS)
      live = self._moves(seen)
    if live:
      raise InputError(
        f"The work directory {self.path.parent} is in use by process {pid} on {host} since {holder['time']}. Stop that "
        f"job or give another --workdir (if you are sure that it is gone, delete {self.path})."
      )
    observe.log.warning(
      "The lock of process %s on %s is left over from a job that died; taking it over.", pid, host or "nobody"
    )
    grave = self.path.with_name(f".lock-dead-{socket.gethostname()}-{os.getpid()}")
    try:
      os.rename(self.path, grave)
    except FileNotFoundError:
      return
    if grave.read_text() != text:  # another job took it over in between: it is not the dead one's any more
      self._create(grave.read_text())
    grave.unlink()

  def _moves(self, seen: int) -> bool:
    end = time.monotonic() + FOREIGN_SECONDS
    while time.monotonic() < end:
      time.sleep(min(1.0, FOREIGN_SECONDS / 4))
      try:
        if self.path.stat().st_mtime_ns != seen:
          return True
      except FileNotFoundError:
        return False
    return False
