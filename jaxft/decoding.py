"""From a run folder, or that of a model, to what decodes with it: weights, templates, and the engine for its head."""

import logging
import pathlib
from typing import Any

from jaxft import config, hub, kinds, modeling, runs, setup
from jaxft.config import Reader
from jaxft.data import clean
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.infer import batch_decode, labelling, options
from jaxft.infer.generate import Generator

log = logging.getLogger("jaxft")


def load(name: str, which: str, dtype: str) -> tuple[modeling.Model, Any, list, clean.Options, Any]:
  """Returns (model, weights, templates, what is done to each field, chat template or None) of a run folder, with which
  it was trained, or of a Hugging Face folder or Hub id: {input}, stripped, and the tokenizer's chat template.

  A template is (that of the input, that of the text beside it or "").
  """
  home = pathlib.Path(name).expanduser()
  if (home / modeling.FOLDER / "config.json").exists():
    c, m, checkpointer = runs.run(name, dtype)
    given = hub.read_json(home / modeling.FOLDER / runs.TASK)
    chat = kinds.template(m.tokenizer) if given.get("chat") else None
    params = runs.weights(m, checkpointer, runs.pick(checkpointer, which))
    return m, params, list(zip(given["inputs"], given["pairs"])), setup.cleaning(c), chat
  c = config.base()
  c.model.init, c.model.dtype = name, dtype
  c.model.params_dtype = modeling.activations(dtype).name
  c = Reader(c)
  m = modeling.make(c, modeling.source(c), None)
  return m, modeling.load(m, 0), [("{input}", "")], setup.cleaning(c), kinds.template(m.tokenizer)


def engine(m: modeling.Model, templates: list, fix: clean.Options, chat: Any, batch: int, generation: dict) -> tuple:
  """Returns (engine, what it is told, for a log, and the `render` of rows) for the head of the model."""
  where, kind = dict(batch=batch, mesh=m.mesh, rules=m.rules), m.skeleton.kind
  if kind not in labelling.KINDS:
    how = options.read(m.skeleton.generation, modeling.generation_config(m), **_answer_length(m, generation))
    render = batch_decode.renderer([t for t, _ in templates], fix.text, chat)
    return Generator(m.skeleton, m.tokenizer, how, **where), how, render
  given = [k for k, v in generation.items() if v is not None]
  if given:
    raise InputError(
      f"decode: {', '.join(given)}: settings of models that write text, and the head of this one is for "
      f"{registry.KINDS[kind]}."
    )
  made = labelling.Labeller(m.skeleton, m.tokenizer, **where)
  what = f"{made.what.replace('_', ' ')}, labels {', '.join(m.skeleton.labels[:8])}"
  what += f" and {len(m.skeleton.labels) - 8} more" if len(m.skeleton.labels) > 8 else ""
  return made, what, batch_decode.label_renderer(templates, fix.text, words=kind == "tag")


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
