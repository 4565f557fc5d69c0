"""GPT-2 (Radford et al. 2019) and DistilGPT-2: config.json and names on the Hub."""

import functools
from collections.abc import Callable

from jaxft import names
from jaxft.families import decoder, fields
from jaxft.families.family import Family, Head, layer_rules, stack_rules
from jaxft.models import attention, block, heads, layers, single, stack

FIELDS = dict(
  vocab_size=fields.count(),
  n_positions=fields.count(1024),
  n_embd=fields.count(),
  n_layer=fields.count(),
  n_head=fields.count(),
  n_inner=fields.maybe(fields.count()),
  activation_function=fields.activation("gelu_new"),
  resid_pdrop=fields.share(0.1),
  embd_pdrop=fields.share(0.1),
  attn_pdrop=fields.share(0.1),
  layer_norm_epsilon=fields.number(1e-5),
  initializer_range=fields.number(0.02),
  scale_attn_weights=fields.flag(True),
  scale_attn_by_inverse_layer_idx=fields.only(False),
  reorder_and_upcast_attn=fields.flag(False),  # of no effect: scores are in float32 in any case
  tie_word_embeddings=fields.flag(True),
  bos_token_id=fields.maybe(fields.token(50256)),
  eos_token_id=fields.maybe(fields.tokens(50256)),
  is_encoder_decoder=fields.only(False),
  n_ctx=fields.maybe(fields.count()),  # of no effect: the size of a buffer in old versions
  n_special=fields.only(0, None),  # this and the next: left from GPT-1 in old files
  predict_special_tokens=fields.only(True, False, None),
  summary_type=fields.text("cls_index"),  # this and the rest: of a head for multiple choice
  summary_use_proj=fields.flag(True),
  summary_activation=fields.maybe(fields.text()),
  summary_proj_to_labels=fields.flag(True),
  summary_first_dropout=fields.share(0.1),
  hidden_size=fields.same("n_embd"),
  max_position_embeddings=fields.same("n_positions"),
  num_attention_heads=fields.same("n_head"),
  num_hidden_layers=fields.same("n_layer"),
)


def spec(c: dict) -> single.Spec:
  d, std = c["n_embd"], c["initializer_range"]
  h = fields.divided(c, "n_embd", "n_head")
  last = std * (2 * c["n_layer"]) ** -0.5  # of what is added to the residual, of which there are two a layer
  layer = block.Spec(
    attention=attention.AttentionSpec(
      width=d, heads=c["n_head"], kv_heads=c["n_head"], head_dim=h, stds=(std, std, std, last), bias="qkvo",
      scale=h**-0.5 if c["scale_attn_weights"] else 1.0, dropout=c["attn_pdrop"]),
    mlp=c["n_inner"] or 4 * d, act=c["activation_function"], gated=False, mlp_bias=True, mlp_stds=(std, last),
    mlp_dropout=0.0, norm=layers.NormSpec("layer", c["layer_norm_epsilon"], True), places=("pre",),
    dropout=c["resid_pdrop"])  # fmt: skip
  around = dict(dropout=c["embd_pdrop"], positions=c["n_positions"], std=std)
  body = stack.Spec(depth=c["n_layer"], layer=layer, causal=True, **around)
  return single.Spec(vocab=c["vocab_size"], embed_scale=1.0, std=std, stack=body, heads=())


NORMS = dict(self_norm="ln_1", mlp_norm="ln_2")


def rules(s: single.Spec) -> list[names.Rule]:
  """Returns the table: kernels are [in, out] (Conv1D), those of q, k and v one tensor."""
  a, hub, ours = s.stack.layer.attention, "h.{i}.", "decoder/layers/"
  d, inner = a.width, a.heads * a.head_dim
  kernels, biases = (names.parts(whole, axis, (inner,) * 3) for whole, axis in (((d, 3 * inner), 1), ((3 * inner,), 0)))
  out = [names.plain("wte.weight", "embed/embedding")]
  out += stack_rules("", "decoder", s.stack, dict(positions="wpe", final_norm="ln_f"))
  out += layer_rules(hub, "decoder/layers", s.stack.layer, NORMS)
  for x, kernel, bias in zip("qkv", kernels, biases):
    out.append(names.conv_heads_in(f"{hub}attn.c_attn.weight", f"{ours}self_attn/{x}/kernel", part=kernel))
    out.append(names.heads_bias(f"{hub}attn.c_attn.bias", f"{ours}self_attn/{x}/bias", part=bias))
  out.append(names.conv_heads_out(f"{hub}attn.c_proj.weight", f"{ours}self_attn/o/kernel"))
  out.append(names.plain(f"{hub}attn.c_proj.bias", f"{ours}self_attn/o/bias"))
  for x, there in (("wi", "mlp.c_fc"), ("wo", "mlp.c_proj")):
    out += [names.plain(f"{hub}{there}.{y}", f"{ours}mlp/{x}/{z}") for y, z in (("weight", "kernel"), ("bias", "bias"))]
  return [*out, *(names.ignore(f"{hub}attn.{x}") for x in ("bias", "masked_bias"))]  # buffers: the causal mask


def decoder_heads(
  name: str,
  prefix: str,
  std: Callable[[dict], float],
  *,
  lm: str,
  out: str = "lm_head",
  copies: tuple[str, ...] = (),
  drop: Callable[[dict], float] | None = None,
) -> dict[str, Head]:
  """Returns the heads of a decoder whose classes in transformers begin with `name`.

  `lm` is the rest of its language model's; `out` that head's module and `copies` more names of its weights; `drop`
  gives the dropout of the head for each token, None: it has no such head.
  """
  plain = lambda c, n: heads.Spec(n, True, std(c))
  language = lambda c, n: heads.Spec(n, False, std(c), tied=c["tie_word_embeddings"])
  label = lambda c, n: heads.Spec(n, False, std(c), pool="last")
  token = lambda c, n: heads.Spec(n, True, std(c), dropout=drop(c))
  made = dict(
    lm=Head(f"{name}{lm}", language, dict(out=out), prefix, copies=(copies, ())),
    classify=Head(f"{name}ForSequenceClassification", label, dict(out="score"), prefix),
    qa=Head(f"{name}ForQuestionAnswering", plain, dict(out="qa_outputs"), prefix),
  )
  if drop:
    made["tag"] = Head(f"{name}ForTokenClassification", token, dict(out="classifier"), prefix)
  return made


DROP = lambda c: 0.1 if c["classifier_dropout"] is None else c["classifier_dropout"]
HEADS = decoder_heads("GPT2", "transformer.", lambda c: c["initializer_range"], lm="LMHeadModel", drop=DROP)
settle = functools.partial(decoder.settle, table="transformer.wte.weight")
FAMILY = Family(FIELDS, spec, rules, HEADS, "lm", ("multiple_choice_head.*", "lm_head.weight"), settle=settle)
