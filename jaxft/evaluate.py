"""Evaluates: python -m jaxft.evaluate --config=configs/t5.py --workdir=runs/t5 [--checkpoint=best|latest|STEP]
           python -m jaxft.evaluate --config=configs/t5.py --model=FOLDER_OR_HUB_ID    a model before training

Runs the evaluations of the config (with --workdir and no --config: those of the run), prints a table, writes samples.
--watch follows a run and evaluates each new checkpoint once, until the run has ended.
"""

import types

from absl import flags

from jaxft import cli


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    workdir=flags.DEFINE_string("workdir", "", "Folder of a run."),
    model=flags.DEFINE_string("model", "", "Folder or Hub id of a model, in place of a run."),
    checkpoint=flags.DEFINE_string("checkpoint", "best", "best, latest or a step."),
    watch=flags.DEFINE_bool("watch", False, "Follow the run: evaluate each new checkpoint once."),
    output=flags.DEFINE_string("output", "", "Folder for samples and eval.jsonl; empty: the run's, none for --model."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds

import pathlib
import time

from ml_collections import ConfigDict

from jaxft import cluster, config, evaluations, modeling, observe, programs, runs, setup
from jaxft.errors import InputError, StorageError
from jaxft.train import workdir

SECONDS = 10.0  # between two looks at a run that is followed


def evaluate(
  c: ConfigDict | None, *, folder: str = "", name: str = "", which: str = "best", output: str = ""
) -> dict[str, float]:
  """Evaluates checkpoint `which` of the run in `folder`, or the model `name`; returns {"eval/NAME/METRIC": value}.

  `c` None: the config of the run. Its evaluations need not be those of training.
  """
  if name:
    if c is None:
      raise InputError("--model needs --config, which says what to evaluate on.")
    c = config.check(ConfigDict(c))
    c.model.init, c.model.config = name, ConfigDict()
    c.lora.rank, c.model.frozen_dtype = 0, ""  # a model folder is whole, and nothing is trained
    if c.model.tokenizer:
      observe.log.info("The tokenizer of %s is used, not model.tokenizer=%s.", name, c.model.tokenizer)
      c.model.tokenizer = ""
    reader = config.Reader(c)
    m = setup.model_to_judge(reader, modeling.source(reader))
    target = pathlib.Path(output) if output else None
    return evaluations.run(evaluations.make(reader, m, target, needed=True), modeling.load(m, c.seed), 0, target, name)
  reader, m, checkpointer = _open(c, folder)
  step, target = runs.pick(checkpointer, which), pathlib.Path(output or workdir.path(folder))
  evaluators = evaluations.make(reader, m, target, needed=True)
  return evaluations.run(evaluators, runs.weights(m, checkpointer, step), step, target, f"{folder} step {step}")


def watch(c: ConfigDict | None, *, folder: str, output: str = "") -> None:
  """Evaluates each checkpoint of the run in `folder` once, as it appears, until the run has ended; restarts where it
  was.
  """
  home = workdir.path(folder)
  while not (home / modeling.FOLDER / "config.json").exists():
    observe.log.info("Waiting for %s to become a run folder.", folder)
    time.sleep(SECONDS)
  reader, m, checkpointer = _open(c, folder)
  target = pathlib.Path(output or home)
  evaluators = evaluations.make(reader, m, target, needed=True)
  done = {row["step"] for row in observe.read_metrics(target, "eval.jsonl")}
  while True:
    ended = (home / setup.DONE).exists()  # asked before the steps, so that the last one is not missed
    for step in [s for s in checkpointer.steps() if s not in done]:
      try:
        params = runs.weights(m, checkpointer, step)
      except (InputError, StorageError) as e:  # the run may remove an old checkpoint while it is read
        if step in checkpointer.steps():
          raise
        observe.log.info("Step %d went away while it was read (%s).", step, type(e).__name__)
        continue
      evaluations.run(evaluators, params, step, target, f"{folder} step {step}")
      done.add(step)
    if ended:
      return
    time.sleep(SECONDS)


def _open(c: ConfigDict | None, folder: str):
  reader, m, checkpointer = runs.run(folder)
  return (config.Reader(config.check(ConfigDict(c))) if c is not None else reader), m, checkpointer


def main(f: types.SimpleNamespace) -> int:
  cluster.join()
  observe.setup_logging(None)
  programs.keep()
  c = cli.checked(f.config) if f.config.value is not None else None
  if f.watch.value and f.model.value:
    raise InputError("--watch follows a run (--workdir); a model of --model does not change.")
  if f.watch.value:
    watch(c, folder=f.workdir.value, output=f.output.value)
  else:
    evaluate(c, folder=f.workdir.value, name=f.model.value, which=f.checkpoint.value, output=f.output.value)
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
