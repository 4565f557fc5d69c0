"""Rows to token files: rendered, cleaned and tokenised in chunks by several processes, written in order as a stream.

The result does not depend on the number of processes. Memory holds a few chunks, whatever the size of the data, and
77 bytes a row (measured) where duplicates are looked for.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data import clean as cleaning
from jaxft.data import crew, sources
from jaxft.data.clean import Options
from jaxft.data.fields import Example, Ragged
from jaxft.data.files import Meter, compact, like_a_sentence, place
from jaxft.data.labels import Labels, scheme_of
from jaxft.data.progress import Progress
from jaxft.data.tasks import Resolver, Task
from jaxft.data.writer import Writer, relabel
from jaxft.errors import InputError

CHUNK_ROWS, CHUNK_CHARS = 1024, 4_000_000
SMALL = 5_000  # rows below which starting processes (about 1 s) costs more than it saves
ROWS_SHOWN = 10  # rows named for each reason of a drop
OPTIONAL = ("types", "places")  # fields that are left out where they hold nothing but zeros


@dataclasses.dataclass
class Chunk:
  """Rows of one origin, each with the task that its columns call for."""

  origin: tuple[str, str]
  tasks: list[Task]
  rows: list[dict]
  lines: list[int]
  repeats: list[int]


@dataclasses.dataclass
class Encoded:
  """What a chunk became. Names of `ragged` and `fixed` are those of files; `aligned` goes by (field, side)."""

  origin: tuple[str, str]
  read: int
  lines: np.ndarray  # i64[rows kept]
  row: np.ndarray  # i64[examples], index of its row, ascending
  ragged: dict[str, Ragged]  # tokens of each side, texts, fields of any length
  aligned: dict[tuple[str, str], np.ndarray]
  fixed: dict[str, np.ndarray]  # one entry an example
  digests: list[bytes]  # a row
  drops: list[tuple[str, int]]  # (reason, line)
  nulls: int
  table: list[tuple[Any, int]]  # labels, each with the line that showed it first
  counts: dict[str, int]

  def keep(self, mask: np.ndarray, reason: str) -> None:
    """Drops the rows where `mask` is False, for `reason`."""
    if mask.all():
      return
    self.drops += [(reason, int(n)) for n in self.lines[~mask]]
    own = mask[self.row]
    for (name, side), values in self.aligned.items():
      self.aligned[name, side] = values[np.repeat(own, self.ragged[side].lengths)]
    self.ragged = {name: r.keep(own) for name, r in self.ragged.items()}
    self.fixed = {name: x[own] for name, x in self.fixed.items()}
    self.lines, self.row = self.lines[mask], (np.cumsum(mask) - 1)[self.row[own]]
    self.digests = [d for d, m in zip(self.digests, mask) if m]


@dataclasses.dataclass
class Job:
  """What the worker processes are given once."""

  encoder: Any  # of encoders.py
  target_encoder: Any  # of texts that the model writes; mostly the same
  bos: int | None
  eos: int | None
  last: list[int]  # that mark the end of a text, EOS among them
  options: Options
  dtype: str
  task: Task
  template: Any  # of chats, or None
  lengths: dict[str, int]  # data.lengths, for objectives with `windows`

  def __call__(self, chunk: Chunk) -> Encoded:
    examples, kept, drops, nulls = [], [], [], 0
    for i, (task, row, line) in enumerate(zip(chunk.tasks, chunk.rows, chunk.lines)):
      own = [t.render(row, self.options.text, place(chunk.origin, line), self.template) for t in task.variants]
      nulls += sum(e.nulls for e in own)
      reason = next(filter(None, map(self._reason, own)), "")
      if reason:
        drops.append((reason, line))
      else:
        kept.append(i)
        examples += own
    return self._encoded(chunk, examples, kept, drops, nulls)

  def _reason(self, e: Example) -> str:
    try:
      (e.input + e.target).encode()
    except UnicodeEncodeError:  # JSON may spell half a character ("\ud83d"), which no tokenizer takes
      return e.drop or self.options.reason(e.input_chars, e.target_chars) or cleaning.SURROGATE
    return e.drop or self.options.reason(e.input_chars, e.target_chars)

  def _encoded(self, chunk: Chunk, examples: list[Example], kept: list[int], drops: list, nulls: int) -> Encoded:
    variants, objective = len(self.task.variants), self.task.objective
    made = objective.encode(examples, self)
    of = np.arange(len(examples)) if made.rows is None else np.asarray(made.rows, np.int64)  # entry -> example
    texts = made.texts or [examples[i][:2] for i in of]
    ragged = {s: Ragged.of(x, self.dtype) for s, x in made.sides.items()}
    for n, side in enumerate(("input", "target")):
      ragged[f"{side}.text"] = Ragged.of([t[n].encode() for t in texts], np.uint8)
    row = of // variants
    fixed = dict(repeats=np.array([chunk.repeats[i] for i in kept], np.int32)[row])
    for name, values in made.scalars.items():
      if isinstance(values, np.ndarray):
        fixed[name] = values
      else:
        ragged[name] = Ragged.of(
          values, "int32" if name == objective.labelled else (objective.scalars | objective.kept)[name]
        )
    aligned = {}
    for name in objective.aligned.keys() & made.aligned.keys():
      values, (side, dtype, *_) = made.aligned[name], objective.aligned[name]
      aligned[name, side] = np.concatenate([np.asarray(v, dtype) for v in values]) if values else np.zeros(0, dtype)
      if name == "weights":
        fixed["supervised"] = np.array([np.count_nonzero(v) for v in values], np.int32)
    lines = np.array([chunk.lines[i] for i in kept], np.int64)
    table = [(label, int(lines[of[i] // variants])) for label, i in made.table]
    digests = [cleaning.digest(e.input, e.target) for e in examples[::variants]] if self.options.dedup else []
    out = Encoded(
      chunk.origin, len(chunk.rows), lines, row, ragged, aligned, fixed, digests, drops, nulls, table, dict(made.counts)
    )
    filled = np.all([ragged[s].lengths > 0 for s in objective.held], axis=0)
    out.keep(np.bincount(row, filled, len(lines)) == np.maximum(np.bincount(row, minlength=len(lines)), 1), "no tokens")
    return out


def chunks(source, task: Task, limit: int, meter: Meter) -> Iterator[Chunk]:
  """Cuts the rows of `source` into chunks of one origin each."""
  chunk, chars = None, 0
  for row in sources.unfold(sources.read(source, limit, meter), task.objective.expand):
    if chunk is None or row.origin != chunk.origin or len(chunk.rows) == CHUNK_ROWS or chars > CHUNK_CHARS:
      if chunk is not None:
        yield chunk
      if chunk is None or row.origin != chunk.origin:
        resolve = Resolver(task)
      chunk, chars = Chunk(row.origin, [], [], [], []), 0
    chunk.tasks.append(resolve(row))
    chunk.rows.append(dict(row))
    chunk.lines.append(row.line)
    chunk.repeats.append(row.repeat)
    chars += sum(len(v) for v in row.values() if isinstance(v, (str, bytes, list)))
  if chunk is not None:
    yield chunk


def build(folder: pathlib.Path, source, job: Job, *, labels: Labels, limit: int, workers: int) -> dict:
  """Writes the files of `source` into the empty `folder`; returns what its meta.json is to hold."""
  meter, began, objective = Meter(sources.local_files(source)), time.monotonic(), job.task.objective
  meta = dict(
    kind=job.task.kind, multi=job.task.multi, variants=len(job.task.variants), read=0, kept=0, stored=0, nulls=0,
    eos_last=0, largest=0, drops={}, origins=[], tasks=[], headers={}, counts={}, described=sources.describe(source),
  )  # fmt: skip
  seen: set[bytes] = set()
  templates: dict[Task, str] = {}
  watch = Watch(objective)

  def noted(stream):
    for chunk in stream:
      for one in dict.fromkeys(chunk.tasks):
        for variant in one.variants:
          templates.setdefault(variant, chunk.origin[0])
      if chunk.origin[0] not in meta["headers"]:
        meta["headers"][chunk.origin[0]] = [c for c in chunk.rows[0] if like_a_sentence(c)]
      yield chunk

  with Writer(folder) as writer, Progress(meter) as progress:
    for encoded in crew.work(job, noted(chunks(source, job.task, limit, meter)), workers or crew.cores(), SMALL):
      if job.options.dedup:
        fresh = np.array([not (d in seen or seen.add(d)) for d in encoded.digests], bool)
        encoded.keep(fresh, cleaning.DUPLICATE)
      _number(encoded, objective.labelled, labels)
      watch(encoded)
      _count(meta, encoded, job)
      writer.write(_files(encoded, meta))
      progress.update(meta["read"])
  _refuse(meta, watch)
  meta |= _finish(folder, writer, job, labels, watch)
  counts = meta["counts"]
  names = ("input", "target", "pair", "label")
  read = ("input", *objective.options)
  meta["tasks"] = [
    {n: getattr(t, n) for n in names if n in read}
    | dict(first=first, chat=job.template is not None and "turns" in read and t.chats)
    for t, first in templates.items()
  ]
  meta["headers"] = {name: cells for name, cells in meta["headers"].items() if cells}
  meta["eos_share"] = counts["ends"] / counts["examples"] if "ends" in counts else meta["eos_last"] / meta["stored"]
  meta["seconds"] = round(time.monotonic() - began, 2)
  return meta


def _number(e: Encoded, field: str, labels: Labels) -> None:
  """Turns the numbers of a chunk's own table of labels into those of `labels`."""
  if not field:
    return
  numbers = labels.merge([(label, place(e.origin, line)) for label, line in e.table])
  for name in e.aligned:
    if name[0] == field:
      e.aligned[name] = numbers[e.aligned[name]]
  if field in e.fixed:
    e.fixed[field] = numbers[e.fixed[field]]
  if field in e.ragged:
    e.ragged[field] = e.ragged[field]._replace(values=numbers[e.ragged[field].values])


