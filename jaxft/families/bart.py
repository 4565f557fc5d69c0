"""BART (Lewis et al. 2019) and mBART (Liu et al. 2020): config.json and names on the Hub; Pegasus and Marian use them.

mBART's decoder starts with the last token of the target: in training that of the labels (the end, or a language behind
it), when it generates the config's decoder_start_token_id.
"""

from jaxft import names
from jaxft.families import fields
from jaxft.families.family import Family, Head, end_tokens, first_token, labelled, layer_rules, stack_rules
from jaxft.models import attention, block, encdec, heads, layers, stack

SIDES, OFFSET = ("encoder", "decoder"), 2  # row of the first position

FIELDS = dict(
  **{k: fields.count() for k in ("vocab_size", "d_model")},
  **{f"{side}_{k}": fields.count() for side in SIDES for k in ("layers", "attention_heads", "ffn_dim")},
  **{f"{side}_layerdrop": fields.only(0.0) for side in SIDES},
  max_position_embeddings=fields.count(1024),
  activation_function=fields.activation("gelu"),
  dropout=fields.share(0.1),
  **{k: fields.share(0.0) for k in ("attention_dropout", "activation_dropout", "classifier_dropout")},
  init_std=fields.number(0.02),
  scale_embedding=fields.flag(False),
  tie_word_embeddings=fields.only(True),
  is_encoder_decoder=fields.only(True),
  hidden_size=fields.same("d_model"),
  num_hidden_layers=fields.same("encoder_layers"),
  num_attention_heads=fields.same("encoder_attention_heads"),
  # of old files and of no effect, as in transformers 5
  classif_dropout=fields.maybe(fields.share()),
  extra_pos_embeddings=fields.maybe(fields.number()),
  force_bos_token_to_be_generated=fields.maybe(fields.flag()),
  save_step=fields.maybe(fields.number()),
  **{k: fields.only(False) for k in ("add_bias_logits", "do_blenderbot_90_layernorm")},
)


def given(start: int | None, pad: int, bos: int | None, eos: int, *, pre: bool, norm: bool, sinusoidal: bool) -> dict:
  """Returns the fields of a family with these tokens; the last ones repeat in old files what `build` is told."""
  return FIELDS | dict(
    decoder_start_token_id=fields.maybe(fields.token(start)),
    pad_token_id=fields.maybe(fields.token(pad)),
    bos_token_id=fields.maybe(fields.token(bos)),
    eos_token_id=fields.maybe(fields.tokens(eos)),
    forced_eos_token_id=fields.maybe(fields.tokens(eos)),
    normalize_before=fields.only(pre),
    add_final_layer_norm=fields.only(pre),
    normalize_embedding=fields.only(norm),
    static_position_embeddings=fields.only(sinusoidal),
  )


def build(c: dict, *, pre: bool, norm: bool, sinusoidal: bool, start_is_last: bool = False) -> encdec.Spec:
  """Returns the numbers of a model with norms before its sublayers (`pre`) or after the sums, with a norm after the
  embeddings (`norm`) or none, with sinusoidal positions or learned ones.
  """
  d, std, rate, offset = c["d_model"], c["init_std"], c["dropout"], 0 if sinusoidal else OFFSET

  def side(name: str) -> stack.Spec:
    n, h = c[f"{name}_attention_heads"], fields.divided(c, "d_model", f"{name}_attention_heads")
    layer = block.Spec(
      attention=attention.AttentionSpec(
        width=d, heads=n, kv_heads=n, head_dim=h, scale=h**-0.5, stds=(std,) * 4, bias="qkvo",
        dropout=c["attention_dropout"]),
      mlp=c[f"{name}_ffn_dim"], act=c["activation_function"], gated=False, mlp_bias=True, mlp_stds=(std,) * 2,
      mlp_dropout=c["activation_dropout"], norm=layers.NormSpec("layer", 1e-5, True),
      places=("pre" if pre else "out",), dropout=rate)  # fmt: skip
    return stack.Spec(
      depth=c[f"{name}_layers"], layer=layer, causal=name == "decoder", dropout=rate, final_norm=pre, norm=norm,
      positions=c["max_position_embeddings"] + offset, offset=offset, sinusoidal=sinusoidal, std=std)  # fmt: skip

  start = first_token(c, "decoder_start_token_id", *(("bos_token_id",) if start_is_last else ()))
  scale = d**0.5 if c["scale_embedding"] else 1.0
  more = dict(start_is_last=start_is_last, still=c["pad_token_id"])
  return encdec.Spec(c["vocab_size"], scale, std, *map(side, SIDES), (), start, end_tokens(c), **more)


def rules(s: encdec.Spec) -> list[names.Rule]:
  table = [names.plain("shared.weight", "embed/embedding", copies=tuple(f"{x}.embed_tokens.weight" for x in SIDES))]
  around = dict(positions="embed_positions", norm="layernorm_embedding", final_norm="layer_norm")
  for side, stack_ in zip(SIDES, (s.encoder, s.decoder)):
    norm = "norm" if stack_.final_norm else "out_norm"
    theirs = {"mlp/wi": "fc1", "mlp/wo": "fc2", f"mlp_{norm}": "final_layer_norm"}
    for ours, there in (("self", "self_attn"), ("cross", "encoder_attn"))[: 1 + stack_.causal]:
      theirs |= {f"{ours}_attn/{x}": f"{there}.{y}_proj" for x, y in zip("qkvo", ("q", "k", "v", "out"))}
      theirs[f"{ours}_{norm}"] = f"{there}_layer_norm"
    table += stack_rules(f"{side}.", side, stack_, around)
    table += layer_rules(f"{side}.layers.{{i}}.", f"{side}/layers", stack_.layer, theirs)
    spare = ("version", "embed_positions.weight") if stack_.sinusoidal else ("version",)
    table += [names.ignore(f"{side}.{x}") for x in spare]
  return table


def language(architecture: str) -> dict[str, Head]:
  """Returns the vocabulary head, tied, with the constant bias final_logits_bias."""
  spec = lambda c, out: heads.Spec(out, True, c["init_std"], tied=True, fixed_bias=True)
  return dict(lm=Head(architecture, spec, dict(out="lm_head"), "model.", bias="final_logits_bias"))


def family(name: str, tokens: tuple, shape: dict, **more: bool) -> Family:
  """Returns the family whose classes are called `name`; `tokens` and `shape` are for `given`, `more` is for `build`."""
  made = language(f"{name}ForConditionalGeneration") | labelled(name, lambda c: c["init_std"], "model.", "model.")
  return Family(given(*tokens, **shape), lambda c: build(c, **shape, **more), rules, made, default="lm")


FAMILIES = dict(
  bart=family("Bart", (2, 1, 0, 2), dict(pre=False, norm=True, sinusoidal=False)),
  mbart=family("MBart", (None, 1, 0, 2), dict(pre=True, norm=True, sinusoidal=False), start_is_last=True),
)
