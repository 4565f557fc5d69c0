"""Rows to token files: rendered, cleaned and tokenised in chunks by several processes, written in order as a stream.

The result does not depend on the number of processes. Memory holds a few chunks, whatever the size of the data, and
77 bytes a row (measured) where duplicates are looked for.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data import clean as cleaning
from jaxft.data import sources
from jaxft.data.clean import Options
from jaxft.data.files import Meter, compact, like_a_sentence, place
from jaxft.data.progress import Progress
from jaxft.data.tasks import SIDES, Resolver, Task
from jaxft.errors import InputError, StorageError

CHUNK_ROWS, CHUNK_CHARS = 1024, 4_000_000
SMALL = 5_000  # rows below which starting processes (about 1 s) costs more than it saves
ROWS_SHOWN = 10  # rows named for each reason of a drop


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
  """What a chunk became: per side the concatenated ids and texts with their lengths; per example line, repeat and
  digest.
  """

  origin: tuple[str, str]
  read: int
  tokens: dict[str, np.ndarray]
  lengths: dict[str, np.ndarray]  # i32, tokens
  texts: dict[str, np.ndarray]  # u8, UTF-8
  text_lengths: dict[str, np.ndarray]  # i32, bytes
  lines: np.ndarray  # i64
  repeats: np.ndarray  # i32
  digests: list[bytes]
  drops: list[tuple[str, int]]  # (reason, line)
  nulls: int

  def keep(self, mask: np.ndarray, reason: str) -> None:
    """Drops the examples where `mask` is False, for `reason`."""
    if mask.all():
      return
    self.drops += [(reason, int(n)) for n in self.lines[~mask]]
    for name in self.tokens:
      self.tokens[name] = self.tokens[name][np.repeat(mask, self.lengths[name])]
      self.texts[name] = self.texts[name][np.repeat(mask, self.text_lengths[name])]
      self.lengths[name], self.text_lengths[name] = self.lengths[name][mask], self.text_lengths[name][mask]
    self.lines, self.repeats = self.lines[mask], self.repeats[mask]
    self.digests = [d for d, m in zip(self.digests, mask) if m]


@dataclasses.dataclass
class Job:
  """What the worker processes are given once."""

  encoder: Any  # of encoders.py
  eos: int | None
  options: Options
  dtype: str

  def __call__(self, chunk: Chunk) -> Encoded:
    texts, blobs, kept, drops, nulls = {s: [] for s in SIDES}, {s: [] for s in SIDES}, [], [], 0
    for i, (task, row, line) in enumerate(zip(chunk.tasks, chunk.rows, chunk.lines)):
      example = task.render(row, self.options.text, place(chunk.origin, line))
      nulls += example.nulls
      reason = self.options.reason(example.input_chars, example.target_chars)
      try:
        pair = [(s, text, text.encode()) for s, text in zip(SIDES, (example.input, example.target))]
      except UnicodeEncodeError:  # JSON may spell half a character ("\ud83d"), which no tokenizer takes
        reason = reason or cleaning.SURROGATE
      if reason:
        drops.append((reason, line))
        continue
      kept.append(i)
      for side, text, blob in pair:
        texts[side].append(text)
        blobs[side].append(blob)
    ids = {s: self.encoder.encode(texts[s]) for s in SIDES}
    lengths = {s: np.array([len(x) for x in ids[s]], np.int32) for s in SIDES}
    tokens = {s: np.fromiter(itertools.chain.from_iterable(ids[s]), self.dtype, int(lengths[s].sum())) for s in SIDES}
    out = Encoded(
      chunk.origin,
      len(chunk.rows),
      tokens,
      lengths,
      {s: np.frombuffer(b"".join(blobs[s]), np.uint8) for s in SIDES},
      {s: np.array([len(b) for b in blobs[s]], np.int32) for s in SIDES},
      np.array([chunk.lines[i] for i in kept], np.int64),
      np.array([chunk.repeats[i] for i in kept], np.int32),
      [cleaning.digest(a, b) for a, b in zip(*texts.values())] if self.options.dedup else [],
      drops,
      nulls,
    )
    out.keep((lengths["inputs"] > 0) & (lengths["targets"] > 0), "no tokens")
    return out


def chunks(source, task: Task, limit: int, meter: Meter) -> Iterator[Chunk]:
  """Cuts the rows of `source` into chunks of one origin each."""
  chunk, chars = None, 0
  for row in sources.read(source, limit, meter):
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


def build(folder: pathlib.Path, source, task: Task, job: Job, *, limit: int, workers: int) -> dict:
  """Writes the token files of `source` into the empty `folder`; returns what its meta.json is to hold."""
  meter, began = Meter(sources.local_files(source)), time.monotonic()
  meta = dict(
    read=0, kept=0, nulls=0, eos_last=0, largest=0, drops={}, origins=[], tasks=[], headers={},
    described=sources.describe(source),
  )  # fmt: skip
  seen: set[bytes] = set()
  templates: dict[Task, str] = {}
  workers = workers or _cores()

  def noted(stream):
    for chunk in stream:
      for one in dict.fromkeys(chunk.tasks):
        templates.setdefault(one, chunk.origin[0])
      if chunk.origin[0] not in meta["headers"]:
        meta["headers"][chunk.origin[0]] = [c for c in chunk.rows[0] if like_a_sentence(c)]
      yield chunk

  with Writer(folder, job.dtype) as writer, Progress(meter) as progress:
    for encoded in _map(job, noted(chunks(source, task, limit, meter)), workers):
      if job.options.dedup:
        fresh = np.array([not (d in seen or seen.add(d)) for d in encoded.digests], bool)
        encoded.keep(fresh, cleaning.DUPLICATE)
      _count(meta, encoded, job.eos)
      writer.write(encoded, [o["name"] for o in meta["origins"]].index(encoded.origin[0]))
      progress.update(meta["read"])
  if not meta["kept"]:
    why = "; ".join(f"{r}: {d['count']:,} ({compact(d['rows'][:3])})" for r, d in meta["drops"].items())
    raise InputError(
      f"data: all {meta['read']:,} rows of {meta['described']} were dropped: {why}. Check data.clean and the "
      "templates of task."
    )
  meta["tasks"] = [dict(input=t.input, target=t.target, first=first) for t, first in templates.items()]
  meta["headers"] = {name: cells for name, cells in meta["headers"].items() if cells}
  meta["seconds"] = round(time.monotonic() - began, 2)
  return meta


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def _count(meta: dict, e: Encoded, eos: int | None) -> None:
  if not meta["origins"] or meta["origins"][-1]["name"] != e.origin[0]:
    found = [o for o in meta["origins"] if o["name"] == e.origin[0]]
    meta["origins"] += [] if found else [dict(name=e.origin[0], unit=e.origin[1], read=0, kept=0, examples=0)]
  origin = next(o for o in reversed(meta["origins"]) if o["name"] == e.origin[0])
  for counts in (meta, origin):
    counts["read"] += e.read
    counts["kept"] += len(e.lines)
  origin["examples"] += int(e.repeats.sum())
  meta["nulls"] += e.nulls
  for reason, line in e.drops:
    drop = meta["drops"].setdefault(reason, dict(count=0, rows=[]))
    drop["count"] += 1
    if len(drop["rows"]) < ROWS_SHOWN:
      drop["rows"].append(place(e.origin, line))
  if len(e.lines):
    ends = np.cumsum(e.lengths["targets"]) - 1
    meta["eos_last"] += int((e.tokens["targets"][ends] == eos).sum()) if eos is not None else 0
    meta["largest"] = max(meta["largest"], *(int(t.max()) for t in e.tokens.values()))


# ---- processes

SERVE = "from jaxft.data import build; build.serve()"


def serve() -> None:
  """Answers chunks on standard input with encoded chunks on standard output, both pickled; the life of a worker
  process.
  """
  answers, sys.stdout = sys.stdout.buffer, sys.stderr
  job = pickle.load(sys.stdin.buffer)
  while True:
    try:
      chunk = pickle.load(sys.stdin.buffer)
    except (EOFError, KeyboardInterrupt):
      return
    try:
      result = job(chunk)
    except KeyboardInterrupt:
      return  # the program that called says what there is to say
    except Exception as e:
      result = e
    pickle.dump(result, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


class Worker:
  """A process of its own interpreter: it imports neither JAX nor the program that called (multiprocessing's spawn
  does both).
  """

  def __init__(self, job: Job):
    env = dict(
      os.environ, TOKENIZERS_PARALLELISM="false", PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path)
    )
    self.process = subprocess.Popen(
      [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    self._send(job)

  def _send(self, value) -> None:
    pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
    self.process.stdin.flush()

  def __call__(self, chunk: Chunk) -> Encoded:
    try:
      self._send(chunk)
      result = pickle.load(self.process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as e:
      raise StorageError(
        f"a tokenising process ended with code {self.process.wait()} at {place(chunk.origin, chunk.lines[0])} and "
        "after (out of memory?). "
        "Set --config.data.workers=1 to tokenise in one process."
      ) from e
    if isinstance(result, Exception):
      raise result
    return result

  def stop(self) -> None:
    self.process.kill()
    self.process.wait()
    self.process.stdin.close()
    self.process.stdout.close()


def _map(job: Job, stream: Iterator[Chunk], workers: int) -> Iterator[Encoded]:
  """Yields `job(chunk)` in order: in this process for small data, else in `workers` others."""
  head, rows = [], 0
  for chunk in stream:
    head.append(chunk)
    rows += len(chunk.rows)
    if rows > SMALL:
      break
  stream = itertools.chain(head, stream)
  if workers == 1 or rows <= SMALL:
    yield from map(job, stream)
    return
  idle: queue.SimpleQueue = queue.SimpleQueue()
  crew, window = [], collections.deque()
  threads = concurrent.futures.ThreadPoolExecutor(workers)

  def run(chunk):
    worker = idle.get()
    try:
      return worker(chunk)
    finally:
      idle.put(worker)

  try:
    for _ in range(workers):
      crew.append(Worker(job))
      idle.put(crew[-1])
    for chunk in stream:
      window.append(threads.submit(run, chunk))
      if len(window) > 2 * workers:
        yield window.popleft().result()
    while window:
      yield window.popleft().result()
  finally:
    for worker in crew:
      worker.stop()
    threads.shutdown(wait=True, cancel_futures=True)


# ---- files


@contextlib.contextmanager
def storage(folder):
  """Turns the OSErrors of writing into `folder` into a StorageError that says what to do."""
  try:
    yield
  except OSError as e:
    raise StorageError(
      f"the token cache {folder} cannot be written: {e.strerror or e}. Free some space or point data.cache (or "
      "$JAXFT_CACHE) to a "
      "folder that is writable and has room; nothing else was touched."
    ) from e


class Writer:
  """Appends encoded chunks to flat files; their sizes are checked when the cache is opened."""

  def __init__(self, folder: pathlib.Path, dtype: str):
    self.folder, self.dtype, self.files = folder, dtype, {}

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    with storage(self.folder):
      for f in self.files.values():
        if kind is None:
          f.flush()
          os.fsync(f.fileno())
        f.close()

  def write(self, e: Encoded, origin: int) -> None:
    arrays = dict(lines=e.lines, repeats=e.repeats, origins=np.full(len(e.lines), origin, np.int32))
    for s in SIDES:
      arrays |= {
        f"{s}.tokens": e.tokens[s],
        f"{s}.lengths": e.lengths[s],
        f"{s}.text": e.texts[s],
        f"{s}.text_lengths": e.text_lengths[s],
      }
    with storage(self.folder):
      for name, array in arrays.items():
        if name not in self.files:
          self.files[name] = open(self.folder / name, "wb", buffering=1 << 20)
        self.files[name].write(array.data if array.size else b"")
