"""What an example is made of on its way from a row to a batch: token sides, arrays beside their tokens, and scalars."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
  """A rendered row."""

  input: str  # as people read it; `parts` is what is tokenised
  target: str
  input_chars: int | None  # of the fields alone; None where the template has none
  target_chars: int | None
  nulls: int  # fields that were null and count as empty text
  parts: Any = None  # what the objective's `encode` takes
  drop: str = ""  # why the row is left out, or empty


class Aligned(NamedTuple):
  """An array with one entry for each token of `side`."""

  side: str
  dtype: str  # in the cache
  name: str  # in a batch; empty: it is in none
  batch: str  # dtype in a batch


class Ragged(NamedTuple):
  """Values of several examples, one after the other."""

  values: np.ndarray
  lengths: np.ndarray  # i32[examples]

  @classmethod
  def of(cls, lists: Sequence[Sequence], dtype) -> "Ragged":
    """Returns the lists (of numbers, or bytes) joined."""
    lengths = np.array([len(x) for x in lists], np.int32)
    if lists and isinstance(lists[0], bytes):
      return cls(np.frombuffer(b"".join(lists), dtype), lengths)
    return cls(np.fromiter(itertools.chain.from_iterable(lists), dtype, int(lengths.sum())), lengths)

  def keep(self, mask: np.ndarray) -> "Ragged":
    return Ragged(self.values[np.repeat(mask, self.lengths)], self.lengths[mask])

  @property
  def starts(self) -> np.ndarray:
    return starts(self.lengths)


def starts(lengths: np.ndarray) -> np.ndarray:
  """Returns i64[n + 1]: where each of n runs begins in their concatenation, and the end of the last."""
  return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


class Columns(NamedTuple):
  """What `encode` makes of the examples of a chunk. Lists have one entry an example, in order."""

  sides: Mapping[str, Sequence[Sequence[int]]]  # name -> token ids
  aligned: Mapping[str, Sequence[Sequence[int]]] = {}  # name -> as long as the tokens of its side
  scalars: Mapping[str, Sequence[Any]] = {}  # name -> numbers, or lists of numbers of any length
  table: Sequence[tuple[Any, int]] = ()  # labels in order of appearance (name or id), each with its first example
  counts: Mapping[str, int] = {}  # what the report adds up
  rows: Sequence[int] | None = None  # the example of each entry, ascending, where an example gives several (or none)
  texts: Sequence[tuple[str, str]] | None = None  # (input, target) of each entry, where they are not the example's


class Objective(NamedTuple):
  """What sets one kind of task apart; a new kind is a new entry of objectives.KINDS.

  The functions from `resolve` to `encode` run in worker processes: they see numpy, and neither JAX nor transformers.
  """

  sides: tuple[str, ...]  # token fields of a batch, each with its own length
  options: tuple[str, ...]  # fields of the task that it reads, besides kind and input
  default: Callable[[Any], bool]  # task -> whether columns decide about its templates
  resolve: Callable[[Any, dict], Any]  # task with default templates, row -> task with those for these columns
  render: Callable[[Any, dict, Callable[[str], str], str, Any], Example]  # task, row, fix, place, chat template
  encode: Callable[[Sequence[Example], Any], Columns]  # examples, build.Job
  aligned: Mapping[str, Aligned] = {}
  scalars: Mapping[str, str] = {}  # name -> dtype in a batch
  kept: Mapping[str, str] = {}  # name -> dtype in the cache of what an example has and a batch has not; uint8: bytes
  stored: tuple[str, ...] = ()  # sides in the cache where `sides` are made of them batch by batch; empty: `sides`
  labelled: str = ""  # the field whose values are numbers of labels
  ends: str = ""  # the side whose last token should be end-of-text
  cut: str = "end"  # what truncation leaves: end (its beginning, and its last token where that is special), start
  split: bool = False  # examples over the length are cut into several, nothing is too long
  weighted: bool = False  # whether a batch has weights a token
  blank: str = ""  # why an example may have no token to learn
  windows: bool = False  # whether `encode` reads job.lengths, which then are part of the cache
  # (row, place) -> (row, place), ...: the rows that stand in one of the source
  expand: Callable[[dict, str], Iterable[tuple[dict, str]]] | None = None
  balanced: bool = False  # whether its examples belong to one class each

  @property
  def held(self) -> tuple[str, ...]:
    """The sides in the cache."""
    return self.stored or self.sides


class Dynamic(NamedTuple):
  """What is done to tokens batch by batch, anew each epoch: pure functions of (seed, epoch, example id, place)."""

  # i32[N] tokens of each example as stored -> side -> i32[N], its lengths in a batch; None: as stored
  lengths_of: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None
  # (tokens i32[n] of several examples, i32[k] their lengths, i64[k] their ids, seed, epoch) -> side -> (i32 tokens,
  # lengths), of the lengths that `lengths_of` says; goes with it
  corrupt: Callable[..., Mapping[str, tuple[np.ndarray, np.ndarray]]] | None = None
  # (batch, ids i64[B, T] of the example at each place and -1 on padding, places i64[B, T] within it, seed, epoch) ->
  # batch; the same fields every time
  batch: Callable[..., dict[str, np.ndarray]] | None = None
  # (tokens of `inputs` of several examples, i32[k] their lengths, i32[n] words, i64[k] ids, seed, epoch) ->
  # (tokens, lengths, i64[m] the index of each among those before); none is longer than before
  augment: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
  says: tuple[str, ...] = ()  # what is done, for the report
