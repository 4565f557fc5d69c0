"""Batches are a pure function of (seed, step), the same for any number of hosts, and cover each epoch exactly once.

Catches: state carried between calls, a plan that is not the epoch's, rows dropped or doubled at the end of an epoch or
between buckets, segments that do not restart, weights on padding, a stream that skips, repeats or reorders.
"""

import numpy as np
import pytest

from jaxft.data import pipeline
from jaxft.errors import InputError

LENGTHS = dict(inputs=41, targets=29)
PAIRS = [(f"{i}" + "a" * (i * 7 % 31), f"{i}" + "b" * (i * 5 % 23)) for i in range(103)]


@pytest.fixture
def store(make_store):
  return make_store(PAIRS)


def batches(store, **given):
  return pipeline.Batches(
    store, **{**dict(seed=5, batch=6, lengths=LENGTHS, pack=True, buckets=(), shuffle=True), **given}
  )


MODES = [
  dict(),
  dict(pack=False),
  dict(pack=False, buckets=(0.3, 0.6)),
  dict(shuffle=False),
  dict(pack=False, shuffle=False),
  dict(pack=False, buckets=(0.5,), shuffle=False),
]


def same(a, b):
  return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", MODES)
def test_each_epoch_once_and_tokens_right(store, mode):
  b = batches(store, **mode)
  one, two = b.steps(1), b.steps(2)
  orders = []
  for start, stop in ((0, one), (one, two)):
    ids = [i for step in range(start, stop) for i in b.example_ids(step)]
    assert sorted(ids) == list(range(103))
    orders.append(ids)
  assert (orders[0] != orders[1]) == b.shuffle and (orders[0] == sorted(orders[0])) == (
    not b.shuffle and not b.pack and not mode.get("buckets")
  )
  for step in range(two):
    batch, rows = b.host_batch(step, 0, 1), b.row_examples(step)
    assert {k: v.dtype for k, v in batch.items()} == dict(
      inputs=np.int32, input_segments=np.int32, targets=np.int32, target_segments=np.int32, weights=np.float32
    )
    assert len(rows) == 6 and (batch["inputs"].shape[1], batch["targets"].shape[1]) in b.shapes
    assert np.array_equal(batch["weights"], (batch["target_segments"] > 0).astype(np.float32))
    for r, ids in enumerate(rows):
      for name, segments in (("inputs", "input_segments"), ("targets", "target_segments")):
        real = batch[segments][r] > 0
        want = [store.tokens(name, i) for i in ids]
        assert batch[segments][r][real].tolist() == [n for n, x in enumerate(want, 1) for _ in x]
        assert batch[name][r][real].tolist() == [t for x in want for t in x]
        assert not batch[name][r][~real].any() and not real[real.sum() :].any()


@pytest.mark.parametrize("mode", MODES[:3])
def test_hosts_do_not_change_the_global_batch(store, mode):
  b = batches(store, **mode)
  for step in (0, 3, b.steps(1) - 1):
    whole = b.host_batch(step, 0, 1)
    for hosts in (2, 3, 6):
      parts = [batches(store, **mode).host_batch(step, h, hosts) for h in range(hosts)]
      assert same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})
  with pytest.raises(InputError, match="batch=6 does not divide over 4 hosts; the nearest that do are 4 and 8"):
    b.host_batch(0, 0, 4)


@pytest.mark.parametrize("mode", MODES[:4])
def test_seek_equals_replay(store, mode):
  replay = batches(store, **mode)
  all_batches = [replay.host_batch(s, 0, 1) for s in range(replay.steps(3.5))]
  for step in (len(all_batches) - 1, 0, replay.steps(2), replay.steps(1) - 1):
    assert same(batches(store, **mode).host_batch(step, 0, 1), all_batches[step])
  assert len(replay._plans) <= 2


def test_seed_and_epoch_decide_the_order(store):
  first = [batches(store, seed=s, pack=False).example_ids(0) for s in (1, 2, 2, -3)]
  assert first[0] != first[1] == first[2] != first[3]


@pytest.mark.parametrize("mode", MODES[:3])
def test_stream(store, mode):
  b = batches(store, **mode)
  start, stop = b.steps(1) - 2, b.steps(2) + 3
  for host, hosts in ((0, 1), (1, 2)):
    got = list(batches(store, **mode).stream(start, stop, host, hosts))
    assert [s for s, _ in got] == list(range(start, stop))
    assert all(same(x, b.host_batch(s, host, hosts)) for s, x in got)
  assert list(b.stream(3, 3, 0, 1)) == []


def test_error_inside_the_stream_arrives_as_it_was(store, monkeypatch):
  b = batches(store)
  whole = b.host_batch
  monkeypatch.setattr(
    b, "host_batch", lambda step, *a: whole(step, *a) if step < 2 else (_ for _ in ()).throw(InputError("row 7 is bad"))
  )
  with pytest.raises(InputError, match="^row 7 is bad$"):
    list(b.stream(0, 5, 0, 1))


def test_steps_of_parts_of_epochs(store):
  b = batches(store, pack=False, batch=10)
  assert [b.steps(e) for e in (0.0, 0.1, 0.5, 1, 1.25, 3)] == [0, 2, 6, 11, 14, 33]
  packed = batches(store)
  assert packed.steps(2.5) == sum(len(packed.plan(e).rows) for e in (0, 1)) + -(-len(packed.plan(2).rows) // 2)


def test_buckets(store):
  b = batches(store, pack=False, buckets=(0.3, 0.6))
  assert b.shapes == [(16, 16), (32, 24), (41, 29)]
  plan = b.plan(0)
  for s in range(len(plan.rows)):
    for i in b.example_ids(s):
      fits = [all(store.lengths[n][i] <= x for n, x in zip(("inputs", "targets"), shape)) for shape in b.shapes]
      assert plan.bucket[s] == fits.index(True)
  assert len(set(plan.bucket[:6])) > 1  # the order of the batches is shuffled, too


def test_summary(store):
  b = batches(store)
  got = b.summary()
  real = sum(int((b.host_batch(s, 0, 1)["target_segments"] > 0).sum()) for s in range(got["steps"]))
  assert got["fill"]["targets"] == pytest.approx(real / (got["steps"] * 6 * 29)) and got["rows"] <= got["steps"] * 6


@pytest.mark.parametrize("bad", [dict(batch=0), dict(pack=False, buckets=(0.0,)), dict(buckets=(0.5,))])
def test_bad_options(store, bad):
  with pytest.raises(InputError, match="config: "):
    batches(store, **bad)
