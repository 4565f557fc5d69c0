"""Small models for trying a config offline: `configs/NAME.py:tiny`. Fresh weights, byte-level tokenizers, made-up data.

They show that a job runs from the data to the exported folder and that it learns, in a minute or two on a CPU; they are
no good for anything else.
"""

from typing import Any

from ml_collections import ConfigDict

_ENCODER = dict(
  vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
  max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)  # fmt: skip
_DECODER = dict(
  vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
  intermediate_size=128, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1)  # fmt: skip
_ENCDEC = dict(
  vocab_size=280, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
  encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=512, dropout=0.0, pad_token_id=0, bos_token_id=2,
  eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1)  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = dict(  # model_type -> (tokenizer, config.json)
  bert=("bytes-encoder", _ENCODER),
  gpt2=(
    "bytes-decoder",
    dict(vocab_size=264, n_embd=64, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0,
         attn_pdrop=0.0, pad_token_id=0, bos_token_id=None, eos_token_id=1),
  ),
  llama=("bytes-decoder", _DECODER),
  qwen2=("bytes-decoder", _DECODER),
  gemma2=("bytes-decoder", dict(_DECODER, head_dim=16, sliding_window=64)),
  bart=("bytes-encdec", _ENCDEC),
  marian=("bytes-encdec", dict(_ENCDEC, decoder_start_token_id=0)),
  t5=(
    "bytes-encdec",
    dict(vocab_size=280, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
         eos_token_id=1, decoder_start_token_id=0),
  ),
)  # fmt: skip


def apply(c: ConfigDict, model: str, data: str, *, steps: int = 150, lr: float = 3e-3, **lengths: int) -> ConfigDict:
  """Returns `c` with the stand-in of `model`, a key of MODELS, and the built-in data set `data`."""
  tokenizer, config = MODELS[model]
  c.model.init, c.model.config, c.model.tokenizer = "", dict(config, model_type=model), f"builtin:{tokenizer}"
  c.data.train, c.data.validation = f"builtin:samples-{data}:train", f"builtin:samples-{data}:validation"
  c.data.lengths = lengths or dict(inputs=256)
  c.steps, c.batch, c.micro, c.model.remat = steps, 8, 1, "none"
  c.optimizer.update(name="adamw", lr=lr, schedule="linear", warmup=0.1)
  for e in c.evals.values():
    e.batch, e.limit = 16, 100
  return c
