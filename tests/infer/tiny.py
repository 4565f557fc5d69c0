"""A tiny T5 with odd numbers and large weights, here and in transformers; for the tests and for make_goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import trees
from jaxft.families import registry
from jaxft.infer import generate, options

FAST = {"xla_backend_optimization_level": 0}

CONFIG = dict(  # T5 1.1 shape; every number is nobody's default
  model_type="t5",
  vocab_size=41,
  d_model=14,
  d_kv=5,
  d_ff=23,
  num_layers=3,
  num_decoder_layers=2,
  num_heads=3,
  relative_attention_num_buckets=10,
  relative_attention_max_distance=17,
  layer_norm_epsilon=3e-5,
  dropout_rate=0.3,
  feed_forward_proj="gated-gelu",
  tie_word_embeddings=False,
  pad_token_id=0,
  eos_token_id=1,
  decoder_start_token_id=0,
)

ROWS, LENGTH = 19, 13  # inputs of uneven lengths; most new tokens

# Ways of searching that are compared with transformers; the keys are fields of Options. Beams, penalty and stop rule:
# every pair of values once.
WAYS = {"greedy": {}}
for _i, _beams in enumerate((2, 3, 4)):
  for _j, _penalty in enumerate((0.6, 1.0, 2.0)):
    _stop = (False, True, "never")[(_i + _j) % 3]
    WAYS[f"beams={_beams} penalty={_penalty} stop={_stop}"] = dict(
      beams=_beams, length_penalty=_penalty, early_stopping=_stop, samples=_beams
    )
WAYS |= {
  "negative penalty": dict(beams=3, length_penalty=-1.3, early_stopping="never", samples=2),
  "three ends": dict(beams=3, eos=(1, 7, 9), samples=3),
  "least length, no repeats": dict(beams=3, min_length=5, no_repeat_ngram=2, samples=3),
  "least length, no repeats, greedy": dict(min_length=6, no_repeat_ngram=3),
  "forced, repetition": dict(beams=2, forced_bos=5, forced_eos=(1,), repetition_penalty=1.7, samples=2),
  "suppressed": dict(beams=2, suppress=(3, 11), begin_suppress=(4, 6, 20, 33), samples=2),
  "all at once, greedy": dict(
    eos=(1, 7), suppress=(3, 11), begin_suppress=(4, 6), forced_bos=5, forced_eos=(1,), repetition_penalty=1.4
  ),
}

THEIRS = dict(
  beams="num_beams",
  samples="num_return_sequences",
  eos="eos_token_id",
  min_length="min_new_tokens",
  forced_bos="forced_bos_token_id",
  forced_eos="forced_eos_token_id",
  suppress="suppress_tokens",
  begin_suppress="begin_suppress_tokens",
  no_repeat_ngram="no_repeat_ngram_size",
)


def skeleton():
  return registry.skeleton(CONFIG, dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)


def params(shapes):
  """Weights so large that attention is sharp, outputs vary from row to row, and the end token wins now and then."""
  flat = {}
  for i, (path, shape) in enumerate(sorted(trees.flatten(shapes).items())):
    rng = np.random.default_rng(1000 + i)
    x = rng.standard_normal(shape.shape).astype(np.float32)
    scale = 1.0 if "embedding" in path else 0.3 if path.endswith("kernel") else 0.2
    flat[path] = (1 + scale * x if path.endswith("scale") else scale * x).astype(np.float32)
  flat["head/kernel"][:, 1] *= 3.6
  return trees.unflatten(flat)


def inputs():
  """Returns i32 inputs and segments [ROWS, 12] with lengths from 2 to 12."""
  rng = np.random.default_rng(5)
  lengths = rng.integers(2, 13, ROWS)
  lengths[0] = 12
  inside = np.arange(12) < lengths[:, None]
  return np.where(inside, rng.integers(2, CONFIG["vocab_size"], inside.shape), 0).astype(np.int32), inside.astype(
    np.int32
  )


def torch_model(weights):
  """Returns the same model in transformers; the name table is written out here, apart from the package's own."""
  import torch
  import transformers

  flat = {k: np.asarray(v) for k, v in trees.flatten(weights).items()}
  square = lambda x: x.reshape(x.shape[0], -1).T  # [D, N, H] -> [N * H, D]
  out = {"shared.weight": flat["embed/embedding"], "lm_head.weight": flat["head/kernel"].T}
  for side, names in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
    depth = flat[f"{side}/layers/self_attn/q/kernel"].shape[0]
    out[f"{side}.final_layer_norm.weight"] = flat[f"{side}/final_norm/scale"]
    out[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = flat[
      f"{side}/relative_bias/embedding"
    ]
    for i in range(depth):
      leaf = lambda name, side=side, i=i: flat[f"{side}/layers/{name}"][i]
      for j, (name, theirs) in enumerate(zip(names, ("SelfAttention", "EncDecAttention"))):
        block = f"{side}.block.{i}.layer.{j}."
        out |= {f"{block}{theirs}.{x}.weight": square(leaf(f"{name}_attn/{x}/kernel")) for x in "qkv"}
        out[f"{block}{theirs}.o.weight"] = leaf(f"{name}_attn/o/kernel").reshape(-1, CONFIG["d_model"]).T
        out[block + "layer_norm.weight"] = leaf(f"{name}_norm/scale")
      block = f"{side}.block.{i}.layer.{len(names)}."
      out |= {f"{block}DenseReluDense.{x}.weight": leaf(f"mlp/{x}/kernel").T for x in ("wi_0", "wi_1", "wo")}
      out[block + "layer_norm.weight"] = leaf("mlp_norm/scale")
  config = transformers.T5Config(**{k: v for k, v in CONFIG.items() if k != "model_type"})
  model = transformers.T5ForConditionalGeneration(config)
  config.tie_word_embeddings = False
  state = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in out.items()}
  state |= {f"{side}.embed_tokens.weight": state["shared.weight"] for side in ("encoder", "decoder")}
  model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"].clone())
  model.load_state_dict(state, strict=True)
  return model.eval()


def reference(model, way: dict):
  """Returns (tokens [ROWS * R, <= LENGTH] without the start token, scores [ROWS * R] or None) of transformers."""
  import torch

  ids, mask = inputs()
  given = {THEIRS.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in way.items()}
  with torch.no_grad():
    out = model.generate(
      input_ids=torch.tensor(ids, dtype=torch.long),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      max_new_tokens=LENGTH,
      do_sample=False,
      return_dict_in_generate=True,
      output_scores=True,
      **given,
    )
  scores = getattr(out, "sequences_scores", None)
  return out.sequences[:, 1:].numpy(), None if scores is None else scores.numpy()


def ours(sk, weights, way: dict):
  """Returns the Options and jaxft's Generated for `way`; compiled without optimisation: half the time of a test."""
  o = options.Options(**({"length": LENGTH, "eos": (1,), "pad": 0, "start": 0} | way))
  ids, segments = inputs()
  run = jax.jit(
    lambda p, i, s: generate.generate(sk.bind(p), i, s, jnp.zeros((ROWS, 2), jnp.uint32), o), compiler_options=FAST
  )
  return o, jax.device_get(run(weights, ids, segments))


def cut_at_end(tokens, eos) -> list[int]:
  """Returns the tokens up to and with the first end token: what follows is filling."""
  tokens = [int(t) for t in tokens]
  ends = [i for i, t in enumerate(tokens) if t in eos]
  return tokens[: ends[0] + 1] if ends else tokens
