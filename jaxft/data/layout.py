"""Where the values of examples go in the arrays of a batch, and which examples an epoch takes."""

import dataclasses
import math

import numpy as np

SLACK, MOST_SEGMENTS = 1.5, 64  # examples a row over the mean number, where a batch has something for each of them


@dataclasses.dataclass(frozen=True)
class Where:
  """Of each example of a batch: its row, the index of the first example of that row, its number within it."""

  row: np.ndarray
  first: np.ndarray
  number: np.ndarray

  def places(self, lengths: np.ndarray, width: int) -> np.ndarray:
    """Returns where the values of the examples go in a flat [rows, width]: one after the other from the left."""
    ends = np.cumsum(lengths)
    before = np.concatenate([np.zeros(1, np.int64), ends])
    offset = self.row * width - before[self.first]
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(offset, lengths)


def scatter(values: np.ndarray, at: np.ndarray, shape: tuple[int, int], empty: int, dtype) -> np.ndarray:
  out = np.full(shape, empty, dtype)
  out.reshape(-1)[at] = values
  return out


def within(lengths: np.ndarray) -> np.ndarray:
  """Returns 0, 1, .. n - 1 for each of the lengths n, one after the other."""
  ends = np.cumsum(lengths)
  return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def segments(length: int, lengths: np.ndarray) -> int:
  """Returns the most examples that a packed row may hold: a number of the store, the same for every epoch."""
  most = math.ceil(SLACK * length / float(lengths.mean()))
  return min(MOST_SEGMENTS, -(-most // 8) * 8)


def balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns as many indices as there are labels, ascending, the same number of each class (one more of some)."""
  classes = np.unique(labels)
  each, more = divmod(len(labels), len(classes))
  lucky = rng.permutation(len(classes)) < more
  out = []
  for label, quota in zip(classes, each + lucky):
    members = np.flatnonzero(labels == label)
    whole, rest = divmod(int(quota), len(members))
    out += [np.tile(members, whole), rng.permutation(members)[:rest]]
  return np.sort(np.concatenate(out))


def shape(length: int, share: float) -> int:
  """Returns the bucket's length: whole multiples of 8, which matrix units like, unless it is the full length."""
  return min(length, -(-math.ceil(length * share) // 8) * 8)


def batched(rows: np.ndarray, batch: int) -> np.ndarray:
  """Returns i64[steps, batch], the last one filled with -1."""
  out = np.full(-(-len(rows) // batch) * batch, -1, np.int64)
  out[: len(rows)] = rows
  return out.reshape(-1, batch)
