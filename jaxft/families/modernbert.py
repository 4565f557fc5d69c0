"""ModernBERT (Warner et al. 2024): norms before the sublayers, gated MLPs, and rotary positions; two layers of three
see a window, and have a rope of their own.
"""

import dataclasses
import math

from jaxft import names
from jaxft.errors import InputError
from jaxft.families import decoder, encoder, fields, ropes
from jaxft.families.family import Family, Head, Json, layer_rules, stack_rules
from jaxft.models import attention, block, heads, layers, single, stack

FIELDS = dict(
  **{name: fields.count() for name in encoder.SIZES},
  **{f"{name}_activation": fields.activation("gelu") for name in ("hidden", "classifier")},
  **{f"{name}_dropout": fields.share(0.0) for name in ("attention", "embedding", "mlp", "classifier")},
  **{f"{name}_bias": fields.flag(name == "decoder") for name in ("attention", "mlp", "norm", "classifier", "decoder")},
  norm_eps=fields.number(1e-5),
  max_position_embeddings=fields.count(8192),
  initializer_range=fields.number(0.02),
  initializer_cutoff_factor=fields.maybe(fields.number(2.0)),
  layer_types=fields.maybe(fields.names()),
  global_attn_every_n_layers=fields.count(3),
  local_attention=fields.Field("a whole number above 1", lambda v: type(v) is int and v > 1, 128),
  rope_parameters=fields.maybe(fields.group()),
  rope_scaling=fields.only(None),
  global_rope_theta=fields.number(160_000.0),
  local_rope_theta=fields.number(10_000.0),
  classifier_pooling=fields.only("cls", "mean"),
  tie_word_embeddings=fields.flag(True),
  **decoder.tokens(50283, 50281, 50282),
  is_encoder_decoder=fields.only(False),
  layer_norm_eps=fields.number(1e-5),  # this and the rest: of no effect
  position_embedding_type=fields.text("absolute"),
  sparse_pred_ignore_index=fields.number(-100),
  **{name: fields.flag(False) for name in ("sparse_prediction", "deterministic_flash_attn", "repad_logits_with_grad")},
  reference_compile=fields.maybe(fields.flag()),
)


def numbers(c: Json) -> tuple[layers.NormSpec, float, float]:
  """Returns the norm and the deviations of fresh inner and outer weights, of a normal distribution cut at both ends."""
  cut = 3 if c["initializer_cutoff_factor"] is None else c["initializer_cutoff_factor"]
  density, inside = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi), math.erf(cut / math.sqrt(2))
  std = c["initializer_range"] * math.sqrt(1 - 2 * cut * density / inside)
  return layers.NormSpec("layer", c["norm_eps"], c["norm_bias"]), std, std / math.sqrt(2 * c["num_hidden_layers"])


def turns(c: Json, head_dim: int) -> tuple:
  """Returns the ropes of the layers that see everything and of those with a window."""
  given, thetas = c["rope_parameters"] or {}, (c["global_rope_theta"], c["local_rope_theta"])
  if set(given) - set(ropes.LAYERS) or not all(isinstance(v, (dict, type(None))) for v in given.values()):
    raise InputError(
      f"config.json: rope_parameters of a modernbert is {given!r:.100}; it is an object with one object for each of "
      f"{', '.join(ropes.LAYERS)}."
    )
  return tuple(ropes.of(given.get(k) or {}, c, head_dim, t, partial=False) for k, t in zip(ropes.LAYERS, thetas))


