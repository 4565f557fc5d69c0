"""Moments in a byte: what codes stand for, that rounding is right in the mean, and that training goes the same way.

Catches: rounding to the nearest, after which a falling second moment stands still; a second moment that becomes 0 and
is divided by; chances that repeat from step to step or differ on a mesh; a moment above its top; a small leaf in bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import sharding, trees
from jaxft.train import eightbit, optimizer
from tests.train import toy
from tests.train.test_step import NUMBERS, RULES, Run

KINDS = ("mu", "nu")


def values(kind, rows=6, size=200, octaves=12.0, seed=0):
  """Moments over many octaves, their top a little above the largest."""
  rng = np.random.default_rng(seed)
  x = np.exp2(-octaves * rng.random((rows, size))) * (rng.choice([-1, 1], (rows, size)) if kind == "mu" else 1)
  scale = np.exp(rng.normal(size=(rows, 1)) * 5)
  return (x * scale).astype(np.float32), (1.3 * np.abs(x * scale).max(-1)).astype(np.float32)


def there_and_back(kind, x, top, times=1, seed=1):
  """Returns `times` moments [times, ...] that came back from codes."""
  run = jax.jit(lambda c: eightbit.decode(eightbit.encode(x, top, c, kind), top, kind))
  chances = np.random.default_rng(seed).integers(0, 2**16, (times, *x.shape)).astype(np.uint32)
  return np.stack([run(c) for c in chances])


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_is_one_of_the_two_levels_beside_a_value(kind):
  x, top = values(kind)
  found = there_and_back(kind, x, top, 20)
  ratio = found / x
  assert 2 ** (-1 / 8) - 1e-4 < ratio.min() < 0.97 and 1.03 < ratio.max() < 2 ** (1 / 8) + 1e-4
  assert {len(np.unique(found[:, 0, i])) for i in range(40)} == {1, 2}, "mostly both levels are taken, and no third"
  again = there_and_back(kind, found[0], top, 5)
  np.testing.assert_allclose(again, np.broadcast_to(found[0], again.shape), rtol=1e-4)  # a level is its own


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_right_in_the_mean(kind):
  x, top = values(kind, rows=3, octaves=14.0)
  found = there_and_back(kind, x, top, 3000)
  z = (found.mean(0) - x) / (found.std(0) / 3000**0.5 + 1e-4 * np.abs(x))
  assert np.abs(z).max() < 5 and abs(z.mean()) < 0.2


def test_nothing_and_next_to_nothing():
  top = np.array([2.0, 0.0], np.float32)
  x = np.zeros((2, 4), np.float32)
  x[0] = 0.0, 1e-30, 1.9, 2.0
  chance = np.full(x.shape, 2**16 - 1, np.uint32)  # of which nothing is rounded up
  nu = np.asarray(eightbit.encode(x, top, chance, "nu"))
  assert nu.tolist() == [[0, 1, 254, 255], [0] * 4], "what is divided by stays above 0, and 0 alone is 0"
  mu = np.asarray(eightbit.encode(-x, top, chance, "mu"))
  assert mu.tolist() == [[0, 0, -126, -127], [0] * 4]
  low = there_and_back("mu", np.full((1, 1), 2e-5, np.float32), top[:1], 4000)  # a little below the lowest level
  assert set(np.unique(low > 0)) == {False, True} and low.mean() == pytest.approx(2e-5, rel=0.1)


def run(grads, seed_leaf="a", b2=0.999, tx=None):
  """Returns updates and the last state of a leaf [8, 640] for the gradients [steps, 8, 640]."""
  tx = tx or eightbit.scale_by_adam(0.9, b2, 1e-8)
  state = tx.init({seed_leaf: jnp.zeros(grads.shape[1:])})
  step = jax.jit(lambda g, s: tx.update({seed_leaf: g}, s))
  out = []
  for g in grads:
    u, state = step(g, state)
    out.append(np.asarray(u[seed_leaf]))
  return np.stack(out), state


def noise(steps, seed=0):
  rng = np.random.default_rng(seed)
  size = np.exp(rng.normal(size=(8, 640)) * 2)
  return (rng.normal(size=(steps, 8, 640)) * size + 0.5 * size).astype(np.float32)


def test_a_second_moment_falls_as_it_should():
  """3000 steps without a gradient: 0.999^3000 is a twentieth. Rounded to the nearest it would not fall at all."""
  grads = np.concatenate([noise(30), np.zeros((3000, 8, 640), np.float32)])
  tx = eightbit.scale_by_adam(0.9, 0.999, 1e-8)
  fall = jax.jit(lambda s: jax.lax.fori_loop(0, 3000, lambda _, s: tx.update({"a": jnp.zeros((8, 640))}, s)[1], s))
  _, state = run(grads[:30])
  before, state = np.asarray(eightbit.decode(state.nu["a"], state.nu_top["a"], "nu")), fall(state)
  after = np.asarray(eightbit.decode(state.nu["a"], state.nu_top["a"], "nu"))
  assert (after / before).mean() == pytest.approx(0.999**3000, rel=0.02)
  assert int(state.count) == 3030


def test_updates_follow_those_of_adam():
  grads = noise(300)
  found, _ = run(grads)
  want, _ = run(grads, tx=optax.scale_by_adam())
  np.testing.assert_allclose(found[0], want[0], rtol=1e-5, atol=1e-7)  # nothing was rounded before the first
  assert np.abs(found).max() < 12, "nowhere is a moment divided by one that was lost"
  # v is right in the mean and 1 / sqrt(v) a little more than that: 3/8 of the variance of v, which is 4 %
  assert found[100:].mean() == pytest.approx(want[100:].mean(), rel=0.025)
  error = found[100:] - want[100:]
  assert np.sqrt(np.mean(error**2)) < 0.18 * np.sqrt(np.mean(want[100:] ** 2))
  corr = np.corrcoef(error[:-1].ravel(), error[1:].ravel())[0, 1]
  assert corr < 0.95, "the errors are of each step's own rounding"


def test_each_step_and_each_leaf_has_its_own_chances():
  tx = eightbit.scale_by_adam(0.9, 0.999, 1e-8)
  g = jnp.asarray(np.full((64, 128), 0.3, np.float32))
  grads = {"a": g.at[:, 0].set(1.0), "b": g.at[:, 0].set(1.0)}
  state = tx.init(grads)
  step = jax.jit(lambda s: tx.update(grads, s)[1])
  one = step(state)
  other = step(state._replace(count=state.count + 1))
  share = lambda x, y: float(np.mean(np.asarray(x) != np.asarray(y)))
  assert share(one.nu["a"], one.nu["b"]) > 0.1 and share(one.mu["a"], one.mu["b"]) > 0.1
  assert share(one.nu["a"], other.nu["a"]) > 0.05
  np.testing.assert_array_equal(one.mu["a"], step(state).mu["a"])


# ---- in the optimizer and in the step


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(eightbit, "FEWEST", 300)  # of the toy's leaves some are above


def made(shapes, axes, **numbers):
  flags = trees.trainable(((".*", True),), shapes, axes)
  how = {**NUMBERS, "name": "adamw_8bit", **numbers}
  return optimizer.make(**how, shapes=shapes, axes=axes, trainable=flags)[0]


def test_bytes_of_the_state():
  leaf = lambda *s: dict(kernel=jax.ShapeDtypeStruct(s, jnp.bfloat16))
  shapes = dict(layers=dict(q=leaf(4, 64, 8, 16), norm=leaf(4, 4096), small=leaf(4, 63, 65)))
  names = dict(q=("embed", "heads", "head_dim"), norm=(None,), small=("embed", "mlp"))
  axes = dict(layers={k: dict(kernel=("layers", *v)) for k, v in names.items()})
  state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(made(shapes, axes).init, shapes))
  of = lambda name: sorted((x.dtype.name, x.shape) for k, x in state if f"'{name}'" in jax.tree_util.keystr(k))
  whole, rows = (4, 64, 8, 16), (4, 64, 8)
  assert of("q") == [("float32", rows), ("float32", rows), ("int8", whole), ("uint8", whole)]
  for name, shape in (("norm", (4, 4096)), ("small", (4, 63, 65))):
    assert of(name) == [("float32", shape)] * 2, "vectors, and matrices of fewer than 4,096 entries, stay float32"


def test_training_goes_as_with_adamw(small):
  batches = [toy.batch(i) for i in range(40)]
  how = dict(lr=1e-2, b1=0.9, b2=0.999, decay=0.01, steps=100)
  ours, theirs = (Run(numbers={**how, "name": n}) for n in ("adamw_8bit", "adamw"))
  assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(ours.state.opt))
  a, b = ([m["loss"] for m in r.go(*batches)[0]] for r in (ours, theirs))
  np.testing.assert_allclose(a, b, rtol=0.03)
  assert a[-1] < a[0] - 0.05


def test_the_mesh_does_not_change_the_codes(small):
  batches = [toy.batch(i) for i in range(4)]
  how = dict(name="adamw_8bit")
  one, many = Run(numbers=how), Run(mesh=(2, 2, 2), numbers=how)
  one.go(*batches), many.go(*batches)
  places = [str(x.sharding.spec) for x in jax.tree.leaves(many.state.opt) if x.dtype == jnp.uint8]
  assert places and all("fsdp" in p for p in places), "codes lie where their parameter lies"
  differ = total = 0
  for x, y in zip(jax.tree.leaves(one.state.opt), jax.tree.leaves(many.state.opt), strict=True):
    if x.dtype in (jnp.int8, jnp.uint8):
      off = np.abs(np.asarray(x, np.int32) - np.asarray(y, np.int32))
      assert off.max() <= 1  # gradients are summed in another order, which can tip a chance
      differ, total = differ + int((off > 0).sum()), total + off.size
  assert total > 1000 and differ < 0.005 * total


def test_no_codes_are_gathered():
  """The update of sharded moments moves tops between devices, and nothing of a parameter's size."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2), jax.devices())
  shapes = dict(layers=dict(wi=dict(kernel=jax.ShapeDtypeStruct((2, 256, 512), jnp.float32))))
  axes = dict(layers=dict(wi=dict(kernel=("layers", "embed", "mlp"))))
  tx, places = made(shapes, axes, clip=0.0), sharding.leaf_shardings(mesh, RULES, axes, shapes)
  opt = jax.eval_shape(tx.init, shapes)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  state, leaf = jax.tree.map(place, opt, sharding.like(opt, shapes, places)), jax.tree.map(place, shapes, places)
  run = jax.jit(lambda g, s, p: tx.update(g, s, p, step=jnp.int32(3)))
  text = run.lower(leaf, state, leaf).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text
  assert "all-reduce" in text, "of the tops, where a row lies on several devices"
