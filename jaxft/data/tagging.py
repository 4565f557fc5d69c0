"""Words with a tag each: the first token of a word carries the tag, the others weigh nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data import labels
from jaxft.data.fields import Columns, Example
from jaxft.data.templates import value
from jaxft.errors import InputError


def render_tags(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  """`parts` is (words, tags), the tags as names (ids where they have no names)."""
  found = labels.read_words(value(task.input, "input", row, fix, where), "the words", where)
  given = labels.read_words(value(task.label, "label", row, fix, where), "the tags", where)
  if given is None:
    return Example("", "", 1, None, 0, ((), ()), labels.NO_LABEL)
  words, tags = found or [], [labels.read(t, fix, where) for t in given]
  if len(words) != len(tags):
    raise InputError(
      f"{where}: {len(words)} words but {len(tags)} tags; each word needs one. Mend or remove the row, or check that "
      "task.input and task.label name lists that belong together."
    )
  words = [labels.word(w, fix, where) for w in words]
  tags = _names(task, tags, where)
  chars = sum(map(len, words))
  return Example(" ".join(words), " ".join(map(str, tags)), chars, None, 0, (words, tags))


def _names(task: Any, tags: list, where: str) -> list:
  """Returns the tags as names where they have any, by their scheme."""
  if None in tags:
    raise InputError(f"{where}: tag {tags.index(None) + 1} is null or empty; each word needs one.")
  tags = [labels.named(t, task.labels) for t in tags]
  if all(isinstance(t, str) for t in tags):
    return labels.checked_tags(tags, task.scheme, where)
  if task.scheme not in ("", "none") and all(isinstance(t, int) for t in tags):
    raise InputError(
      f"{where}: the tags are ids, whose scheme cannot be seen; name them in order, "
      "--config.task.labels=\"('O','B-PER',...)\", or set --config.task.scheme=none."
    )
  return tags


def encode_tags(examples: Sequence[Example], job: Any) -> Columns:
  table, ids, weights, targets, lost = labels.Table(), [], [], [], 0
  for i, (example, (tokens, word)) in enumerate(
    zip(examples, job.encoder.encode_words([e.parts[0] for e in examples]))
  ):
    numbers = np.array([table(tag, i) for tag in example.parts[1]] + [-1], np.int32)
    first = (word >= 0) & (word != np.concatenate([[-1], word[:-1]]))
    ids.append(tokens)
    weights.append(first.astype(np.uint8))
    targets.append(np.where(first, numbers[word], -1))
    lost += len(example.parts[1]) - int(first.sum())
  counts = dict(lost=lost, words=sum(len(e.parts[1]) for e in examples))
  return Columns(dict(inputs=ids), dict(weights=weights, targets=targets), table=table.entries, counts=counts)
