"""What to change in a config that does not fit: the cheapest change first, compiled before it is said to fit."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxft.planning import estimate

log = logging.getLogger("jaxft")
SLACK = 0.97  # of the memory that a predicted change may fill
SAVED = dict(
  none=1.0, dots=0.6, attention=0.25, block=0.15, offload=0.08
)  # of the activations of a layer stay, about; what is compiled decides


STATE = dict(adamw=1.0, muon=0.6, lion=0.5, adamw_8bit=0.27, adafactor=0.02)  # of an optimizer beside AdamW's, about
ADAPTERS = dict(rank=16, share=0.02)  # what is proposed, and what of the parameters that is, about


@dataclasses.dataclass(frozen=True)
class Change:
  """Flags that change a config."""

  flags: tuple[tuple[str, Any], ...]  # (path in the config, value)
  cost: str  # what it costs, for people
  same: bool  # the numbers of the run stay what they were

  def apply(self, c: ConfigDict) -> ConfigDict:
    out = c.copy_and_resolve_references()
    with out.unlocked():
      for path, value in self.flags:
        *groups, last = path.split(".")
        group = out
        for name in groups:
          group = group[name]
        group[last] = value
    return out

  def text(self) -> str:
    return " ".join(f"--config.{path}={value}" for path, value in self.flags)


def changes(c: ConfigDict, ways: int) -> Iterator[Change]:
  """Yields the changes in the order of what they cost; `ways`: parts that the rows of a batch are split into.

  First those that leave every number as it is: shards of the parameters on all devices, more micro-batches, more
  computed again. Then those that do not, with as many micro-batches as there are and with as many as can be (which
  hold a second gradient).
  """
  whole = c.mesh.get("data", 1) not in (1,) and "fsdp" in c.mesh
  shard = (("mesh.data", 1), ("mesh.fsdp", -1)) if whole else ()
  micros = [m for m in (c.micro * 2**i for i in range(16)) if c.batch % (m * ways) == 0]
  more = tuple(SAVED)[tuple(SAVED).index(c.model.remat) :]
  costs = dict(
    none="", dots="about a tenth more arithmetic", attention="about a quarter more arithmetic",
    block="about a third more arithmetic",
    offload="about a third more arithmetic, and activations move to the host's memory and back")  # fmt: skip
  for sharded in ((), shard) if shard else ((),):
    for remat in more:
      for micro in micros:
        flags = list(sharded)
        flags += [("micro", micro)] if micro != c.micro else []
        flags += [("model.remat", remat)] if remat != c.model.remat else []
        cost = ["parameters are gathered over the network"] if sharded else []
        cost += [costs[remat]] if remat != c.model.remat else []
        cost += [f"{micro} passes, of fewer rows each"] if micro != c.micro else []
        if flags:
          yield Change(tuple(flags), "; ".join(cost), True)
  block = (("model.remat", "block"),) if c.model.remat in ("none", "dots", "attention") else ()
  passes = lambda n: (("micro", n),) if n != c.micro else ()
  tails = dict.fromkeys((*shard, *passes(n), *block) for n in (c.micro, micros[-1]))
  yield from (Change((*tail, *flags), cost, False) for flags, cost in _others(c) for tail in tails)
  smaller = c.batch // 2
  while smaller >= ways and smaller % ways == 0:
    yield Change((("batch", smaller), *shard, *passes(smaller // ways), *block), "a smaller batch", False)
    smaller //= 2


def _others(c: ConfigDict) -> Iterator[tuple[tuple, str]]:
  """Yields (flags, cost) of what makes another model of the same run: the nearest to it first."""
  half = (("model.params_dtype", "bfloat16"),) if c.model.params_dtype == "float32" else ()
  bytes_ = (("optimizer.name", "adamw_8bit"),) if c.optimizer.name == "adamw" else ()
  rounded = "weights in bfloat16, rounded stochastically"
  if bytes_:
    yield bytes_, "the moments of AdamW in a byte each"
  if half:
    yield half, rounded
  if half and bytes_:
    yield (*half, *bytes_), f"{rounded}, and the moments of AdamW in a byte each"
  if c.optimizer.name != "adafactor":
    yield (("optimizer.name", "adafactor"),), "another optimizer, which needs its own lr"
  if not c.lora.rank:
    frozen = (("model.frozen_dtype", "bfloat16"),) if not c.model.frozen_dtype and half else ()
    yield (("lora.rank", ADAPTERS["rank"]), *frozen), "adapters learn in place of the weights, at a larger lr"


def predicted(first: estimate.Estimate, c: ConfigDict, change: Change, ways: int) -> float:
  """Returns about how many bytes a device needs after a change, from the figures before it."""
  new, m = change.apply(c), first.memory
  shards = math.prod(v for k, v in first.mesh.items() if k != "data") if first.mesh else 1
  held = m["parameters"] + m["frozen"] + m["optimizer"]
  if any(path == "mesh.data" for path, _ in change.flags):
    held *= shards / first.devices
  share = held / max(m["parameters"] + m["frozen"] + m["optimizer"], 1)  # what more shards leave of it
  moved = ADAPTERS["share"] if new.lora.rank and not c.lora.rank else 1.0
  held -= share * m["optimizer"] * (1 - moved * STATE[new.optimizer.name] / STATE[c.optimizer.name])
  if (new.model.params_dtype, new.model.frozen_dtype) != (c.model.params_dtype, c.model.frozen_dtype):
    held -= share * m["parameters"] / 2
  gradients = moved * m["gradients"] / (2 if c.micro > 1 else 1) * (2 if new.micro > 1 else 1)
  rows = (new.batch / new.micro) / (c.batch / c.micro)
  kept = SAVED[new.model.remat] / SAVED[c.model.remat]
  return held + gradients + (m["logits"] + m["activations"] * kept) * rows + m["batch"]


def climb(
  c: ConfigDict, first: estimate.Estimate, ways: int, compile_: Callable[[ConfigDict], estimate.Estimate], most: int
) -> tuple[Change, estimate.Estimate] | None:
  """Returns the cheapest change that fits, and its figures, after at most `most` compilations; None: none was found."""
  factor, tried = 1.0, 0  # the predictions are as wrong as the last one was
  for change in changes(c, ways):
    needed = predicted(first, c, change, ways) * factor
    if needed > first.limit * SLACK:
      continue
    if tried == most:
      log.info("Stopped after %d trials; what is left of the ladder was not tried.", most)
      return None
    tried += 1
    log.info("Trying %s (about %.1f GiB a device) ...", change.text(), needed / 2**30)
    found = compile_(change.apply(c))
    if found.fits:
      return change, found
    log.info("  it needs %.1f GiB.", found.total / 2**30)
    factor *= max(found.total / needed, 1.02)
  return None
