"""T5 against transformers: golden files everywhere, live where torch is installed.

Caught by these tests, most of them tried once: a scale on attention scores; buckets of the other direction, one more or
fewer; bias not shared by the layers; norm after the sublayer, its epsilon lost or its mean subtracted; a head scaled or
not, tied or not; gates swapped; the decoder's start token; encoder and decoder depths mixed up; q and k swapped; a
transposed kernel.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import hub, safetensors, trees
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.infer import options
from jaxft.models import layers
from tests.families import reference

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
HOW = dict(dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)


def loss_fn(skeleton, params, rows):
  model = skeleton.bind(params)
  logits = model.logits(model.hidden(rows, None))
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], -1)[..., 0]
  return -(picked * rows["weights"]).sum() / rows["weights"].sum(), logits


@functools.cache
def runner(spec):
  """Returns the compiled step of the skeleton with this spec; golden and live tests share it."""
  skeleton = next(s for s in SKELETONS if s.spec == spec)
  step = jax.value_and_grad(lambda p, rows: loss_fn(skeleton, p, rows), has_aux=True)
  return jax.jit(step, compiler_options=reference.FAST)


SKELETONS = []


def ours(folder, rows):
  """Returns logits at real places, loss and gradients by the Hub's names, from a model folder."""
  skeleton = registry.skeleton(registry.read_config(folder), **HOW)
  params = hub.load(folder, skeleton.rules, skeleton.shapes, None)
  SKELETONS.append(skeleton)
  (loss, logits), grads = runner(skeleton.spec)(params, rows)
  flat = trees.flatten(jax.device_get(grads))
  named = {}
  for rule in (r for r in skeleton.rules if r.ours):
    leaf = flat[rule.ours]
    for i, name in enumerate(rule.names(leaf.shape)):
      named[name] = rule.to_hub(leaf[i] if rule.stacked else leaf, leaf.shape)
  return np.asarray(logits)[rows["target_segments"] > 0], float(loss), named


def compare(found, logits, loss, grads):
  np.testing.assert_allclose(found[0], logits, rtol=0, atol=1e-5)
  assert abs(found[1] - loss) < 1e-5
  assert set(found[2]) == set(grads)
  for name, g in grads.items():
    np.testing.assert_allclose(found[2][name], g, rtol=1e-5, atol=1e-5, err_msg=name)
  assert max(np.abs(g).max() for g in grads.values()) > 0.03  # not a comparison of zeros


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_golden(variant, tmp_path):
  golden = np.load(GOLDENS / f"t5_{variant}.npz")
  weights = reference.weights({k[5:]: golden[k].shape for k in golden.files if k.startswith("grad:")})
  config = json.loads(str(golden["about"]))["config"]
  shapes = {n: w.shape for n, w in weights.items()}
  safetensors.write(tmp_path / "model.safetensors", shapes, np.dtype(np.float32), weights.items())
  (tmp_path / "config.json").write_text(json.dumps(config))
  grads = {k[5:]: golden[k] for k in golden.files if k.startswith("grad:")}
  compare(ours(tmp_path, reference.batch(config["vocab_size"])), golden["logits"], float(golden["loss"]), grads)


def test_goldens_are_small():
  assert sum(f.stat().st_size for f in GOLDENS.glob("t5_*.npz")) < 400_000


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_live(variant, tmp_path):
  pytest.importorskip("torch", reason="no torch: parity is checked with golden files only, not with transformers")
  model = reference.torch_model(variant)
  model.save_pretrained(tmp_path)
  rows = reference.batch(reference.config(variant)["vocab_size"])
  out = reference.compute(model, rows)
  compare(ours(tmp_path, rows), out["logits"][rows["target_segments"] > 0], out["loss"], out["grads"])


