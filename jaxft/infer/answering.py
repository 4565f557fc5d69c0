"""The engine of extractive question answering: (question, context) to the words of the context that answer it.

Shapes: B rows, T tokens; a row of the engine is a window, i32[n, 2]: token id, token type. A question is its windows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import squad
from jaxft.errors import InputError
from jaxft.infer import engine

GROUP = 16  # batches of questions whose windows are computed together: what a kill can cost


class Options(NamedTuple):
  """How questions are answered; n_best and max_answer_length as in `squad.decode`."""

  length: int = 384  # tokens of a window, and how many of the context neighbours share: run_qa.py's
  stride: int = 128
  empty: bool = False  # whether "" is an answer, as for a model that has learnt that some questions have none
  n_best: int = 20
  max_answer_length: int = 30


class Answered(NamedTuple):
  """What was found for one question; `best` are [(text, score, probability)], the answer first."""

  best: list[tuple[str, float, float]]
  cut: tuple = ()

  def record(self, scores: bool) -> dict[str, Any]:
    """Returns the fields of its line in the output of a batch decode; scores: the best answers, probabilities."""
    share = lambda p: float(f"{p:.6g}")
    best = [dict(output=text, probability=share(p)) for text, _, p in self.best]
    return dict(output=self.best[0][0]) | (dict(scores=best) if scores else {})


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question in windows."""

  context: str
  features: list[squad.Feature]

  def __len__(self) -> int:
    """Returns the tokens of its longest window."""
    return max(len(f.ids) for f in self.features)


class Answerer(engine.Engine):
  """Answers lists of `Asked`, see `engine.Engine`; texts are (question, context)."""

  def __init__(self, skeleton, tokenizer, options: Options, **where):
    """`skeleton` has a head for answer spans; `where` are batch (of windows), mesh and rules of an `engine.Engine`."""
    super().__init__(skeleton, tokenizer, **where)
    self.options = options
    self._windows = squad.windows(tokenizer.encoder, options.length, options.stride)

  def encode(self, texts: Sequence[tuple[str, str]]) -> list[Asked | InputError]:
    """Returns the windows of each question, or why there are none; "" in place of a pair stays empty."""
    questions = [squad.Question(None, *t, (), "this row") for t in texts if t]
    try:
      made = iter(self._windows.features(questions))
      return [Asked(t[1], next(made)) if t else () for t in texts]
    except InputError as e:
      if len(texts) == 1:
        return [e]
      return [x for t in texts for x in self.encode([t])]

  def settings(self, seed: int) -> dict[str, Any]:
    del seed
    return dict(head="qa", **self.options._asdict())

  def stream(self, params, rows, *, seed: int = 0, ids: Sequence[object] | None = None) -> Iterator[tuple[list, list]]:
    """As `Engine.stream`, of questions: yields (positions in `rows`, their answers), longest first."""
    ids = range(len(rows)) if ids is None else ids
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(rows), GROUP * self._batch):
      yield from self._some(params, {i: rows[i] for i in order[begin : begin + GROUP * self._batch]}, ids)

  def _some(self, params, asked: dict[int, Asked], ids: Sequence[object]) -> Iterator[tuple[list, list]]:
    typed = self.tokenizer.encoder.types
    row = lambda f: np.stack([f.ids, f.types if typed else np.zeros_like(f.ids)], 1)
    places = [(i, n) for i, a in asked.items() for n in range(len(a.features))]
    windows = [row(asked[i].features[n]) for i, n in places]
    logits: dict[int, dict[int, np.ndarray]] = {i: {} for i in asked}
    for found, outputs in super().stream(params, windows, ids=[ids[i] for i, _ in places]):
      for p, out in zip(found, outputs):
        logits[places[p][0]][places[p][1]] = out
      whole = [i for i in dict.fromkeys(places[p][0] for p in found) if len(logits[i]) == len(asked[i].features)]
      if whole:
        yield whole, [self._answer(asked[i], logits.pop(i)) for i in whole]

  def _answer(self, asked: Asked, logits: dict[int, np.ndarray]) -> Answered:
    starts, ends = ([logits[n][:, k] for n in range(len(logits))] for k in (0, 1))
    o = self.options
    null = 0.0 if o.empty else None
    return Answered(squad.decode(starts, ends, asked.features, asked.context, o.n_best, o.max_answer_length, null))

  def _traced(self, params, tokens_BT2, segments_BT) -> jax.Array:
    batch = dict(inputs=tokens_BT2[..., 0], input_segments=segments_BT)
    if self.tokenizer.encoder.types:
      batch["input_types"] = tokens_BT2[..., 1]
    return self.skeleton.bind(params).tag(batch, None).astype(jnp.float32)

  def _dispatch(self, params, rows, ids, seed: int, size: int) -> tuple[list, Any]:
    return rows, self._run(params, *self._padded(rows, size))

  def _collect(self, positions: list[int], sent: tuple[list, Any], ids) -> tuple[list[int], list[np.ndarray]]:
    rows, out = sent
    found = [x[: len(row)] for row, x in zip(rows, np.asarray(out))]
    self._finite(found, [ids[p] for p in positions])
    return positions, found
