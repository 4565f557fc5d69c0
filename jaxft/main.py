"""Trains: python -m jaxft.main --config=configs/t5.py --workdir=runs/t5 [--config.optimizer.lr=3e-4 ...]

Runs on what JAX finds (TPU, GPU, CPU). The same command goes on where an earlier one stopped. Exit codes: 0 done, 2 bad
config or input, 41 cluster, 42 preempted and saved (run it again), 43 numbers, 44 storage or data.
"""

import contextlib
import pathlib
import shlex
import sys
import time
import types

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxft import cli, cluster, config, display, evaluations, export, modeling, observe, programs, report, runs, setup
from jaxft.data import report as data_report
from jaxft.errors import InputError
from jaxft.train import loop, step, workdir


def train(c: ConfigDict, folder: str, way: setup.Way = setup.Way()) -> loop.Outcome:  # noqa: B008
  """Trains as `c` says in the run folder `folder`, or goes on there; README tells what is left. `way`: of a sweep."""
  config.check(c)
  cluster.join()
  home = workdir.probe(workdir.path(folder))
  main = jax.process_index() == 0
  way.logging(home, main=main)
  with workdir.held(home, config.to_json(c), main), runs.ending(home, main) as mark:
    outcome = _train(config.Reader(c), c, home, main, way)
    mark(outcome.reason, outcome.step)
    return outcome


def _train(c: config.Reader, whole: ConfigDict, home: pathlib.Path, main: bool, way: setup.Way) -> loop.Outcome:
  observe.log.info("Compiled programs are kept in %s.", programs.keep() or "memory only")
  source = way.part(modeling.source, c)
  data = way.part(setup.training_data, c, source)
  m = way.part(setup.model_for, c, source, data)
  batches = way.part(setup.batches, c, data, m)
  t = setup.trainer(c, m, data, setup.total_steps(c, batches), way)
  evals, events = setup.writing_to(home, way.part(evaluations.make, c, m, None)), c.log.tensorboard
  plan, judge = setup.plan(c, t, batches, m), way.judge(setup.early_stop(c), t.steps, home)
  checkpointer, last = setup.checkpointer(c, home, m, data), setup.export_options(c, m.tokenizer)
  if c.unread():
    raise InputError(f"config: nothing reads {', '.join(c.unread())}; remove it.")
  observe.log.info("%s", setup.summary(m, t))
  seen = data_report.make(data, batches, m.tokenizer)
  if main:
    runs.keep(m, home, data.report, last["chat"])
    (home / "data_report.txt").write_text(data_report.text(seen) + "\n", encoding="utf-8")
  observe.log.info("\n%s\n", data_report.text(seen, color=sys.stderr.isatty()))

  state, earlier = _state(c, m, t, checkpointer, data.folder.name)
  host, hosts = setup.feed(m, c.batch)
  observer = observe.Observer(home, start=int(state.step), steps=t.steps, tensorboard=events, main=main)
  with contextlib.closing(checkpointer):
    with loop.Signals() as signals, contextlib.closing(observer):
      outcome = loop.train(
        t.step, state, lambda a, b: batches.stream(a, b, host, hosts), plan, put=setup.put(m, c.batch),
        examples=setup.examples(data, batches), evaluators=evals, stop=judge, checkpointer=checkpointer,
        observer=observer, signals=signals, evals=earlier)  # fmt: skip
    if way.export:
      best, params = runs.best_of(m, checkpointer, outcome)
      export.write(m, params, home / "export", **last)
  if main and way.export:
    _report(home, whole, outcome, best, seen)
  return outcome


def _state(c: config.Reader, m: modeling.Model, t: setup.Trainer, checkpointer, data: str) -> tuple:
  """Returns (state, evaluations) of the last good checkpoint, or those of step 0; `data` names the training data."""
  restored = checkpointer.restore(t.abstract)
  if not restored:
    return step.init_state(modeling.load(m, c.seed, fresh=True), c.seed, t.tx, t.abstract), []
  state, meta = restored
  if meta["data"] != data:
    raise InputError(
      f"data.train (or the tokenizer, or how it is cleaned) is not what step {int(state.step)} of this work directory "
      "was trained on. Put it back as it was, or give another --workdir; to train on from these weights, set "
      "model.init to an export of this run."
    )
  observe.log.info("Going on from the checkpoint of step %d.", int(state.step))
  return state, loop.evals_of(meta)


def _report(home: pathlib.Path, whole: ConfigDict, outcome: loop.Outcome, best: int, seen: dict) -> None:
  ended = dict(ended=outcome.reason, step=outcome.step, exported_step=best)
  facts = {
    "Differs from the defaults": {k: v for k, (_, v) in config.differences(whole).items()},
    "Outcome": ended,
    "Data": data_report.text(seen),
  }
  report.write(home, title=f"Run {home.name}", command=f"python -m jaxft.main {shlex.join(sys.argv[1:])}", facts=facts)
  rows = ((k, *v) for k, v in report.final_metrics(home).items())
  observe.log.info("%s", display.table("Results", ("metric", "first", "last", "at step"), rows))
  for name, pairs in report.before_and_after(home, 4).items():
    observe.log.info("%s\n", display.examples(f"Examples of {name}", pairs))
  observe.log.info("Curves and samples: %s; the model: %s", home / "report.html", home / "export")


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    workdir=flags.DEFINE_string("workdir", "", "Folder of the run; empty: runs/CONFIG-TIME. The same again: go on."),
  )


def main(f: types.SimpleNamespace) -> int:
  c = cli.checked(f.config)
  name = pathlib.Path(str(flags.FLAGS["config"].config_filename).split(":")[0]).stem
  train(c, f.workdir.value or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
  return 0


if __name__ == "__main__":
  cli.run(define, main, __doc__)
