"""Cross-entropy in tiles against the whole: sums and all gradients. Catches: a tile dropped or counted twice, rows
put back in another order, a skipped tile that had weights, the gradient of a tied table counted once, the scale of the
cotangent lost, smoothing over the wrong vocabulary, logits of all tokens made after all.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import flops, sharding, standin, trees
from jaxft.families import registry
from jaxft.train import losses, tiles

HOW = dict(dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)
TIED = dict(llama=True, t5=True)
B, T = 4, 40


def skeleton(kind, **change):
  json = dict(standin.MODELS[kind][1], model_type=kind, vocab_size=301, **change)
  want = registry.Wanted("mlm") if kind == "bert" else None
  return registry.skeleton(json, want=want, **HOW)


def batch(kind, seed=0, share=0.6):
  rng = np.random.default_rng(seed)
  ids = lambda: rng.integers(3, 301, (B, T)).astype(np.int32)
  segments = np.ones((B, T), np.int32)
  segments[1, 25:], segments[2, :] = 0, 0  # a part and a whole row of padding
  weights = (rng.random((B, T)) < share) * segments * rng.choice([1.0, 0.5], (B, T))
  out = dict(inputs=ids(), input_segments=segments, weights=weights.astype(np.float32))
  if kind == "t5":
    out |= dict(targets=ids(), target_segments=segments)
  if kind == "bert":
    out |= dict(targets=ids())
  return out


KINDS = dict(llama="causal", gpt2="causal", gemma2="sft", t5="seq2seq", bert="mlm")
CASES = [("llama", {}), ("llama", dict(tie_word_embeddings=True)), ("gpt2", {}), ("gemma2", {}), ("t5", {}),
         ("t5", dict(tie_word_embeddings=False)), ("bert", {})]  # fmt: skip


def both(kind, json, rows, t, e=0.1, z=1e-2, params=None):
  s = skeleton(kind, **json)
  params = s.init(jax.random.key(1)) if params is None else params
  o = losses.Options(e, z)
  run = lambda o: jax.value_and_grad(
    lambda p: (lambda out: (3.0 * out[0], out))(losses.make(KINDS[kind], o)(s.bind(p), rows, None)), has_aux=True
  )(params)
  return run(o), run(dataclasses.replace(o, logits=4.0 * B * t * 301))


@pytest.mark.parametrize("kind, json, t", [(*case, 8) for case in CASES] + [("t5", {}, 24)])
def test_equal_to_the_whole(kind, json, t):
  (_, whole), grads = (x := both(kind, json, batch(kind), t))[0]
  (_, cut), cut_grads = x[1]
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut)):
    np.testing.assert_allclose(b, a, rtol=2e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(cut_grads), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=3e-6 * float(jnp.abs(a).max()) + 1e-8)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_few_and_all_tokens(share):
  (_, whole), cut = (x := both("llama", {}, batch("llama", 3, share), 8))[0][0], x[1]
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut[0][1])):
    np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-9)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(cut[1]))


def test_numbers_may_be_arguments_of_the_program():
  s, rows = skeleton("llama"), batch("llama")
  params = s.init(jax.random.key(1))

  def of(o, numbers):
    told = dataclasses.replace(o, label_smoothing=numbers[0], z_loss=numbers[1])
    return jax.grad(lambda p: losses.make("causal", told)(s.bind(p), rows, None)[0])(params)

  one = jax.jit(lambda n: of(losses.Options(logits=4.0 * B * 8 * 301), n))
  for numbers in ((0.0, 0.0), (0.2, 1e-2)):
    got, want = one(tuple(map(jnp.float32, numbers))), of(losses.Options(), numbers)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
      np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * float(jnp.abs(a).max()) + 1e-8)
  assert one._cache_size() == 1


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=1), dict(data=1, fsdp=2, tensor=2)])
def test_on_a_mesh(axes):
  """The same on a mesh that splits rows, table and vocabulary."""
  s = registry.skeleton(dict(standin.MODELS["llama"][1], model_type="llama", vocab_size=304), **HOW)
  rows, params = batch("llama"), s.init(jax.random.key(1))
  rules = dict(batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
  mesh = sharding.make_mesh(axes, jax.devices()[:4])
  places = sharding.leaf_shardings(mesh, rules, s.axes, s.shapes)
  told = losses.Options(0.1, 1e-3, logits=4.0 * 8 * 304 / 2)

  def run(p, b):
    with sharding.use(mesh, rules):
      return jax.value_and_grad(lambda p: losses.make("causal", told)(s.bind(p), b, None)[0])(p)

  where = dict(in_shardings=(places, sharding.batch_sharding(mesh, rules)), out_shardings=(None, places))
  got = jax.jit(run, **where)(params, rows)
  plain = losses.Options(0.1, 1e-3)
  want = jax.value_and_grad(lambda p: losses.make("causal", plain)(s.bind(p), rows, None)[0])(params)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6 * float(jnp.abs(a).max()) + 1e-9)


def test_the_logits_are_never_whole_and_no_product_is_done_twice():
  s, rows = skeleton("llama"), {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch("llama").items()}
  grad = lambda o: jax.jit(jax.grad(lambda p, b: losses.make("causal", o)(s.bind(p), b, None)[0])).lower(s.shapes, rows)
  text = grad(losses.Options(logits=4.0 * B * 8 * 301)).compile().as_text()
  shapes = [[int(d) for d in m.split(",")] for m in re.findall(r"f32\[([\d,]+)\]", text)]
  assert max(np.prod(x) for x in shapes if 301 in x) < B * T * 301
  assert max(np.prod(x) for x in shapes if 301 in x) >= B * 8 * 301
  count = lambda o: flops.count(jax.grad(lambda p, b: losses.make("causal", o)(s.bind(p), b, None)[0]), s.shapes, rows)
  assert count(losses.Options(logits=4.0 * B * 8 * 301)) == count(losses.Options())


@pytest.mark.parametrize(
  "rows, length, most, t",
  [
    (16, 128, 0, 0),  # no bound
    (16, 128, 16 * 128 * 1000 * 4, 0),  # just what is needed
    (16, 128, 16 * 127 * 1000 * 4, 120),
    (16, 1024, 16 * 300 * 1000 * 4, 256),  # whole lanes
    (16, 1024, 1, 8),
  ],
)
def test_size_of_a_tile(rows, length, most, t):
  assert tiles.tile(rows, length, 1000, "vocab", most) == t


def test_a_head_with_dropout_is_not_cut():
  s = skeleton("bert")
  rows = batch("bert")
  model = s.bind(s.init(jax.random.key(1)))
  model.head.spec = dataclasses.replace(model.head.spec, dropout=0.5)
  o = losses.Options(logits=1.0)
  key = jax.random.key_data(jax.random.key(0))
  want = losses.make("mlm", losses.Options())(model, rows, key)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(losses.make("mlm", o)(model, rows, key))):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind, json", [("llama", {}), ("llama", dict(tie_word_embeddings=True)), ("bert", {})])
@pytest.mark.parametrize("moves", ["body", "head", "bias"])
def test_what_is_frozen_has_no_gradient_and_no_product(kind, json, moves):
  """A frozen head costs the product of its gradient nothing, and a frozen body that of the hidden states."""
  s = skeleton(kind, **json)
  flat = trees.flatten(s.init(jax.random.key(1)))
  own = dict(body=lambda p: "/layers/" in p, head=lambda p: p.startswith(("head", "embed")))
  own["bias"] = lambda p: p == "head/bias"
  if moves == "bias" and "head/bias" not in flat:
    pytest.skip("a head without a bias: the case is covered by bert")
  moved = {p: x for p, x in flat.items() if own[moves](p)}
  still, rows = {p: x for p, x in flat.items() if p not in moved}, batch(kind)

  def grads(logits):
    loss = losses.make(KINDS[kind], losses.Options(0.1, 1e-2, logits=logits))
    return lambda m: jax.grad(lambda m: loss(s.bind(trees.unflatten(still | m)), rows, None)[0])(m)

  cut, whole = grads(4.0 * B * 8 * 301), grads(0.0)
  got, want = cut(moved), whole(moved)
  for path, x in want.items():
    np.testing.assert_allclose(got[path], x, rtol=1e-5, atol=3e-6 * float(jnp.abs(x).max()) + 1e-8, err_msg=path)
  all_ = lambda m: jax.grad(lambda m: losses.make(KINDS[kind], losses.Options(0.1, 1e-2, logits=4.0 * B * 8 * 301))(
    s.bind(trees.unflatten(m)), rows, None)[0])(m)  # fmt: skip
  head = 2.0 * B * T * 64 * 301  # of one product with the table
  saved = {"body": 1, "head": 0 if s.spec.heads[0][1].tied else 1, "bias": 2}[moves]
  assert flops.count(all_, flat) - flops.count(cut, moved) >= saved * head
  assert flops.count(cut, moved) >= {"body": 2, "head": 2, "bias": 1}[moves] * head
