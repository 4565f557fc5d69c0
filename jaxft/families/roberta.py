"""RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2019; xlm-roberta): BERT with positions that begin after the pad
token's, and other heads.
"""

from jaxft.families import bert, encoder, fields
from jaxft.families.family import Family, Head
from jaxft.models import heads, single

FIELDS = dict(
  encoder.FIELDS,
  pad_token_id=fields.token(1),
  bos_token_id=fields.maybe(fields.token(0)),
  eos_token_id=fields.maybe(fields.tokens(2)),
)


def spec(c: dict) -> single.Spec:
  return encoder.model(c, offset=c["pad_token_id"] + 1)


def classify(c: dict, out: int, act: str = "tanh") -> heads.Spec:
  return encoder.pooled(c, out, act=act, dropout_in=encoder.dropout(c))


CLASSIFY = dict(dense="classifier.dense", out="classifier.out_proj")
MLM = dict(
  hub=dict(dense="lm_head.dense", norm="lm_head.layer_norm", out="lm_head.decoder"),
  prefix="roberta.",
  bias="lm_head.bias",
  copies=((), ("lm_head.decoder.bias",)),
)


def family(name: str) -> Family:
  """Returns the family whose classes in transformers begin with `name`."""
  language = lambda c, out: encoder.transformed(c, out, "gelu")
  made = dict(
    base=Head(f"{name}Model", encoder.pooled, dict(dense="pooler.dense"), ""),
    classify=Head(f"{name}ForSequenceClassification", classify, CLASSIFY, "roberta."),
    mlm=Head(f"{name}ForMaskedLM", language, **MLM),
    **encoder.tag_and_qa(name, "roberta."),
  )
  settle = encoder.tied(f"roberta.{bert.WORDS}", "lm_head.decoder")
  return Family(FIELDS, spec, bert.rules, made, "base", ignored=("roberta.pooler.dense.*",), settle=settle)


FAMILIES = {"roberta": family("Roberta"), "xlm-roberta": family("XLMRoberta")}
