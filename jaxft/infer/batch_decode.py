"""Batch decode: JSON Lines in, JSON Lines out, each id exactly once, whatever was killed in between.

While it runs, finished rows are appended to OUTPUT.parts/part.jsonl (synced to disk a batch at a time) beside a
manifest of everything that decides the outputs; at the end one file in the order of the input appears under its final
name at once. With several hosts each computes its share of every batch, and process 0 alone writes: no shared file
system is needed for the output, and the number of hosts may change between restarts.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import clean, labels, lm, squad, tasks
from jaxft.data import templates as templates_
from jaxft.errors import InputError
from jaxft.infer import engine, parts
from jaxft.infer.generate import Whole

log = logging.getLogger("jaxft")

PARTIAL = 3  # exit code: every id is in the output, but some have an "error" in place of an "output"


@dataclasses.dataclass(frozen=True)
class Report:
  """How a batch decode went; counts are of rows."""

  rows: int
  resumed: int  # already there from an earlier run that was stopped
  errors: int
  cut: int  # stopped by the length limit and not by an end token (of this run)
  seconds: float  # of this run, compilation included

  @property
  def code(self) -> int:
    """Exit code: 0, or 3 where some rows have an error record."""
    return PARTIAL if self.errors else 0


def decode(
  worker: engine.Engine,
  params,
  rows: Iterable[Mapping[str, Any]],
  output: str | os.PathLike,
  *,
  render: Callable[[Mapping[str, Any]], str],
  about: Mapping[str, Any],
  seed: int = 0,
  inputs_length: int = 0,
  too_long: str = "error",
  scores: bool = False,
  overwrite: bool = False,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
  """Generates for every row and writes {"id", "output"} lines (`samples` > 1: lists; `scores`: also "score" and "cut").

  `rows` carry an `id` (string or whole number, all or none of them; none: the line number from 1) and what `render`
  needs; a row that `render` refuses (InputError) or, with too_long="error", has more than `inputs_length` tokens (0: no
  limit) gets {"id", "error"}. `about` holds what else decides the outputs (model, template, dtype): a restart with
  anything changed is an InputError that shows the difference. `progress(done, total)` is called after each batch.
  Raises InputError for duplicate ids and for an output that exists (unless `overwrite`), before anything is decoded.
  """
  begun = time.monotonic()
  if too_long not in ("error", "truncate"):
    raise InputError(f"decode: too_long is {too_long!r}; it is 'error' or 'truncate'.")
  ids, texts, errors = _render(rows, render)
  tokens = _tokenise(worker, texts, errors, inputs_length, too_long)
  manifest = dict(about) | _manifest(worker, params, ids, texts, errors, seed, inputs_length, too_long, scores)
  with contextlib.closing(parts.open_output(pathlib.Path(output), ids, manifest, overwrite)) as writer:
    done = writer.done
    resumed, total, cut = int(done.sum()), len(ids), 0
    writer.write([dict(id=ids[i], error=text) for i, text in errors.items() if not done[i]])
    todo = [i for i in range(total) if not done[i] and i not in errors]
    count = total - len(todo)
    progress(count, total)
    for positions, answers in worker.stream(params, [tokens[i] for i in todo], seed=seed, ids=[ids[i] for i in todo]):
      writer.write([dict(id=ids[todo[p]], **a.record(scores)) for p, a in zip(positions, answers)])
      cut += sum(any(a.cut) for a in answers)
      count += len(positions)
      progress(count, total)
    writer.finish()
  return Report(total, resumed, len(errors), cut, time.monotonic() - begun)


def renderer(
  templates: Sequence[Any], fix: Callable[[str], str], chat: Any = None
) -> Callable[[Mapping[str, Any]], str]:
  """Returns the `render` of templates (data/tasks.py), of which the first one that fits a row is taken; a null is empty
  text, `fix` acts on each field. `chat` (chat_template.Template or None) is for rows with a chat: its messages up to
  the last that is no answer, and the beginning of the answer."""

  def render(row: Mapping[str, Any]) -> str:
    where = getattr(row, "where", "this row")
    if chat is not None and lm.is_conversation(row):
      messages, tools = lm.conversation(row, answered=False)
      return Whole(chat.prompt(messages, tools, where))
    return tasks.render_input(templates, row, fix, where)

  return render


def label_renderer(
  templates: Sequence[tuple[Any, Any]], fix: Callable[[str], str], *, words: bool
) -> Callable[[Mapping[str, Any]], Any]:
  """As `renderer`, for models that label: templates of a text and of the one beside it ("": none).

  What it gives is a text, two of them, or with `words` a list of words.
  """

  def one(row: Mapping[str, Any], template: Any, pair: Any, where: str) -> Any:
    if words:
      found = labels.read_words(templates_.value(template, "input", row, fix, where), "the words", where)
      return [labels.word(w, fix, where) for w in found or []]
    both = (("input", template), ("pair", pair))
    texts = tuple(templates_.render(t, name, row, fix, where)[0] for name, t in both if t)
    return texts if pair else texts[0]

  return _first_that_fits(templates, one)


def _first_that_fits(templates: Sequence[tuple[Any, Any]], one: Callable[..., Any]) -> Callable[[Mapping], Any]:
  def render(row: Mapping[str, Any]) -> Any:
    where, problems = getattr(row, "where", "this row"), []
    for template, pair in templates:
      try:
        return one(row, template, pair, where)
      except InputError as e:
        problems.append(e)
    raise problems[0]

  return render


def question_renderer(templates: Sequence[tuple[Any, Any]]) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
  """As `renderer`, for questions about a text: templates of the question and of the context; texts stay as they are."""

  def one(row: Mapping[str, Any], template: Any, pair: Any, where: str) -> tuple[str, str]:
    texts = ((k, templates_.value(t, k, row, str, where)) for k, t in (("question", template), ("context", pair)))
    asked = squad.read(dict(texts), where)
    return asked.question, asked.context

  return _first_that_fits(templates, one)


def _render(rows, render) -> tuple[list, list, dict[int, str]]:
  """Returns (ids, texts, {position: why there is no text}); raises InputError for bad ids, and if no row has a text."""
  ids, texts, errors, named = [], [], {}, 0
  for i, row in enumerate(rows):
    named += "id" in row
    if named not in (0, i + 1):
      raise InputError(
        f"decode: row {i + 1} has {'an' if 'id' in row else 'no'} id, those before it have "
        f"{'none' if 'id' in row else 'one'}. Give every row an id, or none: then it is the number of the row."
      )
    ids.append(row["id"] if named else i + 1)
    if named and (isinstance(ids[i], bool) or not isinstance(ids[i], (str, int))):
      raise InputError(f"decode: row {i + 1}: the id {ids[i]!r} is neither a string nor a whole number.")
    try:
      texts.append(render(row))
      "".join(texts[-1]).encode()
    except (InputError, UnicodeEncodeError) as e:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
      texts[i:] = [""]
      errors[i] = clean.SURROGATE if isinstance(e, UnicodeEncodeError) else str(e)
  twice = [i for i, n in collections.Counter(map(str, ids)).items() if n > 1]
  if twice:
    lines = [i + 1 for i, x in enumerate(ids) if str(x) == twice[0]]
    raise InputError(
      f"decode: {len(twice)} ids occur more than once, such as {twice[0]!r} in rows {lines[:5]}. Ids name the "
      "outputs: make them unique, or leave them out everywhere to use line numbers."
    )
  if not ids:
    raise InputError("decode: the input has no rows.")
  if len(errors) == len(ids):
    raise InputError(f"decode: not one of {len(ids)} rows fits the template. The first: {errors[0]}")
  return ids, texts, errors


def _tokenise(
  worker: engine.Engine, texts: list, errors: dict[int, str], limit: int, too_long: str
) -> list[np.ndarray]:
  """Returns the tokens of each row; `errors` gets rows that are too long or empty. A cut row keeps its end token."""
  out: list[np.ndarray] = []
  for begin in range(0, len(texts), 4096):
    out += worker.encode(texts[begin : begin + 4096])
  for i, row in enumerate(out):
    if i in errors:
      continue
    if isinstance(row, InputError):
      errors[i] = str(row)
    elif len(row) == 0:
      errors[i] = "the input has no tokens"
    elif limit and len(row) > limit and too_long == "truncate":
      out[i] = np.concatenate([row[: limit - 1], row[-1:]])
    elif limit and len(row) > limit:
      errors[i] = f"the input has {len(row)} tokens, the limit is {limit}"
  return out


# ---- what decides the outputs


def _manifest(
  worker: engine.Engine, params, ids, texts, errors, seed, inputs_length, too_long, scores
) -> dict[str, Any]:
  digest = hashlib.blake2b(digest_size=16)
  for i, (name, text) in enumerate(zip(ids, texts)):
    digest.update(json.dumps([name, text, i in errors]).encode())
  return worker.settings(seed) | dict(
    input=digest.hexdigest(),
    rows=len(ids),
    weights=checksum(params),
    inputs_length=inputs_length,
    too_long=too_long,
    scores=scores,
    tokenizer=worker.tokenizer.fingerprint,
  )


def checksum(params) -> str:
  """Returns a name for the exact values of a tree of arrays: whole-number sums, so the same under any sharding."""
  leaves, treedef = jax.tree.flatten(params)
  sums = jax.jit(lambda xs: jnp.stack([_sum(x) for x in xs]))(leaves)
  shapes = [(x.shape, str(x.dtype)) for x in leaves]
  return hashlib.blake2b(f"{treedef}{shapes}{np.asarray(sums).tolist()}".encode(), digest_size=16).hexdigest()


def _sum(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  mixed = (bits + place * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
  return jnp.sum((mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35), dtype=jnp.uint32)


# ---- the output
