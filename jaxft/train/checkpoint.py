"""Checkpoints that can be trusted: written by Orbax in the background, checked leaf by leaf when they are read.

    checkpoints/120/state      the arrays, in Orbax's format, any sharding
    checkpoints/120/meta       JSON: step, metrics, fingerprints, versions, and for each leaf shape, dtype and checksum
    checkpoints/set_aside/     what was bad, or newer than the step that a run went back to; never read, never deleted

Orbax's CheckpointManager is not used, for what was measured with it (orbax 0.12.8): a flipped bit in an array restores
without an error, an empty step directory is taken for the newest checkpoint, after a disk-full error its list of steps
is empty, and `save` after going back to an older step does nothing without a word. AsyncCheckpointer below it has none
of these in it.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxft import trees
from jaxft.errors import InputError, StorageError
from jaxft.train import manifest

log = logging.getLogger("jaxft")
Tree = Any

FORMAT = 1  # of the folders below; raise it when an older jaxft could not read what this one writes
ASIDE = "set_aside"


class Checkpointer:
  """Saves, lists, restores and prunes the checkpoints in `folder`.

  keep: how many of the latest stay. best, mode: the metric (such as "eval/loss/loss") whose best checkpoint stays too,
  "" for none, and "min" or "max". facts: put into every checkpoint (fingerprints, versions, mesh). write=False never
  changes the folder.
  """

  def __init__(self, folder: str, *, keep: int, best: str, mode: str, facts: Mapping[str, Any], write: bool = True):
    if keep < 1 or mode not in ("min", "max"):
      raise InputError(
        f"save: keep is {keep} and mode is {mode!r}; keep at least 1 checkpoint, and mode is 'min' or 'max'."
      )
    self.folder, self._keep, self.best, self.mode = epath.Path(folder), keep, best, mode
    self._facts, self._write, self._saving, self._last = dict(facts), write, None, None
    self._metas: dict[int, dict] = {}
    # Logs of a failed write come with a traceback; what it means is said by StorageError.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=1200)
    if write:
      try:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_unfinished()
      except OSError as e:
        raise StorageError(f"{folder} cannot be written: {e}. Give a --workdir that this user may write to.") from e

  # -- what is there

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, ascending: those with readable metadata."""
    return [s for s in self._directories() if self._read(s) is not None]

  def meta(self, step: int) -> dict[str, Any]:
    """Returns the metadata of `step`; raises StorageError where there is none."""
    meta = self._read(step)
    if meta is None:
      raise StorageError(f"There is no checkpoint of step {step} in {self.folder}; there are {self.steps() or 'none'}.")
    return meta

  def best_step(self) -> int | None:
    """Returns the step whose `best` metric is best (the earliest of equals); None without such a metric. NaN is never
    best."""
    found = [(v if self.mode == "min" else -v, s) for s in self.steps() if (v := self._metric(s)) is not None]
    return min(found)[1] if found else None

  def _metric(self, step: int) -> float | None:
    return self._read(step)["metrics"].get(self.best) if self.best else None  # `save` has made a NaN null

  def _directories(self) -> list[int]:
    if not self.folder.exists():
      return []
    return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

  def _read(self, step: int) -> dict | None:
    if step not in self._metas:
      try:
        meta = manifest.unseal(json.loads((self.folder / str(step) / "meta" / "metadata").read_text()))
      except (OSError, ValueError, manifest.Corrupt):
        return None
      self._metas[step] = meta
    return self._metas[step]

  # -- saving

  def save(self, step: int, state: Tree, *, metrics: Mapping[str, float | None], extra: Mapping[str, Any]) -> bool:
    """Starts to save `state` as `step`; returns False where that step is there already.

    The arrays are copied before it returns, so the state may be donated. metrics: the latest evaluation at this very
    step, for `best`. extra: JSON that comes back from `meta` (such as the evaluations so far). Waits for a save that is
    still running, which never pile up. Raises StorageError.
    """
    assert self._write, "this checkpointer only reads"
    if self._last == step:
      return False
    running, began = self._saving, time.monotonic()
    self.wait()
    if time.monotonic() - began > 1:
      log.warning(
        "The checkpoint of step %s was still being written at step %d; training waited %.0f s. Save less often.",
        running,
        step,
        time.monotonic() - began,
      )
    if (self.folder / str(step)).exists():
      self._set_aside([step], "an older run's")
    flat = {p: manifest.plain(x) for p, x in manifest.paths(state).items()}
    meta = dict(
      format=FORMAT,
      step=step,
      time=time.time(),
      metrics=_finite(metrics),
      extra=extra,
      **self._facts,
      leaves=manifest.manifest(flat),
    )
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(trees.unflatten(flat)), meta=ocp.args.JsonSave(manifest.seal(meta))
    )
    self._saving = step
    try:
      self._orbax.save(self.folder / str(step), args=args)
    except Exception as e:
      self._failed(e)
    self._last = step
    return True

  def annotate(self, step: int, *, metrics: Mapping[str, float | None], extra: Mapping[str, Any]) -> None:
    """Puts what was measured after the save of `step` into its metadata; the arrays stay as they are."""
    self.wait()
    meta = dict(self.meta(step), metrics=_finite(metrics), extra=extra)
    self._metas.pop(step)
    if jax.process_index() == 0:
      file = self.folder / str(step) / "meta" / "metadata"
      fresh = file.with_name("metadata.new")
      try:
        fresh.write_text(json.dumps(manifest.seal(meta)))
        fresh.replace(file)
      except OSError as e:
        raise StorageError(f"{file} cannot be written: {e}. Free some space and run the same command again.") from e
    _barrier("annotate")

  def poll(self) -> None:
    """Raises StorageError as soon as a running save has failed; when it has ended well, prunes. Costs microseconds."""
    if self._saving is not None and jax.process_count() > 1:
      try:
        self._orbax.check_for_errors()
      except Exception as e:
        self._failed(e)
    elif self._saving is not None and self._idle():
      self.wait()

  def wait(self) -> None:
    """Waits until the running save is on the disk, then prunes; raises StorageError where it failed."""
    if self._saving is None:
      return
    try:
      self._orbax.wait_until_finished()
    except Exception as e:
      self._failed(e)
    step, self._saving = self._saving, None
    log.debug("checkpoint of step %d is complete", step)
    self._prune()

  def _idle(self) -> bool:
    """Says whether the writing has ended here. With several hosts only `wait`, which all call at the same step, ends a
    save."""
    thread = self._orbax._async_manager._thread
    return thread is None or not thread.is_alive()

  def _failed(self, error: Exception) -> None:
    step, self._saving, self._last = self._saving, None, None
    self._clear_unfinished()
    left = self.steps()
    raise StorageError(
      f"The checkpoint of step {step} could not be written to {self.folder}: {_first_line(error)}. Checkpoints there: "
      f"{left or 'none'}. Free some space or mend the disk, then run the same command again: it goes on from "
      f"step {left[-1] if left else 0}."
    ) from error

  def _clear_unfinished(self) -> None:
    """Deletes what an interrupted save left; it would fill the disk for ever."""
    if jax.process_index():
      return
    for path in self.folder.iterdir() if self.folder.exists() else ():
      for wait in (0.1, 0.5, 2.0, 0.0) if ".orbax-checkpoint-tmp" in path.name else ():
        try:
          path.rmtree(missing_ok=True)
          break
        except OSError as e:  # threads of the save that failed may still be making files there
          if not wait:
            log.warning("%s is left of an unfinished save (%s); the next start removes it.", path, e)
          time.sleep(wait)

  def _prune(self) -> None:
    steps = self.steps()
    stay = {*steps[-self._keep :], self.best_step()}
    for step in steps if jax.process_index() == 0 else ():
      if step not in stay:
        self._metas.pop(step, None)
        # Renamed first: a kill in the middle of the deletion must not leave a half checkpoint under its name.
        doomed = self.folder / f"{step}.orbax-checkpoint-tmp-old"
        (self.folder / str(step)).rename(doomed)
        doomed.rmtree(missing_ok=True)

  def _set_aside(self, steps: Sequence[int], why: str) -> None:
    if jax.process_index() == 0:
      (self.folder / ASIDE).mkdir(parents=True, exist_ok=True)
      for step in steps:
        target = self.folder / ASIDE / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        (self.folder / str(step)).rename(target)
        log.warning("The checkpoint of step %d (%s) was moved to %s.", step, why, target)
    for step in steps:
      self._metas.pop(step, None)
    _barrier("set_aside")

  # -- restoring

  def restore(
    self, abstract: Tree, step: int | None = None, *, partial: bool = False
  ) -> tuple[Tree, dict[str, Any]] | None:
    """Returns (state, metadata) of `step` (None: the latest good one), or None where there is no checkpoint at all.

    abstract: leaves with shape, dtype and, where it matters, sharding; any mesh will do. partial: the checkpoint may
    hold more. Without `step` a writing checkpointer goes on from what it returns: it sets aside a latest checkpoint
    that is bad. With `step` it only reads. Raises StorageError where nothing good is left, InputError, with all names,
    where the checkpoint is of another model.
    """
    self.wait()
    there = self._directories()
    wanted = [step] if step is not None else there[::-1]
    if step is not None and step not in there:
      raise StorageError(f"There is no checkpoint of step {step} in {self.folder}; there are {self.steps() or 'none'}.")
    bad = []
    for s in wanted:
      try:
        state, meta = self._load(s, abstract, partial)
      except manifest.Corrupt as e:
        log.warning(
          "The checkpoint of step %d in %s is not usable: %s.%s",
          s,
          self.folder,
          e,
          " Trying the one before it." if step is None else "",
        )
        bad.append(s)
        continue
      if step is None and self._write:
        if bad:
          self._set_aside(bad, "not usable")
        self._last = s
      return state, meta
    if step is not None:
      others = [s for s in self.steps() if s != step]
      raise StorageError(
        f"The checkpoint of step {step} in {self.folder} cannot be used (see above). Others there: "
        f"{', '.join(map(str, others)) or 'none'}."
      )
    if bad or (not there and self._has_aside()):
      raise StorageError(
        f"None of the checkpoints in {self.folder} can be used ({', '.join(map(str, bad)) or 'all were set aside'}; "
        "see above). A fresh start would hide that, so nothing was started: repair one, or delete the folder to "
        "begin again."
      )
    return None

  def _has_aside(self) -> bool:
    return self._write and (self.folder / ASIDE).exists() and any((self.folder / ASIDE).iterdir())

  def _load(self, step: int, abstract: Tree, partial: bool) -> tuple[Tree, dict[str, Any]]:
    meta = self._read(step)
    _agree(meta is not None, "it is empty, or its metadata is missing or broken")
    if meta["format"] > FORMAT:
      raise InputError(
        f"The checkpoint of step {step} in {self.folder} was written by a newer jaxft (format {meta['format']}, this "
        f"one reads up to {FORMAT}). Install that version."
      )
    flat = manifest.paths(abstract)
    want = {p: _abstract(x) for p, x in flat.items()}
    self._compare(step, want, meta["leaves"], partial)
    nested = trees.unflatten(want)
    problem = ""
    try:
      args = ocp.args.PyTreeRestore(
        nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=partial
      )
      found = trees.flatten(self._orbax.restore(self.folder / str(step), args=ocp.args.Composite(state=args))["state"])
      found = {p: found[p] for p in want}
    except Exception as e:
      problem = _first_line(e)
      log.debug("reading the checkpoint failed", exc_info=True)
    _agree(not problem, f"it cannot be read ({problem or 'on another host'})")
    sums = np.asarray(manifest.checksums(list(found.values())))
    wrong = [p for p, s in zip(found, sums) if int(s) != meta["leaves"][p][2]]
    if wrong:
      more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
      raise manifest.Corrupt(
        f"the checksum of {', '.join(wrong[:4])}{more} differs: the file has changed since it was written"
      )
    leaves = [_as(found[p], like) for p, like in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta

  def _compare(self, step: int, want: Mapping[str, Any], have: Mapping[str, list], partial: bool) -> None:
    lines = [f"  missing in the checkpoint: {p}" for p in want if p not in have]
    lines += [f"  only in the checkpoint: {p}" for p in have if p not in want and not partial]
    for p in want.keys() & have.keys():
      now, was = (list(want[p].shape), np.dtype(want[p].dtype).name), (have[p][0], have[p][1])
      if now != was:
        lines.append(f"  {p}: {was[1]}{was[0]} in the checkpoint, {now[1]}{now[0]} here")
    if lines:
      more = [f"  and {len(lines) - 40} more"] if len(lines) > 40 else []
      raise InputError(
        f"The checkpoint of step {step} in {self.folder} and the model of this config do not match:\n"
        + "\n".join(sorted(lines)[:40] + more)
        + "\nUse the config that made the checkpoint, or another --workdir."
      )

  def close(self) -> None:
    """Waits for the running save and frees the writer; raises StorageError where that save failed."""
    try:
      self.wait()
    finally:
      self._orbax.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_whole(getattr(leaf, "sharding", None)))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or _whole(None))


def _whole(sharding: Any) -> Any:
  """Returns a sharding that keeps an array whole, on the mesh of `sharding` where it has one."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _as(found: jax.Array, like: Any) -> jax.Array:
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    kinds = []  # the kind of key of an abstract leaf can only be asked of a tracer
    jax.eval_shape(lambda k: kinds.append(jax.random.key_impl(k)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(found, impl=kinds[0])
  return found


def _agree(good: bool, why: str) -> None:
  """Raises manifest.Corrupt on every host where one host found something wrong, so that all fall back together."""
  if jax.process_count() > 1:
    good = bool(np.all(multihost_utils.process_allgather(np.array(good))))
  if not good:
    raise manifest.Corrupt(why)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"jaxft/{name}")


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
  return {k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()}


def _first_line(error: BaseException) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:600]