OLD = {  # what config.json files of old also hold; null and neutral values among it
  "t5": dict(num_beams=4, max_length=50, min_length=3, no_repeat_ngram_size=3, length_penalty=2.0, early_stopping=True),
  "v1_1": dict(do_sample=False, top_k=50, bad_words_ids=None, num_beam_groups=2, suppress_tokens=[], bos_token_id=4),
  "mt5": dict(eos_token_id=[1, 5], pad_token_id=None, forced_bos_token_id=7, use_cache=False),
}


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("variant", ("t5", "v1_1", "mt5"))
def test_export_is_what_transformers_writes(variant, old, tmp_path):
  """Same files, tensors bit for bit, config.json and generation_config.json; from one file and from shards.

  The folder they start from has no generation_config.json; with `old`, its config.json says how to generate.
  """
  pytest.importorskip("torch", reason="no torch: that transformers loads what jaxft exports is not covered")
  model = reference.torch_model(variant, initializer_factor=0.7)
  for limit, shard_gb in (("50GB", 50), ("9KB", 9e-6)):
    source, theirs, mine = (tmp_path / f"{name}{limit}" for name in ("source", "theirs", "mine"))
    model.save_pretrained(source, max_shard_size=limit)
    (source / "generation_config.json").unlink()
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, **(OLD[variant] if old else {})}))
    type(model).from_pretrained(source).save_pretrained(theirs, max_shard_size=limit)
    skeleton = registry.skeleton(registry.read_config(source), **HOW)
    params = hub.load(source, skeleton.rules, skeleton.shapes, None, prefix=skeleton.prefix, renames=skeleton.renames)
    hub.save(
      mine,
      skeleton.rules,
      params,
      skeleton.json,
      dtype="float32",
      shard_gb=shard_gb,
      generation_config=skeleton.generation_config,
      tokenizer_from=None,
    )
    assert hub.verify(mine, skeleton.rules, params) == 0.0
    again = type(model).from_pretrained(mine)
    for name, p in model.state_dict().items():
      np.testing.assert_array_equal(again.state_dict()[name].numpy(), p.numpy(), err_msg=name)
    assert again.config.to_dict().get("scale_decoder_outputs") == model.config.to_dict().get("scale_decoder_outputs")
    jsons = lambda folder: {f.name: json.loads(f.read_text()) for f in folder.glob("*config.json")}
    left, right = jsons(theirs), jsons(mine)
    left["config.json"]["tie_word_embeddings"] = right["config.json"]["tie_word_embeddings"]  # see t5.complete
    assert left == right
    one, other = (hub.safetensors.read_folder(folder) for folder in (theirs, mine))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    if limit != "50GB":
      a, b = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (theirs, mine))
      assert a["metadata"] == b["metadata"] and set(a["weight_map"]) == set(b["weight_map"])


def test_dropout_stands_where_transformers_has_it(monkeypatch):
  """The sequence of shapes that pass through dropout is the same; one layer a side, so that nothing repeats."""
  torch = pytest.importorskip("torch", reason="no torch: the places of dropout are not compared")
  rows = reference.batch(37)
  seen, mine = [], []
  original = torch.nn.functional.dropout
  monkeypatch.setattr(
    torch.nn.functional,
    "dropout",
    lambda x, p, training=True, inplace=False: (seen.append((tuple(x.shape), p)), original(x, p, training))[1],
  )
  model = reference.torch_model("v1_1", num_layers=1, num_decoder_layers=1).train()
  model(input_ids=torch.tensor(rows["inputs"]).long(), labels=torch.tensor(rows["targets"]).long())
  kept = layers.dropout
  monkeypatch.setattr(layers, "dropout", lambda x, rate, key: (mine.append((x.shape, rate)), kept(x, rate, key))[1])
  skeleton = registry.skeleton({**reference.config("v1_1"), "num_layers": 1, "num_decoder_layers": 1}, **HOW)
  jax.eval_shape(lambda p: skeleton.bind(p).hidden(rows, jax.random.key(0)), skeleton.shapes)
  assert len(mine) == 14 and mine == seen


def t5_config(kind, vocab, d, kv, ff, heads, depth, decoder=None, act="gated-gelu", tied=False):
  return dict(
    model_type=kind,
    vocab_size=vocab,
    d_model=d,
    d_kv=kv,
    d_ff=ff,
    num_heads=heads,
    num_layers=depth,
    num_decoder_layers=decoder or depth,
    feed_forward_proj=act,
    tie_word_embeddings=tied,
  )


