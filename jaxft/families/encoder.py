"""What BERT and its relatives share: fields of config.json, a layer and a model in numbers, heads."""

import dataclasses
import functools
from collections.abc import Callable

from jaxft.errors import InputError
from jaxft.families import decoder, fields
from jaxft.families.family import Head, Json
from jaxft.models import attention, block, heads, layers, single, stack

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FIELDS = dict(
  **{name: fields.count() for name in SIZES},
  hidden_act=fields.activation("gelu"),
  hidden_dropout_prob=fields.share(0.1),
  attention_probs_dropout_prob=fields.share(0.1),
  max_position_embeddings=fields.count(512),
  type_vocab_size=fields.count(2),
  initializer_range=fields.number(0.02),
  layer_norm_eps=fields.number(1e-12),
  pad_token_id=fields.maybe(fields.token(0)),
  position_embedding_type=fields.only("absolute"),
  tie_word_embeddings=fields.only(True, False),  # False: see `transformed`
  is_encoder_decoder=fields.only(False),
)


def norm(c: Json) -> layers.NormSpec:
  return layers.NormSpec("layer", c["layer_norm_eps"], True)


def layer(c: Json, **more) -> block.Spec:
  """Returns the numbers of a layer; `more` are those of its attention."""
  d, h, std = c["hidden_size"], fields.divided(c, "hidden_size", "num_attention_heads"), c["initializer_range"]
  given = dict(scale=h**-0.5, dropout=c["attention_probs_dropout_prob"]) | more
  return block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=d // h, kv_heads=d // h, head_dim=h, stds=(std,) * 4, bias="qkvo", **given),
    mlp=c["intermediate_size"], act=c["hidden_act"], gated=False, mlp_bias=True, mlp_stds=(std,) * 2, mlp_dropout=0.0,
    norm=norm(c), places=("out",), dropout=c["hidden_dropout_prob"])  # fmt: skip


def model(c: Json, one: block.Spec | None = None, **more) -> single.Spec:
  """Returns the numbers of a model of such layers; `more` are those of its stack."""
  std, drop = c["initializer_range"], c["hidden_dropout_prob"]
  given = dict(positions=c["max_position_embeddings"], types=c["type_vocab_size"]) | more
  around = dict(layer=one or layer(c), causal=False, dropout=drop, final_norm=False, norm=True, std=std)
  body = stack.Spec(depth=c["num_hidden_layers"], **around, **given)
  return single.Spec(vocab=c["vocab_size"], embed_scale=1.0, std=std, stack=body, heads=())


# ---- the numbers of heads: (what fields.read made of a config.json, outputs) -> heads.Spec


def nothing(c: Json, out: int) -> heads.Spec:
  """Of no head: the hidden states are what is asked for."""
  return heads.Spec(0, False, c["initializer_range"])


def dropout(c: Json) -> float:
  return c["hidden_dropout_prob"] if c["classifier_dropout"] is None else c["classifier_dropout"]


def each(c: Json, out: int) -> heads.Spec:
  """One linear layer on every token."""
  return heads.Spec(out, True, c["initializer_range"], dropout=dropout(c))


def pooled(c: Json, out: int, **more) -> heads.Spec:
  """The first token: dense, act, output; `out` 0: without the last."""
  given = dict(act="tanh", dropout=dropout(c) if out else 0.0) | more
  return heads.Spec(out, bool(out), c["initializer_range"], dense=c["hidden_size"], pool="first", **given)


def transformed(c: Json, out: int, act: str = "") -> heads.Spec:
  """A masked language model: dense, act, norm, tied output with a bias."""
  if not c["tie_word_embeddings"]:
    raise InputError(
      f"the masked language model of a {c['model_type']} is built only with its output tied to the token embeddings, "
      "and config.json (tie_word_embeddings) or the tensors say that they differ. Its other heads can be trained."
    )
  width, act = c.get("embedding_size") or c["hidden_size"], act or c["hidden_act"]
  return heads.Spec(out, True, c["initializer_range"], dense=width, act=act, norm=norm(c), tied=True)


def tag_and_qa(name: str, prefix: str) -> dict[str, Head]:
  """Returns two heads that are alike in most relatives, whose classes in transformers begin with `name`."""
  span = lambda c, out: dataclasses.replace(each(c, out), dropout=0.0)
  return dict(
    tag=Head(f"{name}ForTokenClassification", each, dict(out="classifier"), prefix),
    qa=Head(f"{name}ForQuestionAnswering", span, dict(out="qa_outputs"), prefix),
  )


def tied(table: str, head: str) -> Callable:
  """Returns the `settle` of a family whose vocabulary head `head` is tied to `table` where a folder's files agree."""
  return functools.partial(decoder.settle, table=f"{table}.weight", head=f"{head}.weight")
