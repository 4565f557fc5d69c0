"""StarCoder2 (Lozhkov et al. 2024, section 5): a decoder with layer norms, biases, rope and a plain MLP."""

import dataclasses

from jaxft.families import decoder, fields, ropes
from jaxft.families.family import Json
from jaxft.models import layers, single

FIELDS = dict(
  num_key_value_heads=fields.count(2),
  hidden_act=fields.activation("gelu_pytorch_tanh"),
  initializer_range=fields.number(0.018042),
  max_position_embeddings=fields.count(4096),
  norm_epsilon=fields.number(1e-5),
  rms_norm_eps=fields.only(None),
  sliding_window=fields.maybe(fields.count()),
  residual_dropout=fields.share(0.0),
  embedding_dropout=fields.share(0.0),
  use_bias=fields.flag(True),
  tie_word_embeddings=fields.flag(True),
  head_dim=fields.only(None),
  **decoder.tokens(None, 50_256, 50_256),
)


def spec(c: Json) -> single.Spec:
  one = decoder.layer({**c, "rms_norm_eps": 1.0}, bias="qkvo" if c["use_bias"] else "", dropout=c["residual_dropout"])
  norm = layers.NormSpec("layer", c["norm_epsilon"], True)
  one = dataclasses.replace(one, norm=norm, gated=False, mlp_bias=c["use_bias"])
  depth, size = c["num_hidden_layers"], c["sliding_window"]
  s = decoder.model(c, one, windows=ropes.windows([ropes.SLIDING if size else ropes.FULL] * depth, size))
  return dataclasses.replace(s, stack=dataclasses.replace(s.stack, dropout=c["embedding_dropout"]))


TABLE = {k: v for k, v in decoder.TABLE.items() if not k.startswith("mlp/")}
TABLE |= {"mlp/wi": "mlp.c_fc", "mlp/wo": "mlp.c_proj"}

FAMILIES = dict(starcoder2=decoder.family(FIELDS, "Starcoder2", spec, rules=lambda s: decoder.rules(s, TABLE)))
