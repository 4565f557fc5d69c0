"""The token cache: one folder a (data, tokenizer, template, cleaning), built once, memory-mapped ever after.

Tokens are stored whole. The lengths of a run are applied when a store is opened, in memory, from the stored lengths, so
another `data.lengths` or `data.too_long` costs nothing and a refusal for too long examples comes with the true lengths.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
import uuid

import numpy as np

from jaxft.data import sources
from jaxft.data.build import Job, build, storage
from jaxft.data.clean import Options
from jaxft.data.files import compact, place
from jaxft.data.tasks import SIDES, Task
from jaxft.data.tokens import Tokenizer
from jaxft.errors import InputError

VERSION = 2  # of the files below and of everything that decides their content
PERCENTILES = (50, 90, 99, 100)
POLICIES = ("error", "truncate", "drop")

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
) -> "Store":
  """Returns the store of `source`, from the cache below `cache_root(root)` or built now by `workers` processes (0:
  one a core).
  """
  for name, value, zero in (
    ("data.limit (or evals.NAME.limit)", limit, "all rows"),
    ("data.workers", workers, "one a core"),
  ):
    if value < 0:
      raise InputError(f"config: {name} is {value}; it is a number above 0, or 0 for {zero}.")
  base = cache_root(root)
  with storage(base):
    base.mkdir(parents=True, exist_ok=True)
  parts = dict(
    version=VERSION,
    data=sources.fingerprint(source, base / "hashes.jsonl"),
    tokenizer=tokenizer.fingerprint,
    task=[task.kind, task.input, task.target],
    clean=vars(clean),
    limit=limit,
  )
  name = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
  folder = base / name
  if not _intact(folder):
    with _lock(base / f"{name}.lock"):  # a second process waits here and then finds the folder
      if not _intact(folder):
        _build(base, folder, source, tokenizer, task, clean, limit, workers, parts)
  return Store(folder, lengths, too_long, too_long_share)


def _build(base, folder, source, tokenizer, task, clean, limit, workers, parts) -> None:
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
    job = Job(tokenizer.encoder, tokenizer.eos, clean, "uint16" if tokenizer.size <= 65536 else "int32")
    meta = build(fresh, source, task, job, limit=limit, workers=workers)
    with storage(fresh):
      meta |= dict(
        parts=parts,
        dtype=job.dtype,
        pad=tokenizer.pad,
        eos=tokenizer.eos,
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


class Store:
  """Tokenised examples, memory-mapped, under the lengths of a run. Example ids run from 0 to len - 1 in the order
  of the source.

  A row that a mixture repeats has several ids. `lengths[name]` is i32[N], after truncation; `report` is a dict for
  `report.text`; `pad`, `eos` are the tokenizer's ids; `largest` is the largest id stored.
  """

  def __init__(self, folder, lengths: dict[str, int], too_long: str, too_long_share: float):
    self.folder, self.caps = pathlib.Path(folder), dict(lengths)
    if set(self.caps) != set(SIDES) or min(self.caps.values()) < 2:
      raise InputError(
        f"config: data.lengths is {self.caps}; a seq2seq task has inputs and targets, each at least 2 tokens."
      )
    if too_long not in POLICIES:
      raise InputError(f"config: data.too_long is {too_long!r}; it is one of {', '.join(POLICIES)}.")
    self.meta = json.loads((self.folder / "meta.json").read_text())
    self.pad, self.eos, self.largest = self.meta["pad"], self.meta["eos"], self.meta["largest"]
    dtype = self.meta["dtype"]
    self._tokens = {s: self._map(f"{s}.tokens", dtype) for s in SIDES}
    self._text = {s: self._map(f"{s}.text", np.uint8) for s in SIDES}
    self._raw = {s: np.array(self._map(f"{s}.lengths", np.int32)) for s in SIDES}
    self._starts = {s: _starts(self._raw[s]) for s in SIDES}
    self._text_starts = {s: _starts(self._map(f"{s}.text_lengths", np.int32)) for s in SIDES}
    self._lines, self._origins = self._map("lines", np.int64), self._map("origins", np.int32)
    repeats = np.array(self._map("repeats", np.int32))
    self._stored = np.repeat(np.arange(len(repeats)), repeats)  # example id -> stored row
    self.report = self._apply(too_long, too_long_share)
    self.lengths = {s: np.minimum(self._raw[s][self._stored], self.caps[s]) for s in SIDES}

  def _map(self, name: str, dtype) -> np.ndarray:
    path = self.folder / name
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

  def __len__(self) -> int:
    return len(self._stored)

  def tokens(self, name: str, i: int) -> np.ndarray:
    """Returns i32[length] of one example; a truncated one keeps its EOS."""
    return self.gather(name, np.array([i]))

  def gather(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Returns the tokens of several examples, one after the other, i32[sum of their lengths]."""
    stored, lengths = self._stored[ids], self.lengths[name][ids]
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[name][stored] - (ends - lengths), lengths)
    out = self._tokens[name][at].astype(np.int32)
    cut = self._raw[name][stored] > lengths
    if cut.any():
      last = self._tokens[name][self._starts[name][stored[cut]] + self._raw[name][stored[cut]] - 1]
      out[ends[cut] - 1] = (
        np.where(last == self.eos, last, out[ends[cut] - 1]) if self.eos is not None else out[ends[cut] - 1]
      )
    return out

  def texts(self, i: int) -> tuple[str, str]:
    """Returns the rendered (input, target) of one example, whole."""
    row = self._stored[i]
    return tuple(
      bytes(self._text[s][self._text_starts[s][row] : self._text_starts[s][row + 1]]).decode("utf-8", "surrogatepass")
      for s in SIDES
    )

  def share(self, name: str, token: int | None, most: int) -> float:
    """Returns the share of `token` among the first `most` tokens stored (0 where there is no such token)."""
    head = self._tokens[name][:most]
    return float(np.mean(head == token)) if token is not None and len(head) else 0.0

  def where(self, i: int) -> str:
    """Returns the file and line (or data set and row) of one example."""
    return self._place(self._stored[i])

  def _place(self, row: int) -> str:
    origin = self.meta["origins"][self._origins[row]]
    return place((origin["name"], origin["unit"]), int(self._lines[row]))

  def _first(self, mask: np.ndarray) -> list[str]:
    """Returns the places of the first ten rows among the examples of `mask`; a row with several counts once."""
    return [self._place(row) for row in np.unique(self._stored[mask])[:10]]

  def _apply(self, too_long: str, share: float) -> dict:
    """Decides on the examples over the lengths; returns the report."""
    raw = {s: self._raw[s][self._stored] for s in SIDES}
    over = {s: raw[s] > self.caps[s] for s in SIDES}
    any_over = over["inputs"] | over["targets"]
    count, total = int(any_over.sum()), len(any_over)
    lost = {s: int(np.maximum(raw[s] - self.caps[s], 0).sum()) / max(1, int(raw[s].sum())) for s in SIDES}
    first = self._first(any_over)
    percentiles = {s: {str(p): int(np.percentile(raw[s], p, method="higher")) for p in PERCENTILES} for s in SIDES}
    if too_long == "error" and count > share * total:
      raise InputError(self._refusal(count, total, share, percentiles, lost, first))
    drops = {k: dict(v) for k, v in self.meta["drops"].items()}
    if too_long == "drop" and count:
      drops[f"longer than data.lengths ({', '.join(f'{s} {self.caps[s]}' for s in SIDES)})"] = dict(
        count=len(np.unique(self._stored[any_over])), rows=first
      )
      self._stored = self._stored[~any_over]
      lost = {s: int(raw[s][any_over].sum()) / int(raw[s].sum()) for s in SIDES}
      if not len(self._stored):
        raise InputError(
          f"data: all {total:,} examples are longer than data.lengths {self.caps}; {_spread(percentiles)}."
        )
    truncated = too_long != "drop"
    m = self.meta
    return dict(
      source=m["described"],
      origins=m["origins"],
      tasks=m["tasks"],
      rows_read=m["read"],
      rows_kept=m["kept"],
      examples=len(self._stored),
      dropped=drops,
      nulls=m["nulls"],
      headers=m["headers"],
      lengths=self.caps,
      percentiles=percentiles,
      too_long=too_long,
      cut={
        s: dict(
          count=int(over[s].sum()) if truncated else 0,
          share=float(over[s].mean()) if truncated else 0.0,
          rows=self._first(over[s]) if truncated else [],
        )
        for s in SIDES
      },
      tokens_lost=lost,
      tokens={s: int(np.minimum(self._raw[s][self._stored], self.caps[s]).sum()) for s in SIDES},
      eos_last=m["eos_last"] / m["kept"],
      pad=self.pad,
      eos=self.eos,
      largest=self.largest,
      folder=str(self.folder),
      seconds=m["seconds"],
    )

  def _refusal(self, count, total, share, percentiles, lost, first) -> str:
    caps = " ".join(
      f"--config.data.lengths.{s}={max(2, -(-percentiles[s]['100'] // 8) * 8)}"
      for s in SIDES
      if percentiles[s]["100"] > self.caps[s]
    )
    return (
      f"data: {count:,} of {total:,} examples ({count / total:.1%}) of {self.meta['described']} are longer than "
      "data.lengths "
      f"({', '.join(f'{s} {self.caps[s]}' for s in SIDES)}), above data.too_long_share={share:g}. "
      f"{_spread(percentiles)}. "
      f"Truncation would cut {lost['targets']:.1%} of the target tokens and {lost['inputs']:.1%} of the input tokens. "
      f"First: {compact(first)}. "
      f"Set {caps} to hold them all, or --config.data.too_long=truncate to cut them, or --config.data.too_long=drop "
      "to leave them out."
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
  return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _spread(percentiles: dict) -> str:
  names = "/".join(f"{p}" for p in PERCENTILES)
  return f"Tokens at the {names}th percentile: " + ", ".join(
    f"{s} {'/'.join(f'{v:,}' for v in p.values())}" for s, p in percentiles.items()
  )
