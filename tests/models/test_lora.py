"""Adapters: the model is the same until they are trained, and then computes what their sum with the weights computes.

Catches: a scale or an axis that is wrong, a side of a kernel of heads that is taken for the other, dropout of adapters
that the other dropout repeats or that evaluation has, a base that is trained or loses its dtype, targets in silence.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import trees
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.models import layers, lora
from tests.families import parity, tiny
from tests.families.reference import FAST

SPEC = lora.Spec(rank=3, alpha=5.0, dropout=0.0, targets=(".*/layers/.*",), rslora=False)
CASES = [("bert", "classify"), ("gpt2", "lm"), ("llama", "lm"), ("t5", "lm"), ("neox", "lm"), ("deberta", "tag"),
         ("bart", "lm")]  # fmt: skip


def skeletons(name, kind="lm", spec=SPEC, **how):
  config = registry.wanted(tiny.CONFIGS[name], registry.Wanted(kind, parity.LABELS if kind != "lm" else ()))
  made = parity.HOW | dict(dropout=0.0, attention_dropout=0.0, head_dropout=0.0) | how
  made = made if kind != "lm" else {k: v for k, v in made.items() if k != "head_dropout"}
  return registry.skeleton(config, **made), registry.skeleton(config, adapters=spec, **made)


def drawn(skeleton, seed=3, zero=False):
  """Parameters of a size that shows errors; B is zero, as fresh, or not."""
  rng = np.random.default_rng(seed)
  value = lambda p, x: 0.3 * rng.normal(size=x.shape) + (1 if "norm" in p and "scale" in p else 0)
  flat = {p: value(p, x).astype(x.dtype) for p, x in trees.flatten(skeleton.shapes).items()}
  return trees.unflatten({p: x * 0 if zero and p.endswith(lora.B) else x for p, x in flat.items()})


def outputs(skeleton, params, name, kind):
  layout = "seq2seq" if kind == "lm" and skeleton.encoder_decoder else kind
  rows = parity.batch(layout, tiny.CONFIGS[name])
  run = jax.jit(lambda p: parity.loss_fn(skeleton, p, layout, rows), compiler_options=FAST)
  loss, found = run(params)
  return np.append(np.concatenate([np.ravel(x) for x in found]), loss)


@pytest.mark.parametrize("name, kind", CASES)
def test_adapters_are_their_sum_with_the_weights(name, kind):
  plain, adapted = skeletons(name, kind)
  fresh = drawn(adapted, zero=True)
  base = outputs(plain, lora.base(fresh), name, kind)
  np.testing.assert_allclose(outputs(adapted, fresh, name, kind), base, rtol=1e-5, atol=1e-5)
  params = drawn(adapted)
  found = outputs(adapted, params, name, kind)
  np.testing.assert_allclose(found, outputs(plain, lora.merged(params, SPEC.scale), name, kind), rtol=2e-5, atol=2e-4)
  assert np.abs(found - base).max() > 0.05


def test_every_linear_layer_can_be_adapted_and_heads_are_not():
  flat = {p for p in trees.flatten(skeletons("t5")[1].shapes) if re.fullmatch(lora.NAMES, p)}
  own = [f"self_attn/{x}" for x in "qkvo"] + ["mlp/wi", "mlp/wo"]
  want = {f"encoder/layers/{x}" for x in own} | {f"decoder/layers/{x}" for x in own}
  want |= {f"decoder/layers/cross_attn/{x}" for x in "qkvo"}
  assert flat == {f"{x}/lora_{y}" for x in want for y in "ab"}
  assert not any("head" in p for p in lora.adapters(skeletons("bert", "classify")[1].shapes))


def test_shapes_names_of_axes_and_fresh_values():
  _, adapted = skeletons("llama", params_dtype="bfloat16")
  shapes, axes = adapted.shapes["decoder"]["layers"], adapted.axes["decoder"]["layers"]
  assert shapes["self_attn"]["q"]["lora_a"].shape == (3, 24, 3)
  assert shapes["self_attn"]["q"]["lora_b"].shape == (3, 3, 6, 10)
  assert shapes["self_attn"]["o"]["lora_a"].shape == (3, 6, 10, 3)
  assert shapes["self_attn"]["o"]["lora_b"].shape == (3, 3, 24)
  assert axes["self_attn"]["q"]["lora_b"] == ("layers", "rank", "heads", "head_dim")
  assert axes["mlp"]["wo"]["lora_a"] == ("layers", "mlp", "rank")
  fresh = jax.jit(adapted.init)(jax.random.key(1))["decoder"]["layers"]["self_attn"]["o"]
  assert not np.any(fresh["lora_b"]) and fresh["lora_a"].dtype == jnp.bfloat16
  assert abs(np.std(fresh["lora_a"].astype(np.float32)) * (3 * 60) ** 0.5 - 1) < 0.1


def test_gradient_is_that_through_the_sum():
  plain, adapted = skeletons("llama")
  params, rows = drawn(adapted), parity.batch("lm", tiny.CONFIGS["llama"])
  own, base = lora.adapters(params), lora.base(params)
  names = [p for p in trees.flatten(params) if re.fullmatch(lora.NAMES, p)]
  assert len(names) == 2 * len(own) == 14

  def loss(skeleton, merge, moved):
    whole = trees.unflatten(trees.flatten(base) | moved)
    return parity.loss_fn(skeleton, lora.merged(whole, SPEC.scale) if merge else whole, "lm", rows)[0]

  moved = {p: trees.flatten(params)[p] for p in names}
  grads = [jax.jit(jax.grad(lambda m, s=s, w=w: loss(s, w, m)))(moved) for s, w in ((adapted, False), (plain, True))]
  for p in names:
    top = np.abs(grads[0][p]).max()
    np.testing.assert_allclose(grads[0][p] / top, grads[1][p] / top, atol=2e-4, err_msg=p)
    assert top > 1e-3, p


def test_dropout_of_adapters_is_unbiased_and_theirs_alone():
  spec = dataclasses.replace(SPEC, dropout=0.4)
  layer = skeletons("llama", spec=spec)[1]
  params, rows = drawn(layer), parity.batch("lm", tiny.CONFIGS["llama"])
  hidden = jax.jit(lambda p, key: layer.bind(p).hidden(rows, key))
  calm, a, again = (np.asarray(hidden(params, k)) for k in (None, jax.random.key(1), jax.random.key(1)))
  np.testing.assert_array_equal(a, again)
  assert np.abs(a - calm).max() > 0.01 and np.abs(a - np.asarray(hidden(params, jax.random.key(2)))).max() > 0.01
  still = drawn(layer, zero=True)  # with B zero there is nothing that could be dropped
  np.testing.assert_array_equal(hidden(still, None), hidden(still, jax.random.key(1)))


def test_dropout_of_one_layer_has_the_mean_of_none():
  _, adapted = skeletons("llama", spec=dataclasses.replace(SPEC, dropout=0.4, targets=(".*/self_attn/q",)))
  one = trees.unflatten({p: x[0] for p, x in trees.flatten(drawn(adapted)["decoder"]["layers"]).items()})
  layer = adapted.module.decoder.layers.self_attn.q
  for name, x in one["self_attn"]["q"].items():
    getattr(layer, name).set_value(jnp.asarray(x))
  x = np.random.default_rng(0).normal(size=(24,)).astype(np.float32)
  rows = np.asarray(layer(jnp.tile(x, (20_000, 1)), layers.fold(jax.random.key(0), 1)))
  calm = np.asarray(layer(x[None]))[0]
  error = (rows.mean(0) - calm) / (rows.std(0) / 20_000**0.5)
  assert np.abs(error).max() < 4.5 and rows.std(0).min() > 0.05


@pytest.mark.parametrize("rslora, scale", [(False, 5 / 3), (True, 5 / 3**0.5)])
def test_scale(rslora, scale):
  assert dataclasses.replace(SPEC, rslora=rslora).scale == pytest.approx(scale)


def test_a_base_in_bfloat16_loses_nothing_of_what_was_learnt():
  full = jnp.full
  layer = dict(kernel=full((2, 4), 1.0, jnp.bfloat16), lora_a=full((2, 1), 1e-2), lora_b=full((1, 4), 1e-2))
  found = lora.merged(dict(q=layer), 1.0)["q"]["kernel"]
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, 1.0001, rtol=1e-7)


@pytest.mark.parametrize("change, said", [
  (dict(targets=(".*/q_proj",)), r"'.\*/q_proj' matches no linear layer.*decoder/layers/self_attn/q"),
  (dict(targets=()), "empty matches no linear layer"),
  (dict(targets=("(",)), "is not a regular expression"),
  (dict(dropout=1.0), "dropout a share"),
  (dict(alpha=0.0), "alpha is above 0"),
])  # fmt: skip
def test_what_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    skeletons("llama", spec=dataclasses.replace(SPEC, **change))
