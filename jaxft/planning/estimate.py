"""What a compiled program needs and how long it will take, as figures: memory by kind, arithmetic, traffic, time."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import flops, trees
from jaxft.errors import InputError
from jaxft.planning import build, hlo, targets

Tree = Any
KERNEL = 0.5  # of a TPU's peak that splash attention reaches, about
KINDS = ("parameters", "frozen", "optimizer", "batch", "gradients", "logits", "activations")  # of memory
OUT_OF_MEMORY = (  # what the compilers say
  r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
  r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Figures of one program on one target; bytes and seconds are for a device and a call unless said otherwise."""

  target: str
  devices: int
  mesh: dict[str, int]
  compiled: bool  # False: the compiler refused it for want of memory, and what it would have said is missing
  memory: dict[str, float]  # kind, of KINDS -> bytes
  limit: float  # bytes of the device that a program can have; 0: unknown
  state: float  # bytes of the whole state over all devices, once
  parameters: int
  trained: int
  model_flops: float  # of a step over all devices, without what rematerialisation does again
  flops: float  # with it
  traffic: float  # bytes through the device's memory
  collectives: list[tuple[str, float, float]]  # (kind, how many, bytes)
  seconds: dict[str, float]  # arithmetic, memory, network, and compiler where it says one: lower bounds each
  step: float  # seconds that are expected; 0: unknown
  source: str  # of `step`
  tokens: int  # of a step, places of all rows, padding included
  rows: int
  peak: float  # FLOP/s of a device
  compile_s: float
  assumed: list[str]

  @property
  def total(self) -> float:
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return self.compiled and (not self.limit or self.total <= self.limit)

  @property
  def mfu(self) -> float:
    return self.model_flops / (self.step * self.peak * self.devices) if self.step and self.peak else 0.0


def make(of: build.Built, target: targets.Target, device: Any) -> Estimate:
  """Compiles a program for its target and returns its figures."""
  begun = time.monotonic()
  found, compiled, text = _compile(of)
  seconds = time.monotonic() - begun
  memory = _memory(of, found)
  peak = target.chip.peak if target.chip else flops.peak(device, of.model.skeleton.dtype)[0]
  module = hlo.read(text, loops=of.loops, devices=target.devices)
  times, step, source = _times(module, of.work / target.devices, of.attention / target.devices, peak, target, compiled)
  rows, places = _places(of.batch)
  return Estimate(
    target=target.name, devices=target.devices, mesh={k: int(v) for k, v in of.model.mesh.shape.items()},
    compiled=compiled, memory=memory, limit=targets.usable(target), state=float(trees.nbytes(of.state)),
    parameters=trees.count(of.model.skeleton.shapes),
    trained=trees.count(of.state.params) if of.train else 0, model_flops=of.flops, flops=of.work,
    traffic=module.bytes, collectives=_grouped(module.collectives), seconds=times, step=step, source=source,
    tokens=places if of.train else rows * of.loops, rows=rows, peak=peak, compile_s=seconds,
    assumed=list(of.assumed))  # fmt: skip


def _compile(of: build.Built) -> tuple[Mapping[str, float], bool, str]:
  """Returns (bytes of arguments and temporaries, whether it compiled, text of the module)."""
  lowered = build.lower(of)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    found = next((m for m in (re.search(p, str(e)) for p in OUT_OF_MEMORY) if m), None)
    if not found:
      raise InputError(f"plan: the compiler refuses this step: {' '.join(str(e).split())[:400]}") from e
    size = float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)]
    arguments = sum(map(local, jax.tree.leaves(of.args)))
    # the first message counts temporaries alone, the second everything
    return dict(arguments=arguments, temporaries=size - (0 if "temporaries" in str(e) else arguments)), False, ""
  m = compiled.memory_analysis()
  beside = max(m.output_size_in_bytes - m.alias_size_in_bytes, 0)  # outputs that take no argument's place
  held = dict(arguments=m.argument_size_in_bytes, temporaries=m.temp_size_in_bytes + beside)
  return held, True, compiled.as_text()


