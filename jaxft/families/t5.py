"""T5 1.0, T5 1.1, Flan-T5, ByT5 (model_type t5) and mT5 (mt5): their config.json and their names on the Hub.

T5 1.0 ties the head and multiplies what goes into it with d_model**-0.5; 1.1 does neither, and says so only by
tie_word_embeddings = false. transformers 5 writes true for every T5, keeps the scaling in `scale_decoder_outputs`, and
takes the head as tied unless the file holds another one, as `settle` does here. mT5 never scales.
"""

import dataclasses
import pathlib

from jaxft import hub, names
from jaxft.errors import InputError
from jaxft.families import fields
from jaxft.families.family import Family, Head, Json, end_tokens, first_token, labelled, layer_rules, norm
from jaxft.models import attention, block, encdec, heads, layers, stack

FIELDS = dict(
  **{k: fields.count() for k in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")},
  relative_attention_num_buckets=fields.count(32),
  relative_attention_max_distance=fields.count(128),
  dropout_rate=fields.share(0.1),
  layer_norm_epsilon=fields.number(1e-6),
  initializer_factor=fields.number(1.0),
  feed_forward_proj=fields.gated_activation("relu"),
  dense_act_fn=fields.maybe(fields.text()),
  **{k: fields.maybe(fields.flag()) for k in ("is_gated_act", "tie_word_embeddings", "scale_decoder_outputs")},
  decoder_start_token_id=fields.maybe(fields.token()),
  pad_token_id=fields.maybe(fields.token(0)),
  eos_token_id=fields.maybe(fields.tokens(1)),
  classifier_dropout=fields.share(0.0),
  is_encoder_decoder=fields.only(True),
  add_cross_attention=fields.only(False, True),
  **{k: fields.same(v) for k, v in dict(head_dim="d_kv", hidden_size="d_model").items()},
  **{f"num_{k}": fields.same(v) for k, v in dict(hidden_layers="num_layers", attention_heads="num_heads").items()},
  num_decoder_layers=fields.maybe(fields.count()),
  **{k: fields.maybe(fields.count()) for k in ("n_positions", "max_position_embeddings")},  # of no effect
)
MT5 = FIELDS | dict(
  feed_forward_proj=fields.gated_activation("gated-gelu"), scale_decoder_outputs=fields.only(None, False),
  decoder_start_token_id=fields.maybe(fields.token(0)))  # fmt: skip
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _derived(c: Json) -> Json:
  """Returns the fields of a config.json that follow from others."""
  kind, scaled = c["feed_forward_proj"], c["scale_decoder_outputs"]
  act, tied = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"), c["tie_word_embeddings"] is not False
  more = dict(scale_decoder_outputs=tied if scaled is None else scaled) if c["model_type"] == "t5" else {}
  return dict(dense_act_fn=act, is_gated_act=kind.startswith("gated-"), tie_word_embeddings=tied) | more


def spec(c: Json) -> encdec.Spec:
  derived = _derived(c)
  wrong = [f"{k}={c[k]!r}, where feed_forward_proj means {v!r}" for k, v in derived.items() if c[k] not in (None, v)]
  if wrong:
    raise InputError(
      f"config.json: {'; '.join(wrong)}. transformers goes by feed_forward_proj; correct one of the two."
    )
  d, h, n, f, rate = c["d_model"], c["d_kv"], c["num_heads"], c["initializer_factor"], c["dropout_rate"]
  w = f * d**-0.5
  layer = block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=n, kv_heads=n, head_dim=h, scale=1.0, dropout=rate,
      stds=(f * (d * h) ** -0.5, w, w, f * (n * h) ** -0.5)),
    mlp=c["d_ff"], act=derived["dense_act_fn"], gated=derived["is_gated_act"], mlp_bias=False, mlp_dropout=rate,
    mlp_stds=(w, f * c["d_ff"] ** -0.5), norm=layers.NormSpec("rms", c["layer_norm_epsilon"], False, init=f),
    places=("pre",), dropout=rate)  # fmt: skip
  encoder = stack.Spec(
    depth=c["num_layers"], layer=layer, causal=False, dropout=rate, final_dropout=rate, std=w,
    buckets=c["relative_attention_num_buckets"], max_distance=c["relative_attention_max_distance"])  # fmt: skip
  decoder = dataclasses.replace(encoder, depth=c["num_decoder_layers"] or c["num_layers"], causal=True)
  start = first_token(c, "decoder_start_token_id", "pad_token_id")
  return encdec.Spec(c["vocab_size"], 1.0, f, encoder, decoder, (), start, end_tokens(c))


def complete(c: Json, s: encdec.Spec) -> Json:
  """Returns what transformers writes; but an untied head as tie_word_embeddings = false, which transformers 4 needs."""
  return _derived(c) | dict(num_decoder_layers=s.decoder.depth, decoder_start_token_id=s.decoder_start)


def settle(json: Json, folder: pathlib.Path) -> Json:
  """Returns `json` with tie_word_embeddings and (T5) scale_decoder_outputs as transformers 5 finds them in `folder`."""
  found = hub.tensor_names(folder)
  tables = [n for n in ("shared.weight", *COPIES) if n in found]
  if not tables:  # a classifier, whose head is of no such kind; or `hub.load` reports it with the rest
    return json
  tied = "lm_head.weight" not in found or hub.equal(folder, "lm_head.weight", tables[0])
  derived = _derived(fields.read(json, FAMILIES[json["model_type"]].fields))
  return {**json, "tie_word_embeddings": tied, **{k: v for k, v in derived.items() if k == "scale_decoder_outputs"}}


def rules(s: encdec.Spec) -> list[names.Rule]:
  table = [names.plain("shared.weight", "embed/embedding", copies=COPIES)]
  for side, stack_ in (("encoder", s.encoder), ("decoder", s.decoder)):
    sublayers = (("self", "SelfAttention"), ("cross", "EncDecAttention"))[: 1 + stack_.causal]
    wi, last = ("wi_0", "wi_1") if stack_.layer.gated else ("wi",), len(sublayers)
    theirs = {f"mlp/{x}": f"{last}.DenseReluDense.{x}" for x in (*wi, "wo")} | {"mlp_norm": f"{last}.layer_norm"}
    for j, (name, there) in enumerate(sublayers):
      theirs |= {f"{name}_attn/{x}": f"{j}.{there}.{x}" for x in "qkvo"} | {f"{name}_norm": f"{j}.layer_norm"}
    table += layer_rules(f"{side}.block.{{i}}.layer.", f"{side}/layers", stack_.layer, theirs)
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table.append(names.plain(bias, f"{side}/relative_bias/embedding"))
    table += norm(f"{side}.final_layer_norm", f"{side}/final_norm", stack_.layer.norm)
  # The first T5 files hold an unused bias of the first cross-attention; transformers ignores it too.
  return [*table, names.ignore("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")]


def family(name: str, given: dict) -> Family:
  std = lambda c: c["initializer_factor"] * c["d_model"] ** -0.5
  scale = lambda c: c["d_model"] ** -0.5 if _derived(c).get("scale_decoder_outputs") else 1.0
  tied = lambda c: _derived(c)["tie_word_embeddings"]
  language = lambda c, out: heads.Spec(out, False, c["initializer_factor"], tied=tied(c), scale=scale(c))
  lm = Head(f"{name}ForConditionalGeneration", language, dict(out="lm_head"), "")
  made = dict(lm=lm) | labelled(name, std, "transformer.", "")
  return Family(given, spec, rules, made, default="lm", settle=settle, complete=complete)


FAMILIES = dict(t5=family("T5", FIELDS), mt5=family("MT5", MT5))