SIZES = {  # numbers of the config.json files on the Hub, and their numbers of parameters
  "t5-small": (("t5", 32128, 512, 64, 2048, 8, 6, None, "relu", True), 60_506_624),
  "t5-base": (("t5", 32128, 768, 64, 3072, 12, 12, None, "relu", True), 222_903_552),
  "t5-large": (("t5", 32128, 1024, 64, 4096, 16, 24, None, "relu", True), 737_668_096),
  "t5-3b": (("t5", 32128, 1024, 128, 16384, 32, 24, None, "relu", True), 2_851_598_336),
  "t5-11b": (("t5", 32128, 1024, 128, 65536, 128, 24, None, "relu", True), 11_307_321_344),
  "v1_1-small": (("t5", 32128, 512, 64, 1024, 6, 8), 76_961_152),
  "v1_1-base": (("t5", 32128, 768, 64, 2048, 12, 12), 247_577_856),
  "v1_1-large": (("t5", 32128, 1024, 64, 2816, 16, 24), 783_150_080),
  "v1_1-xl": (("t5", 32128, 2048, 64, 5120, 32, 24), 2_849_757_184),
  "v1_1-xxl": (("t5", 32128, 4096, 64, 10240, 64, 24), 11_135_332_352),
  "flan-t5-small": (("t5", 32128, 512, 64, 1024, 6, 8), 76_961_152),
  "flan-t5-base": (("t5", 32128, 768, 64, 2048, 12, 12), 247_577_856),
  "flan-t5-large": (("t5", 32128, 1024, 64, 2816, 16, 24), 783_150_080),
  "flan-t5-xl": (("t5", 32128, 2048, 64, 5120, 32, 24), 2_849_757_184),
  "flan-t5-xxl": (("t5", 32128, 4096, 64, 10240, 64, 24), 11_135_332_352),
  "mt5-small": (("mt5", 250112, 512, 64, 1024, 6, 8), 300_176_768),
  "mt5-base": (("mt5", 250112, 768, 64, 2048, 12, 12), 582_401_280),
  "mt5-large": (("mt5", 250112, 1024, 64, 2816, 16, 24), 1_229_581_312),
  "mt5-xl": (("mt5", 250112, 2048, 64, 5120, 32, 24), 3_742_619_648),
  "mt5-xxl": (("mt5", 250112, 4096, 64, 10240, 64, 24), 12_921_057_280),
  "byt5-small": (("t5", 384, 1472, 64, 3584, 6, 12, 4), 299_637_760),
  "byt5-base": (("t5", 384, 1536, 64, 3968, 12, 18, 6), 581_653_248),
  "byt5-large": (("t5", 384, 1536, 64, 3840, 16, 36, 12), 1_228_183_552),
  "byt5-xl": (("t5", 384, 2560, 64, 6720, 32, 36, 12), 3_737_801_728),
  "byt5-xxl": (("t5", 384, 4672, 64, 12352, 64, 36, 12), 12_906_899_328),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_size(name):
  numbers, count = SIZES[name]
  skeleton = registry.skeleton(t5_config(*numbers), **{**HOW, "dtype": "bfloat16"})
  assert sum(int(np.prod(x.shape, dtype=np.int64)) for x in trees.flatten(skeleton.shapes).values()) == count
  tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  rows = dict(inputs=tokens, input_segments=tokens, targets=tokens, target_segments=tokens)
  run = lambda p, b: (lambda m: m.logits(m.hidden(b, None)))(skeleton.bind(p))
  out = jax.eval_shape(run, skeleton.shapes, rows)
  assert out.shape == (2, 512, numbers[1]) and out.dtype == jnp.float32


def test_fresh_weights_are_distributed_as_the_original():
  """Means and deviations of every tensor against transformers' own initialisation, layers and tensors uncorrelated."""
  config = {**reference.config("v1_1"), "vocab_size": 211, "d_model": 96, "d_ff": 160, "d_kv": 24}
  skeleton = registry.skeleton(config, **HOW)
  init = jax.jit(skeleton.init, compiler_options=reference.FAST)
  params = jax.device_get(init(jax.random.key(3)))
  flat = trees.flatten(params)
  d, kv, n, f, factor = 96, 24, 3, 160, 0.7
  expected = {
    "q": (d * kv) ** -0.5,
    "k": d**-0.5,
    "v": d**-0.5,
    "o": (n * kv) ** -0.5,
    "wi_0": d**-0.5,
    "wi_1": d**-0.5,
    "wo": f**-0.5,
    "embed": 1.0,
    "head": 1.0,
    "relative_bias": d**-0.5,
  }
  for path, x in flat.items():
    assert x.dtype == np.float32
    if path.endswith("scale"):
      np.testing.assert_array_equal(x, np.float32(factor))
      continue
    std = factor * expected[path.split("/")[-2]]
    assert abs(x.std() / std - 1) < (0.35 if "bias" in path else 0.03), path
    assert abs(x.mean() / std) < 5 / np.sqrt(x.size), path
  a, b = flat["encoder/layers/mlp/wi_0/kernel"]
  others = (b, flat["encoder/layers/mlp/wi_1/kernel"][0], flat["decoder/layers/mlp/wi_0/kernel"][0])
  for other in others:
    assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.035
  tail = (np.abs(flat["embed/embedding"]) > 2 * factor).mean()
  assert abs(tail - 0.0455) < 0.006  # of a normal distribution
  again = init(jax.random.key(4))["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
  assert not np.array_equal(a, again[0]) and not np.array_equal(a, again[1])


@pytest.mark.parametrize(
  "field,value,says",
  [
    ("feed_forward_proj", "gated-tan", "feed_forward_proj='gated-tan'"),
    ("feed_forward_proj", "double-gelu", "feed_forward_proj='double-gelu'"),
    ("feed_forward_proj", "gated-gated-gelu", "feed_forward_proj"),
    ("dense_act_fn", "relu", "dense_act_fn"),
    ("is_gated_act", False, "is_gated_act"),
    ("d_model", None, "d_model"),
    ("is_encoder_decoder", False, "is_encoder_decoder"),
    ("rope_theta", 1e4, "rope_theta"),
    ("head_dim", 9, "head_dim"),
    ("num_head", 4, "num_heads"),
    ("model_type", "mt-5", "did you mean 'mt5'"),
    ("dropout_rate", 1.0, "dropout"),
    ("quantization_config", {"bits": 8}, "quantization_config"),
    ("model_type", ["t5"], "model_type is .'t5'."),
    ("eos_token_id", "1", "eos_token_id='1'"),
    ("eos_token_id", [1, None], "eos_token_id=.1, None."),
    ("num_layers", True, "num_layers=True"),
    ("num_heads", 0, "num_heads=0 .it is a whole number above 0"),
    ("tie_word_embeddings", "false", "tie_word_embeddings='false'"),
  ],
)
def test_config_field_is_refused(field, value, says):
  config = {**reference.config("v1_1"), field: value}
  if value is None:
    del config[field]
  with pytest.raises(InputError, match=says):
    registry.skeleton(config, **HOW)


def test_old_config_says_how_to_generate(tmp_path):
  """From the folder to the options of a search; the new config.json is without those fields."""
  skeleton = registry.skeleton(reference.config("v1_1"), **HOW)
  params = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), skeleton.shapes)
  config = {**reference.config("v1_1"), **OLD["t5"], "top_k": None}
  rest = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(tmp_path, skeleton.rules, params, config, **rest)
  found = registry.skeleton(registry.read_config(tmp_path), **HOW)
  assert not registry.GENERATION & found.json.keys() and found.spec == skeleton.spec
  assert found.generation_config == {**skeleton.generation_config, **OLD["t5"]}
  o = options.read(found.generation, found.generation_config)
  assert (o.beams, o.length, o.min_length, o.no_repeat_ngram, o.length_penalty) == (4, 49, 2, 3, 2.0)


