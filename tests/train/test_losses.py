"""Losses against autodiff of the textbook formulas, and against torch where it is installed.

Catches: smoothing over V-1 labels or over the wrong label, a mean instead of a sum, weights ignored or applied twice,
z-loss without the square or outside of the gradient, the factor 2 of its gradient, NaN leaking from padding, argmax off
by one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import sharding
from jaxft.train import losses

B, S, V = 3, 5, 37


def data(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(B, S, V)).astype(np.float32) * 3
  labels = rng.integers(0, V, (B, S)).astype(np.int32)
  weights = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0.5, 2, 0, 0, 0]], np.float32)
  return logits, labels, weights


def textbook(logits, labels, weights, e, z):
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.sum(logp * jax.nn.one_hot(labels, V), -1)
  loss = (1 - e) * nll + e * jnp.mean(-logp, -1) + z * jax.nn.logsumexp(logits, -1) ** 2
  return jnp.sum(loss * weights)


@pytest.mark.parametrize("e", [0.0, 0.13])
@pytest.mark.parametrize("z", [0.0, 3e-3])
def test_value_and_gradient_equal_autodiff_of_the_formula(e, z):
  logits, labels, weights = data()
  ours, grad = jax.value_and_grad(lambda x: losses.weighted(x, labels, weights, label_smoothing=e, z_loss=z)[0])(logits)
  want, want_grad = jax.value_and_grad(textbook)(logits, labels, weights, e, z)
  np.testing.assert_allclose(ours, want, rtol=2e-6)
  np.testing.assert_allclose(grad, want_grad, atol=2e-6)


def test_numbers_may_be_arguments_of_the_program():
  """As in a sweep: one program for all values, 0 among them."""
  logits, labels, weights = data()
  run = jax.value_and_grad(lambda x, e, z: losses.weighted(x, labels, weights, label_smoothing=e, z_loss=z)[0])
  one = jax.jit(run)
  for e, z in ((0.0, 0.0), (0.13, 0.0), (0.0, 3e-3), (0.2, 1e-2)):
    for a, b in zip(one(logits, e, z), run(logits, e, z)):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  assert one._cache_size() == 1


def test_sums():
  logits, labels, weights = data()
  labels[0, 0], labels[1, 2] = logits[0, 0].argmax(), logits[1, 2].argmax()
  loss, weight, sums = losses.weighted(logits, labels, weights, label_smoothing=0.2, z_loss=1e-2)
  assert weight == weights.sum()
  np.testing.assert_allclose(sums["nll"], textbook(logits, labels, weights, 0, 0), rtol=2e-6)
  assert sums["correct"] == np.sum((logits.argmax(-1) == labels) * weights) >= 2
  assert loss > sums["nll"] * 0.8 and all(x.dtype == jnp.float32 for x in (loss, weight, *sums.values()))


def test_hidden_tokens_add_nothing_even_when_not_finite():
  logits, labels, weights = data()
  run = jax.value_and_grad(lambda x: losses.weighted(x, labels, weights, label_smoothing=0.1, z_loss=1e-3)[0])
  clean, clean_grad = run(logits)
  logits[0, 3:] = np.nan
  logits[2, 2:] = np.inf
  loss, grad = run(logits)
  assert loss == clean
  np.testing.assert_array_equal(grad[:, :2], clean_grad[:, :2])
  assert np.all(grad[0, 3:] == 0) and np.all(grad[2, 2:] == 0)


def test_large_logits_do_not_overflow():
  logits = np.array([[500.0, 1.0, -500.0]], np.float32)
  loss, grad = jax.value_and_grad(
    lambda x: losses.weighted(x, np.array([2]), np.ones(1), label_smoothing=0.0, z_loss=0.0)[0]
  )(logits)
  assert loss == 1000 and np.all(np.isfinite(grad))


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_equals_torch(e):
  torch = pytest.importorskip("torch", reason="label smoothing is not compared with torch's own")
  logits, labels, weights = data(1)
  weights = (weights != 0).astype(np.float32)
  x = torch.tensor(logits, requires_grad=True)
  y = torch.tensor(np.where(weights > 0, labels, -100)).long()
  want = torch.nn.functional.cross_entropy(
    x.view(-1, V), y.view(-1), label_smoothing=e, reduction="sum", ignore_index=-100
  )
  want.backward()
  loss, grad = jax.value_and_grad(lambda a: losses.weighted(a, labels, weights, label_smoothing=e, z_loss=0.0)[0])(
    logits
  )
  np.testing.assert_allclose(loss, want.item(), rtol=2e-6)
  np.testing.assert_allclose(grad, x.grad.numpy(), atol=2e-6)


def test_sharded_vocabulary_is_not_gathered():
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  rules = dict(batch=("data", "fsdp"), vocab="tensor")
  wide, labels, weights = (
    np.random.default_rng(0).normal(size=(4, 5, 512)).astype(np.float32),
    np.ones((4, 5), np.int32),
    np.ones((4, 5)),
  )
  logits = jax.device_put(wide, jax.NamedSharding(mesh, sharding.spec(mesh, rules, ("batch", None, "vocab"))))
  run = jax.jit(jax.value_and_grad(lambda x: losses.weighted(x, labels, weights, label_smoothing=0.1, z_loss=1e-3)[0]))
  text = run.lower(logits).compile().as_text()
  assert "all-gather" not in text
  np.testing.assert_allclose(run(logits)[0], run(jnp.asarray(wide))[0], rtol=1e-6)
