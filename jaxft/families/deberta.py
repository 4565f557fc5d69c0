"""DeBERTa v3 (He et al. 2021; model_type deberta-v2): BERT with scores between tokens and distances both ways. The
vectors of distances are shared by the layers, which project them with the weights of q and k.

Not built: the convolution after the first layer of v2, and projections of their own for distances.
"""

import dataclasses
from typing import Any

from jaxft import names
from jaxft.errors import InputError
from jaxft.families import bert, encoder, fields
from jaxft.families.family import Family, Head, norm
from jaxft.models import heads, single


def must(*values: Any) -> fields.Field:
  """Returns a field that has to be there, with one of `values`: without it, transformers builds another model."""
  return dataclasses.replace(fields.only(*values), default=fields.REQUIRED, null=False)


FIELDS = dict(
  encoder.FIELDS,
  type_vocab_size=fields.Field("a whole number", fields.is_id, 0),
  layer_norm_eps=fields.number(1e-7),
  relative_attention=must(True),
  share_att_key=must(True),
  pos_att_type=must("p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"]),
  position_buckets=fields.count(),
  max_relative_positions=fields.Field("a whole number", lambda v: type(v) is int, -1),
  norm_rel_ebd=fields.only("none", "layer_norm"),
  position_biased_input=fields.flag(True),
  conv_kernel_size=fields.only(0),
  attention_head_size=fields.only(None),
  embedding_size=fields.same("hidden_size"),
  pooler_hidden_size=fields.same("hidden_size"),
  pooler_dropout=fields.share(0.0),
  pooler_hidden_act=fields.activation("gelu"),
  cls_dropout=fields.maybe(fields.share()),
  classifier_dropout=fields.only(None),
  legacy=fields.only(True, False),  # False: see `language`
)


def spec(c: dict) -> single.Spec:
  half, far = c["position_buckets"], c["max_relative_positions"]
  far = far if far > 0 else c["max_position_embeddings"]
  if half < 4 or far - 1 <= half // 2:
    raise InputError(
      f"config.json of a deberta-v2: position_buckets={half} does not fit distances below {far} "
      "(max_relative_positions, or else max_position_embeddings); it is at least 4 and below twice as many."
    )
  h = fields.divided(c, "hidden_size", "num_attention_heads")
  one = encoder.layer(c, scale=(3 * h) ** -0.5, disentangled=True, distance_dropout=c["hidden_dropout_prob"])
  places = c["max_position_embeddings"] if c["position_biased_input"] else 0
  normed = c["norm_rel_ebd"] == "layer_norm"
  return encoder.model(c, one, positions=places, buckets=half, max_distance=far, distance_norm=normed)


TABLE = {
  **bert.TABLE,
  **{f"self_attn/{x}": f"attention.self.{y}_proj" for x, y in zip("qkv", ("query", "key", "value"))},
}


def rules(s: single.Spec) -> list[names.Rule]:
  distances = [names.plain("encoder.rel_embeddings.weight", "encoder/relative_bias/embedding")]
  if s.stack.distance_norm:
    distances += norm("encoder.LayerNorm", "encoder/relative_bias/norm", s.stack.layer.norm)
  unused = [] if s.stack.positions else [names.ignore("embeddings.position_embeddings.weight")]
  return [*bert.rules(s, TABLE), *distances, *unused]


def classify(c: dict, out: int) -> heads.Spec:
  drop = c["hidden_dropout_prob"] if c["cls_dropout"] is None else c["cls_dropout"]
  return encoder.pooled(c, out, act=c["pooler_hidden_act"], dropout_in=c["pooler_dropout"], dropout=drop)


def language(c: dict, out: int) -> heads.Spec:
  if not c["legacy"]:
    raise InputError("config.json of a deberta-v2: legacy=false, a masked language model that jaxft does not build.")
  return encoder.transformed(c, out)


POOLER = dict(dense="pooler.dense", out="classifier")
HEADS = dict(
  base=Head("DebertaV2Model", encoder.nothing, {}, ""),
  classify=Head("DebertaV2ForSequenceClassification", classify, POOLER, "deberta."),
  mlm=Head("DebertaV2ForMaskedLM", language, **{**bert.MLM, "prefix": "deberta."}),
  **encoder.tag_and_qa("DebertaV2", "deberta."),
)
IGNORED = ("lm_predictions.*", "mask_predictions.*")
SETTLE = encoder.tied(f"deberta.{bert.WORDS}", f"{bert.P}.decoder")
FAMILY = Family(FIELDS, spec, rules, HEADS, default="base", ignored=IGNORED, settle=SETTLE)
