"""BERT (Devlin et al. 2018): config.json and names on the Hub."""

from jaxft import names
from jaxft.families import encoder, fields
from jaxft.families.family import Family, Head, layer_rules, stack_rules
from jaxft.models import single

UNUSED = dict.fromkeys(  # by anything, in the files that Google's first models came with
  ("directionality", "pooler_type", *(f"pooler_{x}" for x in ("fc_size", "num_fc_layers", "size_per_head")),
   "pooler_num_attention_heads"), fields.Field("anything", lambda v: True, None))  # fmt: skip

TABLE = {
  **{f"self_attn/{x}": f"attention.self.{y}" for x, y in zip("qkv", ("query", "key", "value"))},
  "self_attn/o": "attention.output.dense",
  "self_out_norm": "attention.output.LayerNorm",
  "mlp/wi": "intermediate.dense",
  "mlp/wo": "output.dense",
  "mlp_out_norm": "output.LayerNorm",
}
AROUND = dict(
  positions="embeddings.position_embeddings",
  types="embeddings.token_type_embeddings",
  norm="embeddings.LayerNorm",
  project="embeddings_project",
)
WORDS = "embeddings.word_embeddings"


def rules(s: single.Spec, table: dict[str, str] = TABLE, layer: str = "encoder.layer.") -> list[names.Rule]:
  return [
    names.plain(f"{WORDS}.weight", "embed/embedding"),
    *stack_rules("", "encoder", s.stack, AROUND),
    *layer_rules(layer + "{i}.", "encoder/layers", s.stack.layer, table),
    names.ignore("embeddings.position_ids"),
  ]


P = "cls.predictions"
MLM = dict(
  hub=dict(dense=f"{P}.transform.dense", norm=f"{P}.transform.LayerNorm", out=f"{P}.decoder"),
  prefix="bert.",
  bias=f"{P}.bias",
  copies=((), (f"{P}.decoder.bias",)),
)
POOLER = dict(dense="bert.pooler.dense")
HEADS = dict(
  base=Head("BertModel", encoder.pooled, dict(dense="pooler.dense"), ""),
  classify=Head("BertForSequenceClassification", encoder.pooled, dict(POOLER, out="classifier"), "bert."),
  mlm=Head("BertForMaskedLM", encoder.transformed, **MLM),
  mlm_nsp=Head("BertForPreTraining", encoder.transformed, **MLM, also="nsp"),
  nsp=Head(
    "BertForNextSentencePrediction",
    lambda c, out: encoder.pooled(c, out).undropped(),
    dict(POOLER, out="cls.seq_relationship"),
    "bert.",
  ),
  **encoder.tag_and_qa("Bert", "bert."),
)
OLD = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
FAMILY = Family(
  {**encoder.FIELDS, **UNUSED},
  encoder.model,
  rules,
  HEADS,
  default="base",
  renames=OLD,
  settle=encoder.tied(f"bert.{WORDS}", f"{P}.decoder"),
)
