"""Plans: a config and a target, compiled (or remembered), with what to change where it does not fit."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxft import config
from jaxft.config import Reader
from jaxft.planning import build, cache, estimate, ladder, targets

log = logging.getLogger("jaxft")


class Decode(NamedTuple):
  """What is planned where it is not training: prompts of `length` tokens, `new_tokens` written for each."""

  batch: int
  length: int
  new_tokens: int
  beams: int


class Plan(NamedTuple):
  estimate: estimate.Estimate
  change: ladder.Change | None  # that makes it fit
  after: estimate.Estimate | None  # figures with the change


def one(c: ConfigDict, target: targets.Target, decode: Decode | None = None) -> estimate.Estimate:
  """Returns the figures of a config on a target, from the cache where nothing that they follow from has changed."""
  reader = Reader(c)
  source, _ = build.model_source(reader)
  name = cache.key(config.to_json(c), source.json, target.name, decode)
  found = cache.get(name)
  if found:
    log.info("%s: figures of an earlier plan (%s).", target.name, cache.folder() / f"{name}.json")
    return found
  devices = targets.devices(target)
  built = build.decoder(reader, devices, **decode._asdict()) if decode else build.train_step(reader, devices)
  log.info("%s: compiling for %d x %s ...", target.name, target.devices, devices[0].device_kind)
  made = estimate.make(built, target, devices[0])
  cache.put(name, made)
  return made


def plan(c: ConfigDict, target: targets.Target, decode: Decode | None = None, trials: int = 4) -> Plan:
  """Returns the plan of a config; where it does not fit, `trials` changes of the ladder are compiled at most."""
  found = one(c, target, decode)
  if found.fits or decode or not trials:
    return Plan(found, None, None)
  ways = math.prod(found.mesh.get(a, 1) for a in _axes(c))
  better = ladder.climb(c, found, ways, lambda new: one(new, target), trials)
  return Plan(found, *(better or (None, None)))


def _axes(c: ConfigDict) -> Sequence[str]:
  axes = c.rules.get("batch", ())
  return (axes,) if isinstance(axes, str) else tuple(axes or ())
