"""What Llama and its relatives share: fields of config.json, a layer in numbers, names on the Hub, heads."""

import logging
import pathlib
from collections.abc import Callable, Mapping

from jaxft import hub, names
from jaxft.families import fields, ropes
from jaxft.families.family import Family, Head, Json, layer_rules, stack_rules
from jaxft.models import attention, block, heads, layers, single, stack

FIELDS = dict(
  **{k: fields.count() for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
  num_attention_heads=fields.count(),
  num_key_value_heads=fields.maybe(fields.count()),
  head_dim=fields.maybe(fields.count()),
  hidden_act=fields.activation("silu"),
  initializer_range=fields.number(0.02),
  rms_norm_eps=fields.number(1e-6),
  tie_word_embeddings=fields.flag(False),
  attention_dropout=fields.share(0.0),
  is_encoder_decoder=fields.only(False),
  **ropes.FIELDS,
) | {"transformers.js_config": fields.maybe(fields.group())}  # of no effect here


def tokens(pad: int | None, bos: int | None, eos: int | None) -> dict:
  """Returns the fields of the special tokens with these defaults."""
  one = lambda default: fields.maybe(fields.token(default))
  return dict(pad_token_id=one(pad), bos_token_id=one(bos), eos_token_id=fields.maybe(fields.tokens(eos)))


def rms(c: Json, offset: float = 0.0) -> layers.NormSpec:
  return layers.NormSpec("rms", c["rms_norm_eps"], False, init=1.0 - offset, offset=offset)


def layer(c: Json, places: tuple = ("pre",), offset: float = 0.0, dropout: float = 0.0, **more) -> block.Spec:
  """Returns the numbers of a layer; `offset` is that of its norms, `more` are numbers of its attention."""
  n, std = c["num_attention_heads"], c["initializer_range"]
  head_dim = c["head_dim"] or fields.divided(c, "hidden_size", "num_attention_heads")
  if c["num_key_value_heads"]:
    fields.divided(c, "num_attention_heads", "num_key_value_heads")
  return block.Spec(
    attention=attention.AttentionSpec(
      width=c["hidden_size"], heads=n, kv_heads=c["num_key_value_heads"] or n, head_dim=head_dim, stds=(std,) * 4,
      **(dict(scale=head_dim**-0.5, dropout=c["attention_dropout"]) | more)),
    mlp=c["intermediate_size"], act=c["hidden_act"], gated=True, mlp_bias=c.get("mlp_bias", False),
    mlp_stds=(std,) * 2, mlp_dropout=0.0, norm=rms(c, offset), places=places, dropout=dropout)  # fmt: skip


def model(c: Json, one: block.Spec, embed_scale: float = 1.0, **more) -> single.Spec:
  """Returns the numbers of a model of such layers; `more` are those of its stack, such as windows."""
  turn = dict(ropes=(ropes.read(c, one.attention.head_dim, 10_000.0, partial=False),)) if "ropes" not in more else {}
  body = stack.Spec(depth=c["num_hidden_layers"], layer=one, causal=True, dropout=0.0, **turn, **more)
  return single.Spec(c["vocab_size"], embed_scale, c["initializer_range"], body, ())


TABLE = {
  "self_norm": "input_layernorm",
  **{f"self_attn/{x}": f"self_attn.{x}_proj" for x in "qkvo"},
  "mlp_norm": "post_attention_layernorm",
  **{f"mlp/{x}": f"mlp.{y}_proj" for x, y in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))},
}
QK = {f"self_attn/{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
EMBED = "model.embed_tokens.weight"


def rules(s: single.Spec, table: Mapping[str, str] = TABLE) -> list[names.Rule]:
  table = {**table, **QK} if s.stack.layer.attention.qk_norm else table
  return [
    names.plain("embed_tokens.weight", "embed/embedding"),
    *stack_rules("", "decoder", s.stack, dict(final_norm="norm")),
    *layer_rules("layers.{i}.", "decoder/layers", s.stack.layer, table),
    names.ignore("layers.{i}.self_attn.rotary_emb.inv_freq"),
  ]


def settle(json: Json, folder: pathlib.Path, table: str = EMBED, head: str = "lm_head.weight") -> Json:
  """Returns `json` with a head that is not tied where the folder holds one unlike the table, as transformers 5 does.

  Files of the bare model lack the first part of the name of the `table`.
  """
  found = hub.tensor_names(folder)
  table = next((n for n in (table, table.split(".", 1)[1]) if n in found), None)
  if table is None or head not in found or hub.equal(folder, head, table):
    return json
  if json.get("tie_word_embeddings") is True:
    said = "%s: config.json says that the head is tied, but %s differs from %s: it is taken as not tied."
    logging.getLogger("jaxft").warning(said, folder, head, table)
  return {**json, "tie_word_embeddings": False}


def family(
  given: dict, name: str, spec: Callable, kinds="lm classify tag", *, rules=rules, qa="transformer.", **more
) -> Family:
  """Returns the family whose classes in transformers are called `name`, with heads of these kinds.

  `given` are its fields beside FIELDS, `qa` is the prefix of the model in question answering, `more` are other entries
  of Family.
  """
  std = lambda c: c["initializer_range"]
  drop = lambda c: 0.1 if c["classifier_dropout"] is None else c["classifier_dropout"]
  cap = lambda c: c.get("final_logit_softcapping") or 0.0
  language = lambda c, out: heads.Spec(out, False, std(c), tied=c["tie_word_embeddings"], softcap=cap(c))
  label = lambda c, out: heads.Spec(out, False, std(c), pool="last")
  token = lambda c, out: heads.Spec(out, True, std(c), dropout=drop(c))
  span = lambda c, out: heads.Spec(out, True, std(c))
  made = dict(
    lm=Head(f"{name}ForCausalLM", language, dict(out="lm_head"), "model."),
    classify=Head(f"{name}ForSequenceClassification", label, dict(out="score"), "model."),
    tag=Head(f"{name}ForTokenClassification", token, dict(out="score"), "model."),
    qa=Head(f"{name}ForQuestionAnswering", span, dict(out="qa_outputs"), qa),
  )
  chosen = {k: made[k] for k in kinds.split()}
  return Family(
    {**FIELDS, **given}, spec, rules, chosen, "lm", **(dict(ignored=("lm_head.weight",), settle=settle) | more)
  )
