"""Batches as a pure function of (seed, step): permutation, packing plan, rows of this host, prefetched through tf.data.

Nothing is carried from step to step, so a run can start at any of them, and the global batch does not depend on the
number of hosts. Each example is seen exactly once an epoch: what is missing in the last batch is empty rows, which
weigh nothing.
"""

import concurrent.futures
import dataclasses
import math
import os
import threading
from collections.abc import Iterator

import numpy as np

from jaxft.data import packing
from jaxft.data.tasks import SIDES
from jaxft.errors import InputError

PLANS_KEPT = 2
THREADS, AHEAD = 2, 4  # batches made at a time, batches made ahead of the step


@dataclasses.dataclass(frozen=True)
class Plan:
  """An epoch: batch s is the rows `rows[s]` (-1: empty), cut to `lengths[s]`."""

  packed: packing.Rows
  rows: np.ndarray  # i64[steps, batch]
  bucket: np.ndarray  # i64[steps], index into the shapes


class Batches:
  """The batches of a `cache.Store`. `lengths` are the tokens a row, `buckets` shares of them that a batch without
  packing may be cut to.
  """

  def __init__(
    self,
    store,
    *,
    seed: int,
    batch: int,
    lengths: dict[str, int],
    pack: bool,
    buckets: tuple[float, ...],
    shuffle: bool,
  ):
    if batch < 1:
      raise InputError(f"config: batch is {batch}; it is the number of rows of a step, at least 1.")
    if any(not 0 < b <= 1 for b in buckets):
      raise InputError(
        f"config: data.buckets is {tuple(buckets)}; its entries are shares of data.lengths, above 0 and at most 1."
      )
    if pack and buckets:
      raise InputError(
        "config: data.buckets is for data.pack=False; packed rows are full as they are. Set one of the two."
      )
    if any(store.lengths[s].max() > lengths[s] for s in SIDES):
      raise ValueError(f"the store was opened for {store.caps}, rows are {lengths}")
    self.store, self.seed, self.batch, self.pack, self.shuffle = store, seed, batch, pack, shuffle
    self.shapes = sorted({tuple(_shape(lengths[s], b) for s in SIDES) for b in (*buckets, 1.0)})
    self._plans: dict[int, Plan] = {}
    self._counts: dict[int, int] = {}
    self._lock = threading.Lock()

  # ---- steps

  def steps(self, epochs: float) -> int:
    """Returns the steps of `epochs`; a part of an epoch is rounded up to whole steps."""
    whole = int(epochs)
    rest = epochs - whole
    return sum(self._count(e) for e in range(whole)) + (math.ceil(round(rest * self._count(whole), 6)) if rest else 0)

  def locate(self, step: int) -> tuple[int, int]:
    """Returns (epoch, step within it)."""
    if not self.pack:
      return divmod(step, self._count(0))
    epoch = 0
    while step >= self._count(epoch):
      step, epoch = step - self._count(epoch), epoch + 1
    return epoch, step

  def bucket(self, step: int) -> int:
    """Returns the index in `shapes` of the shape of the batch of `step`."""
    if len(self.shapes) == 1:
      return 0
    epoch, at = self.locate(step)
    return int(self.plan(epoch).bucket[at])

  def _count(self, epoch: int) -> int:
    """Returns the steps of an epoch: without packing always the same; packed rows differ by a few with the order."""
    epoch = epoch if self.pack and self.shuffle else 0
    if epoch not in self._counts:
      self._counts[epoch] = len(self.plan(epoch).rows)
    return self._counts[epoch]

  def plan(self, epoch: int) -> Plan:
    """Returns the plan of an epoch, a pure function of (seed, epoch); the last two are kept."""
    with self._lock:
      if epoch not in self._plans:
        self._plans[epoch] = self._make_plan(epoch)
        while len(self._plans) > PLANS_KEPT:
          del self._plans[next(iter(self._plans))]
      return self._plans[epoch]

  def _make_plan(self, epoch: int) -> Plan:
    # Without shuffling the generator is there all the same, and not used.
    rng = np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64)))
    order = rng.permutation(len(self.store)) if self.shuffle else np.arange(len(self.store))
    if not self.pack:
      return self._bucket_plan(order, rng)
    packed = packing.plan(self.store.lengths, order, dict(zip(SIDES, self.shapes[-1])))
    # rows that were closed late are less full
    numbers = rng.permutation(len(packed)) if self.shuffle else np.arange(len(packed))
    rows = _batched(numbers, self.batch)
    return Plan(packed, rows, np.full(len(rows), len(self.shapes) - 1))

  def _bucket_plan(self, order: np.ndarray, rng: np.random.Generator) -> Plan:
    """Batches of one shape each, then the order of the batches; full and part-filled ones alike."""
    lengths = np.stack([self.store.lengths[s][order] for s in SIDES], 1)
    fits = np.stack([(lengths <= np.array(shape)).all(axis=1) for shape in self.shapes], 1)
    bucket = fits.argmax(axis=1)  # the smallest that holds both sides
    rows, buckets = [], []
    for b in range(len(self.shapes)):
      rows.append(_batched(np.flatnonzero(bucket == b), self.batch))
      buckets.append(np.full(len(rows[-1]), b))
    rows, buckets = np.concatenate(rows), np.concatenate(buckets)
    turn = rng.permutation(len(rows)) if self.shuffle and len(self.shapes) > 1 else np.arange(len(rows))
    return Plan(packing.single(order), rows[turn], buckets[turn])

  # ---- batches

  def row_examples(self, step: int) -> list[list[int]]:
    """Returns the example ids of every row of the global batch; an empty row has none."""
    epoch, at = self.locate(step)
    plan = self.plan(epoch)
    return [plan.packed[r].tolist() if r >= 0 else [] for r in plan.rows[at]]

  def example_ids(self, step: int) -> list[int]:
    """Returns the example ids of the global batch, row by row."""
    return [i for row in self.row_examples(step) for i in row]

  def host_batch(self, step: int, host: int, hosts: int) -> dict[str, np.ndarray]:
    """Returns rows [B host / hosts, B (host + 1) / hosts) of the global batch: inputs, targets and their segments
    i32, weights f32.
    """
    if self.batch % hosts:
      low = self.batch // hosts * hosts
      raise InputError(
        f"config: batch={self.batch} does not divide over {hosts} hosts; the nearest that do are {low or hosts} and "
        f"{low + hosts}."
      )
    epoch, at = self.locate(step)
    plan = self.plan(epoch)
    share = self.batch // hosts
    rows = plan.rows[at, host * share : (host + 1) * share]
    full = np.flatnonzero(rows >= 0)
    mine = plan.packed.take(rows[full])
    row_of = np.repeat(full, np.diff(mine.starts))
    out = {}
    for name, single, length in zip(SIDES, ("input", "target"), self.shapes[plan.bucket[at]]):
      out[name], out[f"{single}_segments"] = self._fill(name, mine, row_of, (share, length))
    out["weights"] = (out["target_segments"] > 0).astype(np.float32)
    return out

  def _fill(
    self, name: str, mine: packing.Rows, row_of: np.ndarray, shape: tuple[int, int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, segments), i32[rows, length] each: the examples of a row one after the other from its left."""
    tokens = np.full(shape, self.store.pad or 0, np.int32)
    segments = np.zeros(shape, np.int32)
    lengths = self.store.lengths[name][mine.ids].astype(np.int64)
    ends = np.cumsum(lengths)
    first = np.repeat(mine.starts[:-1], np.diff(mine.starts))  # of each example's row: the index of the first example
    before = np.concatenate([np.zeros(1, np.int64), ends])
    offset = row_of * shape[1] + (ends - lengths) - before[first]
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(offset - (ends - lengths), lengths)
    tokens.reshape(-1)[at] = self.store.gather(name, mine.ids)
    segments.reshape(-1)[at] = np.repeat(np.arange(len(lengths)) - first + 1, lengths)
    return tokens, segments

  def stream(self, start: int, stop: int, host: int, hosts: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (step, host batch) for the steps [start, stop) in order, made ahead by tf.data; starts anywhere at the
    same cost.
    """
    if start >= stop:
      return
    # also raises here, in the caller's thread, what is wrong with the config
    keys = sorted(self.host_batch(start, host, hosts))
    tf = _tensorflow()
    failures: list[Exception] = []
    helper = concurrent.futures.ThreadPoolExecutor(1)
    asked: set[int] = set()

    def make(step):
      try:
        epoch, at = self.locate(int(step))
        if epoch + 1 not in asked and self.shuffle and step - at + self._count(epoch) < stop:
          asked.add(epoch + 1)
          helper.submit(self.plan, epoch + 1)  # ready before the epoch turns
        batch = self.host_batch(int(step), host, hosts)
        return [batch[k] for k in keys]
      except Exception as e:
        failures.append(e)  # tf.data would turn it into an error of its own
        raise

    types = [tf.float32 if k == "weights" else tf.int32 for k in keys]
    steps = tf.data.Dataset.range(start, stop)
    data = steps.map(
      lambda s: (s, tuple(tf.numpy_function(make, [s], types, stateful=False))),
      num_parallel_calls=THREADS,
      deterministic=True,
    )
    try:
      for step, values in data.prefetch(AHEAD).as_numpy_iterator():
        yield int(step), dict(zip(keys, values))
    except tf.errors.OpError:
      if failures:
        raise failures[0] from None
      raise
    finally:
      helper.shutdown(wait=False, cancel_futures=True)

  def summary(self) -> dict:
    """Returns what the data report says of an epoch (the first): steps, rows, and real tokens over the tokens of
    all rows.
    """
    plan = self.plan(0)
    sizes = np.bincount(plan.bucket, minlength=len(self.shapes)) * self.batch
    room = {s: int(sum(n * shape[i] for n, shape in zip(sizes, self.shapes))) for i, s in enumerate(SIDES)}
    real = {s: int(self.store.lengths[s].sum()) for s in SIDES}
    return dict(
      steps=len(plan.rows),
      batch=self.batch,
      rows=int((plan.rows >= 0).sum()),
      pack=self.pack,
      shapes=[list(x) for x in self.shapes],
      examples_a_row=len(self.store) / int((plan.rows >= 0).sum()),
      fill={s: real[s] / room[s] for s in SIDES},
    )


def _shape(length: int, share: float) -> int:
  """Returns the bucket's length: whole multiples of 8, which matrix units like, unless it is the full length."""
  return min(length, -(-math.ceil(length * share) // 8) * 8)


def _batched(rows: np.ndarray, batch: int) -> np.ndarray:
  """Returns i64[steps, batch], the last one filled with -1."""
  out = np.full(-(-len(rows) // batch) * batch, -1, np.int64)
  out[: len(rows)] = rows
  return out.reshape(-1, batch)


def _tensorflow():
  """Returns tensorflow, quiet and without any accelerator; the door of tf.data."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # prints a notice otherwise; no TensorFlow arithmetic is used here
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
