"""DistilBERT (Sanh et al. 2019): BERT without token types, under names of its own."""

import dataclasses

from jaxft import names
from jaxft.families import bert, encoder, fields
from jaxft.families.family import Family, Head
from jaxft.models import single

FIELDS = dict(
  **{name: fields.count() for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")},
  max_position_embeddings=fields.count(512),
  activation=fields.activation("gelu"),
  dropout=fields.share(0.1),
  attention_dropout=fields.share(0.1),
  qa_dropout=fields.share(0.1),
  seq_classif_dropout=fields.share(0.2),
  initializer_range=fields.number(0.02),
  pad_token_id=fields.maybe(fields.token(0)),
  sinusoidal_pos_embds=fields.only(False),  # how a fresh table begins
  tie_word_embeddings=encoder.FIELDS["tie_word_embeddings"],
  tie_weights_=fields.only(True),  # of old files
  is_encoder_decoder=fields.only(False),
  hidden_size=fields.same("dim"),
  num_attention_heads=fields.same("n_heads"),
  num_hidden_layers=fields.same("n_layers"),
)


def as_bert(c: dict, drop: str = "dropout") -> dict:
  """Returns the numbers under BERT's names; `drop` is the field with the dropout of the head."""
  return dict(
    c, hidden_size=c["dim"], num_attention_heads=c["n_heads"], num_hidden_layers=c["n_layers"],
    intermediate_size=c["hidden_dim"], hidden_act=c["activation"], hidden_dropout_prob=c["dropout"],
    attention_probs_dropout_prob=c["attention_dropout"], layer_norm_eps=1e-12, type_vocab_size=0,
    classifier_dropout=c[drop])  # fmt: skip


def spec(c: dict) -> single.Spec:
  c = as_bert(c)
  return encoder.model(c, dataclasses.replace(encoder.layer(c), attention_out_dropout=0.0))


TABLE = {
  **{f"self_attn/{x}": f"attention.{y}_lin" for x, y in zip("qkvo", ("q", "k", "v", "out"))},
  "self_out_norm": "sa_layer_norm",
  "mlp/wi": "ffn.lin1",
  "mlp/wo": "ffn.lin2",
  "mlp_out_norm": "output_layer_norm",
}


def rules(s: single.Spec) -> list[names.Rule]:
  return bert.rules(s, TABLE, "transformer.layer.")


def head(name: str, spec, hub: dict, prefix: str = "distilbert.", drop: str = "dropout") -> Head:
  return Head(f"DistilBert{name}", lambda c, out: spec(as_bert(c, drop), out), hub, prefix)


relu = lambda c, out: encoder.pooled(c, out, act="relu")
MLM = dict(dense="vocab_transform", norm="vocab_layer_norm", out="vocab_projector")
CLASSIFY = dict(dense="pre_classifier", out="classifier")
HEADS = dict(
  base=head("Model", encoder.nothing, {}, ""),
  classify=head("ForSequenceClassification", relu, CLASSIFY, drop="seq_classif_dropout"),
  tag=head("ForTokenClassification", encoder.each, dict(out="classifier")),
  qa=head("ForQuestionAnswering", encoder.each, dict(out="qa_outputs"), drop="qa_dropout"),
  mlm=head("ForMaskedLM", encoder.transformed, MLM),
)
SETTLE = encoder.tied(f"distilbert.{bert.WORDS}", "vocab_projector")
FAMILY = Family(FIELDS, spec, rules, HEADS, default="base", settle=SETTLE)
