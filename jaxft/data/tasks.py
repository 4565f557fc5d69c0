"""From a row to an example: templates over columns, and the columns that people already have.

A template is text with fields in braces: `translate English to German: {en}`. `{a.b}` goes into objects, `{a.0}` into
lists, `{a.*}` joins a list of texts with spaces; `{{` and `}}` are braces. Several templates in a tuple are joined
with a blank line, without those whose fields are empty.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxft.data import chat
from jaxft.data.clean import utf8
from jaxft.errors import InputError, did_you_mean

SIDES = ("inputs", "targets")  # what an example is made of, in batches and in the cache
DEFAULTS = ("{input}", "{target}")  # these templates mean "whatever the columns are", see `CONVENTIONS`


class Example(NamedTuple):
  input: str
  target: str
  input_chars: int | None  # of the fields alone; None where the template has none
  target_chars: int | None
  nulls: int  # fields that were null and count as empty text


@dataclasses.dataclass(frozen=True)
class Task:
  """How a row becomes (input text, target text); `kind` is a key of KINDS."""

  kind: str
  input: str | tuple[str, ...]
  target: str | tuple[str, ...]

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(
        f"config: task.kind is {self.kind!r}; the kinds are {', '.join(KINDS)}{did_you_mean(self.kind, KINDS)}."
      )
    for name in ("input", "target"):
      value = getattr(self, name)
      object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
      for part in _parts(getattr(self, name)):
        parse(part)
    if not any(field for part in _parts(self.target) for _, field in parse(part)):
      raise InputError(
        f"config: task.target is {self.target!r}, which has no field; every target would be the same text."
      )

  @property
  def default(self) -> bool:
    return (self.input, self.target) == DEFAULTS

  @functools.cached_property
  def prepared(self) -> bool:
    """Says whether a template names what `prepare` adds to a row; other rows are left as they are."""
    return _names_chat(self.input) or _names_chat(self.target)

  def resolve(self, row: dict) -> "Task":
    """Returns the task with its default templates replaced by those that the columns of `row` call for."""
    return KINDS[self.kind].resolve(self, row) if self.default else self

  def render(self, row: dict, fix: Callable[[str], str], where: str) -> Example:
    """Returns the example of `row`; `fix` acts on every field's text, `where` names the row in errors."""
    row, nulls = KINDS[self.kind].prepare(row, where) if self.prepared else (row, 0)
    input, input_chars, more = _render(self.input, "input", row, fix, where)
    target, target_chars, most = _render(self.target, "target", row, fix, where)
    return Example(input, target, input_chars, target_chars, nulls + more + most)


class Resolver:
  """The task of each row of one file: `Task.resolve`, done once for each set of columns that occurs.

  A row is like an earlier one with the same columns, in any order, and values of the same kind (text, list, turns,
  object); a null is of any kind. So neither a column that some rows lack nor a null decides for other rows.
  """

  def __init__(self, task: Task):
    self.task, self.known, self.seen = task, {}, []

  def __call__(self, row: dict) -> Task:
    if not self.task.default:
      return self.task
    kinds = {k: _value_kind(v) for k, v in row.items()}
    key = frozenset(kinds.items())
    if key not in self.known:
      like = (task for task, other in self.seen if _alike(kinds, other))
      self.known[key] = next(like, None) or self.task.resolve(row)
      self.seen.append((self.known[key], kinds))
    return self.known[key]


def _value_kind(value) -> str:
  if isinstance(value, (list, tuple)):
    return "turns" if chat.is_turns(value) else "list"
  return "" if value is None else "object" if isinstance(value, dict) else "text"


def _alike(kinds: dict, other: dict) -> bool:
  return kinds.keys() == other.keys() and all(k in ("", other[c], other[c] or "text") for c, k in kinds.items())


class Kind(NamedTuple):
  """What sets one kind of task apart; a new kind is a new entry of KINDS."""

  resolve: Callable[[Task, dict], Task]  # default templates -> templates for these columns
  prepare: Callable[[dict, str], tuple[dict, int]]  # row, place -> row with `chat.` fields, how many of them were null


def render_input(templates: Sequence[Any], row: dict, fix: Callable[[str], str], where: str) -> str:
  """Returns the input text of a row that need not have an answer, by the first of `templates` whose fields it has.

  Raises the InputError of the first one where none fits.
  """
  problems = []
  for template in templates:
    try:
      own = chat.prepare(row, where, answered=False)[0] if _names_chat(template) else row
      return _render(template, "input", own, fix, where)[0]
    except InputError as e:
      problems.append(e)
  raise problems[0]


# ---- templates


def _names_chat(template) -> bool:
  return any(field.startswith("chat.") for part in _parts(template) for _, field in parse(part))


def _parts(template) -> tuple[str, ...]:
  return (template,) if isinstance(template, str) else template


