"""The config.json of well-known models, as far as it gives their shapes: to plan where their files are not at hand.

Numbers are those of the files on the Hub. Weights, tokenizers and generation settings are not here; a folder or the
Hub's cache with the real config.json goes before these.
"""

from typing import Any

Json = dict[str, Any]


def _t5(vocab: int, d: int, kv: int, ff: int, heads: int, layers: int, decoder: int = 0, old: bool = False) -> Json:
  act = "relu" if old else "gated-gelu"
  return dict(
    model_type="t5", vocab_size=vocab, d_model=d, d_kv=kv, d_ff=ff, num_heads=heads, num_layers=layers,
    num_decoder_layers=decoder or layers, feed_forward_proj=act, tie_word_embeddings=old,
    scale_decoder_outputs=old, decoder_start_token_id=0)  # fmt: skip


def _mt5(*numbers: int) -> Json:
  return {k: v for k, v in _t5(250112, *numbers).items() if k != "scale_decoder_outputs"} | dict(model_type="mt5")


def _bert(kind: str, vocab: int, d: int, layers: int, heads: int, positions: int = 512, types: int = 2) -> Json:
  return dict(
    model_type=kind, vocab_size=vocab, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
    intermediate_size=4 * d, max_position_embeddings=positions, type_vocab_size=types)  # fmt: skip


def _gpt2(d: int, layers: int, heads: int) -> Json:
  return dict(model_type="gpt2", vocab_size=50257, n_embd=d, n_layer=layers, n_head=heads)


def _decoder(kind: str, vocab: int, d: int, mlp: int, layers: int, heads: int, kv: int, h: int, **more: Any) -> Json:
  return dict(
    model_type=kind, vocab_size=vocab, hidden_size=d, intermediate_size=mlp, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv, head_dim=h, **more)  # fmt: skip


def _llama(d: int, mlp: int, layers: int, heads: int, kv: int, h: int, *, factor: float, tied: bool) -> Json:
  turn = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
  return _decoder(
    "llama", 128256, d, mlp, layers, heads, kv, h, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_theta=500000.0, rope_scaling=dict(turn, original_max_position_embeddings=8192), tie_word_embeddings=tied,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009])  # fmt: skip


def _qwen(kind: str, vocab: int, d: int, mlp: int, layers: int, heads: int, kv: int, h: int, tied: bool) -> Json:
  size = {} if kind == "qwen2" else dict(head_dim=h)
  json = {k: v for k, v in _decoder(kind, vocab, d, mlp, layers, heads, kv, h).items() if k != "head_dim"} | size
  more = dict(max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6)
  return json | more | dict(tie_word_embeddings=tied, eos_token_id=151645)


def _bart(d: int, layers: int, heads: int) -> Json:
  return dict(
    model_type="bart", vocab_size=50264 + (layers == 6), d_model=d, max_position_embeddings=1024,
    decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, bos_token_id=0,
    **{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in
       dict(layers=layers, attention_heads=heads, ffn_dim=4 * d).items()})  # fmt: skip


def _marian(vocab: int) -> Json:
  return dict(
    model_type="marian", vocab_size=vocab, d_model=512, max_position_embeddings=512, activation_function="swish",
    scale_embedding=True, decoder_start_token_id=vocab - 1, pad_token_id=vocab - 1, eos_token_id=0,
    **{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in
       dict(layers=6, attention_heads=8, ffn_dim=2048).items()})  # fmt: skip


def _gemma2(d: int, mlp: int, layers: int, heads: int, kv: int, h: int, scalar: int) -> Json:
  return _decoder(
    "gemma2", 256000, d, mlp, layers, heads, kv, h, query_pre_attn_scalar=scalar, sliding_window=4096,
    bos_token_id=2, eos_token_id=1, pad_token_id=0)  # fmt: skip


_V11 = dict(
  small=(512, 64, 1024, 6, 8), base=(768, 64, 2048, 12, 12), large=(1024, 64, 2816, 16, 24),
  xl=(2048, 64, 5120, 32, 24), xxl=(4096, 64, 10240, 64, 24))  # fmt: skip
