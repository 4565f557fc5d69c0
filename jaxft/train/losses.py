"""Losses as sums: every function returns (loss sum, weight sum, sums to report), to be divided once over all rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]


def seq2seq(
  model: Any, batch: dict[str, jax.Array], key: jax.Array | None, *, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, Sums]:
  """Returns the cross-entropy of `batch["targets"]` under the encoder-decoder `model`, summed with `batch["weights"]`.

  `key` is for dropout (None: none). All sums are float32 scalars: the loss with smoothing and z-loss, the weights, and
  {"nll": cross-entropy without either, in nats, "correct": weight of the tokens whose label has the largest logit}.
  """
  logits_BSV = model.logits(model.hidden(batch, key))
  return weighted(logits_BSV, batch["targets"], batch["weights"], label_smoothing=label_smoothing, z_loss=z_loss)


def weighted(
  logits: jax.Array, labels: jax.Array, weights: jax.Array, *, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, Sums]:
  """Returns the sums of `seq2seq` for logits [..., V], labels i32[...] and weights [...]; a weight of 0 hides its
  token.

  A hidden token adds nothing and gets no gradient, even where its logits are not finite.
  """
  weights = weights.astype(jnp.float32)
  loss, nll, correct = cross_entropy(logits.astype(jnp.float32), labels, label_smoothing, z_loss)
  total = lambda x: jnp.sum(jnp.where(weights != 0, x * weights, 0))
  return total(loss), jnp.sum(weights), {"nll": total(nll), "correct": total(correct)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (loss, nll, correct), each f32[...], for logits f32[..., V] and labels i32[...] in [0, V).

  loss = (1 - e) nll + e / V * sum_c(-log p_c) + z * logsumexp(logits)^2, with e = `label_smoothing` as in
  torch.nn.CrossEntropyLoss (and in the LabelSmoother of transformers, which is the same function: e spreads over all V
  labels, the right one among them), and z = `z_loss` as in PaLM (arXiv 2204.02311, section 5). `correct` is 1 where no
  logit exceeds the label's: the maximum is at hand, an argmax would read all logits once more. Only the loss is
  differentiable.

  Forward and backward by hand, because log_softmax under autodiff keeps the logits several times: forward and backward
  of 1024 tokens with V=32128 and D=256, head included, on 2 CPU cores, with smoothing and z-loss, take 502 ms and 132
  MB where jax.nn.log_softmax takes 712 ms and 526 MB; the two head products alone take 466 ms.
  """
  return _forward(logits, labels, label_smoothing, z_loss)[0]


def _forward(logits, labels, label_smoothing, z_loss):
  most = jnp.max(logits, -1)
  log_z = most + jnp.log(jnp.sum(jnp.exp(logits - most[..., None]), -1))
  label_logit = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  nll = log_z - label_logit
  loss = nll
  if label_smoothing:  # sum_c(-log p_c) / V = log_z - mean(logits)
    loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, -1))
  if z_loss:
    loss = loss + z_loss * jnp.square(log_z)
  return (loss, nll, (label_logit >= most).astype(jnp.float32)), (logits, labels, log_z)


def _backward(label_smoothing, z_loss, kept, cotangents):
  logits, labels, log_z = kept
  g = cotangents[0][..., None]  # exactly 0 at hidden tokens
  probability = jnp.exp(logits - log_z[..., None])
  is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
  target = jnp.where(is_label, 1 - label_smoothing, 0) + label_smoothing / logits.shape[-1]
  slope = probability * (1 + 2 * z_loss * log_z[..., None]) - target
  return jnp.where(g != 0, g * slope, 0), None


cross_entropy.defvjp(_forward, _backward)
