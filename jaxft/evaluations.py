"""From the `evals` of a config to evaluators, for the loop and for the evaluation binary."""

import functools
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from jaxft import display, kinds, modeling, setup
from jaxft.config import EVAL, Reader
from jaxft.data import cache, pipeline, qa, tasks
from jaxft.data import report as data_report
from jaxft.errors import InputError
from jaxft.eval import evaluators, graders, predict
from jaxft.infer import options
from jaxft.infer.generate import Generator
from jaxft.train import losses

log = logging.getLogger("jaxft")
ANSWERS = ("seq2seq", "sft", "prefix_lm")  # kinds of task whose examples have a prompt and an answer
WRITTEN = (*ANSWERS, "causal")  # kinds whose loss is that of a text


def make(c: Reader, m: modeling.Model, home: pathlib.Path | None, *, needed: bool = False) -> list:
  """Returns the evaluators of `c.evals`; samples go to home/samples. `needed`: that there are none is an InputError."""
  made = []
  if needed and not c.evals:
    raise InputError("config: evals is empty; add for example c.evals = dict(loss=dict(kind='loss')).")
  if c.data.validation and not c.evals:
    log.warning("data.validation is given, but evals is empty: nothing is evaluated.")
  for name, e in c.evals.items():
    if e["every"] < 0:
      raise InputError(f"config: evals.{name}.every is {e['every']}; it is a number of steps, or 0 for the end alone.")
    bar = functools.partial(display.Bar, f"eval/{name}", quiet=3.0, live=needed)  # training has a bar of its own
    made.append(_one(c, m, home, name, e, bar))
    made[-1].start = e["start"]
  return made


def _one(c: Reader, m: modeling.Model, home: pathlib.Path | None, name: str, e: dict, bar: Any) -> Any:
  task = setup.task(c)
  if isinstance(e["data"], dict) and (task.input, task.target) == tasks.DEFAULTS:
    raise InputError(
      f"config: evals.{name}.data is a dict of parallel files, whose order a config does not keep here; say which "
      f"column is which: task.input='{{{next(iter(e['data']))}}}' and so on."
    )
  fit = [k for k in EVAL if k == task.kind or (k in ("generate", "rank") and task.kind in ANSWERS)]
  fit += ["loss"] if task.kind != "regress" else []  # which has no cross-entropy, and whose own evaluation gives a loss
  if e["kind"] not in fit:
    raise InputError(
      f"config: evals.{name}.kind is {e['kind']!r}; for a task of kind {task.kind} there is {', '.join(fit)}."
    )
  key = f"data.validation (or evals.{name}.data)"
  data = setup.store(
    c, m.tokenizer, e["data"] or c.data.validation, key, labels=m.skeleton.labels, limit=e["limit"], mixed=False
  )
  setup.check_positions(c, m, data, key)
  said = data_report.notice(data.report)
  if said:
    log.warning("The data of evals.%s: %s.", name, said)
  folder = home / "samples" if home else None
  if e["kind"] == "generate":
    return _generate(m, name, e, data, folder, bar)
  grader = None
  if e["kind"] == "rank":
    data, grader = _ranked(c, m, name, e, data, key)
  once = pipeline.Batches(
    data, seed=0, batch=evaluators.whole_batch(e["batch"], m.mesh, m.rules), lengths=c.data.lengths, pack=c.data.pack,
    buckets=tuple(c.data.buckets), shuffle=False, dynamic=kinds.dynamic(c, m.tokenizer, training=False),
    every=grader is not None)  # fmt: skip
  more = dict(batches=once, mesh=m.mesh, rules=m.rules, progress=bar)
  told = setup.loss_options(c, m, data, plain=True)
  if e["kind"] == "loss":
    loss = losses.make(task.kind, told)
    texts = functools.partial(evaluators.count_text, data, m.tokenizer.decode) if task.kind in WRITTEN else None
    return evaluators.LossEvaluator(name, e["every"], skeleton=m.skeleton, loss_fn=loss, counts=texts, **more)
  if grader is not None:
    return predict.PredictEvaluator(
      name, e["every"], predict=lambda p, batch: losses.log_probabilities(task.kind, m.skeleton.bind(p), batch),
      grader=grader, loss=None, store=data, samples=e["samples"], folder=folder, **more)  # fmt: skip
  out, answers = losses.OUTPUTS[task.kind], None
  if task.kind == "qa":
    answers = functools.partial(qa.answers, n_best=e["n_best"], max_answer_length=e["max_answer_length"])
  return predict.PredictEvaluator(
    name, e["every"], predict=lambda params, batch: out(m.skeleton.bind(params), batch, None),
    grader=graders.make(task.kind, e["metrics"], labels=m.skeleton.labels, multi=task.multi, decode=answers),
    loss=lambda outputs, batch: losses.of_outputs(task.kind, outputs, batch, told), store=data, samples=e["samples"],
    folder=folder, **more)  # fmt: skip


def _ranked(c: Reader, m: modeling.Model, name: str, e: dict, data: cache.Store, key: str) -> tuple[cache.Store, Any]:
  """Returns (the examples of `data`, each with every word for an answer, what grades them)."""
  words = list(dict.fromkeys(word for _, word in setup.task(c).verbalizer))
  if len(words) < 2:
    raise InputError(
      f"config: evals.{name} ranks the words of task.verbalizer, which has {len(words)}; give (value, word) of each "
      "label, such as ((0, 'negative'), (1, 'positive'))."
    )
  source = e["data"] or c.data.validation
  every = setup.store(c, m.tokenizer, source, key, labels=(), limit=e["limit"], mixed=False, ranked=True)
  right = {data.where(i): data.texts(i)[1] for i in range(len(data))}
  truth = []
  for first in range(0, len(every), len(words)):
    said = [every.texts(first + j)[1] for j in range(len(words))]
    truth.append(said.index(right[every.where(first)]))
  segments = "target_segments" if "targets" in every.sides else "input_segments"
  return every, graders.Ranked(e["metrics"], words, np.array(truth), segments)


def _generate(m: modeling.Model, name: str, e: dict, data: cache.Store, folder: pathlib.Path | None, bar: Any) -> Any:
  how = options.read(
    m.skeleton.generation,
    modeling.generation_config(m),
    beams=e["beams"],
    temperature=0.0,
    length_penalty=e["length_penalty"],
    length=e["length"] or evaluators.answer_length(data),
  )
  engine = Generator(m.skeleton, m.tokenizer, how, batch=e["batch"], mesh=m.mesh, rules=m.rules)
  return evaluators.GenerateEvaluator(
    name, e["every"], generator=engine, store=data, names=e["metrics"], samples=e["samples"], folder=folder,
    progress=bar)  # fmt: skip


def run(evaluators: list, params: Any, step: int, target: pathlib.Path | None, name: str) -> dict[str, float]:
  """Returns {"eval/NAME/METRIC": value} of parameters, logged as a table and, with `target`, appended to
  target/eval.jsonl."""
  values = {f"eval/{e.name}/{k}": v for e in evaluators for k, v in e.run(params, step).items()}
  if target and jax.process_index() == 0:
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "eval.jsonl", "a", encoding="utf-8") as f:
      f.write(json.dumps(dict(step=step, model=name, **values)) + "\n")
  log.info("%s", display.table(f"Evaluation of {name}", ("metric", "value"), values.items()))
  return values
