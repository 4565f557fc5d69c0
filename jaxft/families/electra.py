"""ELECTRA (Clark et al. 2020): BERT whose embeddings may be narrower than its layers. The discriminator serves as an
encoder, the generator as a masked language model; the discriminator's own head, which tells replaced tokens, belongs to
no task here and is not read.
"""

from jaxft.families import bert, encoder, fields, roberta
from jaxft.families.family import Family, Head
from jaxft.models import single

FIELDS = dict(
  encoder.FIELDS,
  embedding_size=fields.count(),
  summary_type=fields.text("first"),  # this and the rest: of a head for multiple choice
  summary_use_proj=fields.flag(True),
  summary_activation=fields.maybe(fields.text("gelu")),
  summary_last_dropout=fields.share(0.1),
)


def spec(c: dict) -> single.Spec:
  narrow = c["embedding_size"] != c["hidden_size"]
  return encoder.model(c, width=c["embedding_size"], project="after" if narrow else "", project_bias=narrow)


def head(name: str, spec, hub: dict) -> Head:
  return Head(f"Electra{name}", lambda c, out: spec(c, out, "gelu"), hub, "electra.")


G, OUT = "generator_predictions", "generator_lm_head"
HEADS = dict(
  base=Head("ElectraModel", encoder.nothing, {}, ""),
  classify=head("ForSequenceClassification", roberta.classify, roberta.CLASSIFY),
  mlm=head("ForMaskedLM", encoder.transformed, dict(dense=f"{G}.dense", norm=f"{G}.LayerNorm", out=OUT)),
  **encoder.tag_and_qa("Electra", "electra."),
)
IGNORED = ("discriminator_predictions.*",)
SETTLE = encoder.tied(f"electra.{bert.WORDS}", OUT)
FAMILY = Family(FIELDS, spec, bert.rules, HEADS, default="base", ignored=IGNORED, settle=SETTLE)