def spec(c: Json) -> single.Spec:
  d, h, (norm, std, last) = c["hidden_size"], fields.divided(c, "hidden_size", "num_attention_heads"), numbers(c)
  layer = block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=d // h, kv_heads=d // h, head_dim=h, scale=h**-0.5, stds=(std, std, std, last),
      bias="qkvo" if c["attention_bias"] else "", dropout=c["attention_dropout"]),
    mlp=c["intermediate_size"], act=c["hidden_activation"], gated=True, mlp_bias=c["mlp_bias"], mlp_stds=(std, last),
    mlp_dropout=c["mlp_dropout"], norm=norm, places=("pre",), dropout=0.0,
    attention_out_dropout=c["attention_dropout"], bare_first=True)  # fmt: skip
  every, depth = c["global_attn_every_n_layers"], c["num_hidden_layers"]
  kinds = ropes.layers(c, [ropes.SLIDING if i % every else ropes.FULL for i in range(depth)])
  body = stack.Spec(
    depth=depth, layer=layer, causal=False, dropout=c["embedding_dropout"], norm=True, ropes=turns(c, h),
    kinds=tuple(map(ropes.LAYERS.index, kinds)), windows=ropes.windows(kinds, c["local_attention"] // 2))  # fmt: skip
  return single.Spec(vocab=c["vocab_size"], embed_scale=1.0, std=std, stack=body, heads=())


def rules(s: single.Spec) -> list[names.Rule]:
  """Returns the table; q, k and v are one tensor, the two inner weights of the MLP another."""
  layer, there, here = s.stack.layer, "layers.{i}.", "encoder/layers"
  out = [names.plain("embeddings.tok_embeddings.weight", "embed/embedding")]
  out += stack_rules("", "encoder", s.stack, dict(norm="embeddings.norm", final_norm="final_norm"))
  out += layer_rules(there, here, layer, {"self_attn/o": "attn.Wo", "mlp_norm": "mlp_norm", "mlp/wo": "mlp.Wo"})
  late = layer_rules(there, here, layer, dict(self_norm="attn_norm"))
  out += [dataclasses.replace(rule, first=1) for rule in late]  # the first layer has no such norm
  d, f = layer.attention.width, layer.mlp
  for hub, ours, sizes, kernel, bias, biased in (
    ("attn.Wqkv", [f"self_attn/{x}" for x in "qkv"], (d,) * 3, names.heads_in, names.heads_bias, layer.attention.bias),
    ("mlp.Wi", ("mlp/wi_0", "mlp/wi_1"), (f,) * 2, names.linear, names.plain, layer.mlp_bias),
  ):
    for x, one, other in zip(ours, names.parts((sum(sizes), d), 0, sizes), names.parts((sum(sizes),), 0, sizes)):
      out.append(kernel(f"{there}{hub}.weight", f"{here}/{x}/kernel", part=one))
      out += [bias(f"{there}{hub}.bias", f"{here}/{x}/bias", part=other)] if biased else []
  return out


def head(name: str, out: str = "classifier", more=lambda c: {}) -> Head:
  """Returns a head: dense, act, norm, output; `more` are numbers of its own."""

  def spec(c: Json, size: int) -> heads.Spec:
    norm, _, last = numbers(c)
    given = dict(bias=True, std=c["hidden_size"] ** -0.5, dropout=c["classifier_dropout"]) | more(c)
    return heads.Spec(size, dense=c["hidden_size"], dense_bias=c["classifier_bias"], dense_std=last, norm=norm,
                      act=c["classifier_activation"], **given)  # fmt: skip

  return Head(f"ModernBertFor{name}", spec, dict(dense="head.dense", norm="head.norm", out=out), "model.")


POOL = lambda c: dict(pool=dict(cls="first", mean="mean")[c["classifier_pooling"]])
VOCAB = lambda c: dict(bias=c["decoder_bias"], std=numbers(c)[2], dropout=0.0, tied=c["tie_word_embeddings"])
HEADS = dict(
  base=Head("ModernBertModel", encoder.nothing, {}, ""),
  **dict(classify=head("SequenceClassification", more=POOL), mlm=head("MaskedLM", "decoder", VOCAB)),
  **dict(tag=head("TokenClassification"), qa=head("QuestionAnswering")),
)
SETTLE = encoder.tied("model.embeddings.tok_embeddings", "decoder")
FAMILY = Family(FIELDS, spec, rules, HEADS, default="base", settle=SETTLE)
