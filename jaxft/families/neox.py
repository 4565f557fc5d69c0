"""GPT-NeoX (Black et al. 2022), Pythia, Dolly 2, RedPajama: config.json and names on the Hub."""

import functools

from jaxft import names
from jaxft.families import decoder, fields, ropes
from jaxft.families.family import Family, layer_rules, stack_rules
from jaxft.families.gpt2 import decoder_heads
from jaxft.models import attention, block, layers, single, stack

FIELDS = dict(
  vocab_size=fields.count(),
  hidden_size=fields.count(),
  num_hidden_layers=fields.count(),
  num_attention_heads=fields.count(),
  intermediate_size=fields.count(),
  hidden_act=fields.activation("gelu"),
  attention_dropout=fields.share(0.0),
  hidden_dropout=fields.share(0.0),
  attention_probs_dropout_prob=fields.share(0.0),  # this and the next: in old files, never applied
  hidden_dropout_prob=fields.share(0.0),
  classifier_dropout=fields.share(0.1),
  max_position_embeddings=fields.count(2048),
  initializer_range=fields.number(0.02),
  layer_norm_eps=fields.number(1e-5),
  use_parallel_residual=fields.flag(True),
  attention_bias=fields.flag(True),
  rotary_pct=fields.number(0.25),
  rotary_emb_base=fields.number(10000),
  rope_scaling=fields.maybe(fields.group()),
  rope_parameters=fields.maybe(fields.group()),
  tie_word_embeddings=fields.flag(False),
  bos_token_id=fields.maybe(fields.token(0)),
  eos_token_id=fields.maybe(fields.tokens(2)),
  is_decoder=fields.flag(False),  # of no effect
  is_encoder_decoder=fields.only(False),
)


def spec(c: dict) -> single.Spec:
  d, n, std, rate = c["hidden_size"], c["num_attention_heads"], c["initializer_range"], c["hidden_dropout"]
  h = fields.divided(c, "hidden_size", "num_attention_heads")
  layer = block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=n, kv_heads=n, head_dim=h, scale=h**-0.5, stds=(std,) * 4,
      bias="qkvo" if c["attention_bias"] else "", dropout=c["attention_dropout"]),
    mlp=c["intermediate_size"], act=c["hidden_act"], gated=False, mlp_bias=True, mlp_stds=(std,) * 2, mlp_dropout=0.0,
    norm=layers.NormSpec("layer", c["layer_norm_eps"], True), places=("pre",), dropout=rate,
    parallel=c["use_parallel_residual"])  # fmt: skip
  rope = ropes.read({**c, "partial_rotary_factor": c["rotary_pct"]}, h, c["rotary_emb_base"])
  body = stack.Spec(depth=c["num_hidden_layers"], layer=layer, causal=True, dropout=rate, ropes=(rope,))
  return single.Spec(vocab=c["vocab_size"], embed_scale=1.0, std=std, stack=body, heads=())


TABLE = {
  "self_norm": "input_layernorm",
  "self_attn/o": "attention.dense",
  "mlp_norm": "post_attention_layernorm",
  "mlp/wi": "mlp.dense_h_to_4h",
  "mlp/wo": "mlp.dense_4h_to_h",
}
BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")


def rules(s: single.Spec) -> list[names.Rule]:
  """Returns the table; in query_key_value, q, k and v of a head stand together, head after head."""
  a, hub = s.stack.layer.attention, "layers.{i}.attention."
  n, h, d = a.heads, a.head_dim, a.width
  split = lambda *more: names.parts((n * 3 * h, *more), 1, (1, 1, 1), view=(n, 3, h, *more))
  out = [names.plain("embed_in.weight", "embed/embedding")]
  out += stack_rules("", "decoder", s.stack, dict(final_norm="final_layer_norm"))
  out += layer_rules("layers.{i}.", "decoder/layers", s.stack.layer, TABLE)
  for x, kernel, bias in zip("qkv", split(d), split()):
    there, here = f"{hub}query_key_value", f"decoder/layers/self_attn/{x}"
    out.append(names.heads_in(f"{there}.weight", f"{here}/kernel", part=kernel))
    out += [names.heads_bias(f"{there}.bias", f"{here}/bias", part=bias)] if a.bias else []
  return out + [names.ignore(f"{hub}{x}") for x in BUFFERS]


HEADS = decoder_heads(
  "GPTNeoX", "gpt_neox.", lambda c: c["initializer_range"], lm="ForCausalLM", out="embed_out",
  copies=("lm_head.weight",), drop=lambda c: c["classifier_dropout"])  # fmt: skip
settle = functools.partial(decoder.settle, table="gpt_neox.embed_in.weight", head="embed_out.weight")
FAMILY = Family(FIELDS, spec, rules, HEADS, "lm", ("embed_out.weight", "lm_head.weight"), settle=settle)
