"""OPT (Zhang et al. 2022) and Galactica: config.json and names on the Hub."""

import functools

from jaxft import names
from jaxft.families import decoder, fields
from jaxft.families.family import Family, layer_rules, stack_rules
from jaxft.families.gpt2 import decoder_heads
from jaxft.models import attention, block, layers, single, stack

OFFSET = 2  # row of the first position

FIELDS = dict(
  vocab_size=fields.count(),
  hidden_size=fields.count(),
  num_hidden_layers=fields.count(),
  num_attention_heads=fields.count(),
  ffn_dim=fields.count(),
  max_position_embeddings=fields.count(2048),
  do_layer_norm_before=fields.flag(True),
  _remove_final_layer_norm=fields.flag(False),
  word_embed_proj_dim=fields.maybe(fields.count()),
  dropout=fields.share(0.1),
  attention_dropout=fields.share(0.0),
  activation_dropout=fields.share(0.0),  # of no effect: in old files, never applied
  activation_function=fields.activation("relu"),
  layerdrop=fields.only(0.0),
  init_std=fields.number(0.02),
  enable_bias=fields.flag(True),
  layer_norm_elementwise_affine=fields.flag(True),
  learned_embeddings=fields.only(True, None),  # of Galactica
  scale_embeddings=fields.only(False, None),
  tie_word_embeddings=fields.flag(True),
  pad_token_id=fields.maybe(fields.token(1)),
  bos_token_id=fields.maybe(fields.token(2)),
  eos_token_id=fields.maybe(fields.tokens(2)),
  is_encoder_decoder=fields.only(False),
)


def spec(c: dict) -> single.Spec:
  d, n, std, before = c["hidden_size"], c["num_attention_heads"], c["init_std"], c["do_layer_norm_before"]
  h, bias, scaled = fields.divided(c, "hidden_size", "num_attention_heads"), c["enable_bias"], c[AFFINE]
  layer = block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=n, kv_heads=n, head_dim=h, scale=h**-0.5, stds=(std,) * 4, bias="qkvo" if bias else "",
      dropout=c["attention_dropout"]),
    mlp=c["ffn_dim"], act=c["activation_function"], gated=False, mlp_bias=bias, mlp_stds=(std,) * 2, mlp_dropout=0.0,
    norm=layers.NormSpec("layer", 1e-5, scaled, scaled=scaled), places=("pre" if before else "out",),
    dropout=c["dropout"])  # fmt: skip
  other = c["word_embed_proj_dim"] not in (None, d)
  return single.Spec(
    vocab=c["vocab_size"],
    embed_scale=1.0,
    std=std,
    stack=stack.Spec(
      depth=c["num_hidden_layers"],
      layer=layer,
      causal=True,
      dropout=0.0,
      final_norm=before and not c["_remove_final_layer_norm"],
      width=c["word_embed_proj_dim"] if other else 0,
      project="before" if other else "",
      project_back=other,
      positions=c["max_position_embeddings"] + OFFSET,
      offset=OFFSET,
      std=std,
    ),
    heads=(),
  )


AFFINE = "layer_norm_elementwise_affine"
ATTENTION = {f"self_attn/{x}": f"self_attn.{y}_proj" for x, y in zip("qkvo", ("q", "k", "v", "out"))}
MLP = {"mlp/wi": "fc1", "mlp/wo": "fc2"}
AROUND = dict(
  positions="embed_positions", project="project_in", project_back="project_out", final_norm="final_layer_norm"
)


def rules(s: single.Spec) -> list[names.Rule]:
  norm = block.PLACES[s.stack.layer.places[0]]
  table = {f"self_{norm}": "self_attn_layer_norm", f"mlp_{norm}": "final_layer_norm", **ATTENTION, **MLP}
  return [
    names.plain("decoder.embed_tokens.weight", "embed/embedding"),
    *stack_rules("decoder.", "decoder", s.stack, AROUND),
    *layer_rules("decoder.layers.{i}.", "decoder/layers", s.stack.layer, table),
    names.ignore("decoder.version"),
  ]


HEADS = decoder_heads("OPT", "model.", lambda c: c["init_std"], lm="ForCausalLM")
settle = functools.partial(decoder.settle, table="model.decoder.embed_tokens.weight")
FAMILY = Family(FIELDS, spec, rules, HEADS, "lm", ("lm_head.weight",), settle=settle)
