"""Which model a config.json describes: its numbers, its modules and its names on the Hub.

A family is a file that declares a `Family`; a new one adds its line to FAMILIES (docs/add_a_model.md). Old config.json
files also say how to generate; those fields are taken out here, for all families, before a family reads the rest.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import hub, names, trees
from jaxft.errors import InputError, did_you_mean
from jaxft.families import (
  bart,
  bert,
  deberta,
  distilbert,
  electra,
  fields,
  gemma,
  gemma3,
  gpt2,
  llama,
  marian,
  modernbert,
  neox,
  olmo2,
  opt,
  pegasus,
  phi3,
  roberta,
  starcoder2,
  t5,
)
from jaxft.families.family import Family, Head, end_tokens, head_rules, with_rate
from jaxft.models import encdec, heads, kernels, layers, lora

Tree = Any
log = logging.getLogger("jaxft")

FAMILIES: dict[str, Family] = {
  **t5.FAMILIES,
  **bart.FAMILIES,
  "pegasus": pegasus.FAMILY,
  "marian": marian.FAMILY,
  "bert": bert.FAMILY,
  **roberta.FAMILIES,
  "distilbert": distilbert.FAMILY,
  "electra": electra.FAMILY,
  "modernbert": modernbert.FAMILY,
  "deberta-v2": deberta.FAMILY,
  **llama.FAMILIES,
  **gemma.FAMILIES,
  **gemma3.FAMILIES,
  **phi3.FAMILIES,
  **olmo2.FAMILIES,
  **starcoder2.FAMILIES,
  "gpt2": gpt2.FAMILY,
  "opt": opt.FAMILY,
  "gpt_neox": neox.FAMILY,
}

KINDS = dict(  # kind of head -> what it is for
  lm="language model",
  mlm="masked language model",
  mlm_nsp="masked language model with next sentences",
  classify="one prediction a text",
  tag="one prediction a token",
  qa="answer spans",
  base="hidden states",
)
LABELLED = ("classify", "tag")  # heads with labels
JAXFT_HEAD = "jaxft_head"  # field of a config.json: a head of our own, which transformers does not have

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
class Wanted:
  """The head that a task asks for; what a config.json says of its own head gives way to it.

  `labels` are names; `problem` is transformers' problem_type. `mlp` (width, activation): a head W2 act(W1 h + b1) + b2
  in place of the family's.
  """

  kind: str  # of KINDS
  labels: tuple[str, ...] = ()
  problem: str | None = None
  mlp: tuple[int, str] | None = None


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without its weights."""

  json: dict  # config.json, complete
  kind: str  # of its head, of KINDS
  labels: tuple[str, ...]  # names, where the head has labels
  spec: Any
  graphdef: Any
  shapes: Tree  # ShapeDtypeStruct
  axes: Tree  # tuples of logical axis names
  rules: list  # names.Rule
  prefix: str  # that files of the bare model lack
  renames: tuple  # of very old files
  dtype: Any  # of activations
  generation: dict  # decoder_start: int or None, eos: tuple of int, pad: int, vocab: int
  search: dict  # the fields of GENERATION that the config.json came with
  positions: int  # longest example in tokens; 0: no bound
  lora: lora.Spec | None  # of its adapters, which `rules` know nothing of
  module: nnx.Module = dataclasses.field(repr=False)  # without values

  def init(self, key: jax.Array) -> Tree:
    """Returns fresh weights, distributed as the original's; pure, to be jitted with the shardings wanted."""
    return jax.tree.map(lambda x, want: x.astype(want.dtype), layers.fresh(self.module, key), self.shapes)

  def with_frozen(self, trainable: Tree, dtype: Any) -> "Skeleton":
    """Returns the model whose parameters without a True in `trainable` have another dtype."""
    recast = lambda _, x, flag: x if np.any(flag) else jax.ShapeDtypeStruct(x.shape, dtype)
    return dataclasses.replace(self, shapes=trees.map_with_path(recast, self.shapes, trainable))

  @property
  def generation_config(self) -> dict:
    """What transformers writes into generation_config.json of a model that has none of its own; {} for no generator."""
    if self.kind != "lm":
      return {}
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    own = {k: self.json[k] for k in shared if self.json.get(k) is not None}
    start = self.generation["decoder_start"]
    own |= {} if start is None else dict(decoder_start_token_id=start)
    return {"_from_model_config": True, **own, **{k: v for k, v in self.search.items() if v is not None}}

  @property
  def encoder_decoder(self) -> bool:
    return isinstance(self.spec, encdec.Spec)

  def bind(self, params: Tree) -> nnx.Module:
    return layers.merge(self.graphdef, params)


