"""Plans that were made before: figures by all that they follow from."""

import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import jaxft
from jaxft import observe
from jaxft.planning import estimate

log = logging.getLogger("jaxft")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax")


def folder() -> pathlib.Path:
  return pathlib.Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "plans"


def key(*parts: Any) -> str:
  """Returns what names a plan: `parts`, jaxft's own source and the versions of what compiles."""
  digest = hashlib.sha256(json.dumps([parts, observe.versions(*PACKAGES)], sort_keys=True, default=str).encode())
  root = pathlib.Path(jaxft.__file__).parent
  for file in sorted(root.rglob("*.py")):
    digest.update(file.read_bytes())
  return digest.hexdigest()[:24]


def get(name: str) -> estimate.Estimate | None:
  file = folder() / f"{name}.json"
  try:
    return estimate.from_json(json.loads(file.read_text(encoding="utf-8")))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError) as e:
    log.warning("The plan in %s cannot be read (%s); it is made again.", file, e)
    return None


def put(name: str, found: estimate.Estimate) -> None:
  try:
    folder().mkdir(parents=True, exist_ok=True)
    part = folder() / f".{name}.{os.getpid()}"
    part.write_text(json.dumps(estimate.to_json(found), indent=1), encoding="utf-8")
    part.replace(folder() / f"{name}.json")
  except OSError as e:
    log.warning("The plan is not kept: %s cannot be written (%s).", folder(), e)
