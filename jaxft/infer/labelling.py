"""The engine of models that predict something for each text, or for each word of it: labels, values, tags.

Shapes: B rows, T input length, C labels; a row is i32[n, 4]: token id, token type, number of its word (-1: of none, as
in a text that is not in words), and how many words there are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.infer import engine

KINDS = ("classify", "tag")  # heads of skeletons


class Labelled(NamedTuple):
  """What was predicted for one row."""

  output: Any  # a name; a list of names, of all labels that apply, or a word (None: cut off); a number or several
  scores: Any = None  # probabilities: {name: share} of labels, a list of those of the tags; None of numbers
  cut: tuple = ()

  def record(self, scores: bool) -> dict[str, Any]:
    """Returns the fields of its line in the output of a batch decode."""
    return dict(output=self.output) | (dict(scores=self.scores) if scores and self.scores is not None else {})


class Labeller(engine.Engine):
  """Predicts for lists of rows, see `engine.Engine`; texts are texts, (text, text), or lists of words."""

  def __init__(self, skeleton, tokenizer, **where):
    """`skeleton` has a head of one of KINDS; `where` are batch, mesh and rules of an `engine.Engine`."""
    super().__init__(skeleton, tokenizer, **where)
    problem = skeleton.json.get("problem_type")
    alone = len(skeleton.labels) == 1 and problem is None  # which transformers takes for a value, too
    self.what = "tag" if skeleton.kind == "tag" else "regression" if alone else problem or "single_label_classification"

  def encode(self, texts: Sequence[Any]) -> list[np.ndarray]:
    """Returns i32[n, 4] a text, as the head of this module says."""
    encoder, out = self.tokenizer.encoder, [None] * len(texts)
    each = lambda kind: [i for i, t in enumerate(texts) if isinstance(t, kind)]
    alone, pairs, words = each(str), each(tuple), each(list)
    for i, ids in zip(alone, encoder.encode([texts[i] for i in alone])):
      out[i] = _row(ids)
    if pairs:
      for i, ids, types in zip(pairs, *encoder.encode_pairs(*zip(*(texts[i] for i in pairs)))[:2]):
        out[i] = _row(ids, types or 0)
    for i, (ids, numbers) in zip(words, encoder.encode_words([texts[i] for i in words]) if words else ()):
      out[i] = _row(ids, 0, numbers, len(texts[i]))
    return out

  def settings(self, seed: int) -> dict[str, Any]:
    del seed
    return dict(labels=list(self.skeleton.labels), head=self.what)

  def _traced(self, params, tokens_BT4, segments_BT):
    batch = dict(inputs=tokens_BT4[..., 0], input_segments=segments_BT)
    batch["label_weights"] = jnp.ones((len(segments_BT), 1), jnp.float32)
    if self.tokenizer.encoder.types:
      batch["input_types"] = tokens_BT4[..., 1]
    model = self.skeleton.bind(params)
    if self.what != "tag":
      return model.classify(batch, None).astype(jnp.float32)[:, 0]
    logits_BTC = model.tag(batch, None).astype(jnp.float32)
    best_BT = jnp.argmax(logits_BTC, -1)
    return best_BT, jnp.exp(jnp.max(jax.nn.log_softmax(logits_BTC), -1))

  def _dispatch(self, params, rows, ids, seed: int, size: int) -> tuple[list, Any]:
    return rows, self._run(params, *self._padded(rows, size))

  def _collect(self, positions: list[int], sent: tuple[list, Any], ids) -> tuple[list[int], list[Labelled]]:
    rows, out = sent
    found = [np.asarray(x)[: len(positions)] for x in (out if self.what == "tag" else (out,))]
    real = lambda i: found[-1][i][: len(rows[i])] if self.what == "tag" else found[-1][i]  # without padding
    self._finite([real(i) for i in range(len(rows))], [ids[p] for p in positions])
    of = dict(tag=self._tags, regression=self._values, multi_label_classification=self._several).get(
      self.what, self._one
    )
    return positions, [of(row, *(x[i] for x in found)) for i, row in enumerate(rows)]

  def _one(self, row, logits_C) -> Labelled:
    raised = np.exp(logits_C.astype(np.float64) - logits_C.max())
    return Labelled(self.skeleton.labels[logits_C.argmax()], self._named(raised / raised.sum()))

  def _several(self, row, logits_C) -> Labelled:
    chosen = [name for name, x in zip(self.skeleton.labels, logits_C) if x > 0]
    return Labelled(chosen, self._named(1 / (1 + np.exp(-logits_C.astype(np.float64)))))

  def _named(self, shares) -> dict[str, float]:
    return {name: _short(x) for name, x in zip(self.skeleton.labels, shares)}

  def _values(self, row, out_C) -> Labelled:
    values = [_short(x) for x in out_C]
    return Labelled(values[0] if len(values) == 1 else values)

  def _tags(self, row, best_T, sure_T) -> Labelled:
    numbers = row[:, 2]
    first = np.flatnonzero((numbers >= 0) & (numbers != np.concatenate([[-1], numbers[:-1]])))
    tags, sure = [None] * int(row[0, 3]), [None] * int(row[0, 3])
    for at in first:
      tags[numbers[at]], sure[numbers[at]] = self.skeleton.labels[best_T[at]], _short(sure_T[at])
    return Labelled(tags, sure)


def _row(ids: Sequence[int], types: Any = 0, numbers: Any = -1, words: int = 0) -> np.ndarray:
  out = np.empty((len(ids), 4), np.int32)
  for i, x in enumerate((ids, types, numbers, words)):
    out[:, i] = x
  return out


def _short(x: Any) -> float:
  return float(f"{float(x):.6g}")
