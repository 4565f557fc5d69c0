"""Trains: python -m jaxft.main --config=configs/t5.py --workdir=runs/t5 [--config.optimizer.lr=3e-4 ...]

Runs on whatever JAX finds (TPU, GPU, CPU). The same command goes on where an earlier one was stopped. Exit codes: 0 done,
2 bad config or input, 41 cluster, 42 preempted and saved (run it again), 43 numbers, 44 storage or data.
"""

import contextlib
import json
import pathlib
import shlex
import sys
import time
import types

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxft import cli, config, display, export, observe, report, runs, setup
from jaxft.data import report as data_report
from jaxft.errors import InputError
from jaxft.train import loop, step, workdir


def train(c: ConfigDict, folder: str) -> loop.Outcome:
  """Trains as the config `c` says in the run folder `folder`, or goes on there; returns the outcome.

  Writes config.json, metrics.jsonl, TensorBoard events, checkpoints/, samples/, export/, report.html and README.md there.
  """
  config.check(c)
  setup.cluster()
  home = workdir.probe(pathlib.Path(folder).absolute())  # Orbax takes absolute paths only
  main = jax.process_index() == 0
  observe.setup_logging(home, main=main)
  with workdir.Lock(home) if main else contextlib.nullcontext():
    workdir.check_workdir(home, config.to_json(c))
    return _train(config.Reader(c), c, home, main)


def _train(c: config.Reader, whole: ConfigDict, home: pathlib.Path, main: bool) -> loop.Outcome:
  observe.log.info("Compiled programs are kept in %s.", observe.compile_cache() or "memory only")
  m = setup.model(c)
  data = setup.store(c, m.tokenizer, c.data.train, "data.train", c.data.limit)
  batches = setup.batches(c, data, m)
  t = setup.trainer(c, m, setup.total_steps(c, batches))
  evals, plan, judge = setup.evaluators_of(c, m, home), setup.plan(c, t, batches, m), setup.early_stop(c)
  checkpointer, last = setup.checkpointer(c, home, m, data), setup.export_options(c)
  observing = dict(steps=t.steps, tensorboard=c.log.tensorboard, main=main)
  if c.unread():
    raise InputError(f"config: nothing reads {', '.join(c.unread())}; remove it.")
  if main:
    runs.keep(m, home)
    (home / setup.DONE).unlink(missing_ok=True)
  observe.log.info("%s", setup.summary(m, t))
  seen = data_report.make(data, batches, m.tokenizer)
  if main:
    (home / "data_report.txt").write_text(data_report.text(seen) + "\n", encoding="utf-8")
  observe.log.info("\n%s\n", data_report.text(seen, color=sys.stderr.isatty()))

  state, earlier = _state(c, m, t, checkpointer)
  host, hosts = setup.feed(m, c.batch)
  observer = observe.Observer(home, start=int(state.step), **observing)
  with loop.Signals() as signals, contextlib.closing(observer):
    outcome = loop.train(
      t.step, state, lambda a, b: batches.stream(a, b, host, hosts), plan, put=setup.put(m, c.batch),
      example_ids=batches.example_ids, evaluators=evals, stop=judge, checkpointer=checkpointer, observer=observer,
      signals=signals, evals=earlier)  # fmt: skip
  best = checkpointer.best_step()
  params = step.whole(outcome.state) if best in (None, outcome.step) else runs.weights(m, checkpointer, best)
  export.write(m, params, home / "export", **last)
  if main:
    _report(home, whole, outcome, best, seen)
  return outcome


def _state(c: config.Reader, m: setup.Model, t: setup.Trainer, checkpointer) -> tuple[step.TrainState, loop.Evals]:
  """Returns the state of the last good checkpoint with its evaluations, or that of step 0."""
  restored = checkpointer.restore(t.abstract)
  if not restored:
    return step.init_state(setup.load(m, c.seed), c.seed, t.tx, t.abstract), []
  state, meta = restored
  observe.log.info("Going on from the checkpoint of step %d.", int(state.step))
  return state, loop.evals_of(meta)


def _report(home: pathlib.Path, whole: ConfigDict, outcome: loop.Outcome, best: int | None, seen: dict) -> None:
  ended = dict(ended=outcome.reason, step=outcome.step)
  facts = {
    "Differs from the defaults": {k: v for k, (_, v) in config.differences(whole).items()},
    "Outcome": {**ended, "exported_step": outcome.step if best is None else best},
    "Data": data_report.text(seen),
  }
  report.write(home, title=f"Run {home.name}", command=f"python -m jaxft.main {shlex.join(sys.argv[1:])}", facts=facts)
  rows = ((k, *v) for k, v in report.final_metrics(home).items())
  observe.log.info("%s", display.table("Results", ("metric", "first", "last", "at step"), rows))
  for name, pairs in report.before_and_after(home, 4).items():
    observe.log.info("%s\n", display.examples(f"Examples of {name}", pairs))
  observe.log.info("Curves and samples: %s; the model: %s", home / "report.html", home / "export")
  (home / setup.DONE).write_text(json.dumps(ended) + "\n")


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    workdir=flags.DEFINE_string(
      "workdir", "", "Folder of the run; empty: runs/<config>-<time>. The same folder again: go on."
    ),
  )


def main(f: types.SimpleNamespace) -> int:
  c = cli.checked(f.config)
  name = pathlib.Path(str(flags.FLAGS["config"].config_filename).split(":")[0]).stem
  train(c, f.workdir.value or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
  return 0


if __name__ == "__main__":
  cli.run(define, main, __doc__)
