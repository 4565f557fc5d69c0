"""Gemma 1 (model_type gemma) and Gemma 2 (gemma2).

Token embeddings are multiplied by the root of the width, which is rounded to the dtype of the activations first; norms
store scale - 1; the head is tied. Gemma 2 has norms after attention and MLP too, caps on scores and logits, and a
window in every second layer.
"""

from collections.abc import Mapping

from jaxft import names
from jaxft.families import decoder, fields, ropes
from jaxft.families.family import Json
from jaxft.models import single

TANH = "gelu_pytorch_tanh"


def above(default: float | None) -> fields.Field:
  """Returns a field for a number above 0, which may be null where that is its default."""
  return fields.Field("a number above 0", lambda v: type(v) in (int, float) and v > 0, default, default is None)


COMMON = dict(
  head_dim=fields.count(256),
  max_position_embeddings=fields.count(8192),
  tie_word_embeddings=fields.flag(True),
  attention_bias=fields.flag(False),
  use_bidirectional_attention=fields.only(None, False),
  **decoder.tokens(0, 2, 1),
)
GEMMA = dict(
  COMMON,
  num_key_value_heads=fields.count(16),
  hidden_act=fields.activation(TANH),  # "gelu" means it too
  hidden_activation=fields.only(None, TANH),
)
GEMMA2 = dict(
  COMMON,
  num_key_value_heads=fields.count(4),
  hidden_activation=fields.activation(TANH),
  hidden_act=fields.same("hidden_activation"),
  query_pre_attn_scalar=above(256),
  sliding_window=fields.maybe(fields.count(4096)),
  sliding_window_size=fields.same("sliding_window"),
  layer_types=fields.maybe(fields.names()),
  final_logit_softcapping=fields.maybe(above(30.0)),
  attn_logit_softcapping=fields.maybe(above(50.0)),
  cache_implementation=fields.maybe(fields.text()),  # of no effect
)


def model(c: Json, act: str, places: tuple[str, ...], attention: Mapping, **more) -> single.Spec:
  """Returns the numbers of a Gemma; `more` are those of its stack."""
  bias = "qkvo" if c["attention_bias"] else ""
  layer = decoder.layer({**c, "hidden_act": act}, places, offset=1.0, bias=bias, **attention)
  return decoder.model(c, layer, c["hidden_size"] ** 0.5, **more)


def spec(c: Json) -> single.Spec:
  return model(c, TANH if c["hidden_act"] == "gelu" else c["hidden_act"], ("pre",), {})


def spec2(c: Json) -> single.Spec:
  types = ropes.layers(c, [ropes.FULL if i % 2 else ropes.SLIDING for i in range(c["num_hidden_layers"])])
  more = dict(scale=c["query_pre_attn_scalar"] ** -0.5, softcap=c["attn_logit_softcapping"] or 0.0)
  windows = ropes.windows(types, c["sliding_window"])
  return model(c, c["hidden_activation"], ("pre", "post"), more, windows=windows)


AROUND = dict(
  self_norm="input_layernorm",
  self_post_norm="post_attention_layernorm",
  mlp_norm="pre_feedforward_layernorm",
  mlp_post_norm="post_feedforward_layernorm",
)


def rules(s: single.Spec) -> list[names.Rule]:
  return decoder.rules(s, decoder.TABLE | AROUND)


FAMILIES = dict(gemma=decoder.family(GEMMA, "Gemma", spec), gemma2=decoder.family(GEMMA2, "Gemma2", spec2, rules=rules))