class Watch:
  """Looks for rows with which nothing can be learnt, and for lists of numbers whose lengths differ."""

  def __init__(self, objective):
    self.objective, self.width, self.first = objective, None, ""
    self.blank: dict = dict(count=0, rows=[])  # rows without a token to learn

  def __call__(self, e: Encoded) -> None:
    where = lambda i: place(e.origin, int(e.lines[e.row[i]]))
    if "supervised" in e.fixed:
      nothing = np.flatnonzero(e.fixed["supervised"] == 0)
      self.blank["count"] += len(nothing)
      self.blank["rows"] += [where(i) for i in nothing[: ROWS_SHOWN - len(self.blank["rows"])]]
    for name in self.objective.scalars:
      if name in e.ragged and name != self.objective.labelled and len(e.row):
        if self.width is None:
          self.width, self.first = int(e.ragged[name].lengths[0]), where(0)
        odd = np.flatnonzero(e.ragged[name].lengths != self.width)
        if len(odd):
          raise InputError(
            f"{where(odd[0])}: {e.ragged[name].lengths[odd[0]]} numbers, but {self.width} in {self.first}; every row "
            "needs as many."
          )


def _refuse(meta: dict, watch: Watch) -> None:
  """Raises InputError where no row is left, or rows that nothing can be learnt from."""
  if not meta["kept"]:
    why = "; ".join(f"{r}: {d['count']:,} ({compact(d['rows'][:3])})" for r, d in meta["drops"].items())
    raise InputError(
      f"data: all {meta['read']:,} rows of {meta['described']} were dropped: {why}. Check data.clean and the "
      "templates of task."
    )
  if watch.blank["count"]:
    what = watch.objective.blank
    raise InputError(
      f"data: {watch.blank['count']:,} of {meta['stored']:,} examples of {meta['described']} have no token to learn, "
      f"since {what}: {compact(watch.blank['rows'])}{'; ...' if watch.blank['count'] > ROWS_SHOWN else ''}. Mend or "
      "remove these rows."
    )


