"""Text that is its own target: documents (causal), prompts with completions and chats (sft, prefix_lm).

A batch has the weight of each token as something to predict, stored as they were found from the characters of the text;
nothing is told from ids, so a padding token that is the end-of-text token changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.data import chat, chat_template
from jaxft.data.fields import Columns, Example
from jaxft.data.templates import render, render_target


def ended(ids: Sequence[int], bos: int | None, eos: int | None) -> list[int]:
  """Returns the ids with one end-of-text token, and with one begin-of-text token where the text spelled another.

  >>> ended([1, 1, 7], 1, 2)
  [1, 7, 2]
  """
  ids = list(ids[1:] if bos is not None and bos != eos and list(ids[:2]) == [bos, bos] else ids)
  return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


# ---- documents


def render_document(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  text, chars, nulls = render(task.input, "input", row, fix, where)
  return Example(text, "", chars, None, nulls, text)


def encode_documents(examples: Sequence[Example], job: Any) -> Columns:
  ids = [ended(x, job.bos, job.eos) for x in job.encoder.encode([e.parts for e in examples])]
  return Columns(dict(inputs=ids), counts=dict(examples=len(ids), bos=sum(x[:1] == [job.bos] for x in ids)))


# ---- prompts and completions


class Part(NamedTuple):
  """A text of which spans of characters are to be learnt."""

  text: str
  spans: Sequence[tuple[int, int]]
  close: bool  # whether the text ends with the last span, and so with an end-of-text token that is learnt
  whole: bool  # whether it has its special tokens already

  @property
  def texts(self) -> tuple[str, str]:
    """What comes before the first span, and the rest to the end of the last."""
    begin, end = (self.spans[0][0], self.spans[-1][1]) if self.spans else (len(self.text),) * 2
    return self.text[:begin], self.text[begin:end]


def render_completion(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  """`parts` is a list of `Part`: one, or with task.turns="each" one for each answer of a chat."""
  if task.chats and template is not None:
    each = task.turns == "each"
    found = template.examples(*conversation(row), where, turns="all" if each else task.turns, split=each)
    parts = [Part(c.text, c.spans, not template.closes, True) for c in found]
    input, target = parts[0].texts if len(parts) == 1 else (parts[0].text, parts[-1].text)
    return Example(input, target, None, None, 0, parts)
  row, nulls = chat.prepare(row, where) if task.chats else (row, 0)
  prompt, prompt_chars, more = render(task.input, "input", row, fix, where)
  answer, answer_chars, most = render_target(task, row, fix, where)
  part = Part(prompt + answer, [(len(prompt), len(prompt) + len(answer))], True, False)
  return Example(prompt, answer, prompt_chars, answer_chars, nulls + more + most, [part])


def is_conversation(row: Mapping) -> bool:
  """Says whether a row has a chat."""
  return any(row.get(c) is not None for c in chat.CHATS) or chat.is_turns(row.get("prompt"))


def conversation(row: Mapping, *, answered: bool = True) -> tuple[list, Any]:
  """Returns (messages, tools) of a row with a chat; not `answered`: without the answer at its end, if there is one."""
  messages, tools = _conversation(row)
  while not answered and isinstance(messages, (list, tuple)) and messages and _answers(messages[-1]):
    messages = messages[:-1]
  return messages, tools


def _answers(message: Any) -> bool:
  role = isinstance(message, dict) and (message.get("role") or message.get("from"))
  return isinstance(role, str) and (role in chat_template.WRITES)


def _conversation(row: Mapping) -> tuple[list, Any]:
  column = next((c for c in chat.CHATS if row.get(c) is not None), None)
  if column:
    return row[column], row.get("tools")
  answer = next((row[c] for c in chat.ANSWERS if row.get(c) is not None), [])
  sides = (row.get("prompt") or [], "user"), (answer, "assistant")
  messages = [m for x, role in sides for m in ([dict(role=role, content=x)] if isinstance(x, (str, bytes)) else x)]
  return messages, row.get("tools")


def encode_completions(examples: Sequence[Example], job: Any) -> Columns:
  """Tokenises prompt and completion as one text, as the model reads it later.

  A token is to be learnt where a character of a span lies in it: one that straddles the boundary is, since without it
  the completion would begin in the middle. (The prompt alone may then tokenise otherwise; the report counts them.)
  """
  parts = [(i, p) for i, e in enumerate(examples) for p in e.parts]
  made: list = [None] * len(parts)
  for whole in (False, True):
    own = [n for n, (_, p) in enumerate(parts) if p.whole == whole]
    encoded = job.encoder.encode_offsets([parts[n][1].text for n in own], special=not whole) if own else []
    for n, one in zip(own, encoded):
      made[n] = _completion(parts[n][1], *one, job)
  ids, weights, straddling, ends = zip(*made) if made else ((), (), (), ())
  prefix = [np.arange(len(w)) < (int(np.argmax(w > 0)) if w.any() else len(w)) for w in weights]
  counts = dict(examples=len(ids), straddling=sum(straddling), ends=sum(ends), bos=sum(x[:1] == [job.bos] for x in ids))
  return Columns(
    dict(inputs=ids), dict(weights=weights, prefix=prefix), counts=counts, rows=[i for i, _ in parts],
    texts=[p.texts for _, p in parts],
  )  # fmt: skip


def _completion(part: Part, own: list[int], offsets: np.ndarray, added: np.ndarray, job: Any) -> tuple:
  """Returns (ids, u8 weights, whether a token straddles the first boundary, whether an end-of-text token is learnt)."""
  weights = (chat_template.covered(offsets, part.spans) & ~added).astype(np.uint8)
  straddling = any(bool(((offsets[:, 0] < begin) & (offsets[:, 1] > begin) & ~added).any()) for begin, _ in part.spans)
  tokens = ended(own, job.bos, job.eos if part.close else None)
  weights = weights[int(tokens[:2] != own[:2]) :]  # without the begin-of-text token that was there twice
  weights = np.append(weights, np.ones(len(tokens) - len(weights), np.uint8))
  if part.close and job.eos is not None:
    weights[-1] = 1
  weights[:1] = 0  # nothing comes before it from which it could be predicted
  return tokens, weights, straddling, bool(job.eos in (tokens[i] for i in np.flatnonzero(weights)))
