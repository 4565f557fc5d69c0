"""Which model a config.json describes: its numbers, its modules and its names on the Hub.

A family is a file with `spec`, `rules` and `build`; a new one adds its line to FAMILIES. Old config.json files also say
how to generate; those fields are taken out here, for all families, before a family reads the rest.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import hub
from jaxft.errors import InputError, did_you_mean
from jaxft.families import t5
from jaxft.models import encdec, layers

Tree = Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What a model_type is made of."""

  spec: Callable[[dict], Any]  # config.json -> numbers; raises on a field that it cannot honour
  rules: Callable[[Any], list[hub.Rule]]  # numbers -> names and shapes on the Hub
  build: Callable[[Any, encdec.Build], nnx.Module]
  generation: Callable[[dict, Any], dict]  # config.json -> decoder_start, eos, pad, vocab
  complete: Callable[[dict, Any], dict]  # config.json -> all that transformers writes into it
  settle: Callable[[dict, pathlib.Path], dict]  # config.json with what only the tensors beside it tell
  resize: Callable[[dict, Tree, int], tuple[dict, Tree]]  # (config.json, params, vocabulary) -> the same, grown


_T5 = Family(t5.spec, t5.rules, encdec.EncDec, t5.generation, t5.complete, t5.settle, t5.resize)

FAMILIES = {"t5": _T5, "mt5": _T5}

# What transformers 5 takes out of a config.json and writes into generation_config.json
# (GenerationConfig._get_default_generation_params, without use_cache, which is a field of the models).
GENERATION = frozenset(
  (
    "max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
    "exponential_decay_length_penalty begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind num_beam_groups diversity_penalty"
  ).split()
)


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without its weights."""

  json: dict  # config.json, complete
  spec: Any
  graphdef: Any
  shapes: Tree  # ShapeDtypeStruct
  axes: Tree  # tuples of logical axis names
  rules: list  # hub.Rule
  dtype: Any  # of activations
  generation: dict  # decoder_start: int, eos: tuple of int, pad: int, vocab: int
  search: dict  # the fields of GENERATION that the config.json came with
  module: nnx.Module = dataclasses.field(repr=False)  # without values

  def init(self, key: jax.Array) -> Tree:
    """Returns fresh weights, distributed as the original's; pure, to be jitted with the shardings wanted."""
    return layers.fresh(self.module, key)

  @property
  def generation_config(self) -> dict:
    """The generation_config.json of a model that came without one, as transformers derives it from config.json."""
    shared = ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id", "use_cache")
    told = {**{k: self.json.get(k) for k in shared}, **self.search}
    return {"_from_model_config": True, **{k: v for k, v in told.items() if v is not None}}

  def bind(self, params: Tree) -> nnx.Module:
    """Returns the module over `params` (arrays or tracers)."""
    return layers.merge(self.graphdef, params)


def family(config_json: dict) -> Family:
  """Returns the family of a config.json; raises InputError where there is none."""
  kind = config_json.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(
      f"config.json: model_type is {kind!r}{did_you_mean(kind, FAMILIES)}; jaxft knows "
      f"{', '.join(FAMILIES)}. ByT5, Flan-T5 and T5 1.1 are of type t5."
    )
  return FAMILIES[kind]


def read_config(folder: pathlib.Path) -> dict:
  """Returns the config.json of a model folder, completed by what only its tensors tell (is the head tied?)."""
  json, search = _split(hub.read_json(pathlib.Path(folder) / "config.json"))
  return {**family(json).settle(json, pathlib.Path(folder)), **search}


def _split(config_json: dict) -> tuple[dict, dict]:
  """Returns the fields of a config.json that describe the model, and those that say how to generate."""
  search = {k: v for k, v in config_json.items() if k in GENERATION}
  return {k: v for k, v in config_json.items() if k not in search}, search


def skeleton(config_json: dict, *, dtype, params_dtype, remat: str, unroll: int, dropout: float | None) -> Skeleton:
  """Returns the model that `config_json` describes, without weights; `dropout` None keeps the config's own rate."""
  chosen = family(config_json)
  given, search = _split(config_json)
  spec = chosen.spec(given)
  json = chosen.complete(given, spec)
  if dropout is not None:
    spec = dataclasses.replace(spec, dropout=float(dropout))
  if not 0 <= spec.dropout < 1:
    raise InputError(f"model.dropout is {spec.dropout}; it is a share of at least 0 and below 1.")
  if remat not in layers.REMAT:
    raise InputError(
      f"model.remat is {remat!r}{did_you_mean(remat, layers.REMAT)}; it is one of {', '.join(layers.REMAT)}."
    )
  how = encdec.Build(dtype=jnp.dtype(dtype), params_dtype=jnp.dtype(params_dtype), remat=remat, unroll=unroll)
  module = chosen.build(spec, how)
  graphdef, shapes, axes = layers.split(module)
  return Skeleton(
    json=json,
    spec=spec,
    graphdef=graphdef,
    shapes=shapes,
    axes=axes,
    rules=chosen.rules(spec),
    dtype=how.dtype,
    generation=chosen.generation(given, spec),
    search=search,
    module=module,
  )


def resize(config_json: dict, params: Tree, vocab: int) -> tuple[dict, Tree]:
  """Returns config.json and params with `vocab` entries: old rows untouched, each new one the mean of the old ones."""
  return family(config_json).resize(config_json, params, vocab)
