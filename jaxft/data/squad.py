"""Extractive question answering: SQuAD's files as rows, long contexts in overlapping windows, logits to answers.

Follows transformers' `run_qa.py` (examples/pytorch/question-answering), whose features and answers come out here too;
where it differs the docstrings say so. A context of any length is used: each window that is cut from it is a feature,
and an answer that no window holds whole is never lost unseen (`Feature.held`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from jaxft.data.clean import utf8
from jaxft.errors import InputError

LEVELS = ("data", "paragraphs", "qas")  # lists in lists of SQuAD's json


class Question(NamedTuple):
  """A row that was checked. `answers` are (text, index of its first character in the context); none: unanswerable."""

  id: str | None
  question: str
  context: str
  answers: tuple[tuple[str, int], ...]
  where: str


class Feature(NamedTuple):
  """One window: [CLS] question [SEP] part of the context [SEP], T tokens; not padded."""

  ids: np.ndarray  # i32[T]
  types: np.ndarray  # i32[T]
  offsets: np.ndarray  # i32[T, 2] first character and that after the last, in the question or the context
  start: int  # first and last token of the first answer; 0, 0 where the window does not hold all of it
  end: int
  context: tuple[int, int]  # its first token and that after the last

  @property
  def held(self) -> bool:
    return self.start > 0


# ---- rows


def flatten(row: dict, where: str) -> Iterator[tuple[dict, str]]:
  """Yields (flat row, place) of SQuAD's nested json (a whole file, an article or a paragraph); a flat row is itself.

  A flat row has id, title, context, question, answers (text and answer_start, lists) and is_impossible, as far as the
  file has them.
  """
  level = None if "question" in row else next((x for x in LEVELS if x in row), None)
  if level is None:
    answers = row.get("answers")
    if isinstance(answers, (list, tuple)):
      row = {**row, "answers": _columns(answers, where)}
    yield row, where
    return
  if not isinstance(row[level], (list, tuple)):
    raise InputError(f"{where}: {level!r} is {row[level]!r:.60}; in SQuAD's json it is a list of objects.")
  given = {k: row[k] for k in ("title", "context") if k in row}
  for number, inner in enumerate(row[level], 1):
    place = f"{where}, {level} {number}"
    if not isinstance(inner, dict):
      raise InputError(f"{place} is {inner!r:.60}; in SQuAD's json it is an object.")
    yield from flatten({**given, **inner}, place)


def _columns(answers, where: str) -> dict:
  for number, answer in enumerate(answers, 1):
    if not isinstance(answer, dict) or not {"text", "answer_start"} <= answer.keys():
      raise InputError(
        f"{where}: answer {number} is {answer!r:.80}; it should be an object with text and answer_start."
      )
  return {k: [a[k] for a in answers] for k in ("text", "answer_start")}


def read(row: dict, where: str) -> Question:
  """Returns a flat row, checked; raises InputError where an answer does not stand in the context where it says.

  `answers` is an object with text and answer_start, each a list or one value, or a list of such objects, or null.
  """
  question, context = (_text(row, name, where) for name in ("question", "context"))
  if not context.strip():
    raise InputError(f"{where}: the context is empty, so there is nothing to find an answer in. Leave such rows out.")
  answers = row.get("answers")
  if isinstance(answers, (list, tuple)):
    answers = _columns(answers, where)
  if answers is None:
    answers = dict(text=[], answer_start=[])
  if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
    raise InputError(f"{where}: 'answers' is {answers!r:.80}; it should be an object with text and answer_start.")
  texts, starts = (_list(answers[name]) for name in ("text", "answer_start"))
  if len(texts) != len(starts):
    raise InputError(f"{where}: there are {len(texts)} answer texts, but {len(starts)} values of answer_start.")
  if texts and row.get("is_impossible"):
    raise InputError(f"{where}: is_impossible is true, but there is an answer, {texts[0]!r:.60}. One of them is wrong.")
  pairs = tuple(_check(text, start, context, where) for text, start in zip(texts, starts))
  name = row.get("id")
  return Question(None if name is None else str(name), question, context, pairs, where)


def _text(row: dict, name: str, where: str) -> str:
  value = row.get(name)
  if isinstance(value, bytes):
    value = utf8(value, f"{where}: {name!r}")
  if not isinstance(value, str):
    raise InputError(
      f"{where}: {name!r} is {value!r:.60}, not text; a row of question answering has question, context and answers "
      f"(this one has {', '.join(map(str, row)) or 'nothing'})."
    )
  return value


def _list(value: Any) -> list:
  return [value] if isinstance(value, (str, bytes)) or np.ndim(value) == 0 else list(value)


def _check(text: Any, start: Any, context: str, where: str) -> tuple[str, int]:
  if isinstance(text, bytes):
    text = utf8(text, f"{where}: an answer")
  if (
    not isinstance(text, str) or not text.strip() or isinstance(start, bool) or not isinstance(start, (int, np.integer))
  ):
    raise InputError(
      f"{where}: an answer has the text {text!r:.60} and answer_start {start!r:.20}; they should be words of the "
      "context and the index of their first character. A question without an answer has empty lists."
    )
  there = context[start : start + len(text)] if start >= 0 else ""
  if there != text:
    near = f", where {there!r:.80} stands" if there else f", which is outside the context of {len(context)} characters"
    raise InputError(
      f"{where}: the answer {text!r:.80} should begin at character {start} (answer_start){near}. Count characters, not "
      "bytes, from 0, in the context exactly as it is given."
    )
  return text, int(start)


# ---- windows


def windows(encoder: Any, length: int, stride: int) -> "Windows":
  """Returns what cuts windows with an encoder of data/encoders.py; raises InputError where it knows no places."""
  if not hasattr(encoder, "backend"):
    raise InputError(
      "tokenizer: question answering needs the places of tokens in their text, which only tokenizers of the "
      "`tokenizers` library give (tokenizer.json). Set model.tokenizer to one of those."
    )
  return Windows(encoder.backend, length, stride)


class Windows:
  """Cuts features of at most `max_length` tokens, whose contexts overlap by `stride` tokens (run_qa's doc_stride).

  `backend` is a tokenizer of the `tokenizers` library that adds special tokens to pairs; a copy is kept. Pickles.
  """

  def __init__(self, backend: tokenizers.Tokenizer, max_length: int, stride: int):
    self.plain = tokenizers.Tokenizer.from_str(backend.to_str())
    self.plain.no_padding()
    self.plain.no_truncation()
    self.special = self.plain.num_special_tokens_to_add(is_pair=True)
    if not 0 <= stride < max_length - self.special:
      raise InputError(
        f"config: windows of {max_length} tokens, {self.special} of them special, cannot overlap by {stride} tokens; "
        "the overlap must leave room for the question and for new context. Take longer windows or a smaller overlap."
      )
    self.cutting = tokenizers.Tokenizer.from_str(self.plain.to_str())
    self.cutting.enable_truncation(max_length, stride=stride, strategy="only_second")
    self.max_length, self.stride = max_length, stride

  def features(self, questions: Sequence[Question]) -> list[list[Feature]]:
    """Returns the features of each question, in the order of its context; equal to those of transformers' call with
    truncation="only_second", return_overflowing_tokens and return_offsets_mapping, unpadded.

    Start and end are those of the first answer, by run_qa's rule; but where one character is several tokens (bytes)
    with the same offsets, all of them count, where run_qa takes the last as start and the first as end. White space
    before a question is left out, as there.
    """
    pairs = [(q.question.lstrip(), q.context) for q in questions]
    asked = self.plain.encode_batch_fast([a for a, _ in pairs], add_special_tokens=False)
    room = [self.max_length - self.special - len(a.ids) for a in asked]
    tight = [i for i, n in enumerate(room) if n <= self.stride]  # `tokenizers` would panic where it has to cut
    whole = dict(zip(tight, self.plain.encode_batch([pairs[i] for i in tight])))
    for i, encoding in whole.items():
      if len(encoding.ids) > self.max_length:
        raise InputError(
          f"{questions[i].where}: the question has {len(asked[i].ids)} tokens, which leaves {max(room[i], 0)} of "
          f"{self.max_length} for the context, and windows overlap by {self.stride}. Take longer windows, a smaller "
          "overlap, or leave the row out."
        )
    loose = [i for i, n in enumerate(room) if n > self.stride]
    whole |= zip(loose, self.cutting.encode_batch([pairs[i] for i in loose]))
    return [
      [_feature(e, q) for e in (whole[i], *(whole[i].overflowing if i not in tight else ()))]
      for i, q in enumerate(questions)
    ]


def _feature(encoding: tokenizers.Encoding, q: Question) -> Feature:
  sequence = encoding.sequence_ids
  count = sequence.count(1)
  first = sequence.index(1) if count else len(sequence)
  if first == 0:
    raise InputError(
      f"{q.where}: the tokenizer puts nothing before the context, but the first token stands for 'no answer here'. Use "
      "the tokenizer of an encoder ([CLS] or <s> first), or give a question."
    )
  offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
  start, end = _locate(offsets[first : first + count], *q.answers[0]) if q.answers else (-1, -1)
  return Feature(
    np.array(encoding.ids, np.int32),
    np.array(encoding.type_ids, np.int32),
    offsets,
    start + first if start >= 0 else 0,
    end + first if start >= 0 else 0,
    (first, first + count),
  )


def _locate(offsets: np.ndarray, text: str, begin: int) -> tuple[int, int]:
  """Returns the first and last token of characters begin..begin+len(text) among tokens at offsets i32[N, 2], or -1, -1
  where they are not all there.
  """
  after = begin + len(text)
  if not len(offsets) or offsets[0, 0] > begin or offsets[-1, 1] < after:
    return -1, -1
  start = int(np.searchsorted(offsets[:, 0], begin, "right")) - 1
  end = int(np.searchsorted(offsets[:, 1], after, "left"))
  while start > 0 and (offsets[start - 1] == offsets[start]).all():
    start -= 1
  while end + 1 < len(offsets) and (offsets[end + 1] == offsets[end]).all():
    end += 1
  return start, end


# ---- answers


def decode(
  start_logits: Sequence[np.ndarray],
  end_logits: Sequence[np.ndarray],
  features: Sequence[Feature],
  context: str,
  n_best: int = 20,
  max_answer_length: int = 30,
  null_threshold: float | None = None,
) -> list[tuple[str, float, float]]:
  """Returns [(text, score, probability)], the answer first and then the others by score, for the features of one
  question; logits are f[T] for each feature (or longer, padded).

  As `postprocess_qa_predictions` of transformers' utils_qa.py: of each feature the `n_best` highest starts and ends are
  paired where both are in the context, in order and at most `max_answer_length` tokens apart; the score is the sum of
  their logits; the `n_best` best pairs of all features are kept, and probabilities are the softmax of their scores.
  With `null_threshold` (SQuAD v2; None: every question has an answer) the empty text joins them with the least score
  that a feature gives to (0, 0), and is the answer if it beats the best other one by more than the threshold. Where
  there is no pair at all the answer is the empty text; utils_qa.py says "empty".
  """
  found, scores = [], []
  for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
    first, after = feature.context
    starts, ends = np.asarray(starts), np.asarray(ends)
    s, e = (np.argsort(x)[-1 : -n_best - 1 : -1] for x in (starts, ends))
    s, e = s[(s >= first) & (s < after)], e[(e >= first) & (e < after)]
    fits = (e >= s[:, None]) & (e - s[:, None] < max_answer_length)
    i, j = np.nonzero(fits)
    found.append(np.stack([feature.offsets[s[i], 0], feature.offsets[e[j], 1]], 1))
    scores.append(starts[s[i]] + ends[e[j]])
  spans, values = np.concatenate(found), np.concatenate(scores)
  order = np.argsort(-values, kind="stable")[:n_best].tolist()
  best = [(context[spans[k, 0] : spans[k, 1]], values[k]) for k in order]
  if null_threshold is not None:
    null = min(np.asarray(s)[0] + np.asarray(e)[0] for s, e in zip(start_logits, end_logits))
    best = _with_null(best, null, n_best, null_threshold)
  if not best:
    return [("", 0.0, 1.0)]
  values = np.array([v for _, v in best])
  shares = np.exp(values - values.max())
  shares /= shares.sum()
  return [(text, float(v), float(p)) for (text, v), p in zip(best, shares)]


def _with_null(best: list, null, n_best: int, threshold: float) -> list:
  """Returns `best` with the empty text in it, the answer first."""
  nothing = ("", null)
  best = sorted([*best, nothing], key=lambda x: -x[1])[:n_best]  # sorted is stable: pairs go before an equal null
  if nothing not in best:
    best.append(nothing)
  other = next((x for x in best if x[0]), None)
  answer = nothing if other is None or null - other[1] > threshold else other
  best.remove(answer)
  return [answer, *best]