def test_generation_fields_are_those_of_transformers():
  from transformers import GenerationConfig

  assert set(GenerationConfig._get_default_generation_params()) - {"use_cache"} == registry.GENERATION


def test_wrong_types_are_named_together():
  config = {**reference.config("v1_1"), "vocab_size": "37", "dropout_rate": None, "d_ff": 17.0, "feed_forward_proj": 3}
  with pytest.raises(InputError) as e:
    registry.skeleton(config, **HOW)
  for part in ("vocab_size='37'", "dropout_rate=None", "d_ff=17.0", "feed_forward_proj=3"):
    assert part in str(e.value), part


def test_null_tokens():
  """A null pad is the first end token, as in transformers; no end token is for the options of a search to refuse."""
  base = reference.config("v1_1")
  made = lambda **changes: registry.skeleton({**base, **changes}, **HOW).generation
  assert made(eos_token_id=[7, 5], pad_token_id=None)["pad"] == 7
  assert made(eos_token_id=None)["eos"] == () and made(eos_token_id=None, pad_token_id=None)["pad"] == 3
  with pytest.raises(InputError, match="decoder_start_token_id and pad_token_id .*null.*first token"):
    made(pad_token_id=None, decoder_start_token_id=None)


CHANGES = dict(  # a field of config.json -> another value, and the parts of the model that must change
  relative_attention_num_buckets=(12, "encoder decoder"),
  relative_attention_max_distance=(31, "encoder decoder"),
  layer_norm_epsilon=(0.1, "encoder decoder"),
  feed_forward_proj=("gated-relu", "encoder decoder"),
  tie_word_embeddings=(False, "heads"),
  scale_decoder_outputs=(False, "heads"),
  decoder_start_token_id=(2, "decoder_start"),
  initializer_factor=(0.3, "std encoder decoder heads"),
  num_decoder_layers=(2, "decoder"),
  num_layers=(3, "encoder"),
  dropout_rate=(0.4, "encoder decoder"),
  vocab_size=(38, "vocab heads"),
)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_model(field):
  base = {**reference.config("gated_tied"), "num_layers": 2, "num_decoder_layers": 1}
  one, other = (registry.skeleton(c, **HOW).spec for c in (base, {**base, field: CHANGES[field][0]}))
  differ = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)]
  assert differ == CHANGES[field][1].split()