def family(config_json: dict) -> Family:
  """Returns the family of a config.json; raises InputError with the known ones where there is none."""
  kind = config_json.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(
      f"config.json: model_type is {kind!r}{did_you_mean(kind, FAMILIES)}; jaxft knows {', '.join(FAMILIES)}. ByT5, "
      "Flan-T5 and T5 1.1 are of type t5, SmolLM of type llama. docs/add_a_model.md says how to add one."
    )
  return FAMILIES[kind]


def read_config(folder: pathlib.Path) -> dict:
  """Returns the config.json of a model folder, completed by what only its tensors tell (is the head tied?)."""
  json, search = _split(hub.read_json(pathlib.Path(folder) / "config.json"))
  return {**family(json).settle(json, pathlib.Path(folder)), **search}


def _split(config_json: dict) -> tuple[dict, dict]:
  """Returns the fields of a config.json for the model, and those that say how to generate (BART: some are both)."""
  search = {k: v for k, v in config_json.items() if k in GENERATION}
  own = family(config_json).fields
  return {k: v for k, v in config_json.items() if k not in search or k in own}, search


def sort(config_json: dict) -> str:
  """Returns what a config.json describes: encoder, decoder or encoder-decoder."""
  chosen = family(config_json)
  spec = chosen.spec(fields.read(_split(config_json)[0], chosen.fields))
  return "encoder-decoder" if isinstance(spec, encdec.Spec) else "decoder" if spec.stack.causal else "encoder"


def head_kind(json: dict) -> str:
  """Returns the kind of the head that a config.json describes: by its architecture, else the family's usual one."""
  chosen = family(json)
  if JAXFT_HEAD in json:
    return json[JAXFT_HEAD]["kind"]
  named = (json.get("architectures") or [""])[0]
  return next((k for k, h in chosen.heads.items() if h.architecture == named), chosen.default)


def label_names(json: dict) -> tuple[str, ...]:
  """Returns the labels of a config.json in their order: id2label, else as many as num_labels (2) says."""
  named = json.get("id2label")
  if named:
    try:
      return tuple(str(named[k]) for k in sorted(named, key=int))
    except (TypeError, ValueError, AttributeError):
      raise InputError(f"config.json: id2label is {named!r:.100}; it is an object from ids to names.") from None
  return tuple(f"LABEL_{i}" for i in range(json.get("num_labels") or 2))


def wanted(json: dict, want: Wanted | None) -> dict:
  """Returns the config.json of the same model with the head `want`."""
  if want is None:
    return json
  chosen = family(json)
  if want.kind not in chosen.heads:
    raise InputError(
      f"a {json['model_type']} has no head of kind {want.kind} ({KINDS[want.kind]}); it has {', '.join(chosen.heads)}."
    )
  drop = ("id2label", "label2id", "num_labels", "problem_type", JAXFT_HEAD)
  out = {k: v for k, v in json.items() if k not in drop} | dict(architectures=[chosen.heads[want.kind].architecture])
  if want.labels:
    out["id2label"] = {str(i): name for i, name in enumerate(want.labels)}
    out["label2id"] = {name: i for i, name in enumerate(want.labels)}
  if want.problem:
    out["problem_type"] = want.problem
  if want.mlp:
    out[JAXFT_HEAD] = dict(kind=want.kind, width=want.mlp[0], act=want.mlp[1])
  return out


