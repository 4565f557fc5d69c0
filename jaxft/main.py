"""Trains: python -m jaxft.main --config=configs/t5.py --workdir=runs/t5 [--config.optimizer.lr=3e-4 ...]

Runs on what JAX finds (TPU, GPU, CPU). The same command goes on where an earlier one stopped. Exit codes: 0 done, 2 bad
config or input, 41 cluster, 42 preempted and saved (run it again), 43 numbers, 44 storage or data.
"""

import types

from absl import flags

from jaxft import cli
from jaxft.data import feeding


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    workdir=flags.DEFINE_string("workdir", "", "Folder of the run; empty: runs/CONFIG-TIME. The same again: go on."),
    profile_steps=flags.DEFINE_string(
      "profile_steps", "", "Steps to trace, such as 10:15, and a table of what they do."
    ),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds
  feeding.start()

import contextlib
import pathlib
import sys
import time

import jax
from ml_collections import ConfigDict

from jaxft import cluster, config, evaluations, export, modeling, observe, programs, runs, setup
from jaxft.data import report as data_report
from jaxft.errors import InputError
from jaxft.train import loop, tracing, workdir


def train(
  c: ConfigDict, folder: str, way: setup.Way = setup.Way(), profile_steps: str = ""  # noqa: B008
) -> loop.Outcome:  # fmt: skip
  """Trains as `c` says in the run folder `folder`, or goes on there; README tells what is left. `way`: of a sweep;
  `profile_steps`: such as "10:15", are traced into folder/profile."""
  config.check(c)
  cluster.join()
  home = workdir.probe(workdir.path(folder))
  main = jax.process_index() == 0
  way.logging(home, main=main)
  with workdir.held(home, config.to_json(c), main), runs.ending(home, main) as mark:
    outcome = _train(config.Reader(c), c, home, main, way, profile_steps)
    mark(outcome.reason, outcome.step)
    return outcome


def _train(
  c: config.Reader, whole: ConfigDict, home: pathlib.Path, main: bool, way: setup.Way, profile: str
) -> loop.Outcome:
  observe.log.info("Compiled programs are kept in %s.", programs.keep() or "memory only")
  source = way.part(modeling.source, c)
  data = way.part(setup.training_data, c, source)
  m = way.part(setup.model_for, c, source, data)
  batches = way.part(setup.batches, c, data, m)
  t = setup.trainer(c, m, data, setup.total_steps(c, batches), way)
  evals, events = setup.writing_to(home, way.part(evaluations.make, c, m, None)), c.log.tensorboard
  one_step = tracing.traced(t.step, profile, t.steps, home, main=main)
  plan, judge = setup.plan(c, t, batches, m), way.judge(setup.early_stop(c), t.steps, home)
  checkpointer, last = setup.checkpointer(c, home, m, data), setup.export_options(c, m.tokenizer)
  if c.unread():
    raise InputError(f"config: nothing reads {', '.join(c.unread())}; remove it.")
  setup.compile_early(t, batches, m, max(checkpointer.steps(), default=0))
  observe.log.info("%s", setup.summary(m, t))
  seen = data_report.make(data, batches, m.tokenizer)
  if main:
    runs.keep(m, home, data.report, last["chat"])
    (home / "data_report.txt").write_text(data_report.text(seen) + "\n", encoding="utf-8")
  observe.log.info("\n%s\n", data_report.text(seen, color=sys.stderr.isatty()))

  state, earlier = runs.start(c, m, t, checkpointer, data.folder.name)
  host, hosts = setup.feed(m, c.batch)
  observer = observe.Observer(home, start=int(state.step), steps=t.steps, tensorboard=events, main=main)
  with contextlib.closing(checkpointer):
    with loop.Signals() as signals, contextlib.closing(observer), one_step as stepper:
      outcome = loop.train(
        stepper, state, lambda a, b: batches.stream(a, b, host, hosts), plan, put=setup.put(m, c.batch),
        examples=setup.examples(data, batches), evaluators=evals, stop=judge, checkpointer=checkpointer,
        observer=observer, signals=signals, evals=earlier)  # fmt: skip
    if way.export:
      best, params = runs.best_of(m, checkpointer, outcome)
      export.write(m, params, home / "export", **last)
  if main and way.export:
    runs.tell(home, whole, outcome, best, data_report.text(seen))
  return outcome


def main(f: types.SimpleNamespace) -> int:
  c = cli.checked(f.config)
  name = pathlib.Path(str(flags.FLAGS["config"].config_filename).split(":")[0]).stem
  train(c, f.workdir.value or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}", profile_steps=f.profile_steps.value)
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
