"""The columns people already have: which of them are the input, the target, the label.

Every `resolve_*` takes a task whose templates are the default ones, and a row, and returns the task with the templates
that the columns of the row call for; it raises InputError with the columns where none fits.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxft.data import chat
from jaxft.data.templates import parse
from jaxft.errors import InputError

INPUT, TARGET, LABEL = "{input}", "{target}", "{label}"  # these templates mean "whatever the columns are"

PAIRS = (  # columns that must be there -> templates of input and target; the first that fits is taken
  (("input", "target"), "{input}", "{target}"),
  (("instruction", "input", "output"), ("{instruction}", "{input}"), "{output}"),  # Alpaca
  (("instruction", "output"), "{instruction}", "{output}"),
  (("instruction", "context", "response"), ("{instruction}", "{context}"), "{response}"),  # Dolly
  (("instruction", "response"), "{instruction}", "{response}"),
  # SQuAD, T5's prompt
  (("question", "context", "answers"), "question: {question} context: {context}", "{answers.text.0}"),
  (("question", "context", "answer"), "question: {question} context: {context}", "{answer}"),
  (("question", "answer"), "{question}", "{answer}"),
  (("question", "answers"), "{question}", "{answers}"),
  (("prompt", "completion"), "{prompt}", "{completion}"),
  (("prompt", "response"), "{prompt}", "{response}"),
  (("document", "summary"), "{document}", "{summary}"),
  (("article", "highlights"), "{article}", "{highlights}"),
  (("article", "summary"), "{article}", "{summary}"),
  (("dialogue", "summary"), "{dialogue}", "{summary}"),
  (("text", "summary"), "{text}", "{summary}"),
  (("inputs", "targets"), "{inputs}", "{targets}"),
  (("source", "target"), "{source}", "{target}"),
  (("src", "tgt"), "{src}", "{tgt}"),
  (("text", "target"), "{text}", "{target}"),
  (("input", "output"), "{input}", "{output}"),
  (("query", "response"), "{query}", "{response}"),
  (("problem", "solution"), "{problem}", "{solution}"),
)
COMPLETIONS = ("completion",)  # columns of answers that are written to follow their prompt as they are

TWO_TEXTS = (  # GLUE's names, and those of others
  ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
  ("text_a", "text_b"), ("text1", "text2"), ("#1 string", "#2 string"),
)  # fmt: skip
TEXTS = (
  "text", "sentence", "question", "content", "review", "input", "tweet", "utterance", "comment", "query", "message",
  "document", "body", "description", "abstract", "title", "headline",
)  # fmt: skip
LABELS = (
  "label", "labels", "category", "class", "intent", "sentiment", "target", "quality", "is_duplicate", "gold_label",
  "score", "rating", "stars",
)  # fmt: skip
SCORES = ("score", "label", "labels", "target", "rating", "stars", "value", "similarity_score")
WORDS = ("tokens", "words", "token", "word")
TAGS = ("tags", "ner_tags", "labels", "label", "ner", "pos_tags", "upos", "chunk_tags", "pos")


def resolve_pair(task: Any, row: dict) -> Any:
  """Input and target, both by one convention."""
  return _pair(task, row)[0]


def resolve_prompt(task: Any, row: dict) -> Any:
  """As `resolve_pair`, for a target that follows its input in one text: between them stands a blank line, save after
  columns that are made to follow one another (`prompt`, `completion`)."""
  found, columns = _pair(task, row)
  if columns and columns[-1] in COMPLETIONS and found.input != "{chat.prompt}":
    return found
  parts = (found.input,) if isinstance(found.input, str) else found.input
  return dataclasses.replace(found, input=(*parts, ""))


def _pair(task: Any, row: dict) -> tuple[Any, tuple[str, ...]]:
  for columns, input, target in PAIRS:
    if all(c in row for c in columns):
      if "prompt" in columns and any(chat.is_turns(row[c]) for c in columns):
        return dataclasses.replace(task, input="{chat.prompt}", target="{chat.completion}"), columns
      return dataclasses.replace(task, input=_fit(input, row, "*"), target=_fit(target, row, "0")), columns
  if any(isinstance(row.get(c), (list, tuple)) for c in chat.CHATS):
    return dataclasses.replace(task, input="{chat.prompt}", target="{chat.completion}"), ()
  languages = row.get("translation")
  if isinstance(languages, dict) and len(languages) == 2:
    a, b = languages
    return dataclasses.replace(task, input=f"{{translation.{a}}}", target=f"{{translation.{b}}}"), ()
  if len(row) == 2 and all(_is_text(v) for v in row.values()):
    a, b = row
    return dataclasses.replace(task, input=f"{{{a}}}", target=f"{{{b}}}"), ()
  a, b = (*row, "question", "answer")[:2] if len(row) != 1 else (*row, "another")
  raise InputError(
    f"{_where(row)}: the columns {_names(row)} are not a pair that jaxft "
    f"knows; say which is which, for example --config.task.input='{{{a}}}' --config.task.target='{{{b}}}'."
  )


def resolve_text(task: Any, row: dict) -> Any:
  """One text, for language modelling."""
  found = _first(("text", "content", "document", "body", "code", "input", "sentence"), row)
  texts = [c for c, v in row.items() if isinstance(v, (str, bytes))]
  if found is None and len(texts) == 1:
    found = texts[0]
  if found is None:
    raise InputError(
      f"{_where(row)}: none of the columns {_names(row)} is known to be the text; say which it is, for example "
      f"--config.task.input='{{{next(iter(row), 'text')}}}'."
    )
  return dataclasses.replace(task, input=_field(found))


def resolve_document(task: Any, row: dict) -> Any:
  """One text, or a list of sentences."""
  found = _first(("sentences", "text", "document", "content", "body"), row)
  return dataclasses.replace(task, input=_field(found)) if found else resolve_text(task, row)


def resolve_label(task: Any, row: dict) -> Any:
  """One text or two, and their label."""
  return _labelled(task, row, LABELS)


def resolve_score(task: Any, row: dict) -> Any:
  """One text or two, and their number."""
  return _labelled(task, row, SCORES)


def _labelled(task: Any, row: dict, names: tuple[str, ...]) -> Any:
  label = _first(names, row) if task.label == LABEL else None
  if task.input == INPUT:
    pair = next((found for two in TWO_TEXTS if all(found := [_first((c,), row) for c in two])), None)
    rest = {c: v for c, v in row.items() if c != label}
    one = _first(TEXTS, rest)
    if pair is None and one is None and label is not None and len(rest) == 1:
      one = next(iter(rest))
    if pair is None and one is None:
      raise InputError(
        f"{_where(row)}: none of the columns {_names(row)} is known to be the text; say which it is, for example "
        f"--config.task.input='{{{next(iter(rest), 'text')}}}' (and of pairs also --config.task.pair)."
      )
    texts = dict(input=_field(pair[0]), pair=task.pair or _field(pair[1])) if pair else dict(input=_field(one))
    task = dataclasses.replace(task, **texts)
  if task.label == LABEL:
    if label is None:
      others = [c for c in row if _field(c) not in (task.input, task.pair)]
      label = others[0] if len(row) == 2 and len(others) == 1 else None
    if label is None:
      raise _no_label(row)
    task = dataclasses.replace(task, label=_field(label))
  return task


def resolve_question(task: Any, row: dict) -> Any:
  """SQuAD's columns, where the task names no others."""
  named = dict(input=(INPUT, "{question}"), pair=("", "{context}"), label=(LABEL, "{answers}"))
  return dataclasses.replace(task, **{k: new for k, (old, new) in named.items() if getattr(task, k) == old})