def _files(e: Encoded, meta: dict) -> dict[str, np.ndarray | Ragged]:
  """Returns what is to be appended to each file."""
  origin = [o["name"] for o in meta["origins"]].index(e.origin[0])
  out = {name: r for name, r in e.ragged.items()} | e.fixed
  out |= {name: values for (name, _), values in e.aligned.items()}
  rows = meta["kept"] - len(e.lines) + e.row  # `kept` counts this chunk already
  return out | dict(lines=e.lines[e.row], rows=rows, origins=np.full(len(e.row), origin, np.int32))


def _finish(folder: pathlib.Path, writer: Writer, job: Job, labels: Labels, watch: Watch) -> dict:
  """Puts the final numbers of labels into their file, removes what says nothing; returns fields of meta.json."""
  objective, out = job.task.objective, dict(width=watch.width, labels=None, label_counts=None)
  for name in OPTIONAL:
    if writer.empty.get(name):
      del writer.files[name]
      (folder / name).unlink()
  if watch.width is not None:  # all the same: the file of lengths says nothing
    for name in objective.scalars:
      del writer.files[f"{name}.lengths"]
      (folder / f"{name}.lengths").unlink()
  if objective.labelled:
    names, order = labels.finish()
    many = f"{objective.labelled}.values"
    counts = relabel(folder / (many if many in writer.files else objective.labelled), order)
    out |= dict(labels=list(names), label_counts=counts.tolist())
    if len(names) < 2 and not job.task.multi:
      raise InputError(
        f"data: every label is {''.join(names) or 'missing'!r}; there is nothing to tell apart. Is task.label the "
        "right column, and are the rows sorted by label while data.limit cuts them?"
      )
    out["scheme"] = scheme_of(names, job.task.scheme) if "scheme" in objective.options else ""
  out["fields"] = sorted(writer.files)
  return out


def _count(meta: dict, e: Encoded, job: Job) -> None:
  if not meta["origins"] or meta["origins"][-1]["name"] != e.origin[0]:
    found = [o for o in meta["origins"] if o["name"] == e.origin[0]]
    meta["origins"] += [] if found else [dict(name=e.origin[0], unit=e.origin[1], read=0, kept=0, examples=0)]
  origin = next(o for o in reversed(meta["origins"]) if o["name"] == e.origin[0])
  for counts in (meta, origin):
    counts["read"] += e.read
    counts["kept"] += len(e.lines)
  origin["examples"] += int(e.fixed["repeats"].sum()) // meta["variants"]
  meta["stored"] += len(e.row)
  meta["nulls"] += e.nulls
  meta["counts"] |= {k: meta["counts"].get(k, 0) + v for k, v in e.counts.items()}
  for reason, line in e.drops:
    drop = meta["drops"].setdefault(reason, dict(count=0, rows=[]))
    drop["count"] += 1
    if len(drop["rows"]) < ROWS_SHOWN:
      drop["rows"].append(place(e.origin, line))
  if not len(e.row):
    return
  objective = job.task.objective
  if objective.ends and job.eos is not None:
    side = e.ragged[objective.ends]
    meta["eos_last"] += int(np.isin(side.values[np.cumsum(side.lengths) - 1], job.last).sum())
  meta["largest"] = max(meta["largest"], *(int(e.ragged[s].values.max()) for s in objective.held))
