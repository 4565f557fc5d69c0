"""The token cache: one folder a (data, tokenizer, task, cleaning), built once, memory-mapped ever after."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxft.data import sources
from jaxft.data.build import Job, build
from jaxft.data.clean import Options
from jaxft.data.labels import Labels
from jaxft.data.store import Store
from jaxft.data.tasks import Task
from jaxft.data.tokens import Tokenizer
from jaxft.data.writer import storage
from jaxft.errors import InputError

VERSION = 5  # of the files of a store and of everything that decides their content

log = logging.getLogger("jaxft")


def cache_root(folder: str) -> pathlib.Path:
  """Returns `folder`, else $JAXFT_CACHE, else ~/.cache/jaxft."""
  return pathlib.Path(folder or os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser()


def open_or_build(
  source,
  *,
  tokenizer: Tokenizer,
  task: Task,
  clean: Options,
  lengths: dict[str, int],
  too_long: str,
  too_long_share: float,
  limit: int,
  root: str,
  workers: int,
  labels: Sequence[str] = (),
  template: Any = None,
) -> Store:
  """Returns the store of `source`, from the cache below `cache_root(root)` or built now by `workers` processes (0:
  one a core).

  `labels` are those of the training data (`Store.labels`) for data that is evaluated; empty: `task.labels`, or where
  that is empty what this data holds. `template` is that of chats (`chat_template.Template`), which kinds with
  `task.turns` read; without one a chat is one question and its answer.
  """
  for name, value, zero in (
    ("data.limit (or evals.NAME.limit)", limit, "all rows"),
    ("data.workers", workers, "one a core"),
  ):
    if value < 0:
      raise InputError(f"config: {name} is {value}; it is a number above 0, or 0 for {zero}.")
  ids = task.labels or (sources.label_names(source, task.label_column) if task.objective.labelled else ())
  whose = "task.labels" if task.labels else "the training data" if labels else "the data set"
  names = Labels((task.labels or labels or ids) if task.objective.labelled else (), ids, whose)
  task = dataclasses.replace(task, labels=ids)
  base = cache_root(root)
  with storage(base):
    base.mkdir(parents=True, exist_ok=True)
  parts = dict(
    version=VERSION,
    data=sources.fingerprint(source, base / "hashes.jsonl"),
    tokenizer=tokenizer.fingerprint,
    task=_described(task),
    labels=names.given,
    lengths=dict(lengths, stride=task.stride) if task.objective.windows else {},
    clean=vars(clean),
    template=[template.text, template.bos_token, template.eos_token, template.variables] if template else [],
    limit=limit,
  )
  name = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
  folder = base / name
  if not _intact(folder):
    with _lock(base / f"{name}.lock"):  # a second process waits here and then finds the folder
      if not _intact(folder):
        _build(base, folder, source, tokenizer, task, clean, template, names, limit, workers, parts)
  return Store(folder, task.objective, lengths, too_long, too_long_share, max(task.stride, 0))


def _described(task: Task) -> dict:
  """Returns what of a task decides the files; the rest is applied when a store is opened."""
  out = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
  del out["stride"]
  return out


def _build(base, folder, source, tokenizer, task, clean, template, names, limit, workers, parts) -> None:
  with storage(base):
    if folder.exists():
      log.warning("the token cache %s is damaged (a file is missing or has another size); it is built again", folder)
      shutil.rmtree(folder)
    for left in base.glob(f".{folder.name}-*"):  # of a process that was killed; one still at work wrote within the hour
      if time.time() - max((f.stat().st_mtime for f in left.iterdir()), default=left.stat().st_mtime) > 3600:
        shutil.rmtree(left, ignore_errors=True)
    fresh = base / f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
  try:
    dtype = "uint16" if tokenizer.size <= 65536 else "int32"
    job = Job(tokenizer.encoder, tokenizer.target_encoder, tokenizer.bos, tokenizer.eos, sorted(tokenizer.last), clean,
              dtype, task, template, parts["lengths"])  # fmt: skip
    meta = build(fresh, source, job, labels=names, limit=limit, workers=workers)
    with storage(fresh):
      meta |= dict(
        parts=parts,
        dtype=job.dtype,
        pad=tokenizer.pad,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        last=job.last,
        files={f.name: f.stat().st_size for f in fresh.iterdir()},
      )
      (fresh / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False, default=str))
      try:
        fresh.rename(folder)
      except OSError:
        if not _intact(folder):  # else another host was faster, with the same content
          raise
  finally:
    shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: pathlib.Path):
  with storage(path.parent), open(path, "w") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: two builders then do the same work, and the first to rename wins
      log.debug("no lock on %s", path, exc_info=True)
    yield


def _intact(folder: pathlib.Path) -> bool:
  try:
    files = json.loads((folder / "meta.json").read_text())["files"]
    return all((folder / name).stat().st_size == size for name, size in files.items())
  except (OSError, ValueError, KeyError):
    return False