def local(x: jax.ShapeDtypeStruct) -> float:
  """Returns the bytes of the part of an array that a device holds."""
  shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
  return math.prod(shape) * np.dtype(x.dtype).itemsize


def _memory(of: build.Built, found: Mapping[str, float]) -> dict[str, float]:
  """Returns bytes by kind. Arguments are exact. What is temporary is attributed by shape: the gradient of what is
  trained (as the parameters are; where micro-batches are added up, float32 and twice), then one copy of the logits,
  then the rest."""
  held = lambda tree: float(sum(map(local, jax.tree.leaves(tree))))
  out = dict.fromkeys(KINDS, 0.0)
  if of.train:
    s = of.state
    out |= dict(parameters=held(s.params), frozen=held(s.frozen), optimizer=held(s.opt))
    f32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), s.params)
    out["gradients"] = 2 * held(f32) if of.micro > 1 else held(s.params)
  else:
    out["parameters"] = held(of.state)
  out["batch"] = max(found["arguments"] - out["parameters"] - out["frozen"] - out["optimizer"], 0.0)
  out["logits"] = of.logits
  rest = found["temporaries"]
  for kind in ("gradients", "logits"):
    out[kind] = min(out[kind], rest)
    rest -= out[kind]
  return out | dict(activations=rest)


def _places(batch: Mapping[str, tuple]) -> tuple[int, int]:
  """Returns (rows, places for tokens) of a batch: those of its sides together."""
  sides = [s for s in ("input", "target") if f"{s}_segments" in batch]
  shapes = [batch[f"{s}s"][0] for s in sides] or [batch["inputs"][0]]
  return shapes[0][0], sum(math.prod(s) for s in shapes)


def _times(
  module: hlo.Module, work: float, attention: float, peak: float, target: targets.Target, compiled: bool
) -> tuple[dict[str, float], float, str]:
  """Returns ({what: seconds it takes by itself}, seconds that are expected, what that follows from)."""
  chip = target.chip
  times = dict(arithmetic=work / peak if peak else 0.0)
  if chip is None or not compiled:
    return times, times["arithmetic"], "arithmetic at the device's peak: no step is faster"
  network = [(m, m.times * _seconds(m, target)) for m in module.collectives]
  waited = sum(t for m, t in network if m.waits)
  beside = sum(t for m, t in network if not m.waits)
  times |= dict(memory=module.bytes / chip.bandwidth, network=waited + beside)
  if module.cycles:
    times["compiler"] = module.cycles / chip.cores / chip.clock
    source = "the compiler's cycle counts, and the network where it waits"
    if module.kernels:  # of Pallas, which the compiler has no counts for
      times["kernels"] = attention / peak / KERNEL
      source += f"; attention kernels at {KERNEL:.0%} of the peak"
    busy = times["compiler"] + times.get("kernels", 0.0)
    return times, max(busy, beside) + waited, source
  best = max(times["arithmetic"], times["memory"], beside) + waited
  return times, best, "roofline: arithmetic, memory or network at full speed; no step is faster"


def _seconds(m: hlo.Moved, target: targets.Target) -> float:
  """Returns the seconds of one collective at the speed of the links (Austin et al. 2025, chapter 3)."""
  share = (m.group - 1) / max(m.group, 1)
  if m.kind == "collective-permute":  # one link each way, both at once
    return m.bytes / (2 * target.link / target.chip.links)
  if m.kind == "all-reduce":
    return 2 * m.bytes * share / target.link
  if m.kind == "reduce-scatter":  # `bytes` are of the part that is left
    return m.bytes * (m.group - 1) / target.link
  return m.bytes * share / target.link


def _grouped(moved: Sequence[hlo.Moved]) -> list[tuple[str, float, float]]:
  out: dict[str, list[float]] = {}
  for m in moved:
    n = out.setdefault(m.kind, [0.0, 0.0])
    n[0] += m.times
    n[1] += m.times * m.bytes
  return sorted(((k, *v) for k, v in out.items()), key=lambda x: -x[2])


def to_json(e: Estimate) -> dict:
  return dataclasses.asdict(e)


def from_json(found: dict) -> Estimate:
  return Estimate(**{**found, "collectives": [tuple(x) for x in found["collectives"]]})
