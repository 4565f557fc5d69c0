"""Many runs in one process that share what they can, judged by one metric: what `jaxft.sweep` does.

RUNS/trial-000 ...   run folders; the checkpoints stay of the best one
RUNS/sweep.journal   JSON: what is tried, and what every trial that was begun has come to; the truth when going on
RUNS/sweep.jsonl, sweep.png, sweep.html    made from it after each trial, the pictures at the end
RUNS/best            config.json and export/ of the best trial
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft import cluster, config, export, observe, runs, setup, space, trials
from jaxft.errors import InputError, NumbersError, StorageError
from jaxft.space import Range, Space
from jaxft.train import loop, workdir
from jaxft.trials import Trial

log = logging.getLogger("jaxft.sweep")

FORMAT = 1
KEPT = 8  # of each part: how many variants wait for a trial that they fit
MAY_CHANGE = ("log", "export", "data.cache", "data.workers", "save.every", "save.minutes", "save.keep")  # going on


class Pruned(Exception):
  """A trial is worse than the others; raised through its training."""


class Parts:
  """Parts of runs that are made once for all configs that agree in what the making of the part read."""

  def __init__(self):
    self.made: dict[str, int] = {}  # name of what makes a part -> how often it was made
    self._kept: dict[Callable, list[tuple]] = {}

  def of(self, whole: ConfigDict) -> Callable:
    """Returns part(make, reader, *args) for the run of the config `whole`: make(reader, *args), or that of earlier."""

    def part(make: Callable, c: config.Reader, *args: Any) -> Any:
      kept = self._kept.setdefault(make, [])
      for given, read, made in kept:
        if len(given) == len(args) and all(map(_same, given, args)) and all(_at(c, p) == x for p, x in read.items()):
          return made
      seen: set[str] = set()
      made = make(config.Reader(whole, seen=seen), *args)
      kept.append((args, {p: _at(c, p) for p in seen}, made))  # which counts them as read by `c` as well
      del kept[:-KEPT]
      self.made[make.__name__] = self.made.get(make.__name__, 0) + 1
      return made

    return part


def _same(a: Any, b: Any) -> bool:
  return a is b or (isinstance(a, (int, str, tuple)) and a == b)


def _at(c: config.Reader, path: str) -> Any:
  return functools.reduce(getattr, path.split("."), c)


class Journal:
  """The file RUNS/sweep.journal: written anew, as a whole, whenever a trial begins or ends."""

  def __init__(self, file: pathlib.Path, what: Space, c: ConfigDict):
    self._file, self.trials = file, []
    self._head = dict(format=FORMAT, space=what.json(), config=json.loads(config.to_json(c)))
    if not file.exists():
      return
    try:
      there = json.loads(file.read_text(encoding="utf-8"))
      self.trials = [Trial(**t) for t in there["trials"]]
    except (ValueError, KeyError, TypeError) as e:
      raise StorageError(f"{file} cannot be read ({e}). Put it back, or give another --workdir.") from e
    changed = [f"  {k}: {_show(was)} there, {_show(now)} now" for k, was, now in self._changes(there)]
    if changed:
      raise InputError(
        f"{file.parent} belongs to another sweep:\n"
        + "\n".join(changed)
        + "\nGive these as they were, to go on with that sweep, or another --workdir, to start a new one."
      )

  def _changes(self, there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    was, now = there["space"], self._head["space"]
    out = [(k, was.get(k), now.get(k)) for k in {**was, **now} if was.get(k) != now.get(k)]
    read = lambda head: config.from_json(json.dumps(head["config"]))
    changed = config.changed(read(self._head), read(there))
    free = lambda k: any(k == m or k.startswith(m + ".") for m in MAY_CHANGE)
    return out + [(k, a, b) for k, (a, b) in changed.items() if not free(k)]

  def remove(self) -> None:
    self._file.unlink(missing_ok=True)

  def write(self) -> None:
    fresh = self._file.with_suffix(".tmp")
    body = dict(self._head, trials=[dataclasses.asdict(t) for t in self.trials])
    try:
      with open(fresh, "w", encoding="utf-8") as f:
        f.write(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
      os.replace(fresh, self._file)
    except OSError as e:
      raise StorageError(f"{self._file} cannot be written: {e}. Free some space and run the same command again.") from e


def _show(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


class Study:
  """Says what to try next, and which trials not to end: Optuna's, in memory, told again what the journal holds.

  What the trial of a number tries depends on the seed, the number and the trials before it alone.
  """

  def __init__(self, what: Space):
    self._optuna, self._what = _optuna(), what
    o = self._optuna
    pruner = o.pruners.MedianPruner(n_startup_trials=what.startup) if what.prune == "median" else o.pruners.NopPruner()
    self._study = o.create_study(direction="maximize" if what.mode == "max" else "minimize", pruner=pruner)
    self._axes = {k: self._distribution(a) for k, a in what.axes.items()}
    self._grid = what.grid() if what.method == "grid" else []
    self._reported: set[tuple[int, int]] = set()

  def _distribution(self, axis: space.Axis) -> Any:
    d = self._optuna.distributions
    if not isinstance(axis, Range):
      return d.CategoricalDistribution(range(len(axis)))
    if axis.kind == "int":
      return d.IntDistribution(axis.low, axis.high)
    return d.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")

  def ask(self, number: int, values: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Returns (Optuna's trial, its values); `values` are those of a trial that was begun before."""
    samplers, seed = self._optuna.samplers, self._what.sampler_seed * 1_000_003 + number
    if self._what.method == "tpe":
      self._study.sampler = samplers.TPESampler(seed=seed, n_startup_trials=self._what.startup)
    else:
      self._study.sampler = samplers.RandomSampler(seed=seed)
    fixed = values or (self._grid[number] if self._grid else None)
    if fixed:
      self._study.enqueue_trial(self._encoded(fixed))
    asked = self._study.ask(self._axes)
    axes = self._what.axes
    return asked, {k: asked.params[k] if isinstance(a, Range) else a[asked.params[k]] for k, a in axes.items()}

  def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
    axes = self._what.axes
    place = lambda axis, x: next(i for i, y in enumerate(axis) if _plain(y) == _plain(x))
    return {k: x if isinstance(axes[k], Range) else place(axes[k], x) for k, x in values.items()}

  def report(self, asked: Any, evals: list[tuple[int, float]]) -> bool:
    """Takes all evaluations so far of the trial that `ask` gave, and says whether to end it."""
    for step, value in evals:
      if (asked.number, step) not in self._reported:
        self._reported.add((asked.number, step))
        asked.report(value, step)
    return bool(evals) and asked.should_prune()

  def tell(self, asked: Any, t: Trial) -> None:
    """Takes what became of the trial that `ask` gave."""
    self.report(asked, t.evals)
    states = self._optuna.trial.TrialState
    state = dict(done=states.COMPLETE, pruned=states.PRUNED).get(t.state, states.FAIL)
    self._study.tell(asked, t.metric if state == states.COMPLETE else None, state)


