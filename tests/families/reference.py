"""Tiny T5s of every variant, and what transformers and torch, imported in functions only, compute with them."""

import jax
import numpy as np

# Compiling is what these tests take time for. CPU seconds to compile one tiny step with gradients: 9.4 as usual, 6.0
# without LLVM's optimisation, 2.0 with the older code generator as well. Tests only: what it makes is slower.
FAST = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones do not know it
  FAST["xla_cpu_use_fusion_emitters"] = False

# Every number is nobody's default, and no two dimensions are equal, so that a swapped one cannot pass.
BASE = dict(
  vocab_size=37,
  d_model=12,
  d_kv=5,
  d_ff=17,
  num_layers=2,
  num_decoder_layers=3,
  num_heads=3,
  pad_token_id=0,
  relative_attention_num_buckets=10,
  relative_attention_max_distance=19,
  layer_norm_epsilon=3e-4,
  eos_token_id=1,
  dropout_rate=0.23,
  decoder_start_token_id=0,
  initializer_factor=0.7,
)

VARIANTS = {
  "t5": dict(model_type="t5", feed_forward_proj="relu"),
  "v1_1": dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=3),
  "gated_tied": dict(model_type="t5", feed_forward_proj="gated-silu", num_layers=3, num_decoder_layers=1),
  "tied_unscaled": dict(
    model_type="t5", feed_forward_proj="gelu", tie_word_embeddings=True, scale_decoder_outputs=False
  ),
  "mt5": dict(model_type="mt5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=4),
  "byt5": dict(
    model_type="t5",
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    num_layers=4,
    num_decoder_layers=1,
    vocab_size=53,
  ),
}


def config(variant: str) -> dict:
  return {**BASE, **VARIANTS[variant]}


def batch(vocab: int) -> dict[str, np.ndarray]:
  """Three rows of different lengths, longer than the last relative bucket begins, with padding on both sides."""
  rng = np.random.default_rng(7)
  out = {}
  for name, lengths in (("input", (25, 9, 1)), ("target", (22, 4, 13))):
    inside = np.arange(max(lengths)) < np.array(lengths)[:, None]
    out[f"{name}s"] = np.where(inside, rng.integers(2, vocab, inside.shape), 0).astype(np.int32)
    out[f"{name}_segments"] = inside.astype(np.int32)
  out["weights"] = out["target_segments"].astype(np.float32)
  return out


def weights(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
  """Returns weights by the Hub's names, so large (deviation 0.2) that errors show; RandomState's stream is frozen."""
  rng = np.random.RandomState(11)
  mean = lambda name: 1.0 if "layer_norm" in name else 0.0
  return {n: (mean(n) + 0.2 * rng.standard_normal(shapes[n])).astype(np.float32) for n in sorted(shapes)}


def torch_model(variant: str, **changes):
  """Returns the model in transformers, in evaluation mode, with `weights`."""
  import torch
  import transformers

  given = {**config(variant), **changes}
  kind = given.pop("model_type")
  prefix = "MT5" if kind == "mt5" else "T5"
  c = getattr(transformers, f"{prefix}Config")(**given)
  c._attn_implementation = "eager"
  model = getattr(transformers, f"{prefix}ForConditionalGeneration")(c)
  if given.get("tie_word_embeddings") is False:
    model.lm_head.weight = torch.nn.Parameter(torch.empty(c.vocab_size, c.d_model))
  parameters = dict(model.named_parameters())
  for name, value in weights({n: tuple(p.shape) for n, p in parameters.items()}).items():
    parameters[name].data = torch.tensor(value)
  return model.eval()


def compute(model, rows: dict) -> dict:
  """Returns logits, loss and gradients (by the Hub's names) of transformers for a batch."""
  import torch

  labels = np.where(rows["weights"] > 0, rows["targets"], -100)
  out = model(
    input_ids=torch.tensor(rows["inputs"]).long(),
    attention_mask=torch.tensor(rows["input_segments"]),
    labels=torch.tensor(labels).long(),
  )
  model.zero_grad()
  out.loss.backward()
  grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
  return dict(logits=out.logits.detach().numpy(), loss=float(out.loss.detach()), grads=grads)
