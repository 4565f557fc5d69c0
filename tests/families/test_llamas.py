"""Llama and its relatives: switches beyond those of the tiny configs, ropes, real sizes, what is refused.

Caught by these tests, most of them tried once: theta, factor or border of a rope; the two ropes of Gemma 3 swapped; a
window one off or in the wrong layers; q norms over one head for all; gate and up swapped; a cap or a norm that is
missing; an embedding scale rounded elsewhere; a tied head taken as untied and the other way round.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxft import hub, safetensors, trees
from jaxft.errors import InputError
from jaxft.families import registry, ropes
from tests.families import parity, reference, tiny

LINEAR = dict(rope_type="linear", factor=8.0)
LLAMA31 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)  # fmt: skip


def skeleton(config: dict, **changes):
  return registry.skeleton({**config, **changes}, **parity.HOW)


def torch_or_skip():
  return pytest.importorskip("torch", reason="no torch: Llama's relatives are not compared with transformers")


@pytest.mark.parametrize("name", tiny.LLAMAS)
def test_logits_loss_gradients(name, tmp_path):
  torch_or_skip()
  parity.check(tiny.LLAMAS[name], "lm", tmp_path)


@pytest.mark.parametrize("name", tiny.LLAMAS)
def test_export(name, tmp_path):
  torch_or_skip()
  parity.check_export(tiny.LLAMAS[name], "lm", tmp_path / "theirs", tmp_path / "ours")


# ---- ropes


def their_rope(config: dict, seq_len: int | None = None) -> tuple[np.ndarray, float]:
  """Returns frequencies and the factor on cos and sin in transformers."""
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  given = dict(config)
  c = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
  kind = c.rope_parameters["rope_type"]
  made = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
  f, attention = made(c, seq_len=seq_len)
  return f.numpy(), attention


TINY = [c for n, c in tiny.LLAMAS.items() if n.split("_")[1] in ropes.KINDS]
REAL = [
  dict(tiny.LLAMA, model_type="llama", head_dim=h, max_position_embeddings=131_072,
       rope_parameters=dict(given, rope_theta=t))
  for h, t, given in (
    (128, 1e4, dict(rope_type="default")), (256, 1e4, LINEAR), (64, 5e5, LLAMA31 | dict(factor=32.0)),
    (128, 5e5, LLAMA31), (128, 1e6, YARN), (64, 1e4, YARN | dict(factor=2.3, beta_fast=17, beta_slow=2.5)))
]  # fmt: skip


@pytest.mark.parametrize("config", TINY + REAL)
def test_ropes_are_those_of_transformers(config):
  """To the last bits, because at position 100,000 one bit is an angle of up to 0.01; and each kind matters."""
  torch_or_skip()
  wanted, attention = their_rope(config)
  (rope,) = skeleton(config).spec.stack.ropes
  found = rope.frequencies()
  assert np.abs(found.view(np.int32) - wanted.view(np.int32)).max() <= 2 and rope.attention == attention
  plain = ropes.of({"rope_theta": rope.theta}, config, rope.dim, 1.0).frequencies()
  assert rope.kind in ("default", "dynamic") or np.abs(found / plain - 1).max() > 0.5


def test_dynamic_rope_ends_where_it_is_no_longer_the_default():
  torch_or_skip()
  config = tiny.LLAMAS["llama_dynamic"]
  made = skeleton(config)
  assert made.positions == 24 and skeleton(tiny.LLAMAS["llama_linear"]).positions == 0
  for length, same in ((5, True), (24, True), (25, False)):
    assert np.allclose(made.spec.stack.ropes[0].frequencies(), their_rope(config, length)[0], rtol=1e-6) == same


FORMS = [  # (family, old fields, new fields) that mean the same
  ("llama", dict(rope_theta=77.0), dict(rope_type="default", rope_theta=77.0)),
  ("mistral", dict(rope_theta=77.0, rope_scaling=None), dict(rope_theta=77.0)),
  ("qwen2", dict(rope_scaling=dict(type="linear", factor=3.0)), dict(LINEAR, factor=3.0, rope_theta=1e4)),
  ("qwen3", dict(rope_theta=1e6, rope_scaling=dict(YARN, type="yarn")), dict(YARN, rope_theta=1e6)),
  ("gemma2", dict(rope_theta=77), dict(rope_type="default", rope_theta=77.0)),
  ("phi3", dict(rope_theta=77.0, partial_rotary_factor=0.4), dict(rope_theta=77.0, partial_rotary_factor=0.4)),
  ("olmo2", dict(rope_theta=5e5, rope_scaling=LLAMA31), dict(LLAMA31, rope_theta=5e5)),
  ("gemma3_text", dict(rope_theta=77.0, rope_scaling=LINEAR),
   dict(full_attention=dict(LINEAR, rope_theta=77.0), sliding_attention=dict(rope_type="default"))),
  ("gemma3_text", dict(rope_local_base_freq=77.0),
   dict(full_attention=dict(rope_theta=1e6), sliding_attention=dict(rope_theta=77.0))),
]  # fmt: skip


@pytest.mark.parametrize("kind,old,new", FORMS)
def test_old_and_new_ropes_mean_the_same(kind, old, new):
  base = dict(tiny.LLAMA, model_type=kind)
  one, other = (skeleton(base, **fields).spec for fields in (old, dict(rope_parameters=new)))
  assert one == other != skeleton(base).spec


# ---- real models: config.json as on the Hub, without what every file has, and the number of parameters


def real(kind: str, vocab: int, width: int, mlp: int, depth: int, heads: int, kv: int, positions: int, **more) -> dict:
  return dict(
    model_type=kind, vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth,
    num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=positions, initializer_range=0.02,
    attention_dropout=0.0, use_cache=True, torch_dtype="bfloat16", transformers_version="4.40.1",
    rope_theta=more.pop("theta", 10_000.0), rms_norm_eps=more.pop("eps", 1e-5)) | more  # fmt: skip


LL = dict(hidden_act="silu", rope_scaling=None, attention_bias=False, mlp_bias=False, pretraining_tp=1)
LL3 = LL | dict(theta=500_000.0, eos_token_id=[128_001, 128_008, 128_009], bos_token_id=128_000)
QW = dict(hidden_act="silu", theta=1e6, eps=1e-6, bos_token_id=151_643, use_sliding_window=False)
QW3 = QW | dict(attention_bias=False, head_dim=128, rope_scaling=None, sliding_window=None)
GE = dict(eps=1e-6, attention_bias=False, bos_token_id=2, eos_token_id=1, pad_token_id=0, head_dim=256)
GE2 = GE | dict(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, cache_implementation="hybrid")
SIZES = {
  "Llama-2-7b": (6_738_415_616, real("llama", 32000, 4096, 11008, 32, 32, 32, 4096, **LL)),
  "Llama-3.1-8B": (8_030_261_248, real(
    "llama", 128256, 4096, 14336, 32, 32, 8, 131072, **LL3 | dict(rope_scaling=LLAMA31))),
  "Llama-3.2-1B": (1_235_814_400, real(
    "llama", 128256, 2048, 8192, 16, 32, 8, 131072, **LL3 | dict(rope_scaling=LLAMA31 | dict(factor=32.0)), head_dim=64,
    tie_word_embeddings=True)),
  "Llama-3.2-3B": (3_212_749_824, real(
    "llama", 128256, 3072, 8192, 28, 24, 8, 131072, **LL3 | dict(rope_scaling=LLAMA31 | dict(factor=32.0)),
    head_dim=128, tie_word_embeddings=True)),
  "SmolLM2-135M": (134_515_008, real(
    "llama", 49152, 576, 1536, 30, 9, 3, 8192, **LL, initializer_range=0.041666666666666664, is_llama_config=True,
    rope_interleaved=False, tie_word_embeddings=True, theta=100_000,
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}})),
  "Mistral-7B-v0.1": (7_241_732_096, real(
    "mistral", 32000, 4096, 14336, 32, 32, 8, 32768, hidden_act="silu", sliding_window=4096)),
  "Mistral-7B-v0.3": (7_248_023_552, real(
    "mistral", 32768, 4096, 14336, 32, 32, 8, 32768, hidden_act="silu", sliding_window=None, theta=1e6)),
  "Qwen2-0.5B": (494_032_768, real(
    "qwen2", 151936, 896, 4864, 24, 14, 2, 131072, **QW, max_window_layers=24, sliding_window=131072, use_mrope=False,
    tie_word_embeddings=True)),
  "Qwen2.5-7B": (7_615_616_512, real(
    "qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, **QW, max_window_layers=28, sliding_window=131072)),
  "Qwen3-0.6B": (596_049_920, real(
    "qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, **QW3, max_window_layers=28, tie_word_embeddings=True)),
  "Qwen3-8B": (8_190_735_360, real("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, **QW3, max_window_layers=36)),
  "gemma-2b": (2_506_172_416, real(
    "gemma", 256000, 2048, 16384, 18, 8, 1, 8192, **GE, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")),
  "gemma-2-2b": (2_614_341_888, real(
    "gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, **GE2, hidden_act="gelu_pytorch_tanh", sliding_window=4096,
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
  "gemma-3-1b": (999_885_952, real(
    "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, **GE2 | dict(eos_token_id=[1, 106]), theta=1_000_000,
    rope_local_base_freq=10_000, sliding_window=512, sliding_window_pattern=6, attn_logit_softcapping=None,
    final_logit_softcapping=None, rope_scaling=None)),
  "Phi-3-mini-4k": (3_821_079_552, real(
    "phi3", 32064, 3072, 8192, 32, 32, 32, 4096, hidden_act="silu", attention_bias=False, embd_pdrop=0.0,
    resid_pdrop=0.0, original_max_position_embeddings=4096, rope_scaling=None, sliding_window=2047, pad_token_id=32000,
    bos_token_id=1, eos_token_id=32000, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})),
  "OLMo-2-7B": (7_298_617_344, real(
    "olmo2", 100352, 4096, 11008, 32, 32, 32, 4096, hidden_act="silu", attention_bias=False, rope_scaling=None,
    theta=500_000, eps=1e-6, pad_token_id=100_277, eos_token_id=100_257)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_real_size(name):
  count, config = SIZES[name]
  made = registry.skeleton(config, **{**parity.HOW, "dtype": "bfloat16"})
  assert sum(int(np.prod(x.shape, dtype=np.int64)) for x in trees.flatten(made.shapes).values()) == count
  tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  run = lambda p, b: (lambda m: m.logits(m.hidden(b, None)))(made.bind(p))
  out = jax.eval_shape(run, made.shapes, dict(inputs=tokens, input_segments=tokens))
  assert out.shape == (2, 512, config["vocab_size"]) and out.dtype == jnp.float32


def test_real_layers():
  """Windows and ropes as the papers have them."""
  stack = lambda name: skeleton(SIZES[name][1]).spec.stack
  assert stack("Mistral-7B-v0.1").windows == (4096,) * 32 and stack("Phi-3-mini-4k").windows == (2047,) * 32
  assert stack("gemma-2-2b").windows == (4096, 0) * 13
  assert stack("gemma-3-1b").windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
  assert [r.theta for r in stack("gemma-3-1b").ropes] == [1e6, 1e4]
  assert stack("gemma-3-1b").kinds == (1, 1, 1, 1, 1, 0) * 4 + (1, 1)
  for name in ("Mistral-7B-v0.3", "Qwen2-0.5B", "Qwen3-8B", "Llama-3.1-8B", "gemma-2b", "OLMo-2-7B"):
    assert not stack(name).windows, name


# ---- what is refused, and what a folder tells


LONG = dict(type="longrope", short_factor=[1.0] * 5, long_factor=[2.0] * 5)
REFUSED = [
  ("llama", dict(sliding_window=5), "unknown fields.*sliding_window"),
  ("llama", dict(pretraining_tp=2), "pretraining_tp=2"),
  ("llama", dict(rope_interleaved=True), "rope_interleaved=True"),
  ("llama", dict(num_attention_heads=7), "num_attention_heads=7 is no multiple of num_key_value_heads=2"),
  ("llama", dict(head_dim=None, hidden_size=25), "hidden_size=25 is no multiple of num_attention_heads=6"),
  ("llama", dict(head_dim=9), "heads of an even dimension .it is 9"),
  ("llama", dict(rope_theta=0), "rope_theta above 0 .it is 0.,"),
  ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, but a llama turns whole heads"),
  ("llama", dict(rope_parameters=dict(rope_type="yarm", factor=2.0)), "rope_type is 'yarm' .did you mean 'yarn'"),
  ("llama", dict(rope_scaling=LONG), "rope_type is 'longrope'; jaxft knows default"),
  ("llama", dict(rope_scaling=dict(type="linear")), "missing: factor"),
  ("llama", dict(rope_scaling=dict(type="linear", factor=0)), "factor=0 are not numbers above 0"),
  ("llama", dict(rope_scaling=dict(type="linear", factor=2.0, beta_fast=3)), "unknown: beta_fast"),
  ("llama", dict(rope_scaling=dict(LLAMA31, low_freq_factor=4.0)), "the first must be the smaller"),
  ("mistral", dict(layer_types=["full_attention"] * 3), "layer_types"),
  ("qwen2", dict(layer_types=["full_attention"] * 2), "layer_types has 2 entries .full_attention.; it needs 3"),
  ("qwen2", dict(layer_types=["chunked_attention"] * 3), "chunked_attention.*each full_attention or sliding"),
  ("qwen2", dict(layer_types=["sliding_attention"] * 3), "sliding_window is not set"),
  ("qwen2", dict(use_mrope=True), "use_mrope=True"),
  ("qwen2", dict(num_key_value_heads=4), "num_attention_heads=6 is no multiple"),
  ("qwen3", dict(head_dim=None), "head_dim=None"),
  ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
  ("gemma2", dict(sliding_window=None), "sliding_window is not set"),
  ("gemma2", dict(hidden_act="silu"), "hidden_act='silu' beside hidden_activation=None"),
  ("gemma2", dict(attn_logit_softcapping=0), "attn_logit_softcapping=0 .it is a number above 0"),
  ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
  ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
  ("gemma3_text", dict(rope_parameters=dict(rope_theta=7.0)), "an object for each of full_attention and sliding"),
  ("phi3", dict(rope_scaling=LONG), "of type 'longrope'. Of Phi-3's ropes jaxft has the plain one"),
  ("phi3", dict(attention_bias=True), "attention_bias=True"),
  ("phi3", dict(partial_rotary_factor=1.5), "at most 1 .it is 1.5"),
  ("olmo2", dict(mlp_bias=True), "mlp_bias"),
]


@pytest.mark.parametrize("kind,fields,says", REFUSED)
def test_refused(kind, fields, says):
  with pytest.raises(InputError, match=says):
    skeleton(dict(tiny.LLAMA, model_type=kind), **fields)


def read_tensors(folder) -> dict[str, np.ndarray]:
  return {n: np.array(t.view()) for n, t in safetensors.read_folder(folder).items()}


def write_tensors(folder, tensors: dict) -> None:
  shapes = {n: x.shape for n, x in tensors.items()}
  safetensors.write(folder / "model.safetensors", shapes, np.dtype(np.float32), tensors.items())


def logits(made, params, rows: dict) -> np.ndarray:
  """Returns logits at real places."""
  run = jax.jit(lambda p, b: (lambda m: m.logits(m.hidden(b, None)))(made.bind(p)), compiler_options=reference.FAST)
  return np.asarray(run(params, rows))[rows["input_segments"] > 0]


@pytest.mark.parametrize("same", (True, False))
def test_a_head_in_the_file_of_a_tied_model(same, tmp_path, caplog):
  """A copy of the table is the tied head; another head is not tied, as transformers 5 reads it."""
  torch_or_skip()
  model = parity.torch_model(tiny.LLAMAS["llama_biases"], "lm")
  model.save_pretrained(tmp_path)
  tensors = read_tensors(tmp_path)
  table = tensors["model.embed_tokens.weight"]
  write_tensors(tmp_path, tensors | {"lm_head.weight": table if same else table[::-1] * 2})
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
  made, params = parity.load(tmp_path)
  assert made.json["tie_word_embeddings"] is same and ("kernel" in params.get("head", {})) is not same
  assert ("differs from model.embed_tokens.weight" in caplog.text) is not same
  rows = parity.batch("lm", made.json)
  wanted = parity.theirs(theirs, "lm", rows)[0][0]
  np.testing.assert_allclose(logits(made, params, rows), wanted, rtol=1e-5, atol=1e-5)


def test_text_part_of_a_gemma3(tmp_path, caplog):
  """The language model of a Gemma 3 for images and text is read by its old and its new names, and saved as text."""
  torch = torch_or_skip()
  vision = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=20, num_hidden_layers=1,
                num_attention_heads=2, image_size=28, patch_size=14, vision_use_head=False)  # fmt: skip
  text = dict(tiny.LLAMAS["gemma3_old"], tie_word_embeddings=True)
  both = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=42)
  both._attn_implementation = "eager"
  torch.manual_seed(0)
  model = transformers.Gemma3ForConditionalGeneration(both).eval()
  model.save_pretrained(tmp_path)
  rows = parity.batch("lm", text)
  given = {k: torch.tensor(rows[n]).long() for k, n in (("input_ids", "inputs"), ("attention_mask", "input_segments"))}
  wanted = model(**given).logits.detach().numpy()[rows["input_segments"] > 0]
  tensors = read_tensors(tmp_path)
  for new in (False, True):
    if new:
      write_tensors(
        tmp_path, {"model." + n.replace("language_model.model", "language_model"): x for n, x in tensors.items()}
      )
    made, params = parity.load(tmp_path)
    np.testing.assert_allclose(logits(made, params, rows), wanted, rtol=1e-5, atol=1e-5)
  assert "takes the text part" in caplog.text and made.json["model_type"] == "gemma3_text"
  how = dict(dtype="float32", shard_gb=1.0, generation_config=None, tokenizer_from=None)
  hub.save(tmp_path / "text", made.rules, params, made.json, **how)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
  assert type(again).__name__ == "Gemma3ForCausalLM"
  np.testing.assert_allclose(again(**given).logits.detach().numpy()[rows["input_segments"] > 0], wanted, atol=1e-6)


def test_gemma3_files_say_little_of_their_text(tmp_path):
  """google/gemma-3-4b-it's config.json; and one with another head than the language model is refused."""
  text = dict(
    hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34, sliding_window=1024,
    rope_scaling=LINEAR)  # fmt: skip
  config = dict(
    model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255_999,
    eos_token_id=[1, 106], text_config=text, vision_config=dict(hidden_size=1152))  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(config))
  made = registry.skeleton(registry.read_config(tmp_path), **parity.HOW)
  assert made.generation["eos"] == (1, 106) and made.spec.vocab == 262_208
  assert sum(int(np.prod(x.shape)) for x in trees.flatten(made.shapes).values()) == 3_880_263_168
  (tmp_path / "config.json").write_text(json.dumps(config | dict(architectures=["Gemma3ForSequenceClassification"])))
  with pytest.raises(InputError, match="a Gemma3ForSequenceClassification of type gemma3, with images"):
    registry.read_config(tmp_path)


def test_gemma_rounds_the_embedding_scale_as_transformers(tmp_path):
  torch = torch_or_skip()
  config = tiny.CONFIGS["gemma"]
  model = parity.torch_model(config, "lm")
  model.save_pretrained(tmp_path)
  _, params = parity.load(tmp_path)
  half = registry.skeleton(config, **{**parity.HOW, "dtype": "bfloat16"}).bind(params)
  found = half.embedded(jnp.arange(43)[None])
  wanted = model.bfloat16().model.embed_tokens(torch.arange(43)[None]).detach().float().numpy()
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.astype(np.float32), wanted)