_OLD = {
  "small": (512, 64, 2048, 8, 6), "base": (768, 64, 3072, 12, 12), "large": (1024, 64, 4096, 16, 24),
  "3b": (1024, 128, 16384, 32, 24), "11b": (1024, 128, 65536, 128, 24)}  # fmt: skip
_BYT5 = dict(
  small=(1472, 64, 3584, 6, 12, 4), base=(1536, 64, 3968, 12, 18, 6), large=(1536, 64, 3840, 16, 36, 12),
  xl=(2560, 64, 6720, 32, 36, 12), xxl=(4672, 64, 12352, 64, 36, 12))  # fmt: skip
_INSTRUCT = ("", "-Instruct")

MODELS: dict[str, Json] = {
  **{f"google-t5/t5-{k}": _t5(32128, *n, old=True) for k, n in _OLD.items()},
  **{f"google/{name}-{k}": _t5(32128, *n) for name in ("t5-v1_1", "flan-t5") for k, n in _V11.items()},
  **{f"google/mt5-{k}": _mt5(*n) for k, n in _V11.items()},
  **{f"google/byt5-{k}": _t5(384, *n) for k, n in _BYT5.items()},
  "google-bert/bert-base-uncased": _bert("bert", 30522, 768, 12, 12),
  "google-bert/bert-base-cased": _bert("bert", 28996, 768, 12, 12),
  "google-bert/bert-large-uncased": _bert("bert", 30522, 1024, 24, 16),
  "FacebookAI/roberta-base": _bert("roberta", 50265, 768, 12, 12, 514, 1) | dict(pad_token_id=1),
  "FacebookAI/roberta-large": _bert("roberta", 50265, 1024, 24, 16, 514, 1) | dict(pad_token_id=1),
  "distilbert/distilbert-base-uncased": dict(
    model_type="distilbert", vocab_size=30522, dim=768, n_layers=6, n_heads=12, hidden_dim=3072
  ),
  "openai-community/gpt2": _gpt2(768, 12, 12),
  "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
  "openai-community/gpt2-large": _gpt2(1280, 36, 20),
  "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
  "facebook/bart-base": _bart(768, 6, 12),
  "facebook/bart-large": _bart(1024, 12, 16),
  "Helsinki-NLP/opus-mt-en-de": _marian(58101),
  **{f"meta-llama/Llama-3.2-1B{x}": _llama(2048, 8192, 16, 32, 8, 64, factor=32.0, tied=True) for x in _INSTRUCT},
  **{f"meta-llama/Llama-3.2-3B{x}": _llama(3072, 8192, 28, 24, 8, 128, factor=32.0, tied=True) for x in _INSTRUCT},
  **{f"meta-llama/Llama-3.1-8B{x}": _llama(4096, 14336, 32, 32, 8, 128, factor=8.0, tied=False) for x in _INSTRUCT},
  **{f"meta-llama/Llama-3.1-70B{x}": _llama(8192, 28672, 80, 64, 8, 128, factor=8.0, tied=False) for x in _INSTRUCT},
  **{f"Qwen/Qwen2.5-0.5B{x}": _qwen("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True) for x in _INSTRUCT},
  **{f"Qwen/Qwen2.5-1.5B{x}": _qwen("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True) for x in _INSTRUCT},
  **{f"Qwen/Qwen2.5-7B{x}": _qwen("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False) for x in _INSTRUCT},
  "Qwen/Qwen3-0.6B": _qwen("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
  "Qwen/Qwen3-8B": _qwen("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
  "google/gemma-2-2b-it": _gemma2(2304, 9216, 26, 8, 4, 256, 256),
  "google/gemma-2-9b-it": _gemma2(3584, 14336, 42, 16, 8, 256, 256),
  "google/gemma-2-27b-it": _gemma2(4608, 36864, 46, 32, 16, 128, 144),
  "mistralai/Mistral-7B-v0.3": _decoder(
    "mistral", 32768, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6,
    sliding_window=None),
}  # fmt: skip
