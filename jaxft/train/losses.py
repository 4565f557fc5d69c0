"""Losses as sums: every function returns (loss sum, weight sum, sums to report), to be divided once over all rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models import layers
from jaxft.train import tiles

Sums = dict[str, jax.Array]


Loss = Callable[[Any, dict[str, jax.Array], jax.Array | None], tuple[jax.Array, jax.Array, Sums]]


@dataclasses.dataclass(frozen=True)
class Options:
  """What a loss is told besides the batch; what a kind has no use for is not read there."""

  label_smoothing: float = 0.0
  z_loss: float = 0.0
  class_weights: tuple[float, ...] = ()  # of labels, classify and tag; (): all 1
  multi: bool = False  # classify: several labels an example
  nsp_scale: float = 1.0  # mlm_nsp: what an example weighs beside a masked token
  logits: float = 0.0  # bytes of a device that logits over a vocabulary may take; more: in tiles. 0: any number


def make(kind: str, o: Options) -> Loss:
  """Returns the loss of a kind of task: loss(model, batch, key) -> (loss sum, weight sum, {name: sum}), f32 scalars.

  `key` is for dropout (None: none). The weight is what the loss is divided by: supervised tokens, or examples. Among
  the sums are "nll", the loss without smoothing and z-loss in nats, and "correct", the weight of what is predicted
  right. The batch is laid out as models/single.py and models/encdec.py say, with weights f32[B, T] for tokens and
  label_weights f32[B, M] for examples.
  """
  if kind in WHOLE:
    return functools.partial(WHOLE[kind], o=o)
  return lambda model, batch, key: of_outputs(kind, OUTPUTS[kind](model, batch, key), batch, o)


def seq2seq(model: Any, batch: dict, key: jax.Array | None, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of `targets` under an encoder-decoder."""
  return over_vocabulary(model, model.hidden(batch, key), batch["targets"], batch["weights"], o)


