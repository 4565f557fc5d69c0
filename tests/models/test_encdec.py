"""The stack by itself: packing, padding, causality, decoding step by step, dropout, remat.

Caught by these tests, each tried once: a segment mask left out of the encoder, the decoder or cross-attention;
the start token not given to the second segment; absolute positions in a packed row; an encoder made causal, a decoder
not; a cache index off by one; beams mixed up by `reorder`; a bias step of the wrong sign; one mask for all layers or
for all steps; NaN or a gradient from rows without any token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import sharding
from jaxft.families import registry
from jaxft.models import layers, scores
from tests.families import reference

FAST = reference.FAST
CONFIG = {**reference.config("v1_1"), "relative_attention_max_distance": 9, "relative_attention_num_buckets": 8}


def skeleton(remat="none", unroll=1, dtype="float32", dropout=0.0):
  return registry.skeleton(CONFIG, dtype=dtype, params_dtype="float32", remat=remat, unroll=unroll, dropout=dropout)


def weights(sk):
  draw = lambda i, x: (0.25 * np.random.RandomState(i).standard_normal(x.shape)).astype(np.float32)
  leaves, tree = jax.tree.flatten(sk.shapes)
  return jax.tree.unflatten(tree, [draw(i, x) for i, x in enumerate(leaves)])


def rows(examples, length, packed):
  """Batch of (input, target) lengths, one row each or all in one row of `length`; every example has its own numbers."""
  out = {
    k: np.zeros((1 if packed else len(examples), length), np.int32)
    for k in ("inputs", "input_segments", "targets", "target_segments")
  }
  for i, lengths in enumerate(examples):
    for j, name in enumerate(("input", "target")):
      start, row = (sum(e[j] for e in examples[:i]), 0) if packed else (0, i)
      span = slice(start, start + lengths[j])
      out[f"{name}s"][row, span] = np.random.RandomState(10 * i + j).randint(2, 37, lengths[j])
      out[f"{name}_segments"][row, span] = i + 1 if packed else 1
  return out


def loss(sk, params, batch, key=None):
  model = sk.bind(params)
  logits = model.logits(model.hidden(batch, key))
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
  return -(picked * (batch["target_segments"] > 0)).sum(), logits


@functools.cache
def stepper():
  sk = skeleton()
  step = jax.jit(jax.value_and_grad(lambda p, b: loss(sk, p, b), has_aux=True), compiler_options=FAST)
  return lambda batch: jax.device_get(step(weights(sk), batch))


def test_packed_is_padded_at_any_length():
  """Three examples in one row, in three rows, and in three longer rows: same logits, loss and gradients."""
  examples = [(7, 5), (1, 6), (9, 3)]
  results = [stepper()(rows(examples, length, packed)) for length, packed in ((9, False), (14, False), (20, True))]
  (want, logits), grads = results[0]
  per_example = lambda logits, packed: [
    logits[0, s : s + n] if packed else logits[i, :n] for i, (s, n) in enumerate(zip((0, 5, 11), (5, 6, 3)))
  ]
  for ((value, other), found), packed in zip(results[1:], (False, True)):
    assert abs(value - want) < 1e-5 * abs(want)
    for a, b in zip(per_example(logits, False), per_example(other, packed)):
      np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5), grads, found)


def test_empty_rows_and_padding_pass_nothing():
  """A row without any token, and a target without any input, give finite numbers; an empty row changes no gradient."""
  batch = rows([(7, 5), (1, 6), (9, 3)], 9, False)
  (want, _), grads = stepper()(batch)
  batch = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
  (value, logits), found = stepper()(batch)
  assert np.isfinite(logits).all() and abs(value - want) < 1e-5 * abs(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), grads, found)
  batch["input_segments"][0] = 0
  (_, logits), found = stepper()(batch)
  assert np.isfinite(logits).all() and all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  other = np.where(batch["input_segments"] == 0, 5, batch["inputs"])
  (_, same), again = stepper()({**batch, "inputs": other})
  np.testing.assert_array_equal(same, logits)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, again)


def test_query_without_keys():
  """Padding neither attends nor is attended to; such a query gives exactly 0 and exactly no gradient."""
  segments = jnp.array([[1, 1, 2, 0], [0, 0, 0, 0]])
  mask = scores.Mask(segments, segments).dense()
  np.testing.assert_array_equal(mask[:, 0], (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0))
  qkv = np.random.RandomState(0).standard_normal((3, 2, 4, 3, 5)).astype(np.float32)
  run = lambda qkv: scores.attend(*qkv, None, mask, 0.0, None)
  out, pull = jax.vjp(run, qkv)
  grads = pull(jnp.ones_like(out))[0]
  empty = np.asarray(segments) == 0
  assert (np.asarray(out)[empty] == 0).all() and (np.asarray(grads)[:, empty] == 0).all()
  assert (np.abs(np.asarray(out)[~empty]) > 0).all() and np.isfinite(grads).all()


def test_causality_by_gradient():
  """A place of the decoder depends on the earlier places of its own segment, and on all inputs of that segment."""
  sk = skeleton()
  batch = rows([(4, 3), (5, 4)], 10, True)
  model = sk.bind(weights(sk))
  segments, inside = batch["target_segments"], batch["input_segments"]

  def outputs(x_in, x_dec):  # float embeddings instead of tokens, so that there is something to differentiate
    mask = scores.Mask(inside, inside)
    context = model.encoder(x_in, inside, mask, None)
    self_mask, cross_mask = scores.Mask(segments, segments, causal=True), scores.Mask(segments, inside)
    return model.decoder(x_dec, segments, self_mask, None, context=context, cross_mask=cross_mask)

  x = [np.random.RandomState(i).standard_normal((1, 10, 12)).astype(np.float32) for i in range(2)]
  to_in, to_dec = jax.jit(jax.jacrev(outputs, (0, 1)), compiler_options=FAST)(*x)
  touched = lambda j: np.abs(np.asarray(j)).sum((0, 2, 3, 5)) > 1e-7  # [decoder place, source place]
  same = segments[0][:, None] == segments[0]
  real = segments[0] > 0
  np.testing.assert_array_equal(touched(to_dec)[real], (same & np.tril(np.ones((10, 10), bool)))[real])
  np.testing.assert_array_equal(touched(to_in)[real], (segments[0][:, None] == inside[0])[real])


@pytest.mark.parametrize("beams", (1, 3))
def test_steps_equal_teacher_forcing(beams):
  """`start` and `step` give the logits of `hidden` for tokens fed one by one, other tokens in the other beams."""
  sk, params = skeleton(), weights(skeleton())
  batch = rows([(7, 8), (3, 8)], 8, False)
  targets = np.random.RandomState(3).randint(2, 37, (2, beams, 8)).astype(np.int32)
  forward = jax.jit(lambda b: loss(sk, params, b)[1], compiler_options=FAST)
  want = np.stack([forward({**batch, "targets": targets[:, k]}) for k in range(beams)], 1)
  fed = np.pad(targets, ((0, 0), (0, 0), (1, 0)))  # `start` says what comes first

  def run(tokens):
    model = sk.bind(params)
    cache, first = model.start(batch["inputs"], batch["input_segments"], beams, 11)
    tokens = tokens.at[..., 0].set(first[:, None])
    step = lambda cache, t: tuple(reversed(model.step(t, cache)))
    return jax.lax.scan(step, cache, jnp.moveaxis(tokens, -1, 0))

  cache, logits = jax.jit(run, compiler_options=FAST)(fed[..., :8])
  np.testing.assert_allclose(np.moveaxis(logits, 0, 2), want, rtol=0, atol=1e-5)
  assert cache["cross_k"].shape == (3, 2, 8, 3, 5) and cache["self_k"].shape == (3, 2, beams, 11, 3, 5)
  assert int(cache["index"]) == 8


def test_reorder_continues_the_parent():
  sk, params = skeleton(), weights(skeleton())
  batch = rows([(7, 1), (3, 1)], 8, False)
  first = np.random.RandomState(3).randint(2, 37, (4, 2, 3)).astype(np.int32)  # four steps of three beams
  parents, last = np.array([[2, 0, 0], [1, 1, 2]]), np.array([[5, 6, 7], [8, 9, 10]], np.int32)

  def run(tokens, parents, last):
    model = sk.bind(params)
    cache, _ = model.start(batch["inputs"], batch["input_segments"], 3, 6)
    for t in range(4):
      cache = model.step(tokens[t], cache)[1]
    return model.step(last, model.reorder(cache, parents))[0]

  run = jax.jit(run, compiler_options=FAST)
  moved = np.take_along_axis(first, parents[None], 2)  # as if every beam had been its parent from the start
  want = run(moved, np.tile(np.arange(3), (2, 1)), last)
  np.testing.assert_allclose(run(first, parents, last), want, rtol=0, atol=1e-5)


def test_remat_and_unroll_change_nothing():
  batch, key = rows([(7, 5), (1, 6)], 9, False), jax.random.key(8)
  results = []
  for remat, unroll in (("none", 1), ("block", 1), ("dots", 2), ("attention", 1), ("offload", 1)):
    sk = skeleton(remat, unroll, dropout=0.3)
    traced = jax.jit(jax.value_and_grad(lambda p, sk=sk: loss(sk, p, batch, key)[0])).trace(weights(sk))
    assert ("remat" in str(traced.jaxpr)) == (remat != "none")
    results.append(jax.device_get(traced.lower().compile(compiler_options=FAST)(weights(sk))))
  for value, grads in results[1:]:
    assert abs(value - results[0][0]) < 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4), results[0][1], grads)


def test_dropout():
  """Rate, scale, and that masks of layers, sites, rows and keys have nothing in common."""
  key = layers.fold(jax.random.key(1), 0)
  x = jnp.full((64, 3, 250), 2.0)
  y = np.asarray(layers.dropout(x, 0.3, key))
  assert set(np.unique(y).round(5)) == {0.0, np.float32(2 / 0.7).round(5)}
  assert abs((y == 0).mean() - 0.3) < 4 * np.sqrt(0.21 / y.size)
  other_keys = (layers.fold(jax.random.key(1), 1), layers.fold(jax.random.key(2), 0), layers.fold(key, 0))
  others = [layers.dropout(x, 0.3, k) for k in other_keys]
  masks = [(np.asarray(m) == 0).ravel() for m in (y, *others)]
  masks += [np.roll(masks[0], n) for n in (1, 250, 750, 256)]
  for m in masks[1:]:
    assert abs(np.corrcoef(masks[0], m)[0, 1]) < 4 / np.sqrt(y.size)
  assert abs(y.mean(0).std() / (2 * np.sqrt(0.3 / 0.7 / 64)) - 1) < 0.12 and layers.dropout(x, 0.3, None) is x


def test_layers_draw_different_masks(monkeypatch):
  """Each place, layer and step has a key of its own: the words that reach `dropout` are all different."""
  seen, kept = [], layers.dropout
  monkeypatch.setattr(
    layers,
    "dropout",
    lambda x, rate, key: (jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), key), kept(x, rate, key))[1],
  )
  sk, batch = skeleton(dropout=0.3), rows([(7, 5)], 9, False)
  run = jax.jit(lambda key: sk.bind(weights(sk)).hidden(batch, key), compiler_options=FAST)
  for i in range(2):
    jax.block_until_ready(run(jax.random.fold_in(jax.random.key(0), i)))
  jax.effects_barrier()
  assert len(seen) == 2 * (2 * 2 + 2 * 4 + 3 * 6) == len(set(seen))


def test_bfloat16_runs_and_keeps_logits_and_gradients_in_float32():
  sk = skeleton(dtype="bfloat16")
  batch = rows([(7, 5), (1, 6)], 9, False)
  run = jax.jit(jax.value_and_grad(lambda p: loss(sk, p, batch), has_aux=True), compiler_options=FAST)
  (value, logits), grads = run(weights(sk))
  exact = stepper()(batch)[0][0]
  assert logits.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
  assert abs(value - exact) < 0.02 * abs(exact)
  half = sk.bind(weights(sk)).hidden
  assert jax.eval_shape(lambda: half(batch, None)).dtype == jnp.bfloat16


def test_mesh_changes_nothing():
  """Loss, gradients and dropout masks on a data x fsdp x tensor mesh of 8 devices, against one device."""
  key = jax.random.key(5)
  config = {**CONFIG, "num_heads": 4, "d_ff": 18, "vocab_size": 38}
  sk = registry.skeleton(config, dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=0.3)
  batch = rows([(7, 5), (1, 6), (4, 4), (9, 9)], 9, False)
  step = lambda p, b: jax.value_and_grad(lambda p: loss(sk, p, b, key)[0])(p)
  want = jax.device_get(jax.jit(step, compiler_options=FAST)(weights(sk), batch))
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  table = dict(batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
  places = sharding.leaf_shardings(mesh, table, sk.axes, sk.shapes)
  with sharding.use(mesh, table):
    params = jax.device_put(weights(sk), places)
    found = jax.jit(step, compiler_options=FAST)(params, jax.device_put(batch, sharding.batch_sharding(mesh, table)))
  assert len(params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"].sharding.device_set) == 8
  found = jax.device_get(found)
  assert abs(found[0] - want[0]) < 1e-5 * abs(want[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5), want[1], found[1])


def test_id_outside_the_vocabulary_is_not_a_number():
  sk = skeleton()
  model = sk.bind(weights(sk))
  inside, outside = np.asarray(model.embed(jnp.array([[36, 37]])))[0]
  assert np.isfinite(inside).all() and np.isnan(outside).all()
