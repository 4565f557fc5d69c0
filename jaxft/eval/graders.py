"""What a kind of task takes from the device, and what it makes of it: scores, rows to look at, a confusion matrix.

A grader has `gives` (names of its values), `device(output, batch)` (traced: the arrays that are sent to the hosts),
`examples(sent, row, ids)` (what of them belongs to the examples of a row of the batch) and `grade(found, ids, store)`,
where `found` are the labelled examples and `ids` theirs; one of classes also has `labels`. `predict.PredictEvaluator`
runs it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import InputError
from jaxft.eval import scores, spans

Sent = dict[str, np.ndarray]


class Found(NamedTuple):
  """What was found for one example."""

  output: np.ndarray
  truth: np.ndarray | None = None  # None: unlabelled, not scored


@dataclasses.dataclass(frozen=True)
class Graded:
  values: dict[str, float]
  notes: tuple[str, ...]
  error: np.ndarray  # f64[rows], 0: right; rows with more of it are looked at first
  row: Callable[[int], dict[str, Any]]  # id, input, label, predicted and a number that says how good or bad
  confusion: np.ndarray | None = None  # i64[C, C], see `scores.confusion`


def make(
  kind: str,
  names: Sequence[str],
  *,
  labels: Sequence[str] = (),
  multi: bool = False,
  decode: Callable[[Any, list[np.ndarray]], list[Mapping[str, Any]]] | None = None,
) -> Any:
  """Returns the grader of task `kind` (classify, regress, tag, qa) for the metrics `names`; see the classes below."""
  if kind == "classify":
    return MultiLabel(names, labels) if multi else Classes(names, labels)
  return Values(names) if kind == "regress" else Tags(names, labels) if kind == "tag" else Answers(names, decode)


class _Entries:
  """Of outputs f[B, M, ...]: entry m of a row is that of its example m. Labels and label_weights come along."""

  def device(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return dict(output=output.astype(jnp.float32), truth=batch["labels"], weights=batch["label_weights"])

  def examples(self, sent: Sent, row: int, ids: Sequence[int]) -> list[Found]:
    assert len(ids) <= sent["output"].shape[1], f"{len(ids)} examples in a row of {sent['output'].shape[1]} entries"
    labelled = sent["weights"][row] > 0
    return [Found(sent["output"][row, m], sent["truth"][row, m] if labelled[m] else None) for m in range(len(ids))]

  def broken(self, output: np.ndarray) -> bool:
    return not np.isfinite(output).all()


class Classes(_Entries):
  """One of C classes an example, from logits f[B, M, C]; labels are the C names, in order."""

  def __init__(self, names: Sequence[str], labels: Sequence[str]):
    self._names, self.labels = scores.expand("classify", names, labels), list(labels)
    self.gives = self._names

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    logits, truth = _columns(found, self.labels)
    predictions = logits.argmax(axis=1)
    values, notes = scores.classify(self._names, predictions, truth, self.labels)
    sure = _softmax(logits)[np.arange(len(logits)), predictions]
    row = lambda i: _row(store, ids[i], self.labels[truth[i]], self.labels[predictions[i]], score=_short(sure[i]))
    matrix = scores.confusion(predictions, truth, len(self.labels))
    return Graded(values, notes, np.where(predictions == truth, 0, sure), row, matrix)


class MultiLabel(_Entries):
  """Any of C labels an example, from logits f[B, M, C]; predicted are those of probability above a half."""

  def __init__(self, names: Sequence[str], labels: Sequence[str]):
    self._names, self.labels = scores.expand("multilabel", names, labels), list(labels)
    self.gives = self._names

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    logits, truth = _columns(found, self.labels)
    values, notes = scores.multilabel(self._names, logits, truth, self.labels, threshold=0.0)  # of logits
    chosen, truth = logits > 0, truth > 0.5
    said = lambda on: ", ".join(self.labels[c] for c in np.flatnonzero(on))
    wrong = (chosen != truth).sum(axis=1)
    row = lambda i: _row(store, ids[i], said(truth[i]), said(chosen[i]), wrong_labels=int(wrong[i]))
    return Graded(values, notes, wrong.astype(float), row)


class Values(_Entries):
  """A real value an example, from outputs f[B, M] or f[B, M, 1]."""

  def __init__(self, names: Sequence[str]):
    self._names = scores.expand("regress", names)
    self.gives = self._names

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    outputs = np.stack([f.output for f in found]).reshape(len(found), -1)
    if outputs.shape[1] != 1:
      raise InputError(f"eval: regress needs a model with one output, this one gives {outputs.shape[1]}.")
    predictions, truth = outputs[:, 0], np.array([f.truth for f in found])
    values, notes = scores.regress(self._names, predictions, truth)
    error = np.abs(predictions.astype(float) - truth)
    row = lambda i: _row(store, ids[i], _short(truth[i]), _short(predictions[i]), error=_short(error[i]))
    return Graded(values, notes, error, row)


class Tags:
  """A tag for each supervised place (weights above 0), from logits f[B, T, C] or tags i[B, T]; labels are the C names.

  What was cut off a too long example is not scored: the data report counts it.
  """

  def __init__(self, names: Sequence[str], labels: Sequence[str]):
    self._names, self.labels = scores.expand("tag", names, labels), list(labels)
    if set(self._names) - {"token_accuracy"}:
      spans.check_tags(self.labels)
    self.gives = self._names

  def device(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if output.ndim == 3:  # the argmax here, a number a token in place of C
      if output.shape[-1] != len(self.labels):
        raise InputError(_other_size(output.shape[-1], self.labels))
      best = jnp.argmax(output, axis=-1).astype(jnp.int32)
      output = jnp.where(jnp.isfinite(output).all(axis=-1), best, -1)
    where = jnp.where(batch["weights"] > 0, batch["input_segments"], 0)
    return dict(output=output, truth=batch["targets"], segments=where)

  def examples(self, sent: Sent, row: int, ids: Sequence[int]) -> list[Found]:
    output, truth, segments = (sent[k][row] for k in ("output", "truth", "segments"))
    at = [segments == m + 1 for m in range(len(ids))]
    return [Found(output[a], truth[a] if a.any() else None) for a in at]

  def broken(self, output: np.ndarray) -> bool:
    return bool((output < 0).any())

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    named = lambda tags: [self.labels[t] for t in tags]
    predictions, truth = [named(f.output) for f in found], [named(f.truth) for f in found]
    values, notes = spans.tag(self._names, predictions, truth, self.labels)
    wrong = np.array([(f.output != f.truth).sum() for f in found], float)
    row = lambda i: _row(store, ids[i], " ".join(truth[i]), " ".join(predictions[i]), wrong_tags=int(wrong[i]))
    return Graded(values, notes, wrong, row)


class Ranked:
  """One of C words an example, the likeliest of the examples that differ in their word alone, C in succession.

  From log-probabilities f[B, T] of the tokens of `batch[tokens]`, 0 where they are not the word's; its segments are in
  `batch[segments]`. `truth` is i[rows], the index of the right word. A word of several tokens has the sum of theirs.
  """

  def __init__(self, names: Sequence[str], words: Sequence[str], truth: np.ndarray, segments: str):
    self._names, self.labels, self._truth = scores.expand("classify", names, words), list(words), truth
    self._segments, self.gives = segments, self._names

  def device(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return dict(output=output.astype(jnp.float32), segments=batch[self._segments])

  def examples(self, sent: Sent, row: int, ids: Sequence[int]) -> list[Found]:
    own = [sent["output"][row][sent["segments"][row] == m + 1] for m in range(len(ids))]
    return [Found(x.astype(np.float64).sum(), np.zeros(0)) for x in own]

  def broken(self, output: np.ndarray) -> bool:
    return not np.isfinite(output)

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    C = len(self.labels)
    assert len(found) == C * len(self._truth), "a row is answered from all its words"
    logits = np.array([f.output for f in found]).reshape(-1, C)
    found = [Found(x, t) for x, t in zip(logits, self._truth)]
    graded = Classes(self._names, self.labels).grade(found, [C * i for i in range(len(found))], store)
    return dataclasses.replace(graded, row=lambda i: dict(graded.row(i), id=i))


class Answers:
  """Answers out of a text, from logits f[B, T, 2] of their first and last token.

  decode(store, logits) -> questions: `logits` has one f32[length, 2] an example of `store`, in order, for its tokens
  as `store.tokens("inputs", i)` has them; `store` knows the rest (which question an example is of, the place in the
  text of each token, the references). A question is dict(id, question, references, answer, score); an empty answer
  says that there is none.
  """

  def __init__(self, names: Sequence[str], decode: Callable[[Any, list[np.ndarray]], list[Mapping[str, Any]]]):
    self._names, self._decode = scores.expand("qa", names), decode
    self.gives = self._names

  def device(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return dict(output=output.astype(jnp.float32), segments=batch["input_segments"])

  def examples(self, sent: Sent, row: int, ids: Sequence[int]) -> list[Found]:
    return [Found(sent["output"][row][sent["segments"][row] == m + 1], np.zeros(0)) for m in range(len(ids))]

  def broken(self, output: np.ndarray) -> bool:
    return not np.isfinite(output).all()

  def grade(self, found: Sequence[Found], ids: Sequence[int], store: Any) -> Graded:
    assert list(ids) == list(range(len(store))), "a question is answered from all its parts"
    asked = self._decode(store, [f.output for f in found])
    predictions, references = [q["answer"] for q in asked], [list(q["references"]) for q in asked]
    values, notes = spans.squad(self._names, predictions, references)
    error = np.array([2.0 - sum(spans.answer(p, r)) for p, r in zip(predictions, references)])
    row = lambda i: dict(
      id=asked[i]["id"],
      input=asked[i]["question"],
      label=" | ".join(dict.fromkeys(references[i])),
      predicted=predictions[i],
      score=_short(asked[i]["score"]),
    )
    return Graded(values, notes, error, row)


def _row(store: Any, i: int, label: Any, predicted: Any, **more: Any) -> dict[str, Any]:
  return dict(id=i, input=store.texts(i)[0], label=label, predicted=predicted, **more)


def _columns(found: Sequence[Found], labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (logits f32[N, C], truth [N, ...]); raises InputError where C is not the number of `labels`."""
  logits, truth = np.stack([f.output for f in found]), np.stack([f.truth for f in found])
  if logits.shape[-1] != len(labels):
    raise InputError(_other_size(logits.shape[-1], labels))
  return logits, truth


def _other_size(count: int, labels: Sequence[str]) -> str:
  return (
    f"eval: the model has {count} outputs, but the data has {len(labels)} labels ({', '.join(map(str, labels[:5]))}"
    f"{', ...' if len(labels) > 5 else ''}). Evaluate on data with the labels that the model was trained on."
  )


def _softmax(logits: np.ndarray) -> np.ndarray:
  raised = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
  return raised / raised.sum(axis=-1, keepdims=True)


def _short(x: Any) -> float:
  return float(f"{float(x):.6g}")
