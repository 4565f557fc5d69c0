"""Run folders as their readers see them: the model training left there, its checkpoints, and which of them to take."""

import json
import logging
import pathlib
from typing import Any

import jax

from jaxft import config, setup, sharding, trees
from jaxft.config import Reader
from jaxft.errors import InputError
from jaxft.train import checkpoint

log = logging.getLogger("jaxft")


def keep(m: setup.Model, home: pathlib.Path) -> None:
  """Writes what a reader of the run needs beside the weights into home/model: the config.json files, the tokenizer."""
  folder = home / setup.MODEL
  folder.mkdir(exist_ok=True)
  m.tokenizer.save(folder)
  for name, value in (("generation_config.json", setup.generation_config(m)), ("config.json", m.skeleton.json)):
    (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def run(folder: str, dtype: str = "auto") -> tuple[Reader, setup.Model, checkpoint.Checkpointer]:
  """Returns config, model and checkpoints of an existing run folder, for reading; `dtype` auto is that of the run.

  Where the run's mesh does not fit the devices here, the default mesh takes its place.
  """
  home = pathlib.Path(folder).absolute()  # Orbax takes absolute paths only
  if not (home / "config.json").exists() or not (home / setup.MODEL).exists():
    raise InputError(
      f"{folder} is not a run folder: it has no config.json and {setup.MODEL}/, which training writes at its start."
    )
  given = config.from_json((home / "config.json").read_text())
  if dtype != "auto":
    given.model.dtype = dtype
  try:
    sharding.make_mesh(given.mesh)
  except InputError:
    given.mesh = config.base().mesh
    log.info("The run's mesh does not fit the %d devices here; the default mesh is taken.", jax.device_count())
  c = Reader(given)
  s = c.save
  reader = checkpoint.Checkpointer(
    str(home / "checkpoints"), keep=s.keep, best=s.best, mode=s.mode, facts={}, write=False
  )
  return c, setup.model(c, home), reader


def pick(checkpointer: checkpoint.Checkpointer, which: str) -> int:
  """Returns the step that `which` (best, latest or a number) names; without a metric for it, best is the latest."""
  steps = checkpointer.steps()
  if not steps:
    raise InputError(f"{checkpointer.folder} has no checkpoint yet.")
  if which in ("best", "latest"):
    best = checkpointer.best_step() if which == "best" else None
    return steps[-1] if best is None else best
  if not which.isdigit() or int(which) not in steps:
    raise InputError(f"--checkpoint={which}: it is best, latest or one of the steps {', '.join(map(str, steps))}.")
  return int(which)


def weights(m: setup.Model, checkpointer: checkpoint.Checkpointer, step: int) -> Any:
  """Returns the parameters of a checkpoint, trained and frozen ones together, without the optimizer's state."""
  have = checkpointer.meta(step)["leaves"]
  shapes = trees.map_with_path(
    lambda _, x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), m.skeleton.shapes, m.shardings
  )
  flat = trees.flatten(shapes)
  parts = {
    name: trees.unflatten({p: x for p, x in flat.items() if f"{name}/{p}" in have}) for name in ("params", "frozen")
  }
  found = checkpointer.restore({k: v for k, v in parts.items() if v}, step, partial=True)[0]
  params = trees.merge(found.get("params", {}), found.get("frozen", {}))
  wrong = trees.differences(shapes, params)
  if wrong:
    raise InputError(f"checkpoint {step} of {checkpointer.folder} is not of this model: {'; '.join(wrong[:8])}.")
  return params


def for_decoding(name: str, which: str, dtype: str) -> tuple[setup.Model, Any, str]:
  """Returns (model, weights, input template) of a run folder or of a Hugging Face folder or Hub id (template "")."""
  home = pathlib.Path(name)
  if (home / setup.MODEL / "config.json").exists():
    c, m, checkpointer = run(name, dtype)
    return m, weights(m, checkpointer, pick(checkpointer, which)), c.task["input"]
  c = config.base()
  c.model.init, c.model.dtype = name, dtype
  c.model.params_dtype = setup.activations(dtype).name
  m = setup.model(Reader(c))
  return m, setup.load(m, 0), ""


def answer_length(m: setup.Model, given: dict) -> dict:
  """Returns `given` with a length, where neither it nor the model's own generation_config.json has one."""
  own = setup.generation_config(m)
  if given.get("length") is None and not {"max_new_tokens", "max_length"} & own.keys():
    log.info("The model names no length for its answers; at most 256 new tokens (--max_new_tokens).")
    return {**given, "length": 256}
  return given
