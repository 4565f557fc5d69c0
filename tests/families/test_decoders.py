"""GPT-2, OPT and GPT-NeoX beside test_parity.py and test_all.py: variants, files as they are on the Hub, real sizes.

Caught by these tests and those, each tried once: q, k and v of the fused tensor in another order, or not head by head
(GPT-NeoX); scores not scaled; the second norm of a parallel layer on the sum; rotation of another share, base or
factor; positions without their offset of 2; norms after the sum for those before; an epsilon; the projections left out
of decoding; deviations of the last matrices not divided by the root of the number of layers.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft import hub, trees
from jaxft.errors import InputError
from jaxft.families import registry
from tests.families import parity, tiny
from tests.families.parity import HOW


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_variant(name, tmp_path):
  pytest.importorskip("torch", reason="no torch: families other than T5 are not compared with transformers")
  parity.check(tiny.DECODERS[name], "lm", tmp_path)


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_variant_is_exported(name, tmp_path):
  pytest.importorskip("torch", reason="no torch: families other than T5 are not compared with transformers")
  parity.check_export(tiny.DECODERS[name], "lm", tmp_path / "theirs", tmp_path / "ours")


def gpt2(d, depth, heads):
  return dict(model_type="gpt2", vocab_size=50257, n_embd=d, n_layer=depth, n_head=heads)


def opt(d, depth, heads, **more):
  own = dict(hidden_size=d, num_hidden_layers=depth, num_attention_heads=heads, ffn_dim=4 * d)
  return dict(model_type="opt", vocab_size=50272, **own, **more)


def neox(vocab, d, depth, heads):
  own = dict(hidden_size=d, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * d)
  return dict(model_type="gpt_neox", vocab_size=vocab, **own)


SIZES = {  # numbers of the config.json files on the Hub; numbers of parameters of these models in transformers
  "distilgpt2": (gpt2(768, 6, 12), 81_912_576),
  "gpt2": (gpt2(768, 12, 12), 124_439_808),
  "gpt2-medium": (gpt2(1024, 24, 16), 354_823_168),
  "gpt2-large": (gpt2(1280, 36, 20), 774_030_080),
  "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
  "opt-125m": (opt(768, 12, 12), 125_239_296),
  "opt-350m": (opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416),
  "opt-1.3b": (opt(2048, 24, 32), 1_315_758_080),
  "opt-2.7b": (opt(2560, 32, 32), 2_651_596_800),
  "opt-6.7b": (opt(4096, 32, 32), 6_658_473_984),
  "opt-13b": (opt(5120, 40, 40), 12_853_473_280),
  "opt-30b": (opt(7168, 48, 56), 29_974_540_288),
  "opt-66b": (opt(9216, 64, 72), 65_719_701_504),
  "pythia-14m": (neox(50304, 128, 6, 4), 14_067_712),
  "pythia-70m": (neox(50304, 512, 6, 8), 70_426_624),
  "pythia-160m": (neox(50304, 768, 12, 12), 162_322_944),
  "pythia-410m": (neox(50304, 1024, 24, 16), 405_334_016),
  "pythia-1b": (neox(50304, 2048, 16, 8), 1_011_781_632),
  "pythia-1.4b": (neox(50304, 2048, 24, 16), 1_414_647_808),
  "pythia-2.8b": (neox(50304, 2560, 32, 32), 2_775_208_960),
  "pythia-6.9b": (neox(50432, 4096, 32, 32), 6_857_302_016),
  "pythia-12b": (neox(50688, 5120, 36, 40), 11_846_072_320),
  "gpt-neox-20b": (neox(50432, 6144, 44, 64), 20_554_567_680),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_size(name):
  config, count = SIZES[name]
  skeleton = registry.skeleton(config, **{**HOW, "dtype": "bfloat16"})
  assert sum(int(np.prod(x.shape, dtype=np.int64)) for x in trees.flatten(skeleton.shapes).values()) == count
  tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  run = lambda p, b: (lambda m: m.logits(m.hidden(b, None)))(skeleton.bind(p))
  out = jax.eval_shape(run, skeleton.shapes, dict(inputs=tokens, input_segments=tokens))
  assert out.shape == (2, 512, config["vocab_size"]) and out.dtype == jnp.float32


OLD = dict(  # what config.json files on the Hub hold besides, and how many positions they have (0: no bound)
  gpt2=(
    SIZES["gpt2-medium"][0],
    dict(
      architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256,
      initializer_range=0.02, layer_norm_epsilon=1e-05, n_ctx=1024, n_positions=1024, n_special=0, resid_pdrop=0.1,
      activation_function="gelu_new", predict_special_tokens=True, summary_activation=None, summary_first_dropout=0.1,
      summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
      task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    1024),
  distilgpt2=(SIZES["distilgpt2"][0], dict(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}), 1024),
  opt=(
    SIZES["opt-350m"][0],
    dict(
      architectures=["OPTForCausalLM"], _name_or_path="facebook/opt-350m", activation_dropout=0.0, prefix="</s>",
      activation_function="relu", attention_dropout=0.0, bos_token_id=2, dropout=0.1, eos_token_id=2, init_std=0.02,
      layerdrop=0.0, max_position_embeddings=2048, pad_token_id=1, torch_dtype="float16", use_cache=True),
    2048),
  gpt_neox=(
    SIZES["gpt-neox-20b"][0],
    dict(
      architectures=["GPTNeoXForCausalLM"], attention_probs_dropout_prob=0, bos_token_id=0, eos_token_id=0,
      hidden_act="gelu_fast", hidden_dropout_prob=0, initializer_range=0.02, layer_norm_eps=1e-05,
      rotary_emb_base=10000, rotary_pct=0.25, max_position_embeddings=2048, tie_word_embeddings=False,
      use_parallel_residual=True,
      torch_dtype="float16", transformers_version="4.24.0"),
    0),
)  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_config_on_the_hub(name):
  config, more, positions = OLD[name]
  skeleton = registry.skeleton({**config, **more}, **HOW)
  act = {k: v for k, v in more.items() if k == "hidden_act"}  # the one that is no default
  assert skeleton.positions == positions and skeleton.kind == "lm"
  assert skeleton.spec == registry.skeleton({**config, **act}, **HOW).spec


@pytest.mark.parametrize("base,field,value,says", [
  ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
  ("gpt2", "add_cross_attention", True, "add_cross_attention=True"),
  ("gpt2", "n_head", 5, "n_embd=24 is no multiple of n_head=5"),
  ("gpt2", "hidden_size", 25, "hidden_size=25 beside n_embd=24"),
  ("gpt2", "n_special", 3, "n_special=3"),
  ("gpt2", "rotary_pct", 0.3, "unknown fields.*rotary_pct"),
  ("opt", "layerdrop", 0.1, "layerdrop=0.1"),
  ("opt", "scale_embeddings", True, "scale_embeddings=True"),
  ("opt", "learned_embeddings", False, "learned_embeddings=False"),
  ("opt", "num_attention_heads", 5, "hidden_size=24 is no multiple of num_attention_heads=5"),
  ("neox", "num_attention_heads", 4, "hidden_size=30 is no multiple of num_attention_heads=4"),
  ("neox", "rotary_pct", 1.5, "it is 1.5"),
  ("neox", "rope_theta", 1e4, "unknown fields.*rope_theta"),
  ("neox", "rope_scaling", dict(rope_type="longrope"), "longrope"),
])  # fmt: skip
def test_config_field_is_refused(base, field, value, says):
  with pytest.raises(InputError, match=says):
    registry.skeleton({**tiny.CONFIGS[base], field: value}, **HOW)


def test_old_and_new_fields_of_the_rope_mean_the_same():
  old = tiny.CONFIGS["neox"]
  rope = dict(rope_type="default", rope_theta=123, partial_rotary_factor=0.4)
  new = {k: v for k, v in old.items() if not k.startswith("rotary")} | dict(rope_parameters=rope)
  spec = lambda c: registry.skeleton(c, **HOW).spec
  assert spec(old) == spec(new) == spec({**new, "rotary_pct": 0.8, "rotary_emb_base": 7})
  (one,) = spec({**old, "rope_scaling": dict(type="linear", factor=2.0)}).stack.ropes
  assert (one.kind, one.dim, one.theta, one.factor) == ("linear", 4, 123, 2)


def written(config: dict, folder, kind: str = "lm"):
  """Writes a model with random weights; returns (skeleton, weights, tensors by name)."""
  skeleton = registry.skeleton(config, want=registry.Wanted(kind), **HOW)
  rng = np.random.RandomState(2)
  params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), skeleton.shapes)
  more = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(folder, skeleton.rules, params, skeleton.json, **more)
  return skeleton, params, safetensors.numpy.load_file(folder / "model.safetensors")


def buffers(hub: str, *names: str) -> dict:
  return {hub.replace("{i}", str(i)) + n: np.zeros((1, 1), np.float32) for i in range(3) for n in names}


FILES = dict(  # config -> (old names of tensors, what else old files hold)
  gpt2=(lambda n: n.removeprefix("transformer."), buffers("h.{i}.attn.", "bias", "masked_bias")),
  opt=(lambda n: n.removeprefix("model."), {"decoder.version": np.zeros(1, np.float32)}),
  opt_350m=(lambda n: n.removeprefix("model."), {}),
  neox=(
    lambda n: n.replace("embed_out", "lm_head"),
    buffers("gpt_neox.layers.{i}.attention.", "bias", "masked_bias", "rotary_emb.inv_freq"),
  ),
)
TABLES = dict(gpt2="transformer.wte.weight", opt="model.decoder.embed_tokens.weight")


@pytest.mark.parametrize("name", FILES)
def test_old_files(name, tmp_path):
  """Without the prefix of the whole model, with buffers, and with the tied head once more."""
  rename, more = FILES[name]
  _, params, tensors = written(tiny.CONFIGS[name], tmp_path)
  assert ("embed_out.weight" in tensors) == (name == "neox")  # the name that transformers 4 knows too
  table = TABLES.get(name.split("_")[0])
  again = {"lm_head.weight": tensors[table]} if table else {}
  old = {rename(n): x for n, x in tensors.items()} | more | again
  safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
  _, found = parity.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("name", ("gpt2", "opt"))
def test_head_unlike_the_table_is_not_tied(name, tmp_path, caplog):
  _, params, tensors = written({**tiny.CONFIGS[name], "tie_word_embeddings": True}, tmp_path)
  head = np.random.RandomState(4).standard_normal(tensors[TABLES[name]].shape).astype(np.float32)
  safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
  with caplog.at_level(logging.WARNING, "jaxft"):
    skeleton, found = parity.load(tmp_path)
  assert "lm_head.weight differs from" in caplog.text and skeleton.json["tie_word_embeddings"] is False
  np.testing.assert_array_equal(found["head"]["kernel"], head.T)
  np.testing.assert_array_equal(found["embed"]["embedding"], params["embed"]["embedding"])


def test_other_heads_in_a_file_are_not_read(tmp_path):
  """A language model becomes a classifier, and a GPT-2 with two heads a language model."""
  _, params, tensors = written(tiny.CONFIGS["gpt2"], tmp_path)
  two = {"lm_head.weight": tensors["transformer.wte.weight"], "multiple_choice_head.summary.weight": np.zeros((1, 24))}
  safetensors.numpy.save_file({**tensors, **two}, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, parity.load(tmp_path)[1], params)
  skeleton = registry.skeleton(registry.read_config(tmp_path), want=registry.Wanted("tag"), **HOW)
  more = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  lacking = hub.lacking(tmp_path, skeleton.rules, skeleton.shapes, ["head/.*"], **more)
  assert lacking == {"head/kernel", "head/bias"}
  found = hub.load(tmp_path, skeleton.rules, skeleton.shapes, None, without=lacking, **more)
  assert skeleton.json["architectures"] == ["GPT2ForTokenClassification"]
  jax.tree.map(np.testing.assert_array_equal, found["decoder"], params["decoder"])
