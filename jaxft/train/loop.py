"""The only training loop, and what it needs: signals, early stopping, evaluations, saves.

The host never waits for the step it has just started: it reads the metrics of an earlier one. It does wait, on purpose,
where the state of a step is wanted: before an evaluation and before a save.
"""

import collections
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft import observe
from jaxft.data.files import compact
from jaxft.errors import InputError, NumbersError, Preempted, StorageError, did_you_mean
from jaxft.train import checkpoint
from jaxft.train import step as train_step
from jaxft.train.prefetch import Prefetch, checked

Tree = Any
Evals = list[tuple[int, dict[str, float]]]  # (step, {"eval/NAME/metric": value}) of every evaluation so far
OPEN = 2  # steps started whose metrics have not been read


class Evaluator(Protocol):
  """Measures parameters: `every` that many steps (0: only at the end), with `start` before the first one too; `run`
  returns {metric: value} for the metrics that it `gives`."""

  name: str
  every: int
  start: bool
  gives: Sequence[str]

  def run(self, params: Tree, step: int) -> Mapping[str, float]: ...


@dataclasses.dataclass(frozen=True)
class Plan:
  """Numbers of a run. flops(step), step from 0, and peak FLOP/s count all devices together; 0: unknown."""

  steps: int
  epoch_steps: float  # optimizer steps of one epoch
  log_every: int
  save_every: int  # steps between two saves; 0: only by the clock and at the end
  save_minutes: float  # 0: never by the clock
  skip: int  # non-finite steps in a row that are passed over
  flops: Callable[[int], float]
  peak: float
  unit: str = "target_tokens"  # what the loss is divided by, or "examples"


@dataclasses.dataclass
class Outcome:
  state: train_step.TrainState
  step: int
  reason: str  # "done" or "early stop"
  evals: Evals


class EarlyStop:
  """Says stop once `patience` values of `metric` in a row were not better than the best by more than `min_delta`.

  A NaN is never better. patience 0: never stops. Its state follows from the values alone, so a resumed run sees them
  again.
  """

  def __init__(self, *, metric: str, mode: str, patience: int, min_delta: float):
    if mode not in ("min", "max") or patience < 0:
      raise InputError(
        f"stop: mode is {mode!r} and patience is {patience}; mode is 'min' or 'max', patience 0 or more."
      )
    self.metric, self._sign, self._patience, self._delta = metric, 1 if mode == "min" else -1, patience, min_delta
    self._best, self._without = math.inf, 0

  def see(self, values: Mapping[str, float]) -> None:
    """Takes the values of one evaluation, which may lack the metric."""
    if self.metric not in values:
      return
    value = self._sign * values[self.metric]
    if value < self._best - self._delta:
      self._best, self._without = value, 0
    else:
      self._without += 1

  @property
  def stopped(self) -> bool:
    return 0 < self._patience <= self._without