def _heads(json: dict, c: dict, kind: str, spec: Any) -> tuple[dict[str, heads.Spec], list, str]:
  """Returns the numbers of the heads of `kind` by name, their rules, and the prefix of the model's own tensors."""
  chosen = family(json)
  head, own = chosen.heads[kind], json.get(JAXFT_HEAD)
  outputs = dict(lm=spec.vocab, mlm=spec.vocab, mlm_nsp=spec.vocab, qa=2, nsp=2, base=0)
  out = outputs[kind] if kind in outputs else len(label_names(json))
  if own:
    pool = head.spec(c, out).pool
    std = c.get("initializer_range", 0.02)
    made = dict(head=heads.Spec(out, True, std, dense=own["width"], act=own["act"], pool=pool))
    head = dataclasses.replace(head, hub=dict(dense="jaxft_head.dense", out="jaxft_head.out"), bias="", copies=((), ()))
  else:
    made = dict(head=head.spec(c, out))
  if out == spec.vocab and kind not in LABELLED:
    made["head"] = dataclasses.replace(made["head"], axis="vocab")
  table = head_rules(made["head"], head, "head")
  if head.also:
    beside = chosen.heads[head.also]
    made[head.also] = beside.spec(c, 2)
    table += head_rules(made[head.also], beside, head.also)
  return made, table, head.prefix


def _ignored(chosen: Family, kind: str, own: bool, table: list) -> list:
  """Returns rules for what files may hold besides the model: other heads, `own` or not, and the family's leftovers."""
  known, rest = {r.hub for r in table}, [h for k, h in chosen.heads.items() if k != kind or own]
  others = [f"{hub}.*" for h in rest for hub in h.hub.values()] + [f"{JAXFT_HEAD}.*"]
  biases = [h.bias for h in rest if h.bias and h.bias not in known]
  free = [o for o in dict.fromkeys(others) if not any(r.startswith(o[:-1]) for r in known)]
  return [names.ignore(n) for n in (*free, *dict.fromkeys(biases), *chosen.ignored)]


def _prefixed(table: list, prefix: str) -> list:
  return [dataclasses.replace(r, hub=prefix + r.hub, copies=tuple(prefix + c for c in r.copies)) for r in table]


def _tied(table: list, head: Head, spec: heads.Spec) -> list:
  """Returns the table in which the weights of a tied head are a copy of the embeddings, as old files repeat them."""
  if not spec.tied or "out" not in head.hub:
    return table
  more = (f"{head.hub['out']}.weight", *head.copies[0])
  return [dataclasses.replace(r, copies=(*r.copies, *more)) if r.ours == "embed/embedding" else r for r in table]


def skeleton(
  config_json: dict,
  *,
  dtype,
  params_dtype,
  remat: str,
  unroll: int,
  dropout: float | None,
  attention_dropout: float | None = None,
  head_dropout: float | None = None,
  neftune: float = 0.0,
  prefix: bool = False,
  attention: str = "auto",
  adapters: lora.Spec | None = None,
  want: Wanted | None = None,
) -> Skeleton:
  """Returns the model that `config_json` describes, without weights, with the head `want` (None: its own).

  `dropout` replaces the config's rates that are not 0 (None: keeps them), `attention_dropout` and `head_dropout` those
  of attention's probabilities and of the heads, whatever they are. `neftune`, `prefix`, `attention`: layers.Build.
  `adapters`: of its linear layers.
  """
  chosen = family(config_json)
  given, search = _split(wanted(config_json, want))
  c = fields.read(given, chosen.fields)
  search = {k: c[k] for k in chosen.fields if k in GENERATION} | search
  spec, kind = chosen.spec(c), head_kind(given)
  made, table, under = _heads(given, c, kind, spec)
  spec = dataclasses.replace(spec, heads=tuple(made.items()))
  for key, rate in (("dropout", dropout), ("attention_dropout", attention_dropout), ("head_dropout", head_dropout)):
    if rate is not None:
      spec = with_rate(spec, key, float(rate))
  dtypes, ladder = (jnp.dtype(dtype), jnp.dtype(params_dtype)), kernels.check(attention)
  how = layers.Build(*dtypes, _known_remat(remat), unroll, neftune, ladder, prefix)
  module = chosen.build(spec, how)
  if adapters:
    lora.adapt(module, adapters)
  graphdef, shapes, axes = layers.split(module)
  table = _tied(_prefixed(chosen.rules(spec), under), chosen.heads[kind], made["head"]) + table
  return Skeleton(
    json=_complete(chosen, given, c, spec, kind),
    kind=kind,
    labels=label_names(given) if kind in LABELLED else (),
    spec=spec,
    graphdef=graphdef,
    shapes=shapes,
    axes=axes,
    rules=table + _ignored(chosen, kind, JAXFT_HEAD in given, table),
    prefix=under,
    renames=chosen.renames,
    dtype=how.dtype,
    generation=_generation(c, spec),
    search=search,
    positions=_positions(spec),
    lora=adapters,
    module=module,
  )


