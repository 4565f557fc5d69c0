"""Llama 2 to 3.2 and SmolLM (model_type llama), Mistral, Qwen 2 and 2.5 (qwen2) and Qwen 3 (qwen3)."""

from jaxft.families import decoder, fields, ropes
from jaxft.families.family import Json
from jaxft.models import single

LLAMA = dict(
  attention_bias=fields.flag(False),
  mlp_bias=fields.flag(False),
  pretraining_tp=fields.only(1),
  is_llama_config=fields.only(True),  # this and the next: SmolLM 2
  rope_interleaved=fields.only(False),
  **decoder.tokens(None, 1, 2),
)
MISTRAL = dict(
  num_key_value_heads=fields.maybe(fields.count(8)),
  max_position_embeddings=fields.count(131_072),
  sliding_window=fields.maybe(fields.count(4096)),
  **decoder.tokens(None, 1, 2),
)
QWEN2 = dict(
  num_key_value_heads=fields.maybe(fields.count(32)),
  max_position_embeddings=fields.count(32_768),
  use_sliding_window=fields.flag(False),
  sliding_window=fields.maybe(fields.count(4096)),
  max_window_layers=fields.Field("a whole number", fields.is_id, 28),  # the layers before it see everything
  layer_types=fields.maybe(fields.names()),
  use_mrope=fields.only(False),
)
QWEN3 = dict(QWEN2, head_dim=fields.count(128), attention_bias=fields.flag(False))


def spec(c: Json) -> single.Spec:
  kind, depth, size = c["model_type"], c["num_hidden_layers"], c.get("sliding_window")
  if "layer_types" in c:
    size = size if c["use_sliding_window"] else None
    first = c["max_window_layers"] if size else depth
    types = ropes.layers(c, [ropes.SLIDING if i >= first else ropes.FULL for i in range(depth)])
  else:
    types = [ropes.SLIDING if size else ropes.FULL] * depth
  bias = "qkv" if kind == "qwen2" else "qkvo" if c.get("attention_bias") else ""
  layer = decoder.layer(c, bias=bias, qk_norm=decoder.rms(c) if kind == "qwen3" else None)
  return decoder.model(c, layer, windows=ropes.windows(types, size))


FAMILIES = dict(
  llama=decoder.family(LLAMA, "Llama", spec, "lm classify tag qa"),
  mistral=decoder.family(MISTRAL, "Mistral", spec, "lm classify tag qa", qa="model."),
  qwen2=decoder.family(QWEN2, "Qwen2", spec, "lm classify tag qa"),
  qwen3=decoder.family(QWEN3, "Qwen3", spec, "lm classify tag qa"),
)
