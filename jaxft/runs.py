"""Run folders as their readers see them: the model training left there, its checkpoints, and which of them to take."""

import contextlib
import json
import logging
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft import config, display, kinds, modeling, report, setup, sharding, trees
from jaxft.config import Reader
from jaxft.errors import InputError, NumbersError, StorageError
from jaxft.train import checkpoint, loop, workdir
from jaxft.train import step as train_step

log = logging.getLogger("jaxft")


TASK = "task.json"  # in modeling.FOLDER: the templates of the inputs, as the columns of the data have called for them


def keep(m: modeling.Model, home: pathlib.Path, data: Mapping[str, Any], chat: str = "") -> None:
  """Writes what a reader of the run needs beside the weights into home/model: the config.json files, the tokenizer, the
  templates of the inputs. `data` is the data report, `chat` a chat template in place of the tokenizer's own.
  """
  folder = home / modeling.FOLDER
  folder.mkdir(exist_ok=True)
  m.tokenizer.save(folder)
  if m.skeleton.lora is not None:
    (folder / modeling.BASE).write_text(m.base, encoding="utf-8")
  if chat:
    (folder / kinds.CHAT).write_text(chat, encoding="utf-8")
  tasks = data["tasks"]
  given = dict(inputs=[t["input"] for t in tasks], pairs=[t.get("pair", "") for t in tasks])
  given |= dict(chat=True) if any(t["chat"] for t in tasks) else {}
  given |= dict(empty=True) if data["counts"].get("unanswerable") else {}  # answers
  jsons = {TASK: given, "config.json": m.skeleton.json}
  if m.skeleton.kind == "lm":
    jsons["generation_config.json"] = modeling.generation_config(m)
  for name, value in jsons.items():
    (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def ending(home: pathlib.Path, main: bool) -> Iterator[Callable[[str, int | None], None]]:
  """Gives what marks the run in `home` as ended, for those who follow it: mark(why, step).

  An end that running again would not change, in exit code 43 or 44, marks the run too. Only the `main` process writes.
  """

  done = home / setup.DONE

  def mark(why: str, step: int | None) -> None:
    if main:
      done.write_text(json.dumps(dict(ended=why, step=step)) + "\n")

  before = done.read_text() if main and done.exists() else ""
  if main:
    done.unlink(missing_ok=True)
  try:
    yield mark
  except (NumbersError, StorageError) as e:
    with contextlib.suppress(OSError):  # of a disk that failed; the error that is on its way says so
      mark(f"exit code {e.code}", None)
    raise
  except InputError:  # refused before a step: a run that had ended still has
    if before:
      done.write_text(before)
    raise


def run(folder: str, dtype: str = "auto") -> tuple[Reader, modeling.Model, checkpoint.Checkpointer]:
  """Returns config, model and checkpoints of an existing run folder, for reading; `dtype` auto is that of the run.

  Where the run's mesh does not fit the devices here, the default mesh takes its place.
  """
  home = workdir.path(folder)
  if not (home / "config.json").exists() or not (home / modeling.FOLDER).exists():
    raise InputError(
      f"{folder} is not a run folder: it has no config.json and {modeling.FOLDER}/, which training writes at its start."
    )
  given = config.check(config.from_json((home / "config.json").read_text()))  # with what older runs had no field for
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
  return c, modeling.make(c, modeling.source(c, home), None), reader


def pick(checkpointer: checkpoint.Checkpointer, which: str) -> int:
  """Returns the step that `which` (best, latest or a number) names; without a metric for it, best is the latest."""
  steps = checkpointer.steps()
  if not steps:
    raise InputError(f"{checkpointer.folder} has no checkpoint yet.")
  if which in ("best", "latest"):
    best = checkpointer.best_step() if which == "best" else None
    if which == "best" and best is None:
      metric = checkpointer.best
      why = f"no checkpoint holds {metric}" if metric else "the run's config names no metric in save.best"
      log.info("Step %d, the latest, is taken for the best: %s.", steps[-1], why)
    return steps[-1] if best is None else best
  if not which.isdigit() or int(which) not in steps:
    raise InputError(f"--checkpoint={which}: it is best, latest or one of the steps {', '.join(map(str, steps))}.")
  return int(which)


def weights(m: modeling.Model, checkpointer: checkpoint.Checkpointer, step: int) -> Any:
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


def best_of(m: modeling.Model, checkpointer: checkpoint.Checkpointer, outcome: loop.Outcome) -> tuple[int, Any]:
  """Returns (step, parameters) of the best checkpoint of a run that has just ended; without one, what it ended with."""
  best = checkpointer.best_step()
  if best not in (None, outcome.step):
    try:
      return best, weights(m, checkpointer, best)
    except StorageError as e:
      log.warning("%s The last step is exported in place of the best one.", e)
  return outcome.step, train_step.whole(outcome.state)


def start(c: Reader, m: modeling.Model, t: setup.Trainer, checkpointer: checkpoint.Checkpointer, data: str) -> tuple:
  """Returns (state, evaluations) of the last good checkpoint, or those of step 0; `data` names the training data."""
  restored = checkpointer.restore(t.abstract)
  if not restored:
    return train_step.init_state(modeling.load(m, c.seed, fresh=True), c.seed, t.tx, t.abstract), []
  state, meta = restored
  if meta["data"] != data:
    raise InputError(
      f"data.train (or the tokenizer, or how it is cleaned) is not what step {int(state.step)} of this work directory "
      "was trained on. Put it back as it was, or give another --workdir; to train on from these weights, set "
      "model.init to an export of this run."
    )
  log.info("Going on from the checkpoint of step %d.", int(state.step))
  return state, loop.evals_of(meta)


def tell(home: pathlib.Path, whole: ConfigDict, outcome: loop.Outcome, best: int, data: str) -> None:
  """Writes the report and the card of a run that has ended, and logs its results; `data` says what it was trained on,
  `best` the step that was exported."""
  ended = dict(ended=outcome.reason, step=outcome.step, exported_step=best)
  facts = {
    "Differs from the defaults": {k: v for k, (_, v) in config.differences(whole).items()},
    "Outcome": ended,
    "Data": data,
  }
  report.write(home, title=f"Run {home.name}", command=f"python -m jaxft.main {shlex.join(sys.argv[1:])}", facts=facts)
  rows = ((k, *v) for k, v in report.final_metrics(home).items())
  log.info("%s", display.table("Results", ("metric", "first", "last", "at step"), rows))
  for name, pairs in report.before_and_after(home, 4).items():
    log.info("%s\n", display.examples(f"Examples of {name}", pairs))
  log.info("Curves and samples: %s; the model: %s", home / "report.html", home / "export")