class Signals:
  """Turns SIGTERM and SIGINT into a request that the loop reads; inside `with`. A second one changes nothing.

  With several processes, JAX's preemption service agrees on one step for all (it takes SIGTERM for itself).
  """

  def __enter__(self) -> "Signals":
    self._got, self._old = 0, {}
    if threading.current_thread() is threading.main_thread():
      wanted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
      self._old = {s: signal.signal(s, self._handle) for s in wanted}
    return self

  def __exit__(self, *_) -> None:
    for s, old in self._old.items():
      signal.signal(s, old)

  def _handle(self, number: int, _: FrameType | None) -> None:
    # os.write, as logging inside a handler may interrupt logging.
    os.write(2, b"\njaxft: asked to stop; saving first.\n" if not self._got else b"\njaxft: still saving.\n")
    self._got = number

  def asked(self, step: int) -> bool:
    """Says whether to stop before the step after `step`; with several processes, all must ask at every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return bool(self._got)


class _Tail:
  """Steps that were started and whose metrics nobody has read yet."""

  def __init__(self, plan: Plan, observer: observe.Observer, examples: Callable[[int], Sequence[str]], bad: int):
    self._plan, self._observer, self._examples, self._bad, self._bad_steps = plan, observer, examples, bad, []
    self._waiting: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
    self.meter = observe.Meter(peak=plan.peak, unit=plan.unit)
    self._first = True

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    self._waiting.append((step, metrics))
    self.settle(OPEN)

  def settle(self, most: int) -> None:
    """Reads metrics, waiting for the device, until at most `most` steps are open; raises NumbersError."""
    while len(self._waiting) > most:
      step, metrics = self._waiting.popleft()
      self._read(step, {k: float(v) for k, v in jax.device_get(metrics).items()})

  def _read(self, step: int, values: dict[str, float]) -> None:
    weight, non_finite = values.pop("weight"), values.pop("non_finite")
    values.pop("bad", None)
    self.meter.done(step, weight, self._plan.flops(step - 1))
    self._bad, rates = self._bad + 1 if non_finite else 0, {}
    if self._first:
      observe.log.debug("the first step, with its compilation, took %.1f s", self.meter.seconds())
      self._first = False
      self.meter.reset()
    elif step % self._plan.log_every == 0 or step == self._plan.steps:
      rates = self.meter.read(self._plan.steps - step)
    if non_finite:
      self._passed_over(step, values)
    if step % self._plan.log_every == 0 or step in (1, self._plan.steps):
      epoch = step / self._plan.epoch_steps
      self._observer.log(step, {"epoch": epoch, "loss": values.pop("loss"), **values, "target_tokens": weight, **rates})

  def _passed_over(self, step: int, values: Mapping[str, float]) -> None:
    places = list(self._examples(step - 1))
    self._bad_steps = [*self._bad_steps, (step, places)][-self._bad :]
    what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
    observe.log.warning("Step %d is not finite (%s): no update. Its examples: %s", step, what, _some(places))
    observe.log.debug("all examples of step %d: %s", step, places)
    self._observer.log(step, {"non_finite_in_a_row": self._bad})
    if self._bad > self._plan.skip:
      told = "; ".join(f"step {s}: examples {_some(p)}" for s, p in self._bad_steps)
      raise NumbersError(
        f"Loss or gradient was not finite {self._bad} times in a row ({what}), more than numbers.skip="
        f"{self._plan.skip} allows. None of these updates was made. {told}. Look at these rows, lower optimizer.lr or "
        "raise optimizer.warmup; the last checkpoint is good. log.txt in the run folder names all the rows."
      )


def train(
  step_fn: Callable,
  state: train_step.TrainState,
  batches: Callable[[int, int], Iterable],
  plan: Plan,
  *,
  put: Callable[[Mapping], Mapping[str, jax.Array]],
  examples: Callable[[int], Sequence[str]],
  evaluators: Sequence[Evaluator],
  stop: EarlyStop,
  checkpointer: checkpoint.Checkpointer,
  observer: observe.Observer,
  signals: Signals,
  evals: Evals,
) -> Outcome:
  """Trains from `state.step` to the end of `plan`, or to `stop`; what it started with is saved and reported on the way.

  step_fn(state, batch) -> (state, metrics), compiled, may consume the state. batches(start, stop) yields (step, numpy
  rows), where step counts from 0; put places them on the devices; examples(step) says where they come from (file and
  line). evals: those of earlier processes, from the checkpoint's metadata. Raises Preempted after a signal,
  NumbersError, StorageError.
  """
  step = start = int(state.step)
  judge = _Judge(evaluators, stop, checkpointer.best, checkpointer.mode, evals, observer)
  tail = _Tail(plan, observer, examples, int(state.bad))
  saver = _Saver(checkpointer, plan, judge, observer)
  if step == 0:
    judge.run(state, step, plan.steps)
  with saver, Prefetch(batches(start, plan.steps), put) as stream:
    while step < plan.steps and not stop.stopped:
      if signals.asked(step):
        tail.settle(0)
        saver.before_leaving(state, step)
      asked = time.perf_counter()
      index, batch, real, padded = checked(next(stream, None), step)
      tail.meter.batch(step + 1, real, padded, time.perf_counter() - asked)
      state, metrics = step_fn(state, batch)
      step = index + 1
      tail.add(step, metrics)
      better = False
      if judge.due(step, plan.steps):
        tail.settle(0)
        better, seconds = judge.run(state, step, plan.steps)
        tail.meter.exclude(seconds)
      if better or saver.due(step):
        tail.settle(0)
        tail.meter.exclude(saver.save(state, step))
      checkpointer.poll()
  tail.settle(0)
  _, seconds = judge.run(state, step, step)
  saver.save(state, step, measured=bool(seconds))
  checkpointer.wait()
  return Outcome(state, step, "early stop" if stop.stopped and step < plan.steps else "done", judge.evals)


class _Judge:
  """Runs evaluators when they are due, once for each step, and knows what was best."""

  def __init__(
    self,
    evaluators: Sequence[Evaluator],
    stop: EarlyStop,
    best: str,
    mode: str,
    evals: Evals,
    observer: observe.Observer,
  ):
    self._evaluators, self._stop, self._observer = evaluators, stop, observer
    self._best, self._sign = best, 1 if mode == "min" else -1
    self.evals: Evals = [(s, dict(v)) for s, v in evals]
    self._done = {(s, k.split("/")[1]) for s, values in self.evals for k in values}
    known = [f"eval/{e.name}/{k}" for e in evaluators for k in e.gives]
    for key, metric in (("stop.metric", stop.metric), ("save.best", best)):
      if metric and metric not in known:
        raise InputError(
          f"config: {key} is {metric!r}, which none of the evaluations gives{did_you_mean(metric, known)}; they give "
          f"{', '.join(known) or 'nothing: evals is empty'}."
        )
    for _, values in self.evals:
      stop.see(values)

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the values measured at `step`."""
    return {k: v for s, values in self.evals if s == step for k, v in values.items()}

  def _to_run(self, step: int, last: int) -> list[Evaluator]:
    due = lambda e: step == last or (e.start if step == 0 else e.every and step % e.every == 0)
    return [e for e in self._evaluators if due(e) and (step, e.name) not in self._done]

  def due(self, step: int, last: int) -> bool:
    return bool(self._to_run(step, last))

  def run(self, state: train_step.TrainState, step: int, last: int) -> tuple[bool, float]:
    """Runs what is due at `step`; returns whether the best metric got better, and the seconds taken."""
    todo, values, began = self._to_run(step, last), {}, time.perf_counter()
    if not todo:
      return False, 0.0
    params = train_step.whole(state)
    for e in todo:
      since = time.perf_counter()
      found = {f"eval/{e.name}/{k}": float(v) for k, v in e.run(params, step).items()}
      values.update(found)
      self._done.add((step, e.name))
      self._observer.log(step, {**found, f"eval/{e.name}/seconds": time.perf_counter() - since})
      self._observer.note(
        "step %d  %s", step, "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in found.items())
      )
    # step 0 is never saved, so it does not count: the best of what can be exported is meant
    before = [self._sign * v[self._best] for s, v in self.evals if s and math.isfinite(v.get(self._best, math.nan))]
    now = self._sign * values.get(self._best, math.nan)
    self.evals.append((step, values))
    self._stop.see(values)
    better = math.isfinite(now) and all(now < b for b in before)
    if (
      self._stop.stopped and step != last
    ):  # this step turns out to be the last, so the others have their turn before its save
      better = self.run(state, step, step)[0] or better
    return better, time.perf_counter() - began


