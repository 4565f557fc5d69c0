"""Optimizers against plain Optax on unstacked leaves, and schedules at chosen points.

Catches: decay on norms, decay without the learning rate, a rule for one layer applied to its neighbours, stacked layers
that share statistics (Adafactor's clipping and scale, Muon's orthogonalisation), an embedding given to Muon, heads not
joined into a matrix, clipping after the update, a first step of rate zero, a schedule off by one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import trees
from jaxft.errors import InputError
from jaxft.train import optimizer

NUMBERS = dict(
  name="adamw",
  lr=0.02,
  schedule="constant",
  warmup=0,
  cooldown=0.2,
  end=0.0,
  clip=0.0,
  b1=0.85,
  b2=0.97,
  eps=1e-6,
  decay=0.0,
  decay_rules=((r".*norm.*", 0.0), (r".*", 1.0)),
  lr_rules=((r".*", 1.0),),
  layer_decay=1.0,
  toward_init=0.0,
  unfreeze=(),
  steps=23,
)
L, D, N, H, V = 3, 130, 10, 13, 17  # 130 x 130: Adafactor factors what is 128 or more on both sides
AXES = dict(
  embed=dict(embedding=("vocab", "embed")),
  side=dict(
    layers=dict(
      q=dict(kernel=("layers", "embed", "heads", "head_dim")),
      o=dict(kernel=("layers", "heads", "head_dim", "embed")),
      norm=dict(scale=("layers", None)),
    )
  ),
)
SIZES = dict(
  embed=dict(embedding=(V, D)),
  side=dict(layers=dict(q=dict(kernel=(L, D, N, H)), o=dict(kernel=(L, N, H, D)), norm=dict(scale=(L, D)))),
)


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s) * scale, jnp.float32), SIZES, is_leaf=lambda x: isinstance(x, tuple)
  )


def quick(fn, *args):
  """`fn` compiled for such `args`, with little optimisation: it runs three times."""
  return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})


def run(steps=3, trainable=((".*", True),), dtype=jnp.float32, **numbers):
  """Parameters after some steps of ours."""
  params = jax.tree.map(lambda x: x.astype(dtype), tree(0, 0.3))
  flags = trees.trainable(trainable, params, AXES)
  tx, _ = optimizer.make(**{**NUMBERS, **numbers}, shapes=params, axes=AXES, trainable=flags)
  state = tx.init(params)
  update = quick(lambda u, s, p, t: tx.update(u, s, p, step=t), tree(1), state, params, jnp.int32(0))
  for t in range(steps):
    updates, state = update(tree(t + 1), state, params, jnp.int32(t))
    params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
  return params


def unstack(params):
  """Leaves as the original models have them: one a layer, heads joined to matrices."""
  out = {}
  for path, x in trees.flatten(params).items():
    if "layers" not in path:
      out[path] = x
      continue
    for i, name in enumerate(trees.layer_paths(path, L)):
      out[name] = x[i].reshape(D, N * H) if "/q/" in name else x[i].reshape(N * H, D) if "/o/" in name else x[i]
  return out


def plain(tx, steps=3):
  """The same steps by plain Optax, on unstacked leaves."""
  params = unstack(tree(0, 0.3))
  state = tx.init(params)
  update = quick(tx.update, params, state, params)
  for t in range(steps):
    updates, state = update(unstack(tree(t + 1)), state, params)
    params = optax.apply_updates(params, updates)
  return params


def same(ours, want, limit=2e-6):
  ours = unstack(ours)
  assert set(ours) == set(want)
  for path in want:
    np.testing.assert_allclose(ours[path], want[path], atol=limit, rtol=limit, err_msg=path)


def no_norm(params):
  return {p: "norm" not in p for p in params}


def test_adamw():
  same(run(decay=0.3), plain(optax.adamw(0.02, 0.85, 0.97, 1e-6, weight_decay=0.3, mask=no_norm)))


def test_lion():
  same(run(name="lion", decay=0.3), plain(optax.lion(0.02, 0.85, 0.97, weight_decay=0.3, mask=no_norm)))


def test_adafactor_works_on_the_matrices_of_single_layers():
  same(run(name="adafactor"), plain(optax.adafactor(0.02)))


def test_adafactor_keeps_rows_and_columns_only():
  flags = trees.trainable(((".*", True),), tree(0), AXES)
  tx, _ = optimizer.make(**{**NUMBERS, "name": "adafactor"}, shapes=tree(0), axes=AXES, trainable=flags)
  assert trees.nbytes(tx.init(tree(0))) < 0.1 * trees.nbytes(tree(0))


def test_muon_orthogonalises_the_matrices_of_single_layers_and_nothing_else():
  got = unstack(run(name="muon", decay=0.3))
  matrices = {p for p in got if "kernel" in p}
  params = unstack(tree(0, 0.3))
  dims = {p: optax.contrib.MuonDimensionNumbers(0, 1) for p in matrices}
  tx = {
    True: optax.chain(
      optax.contrib.scale_by_muon(beta=0.85, weight_dimension_numbers=lambda u: {p: dims[p] for p in u}),
      optax.scale(0.2 * D**0.5),
    ),
    False: optax.scale_by_adam(0.85, 0.97, 1e-6),
  }
  for kind, names in ((True, matrices), (False, set(params) - matrices)):
    part = {p: params[p] for p in names}
    rest = optax.chain(tx[kind], optax.add_decayed_weights(0.3, no_norm), optax.scale(-0.02))
    state = rest.init(part)
    update = quick(rest.update, part, state, part)
    for t in range(3):
      grads = unstack(tree(t + 1))
      updates, state = update({p: grads[p] for p in names}, state, part)
      part = optax.apply_updates(part, updates)
    for p in names:
      np.testing.assert_allclose(got[p], part[p], atol=2e-5, err_msg=p)
  assert any("kernel" not in p for p in params) and len(matrices) == 2 * L


def test_clip_by_the_norm_of_everything():
  norm = float(optax.tree.norm(tree(1)))
  clipped = run(1, name="lion", clip=0.5, b1=0.0)  # a sign: clipping cannot be seen
  same(clipped, unstack(run(1, name="lion", b1=0.0)))
  # Adam with a large eps is linear in the gradient
  soft = dict(eps=1e3, lr=1e3, b1=0.0)
  moved = lambda p: jax.tree.map(lambda a, b: a - b, tree(0, 0.3), p)
  small, full = moved(run(1, clip=norm / 4, **soft)), moved(run(1, clip=norm * 1.01, **soft))
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(full)):
    assert abs(np.linalg.norm(a) / np.linalg.norm(b) - 0.25) < 0.01


def test_learning_rate_rules_by_layer():
  rules = ((r"side/layers/1/.*", 0.0), (r"embed/.*", 0.5), (r".*", 1.0))
  start, one, got = unstack(tree(0, 0.3)), unstack(run(1)), unstack(run(1, lr_rules=rules, decay=0.0))
  for path in start:
    factor = 0.0 if "/1/" in path else 0.5 if "embed" in path else 1.0
    np.testing.assert_allclose(got[path] - start[path], factor * (one[path] - start[path]), atol=1e-6, err_msg=path)
  with pytest.raises(InputError, match="lr_rules: 'nothing/.\\*' decides about no parameter"):
    run(1, lr_rules=((r"nothing/.*", 2.0), (r".*", 1.0)))


def moved(params):
  start, end = unstack(tree(0, 0.3)), unstack(params)
  return {p: np.asarray(end[p] - start[p]) for p in start}


def test_learning_rates_fall_from_the_head_to_the_embeddings():
  """layer i of L has decay ** (L - i), what stands before them decay ** (L + 1), the final norm and the head 1."""
  d = 0.7
  shapes = {f"side/layers/q/{k}": np.zeros((L, 2)) for k in "ab"} | {"side/positions/embedding": np.zeros((2, 2))}
  for side in ("encoder", "decoder"):
    named = {p.replace("side", side): x for p, x in shapes.items()}
    at = lambda path, axes, shape: optimizer.by_depth(path, shape, axes, d, named)  # noqa: B023
    np.testing.assert_allclose(at(f"{side}/layers/q/a", ("layers", None), (L, 2))[:, 0], [d**3, d**2, d])
    assert (
      at(f"{side}/positions/embedding", (None, None), (2, 2)) == at("embed/embedding", (None, None), (2, 2)) == d**4
    )
    assert at(f"{side}/final_norm/scale", (None,), (2,)) == at("head/kernel", (None, None), (2, 2)) == 1
  one, got = moved(run(1)), moved(run(1, layer_decay=d))
  for i in range(L):
    path = f"side/layers/{i}/q/kernel"
    np.testing.assert_allclose(got[path], d ** (L - i) * one[path], rtol=1e-3, atol=1e-6)
  with pytest.raises(InputError, match="layer_decay=1.5"):
    run(1, layer_decay=1.5)


def test_pull_towards_the_first_weights():
  """Without a gradient the weights come back by lr * share of their distance at each step."""
  tx, _ = optimizer.make(
    **{**NUMBERS, "toward_init": 0.5},
    shapes=tree(0),
    axes=AXES,
    trainable=trees.trainable(((".*", True),), tree(0), AXES),
  )
  start, away = tree(0), jax.tree.map(lambda x: x + 1, tree(0))
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, start), tx.init(start), away, step=3)
  for u in jax.tree.leaves(updates):
    np.testing.assert_allclose(u, -0.02 * 0.5, rtol=1e-5)


def test_gradual_unfreezing():
  rules = ((r"embed/.*", 0.1), (r"side/layers/2/.*", 0), (r"side/layers/.*", 1))  # of 23 steps: 2, 0, 1
  first, second, third = (moved(run(n, unfreeze=rules)) for n in (1, 2, 3))
  for path in first:
    starts = 2 if "embed" in path else 0 if "/2/" in path else 1
    for step, found in enumerate((first, second, third)):
      assert np.any(found[path]) == (step >= starts), (path, step)
  np.testing.assert_array_equal(first["side/layers/2/q/kernel"], moved(run(1))["side/layers/2/q/kernel"])
  with pytest.raises(InputError, match="unfreeze: .*'embed/.*', 40"):
    run(1, unfreeze=((r"embed/.*", 40),))


def test_bfloat16_parameters_are_updated_in_float32():
  assert trees.flatten(run(1, dtype=jnp.bfloat16))["embed/embedding"].dtype == jnp.bfloat16
  flags = trees.trainable(((".*", True),), tree(0), AXES)
  tx, _ = optimizer.make(**NUMBERS, shapes=tree(0), axes=AXES, trainable=flags)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
  updates, state = tx.update(low, tx.init(low), low, step=0)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((updates, state)) if jnp.issubdtype(x.dtype, jnp.floating))


def rates(**numbers):
  rate = optimizer.make_schedule(
    **{**dict(lr=2.0, schedule="constant", warmup=0, cooldown=0.25, end=0.0, steps=20), **numbers}
  )
  return [float(rate(t)) for t in range(20)]


@pytest.mark.parametrize(
  "schedule,points",
  [
    ("constant", {4: 2, 19: 2}),
    ("linear", {4: 2, 12: 1, 19: 2 / 16}),
    ("cosine", {4: 2, 12: 1, 8: 1 + 0.5**0.5, 19: 1 - np.cos(np.pi / 16)}),
    ("rsqrt", {4: 2 * (4 / 5) ** 0.5, 15: 1}),
    ("wsd", {4: 2, 15: 2, 16: 2 * 4 / 5, 19: 2 / 5}),
  ],
)
def test_schedules(schedule, points):
  for got in (rates(schedule=schedule, warmup=4), rates(schedule=schedule, warmup=0.2)):
    np.testing.assert_allclose(got[:4], [0.5, 1, 1.5, 2], rtol=1e-6)
    for t, want in points.items():
      np.testing.assert_allclose(got[t], want, rtol=1e-5, err_msg=str(t))


def test_schedules_end_above_zero_and_start_without_warmup():
  assert (
    rates(schedule="linear", end=0.5)[10] == 1.5
    and rates(schedule="cosine", end=0.5)[10] == 1.5
    and rates(schedule="linear")[0] == 2
  )
  assert jax.jit(optimizer.make_schedule(lr=2.0, schedule="wsd", warmup=3, cooldown=0.5, end=0.0, steps=20))(
    jnp.int32(0)
  ) == np.float32(2 / 3)


@pytest.mark.parametrize(
  "numbers,words",
  [
    (dict(schedule="cosin"), "did you mean 'cosine'"),
    (dict(warmup=20), "only 20"),
    (dict(schedule="rsqrt"), "warmup above 0"),
    (dict(schedule="wsd", warmup=16), "do not fit"),
    (dict(warmup=2.5), "whole"),
    (dict(lr=-1.0), "negative"),
    (dict(end=1.5), "between 0 and 1"),
  ],
)
def test_schedules_that_make_no_sense(numbers, words):
  with pytest.raises(InputError, match=words):
    rates(**numbers)


def test_unknown_optimizer():
  with pytest.raises(InputError, match="did you mean 'adamw'"):
    run(1, name="adamv")
