"""T5 1.0, T5 1.1, Flan-T5, ByT5 (model_type t5) and mT5 (mt5): their config.json and their names on the Hub.

Two facts are not where one looks for them. T5 1.0 multiplies the decoder's output with d_model**-0.5 and ties the head;
1.1 does neither, and says so only by tie_word_embeddings = false. transformers 5 then writes tie_word_embeddings = true
for every T5, keeps the scaling in `scale_decoder_outputs`, and takes the head as tied if and only if the file holds no
other one. `settle` reads the file the same way and puts both facts into the config. mT5 never scales there.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import hub
from jaxft.errors import InputError, did_you_mean
from jaxft.models import encdec, layers

REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")

READ = {  # optional fields, with the values transformers 5 gives them (mt5's own in MT5)
  "num_decoder_layers": None,
  "relative_attention_num_buckets": 32,
  "relative_attention_max_distance": 128,
  "dropout_rate": 0.1,
  "layer_norm_epsilon": 1e-6,
  "initializer_factor": 1.0,
  "feed_forward_proj": "relu",
  "dense_act_fn": None,
  "is_gated_act": None,
  "tie_word_embeddings": None,
  "scale_decoder_outputs": None,
  "decoder_start_token_id": None,
  "pad_token_id": 0,
  "eos_token_id": 1,
}

MT5 = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}

NULL = {"pad_token_id", "eos_token_id"} | {k for k, v in READ.items() if v is None}  # may be null


def _is_id(v: Any) -> bool:
  return type(v) is int and v >= 0


KINDS = (  # (what a field must be, its test, the fields)
  (
    "a whole number above 0",
    lambda v: type(v) is int and v > 0,
    (*REQUIRED, "num_decoder_layers", "relative_attention_num_buckets", "relative_attention_max_distance"),
  ),
  ("a number", lambda v: type(v) in (int, float), ("dropout_rate", "layer_norm_epsilon", "initializer_factor")),
  ("a text", lambda v: type(v) is str, ("feed_forward_proj", "dense_act_fn")),
  ("true or false", lambda v: type(v) is bool, ("is_gated_act", "tie_word_embeddings", "scale_decoder_outputs")),
  ("a token id", _is_id, ("decoder_start_token_id", "pad_token_id")),
  ("a token id or a list of them", lambda v: _is_id(v) or (type(v) is list and all(map(_is_id, v))), ("eos_token_id",)),
)

EXPECTED = {  # only these values are the model that is built here
  "is_encoder_decoder": (True,),
  "is_decoder": (False,),
  "add_cross_attention": (False, True),
  "cross_attention_hidden_size": (None,),
  "tie_encoder_decoder": (False,),
  "chunk_size_feed_forward": (0,),
  "pruned_heads": ({}, None),
  "quantization_config": (None,),
  "torchscript": (False,),
}

SAME = {  # second names, which must agree with the first
  "head_dim": "d_kv",
  "hidden_size": "d_model",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}

HARMLESS = frozenset(
  (  # kept and written back; they change no number of the model
    "model_type",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "name_or_path",
    "use_cache",
    "n_positions",
    "output_past",
    "task_specific_params",
    "tokenizer_class",
    "classifier_dropout",
    "bos_token_id",
    "sep_token_id",
    "unk_token_id",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "prefix",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "use_bfloat16",
    "tf_legacy_loss",
    "is_torchscript",
    "auto_map",
    "keys_to_ignore_at_inference",
    "adapters",
    "tokenizer_vocab_size",
    "max_position_embeddings",
  )
)


def spec(json: dict) -> encdec.Spec:
  """Returns the numbers of a config.json; raises InputError on a field that is missing, unknown or not supported."""
  c = _fields(json)
  act, gated = _activation(c)
  scaled = c["scale_decoder_outputs"]
  if scaled is None:
    scaled = c["tie_word_embeddings"] is not False and json["model_type"] == "t5"
  if scaled and json["model_type"] == "mt5":
    raise InputError("config.json: scale_decoder_outputs is true for an mt5, which never scales. Remove the field.")
  start = c["pad_token_id"] if c["decoder_start_token_id"] is None else c["decoder_start_token_id"]
  if start is None:
    raise InputError(
      "config.json: decoder_start_token_id and pad_token_id are both null, so that the decoder has no first token. Set "
      "decoder_start_token_id."
    )
  return encdec.Spec(
    vocab=c["vocab_size"],
    width=c["d_model"],
    heads=c["num_heads"],
    head_dim=c["d_kv"],
    mlp=c["d_ff"],
    encoder_layers=c["num_layers"],
    decoder_layers=c["num_layers"] if c["num_decoder_layers"] is None else c["num_decoder_layers"],
    buckets=c["relative_attention_num_buckets"],
    max_distance=c["relative_attention_max_distance"],
    norm_eps=c["layer_norm_epsilon"],
    act=act,
    gated=gated,
    tied=c["tie_word_embeddings"] is not False,
    scaled=scaled,
    dropout=c["dropout_rate"],
    init_factor=c["initializer_factor"],
    decoder_start=start,
  )


def _fields(json: dict) -> dict:
  known = [*REQUIRED, *READ, *EXPECTED, *SAME, *HARMLESS]
  unknown = [f"{k}{did_you_mean(k, known)}" for k in json if k not in known]
  missing = [k for k in REQUIRED if k not in json]
  other = [f"{k}={v!r}" for k, v in json.items() if k in EXPECTED and v not in EXPECTED[k]]
  twins = [(k, json[k], SAME[k], json.get(SAME[k])) for k in SAME if k in json]
  other += [f"{k}={v!r} beside {name}={first!r}" for k, v, name, first in twins if v != first]
  wrong = [
    f"{k}={json[k]!r} (it is {what})"
    for what, test, names in KINDS
    for k in names
    if k in json and not test(json[k]) and not (json[k] is None and k in NULL)
  ]
  if unknown or missing or other or wrong:
    parts = (
      ("unknown fields, which may change the model", unknown),
      ("missing", missing),
      ("not supported", other),
      ("of a wrong type or value", wrong),
    )
    said = "; ".join(f"{title}: {', '.join(names)}" for title, names in parts if names)
    raise InputError(
      f"config.json of a {json['model_type']}: {said}. Remove what does not matter, or ask for support of what does."
    )
  defaults = {**READ, **(MT5 if json["model_type"] == "mt5" else {})}
  return {**defaults, **json}


def _activation(c: dict) -> tuple[str, bool]:
  """Returns (activation, gated) as transformers derives them from feed_forward_proj; stored copies must agree."""
  kind = c["feed_forward_proj"]
  parts = kind.split("-")
  gated, act = parts[0] == "gated", "gelu_new" if kind == "gated-gelu" else parts[-1]
  if len(parts) > 2 or (len(parts) == 2 and not gated) or act not in layers.ACTIVATIONS:
    raise InputError(
      f"config.json: feed_forward_proj is {kind!r}; jaxft knows ACT and gated-ACT with ACT one of "
      f"{', '.join(layers.ACTIVATIONS)}."
    )
  for name, found, derived in (("dense_act_fn", c["dense_act_fn"], act), ("is_gated_act", c["is_gated_act"], gated)):
    if found is not None and found != derived:
      raise InputError(
        f"config.json: {name} is {found!r}, but feed_forward_proj {kind!r} means {derived!r}. "
        "transformers goes by feed_forward_proj; correct one of the two."
      )
  return act, gated


def generation(json: dict, s: encdec.Spec) -> dict:
  """Returns what decoding needs besides the weights: decoder_start, eos (a tuple), pad, vocab."""
  c = _fields(json)
  eos = c["eos_token_id"]
  eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
  pad = c["pad_token_id"]
  if pad is None:
    pad = eos[0] if eos else s.decoder_start  # the first as transformers, which pads with nothing where nothing ends
  return dict(decoder_start=s.decoder_start, eos=eos, pad=pad, vocab=s.vocab)


def complete(json: dict, s: encdec.Spec) -> dict:
  """Returns the config.json of this model as transformers 5 writes it (`hub.save` adds dtype and version).

  One thing differs: an untied head is written as tie_word_embeddings = false, which transformers 4 needs and 5 accepts.
  """
  drop = ("torch_dtype", "dtype", "_name_or_path", "name_or_path", "_commit_hash", *SAME)
  written = dict(
    architectures=["MT5ForConditionalGeneration" if json["model_type"] == "mt5" else "T5ForConditionalGeneration"],
    classifier_dropout=json.get("classifier_dropout", 0.0),
    decoder_start_token_id=s.decoder_start,
    dense_act_fn=s.act,
    is_decoder=False,
    is_encoder_decoder=True,
    is_gated_act=s.gated,
    num_decoder_layers=s.decoder_layers,
    tie_word_embeddings=s.tied,
    use_cache=json.get("use_cache", True),
  )
  if json["model_type"] == "t5":
    written["scale_decoder_outputs"] = s.scaled
  else:
    written["bos_token_id"] = json.get("bos_token_id")
    drop += ("scale_decoder_outputs",)
  return {k: v for k, v in {**_fields(json), **written}.items() if k not in drop}


def settle(json: dict, folder: pathlib.Path) -> dict:
  """Returns `json` with tie_word_embeddings and (T5) scale_decoder_outputs as transformers 5 finds them in `folder`."""
  s = spec(json)
  names = hub.tensor_names(folder)
  tables = [n for n in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight") if n in names]
  if not tables:
    return json  # `hub.load` reports it with the rest
  tied = "lm_head.weight" not in names or hub.equal(folder, "lm_head.weight", tables[0])
  scaled = {"scale_decoder_outputs": s.scaled} if json["model_type"] == "t5" else {}
  return {**json, "tie_word_embeddings": tied, **scaled}


def rules(s: encdec.Spec) -> list[hub.Rule]:
  """The whole correspondence with the Hub, both ways: [out, in] there is [in, heads, head_dim] here."""
  copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") + (("lm_head.weight",) if s.tied else ())
  table = [hub.Rule("shared.weight", "embed/embedding", copies=copies)]
  if not s.tied:
    table.append(hub.linear("lm_head.weight", "head/kernel"))
  for side in ("encoder", "decoder"):
    block, ours = side + ".block.{i}.layer.", f"{side}/layers/"
    sublayers = [("self", "SelfAttention")] + ([("cross", "EncDecAttention")] if side == "decoder" else [])
    for j, (name, theirs) in enumerate(sublayers):
      table += [hub.heads_in(f"{block}{j}.{theirs}.{x}.weight", f"{ours}{name}_attn/{x}/kernel") for x in "qkv"]
      table.append(hub.heads_out(f"{block}{j}.{theirs}.o.weight", f"{ours}{name}_attn/o/kernel"))
      table.append(hub.Rule(f"{block}{j}.layer_norm.weight", f"{ours}{name}_norm/scale"))
    last = f"{block}{len(sublayers)}."
    for x in ("wi_0", "wi_1", "wo") if s.gated else ("wi", "wo"):
      table.append(hub.linear(f"{last}DenseReluDense.{x}.weight", f"{ours}mlp/{x}/kernel"))
    table.append(hub.Rule(f"{last}layer_norm.weight", f"{ours}mlp_norm/scale"))
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table.append(hub.Rule(bias, f"{side}/relative_bias/embedding"))
    table.append(hub.Rule(f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale"))
  # The first T5 files hold an unused bias of the first cross-attention; transformers ignores it too.
  table.append(hub.ignore("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"))
  return table


def resize(json: dict, params: Any, vocab: int) -> tuple[dict, Any]:
  """Returns (config.json, params) with `vocab` rows: the old bit for bit, each new one the float32 mean of the old.

  The mean keeps the sum over new logits small beside the old ones (Hewitt 2021, "Initializing new word embeddings");
  raises InputError where `vocab` is below the present size.
  """
  old = json["vocab_size"]
  if vocab < old:
    raise InputError(
      f"vocabulary: the model has {old} entries and cannot shrink to {vocab}; T5 pads its table beyond "
      "the tokenizer's size, so a smaller tokenizer needs no change."
    )

  def grow(x: jax.Array, axis: int) -> jax.Array:
    mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, vocab - old, axis)], axis)

  out = {**params, "embed": {"embedding": grow(params["embed"]["embedding"], 0)}}
  if "head" in params:
    out["head"] = {"kernel": grow(params["head"]["kernel"], 1)}
  return {**json, "vocab_size": vocab}, out