class _Saver:
  """Saves by step and by the clock; inside `with`, an error does not end the process before a running save is
  complete."""

  def __init__(self, checkpointer: checkpoint.Checkpointer, plan: Plan, judge: _Judge, observer: observe.Observer):
    self._checkpointer, self._plan, self._judge, self._observer = checkpointer, plan, judge, observer
    self._since = time.monotonic()

  def __enter__(self) -> "_Saver":
    return self

  def __exit__(self, kind: Any, *_) -> None:
    if kind is not None:
      try:
        self._checkpointer.wait()
      except StorageError as e:
        observe.log.warning("%s", e)  # the error that is on its way out came first

  def due(self, step: int) -> bool:
    if self._plan.save_every and step % self._plan.save_every == 0:
      return True
    # with several hosts a look at the clock costs a message
    if not self._plan.save_minutes or (jax.process_count() > 1 and step % self._plan.log_every):
      return False
    late = time.monotonic() - self._since >= 60 * self._plan.save_minutes
    if jax.process_count() > 1:
      late = bool(multihost_utils.broadcast_one_to_all(np.array(late)))  # clocks differ: the first host decides
    return late

  def save(self, state: train_step.TrainState, step: int, *, measured: bool = False) -> float:
    """Starts a save (none if `step` is saved already) and returns the seconds for which training stood still.

    measured: evaluations were run since; they are put into a checkpoint that is there already.
    """
    began = time.perf_counter()
    extra = dict(
      evals=[[s, {k: v if math.isfinite(v) else str(v) for k, v in values.items()}] for s, values in self._judge.evals]
    )
    if self._checkpointer.save(step, state, metrics=self._judge.metrics(step), extra=extra):
      observe.log.debug("saving step %d, training stood still for %.2f s", step, time.perf_counter() - began)
    elif measured:
      self._checkpointer.annotate(step, metrics=self._judge.metrics(step), extra=extra)
    self._since = time.monotonic()
    return time.perf_counter() - began

  def before_leaving(self, state: train_step.TrainState, step: int) -> None:
    """Saves, waits until the checkpoint is on the disk, and raises Preempted."""
    if step == 0:
      raise Preempted("Asked to stop before the first step; nothing is lost. Run the same command again.")
    self.save(state, step)
    self._checkpointer.wait()
    raise Preempted(
      f"Asked to stop; step {step} of {self._plan.steps} is saved. Run the same command again: it goes on from there."
    )


def evals_of(meta: Mapping[str, Any]) -> Evals:
  """Returns the evaluations that a checkpoint's metadata holds, for `train`."""
  return [(s, {k: float(v) for k, v in values.items()}) for s, values in meta["extra"]["evals"]]


def _some(places: Sequence[str]) -> str:
  return compact(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