@functools.lru_cache(maxsize=256)
def parse(template: str) -> tuple[tuple[str, str], ...]:
  """Returns ((literal text, field path or ""), ...); raises InputError on braces that do not match."""
  out, text, i = [], "", 0
  while i < len(template):
    char = template[i]
    if template[i : i + 2] in ("{{", "}}"):
      text, i = text + char, i + 2
    elif char == "{":
      end = template.find("}", i)
      field = template[i + 1 : end]
      if end < 0 or not field.strip() or "{" in field:
        raise InputError(
          f"config: the template {template!r} has an open or empty brace at character {i + 1}; a field is {{name}}, a "
          f"brace itself {{{{ or }}}}."
        )
      out.append((text, field.strip()))
      text, i = "", end + 1
    elif char == "}":
      raise InputError(
        f"config: the template {template!r} closes a brace at character {i + 1} that was not opened; a brace itself "
        "is written }}}}."
      )
    else:
      text, i = text + char, i + 1
  return (*out, (text, "")) if text or not out else tuple(out)


def _render(template, side: str, row: dict, fix, where: str) -> tuple[str, int | None, int]:
  pieces, chars, nulls, fields = [], 0, 0, 0
  for part in _parts(template):
    text, own, own_fields = "", 0, 0
    for literal, field in parse(part):
      text += literal
      if field:
        value = look_up(row, field, side, where)
        nulls += value is None
        value = fix("" if value is None else value if isinstance(value, str) else str(value))
        text, own, own_fields = text + value, own + len(value), own_fields + 1
    chars, fields = chars + own, fields + own_fields
    if own or not own_fields or isinstance(template, str):
      pieces.append(text)
  return "\n\n".join(pieces), (chars if fields else None), nulls


def look_up(row: dict, field: str, side: str, where: str) -> Any:
  """Returns the text, number or None at a dotted path of `row`; raises InputError with the fields that are there.

  A null on the way counts as a null at the end. Bytes are UTF-8 text, or an InputError.
  """
  if field in row:  # also a column whose name has dots
    return _scalar(row[field], field, side, where)
  value: Any = row
  for i, step in enumerate(field.split(".")):
    before = ".".join(field.split(".")[:i])
    if value is None:
      return None
    if isinstance(value, dict) and step in value:
      value = value[step]
    elif isinstance(value, (list, tuple)) and step == "*" and all(isinstance(x, (str, bytes)) for x in value):
      value = " ".join(_scalar(x, field, side, where) for x in value)
    elif isinstance(value, (list, tuple)) and step.isdigit() and int(step) < len(value):
      value = value[int(step)]
    elif isinstance(value, (list, tuple)) and step.isdigit():
      return None  # a row with fewer references than asked for
    else:
      raise InputError(
        f"{where}: task.{side} names the field {{{field}}}, which this row has not{_there(value, before, step)}."
      )
  return _scalar(value, field, side, where)


def _there(value, before: str, step: str) -> str:
  inside = f"; {before!r}" if before else "; it"
  if isinstance(value, dict):
    names = [f"{k} ({', '.join(f'{k}.{x}' for x in v)})" if isinstance(v, dict) else str(k) for k, v in value.items()]
    return f"{did_you_mean(step, value)}{inside} has {', '.join(names) or 'no fields'}"
  return f"{inside} is {_kind(value)}"


def _kind(value) -> str:
  return (
    f"a list of {len(value)} ({value[0]!r:.40}...)" if isinstance(value, (list, tuple)) and value else repr(value)[:60]
  )


def _scalar(value, field: str, side: str, where: str) -> Any:
  if isinstance(value, bytes):
    return utf8(value, f"{where}: task.{side} names the field {{{field}}}, which")
  if isinstance(value, (dict, list, tuple)):
    how = (
      f"write {{{field}.{next(iter(value), 'name')}}}"
      if isinstance(value, dict)
      else f"write {{{field}.0}} for its first entry or {{{field}.*}} for all of them, joined with spaces"
    )
    what = f"an object with {', '.join(map(str, value))}" if isinstance(value, dict) else _kind(value)
    raise InputError(f"{where}: task.{side} names the field {{{field}}}, which is {what}, not text; {how}.")
  return value


# ---- the columns people have

CONVENTIONS = (  # columns that must be there -> templates; the first that fits is taken
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


def _resolve_pair(task: Task, row: dict) -> Task:
  for columns, input, target in CONVENTIONS:
    if all(c in row for c in columns):
      if "prompt" in columns and any(chat.is_turns(row[c]) for c in columns):
        return dataclasses.replace(task, input="{chat.prompt}", target="{chat.completion}")
      return dataclasses.replace(task, input=_fit(input, row, "*"), target=_fit(target, row, "0"))
  if any(isinstance(row.get(c), (list, tuple)) for c in chat.CHATS):
    return dataclasses.replace(task, input="{chat.prompt}", target="{chat.completion}")
  languages = row.get("translation")
  if isinstance(languages, dict) and len(languages) == 2:
    a, b = languages
    return dataclasses.replace(task, input=f"{{translation.{a}}}", target=f"{{translation.{b}}}")
  if len(row) == 2 and all(v is None or isinstance(v, (str, bytes)) for v in row.values()):
    a, b = row
    return dataclasses.replace(task, input=f"{{{a}}}", target=f"{{{b}}}")
  a, b = (*row, "question", "answer")[:2] if len(row) != 1 else (*row, "another")
  raise InputError(
    f"{getattr(row, 'where', 'data')}: the columns {', '.join(map(str, row)) or '(none)'} are not a pair that jaxft "
    f"knows; say which is which, for example --config.task.input='{{{a}}}' --config.task.target='{{{b}}}'."
  )


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


KINDS = {"seq2seq": Kind(resolve=_resolve_pair, prepare=chat.prepare)}