def _known_remat(name: str) -> str:
  if name not in layers.REMAT:
    raise InputError(
      f"model.remat is {name!r}{did_you_mean(name, layers.REMAT)}; it is one of {', '.join(layers.REMAT)}."
    )
  return name


def _positions(spec: Any) -> int:
  stack = spec.encoder if isinstance(spec, encdec.Spec) else spec.stack
  bounds = stack.positions - stack.offset, *(r.limit for r in stack.ropes)
  return min((b for b in bounds if b), default=0)


def _generation(c: dict, spec: Any) -> dict:
  """Returns what decoding needs besides the weights: decoder_start, eos (a tuple), pad, vocab."""
  eos = end_tokens(c)
  start, pad = getattr(spec, "decoder_start", None), c["pad_token_id"]
  if pad is None:
    pad = eos[0] if eos else start or 0  # the first as transformers, which pads with nothing where nothing ends
  return dict(decoder_start=start, eos=eos, pad=pad, vocab=spec.vocab)


def _complete(chosen: Family, given: dict, c: dict, spec: Any, kind: str) -> dict:
  """Returns the config.json of this model for transformers 5 (`hub.save` adds dtype and version)."""
  drop = ("torch_dtype", "dtype", "_name_or_path", "name_or_path", "_commit_hash")
  bare = JAXFT_HEAD in given and "base" in chosen.heads  # transformers can load no more of it than that
  architecture = chosen.heads["base" if bare else kind].architecture
  written = {**given, "architectures": [architecture], **chosen.complete(c, spec)}
  return {k: v for k, v in written.items() if k not in drop}


def resize(config_json: dict, params: Tree, vocab: int) -> tuple[dict, Tree]:
  """Returns (config.json, params) with `vocab` entries: the old bit for bit, each new one the float32 mean of the old.

  The mean keeps the sum over new logits small beside the old ones (Hewitt 2021, "Initializing new word embeddings");
  raises InputError where `vocab` is below the present size.
  """
  old = config_json["vocab_size"]
  if vocab < old:
    raise InputError(
      f"vocabulary: the model has {old} entries and cannot shrink to {vocab}; tables are often larger than the "
      "tokenizer, so a smaller tokenizer needs no change."
    )

  def grow(x: jax.Array, axis: int) -> jax.Array:
    mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, vocab - old, axis)], axis)

  out = {**params, "embed": {"embedding": grow(params["embed"]["embedding"], 0)}}
  if head_kind(config_json) in ("lm", "mlm", "mlm_nsp") and "head" in params:
    ends = {n: x for n, x in params["head"].items() if n in ("kernel", "bias")}
    out["head"] = {**params["head"], **{n: grow(x, x.ndim - 1) for n, x in ends.items()}}
  return with_vocab(config_json, vocab), out


def with_vocab(config_json: dict, vocab: int) -> dict:
  """Returns the config.json with another vocab_size, under all the names it has there (Marian: decoder_vocab_size)."""
  same = [k for k, v in fields.second_names(family(config_json).fields).items() if v == "vocab_size"]
  return {**config_json, **{k: vocab for k in ("vocab_size", *same) if k in config_json}}
