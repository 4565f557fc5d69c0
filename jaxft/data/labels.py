"""Labels: names or ids in the data, numbers from 0 in batches; and the tags of words, by their schemes.

Worker processes number the labels of a chunk as they come (`Table`); the process that writes the cache joins these
tables into one set (`Labels`): the one that is given, else what the data holds, sorted.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data.clean import utf8
from jaxft.errors import InputError, did_you_mean

SCHEMES = ("", "none", "iob2", "iob1", "bilou")  # empty: iob2 is checked where all tags of a row look like it
NO_LABEL = "no label"
SHOWN = 20  # labels named in a message


class Table:
  """Numbers labels in order of appearance, and remembers which example showed each first."""

  def __init__(self):
    self.number: dict[Any, int] = {}
    self.entries: list[tuple[Any, int]] = []

  def __call__(self, label: Any, example: int) -> int:
    if label not in self.number:
      self.number[label] = len(self.entries)
      self.entries.append((label, example))
    return self.number[label]


def read(value: Any, fix: Callable[[str], str], where: str) -> str | int | None:
  """Returns a label as a name or an id; None where there is none (null, or empty text)."""
  if value is None:
    return None
  if isinstance(value, bytes):
    value = utf8(value, f"{where}: the label")
  if isinstance(value, bool):
    return str(value)
  if isinstance(value, float):
    if not value.is_integer():
      raise InputError(
        f"{where}: the label is {value!r}, which is neither a name nor a whole number. For numbers to be predicted set "
        "task.kind=regress."
      )
    return int(value)
  if isinstance(value, (list, tuple, dict)):
    raise InputError(
      f"{where}: the label is {value!r:.60}; one label is needed. For several labels a row set "
      "--config.task.multi=True (a list, or a text with commas), or name one of them in task.label."
    )
  return int(value) if isinstance(value, int) else (fix(value) or None)


def read_several(value: Any, fix: Callable[[str], str], where: str) -> list[str | int] | None:
  """Returns the labels of a row that may have any number of them; None for a null."""
  if value is None:
    return None
  if isinstance(value, (str, bytes)):
    text = value if isinstance(value, str) else utf8(value, f"{where}: the label")
    value = [x.strip() for x in re.split(r"[,|]", text)]
  elif not isinstance(value, (list, tuple)):
    value = [value]
  found = [read(v, fix, where) for v in value]
  return [x for x in dict.fromkeys(found) if x is not None]


def read_numbers(value: Any, where: str) -> list[float] | None:
  """Returns the number or numbers of a row; None for a null or an empty text."""
  if isinstance(value, bytes):
    value = utf8(value, f"{where}: the label")
  if value is None or (isinstance(value, str) and not value.strip()):
    return None
  out = []
  for one in value if isinstance(value, (list, tuple)) else [value]:
    try:
      number = math.nan if isinstance(one, bool) else float(one)
    except (TypeError, ValueError):
      number = None
    if number is None or isinstance(one, bool):
      raise InputError(
        f"{where}: the label is {value!r:.60}, which is not a number; task.kind=regress takes numbers (and lists of "
        "them). Mend or remove the row, or set task.kind=classify for names."
      )
    if not abs(number) <= float(np.finfo(np.float32).max):
      raise InputError(
        f"{where}: the label is {value!r:.60}; only finite numbers can be learnt. Mend or remove the row."
      )
    out.append(number)
  return out


class Labels:
  """The set of labels of a store.

  `given` names them in order (empty: what the data holds), `ids` is the names that ids in the data stand for (empty:
  ids are names themselves, "0" and so on), `whose` says where `given` comes from.
  """

  def __init__(self, given: Sequence[str], ids: Sequence[str], whose: str):
    self.given, self.ids, self.whose = tuple(map(str, given)), tuple(map(str, ids)), whose
    self.index = {name: i for i, name in enumerate(self.given)}
    self.seen: dict[Any, int] = {}
    self.kinds: dict[type, tuple[Any, str]] = {}  # the first name and the first id, with their rows

  def merge(self, table: Sequence[tuple[Any, str]]) -> np.ndarray:
    """Returns i32[len(table) + 1], the number of each label of a chunk's table of (label, place), and -1 for none."""
    return np.array([self._number(label, where) for label, where in table] + [-1], np.int32)

  def _number(self, label: Any, where: str) -> int:
    self.kinds.setdefault(type(label), (label, where))
    if len(self.kinds) > 1:
      (name, there), (number, here) = self.kinds[str], self.kinds[int]
      raise InputError(
        f"data: the labels are both names and numbers: {name!r} in {there}, and {number} in {here}. Write all of them "
        "as one or the other."
      )
    if not self.given:
      return self.seen.setdefault(label, len(self.seen))
    name = named(label, self.ids) if str(label) not in self.index else str(label)
    if name in self.index:
      return self.index[name]
    raise InputError(
      f"{where}: the label {label!r} is not among the {len(self.given)} of {self.whose}: {_shown(self.given)}"
      f"{did_you_mean(str(label), self.given)}.{_hidden(label)} Mend or remove the row, or name every label in "
      "task.labels."
    )

  def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns (names, i32 final number by the numbers that `merge` gave); raises InputError where ids have a hole."""
    if self.given:
      return self.given, np.arange(len(self.given), dtype=np.int32)
    if int in self.kinds:
      names = self._ids()
    elif all(re.fullmatch(r"\d{1,9}", x) for x in self.seen):
      names = sorted(self.seen, key=lambda x: (int(x), x))
    else:
      names = sorted(self.seen)
    final = {name: i for i, name in enumerate(names)}
    return tuple(map(str, names)), np.array([final[x] for x in self.seen], np.int32)

  def _ids(self) -> list[int]:
    low, high = min(self.seen), max(self.seen)
    if low < 0:
      raise InputError(
        f"data: the label {low} is below 0; ids count from 0.{_hidden(low)} The first number is in "
        f"{self.kinds[int][1]}."
      )
    missing = [i for i in range(min(high, len(self.seen) + SHOWN)) if i not in self.seen]
    if missing or high >= len(self.seen):
      raise InputError(
        f"data: the labels are ids up to {high:,}, but {len(self.seen):,} of them occur; {_shown(missing)} "
        f"{'does' if len(missing) == 1 else 'do'} not. Ids go from 0 without a hole. If rows of some classes are "
        "missing, name all classes in order, --config.task.labels=\"('first','second',...)\"; if these numbers are "
        "names, write them there as text; if they are quantities, set task.kind=regress."
      )
    return list(range(high + 1))


def named(label: str | int, names: Sequence[str]) -> Any:
  """Returns the name that an id stands for, and anything else as it is."""
  stands = isinstance(label, int) and 0 <= label < len(names) and str(label) not in names
  return names[label] if stands else label


def _hidden(label: Any) -> str:
  return " Data sets on the Hub write -1 where the label of a test set is kept secret." if label == -1 else ""


def _shown(names: Sequence) -> str:
  return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---- the tags of words


def read_words(value: Any, what: str, where: str) -> list[Any] | None:
  """Returns the entries of a list, or the words of a text; None for a null."""
  if value is None:
    return None
  if isinstance(value, bytes):
    value = utf8(value, f"{where}: {what}")
  if isinstance(value, str):
    return value.split()
  if not isinstance(value, (list, tuple)):
    raise InputError(f"{where}: {what} are {value!r:.60}; they should be a list, or a text with spaces between.")
  return list(value)


def checked_tags(tags: list[str], scheme: str, where: str) -> list[str]:
  """Returns the tags of a sentence by `scheme`: iob1 is turned into iob2; raises InputError on a tag that breaks it.

  iob2: B-X begins an entity, I-X goes on with one of X. iob1: I-X begins one, too, and B-X only where it follows one of
  X at once. bilou: B-X I-X L-X, U-X alone (also written E and S).
  """
  if scheme == "none" or (not scheme and not all(t == "O" or t[:2] in ("B-", "I-") for t in tags)):
    return tags
  marks = dict(iob1="BI", iob2="BI", bilou="BILUES")[scheme or "iob2"]
  before, out = "O", []
  for place, tag in enumerate(tags, 1):
    if tag != "O" and not (tag[:1] in marks and tag[1:2] == "-" and len(tag) > 2):
      raise InputError(
        f"{where}: tag {place} is {tag!r}, which is none of {scheme} (O, {', '.join(f'{m}-NAME' for m in marks)}). "
        "If the tags have no scheme, set --config.task.scheme=none."
      )
    if scheme == "iob1":
      begins = tag[0] == "I" and before[1:] != tag[1:]
      out.append("B" + tag[1:] if begins else tag)
    else:
      _follow(before, tag, place, scheme or "iob2", where)
      out.append(tag)
    before = tag
  if scheme == "bilou":
    _follow(before, "O", len(tags) + 1, scheme, where)
  return out


def _follow(before: str, tag: str, place: int, scheme: str, where: str) -> None:
  """Raises InputError where `tag` may not follow `before`."""
  inside = tag[0] in "ILE"
  open_ = before[0] in "BI"
  if inside and not (open_ and before[1:] == tag[1:]):
    more = " If an entity may begin with I- (iob1), set --config.task.scheme=iob1." if scheme == "iob2" else ""
    raise InputError(
      f"{where}: tag {place} is {tag!r} after {before!r}: by {scheme} it goes on with an entity that B{tag[1:]} begins."
      f"{more} Or mend the row; --config.task.scheme=none looks at nothing."
    )
  if scheme == "bilou" and open_ and not inside:
    raise InputError(
      f"{where}: the entity of {before!r} does not end: {tag!r} (or the end) comes after it, "
      f"by bilou L{before[1:]} is due. Mend the row; --config.task.scheme=none looks at nothing."
    )


def scheme_of(names: Sequence[str], scheme: str) -> str:
  """Returns the scheme of a set of tags: iob2, bilou or none."""
  if scheme:
    return "iob2" if scheme == "iob1" else scheme
  tagged = [n for n in names if n != "O"]
  return "iob2" if tagged and all(n[:2] in ("B-", "I-") for n in tagged) else "none"


def word(value: Any, fix: Callable[[str], str], where: str) -> str:
  """Returns the text of a word; a null is empty text."""
  if isinstance(value, bytes):
    value = utf8(value, f"{where}: a word")
  return fix("" if value is None else value if isinstance(value, str) else str(value))
