"""A text, or two, with a label, several labels, or numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data import labels
from jaxft.data.fields import Columns, Example
from jaxft.data.templates import render, value


def _texts(task: Any, row: dict, fix: Callable[[str], str], where: str) -> tuple[tuple[str, ...], int | None, int]:
  """Returns (text or two, characters of their fields, how many of those were null)."""
  first, chars, nulls = render(task.input, "input", row, fix, where)
  if not task.pair:
    return (first,), chars, nulls
  second, more, others = render(task.pair, "pair", row, fix, where)
  return (first, second), (None if None in (chars, more) else min(chars, more)), nulls + others


def _example(texts: tuple, chars: int | None, nulls: int, label: Any, shown: str) -> Example:
  """`parts` is (texts, label); without a label the row is left out."""
  drop = labels.NO_LABEL if label is None else ""
  return Example("\n".join(texts), shown, chars, None, nulls, (texts, label), drop)


def render_label(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  texts = _texts(task, row, fix, where)
  label = labels.read(value(task.label, "label", row, fix, where), fix, where)
  return _example(*texts, label, str(labels.named(label, task.labels)))


def render_labels(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  texts = _texts(task, row, fix, where)
  found = labels.read_several(value(task.label, "label", row, fix, where), fix, where)
  return _example(*texts, found, ", ".join(str(labels.named(x, task.labels)) for x in found or ()))


def render_numbers(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  texts = _texts(task, row, fix, where)
  found = labels.read_numbers(value(task.label, "label", row, fix, where), where)
  return _example(*texts, found, ", ".join(f"{x:g}" for x in found or ()))


def _encode(examples: Sequence[Example], job: Any) -> Columns:
  """Returns the columns without the labels; rows of one text may lie among those of two."""
  texts = [e.parts[0] for e in examples]
  pairs = [t for t in texts if len(t) == 2]
  if not pairs:
    ids = job.encoder.encode([t[0] for t in texts])
    places = np.zeros((len(ids), 4), np.int32)
    return Columns(dict(inputs=ids), dict(types=[[0] * len(x) for x in ids]), dict(places=places))
  single = iter(job.encoder.encode([t[0] for t in texts if len(t) == 1]))
  double = zip(*job.encoder.encode_pairs(*zip(*pairs)))
  rows = [next(double) if len(t) == 2 else (next(single), [], [0] * 4) for t in texts]
  types = [types or [0] * len(ids) for ids, types, _ in rows]
  places = np.array([p for _, _, p in rows], np.int32)
  return Columns(dict(inputs=[ids for ids, _, _ in rows]), dict(types=types), dict(places=places))


def encode_label(examples: Sequence[Example], job: Any) -> Columns:
  table, out = labels.Table(), _encode(examples, job)
  numbers = np.array([table(e.parts[1], i) for i, e in enumerate(examples)], np.int32)
  return out._replace(scalars={**out.scalars, "labels": numbers}, table=table.entries)


def encode_labels(examples: Sequence[Example], job: Any) -> Columns:
  table, out = labels.Table(), _encode(examples, job)
  numbers = [[table(label, i) for label in e.parts[1]] for i, e in enumerate(examples)]
  return out._replace(scalars={**out.scalars, "labels": numbers}, table=table.entries)


def encode_numbers(examples: Sequence[Example], job: Any) -> Columns:
  out = _encode(examples, job)
  return out._replace(scalars={**out.scalars, "labels": [e.parts[1] for e in examples]})
