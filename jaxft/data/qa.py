"""Questions whose answer stands in a text: rows to windows (see `squad`), and the logits of windows to answers.

A window is an example. Beside its tokens a store keeps what answers are read from: for each token its characters in
the context, the first token of the context and that after the last, the question with its references, and the part of
the context that the window shows.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data import squad
from jaxft.data.fields import Columns, Example
from jaxft.data.templates import value

STRIDE = 128  # tokens by which windows overlap, as in run_qa.py; of short windows a third


def overlap(stride: int, length: int) -> int:
  """Returns the tokens of context that neighbouring windows share; a negative stride is the default."""
  return stride if stride >= 0 else min(STRIDE, length // 3)


def render_question(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  """`parts` is the question, checked. Texts are taken as they are: places of answers count their characters."""
  where = f"{where} (question {row['id']})" if row.get("id") is not None else where
  same = lambda text: text
  named = dict(question=task.input, context=task.pair, answers=task.label)
  asked = {k: value(t, k, row, same, where) if k != "answers" or _has(row, t) else None for k, t in named.items()}
  q = squad.read(row | asked, where)
  texts = [text for text, _ in q.answers]
  return Example(f"{q.question}\n{q.context}", " | ".join(dict.fromkeys(texts)), len(q.context), None, 0, q)


def _has(row: dict, template: str) -> bool:
  """Says whether the row has answers at all: rows to be answered need none."""
  return template != "{answers}" or "answers" in row


def encode_questions(examples: Sequence[Example], job: Any) -> Columns:
  questions = [e.parts for e in examples]
  made = _windows(job).features(questions) if questions else []
  pairs = [(i, f) for i, features in enumerate(made) for f in features]
  each = [f for _, f in pairs]
  parts = [_part(questions[i], f) for i, f in pairs]
  asked = [json.dumps([q.id, q.question, [t for t, _ in q.answers]]).encode() for q in questions]
  number = lambda values: np.array(list(values), np.int32)
  types = [f.types if job.encoder.types else np.zeros_like(f.types) for f in each]
  lost = sum(bool(q.answers) and not any(f.held for f in features) for q, features in zip(questions, made))
  counts = dict(
    questions=len(questions), windows=len(each), unheld=lost,
    unanswerable=sum(not q.answers for q in questions), holding=sum(f.held for f in each),
  )  # fmt: skip
  return Columns(
    dict(inputs=[f.ids for f in each]),
    dict(types=types, firsts=[f.offsets[:, 0] for f in each], afters=[f.offsets[:, 1] for f in each]),
    dict(
      starts=number(f.start for f in each), ends=number(f.end for f in each), begin=number(f.context[0] for f in each),
      end=number(f.context[1] for f in each), asked=[asked[i] for i, _ in pairs],
    ),
    counts=counts,
    rows=[i for i, _ in pairs],
    texts=[(f"{questions[i].question}\n{part}", examples[i].target) for (i, _), part in zip(pairs, parts)],
  )  # fmt: skip


def _part(q: squad.Question, f: squad.Feature) -> str:
  """Returns the part of the context that a window shows."""
  first, after = f.context
  return q.context[int(f.offsets[first, 0]) : int(f.offsets[after - 1, 1])] if after > first else ""


def _windows(job: Any) -> squad.Windows:
  """Returns what cuts windows, made once a process."""
  if not hasattr(job, "windows"):
    length = job.lengths["inputs"]
    job.windows = squad.windows(job.encoder, length, overlap(job.task.stride, length))
  return job.windows


def answers(
  store: Any, logits: Sequence[np.ndarray], *, n_best: int = 20, max_answer_length: int = 30
) -> list[dict[str, Any]]:
  """Returns dict(id, question, references, answer, score) for each question of a store, in order; the rest is as in
  `squad.decode`.

  logits f32[length, 2] an example, in order. Where the data has questions without an answer, "" is one.
  """
  ids = np.arange(len(store))
  asked = [json.loads(bytes(x)) for x in store.kept("asked", ids)]
  null = None if all(references for _, _, references in asked) else 0.0
  begin, end = store.kept("begin", ids), store.kept("end", ids)
  rows, out = store.row_of(ids), []
  for own in np.split(ids, np.flatnonzero(np.diff(rows)) + 1):
    own = own[np.unique(store.stored_of(own), return_index=True)[1]]  # a row that counts twice is answered once
    name, question, references = asked[own[0]]
    features, context = _features(store, own, begin, end, len(question) + 1)
    found = squad.decode(
      [logits[i][:, 0] for i in own], [logits[i][:, 1] for i in own], features, context, n_best, max_answer_length, null
    )
    text, score, _ = found[0]
    name = int(rows[own[0]]) if name is None else name
    out.append(dict(id=name, question=question, references=references, answer=text, score=score))
  return out


def _features(store, ids: np.ndarray, begin, end, skip: int) -> tuple[list[squad.Feature], str]:
  """Returns the windows of a question and its context, of which white space between two windows is not kept."""
  features, context = [], []
  for i in ids:
    offsets = np.stack([store.gather(n, np.array([i])) for n in ("firsts", "afters")], 1)
    run = int(begin[i]), int(end[i])
    features.append(squad.Feature(store.tokens("inputs", i), None, offsets, 0, 0, run))
    at, part = int(offsets[run[0], 0]) if run[1] > run[0] else 0, store.texts(i)[0][skip:]
    context += [" "] * (at + len(part) - len(context))
    context[at : at + len(part)] = part
  return features, "".join(context)