def _plain(x: Any) -> str:
  return json.dumps(x, default=list)


def _optuna() -> Any:
  try:
    import optuna
  except ImportError as e:
    raise InputError(
      "A sweep needs Optuna, which is an extra: pip install 'jaxft[sweep]' (or pip install optuna)."
    ) from e
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  return optuna


class Judge:
  """Stands in for a run's early stopping, and ends the run of a trial that is worse than the others."""

  def __init__(self, stop: loop.EarlyStop, steps: int, home: pathlib.Path, *, metric: str, worse: Callable):
    self._stop, self._steps, self._home, self._metric, self._worse = stop, steps, home, metric, worse
    self.metric = stop.metric

  def see(self, values: Mapping[str, float]) -> None:
    """Takes the values of an evaluation, which stand in the metrics of the run by then; raises Pruned."""
    self._stop.see(values)
    if self._metric in values:
      evals = trials.evals(self._home, self._metric)
      if self._worse(evals) and evals[-1][0] < self._steps:
        raise Pruned()

  @property
  def stopped(self) -> bool:
    return self._stop.stopped


class Sweep:
  """A sweep in the folder `home`; train(config, folder, way) is what makes one run."""

  def __init__(self, train: Callable, c: ConfigDict, what: Space, home: pathlib.Path):
    self._train, self._c, self._what, self._home = train, c, what, home
    self._journal = Journal(home / "sweep.journal", what, c)
    self.parts, self._study = Parts(), Study(what)

  @property
  def trials(self) -> list[Trial]:
    return self._journal.trials

  def best(self) -> Trial | None:
    return trials.best(self.trials, self._what.mode)

  def folder(self, t: Trial) -> pathlib.Path:
    return self._home / f"trial-{t.number:03d}"

  def run(self) -> None:
    """Runs the trials that are left; those that have ended are told to the study and not run again."""
    before = sum(t.state != "running" for t in self.trials)
    if before:
      log.info("Going on: %d of %d trials have ended.", before, self._what.trials)
    for number in range(self._what.trials):
      begun = self.trials[number] if number < len(self.trials) else None
      asked, values = self._study.ask(number, begun.values if begun else None)
      t = begun or Trial(number, values)
      if not begun:
        self.trials.append(t)
      if t.state == "running":
        if not self._repeated(t):
          self._one(t, asked)
        self._journal.write()
        self._tidy()
        trials.write(self._home, self.trials)
      self._study.tell(asked, t)

  def _repeated(self, t: Trial) -> bool:
    """Says whether an earlier trial had the same values, and takes over what became of it."""
    for other in self.trials[: t.number]:
      if _plain(other.values) == _plain(t.values):
        t.__dict__.update(vars(other), number=t.number, seconds=0.0, note=f"the same as trial {other.number}")
        log.info("trial %d is the same as trial %d and is not run.", t.number, other.number)
        return True
    return False

  def _one(self, t: Trial, asked: Any) -> None:
    """Runs a trial, or goes on with it, and notes what became of it."""
    metric = self._what.metric
    c = space.put(copy.deepcopy(self._c), {**t.values, "save.best": metric, "save.mode": self._what.mode})
    judge = functools.partial(Judge, metric=metric, worse=lambda evals: self._study.report(asked, evals))
    way = setup.Way(self.parts.of(c), tuple(self._what.axes), judge, export=False, logging=_logging)
    folder, made, began = self.folder(t), self.parts.made.get("program", 0), time.monotonic()
    new = not folder.exists()
    self._journal.write()
    try:
      self._train(c, str(folder), way)
      t.state = "done"
    except Pruned:
      t.state = "pruned"
    except NumbersError as e:
      t.state, t.note = "failed", str(e)
    except InputError as e:
      if new:
        self._forget(t)
      raise InputError(f"trial {t.number} ({t.says()}): {e}") from e
    finally:
      _logging(self._home)
    t.seconds = time.monotonic() - began
    t.take(trials.evals(folder, metric), self._what.mode)
    if t.state == "pruned":
      (folder / setup.DONE).write_text(json.dumps(dict(ended="pruned", step=t.evals[-1][0])) + "\n")
    self._say(t, "compiled" if self.parts.made.get("program", 0) > made else "reused")

  def _forget(self, t: Trial) -> None:
    """Removes a trial that was refused before its first step, so that a mended command can go on."""
    shutil.rmtree(self.folder(t), ignore_errors=True)
    self.trials.remove(t)
    if self.trials:
      self._journal.write()
    else:
      self._journal.remove()

  def _say(self, t: Trial, how: str) -> None:
    best, left = self.best(), self._what.trials - t.number - 1
    took = [x.seconds for x in self.trials if x.seconds]
    parts = [f"trial {t.number}: {t.says()}", f"{trials.short(self._what.metric)} {trials.value(t.metric)}"]
    parts[-1] += "" if t.step is None else f" at step {t.step}"
    parts += [t.state, observe.duration(t.seconds), f"step {how}"]
    parts += [f"best is trial {best.number}, {trials.value(best.metric)}"] if best else []
    parts += [f"{left} left, about {observe.duration(left * sum(took) / len(took))}"] if left else []
    log.info("%s", "  ".join(parts))
    if t.state == "failed":
      log.info("trial %d failed: %s", t.number, t.note)

  def _tidy(self) -> None:
    """Removes the checkpoints of all trials that have ended but the best."""
    best = self.best()
    for t in self.trials if self._what.keep == "best" else ():
      if t.state != "running" and t is not best:
        shutil.rmtree(self.folder(t) / "checkpoints", ignore_errors=True)

  def finish(self) -> Trial:
    """Writes tables, pictures and the best model; returns the best trial. Raises NumbersError where there is none."""
    self._tidy()
    trials.write(self._home, self.trials)
    best = self.best()
    trials.picture(self._home, self.trials, self._what)
    log.info("%s", trials.table(self.trials, self._what))
    log.info("Steps compiled: %d for %d trials.", self.parts.made.get("program", 0), len(self.trials))
    if best is None:
      raise NumbersError(
        f"None of the {len(self.trials)} trials ended with a finite {self._what.metric}; sweep.jsonl in {self._home} "
        "says what became of each. Lower optimizer.lr."
      )
    self._export(best)
    log.info("Best: trial %d, %s. The model: %s", best.number, best.says(), self._home / "best" / "export")
    log.info("All trials: %s", self._home / "sweep.html")
    return best

  def _export(self, best: Trial) -> None:
    """Writes RUNS/best: config.json, trial.json and export/; nothing where it is there already."""
    target, fresh, told = self._home / "best", self._home / ".best", dataclasses.asdict(best)
    if (target / "trial.json").exists() and json.loads((target / "trial.json").read_text()) == told:
      return
    c, m, checkpointer = runs.run(str(self.folder(best)))
    with contextlib.closing(checkpointer):
      params = runs.weights(m, checkpointer, runs.pick(checkpointer, "best"))
    shutil.rmtree(fresh, ignore_errors=True)
    export.write(m, params, fresh / "export", **setup.export_options(c))
    shutil.copy(self.folder(best) / "config.json", fresh / "config.json")
    (fresh / "trial.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _logging(home: pathlib.Path, main: bool = True) -> None:
  """As observe.setup_logging, with the messages of the runs in their log.txt alone."""
  root = logging.getLogger()
  for handler in root.handlers:
    if isinstance(handler, logging.FileHandler) and getattr(handler, "jaxft", False):
      handler.close()
  observe.setup_logging(home, main=main)
  for handler in root.handlers:
    if getattr(handler, "jaxft", False) and not isinstance(handler, logging.FileHandler):
      handler.addFilter(lambda record: record.name == log.name or record.levelno >= logging.WARNING)


def run(train: Callable, c: ConfigDict, given: str, folder: str) -> Sweep:
  """Sweeps `given` (a file or a line, see jaxft/space.py) around the config `c` in `folder`, or goes on there.

  train(config, folder, way) is `jaxft.main.train`.
  """
  cluster.join()
  if jax.process_count() > 1:
    raise InputError("A sweep runs in one process; start one on a machine of its own, or train each config by itself.")
  what = space.read(given, config.check(c))
  home = workdir.probe(workdir.path(folder))
  _logging(home)
  with workdir.Lock(home):
    sweep = Sweep(train, c, what, home)
    log.info("%d trials by %s over %s; the best %s of %s counts.", what.trials, what.method, ", ".join(what.axes),
             what.mode, what.metric)  # fmt: skip
    sweep.run()
    sweep.finish()
  return sweep
