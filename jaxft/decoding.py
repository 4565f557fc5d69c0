"""From a run folder, or that of a model, to what decodes with it: weights, templates, and the engine for its head."""

import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxft import config, hub, kinds, modeling, runs, setup
from jaxft.config import Reader
from jaxft.data import clean, qa, sources, squad
from jaxft.data.files import Row
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.infer import answering, batch_decode, engine, labelling, options
from jaxft.infer.generate import Generator

log = logging.getLogger("jaxft")

LENGTH = 1024  # tokens of an input, unless another number is given


class Loaded(NamedTuple):
  """What decodes, without its engine. A template is (that of the input, that of the text beside it or "")."""

  model: modeling.Model
  params: Any
  templates: list[tuple[Any, Any]]
  fix: clean.Options  # what is done to each field
  chat: Any  # chat template, or None
  windows: dict[str, Any]  # of question answering: fields of answering.Options


def load(name: str, which: str, dtype: str) -> Loaded:
  """Returns what a run folder was trained with, or for a Hugging Face folder or Hub id: {input}, stripped, the
  tokenizer's chat template; for question answering {question} and {context}, windows as in run_qa.py.
  """
  home = pathlib.Path(name).expanduser()
  if (home / modeling.FOLDER / "config.json").exists():
    c, m, checkpointer = runs.run(name, dtype)
    given = hub.read_json(home / modeling.FOLDER / runs.TASK)
    chat = kinds.template(m.tokenizer) if given.get("chat") else None
    m, params = modeling.whole(m, runs.weights(m, checkpointer, runs.pick(checkpointer, which)))
    templates, length = list(zip(given["inputs"], given["pairs"])), c.data.lengths["inputs"]
    windows = dict(length=length, stride=qa.overlap(setup.task(c).stride, length), empty=given.get("empty", False))
    return Loaded(m, params, templates, setup.cleaning(c), chat, windows)
  c = config.base()
  c.model.init, c.model.dtype = name, dtype
  c.model.params_dtype = modeling.activations(dtype).name
  c = Reader(c)
  m = modeling.make(c, modeling.source(c), None)
  templates = [("{question}", "{context}") if m.skeleton.kind == "qa" else ("{input}", "")]
  return Loaded(m, modeling.load(m, 0), templates, setup.cleaning(c), kinds.template(m.tokenizer), {})


def read(source: str, kind: str) -> Iterator[Row]:
  """Yields the rows of a source for the head `kind`; the questions of SQuAD's nested json are one each."""
  return sources.unfold(sources.read(source), squad.flatten if kind == "qa" else None)


class Ready(NamedTuple):
  worker: engine.Engine
  told: Any  # for a log
  render: Callable
  limit: int  # tokens of an input, 0: any number


def make(of: Loaded, batch: int, limit: int | None, generation: dict) -> Ready:
  """Returns what decodes with the head of the model; `limit`: tokens of an input, or of a window; None: not given."""
  m, kind = of.model, of.model.skeleton.kind
  where, positions = dict(batch=batch, mesh=m.mesh, rules=m.rules), m.skeleton.positions
  if kind == "qa" or kind in labelling.KINDS:
    given = [k for k, v in generation.items() if v is not None]
    if given:
      raise InputError(
        f"decode: {', '.join(given)}: settings of models that write text, and the head of this one is for "
        f"{registry.KINDS[kind]}."
      )
  if kind == "qa":
    return _answerer(of, limit, where)
  limit = LENGTH if limit is None else limit
  if kind in labelling.KINDS:
    made = labelling.Labeller(m.skeleton, m.tokenizer, **where)
    what = f"{made.what.replace('_', ' ')}, labels {', '.join(m.skeleton.labels[:8])}"
    what += f" and {len(m.skeleton.labels) - 8} more" if len(m.skeleton.labels) > 8 else ""
    render = batch_decode.label_renderer(of.templates, of.fix.text, words=kind == "tag")
    return Ready(made, what, render, min(limit or positions, positions) if positions else limit)
  how = options.read(m.skeleton.generation, modeling.generation_config(m), **_answer_length(m, generation))
  render = batch_decode.renderer([t for t, _ in of.templates], of.fix.text, of.chat)
  return Ready(Generator(m.skeleton, m.tokenizer, how, **where), how, render, limit)


def _answerer(of: Loaded, limit: int | None, where: dict) -> Ready:
  if not all(pair for _, pair in of.templates):
    raise InputError("decode: --template is that of the question, --pair that of the text with the answer: give both.")
  m, how = of.model, answering.Options()._replace(**of.windows)
  length = min(limit or how.length, m.skeleton.positions or limit or how.length)
  if length != how.length:
    how = how._replace(length=length, stride=min(how.stride, qa.overlap(-1, length)))
  what = f"windows of {how.length} tokens that share {how.stride}, {'perhaps no' if how.empty else 'always an'} answer"
  return Ready(
    answering.Answerer(m.skeleton, m.tokenizer, how, **where), what, batch_decode.question_renderer(of.templates), 0
  )


def _answer_length(m: modeling.Model, given: dict) -> dict:
  """Returns `given` with a length, where neither it nor the model's own generation_config.json has one; raises
  InputError for a model that writes no text.
  """
  if m.skeleton.kind != "lm":
    raise InputError(
      f"decode: the head of this model is for {registry.KINDS[m.skeleton.kind]}; it writes neither text nor labels "
      "for new rows. jaxft.evaluate scores it, and writes its predictions to samples/."
    )
  own = modeling.generation_config(m)
  if given.get("length") is None and all(own.get(k) is None for k in ("max_new_tokens", "max_length")):
    log.info("The model names no length for its answers; at most 256 new tokens (--max_new_tokens).")
    return {**given, "length": 256}
  return given
