"""Phi-3 and Phi-4 with the plain rope (model_type phi3): Llama with q, k and v in one matrix, the MLP's halves too."""

from jaxft import names
from jaxft.errors import InputError
from jaxft.families import decoder, fields, ropes
from jaxft.families.family import Json
from jaxft.models import single

FIELDS = dict(
  rms_norm_eps=fields.number(1e-5),
  max_position_embeddings=fields.count(4096),
  original_max_position_embeddings=fields.count(4096),  # of longrope only
  sliding_window=fields.maybe(fields.count()),
  resid_pdrop=fields.share(0.0),
  embd_pdrop=fields.share(0.0),  # of no effect in transformers, nor here
  attention_bias=fields.only(False),
  **decoder.tokens(32_000, 1, 32_000),
)


def spec(c: Json) -> single.Spec:
  given = c["rope_scaling"] or c["rope_parameters"] or {}
  kind = given.get("rope_type", given.get("type", "default"))
  if kind != "default":
    raise InputError(
      f"config.json: the rope of this phi3 is of type {kind!r}. Of Phi-3's ropes jaxft has the plain one, that of the "
      "models for 4,000 positions and of Phi-4, and not longrope (su, yarn), whose frequencies change with the length "
      "of a text. Take such a model."
    )
  layer = decoder.layer(c, dropout=c["resid_pdrop"])
  size, depth = c["sliding_window"], c["num_hidden_layers"]
  rope = ropes.read(c, layer.attention.head_dim, 10_000.0)
  return decoder.model(c, layer, ropes=(rope,), windows=(size,) * depth if size else ())


TABLE = {k: v for k, v in decoder.TABLE.items() if k.split("/")[-1] not in ("q", "k", "v", "wi_0", "wi_1")}


def rules(s: single.Spec) -> list[names.Rule]:
  a, mlp, layer = s.stack.layer.attention, s.stack.layer.mlp, "decoder/layers"
  sizes = [n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]
  qkv = names.parts((sum(sizes), a.width), 0, sizes)
  halves = names.parts((2 * mlp, a.width), 0, (mlp, mlp))
  one = lambda x, part: names.heads_in(
    "layers.{i}.self_attn.qkv_proj.weight", f"{layer}/self_attn/{x}/kernel", part=part
  )
  other = lambda x, part: names.linear("layers.{i}.mlp.gate_up_proj.weight", f"{layer}/mlp/{x}/kernel", part=part)
  return [*decoder.rules(s, TABLE), *map(one, "qkv", qkv), *map(other, ("wi_0", "wi_1"), halves)]


FAMILIES = dict(phi3=decoder.family(FIELDS, "Phi3", spec, rules=rules))
