"""Packing: every example exactly once, no side over its cap, the same plan every time, rows full.

Catches: one side's cap ignored, an example lost or doubled where runs meet or where loose rows are packed again, an
order that depends on anything but the arguments, a window that closes rows too early.
"""

import numpy as np
import pytest

from jaxft.data import packing

CAPS = dict(inputs=131, targets=67)


def lengths(n, seed=0):
  r = np.random.default_rng(seed)
  a = np.clip(r.lognormal(3, 0.6, n), 1, CAPS["inputs"]).astype(np.int32)
  return dict(inputs=a, targets=np.clip(a * r.uniform(0.2, 0.9, n), 1, CAPS["targets"]).astype(np.int32))


@pytest.mark.parametrize("n", [0, 1, 2, 63, 2049, 3 * 2048 + 5, 20_011])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_invariants(n, most):
  x, order = lengths(n), np.random.default_rng(1).permutation(n)
  rows = packing.plan(x, order, CAPS, most)
  assert sorted(rows.ids.tolist()) == list(range(n)) and rows.starts[0] == 0 and rows.starts[-1] == n
  sizes = np.diff(rows.starts)
  assert (sizes > 0).all() and (not most or (sizes <= most).all())
  for name, cap in CAPS.items():
    assert not n or np.add.reduceat(x[name][rows.ids], rows.starts[:-1]).max() <= cap
  again = packing.plan(x, order, CAPS, most)
  assert (again.ids == rows.ids).all() and (again.starts == rows.starts).all()


def test_fill():
  x = lengths(20_011)
  rows = packing.plan(x, np.random.default_rng(1).permutation(20_011), CAPS)
  bound = max(x[s].sum() / CAPS[s] for s in CAPS)
  assert bound / len(rows) > 0.94
  whole = dict(inputs=np.full(100, 10, np.int32), targets=np.full(100, 1, np.int32))
  assert len(packing.plan(whole, np.arange(100), dict(inputs=50, targets=50))) == 20


def test_a_subset_and_the_order_matter():
  x = lengths(500)
  rows = packing.plan(x, np.arange(100, 200), CAPS)
  assert sorted(rows.ids.tolist()) == list(range(100, 200))
  other = packing.plan(x, np.arange(199, 99, -1), CAPS)
  assert rows.ids.tolist() != other.ids.tolist()


def test_take_and_getitem():
  rows = packing.Rows(np.array([5, 6, 7, 8]), np.array([0, 1, 1, 4]))
  taken = rows.take(np.array([2, 0]))
  assert taken.ids.tolist() == [6, 7, 8, 5] and taken.starts.tolist() == [0, 3, 4] and rows[2].tolist() == [6, 7, 8]
  assert len(rows.take(np.array([], int))) == 0


def test_too_long_is_our_own_mistake():
  with pytest.raises(ValueError):
    packing.plan(dict(inputs=np.array([132], np.int32), targets=np.array([1], np.int32)), np.arange(1), CAPS)


def test_loose_rows_join_each_other_not_a_full_one():
  items = np.array([[10, 10, 50], [5, 5, 5]], np.int32)
  rows = packing._repack(np.array([0, 1, 2]), items, np.array([50, 50], np.int32), 9)
  assert rows[0] == rows[1] != rows[2]