def resolve_tags(task: Any, row: dict) -> Any:
  """Words and their tags."""
  if task.input == INPUT:
    words = _first(WORDS, row)
    if words is None:
      raise InputError(
        f"{_where(row)}: none of the columns {_names(row)} is known to be the list of words; say which it is, for "
        f"example --config.task.input='{{{next(iter(row), 'tokens')}}}'."
      )
    task = dataclasses.replace(task, input=_field(words))
  if task.label == LABEL:
    tags = _first(TAGS, row)
    if tags is None:
      raise _no_label(row)
    task = dataclasses.replace(task, label=_field(tags))
  return task


def _no_label(row: dict) -> InputError:
  return InputError(
    f"{_where(row)}: none of the columns {_names(row)} is known to be the label; say which it is, for example "
    f"--config.task.label='{{{(list(row) or ['label'])[-1]}}}'."
  )


def _first(names: Iterable[str], row: dict) -> str | None:
  """Returns the first column that is one of `names`, whatever its capitals."""
  lower = {str(c).lower(): c for c in reversed(row)}
  return next((lower[n] for n in names if n in lower), None)


def _field(column: str) -> str:
  return f"{{{column}}}"


def _is_text(value: Any) -> bool:
  return value is None or isinstance(value, (str, bytes))


def _where(row: dict) -> str:
  return getattr(row, "where", "data")


def _names(row: dict) -> str:
  return ", ".join(map(str, row)) or "(none)"


def _fit(template, row: dict, step: str):
  """Returns the template with `.step` after a field that is a list in `row`: all of an input's texts, the first of
  the references.
  """
  if not isinstance(template, str):
    return tuple(_fit(t, row, step) for t in template)
  for _, field in parse(template):
    value = row.get(field)
    if isinstance(value, (list, tuple)) and not chat.is_turns(value):  # those of a chat are not text
      template = template.replace(f"{{{field}}}", f"{{{field}.{step}}}")
  return template
