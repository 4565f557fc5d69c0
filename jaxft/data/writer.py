"""The flat files of a token cache: appended to chunk by chunk, relabelled at the end."""

import contextlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxft.data.fields import Ragged
from jaxft.errors import StorageError

BLOCK = 1 << 22  # values relabelled at a time


@contextlib.contextmanager
def storage(folder):
  """Turns the OSErrors of writing into `folder` into a StorageError that says what to do."""
  try:
    yield
  except OSError as e:
    raise StorageError(
      f"the token cache {folder} cannot be written: {e.strerror or e}. Free some space or point data.cache (or "
      "$JAXFT_CACHE) to a "
      "folder that is writable and has room; nothing else was touched."
    ) from e


class Writer:
  """Appends arrays to flat files; their sizes are checked when the cache is opened."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.files, self.empty = folder, {}, {}  # empty: whether a file holds nothing but zeros

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    with storage(self.folder):
      for f in self.files.values():
        if kind is None:
          f.flush()
          os.fsync(f.fileno())
        f.close()

  def write(self, arrays: Mapping[str, np.ndarray | Ragged]) -> None:
    """Appends each array to the file NAME; a ragged one to NAME.values and NAME.lengths."""
    with storage(self.folder):
      for name, array in arrays.items():
        if isinstance(array, Ragged):
          self._append(f"{name}.values", array.values)
          self._append(f"{name}.lengths", array.lengths)
        else:
          self._append(name, array)

  def _append(self, name: str, array: np.ndarray) -> None:
    if name not in self.files:
      self.files[name] = open(self.folder / name, "wb", buffering=1 << 20)
      self.empty[name] = True
    self.empty[name] = self.empty[name] and not array.any()
    self.files[name].write(array.data if array.size else b"")


def relabel(path: pathlib.Path, numbers: np.ndarray) -> np.ndarray:
  """Replaces every i32 n of a file by numbers[n], and -1 by 0; returns i64[len(numbers)], how often each result occurs
  (without those that were -1)."""
  counts = np.zeros(len(numbers), np.int64)
  with storage(path.parent):
    if not path.stat().st_size:
      return counts
    values = np.memmap(path, np.int32, "r+")
    for start in range(0, len(values), BLOCK):
      block = values[start : start + BLOCK]
      known = np.asarray(block) >= 0
      final = numbers[block[known]]
      counts += np.bincount(final, minlength=len(numbers))
      block[:] = 0
      block[known] = final
    values.flush()
  return counts