def test_resize_keeps_old_rows_bit_for_bit():
  skeleton = registry.skeleton(reference.config("v1_1"), **HOW)
  draw = lambda x: jnp.asarray(np.random.default_rng(x.size).random(x.shape, np.float32))
  params = jax.tree.map(draw, skeleton.shapes)
  config, grown = registry.resize(skeleton.json, params, 43)
  larger = registry.skeleton(config, **HOW)
  assert jax.tree.map(lambda x: x.shape, grown) == jax.tree.map(lambda x: x.shape, larger.shapes)
  old, new = np.asarray(params["embed"]["embedding"]), np.asarray(grown["embed"]["embedding"])
  np.testing.assert_array_equal(new[:37], old)
  np.testing.assert_allclose(new[37:], np.tile(old.mean(0), (6, 1)), rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(np.asarray(grown["head"]["kernel"])[:, :37], np.asarray(params["head"]["kernel"]))
  assert grown["encoder"] is params["encoder"]
  with pytest.raises(InputError, match="shrink"):
    registry.resize(skeleton.json, params, 30)


def test_buckets_equal_transformers():
  pytest.importorskip("torch", reason="no torch: buckets are compared through the golden files only")
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention

  from jaxft.models import attention

  distance = np.arange(-3000, 3001)
  for number, far in ((32, 128), (10, 19), (12, 31), (64, 256), (32, 200), (8, 7)):
    for both in (True, False):
      theirs = T5Attention._relative_position_bucket(torch.tensor(distance), both, number, far).numpy()
      mine = attention.buckets(distance, bidirectional=both, number=number, max_distance=far)
      np.testing.assert_array_equal(mine, theirs, err_msg=f"{number} {far} {both}")
