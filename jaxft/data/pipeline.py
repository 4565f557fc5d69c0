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

from jaxft.data import feeding, layout, packing
from jaxft.data.fields import Dynamic
from jaxft.errors import InputError, did_you_mean

PLANS_KEPT = 2
BALANCES = ("none", "sampling")
THREADS, AHEAD = 2, 4  # batches made at a time, batches made ahead of the step


@dataclasses.dataclass(frozen=True)
class Plan:
  """An epoch: batch s is the rows `rows[s]` (-1: empty), cut to `lengths[s]`."""

  packed: packing.Rows
  rows: np.ndarray  # i64[steps, batch]
  bucket: np.ndarray  # i64[steps], index into the shapes


class Batches:
  """The batches of a `store.Store`.

  `lengths` are the tokens a row, `buckets` shares of them that a batch without packing may be cut to, `balance` one of
  BALANCES (sampling: an epoch has as many examples of each class), `dynamic` what is done to each batch, `every`
  whether a row comes with all its variants, not with one that is drawn for each epoch. Batches have `shapes`,
  (lengths of the sides) of each bucket, and room for the labels of `segments` examples a row.
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
    balance: str = "none",
    dynamic: Dynamic = Dynamic(),  # noqa: B008
    every: bool = False,
  ):
    _check(store, batch, pack, buckets, balance)
    self.store, self.seed, self.batch, self.pack, self.shuffle = store, seed, batch, pack, shuffle
    self.sides, self.balance, self.dynamic = store.objective.sides, balance, dynamic
    self._variants = 1 if every else store.variants
    self.lengths = dynamic.lengths_of(store.lengths["inputs"]) if dynamic.lengths_of else store.lengths
    if any(self.lengths[s].max() > lengths[s] for s in self.sides):
      raise ValueError(f"the store was opened for {store.caps}, rows are {lengths}")
    self.shapes = sorted({tuple(layout.shape(lengths[s], b) for s in self.sides) for b in (*buckets, 1.0)})
    self.segments = layout.segments(self.shapes[-1][0], self.lengths[self.sides[0]]) if pack else 1
    varied = self._variants > 1 or balance != "none"
    self._changing = (pack and shuffle) or (varied and (pack or len(self.shapes) > 1))  # steps differ by epoch
    self._plans: dict[int, Plan] = {}
    self._counts: dict[int, int] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict:
    return self.__dict__ | dict(_lock=None, _plans={})  # a reader process makes its own plans

  def __setstate__(self, state: dict) -> None:
    self.__dict__ |= state
    self._lock = threading.Lock()

  # ---- steps

  def steps(self, epochs: float) -> int:
    """Returns the steps of `epochs`; a part of an epoch is rounded up to whole steps."""
    whole = int(epochs)
    rest = epochs - whole
    return sum(self._count(e) for e in range(whole)) + (math.ceil(round(rest * self._count(whole), 6)) if rest else 0)

  def locate(self, step: int) -> tuple[int, int]:
    """Returns (epoch, step within it)."""
    if not self._changing:
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
    """Returns the steps of an epoch; packed rows differ by a few with the order, buckets with what is drawn."""
    epoch = epoch if self._changing else 0
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
    order = self._drawn(rng)
    order = order[rng.permutation(len(order))] if self.shuffle else order
    if not self.pack:
      return self._bucket_plan(order, rng)
    most = self.segments if self.store.objective.scalars else 0
    packed = packing.plan(self.lengths, order, dict(zip(self.sides, self.shapes[-1])), most)
    # rows that were closed late are less full
    numbers = rng.permutation(len(packed)) if self.shuffle else np.arange(len(packed))
    rows = layout.batched(numbers, self.batch)
    return Plan(packed, rows, np.full(len(rows), len(self.shapes) - 1))

  def _drawn(self, rng: np.random.Generator) -> np.ndarray:
    """Returns the example ids of an epoch, i64[N]: of each row one of its variants, of each class as many."""
    variants = self._variants
    slots = np.arange(len(self.store) // variants)
    if self.balance == "sampling":
      slots = layout.balanced(self.store.scalar("labels", slots * variants), rng)
    return slots * variants + rng.integers(variants, size=len(slots)) if variants > 1 else slots

  def _bucket_plan(self, order: np.ndarray, rng: np.random.Generator) -> Plan:
    """Batches of one shape each, then the order of the batches; full and part-filled ones alike."""
    lengths = np.stack([self.lengths[s][order] for s in self.sides], 1)
    fits = np.stack([(lengths <= np.array(shape)).all(axis=1) for shape in self.shapes], 1)
    bucket = fits.argmax(axis=1)  # the smallest that holds all sides
    rows, buckets = [], []
    for b in range(len(self.shapes)):
      rows.append(layout.batched(np.flatnonzero(bucket == b), self.batch))
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

  def spec(self, bucket: int = -1) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns the (shape, dtype) of everything in the global batches of a bucket."""
    lengths = dict(zip(self.sides, self.shapes[bucket]))
    whole = {*self.store.objective.scalars, "label_weights"}
    side = lambda name: "inputs" if name.startswith("input") or "targets" not in self.sides else "targets"
    return {
      k: (x.shape if k in whole else (x.shape[0], lengths[side(k)]), x.dtype)
      for k, x in self.host_batch(0, 0, 1).items()
    }

  def host_batch(self, step: int, host: int, hosts: int) -> dict[str, np.ndarray]:
    """Returns rows [B host / hosts, B (host + 1) / hosts) of the global batch.

    Always `inputs`, `input_segments` i32[B, T] (and of targets, where they are a side); by the objective `weights` f32,
    fields beside the tokens, `labels` [B, M] or [B, M, C] with `label_weights` f32[B, M] for M = `segments`.
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
    first = np.repeat(mine.starts[:-1], np.diff(mine.starts))  # of each example's row: the index of its first example
    where = layout.Where(np.repeat(full, np.diff(mine.starts)), first, np.arange(len(mine.ids)) - first)
    lengths = dict(zip(self.sides, self.shapes[plan.bucket[at]]))
    out, spots = self._tokens(mine.ids, where, share, lengths, epoch)
    out |= self._scalars(mine.ids, where, share)
    if self.dynamic.batch is None:
      return out
    at, own = spots["inputs"]
    shape = (share, lengths["inputs"])
    ids = layout.scatter(np.repeat(mine.ids, own), at, shape, -1, np.int64)
    return self.dynamic.batch(out, ids, layout.scatter(layout.within(own), at, shape, 0, np.int64), self.seed, epoch)

  def _tokens(self, ids: np.ndarray, where: layout.Where, rows: int, lengths: dict[str, int], epoch: int) -> tuple:
    """Returns (fields with a value a token, side -> (places i64 in its flat array, lengths of the examples))."""
    store, out, spots = self.store, {}, {}
    index = {s: store.index(s, ids) for s in store.sides}
    made = {s: [store.values(s, index[s]), store.lengths[s][ids]] for s in store.sides}
    if self.dynamic.corrupt:
      made = self.dynamic.corrupt(*made["inputs"], ids, self.seed, epoch)
    if self.dynamic.augment:
      numbers = store.values("words", index["inputs"])
      *made["inputs"], source = self.dynamic.augment(*made["inputs"], numbers, ids, self.seed, epoch)
      index["inputs"] = index["inputs"][source]
    for side in self.sides:
      tokens, own = made[side][0], made[side][1].astype(np.int64)
      shape = (rows, lengths[side])
      at = where.places(own, shape[1])
      spots[side] = at, own
      out[side] = layout.scatter(tokens, at, shape, store.pad or 0, np.int32)
      out[f"{side[:-1]}_segments"] = layout.scatter(np.repeat(where.number + 1, own), at, shape, 0, np.int32)
    for name, field in store.aligned.items():
      if not field.name:
        continue
      shape = (rows, lengths[field.side])
      out[field.name] = layout.scatter(
        store.values(name, index[field.side]), spots[field.side][0], shape, 0, field.batch
      )
    if store.objective.weighted and "weights" not in out:
      if "targets" in self.sides:
        out["weights"] = (out["target_segments"] > 0).astype(np.float32)
      else:  # every token but those that are there as context
        at, own = spots["inputs"]
        weights = layout.within(own) >= np.repeat(store.context[ids], own)
        out["weights"] = layout.scatter(weights, at, (rows, lengths["inputs"]), 0, np.float32)
    return out, spots

  def _scalars(self, ids: np.ndarray, where: layout.Where, rows: int) -> dict[str, np.ndarray]:
    """Returns the fields with a value an example, and which of their entries there are."""
    out = {}
    for name, dtype in self.store.objective.scalars.items():
      values = self.store.scalar(name, ids)
      out[name] = np.zeros((rows, self.segments, *values.shape[1:]), dtype)
      out[name][where.row, where.number] = values
    if out:
      out["label_weights"] = np.zeros((rows, self.segments), np.float32)
      out["label_weights"][where.row, where.number] = 1
    return out

  def stream(self, start: int, stop: int, host: int, hosts: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (step, host batch) for the steps [start, stop) in order, made ahead by tf.data, in the reader process if
    there is one; starts anywhere at the same cost.
    """
    reader = feeding.running()
    yield from reader.stream(self, start, stop, host, hosts) if reader else self.local(start, stop, host, hosts)

  def local(self, start: int, stop: int, host: int, hosts: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields what `stream` does, made in this process."""
    if start >= stop:
      return
    # also raises here, in the caller's thread, what is wrong with the config
    first = self.host_batch(start, host, hosts)
    keys = sorted(first)
    tf = tensorflow()
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

    types = [tf.as_dtype(first[k].dtype) for k in keys]
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
    room = {s: int(sum(n * shape[i] for n, shape in zip(sizes, self.shapes))) for i, s in enumerate(self.sides)}
    real = {s: int(self.lengths[s][plan.packed.ids].sum()) for s in self.sides}
    return dict(
      steps=len(plan.rows),
      batch=self.batch,
      rows=int((plan.rows >= 0).sum()),
      pack=self.pack,
      shapes=[list(x) for x in self.shapes],
      examples_a_row=len(plan.packed.ids) / int((plan.rows >= 0).sum()),
      fill={s: real[s] / room[s] for s in self.sides},
      balance=self.balance,
    )


def _check(store, batch: int, pack: bool, buckets: tuple[float, ...], balance: str) -> None:
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
  if balance not in BALANCES:
    raise InputError(
      f"config: data.balance is {balance!r}; it is one of {', '.join(BALANCES)}{did_you_mean(balance, BALANCES)}."
    )
  if balance != "none" and not store.objective.balanced:
    raise InputError(
      f"config: data.balance={balance} needs a task.kind whose rows belong to one class each (classify without "
      f"task.multi); this one is {store.kind}."
    )


def tensorflow():
  """Returns tensorflow, quiet and without any accelerator; the door of tf.data."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # prints a notice otherwise; no TensorFlow arithmetic is used here
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
