"""The task: which templates make an example of a row, and what the labels are."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.data import chat, columns, labels, objectives
from jaxft.data.fields import Example, Objective
from jaxft.data.templates import fields, parse, parts, render
from jaxft.errors import InputError, did_you_mean

TURNS = ("all", "last", "each")
DEFAULTS = objectives.DEFAULTS  # these templates mean "whatever the columns are", see columns.py


@dataclasses.dataclass(frozen=True)
class Task:
  """How a row becomes an example; `kind` is a key of objectives.KINDS, whose `options` say which fields it reads."""

  kind: str
  input: str | tuple[str, ...]
  target: str | tuple[str, ...] = columns.TARGET
  pair: str | tuple[str, ...] = ""  # the second text; empty: none
  label: str = columns.LABEL
  labels: tuple[str, ...] = ()  # the names of all labels in order; empty: those of the training data, sorted
  multi: bool = False  # any number of labels a row
  scheme: str = ""  # of tags: one of labels.SCHEMES
  stride: int = -1  # tokens that each further piece of a long text repeats of the one before; -1: 0, qa: see qa.py
  mix: tuple[tuple[Any, Any], ...] = ()  # further pairs of (input, target), one of all taken for a row each epoch
  verbalizer: tuple[tuple[str, str], ...] = ()  # what the fields of targets may be, and the word in place of each
  ranked: bool = False  # in place of its own target each row has all those of the verbalizer
  words: bool = False  # whether the words that tokens belong to are stored, for what is done to batches
  turns: str = "all"  # of a chat: which answers are learnt: all, last, each (in an example of its own)

  def __post_init__(self):
    kinds = objectives.KINDS
    if self.kind not in kinds:
      raise InputError(
        f"config: task.kind is {self.kind!r}; the kinds are {', '.join(kinds)}{did_you_mean(self.kind, kinds)}."
      )
    for name in ("input", "target", "pair", "labels", "mix", "verbalizer"):
      object.__setattr__(self, name, _tuples(getattr(self, name)))
    object.__setattr__(self, "verbalizer", _verbalizer(self.verbalizer))
    object.__setattr__(self, "labels", tuple(map(str, self.labels)))
    for field in dataclasses.fields(self)[2:]:
      if field.name not in self.objective.options and getattr(self, field.name) != field.default:
        readers = [k for k in kinds if field.name in objectives.of(k, False).options]
        raise InputError(
          f"config: task.{field.name} is {getattr(self, field.name)!r}, which a task of kind {self.kind} does not read;"
          f" it is for {', '.join(readers)}. Remove it, or set task.kind."
        )
    for template in (self.input, self.target, self.pair, self.label, *(t for pair in self.mix for t in _pair(pair))):
      for part in parts(template):
        parse(part)
    for name, target in [("target", self.target), *(("mix", t) for _, t in self.mix)]:
      if not fields(target):
        raise InputError(f"config: task.{name} is {target!r}, which has no field; every target would be the same text.")
    self._check_labels()

  def _check_labels(self):
    if not fields(self.label):
      raise InputError(f"config: task.label is {self.label!r}; it names a column, as in '{{label}}'.")
    twice = sorted({str(x) for x in self.labels if self.labels.count(x) > 1})
    if twice:
      raise InputError(f"config: task.labels names {', '.join(twice)} twice.")
    if self.scheme not in labels.SCHEMES:
      raise InputError(
        f"config: task.scheme is {self.scheme!r}; it is one of {', '.join(labels.SCHEMES[1:])}, or empty"
        f"{did_you_mean(self.scheme, labels.SCHEMES)}."
      )
    if self.turns not in TURNS:
      raise InputError(
        f"config: task.turns is {self.turns!r}; it is one of {', '.join(TURNS)}{did_you_mean(self.turns, TURNS)}."
      )
    if self.turns == "each" and self.mix:
      raise InputError(
        "config: task.turns='each' gives several examples a row, task.mix one of several; set one of them."
      )
    if self.stride < -1:
      raise InputError(f"config: task.stride is {self.stride}; it is a number of tokens, 0, or -1: as the kind has it.")

  def __getstate__(self) -> dict:
    """Returns the fields alone: what worker processes derive from them again holds functions, which do not pickle."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  @functools.cached_property
  def objective(self) -> Objective:
    return objectives.of(self.kind, self.multi)

  @property
  def default(self) -> bool:
    return self.objective.default(self)

  @functools.cached_property
  def variants(self) -> tuple["Task", ...]:
    """The task itself, and one with each further pair of templates; `ranked`, one with each word."""
    if self.ranked:
      every = lambda word: tuple((value, word) for value, _ in self.verbalizer)
      words = dict.fromkeys(word for _, word in self.verbalizer)
      return tuple(dataclasses.replace(self, ranked=False, mix=(), verbalizer=every(w)) for w in words)
    return (self, *(dataclasses.replace(self, input=i, target=t, mix=()) for i, t in self.mix))

  @functools.cached_property
  def chats(self) -> bool:
    """Says whether a template names what a chat becomes."""
    return any(f.startswith("chat.") for f in (*fields(self.input), *fields(self.target)))

  def resolve(self, row: dict) -> "Task":
    """Returns the task with its default templates replaced by those that the columns of `row` call for."""
    return self.objective.resolve(self, row) if self.default else self

  def label_column(self, row: dict) -> str:
    """Returns the column of the label in rows like `row`, or an empty string where a template makes it."""
    named = fields(self.resolve(row).label)
    return named[0] if len(named) == 1 else ""

  def render(self, row: dict, fix: Callable[[str], str], where: str, template: Any = None) -> Example:
    """Returns the example of `row`; `fix` acts on every field's text, `where` names the row in errors, `template` is
    that of chats (chat_template.Template) or None."""
    return self.objective.render(self, row, fix, where, template)


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _verbalizer(given: tuple) -> tuple:
  if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
    raise InputError(
      f"config: task.verbalizer is {given!r}; it is pairs (value, word), such as ((0, 'negative'), (1, 'positive'))."
    )
  pairs = tuple((str(value), str(word)) for value, word in given)
  if len(dict(pairs)) < len(pairs):
    raise InputError(f"config: task.verbalizer has a value twice: {', '.join(value for value, _ in pairs)}.")
  return pairs


def _pair(pair: Any) -> tuple:
  if not (isinstance(pair, tuple) and len(pair) == 2):
    raise InputError(f"config: task.mix has {pair!r}; its entries are pairs (input template, target template).")
  return pair


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


def render_input(templates: Sequence[Any], row: dict, fix: Callable[[str], str], where: str) -> str:
  """Returns the input text of a row that need not have an answer, by the first of `templates` whose fields it has.

  Raises the InputError of the first one where none fits.
  """
  problems = []
  for template in templates:
    try:
      chats = any(f.startswith("chat.") for f in fields(template))
      own = chat.prepare(row, where, answered=False)[0] if chats else row
      return render(template, "input", own, fix, where)[0]
    except InputError as e:
      problems.append(e)
  raise problems[0]
