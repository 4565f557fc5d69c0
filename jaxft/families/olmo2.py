"""OLMo 2 (Walsh et al. 2024, section 3.2): Llama with its norms after attention and MLP, and over all of q and of k."""

from jaxft.families import decoder, fields
from jaxft.families.family import Json
from jaxft.models import single

FIELDS = dict(rms_norm_eps=fields.number(1e-5), attention_bias=fields.flag(False), **decoder.tokens(1, None, 50_279))


def spec(c: Json) -> single.Spec:
  bias = "qkvo" if c["attention_bias"] else ""
  layer = decoder.layer(c, ("post",), bias=bias, qk_norm=decoder.rms(c), qk_norm_whole=True)
  return decoder.model(c, layer)


NORMS = dict(self_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
TABLE = {k: v for k, v in decoder.TABLE.items() if not k.endswith("norm")} | NORMS

FAMILIES = dict(olmo2=decoder.family(FIELDS, "Olmo2", spec, "lm classify", rules=lambda s: decoder.rules(s, TABLE)))
