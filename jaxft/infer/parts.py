"""The files of a batch decode that survive a kill: finished rows beside a manifest, then one file, named at the end."""

import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.errors import InputError, StorageError

log = logging.getLogger("jaxft")


class Nothing:
  """The writer of the hosts that do not write."""

  def __init__(self, done: np.ndarray):
    self.done = done

  def write(self, records: list[dict]) -> None:
    del records

  def close(self) -> None:
    pass

  def finish(self) -> None:
    multihost_utils.sync_global_devices("jaxft decode: the output is complete")


class Parts:
  """Appends records to a part file and turns it into the output; `done` is bool [rows]."""

  def __init__(self, output: pathlib.Path, ids: list, manifest: dict):
    self._output, self._position = output, {str(name): i for i, name in enumerate(ids)}
    self._folder = parts_folder(output)
    self._folder.mkdir(parents=True, exist_ok=True)
    self._file = open(self._folder / "part.jsonl", "a+b")
    self.done = np.zeros(len(ids), bool)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._check(manifest)
      self._repair()
      self.done[list(self._index())] = True
    except BlockingIOError as e:
      self.close()
      raise InputError(
        f"decode: another process is writing {output} now (it holds {self._folder}); wait for it or end it."
      ) from e
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Gives the lock back; the folder stays where `finish` has not made the output."""
    self._file.close()

  def _check(self, manifest: dict) -> None:
    path, manifest = self._folder / "manifest.json", json.loads(json.dumps(manifest, default=str))
    if not path.exists():
      replace(path, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
      return
    before = json.loads(path.read_text())
    changed = [
      f"{k}: {before.get(k)!r} then, {manifest.get(k)!r} now"
      for k in sorted({*before, *manifest})
      if before.get(k) != manifest.get(k)
    ]
    if changed:
      raise InputError(
        f"decode: {self._folder} holds rows that were decoded otherwise ({'; '.join(changed)}). Run with the same "
        "settings to go on, choose another output, or delete that folder to start afresh."
      )

  def _repair(self) -> None:
    """Cuts off a last line that was being written when the process was killed."""
    size = self._file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
      begin = max(0, end - 65536)
      self._file.seek(begin)
      newline = self._file.read(end - begin).rfind(b"\n")
      if newline >= 0:
        end = begin + newline + 1
        break
      end = begin
    if end < size:
      self._file.truncate(end)

  def _index(self) -> dict[int, tuple[int, int]]:
    """Returns {row: (offset, bytes)} of the part file."""
    self._file.seek(0)
    found, offset = {}, 0
    for line in self._file:
      try:
        found[self._position[str(json.loads(line)["id"])]] = (offset, len(line))
      except (ValueError, KeyError, TypeError) as e:
        raise StorageError(
          f"decode: {self._file.name}: the line at byte {offset} is damaged ({line[:80]!r}). Delete the folder "
          f"{self._folder} to start afresh."
        ) from e
      offset += len(line)
    return found

  def write(self, records: list[dict]) -> None:
    try:
      self._file.write(b"".join(line(r) for r in records))
      self._file.flush()
      os.fsync(self._file.fileno())
    except OSError as e:
      raise StorageError(
        f"decode: writing to {self._folder} failed: {e}. What was written stays; make room and run the same "
        "command again to go on."
      ) from e

  def finish(self) -> None:
    index = self._index()
    missing = len(self._position) - len(index)
    if missing:
      raise StorageError(f"decode: {missing} rows are missing from {self._folder}; run the same command again.")

    def lines():
      for i in range(len(index)):
        offset, size = index[i]
        self._file.seek(offset)
        yield self._file.read(size)

    replace(self._output, lines())
    shutil.rmtree(self._folder)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("jaxft decode: the output is complete")


def parts_folder(output: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which an unfinished output lives."""
  return output.with_name(output.name + ".parts")


def open_output(output: pathlib.Path, ids: list, manifest: dict, overwrite: bool):
  """Returns the writer of this host; where process 0 refuses, all do."""
  problem, writer, hosts = None, None, jax.process_count()
  if jax.process_index() == 0:
    try:
      if output.is_dir() or (output.exists() and not overwrite):
        raise InputError(
          f"decode: {output} exists already and is not overwritten unasked. Move it away, choose another output, or "
          "set --overwrite."
        )
      writer = Parts(output, ids, manifest)
    except (InputError, StorageError) as e:
      problem = e
    except OSError as e:
      problem = StorageError(f"decode: {parts_folder(output)} cannot be written: {e}. Choose another output.")
  if hosts > 1:
    done = writer.done if writer else np.zeros(len(ids), bool)
    state = multihost_utils.broadcast_one_to_all(np.concatenate([[problem is not None], done]))
    if jax.process_index() and state[0]:
      problem = InputError("decode: process 0 refused the output; its message says why.")
    writer = writer or Nothing(np.asarray(state[1:], bool))
  if problem:
    raise problem
  return writer


def line(record: dict) -> bytes:
  try:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
    return (json.dumps(record) + "\n").encode()


def replace(path: pathlib.Path, content: bytes | Iterable[bytes]) -> None:
  """Writes a file that appears under its name whole or not at all, and is on the disk when this returns."""
  draft = path.with_name(path.name + ".draft")
  try:
    with open(draft, "wb") as f:
      f.writelines([content] if isinstance(content, bytes) else content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
  except OSError as e:
    raise StorageError(
      f"decode: writing {path} failed: {e}. Make room, then run the same command again to go on."
    ) from e