def next_token(model: Any, batch: dict, key: jax.Array | None, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of each token of `inputs` under a decoder that has read those before it in its segment.

  `weights` belong to the token that is predicted; the first of a segment is never.
  """
  return over_vocabulary(model, model.hidden(batch, key), *_later(batch), o)


def over_vocabulary(
  model: Any, hidden_BTD: jax.Array, labels: jax.Array, weights: jax.Array, o: Options, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of `labels` under the head of `model`: whole, or in tiles where `o.logits` bytes do not hold it.

  Tiles give the same sums and gradients, in another order of additions. A head with dropout is never cut.
  """
  head = getattr(model, "head", None)
  t = 0
  if o.logits and head is not None and (key is None or head.spec == head.spec.undropped()):
    t = tiles.tile(*hidden_BTD.shape[:2], head.spec.out, head.spec.axis, o.logits)
  if not t:
    logits = model.logits(hidden_BTD) if key is None else model.logits(hidden_BTD, key)
    return weighted(logits, labels, weights, label_smoothing=o.label_smoothing, z_loss=o.z_loss)
  numbers = tuple(map(_given, (o.label_smoothing, o.z_loss)))
  loss, nll, correct = tiles.sums(model, hidden_BTD, labels, weights, _forward, _backward, numbers, t)
  return loss, jnp.sum(weights.astype(jnp.float32)), dict(nll=nll, correct=correct)


def _later(batch: dict) -> tuple[jax.Array, jax.Array]:
  """Returns (labels, weights), each where the token before it in its segment stands."""
  later = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  segments = batch["input_segments"]
  return later(batch["inputs"]), jnp.where(later(segments) == segments, later(batch["weights"]), 0)


def each_token(logits_BTC: jax.Array, batch: dict, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of `targets` at their own places: labels of words, or what was masked."""
  weights = batch["weights"] * _class_weights(batch["targets"], o)
  return weighted(logits_BTC, batch["targets"], weights, label_smoothing=o.label_smoothing, z_loss=o.z_loss)


def masked(model: Any, batch: dict, key: jax.Array | None, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of what was masked, `targets` at their own places, under the head over the vocabulary."""
  body, head = (None,) * 2 if key is None else layers.keys(key, 2)
  return over_vocabulary(model, model.hidden(batch, body), batch["targets"], batch["weights"], o, head)


def log_probabilities(kind: str, model: Any, batch: dict) -> jax.Array:
  """Returns f32[B, S] of the tokens that a model of `kind` seq2seq, sft or prefix_lm is to write, 0 where none is.

  Of seq2seq they lie where `targets` has them, else each where the token before it stands in `inputs`.
  """
  o = Options()
  if kind == "seq2seq":
    labels, weights = batch["targets"], batch["weights"]
  else:
    labels, weights = _later(batch)
  logits = model.logits(model.hidden(batch, None))
  return jnp.where(weights > 0, -cross_entropy(logits, labels, o.label_smoothing, o.z_loss)[1], 0.0)


def _class_weights(labels: jax.Array, o: Options) -> jax.Array | float:
  return jnp.asarray(o.class_weights, jnp.float32)[labels] if o.class_weights else 1.0


def classify(logits_BMC: jax.Array, batch: dict, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Cross-entropy of `labels` i32[B, M]; with `multi`, the mean over the classes of that of each label f32[B, M, C]."""
  labels, weights = batch["labels"], batch["label_weights"]
  if not o.multi:
    weights = weights * _class_weights(labels, o)
    return weighted(logits_BMC, labels, weights, label_smoothing=o.label_smoothing, z_loss=o.z_loss)
  e = o.label_smoothing
  smooth = labels * (1 - e) + e / 2
  entropy = lambda y: jax.nn.softplus(logits_BMC) - y * logits_BMC  # of a Bernoulli variable, from its logit
  each = entropy(smooth) * (jnp.asarray(o.class_weights, jnp.float32) if o.class_weights else 1.0)
  right = jnp.all((logits_BMC > 0) == (labels > 0.5), -1)
  return _sums(jnp.mean(each, -1), weights, dict(nll=jnp.mean(entropy(labels), -1), correct=right))


def regress(found: jax.Array, batch: dict, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Squared error of `labels` f32[B, M] (or [B, M, C], the mean over C)."""
  labels = batch["labels"]
  error = jnp.mean(jnp.square(found - labels.reshape(*labels.shape[:2], -1)), -1)
  return _sums(error, batch["label_weights"], {})


def answer_span(logits_BT2: jax.Array, batch: dict, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Mean of the cross-entropies of the first and of the last token of the answer, each over the tokens of its example.

  `starts` and `ends` i32[B, M] count from the first token of the example (Devlin et al. 2018, section 4.2).
  """
  segments, weights = batch["input_segments"], batch["label_weights"]
  M = weights.shape[1]
  inside_BMT = segments[:, None, :] == jnp.arange(1, M + 1)[:, None]
  first_BM = jnp.argmax(inside_BMT, -1)
  loss, right = 0.0, True
  for i, name in enumerate(("starts", "ends")):
    logits_BMT = jnp.where(inside_BMT, logits_BT2[:, None, :, i], -1e30)
    part, _, hit = cross_entropy(logits_BMT, first_BM + batch[name], 0.0, 0.0)
    loss, right = loss + part / 2, right & (hit > 0)
  return _sums(loss, weights, dict(nll=loss, correct=right))


def masked_and_next(model: Any, batch: dict, key: jax.Array | None, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Masked tokens, and whether the second text follows the first (labels i32[B, M]), over the masked tokens.

  An example counts as `nsp_scale` tokens: with as many as an example has masked ones, the loss is the sum of the two
  means, as in BERT, and it does not depend on how the batch is cut.
  """
  body, head, other = (None,) * 3 if key is None else layers.keys(key, 3)
  hidden = model.hidden(batch, body)
  loss, weight, sums = over_vocabulary(model, hidden, batch["targets"], batch["weights"], o, head)
  logits = model.classified(hidden, batch["input_segments"], batch["label_weights"].shape[1], other, "nsp")
  nsp, examples, more = weighted(logits, batch["labels"], batch["label_weights"], label_smoothing=0.0, z_loss=0.0)
  beside = dict(nsp=nsp, nsp_correct=more["correct"], nsp_weight=examples)
  return loss + o.nsp_scale * nsp, weight, {**sums, **{k: o.nsp_scale * x for k, x in beside.items()}}


_classified = lambda model, batch, key: model.classify(batch, key)
_tagged = lambda model, batch, key: model.tag(batch, key)

OUTPUTS = dict(classify=_classified, regress=_classified, tag=_tagged, qa=_tagged)  # what a model predicts
OF_OUTPUTS = dict(classify=classify, regress=regress, tag=each_token, qa=answer_span)
OF_EXAMPLES = ("classify", "regress", "qa")  # whose weights count examples, not tokens
WHOLE = dict(
  seq2seq=seq2seq,
  span_corruption=seq2seq,
  causal=next_token,
  sft=next_token,
  prefix_lm=next_token,
  mlm=masked,
  mlm_nsp=masked_and_next,
)


def of_outputs(kind: str, outputs: jax.Array, batch: dict, o: Options) -> tuple[jax.Array, jax.Array, Sums]:
  """Returns the sums of `make` for what OUTPUTS[kind] gave."""
  return OF_OUTPUTS[kind](outputs, batch, o)


def _sums(loss: jax.Array, weights: jax.Array, more: dict) -> tuple[jax.Array, jax.Array, Sums]:
  """Returns the sums of what is given for each example; one with a weight of 0 adds nothing and gets no gradient."""
  weights = weights.astype(jnp.float32)
  total = lambda x: jnp.sum(jnp.where(weights != 0, x * weights, 0))
  return total(loss), jnp.sum(weights), {k: total(x) for k, x in more.items()}


def weighted(
  logits: jax.Array, labels: jax.Array, weights: jax.Array, *, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, Sums]:
  """Returns the sums of cross-entropy for logits [..., V], labels i32[...] and weights [...]; 0 hides a token.

  A hidden token adds nothing and gets no gradient, even where its logits are not finite.
  """
  loss, nll, correct = cross_entropy(logits.astype(jnp.float32), labels, label_smoothing, z_loss)
  return _sums(loss, weights, dict(nll=nll, correct=correct))


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float | jax.Array, z_loss: float | jax.Array
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
  return _cross_entropy(logits, labels, _given(label_smoothing), _given(z_loss))


def _given(x: float | jax.Array) -> float | jax.Array | None:
  return x if isinstance(x, jax.Array) or x else None  # a traced 0 is a number like any other


@jax.custom_vjp
def _cross_entropy(logits, labels, label_smoothing, z_loss):
  return _forward(logits, labels, label_smoothing, z_loss)[0]


def _forward(logits, labels, label_smoothing, z_loss):
  most = jnp.max(logits, -1)
  log_z = most + jnp.log(jnp.sum(jnp.exp(logits - most[..., None]), -1))
  label_logit = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  nll = log_z - label_logit
  loss = nll
  if label_smoothing is not None:  # sum_c(-log p_c) / V = log_z - mean(logits)
    loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, -1))
  if z_loss is not None:
    loss = loss + z_loss * jnp.square(log_z)
  return (loss, nll, (label_logit >= most).astype(jnp.float32)), (logits, labels, log_z, label_smoothing, z_loss)


def _backward(kept, cotangents):
  logits, labels, log_z, *numbers = kept
  label_smoothing, z_loss = (0.0 if x is None else x for x in numbers)
  g = cotangents[0][..., None]  # exactly 0 at hidden tokens
  probability = jnp.exp(logits - log_z[..., None])
  is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
  target = jnp.where(is_label, 1 - label_smoothing, 0) + label_smoothing / logits.shape[-1]
  slope = probability * (1 + 2 * z_loss * log_z[..., None]) - target
  return jnp.where(g != 0, g * slope, 0), None, None, None


_cross_entropy.defvjp(_forward, _backward)
