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
  computed again. Then those that do not.
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
  most = tuple(shard) + (("micro", micros[-1]), ("model.remat", "block"))
  if c.optimizer.name in ("adamw", "lion", "muon"):
    yield Change((*most, ("optimizer.name", "adafactor")), "another optimizer, which needs its own lr", False)
  if c.model.params_dtype == "float32":
    yield Change((*most, ("model.params_dtype", "bfloat16")), "weights in bfloat16 lose small updates", False)
  smaller = c.batch // 2
  while smaller >= ways and smaller % ways == 0:
    yield Change((("batch", smaller), *most[:-2], ("micro", smaller // ways), most[-1]), "a smaller batch", False)
    smaller //= 2


def predicted(first: estimate.Estimate, c: ConfigDict, change: Change, ways: int) -> float:
  """Returns about how many bytes a device needs after a change, from the figures before it."""
  new, m = change.apply(c), first.memory
  shards = math.prod(v for k, v in first.mesh.items() if k != "data") if first.mesh else 1
  held = m["parameters"] + m["frozen"] + m["optimizer"]
  if any(path == "mesh.data" for path, _ in change.flags):
    held *= shards / first.devices
  if new.optimizer.name != c.optimizer.name:
    held -= m["optimizer"] * 0.98
  if new.model.params_dtype != c.model.params_dtype:
    held -= m["parameters"] / 2
  gradients = m["gradients"] / (2 if c.micro > 1 else 1) * (2 if new.micro > 1 else 1)
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
