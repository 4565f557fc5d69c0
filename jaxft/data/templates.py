"""Templates: text with fields in braces, `translate English to German: {en}`.

`{a.b}` goes into objects, `{a.0}` into lists, `{a.*}` joins a list of texts with spaces; `{{` and `}}` are braces.
Several templates in a tuple are joined with a blank line, without those whose fields are empty.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxft.data.clean import utf8
from jaxft.errors import InputError, did_you_mean


def parts(template) -> tuple[str, ...]:
  return (template,) if isinstance(template, str) else template


def fields(template) -> list[str]:
  return [field for part in parts(template) for _, field in parse(part) if field]


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


def render(template, name: str, row: dict, fix: Callable[[str], str], where: str) -> tuple[str, int | None, int]:
  """Returns (text, characters of its fields or None where it has none, how many of them were null).

  `name` is what the config calls the template (task.NAME), `fix` acts on every field's text, `where` names the row.
  """
  pieces, chars, nulls, count = [], 0, 0, 0
  for part in parts(template):
    text, own, own_count = "", 0, 0
    for literal, field in parse(part):
      text += literal
      if field:
        value = look_up(row, field, name, where)
        nulls += value is None
        value = fix("" if value is None else value if isinstance(value, str) else str(value))
        text, own, own_count = text + value, own + len(value), own_count + 1
    chars, count = chars + own, count + own_count
    if own or not own_count or isinstance(template, str):
      pieces.append(text)
  return "\n\n".join(pieces), (chars if count else None), nulls


def render_target(task: Any, row: dict, fix: Callable[[str], str], where: str) -> tuple[str, int | None, int]:
  """As `render`, of `task.target`, with the words of `task.verbalizer` in place of values; another one is refused."""
  words = dict(task.verbalizer)

  def word(text: str) -> str:
    text = fix(text)
    if text not in words:
      known = ", ".join(words)
      raise InputError(
        f"{where}: {text!r:.60} is not among the values of task.verbalizer ({known}){did_you_mean(text, words)}. Mend "
        "or remove the row, or add the value."
      )
    return words[text]

  return render(task.target, "target", row, word if words else fix, where)


def value(template: str, name: str, row: dict, fix: Callable[[str], str], where: str) -> Any:
  """Returns what a template of one field names, of whatever type it is; else the text that the template gives."""
  parsed = parse(template) if isinstance(template, str) else ()
  if len(parsed) == 1 and parsed[0][1] and not parsed[0][0]:
    return _walk(row, parsed[0][1], name, where)
  return render(template, name, row, fix, where)[0]


def look_up(row: dict, field: str, name: str, where: str) -> Any:
  """Returns the text, number or None at a dotted path of `row`; raises InputError with the fields that are there.

  A null on the way counts as a null at the end. Bytes are UTF-8 text, or an InputError.
  """
  return _scalar(_walk(row, field, name, where), field, name, where)


def _walk(row: dict, field: str, name: str, where: str) -> Any:
  if field in row:  # also a column whose name has dots
    return row[field]
  value: Any = row
  for i, step in enumerate(field.split(".")):
    before = ".".join(field.split(".")[:i])
    if value is None:
      return None
    if isinstance(value, dict) and step in value:
      value = value[step]
    elif isinstance(value, (list, tuple)) and step == "*" and all(isinstance(x, (str, bytes)) for x in value):
      value = " ".join(_scalar(x, field, name, where) for x in value)
    elif isinstance(value, (list, tuple)) and step.isdigit() and int(step) < len(value):
      value = value[int(step)]
    elif isinstance(value, (list, tuple)) and step.isdigit():
      return None  # a row with fewer references than asked for
    else:
      raise InputError(
        f"{where}: task.{name} names the field {{{field}}}, which this row has not{_there(value, before, step)}."
      )
  return value


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


def _scalar(value, field: str, name: str, where: str) -> Any:
  if isinstance(value, bytes):
    return utf8(value, f"{where}: task.{name} names the field {{{field}}}, which")
  if isinstance(value, (dict, list, tuple)):
    how = (
      f"write {{{field}.{next(iter(value), 'name')}}}"
      if isinstance(value, dict)
      else f"write {{{field}.0}} for its first entry or {{{field}.*}} for all of them, joined with spaces"
    )
    what = f"an object with {', '.join(map(str, value))}" if isinstance(value, dict) else _kind(value)
    raise InputError(f"{where}: task.{name} names the field {{{field}}}, which is {what}, not text; {how}.")
  return value
