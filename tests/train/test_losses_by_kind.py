"""The losses of the kinds of task against plain formulas, and packed rows against rows of one example.

Catches: predicting the token at its own place, or the first token of the next example; a weight that belongs to the
reading and not to the predicted token; positions of an answer counted from the row; class weights that do not divide;
the mean over classes as a sum; a padded entry that counts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.train import losses

V, C = 11, 5


class Fake:
  """Gives what it was made with, whatever the batch."""

  def __init__(self, outputs, nsp=None):
    self.outputs, self.nsp = jnp.asarray(outputs), nsp

  def hidden(self, batch, key):
    return self.outputs

  def logits(self, x, key=None):
    return x

  def classify(self, batch, key):
    return self.outputs

  tag = classify

  def classified(self, x, segments, examples, key, name):
    return self.nsp


def nll(logits, label):
  return float(jax.nn.logsumexp(logits) - logits[label])


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def test_next_token_stays_within_its_example():
  inputs = np.array([[3, 4, 5, 6, 7, 0]])
  batch = dict(inputs=inputs, input_segments=np.array([[1, 1, 1, 2, 2, 0]]), weights=np.array([[0, 1, 0.5, 9, 1, 9.0]]))
  logits = draw(1, 6, V)
  loss, weight, sums = losses.make("causal", losses.Options())(Fake(logits), batch, None)
  want = nll(logits[0, 0], 4) + 0.5 * nll(logits[0, 1], 5) + nll(logits[0, 3], 7)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert weight == 2.5 and abs(sums["nll"] - want) < 1e-5


def test_classes_with_weights():
  logits, labels = draw(2, 3, C), np.array([[1, 4, 0], [2, 0, 0]])
  batch = dict(labels=labels, label_weights=np.array([[1, 1, 0], [1, 0, 0.0]]))
  logits[0, 2] = np.nan  # an entry of no example
  told = losses.Options(class_weights=(1.0, 0.5, 2.0, 1.0, 3.0))
  run = jax.value_and_grad(lambda x: losses.make("classify", told)(Fake(x), batch, None)[0])
  loss, weight, _ = losses.make("classify", told)(Fake(logits), batch, None)
  want = 0.5 * nll(logits[0, 0], 1) + 3 * nll(logits[0, 1], 4) + 2 * nll(logits[1, 0], 2)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert weight == 5.5 and np.isfinite(run(jnp.asarray(logits))[1]).all()


def test_several_labels_and_numbers_equal_torch():
  torch = pytest.importorskip("torch", reason="no torch: losses of several labels and of numbers are not compared")
  logits, labels = draw(1, 2, C), np.array([[[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]], np.float32)
  batch = dict(labels=labels, label_weights=np.ones((1, 2)))
  loss, weight, sums = losses.make("classify", losses.Options(multi=True))(Fake(logits), batch, None)
  want = torch.nn.BCEWithLogitsLoss()(torch.tensor(logits), torch.tensor(labels))
  np.testing.assert_allclose(loss / weight, want, rtol=1e-6)
  assert sums["correct"] == sum(((logits[0, m] > 0) == (labels[0, m] > 0)).all() for m in range(2))
  for found, numbers in ((draw(1, 3, 1), draw(1, 3, seed=1)), (draw(1, 3, 2), draw(1, 3, 2, seed=1))):
    batch = dict(labels=numbers, label_weights=np.ones((1, 3)))
    loss, weight, _ = losses.make("regress", losses.Options())(Fake(found), batch, None)
    want = torch.nn.MSELoss()(torch.tensor(found).reshape(numbers.shape), torch.tensor(numbers))
    np.testing.assert_allclose(loss / weight, want, rtol=1e-6)


def test_tags_are_at_their_own_places():
  logits = draw(1, 4, C)
  batch = dict(targets=np.array([[2, 0, 3, 1]]), weights=np.array([[1, 0, 1, 0]]), input_segments=np.ones((1, 4), int))
  loss, weight, _ = losses.make("tag", losses.Options())(Fake(logits), batch, None)
  np.testing.assert_allclose(loss, nll(logits[0, 0], 2) + nll(logits[0, 2], 3), rtol=1e-6)
  assert weight == 2


def test_answers_of_packed_examples():
  logits = draw(1, 9, 2)
  batch = dict(
    input_segments=np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]]), starts=np.array([[1, 0, 0]]), ends=np.array([[2, 3, 0]]),
    label_weights=np.array([[1, 1, 0.0]]))  # fmt: skip
  loss, weight, _ = losses.make("qa", losses.Options())(Fake(logits), batch, None)
  one, two = logits[0, :3], logits[0, 3:7]
  want = (nll(one[:, 0], 1) + nll(one[:, 1], 2) + nll(two[:, 0], 0) + nll(two[:, 1], 3)) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert weight == 2


def test_masked_tokens_and_next_sentences():
  """With as many tokens a sentence pair as are masked on average, the sum of the two means."""
  logits, nsp = draw(1, 6, V), jnp.asarray(draw(1, 2, 2, seed=1))
  batch = dict(
    targets=np.array([[1, 2, 3, 4, 5, 6]]), weights=np.array([[1, 0, 1, 0, 1, 1]]),
    input_segments=np.array([[1, 1, 1, 2, 2, 2]]), labels=np.array([[1, 0]]), label_weights=np.ones((1, 2)),
  )  # fmt: skip
  loss, weight, sums = losses.make("mlm_nsp", losses.Options(nsp_scale=2.0))(Fake(logits, nsp), batch, None)
  masked = np.mean([nll(logits[0, t], t + 1) for t in (0, 2, 4, 5)])
  following = np.mean([nll(nsp[0, 0], 1), nll(nsp[0, 1], 0)])
  np.testing.assert_allclose(loss / weight, masked + following, rtol=1e-6)
  np.testing.assert_allclose(sums["nsp"] / sums["nsp_weight"], following, rtol=1e-6)
  np.testing.assert_allclose(sums["nll"] / weight, masked, rtol=1e-6)
