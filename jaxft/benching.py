"""Measures training as it runs: a config, for some steps, through the loop of jaxft.main, with its data or without."""

import contextlib
import importlib.metadata
import itertools
import logging
import pathlib
import resource
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxft import config, display, flops, kinds, modeling, observe, setup, sharding, trees
from jaxft.config import Reader
from jaxft.errors import InputError
from jaxft.planning import build
from jaxft.train import loop, losses, step

log = logging.getLogger("jaxft")
COMPILING = (  # of jax.monitoring: what is done between the first call of a function and its start
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)
KEPT = "/jax/compilation_cache/cache_hits"
PACKAGES = ("jaxft", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy")
NONE = "none"  # for --save_to


class Ready(NamedTuple):
  """What a run is made of."""

  model: modeling.Model
  trainer: setup.Trainer
  plan: loop.Plan
  stream: Any  # (start, stop) -> (step, rows of this process)
  samples: Any  # step from 0 -> examples of its batch, over all processes
  params: Any  # () -> parameters
  checkpointer: Any  # () -> what writes checkpoints


class _NoSaves:
  """In place of a checkpointer, while steps are measured."""

  best, mode, folder = "", "min", ""

  def save(self, *_: Any, **__: Any) -> bool:
    return False

  def annotate(self, *_: Any, **__: Any) -> None: ...

  def poll(self) -> None: ...

  def wait(self) -> None: ...


class _Compiler:
  """Seconds that JAX takes for tracing and compiling while it is switched on, and whether a program had been kept."""

  def __init__(self):
    self.seconds, self.kept, self.on = 0.0, False, False
    jax.monitoring.register_event_duration_secs_listener(self._took)
    jax.monitoring.register_event_listener(self._hit)

  def _took(self, event: str, seconds: float, **_: Any) -> None:
    self.seconds += seconds if self.on and event in COMPILING else 0.0

  def _hit(self, event: str, **_: Any) -> None:
    self.kept = self.kept or (self.on and event == KEPT)


def measure(
  c: ConfigDict, home: pathlib.Path, *, steps: int, warmup: int, synthetic: bool, save_to: str, began: float
) -> dict[str, Any]:
  """Trains `steps` steps of `c` after `warmup` and returns what they took.

  home: an empty folder. synthetic: fresh weights and full rows of random tokens, for which no data, tokenizer and
  TensorFlow are needed. save_to: folder for one checkpoint, or "none". began: of the process (time.time()).
  """
  c = _only_steps(c, warmup + steps)
  compiler = _Compiler()
  ready = (_synthetic if synthetic else _real)(Reader(c), home)
  t, sharded = ready.trainer, setup.put(ready.model, c.batch)
  ends: dict[int, float] = {}  # when steps 1 and `warmup` had left the device, which is waited for only there
  calls = itertools.count(1)

  def stepper(state, batch):
    i = next(calls)
    compiler.on = i == 1
    state, metrics = t.step(state, batch)
    compiler.on = False
    if i in (1, warmup):
      jax.block_until_ready((state, metrics))
      ends[i] = time.time()
    return state, metrics

  observer = observe.Observer(home, start=0, steps=t.steps, tensorboard=False, main=jax.process_index() == 0)
  never = loop.EarlyStop(metric="", mode="min", patience=0, min_delta=0.0)
  try:
    state = step.init_state(ready.params(), c.seed, t.tx, t.abstract)
    with loop.Signals() as signals:
      outcome = loop.train(
        stepper, state, ready.stream, ready.plan, put=sharded, examples=lambda i: (), evaluators=(), stop=never,
        checkpointer=_NoSaves(), observer=observer, signals=signals, evals=[])  # fmt: skip
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise InputError(
      f"bench: it does not fit into the memory of {jax.devices()[0].device_kind}: {str(e).splitlines()[0]} A larger "
      "--config.micro, --config.model.remat=block or a smaller batch may; python -m jaxft.plan says what would."
    ) from e
  finally:
    observer.close()
  ends[t.steps] = time.time()  # the loop has read the metrics of the last step
  rows, peak = observe.read_metrics(home), _memory()
  seconds = dict(compile_seconds=compiler.seconds, compile_kept=compiler.kept, first_step_seconds=ends[1] - began)
  return (
    _facts(ready, c)
    | _rates(rows, ends[t.steps] - ends[warmup], warmup, ready)
    | seconds
    | peak
    | _saves(ready, outcome, save_to)
  )


def _only_steps(c: ConfigDict, steps: int) -> ConfigDict:
  """Returns a copy of `c` for so many steps and nothing else: every step is logged, one save comes at the end."""
  c = config.check(ConfigDict(c))
  c.steps, c.evals = steps, ConfigDict()
  c.log.every, c.log.tensorboard = 1, False
  c.save.every, c.save.minutes, c.save.best = 0, 0.0, ""
  return c


def _real(c: Reader, home: pathlib.Path) -> Ready:
  source = modeling.source(c)
  data = setup.training_data(c, source)
  m = setup.model_for(c, source, data)
  batches = setup.batches(c, data, m)
  t = setup.trainer(c, m, data, c.steps)
  host, hosts = setup.feed(m, c.batch)
  return Ready(
    m, t, setup.plan(c, t, batches, m), lambda a, b: batches.stream(a, b, host, hosts),
    lambda i: len(batches.example_ids(i)), lambda: modeling.load(m, c.seed, fresh=True),
    lambda: setup.checkpointer(c, home, m, data))  # fmt: skip


def _synthetic(c: Reader, home: pathlib.Path) -> Ready:
  source, said = build.model_source(c)
  found, more = build.facts(c, source)
  m = setup.model_for(c, source, found)
  spec, third = build.batch_spec(c, m, found)
  for line in (*said, *more, *third):
    log.info("assumed: %s", line)
  sharding.check_batch(m.mesh, m.rules, c.batch, c.micro)
  t = setup.trainer(c, m, found, c.steps)
  host, hosts = setup.feed(m, c.batch)
  rows = build.made_up(m, spec)
  own = {k: x[host::hosts] for k, x in rows.items()}
  peak, where = flops.peak(jax.devices()[0], m.skeleton.dtype)
  log.info("Peak of a device: %.3g FLOP/s (%s).", peak, where)
  work, examples = t.flops(spec), spec["label_weights"][0][1] if "label_weights" in spec else 1
  plan = loop.Plan(
    steps=t.steps, epoch_steps=t.steps, log_every=1, save_every=0, save_minutes=0.0, skip=c.numbers.skip,
    flops=lambda _: work, peak=peak * jax.device_count(),
    unit="examples" if kinds.task(c).kind in losses.OF_EXAMPLES else "target_tokens")  # fmt: skip
  return Ready(
    m, t, plan, lambda a, b: ((i, own) for i in range(a, b)), lambda i: c.batch * examples,
    lambda: step.init_params(m.skeleton.init, c.seed, m.shardings),
    lambda: setup.checkpointer(c, home, m, Named(home)))  # fmt: skip


class Named(NamedTuple):
  """Stands for a store of examples where a checkpoint asks for its name."""

  folder: pathlib.Path


def _saves(ready: Ready, outcome: loop.Outcome, save_to: str) -> dict[str, float | None]:
  """Returns seconds for which a checkpoint stops training, and until it is on the disk; a first one warms up."""
  unknown = dict(save_stall_seconds=None, save_seconds=None)
  if save_to == NONE:
    return unknown
  need, free = trees.nbytes(outcome.state) / jax.process_count(), shutil.disk_usage(save_to).free
  if free < 2.2 * need:
    log.warning(
      "No checkpoint is measured: two take %s and %s has %s left. Give another --save_to.",
      display.size(2 * need), save_to, display.size(free))  # fmt: skip
    return unknown
  with contextlib.closing(ready.checkpointer()) as checkpointer:
    for i in range(2):
      began = time.perf_counter()
      checkpointer.save(outcome.step + i, outcome.state, metrics={}, extra={})
      stall = time.perf_counter() - began
      checkpointer.wait()
      whole = time.perf_counter() - began
  return dict(save_stall_seconds=stall, save_seconds=whole)


def _facts(ready: Ready, c: ConfigDict) -> dict[str, Any]:
  m, devices = ready.model, jax.devices()
  return dict(
    device=devices[0].device_kind, devices=len(devices),
    process=jax.process_index(), processes=jax.process_count(), mesh=dict(m.mesh.shape),
    parameters=trees.count(m.skeleton.shapes), rows=c.batch, micro=c.micro, dtype=m.skeleton.dtype.name,
    state_bytes=trees.nbytes(ready.trainer.abstract), flops_a_step=ready.plan.flops(0), peak_flops=ready.plan.peak,
    unit=ready.plan.unit)  # fmt: skip


def _rates(rows: Sequence[Mapping[str, Any]], whole: float, warmup: int, ready: Ready) -> dict[str, Any]:
  """Returns rates over the measured steps, which took `whole` seconds, the middle step and the spread of steps."""
  timed = [r for r in rows if r["step"] > warmup and "step_time" in r]
  each, unit = sorted(r["step_time"] for r in timed), ready.plan.unit
  rate = lambda name: sum(r[name] * r["step_time"] for r in timed) / whole
  samples = sum(ready.samples(r["step"] - 1) for r in timed)
  work = sum(ready.plan.flops(r["step"] - 1) for r in timed)
  return dict(
    steps=len(timed),
    step_seconds=statistics.median(each),
    step_low=each[len(each) // 10],
    step_high=each[-1 - len(each) // 10],
    samples_per_second=samples / whole,
    tokens_per_second=rate("tokens_per_second"),
    padded_tokens_per_second=rate("padded_tokens_per_second"),
    target_tokens_per_second=rate("target_tokens_per_second") if unit == "target_tokens" else None,
    mfu=work / whole / ready.plan.peak if ready.plan.peak else None,
    data_wait=rate("data_wait"),
    loss=timed[-1]["loss"],
  )


def _memory() -> dict[str, Any]:
  """Returns the highest use of a device's memory, or where the devices are the CPU, of the process."""
  stats = [d.memory_stats() for d in jax.local_devices()]
  if all(s and "peak_bytes_in_use" in s for s in stats):
    return dict(peak_bytes=max(s["peak_bytes_in_use"] for s in stats), peak_of="device")
  status = pathlib.Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  high = [int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")]
  return dict(peak_bytes=high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, peak_of="process")


# ---- what people read


def summary(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
  """Returns for each case the medians over its rounds; cases after the first have the ratio of their samples a second
  to the first's, round by round, as (median, lowest, highest)."""
  out, base = {}, next(iter(rounds.values()), ())
  for name, found in rounds.items():
    out[name] = dict(found[0])
    for key, value in found[0].items():
      numbers = [r[key] for r in found]
      if isinstance(value, float) and None not in numbers and key not in ("compile_seconds", "first_step_seconds"):
        out[name][key] = statistics.median(numbers)
    if len(base) == len(found) and found is not base:
      ratios = sorted(a["samples_per_second"] / b["samples_per_second"] for a, b in zip(found, base))
      out[name]["ratio"] = (statistics.median(ratios), ratios[0], ratios[-1])
  return out


def table(found: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> str:
  """Returns one line a case, at most 100 columns where the names are short, and what the columns are."""
  several = any("ratio" in r for r in found.values())
  header = ["", "ms/step", "/s", "tok/s", "padded", "target", "MFU", "peak", "compile", "data", "save"]
  lines = []
  for i, r in enumerate(found.values(), 1):
    target, stall = r["target_tokens_per_second"], r["save_stall_seconds"]
    row = [
      str(i), f"{1e3 * r['step_seconds']:,.4g}", display.si(r["samples_per_second"]),
      display.si(r["tokens_per_second"]), display.si(r["padded_tokens_per_second"]),
      "-" if target is None else display.si(target),
      f"{100 * r['mfu']:.1f}%" if r["mfu"] else "-", f"{r['peak_bytes'] / 2**30:,.1f}G",
      f"{r['compile_seconds']:.0f}s{'*' if r['compile_kept'] else ''}", f"{r['data_wait']:.0%}",
      "-" if stall is None else f"{stall:.2f}s"]  # fmt: skip
    lines.append(row)
  out = [f"  {name}: {why}" for name, why in failed.items()]
  if found:
    first = next(iter(found.values()))
    title = f"{first['devices']} x {first['device']}, jax {importlib.metadata.version('jax')}"
    said = lambda r: "  {:.2f} ({:.2f}-{:.2f}) of 1".format(*r["ratio"]) if "ratio" in r else ""
    wide = max(map(len, found))
    named = [f"  {i}  {name:<{wide}}{said(r)}".rstrip() for i, (name, r) in enumerate(found.items(), 1)]
    out = [display.table(title, header, lines), "", *named, "", *_legend(found, several), *out]
  return "\n".join(out)


def _legend(found: Mapping[str, Mapping[str, Any]], several: bool) -> list[str]:
  of = next(iter(found.values()))["peak_of"]
  out = [
    "  ms/step: the median step; /s: examples a second; tok/s: real tokens, padded: all places of a batch, target:",
    f"  tokens that the loss is over; peak: memory of a {of}; data: share of time spent waiting for data;",
    "  save: seconds for which a checkpoint stops training.",
  ]
  if several:
    out.append("  of 1: examples a second divided by those of 1, median (range) over the rounds.")
  if any(r["compile_kept"] for r in found.values()):
    out.append("  *: read in part from the cache of an earlier run.")
  return out
