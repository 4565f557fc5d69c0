"""BART, mBART, Pegasus, Marian beside test_parity.py and test_all.py: variants, files as they are on the Hub, sizes.

Caught by these tests and those, most of them tried once: norms before for those after the sublayer; positions without
their offset of 2, or sines that alternate with cosines; embeddings not scaled, or the head scaled with them; heads and
widths of one side used on the other; final_logits_bias left out or trained; the row of the padding trained through the
inputs; mBART's decoder started as BART's; forced tokens, suppressed ones or a first token not read.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft import hub, trees
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.infer import generate, options, sampling
from jaxft.models import encdec, stack
from tests.families import parity, tiny
from tests.families.parity import HOW
from tests.families.reference import FAST

NO_TORCH = "no torch: families other than T5 are not compared with transformers"


@pytest.mark.parametrize("name", tiny.ENCDECS)
def test_variant(name, tmp_path):
  pytest.importorskip("torch", reason=NO_TORCH)
  parity.check(tiny.ENCDECS[name], "lm", tmp_path)


@pytest.mark.parametrize("name", tiny.ENCDECS)
def test_variant_generates_and_is_exported(name, tmp_path):
  pytest.importorskip("torch", reason=NO_TORCH)
  parity.check_generation(tiny.ENCDECS[name], tmp_path / "model", parity.WAYS[1])
  parity.check_export(tiny.ENCDECS[name], "lm", tmp_path / "theirs", tmp_path / "ours")


TOLD = {  # what a generation_config.json of the family says
  "bart": dict(
    forced_bos_token_id=0, forced_eos_token_id=2, no_repeat_ngram_size=2, num_beams=3, early_stopping=True,
    length_penalty=2.0, min_length=6, max_length=12, decoder_start_token_id=7),
  "mbart": dict(forced_bos_token_id=9, forced_eos_token_id=2, num_beams=2, max_length=9, decoder_start_token_id=2),
  "marian": dict(
    bad_words_ids=[[42], [0]], forced_eos_token_id=0, num_beams=3, max_length=11, eos_token_id=0),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_generation_config_is_followed(name, tmp_path):
  """Everything in the file, nothing given beside it; a token that comes without being barred is barred too."""
  torch = pytest.importorskip("torch", reason=NO_TORCH)
  config, told, rows = tiny.CONFIGS[name], TOLD[name], parity.batch("seq2seq", tiny.CONFIGS[name])
  model = parity.torch_model(config, "lm")
  ids, mask = torch.tensor(rows["inputs"]).long(), torch.tensor(rows["input_segments"])
  made = lambda: model.generate(ids, attention_mask=mask, do_sample=False)[:, 1:]
  model.generation_config.update(**told)
  if "bad_words_ids" in told:
    model.generation_config.bad_words_ids = [*told["bad_words_ids"], [int(made()[0, 1])]]
  model.save_pretrained(tmp_path)
  skeleton, params = parity.load(tmp_path)
  o = options.read(skeleton.generation, hub.read_json(tmp_path / "generation_config.json"))
  keys = sampling.row_keys(0, range(len(parity.LENGTHS)))
  run = jax.jit(lambda p, i, s: generate.generate(skeleton.bind(p), i, s, keys, o), compiler_options=FAST)
  out = jax.device_get(run(params, rows["inputs"], rows["input_segments"]))
  for b, want in enumerate(made().tolist()):
    got = out.tokens_BRL[b, 0, : out.lengths_BR[b, 0]].tolist()
    assert got == want[: len(got)] and not set(want[len(got) :]) - {o.pad, *o.eos}, (b, got, want)
    assert o.forced_bos in (None, got[0]) and not set(got) & set(o.suppress)
  assert o.start == told.get("decoder_start_token_id", config["decoder_start_token_id"])
  assert o.length == told["max_length"] - 1 and out.lengths_BR.max() > 4


def sided(kind, vocab, d, depth, heads, mlp, positions, **more):
  sides = {f"{side}_{k}": v for side in ("encoder", "decoder")
           for k, v in dict(layers=depth, attention_heads=heads, ffn_dim=mlp).items()}  # fmt: skip
  return dict(model_type=kind, vocab_size=vocab, d_model=d, max_position_embeddings=positions, **sides) | more


SIZES = {  # numbers of the config.json files on the Hub, and their trained parameters with final_logits_bias
  "bart-base": (sided("bart", 50265, 768, 6, 12, 3072, 1024), 139_470_681),
  "bart-large": (sided("bart", 50265, 1024, 12, 16, 4096, 1024), 406_341_721),
  "bart-large-cnn": (sided("bart", 50264, 1024, 12, 16, 4096, 1024), 406_340_696),
  "distilbart-cnn-12-6": (sided("bart", 50264, 1024, 12, 16, 4096, 1024, decoder_layers=6), 305_560_664),
  "mbart-large-50": (sided("mbart", 250054, 1024, 12, 16, 4096, 1024), 611_129_542),
  "mbart-large-cc25": (sided("mbart", 250027, 1024, 12, 16, 4096, 1024), 611_101_867),
  "pegasus-large": (sided("pegasus", 96103, 1024, 16, 16, 4096, 1024), 568_796_007),
  "pegasus-xsum": (sided("pegasus", 96103, 1024, 16, 16, 4096, 512), 568_796_007),
  "opus-mt-en-de": (
    sided("marian", 58101, 512, 6, 8, 2048, 512, pad_token_id=58100, decoder_start_token_id=58100), 73_944_309),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_real_size(name):
  config, count = SIZES[name]
  skeleton = registry.skeleton(config, **{**HOW, "dtype": "bfloat16"})
  assert sum(int(np.prod(x.shape, dtype=np.int64)) for x in trees.flatten(skeleton.shapes).values()) == count
  assert skeleton.positions == config["max_position_embeddings"]
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  rows = dict(inputs=tokens, input_segments=tokens, targets=tokens, target_segments=tokens)
  run = lambda p, b: (lambda m: m.logits(m.hidden(b, None)))(skeleton.bind(p))
  out = jax.eval_shape(run, skeleton.shapes, rows)
  assert out.shape == (2, 64, config["vocab_size"]) and out.dtype == jnp.float32


OLD = dict(  # fields of old files of all of them
  add_bias_logits=False, classif_dropout=0.0, classifier_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
  gradient_checkpointing=False, is_encoder_decoder=True, output_past=True, use_cache=True, _num_labels=3,
  id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
  task_specific_params={"summarization": {"num_beams": 4}})  # fmt: skip
HUB = {  # (what else their config.json says, the options of a search)
  "bart-large-cnn": (
    dict(
      add_final_layer_norm=False, normalize_before=False, force_bos_token_to_be_generated=True, forced_bos_token_id=0,
      forced_eos_token_id=2, decoder_start_token_id=2, early_stopping=True, length_penalty=2.0, max_length=142,
      min_length=56, no_repeat_ngram_size=3, num_beams=4, num_hidden_layers=12, prefix=" ", scale_embedding=False),
    dict(beams=4, length=141, min_length=55, forced_bos=0, forced_eos=(2,), start=2, pad=1, no_repeat_ngram=3)),
  "mbart-large-50": (
    dict(
      add_final_layer_norm=True, normalize_before=True, normalize_embedding=True, static_position_embeddings=False,
      scale_embedding=True, decoder_start_token_id=2, forced_eos_token_id=2, early_stopping=True, max_length=200,
      num_beams=5, num_hidden_layers=12, tokenizer_class="MBart50Tokenizer"),
    dict(beams=5, length=199, forced_bos=None, forced_eos=(2,), start=2, pad=1)),
  "pegasus-xsum": (
    dict(
      activation_function="relu", add_final_layer_norm=True, normalize_before=True, normalize_embedding=False,
      static_position_embeddings=True, scale_embedding=True, extra_pos_embeddings=0, save_step=14, bos_token_id=0,
      eos_token_id=1, pad_token_id=0, force_bos_token_to_be_generated=False, forced_eos_token_id=1, length_penalty=0.6,
      max_length=64, num_beams=8, num_hidden_layers=16),
    dict(beams=8, length=63, length_penalty=0.6, forced_eos=(1,), start=0, pad=0)),
  "opus-mt-en-de": (
    dict(
      activation_function="swish", add_final_layer_norm=False, normalize_before=False, normalize_embedding=False,
      static_position_embeddings=True, scale_embedding=True, extra_pos_embeddings=58101, bad_words_ids=[[58100]],
      bos_token_id=0, eos_token_id=0, decoder_vocab_size=58101, share_encoder_decoder_embeddings=True,
      forced_eos_token_id=0, max_length=512, num_beams=6, num_hidden_layers=6),
    dict(beams=6, length=511, suppress=(58100,), forced_eos=(0,), start=58100, pad=58100)),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_config_on_the_hub(name):
  """Old fields say nothing new; what they say of a search goes into its options."""
  more, search = HUB[name]
  skeleton = registry.skeleton({**SIZES[name][0], **OLD, **more}, **HOW)
  o = options.read(skeleton.generation, skeleton.generation_config)
  assert {k: getattr(o, k) for k in search} == search
  tokens = (f"{k}_token_id" for k in ("decoder_start", "bos", "eos", "pad"))
  effect = ("activation_function", "scale_embedding", *tokens)
  plain = registry.skeleton({**SIZES[name][0], **{k: more[k] for k in effect if k in more}}, **HOW)
  assert plain.spec == skeleton.spec and plain.generation == skeleton.generation


def test_forced_end_of_a_file_that_does_not_say():
  """It is a field of transformers' config, with a default; null is none."""
  forced = lambda **more: options.read(*(lambda s: (s.generation, s.generation_config))(
    registry.skeleton({**tiny.CONFIGS["bart"], **more}, **HOW)), length=4).forced_eos  # fmt: skip
  assert forced() == (2,) and forced(forced_eos_token_id=None) == () and forced(forced_eos_token_id=[3, 4]) == (3, 4)


@pytest.mark.parametrize(
  "name,fields,says",
  [
    ("bart", dict(encoder_layerdrop=0.1), "encoder_layerdrop=0.1"),
    ("bart", dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    ("bart", dict(normalize_before=True), "normalize_before=True"),
    ("bart", dict(encoder_attention_heads=5), "d_model=24 is no multiple of encoder_attention_heads=5"),
    ("bart", dict(num_hidden_layers=3), "num_hidden_layers=3 beside encoder_layers=2"),
    ("bart", dict(decoder_start_token_id=None), "decoder_start_token_id .*no first token"),
    ("mbart", dict(decoder_start_token_id=None, bos_token_id=None), "decoder_start_token_id and bos_token_id"),
    ("mbart", dict(add_final_layer_norm=False), "add_final_layer_norm=False"),
    ("pegasus", dict(static_position_embeddings=False), "static_position_embeddings=False"),
    ("marian", dict(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings=False"),
    ("marian", dict(decoder_vocab_size=41), "decoder_vocab_size=41 beside vocab_size=43"),
    ("marian", dict(encoder_atention_heads=4), "did you mean 'encoder_attention_heads'"),
  ],
)
def test_config_field_is_refused(name, fields, says):
  with pytest.raises(InputError, match=says):
    registry.skeleton({**tiny.CONFIGS[name], **fields}, **HOW)


# ---- the decoder's inputs


@pytest.mark.parametrize("name", ("bart", "mbart"))
def test_decoder_inputs_are_those_of_transformers(name):
  """By segments, two examples a row, what its shift_tokens_right makes of each alone."""
  torch = pytest.importorskip("torch", reason=NO_TORCH)
  modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
  one, two = [5, 6, 7, 2], [8, 9, 2]
  targets = np.array([[*one, *two, 1, 1], [*two, *one, 1, 1]], np.int32)
  segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 3 + [2] * 4 + [0] * 2], np.int32)
  start = encdec.last_of(targets, segments) if name == "mbart" else 4
  found = np.asarray(encdec.shift_right(targets, segments, start))
  more = () if name == "mbart" else (4,)
  want = [modeling.shift_tokens_right(torch.tensor([x]), 1, *more)[0].tolist() for x in (one, two)]
  assert found[:, :7].tolist() == [want[0] + want[1], want[1] + want[0]]
  assert want[0] == [2 if name == "mbart" else 4, 5, 6, 7]


def test_classification_looks_at_the_last_end_token(tmp_path):
  """In texts of mBART a language follows it; other tokens count only where there is no end."""
  pytest.importorskip("torch", reason=NO_TORCH)
  config = tiny.CONFIGS["mbart"]
  model, rows = parity.torch_model(config, "classify"), parity.batch("classify", config)
  for row, n in zip(rows["inputs"], parity.LENGTHS):
    row[n - 2 : n] = config["eos_token_id"], 20
  model.save_pretrained(tmp_path)
  skeleton, params = parity.load(tmp_path)
  run = jax.jit(lambda p, rows: skeleton.bind(p).classify(rows, None)[:, 0], compiler_options=FAST)
  (want,), _, _ = parity.theirs(model, "classify", rows)
  np.testing.assert_allclose(run(params, rows), want, rtol=1e-5, atol=1e-5)
  without = np.where(rows["inputs"] == config["eos_token_id"], 21, rows["inputs"])
  assert np.all(np.abs(run(params, {**rows, "inputs": without})) > 0)


# ---- positions


@pytest.mark.parametrize("width", (12, 7))
def test_sines_are_those_of_transformers(width):
  pytest.importorskip("torch", reason=NO_TORCH)
  from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding as Theirs

  np.testing.assert_array_equal(stack.sines(1024, width), Theirs(1024, width).create_weight().numpy())


@pytest.mark.parametrize("name", ("bart", "marian"))
def test_a_row_may_be_longer_than_the_positions(name):
  """Its examples may not, and its padding has no position; beyond the last position there are no numbers."""
  skeleton = registry.skeleton({**tiny.CONFIGS[name], "encoder_layers": 1, "decoder_layers": 1}, **HOW)
  draw = lambda x: 0.1 * np.random.RandomState(x.size).standard_normal(x.shape).astype(np.float32)
  params = jax.tree.map(draw, skeleton.shapes)
  hidden = jax.jit(lambda p, batch: skeleton.bind(p).hidden(batch, None), compiler_options=FAST)
  assert skeleton.positions == 29

  def run(length, row):
    tokens = np.resize(np.arange(3, 40, dtype=np.int32), (1, row))
    segments = (np.arange(row) < length).astype(np.int32)[None]
    batch = dict(inputs=tokens, input_segments=segments, targets=tokens, target_segments=segments)
    return np.asarray(hidden(params, batch))[0, :29]

  np.testing.assert_allclose(run(29, 70), run(29, 29), rtol=1e-5, atol=1e-6)
  assert np.isnan(run(30, 70)).all()


# ---- files


@pytest.fixture
def written(request, tmp_path):
  """A folder with random weights of the tiny config that the test names; returns (folder, its tensors)."""
  skeleton = registry.skeleton(tiny.CONFIGS[request.param], **HOW)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), skeleton.shapes)
  rest = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(tmp_path, skeleton.rules, params, skeleton.json, **rest)
  return tmp_path, safetensors.numpy.load_file(tmp_path / "model.safetensors")


def rewritten(folder, tensors):
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return parity.load(folder)


@pytest.mark.parametrize("written", ("bart", "pegasus"), indirect=True)
def test_old_files_repeat_tensors(written):
  """The table four times, versions, and (Pegasus) sines in half precision; another head or other sines are refused."""
  folder, tensors = written
  _, params = parity.load(folder)
  assert ("model.encoder.embed_positions.weight" in tensors) == ("pegasus" not in (folder / "config.json").read_text())
  table = tensors["model.shared.weight"]
  copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
  old = {**tensors, **{n: table.copy() for n in copies}, "model.encoder.version": np.array([3.0], np.float32)}
  if "model.encoder.embed_positions.weight" not in tensors:
    old |= {f"model.{s}.embed_positions.weight": stack.sines(29, 24).astype(np.float16) for s in ("encoder", "decoder")}
  _, found = rewritten(folder, old)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  with pytest.raises(InputError, match="lm_head.weight differs from model.shared.weight"):
    rewritten(folder, {**old, "lm_head.weight": table + 1})
  if "model.encoder.embed_positions.weight" not in tensors:
    with pytest.raises(InputError, match="decoder.embed_positions.weight is not the table of sines that a pegasus has"):
      rewritten(folder, {**old, "model.decoder.embed_positions.weight": stack.sines(29, 24)[:, ::-1].copy()})


@pytest.mark.parametrize("written", ("bart",), indirect=True)
def test_file_of_the_bare_model(written):
  """facebook/bart-base: no prefix, no final_logits_bias, which is then 0."""
  folder, tensors = written
  bare = {n.removeprefix("model."): x for n, x in tensors.items() if n != "final_logits_bias"}
  safetensors.numpy.save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BartModel"]}))
  skeleton = registry.skeleton(registry.read_config(folder), **HOW)
  more = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  without = hub.lacking(folder, skeleton.rules, skeleton.shapes, ["head/.*"], **more)
  assert skeleton.kind == "lm" and without == {"head/bias"}
  found = hub.load(folder, skeleton.rules, skeleton.shapes, None, without=without, **more)
  np.testing.assert_array_equal(found["embed"]["embedding"], tensors["model.shared.weight"])
  fresh = jax.jit(lambda key: skeleton.init(key)["head"]["bias"], compiler_options=FAST)
  assert not np.any(fresh(jax.random.key(0)))


@pytest.mark.parametrize("written", ("marian",), indirect=True)
def test_vocabulary_grows(written):
  """On both sides at once, and transformers reads the result."""
  folder, _ = written
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, "decoder_vocab_size": 43}))
  skeleton, params = parity.load(folder)
  grown, params = registry.resize(skeleton.json, params, 47)
  larger = registry.skeleton(grown, **HOW)
  assert (grown["vocab_size"], grown["decoder_vocab_size"]) == (47, 47)
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, larger.shapes)


@pytest.mark.parametrize("written", ("bart",), indirect=True)
def test_a_translator_becomes_a_classifier(written):
  """Of the vocabulary head nothing is read; the new head is lacking as a whole."""
  folder, _ = written
  want = registry.Wanted("classify", ("a", "b", "c"))
  skeleton = registry.skeleton(registry.read_config(folder), want=want, **HOW)
  more = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  without = hub.lacking(folder, skeleton.rules, skeleton.shapes, ["head/.*"], **more)
  assert without == {p for p in trees.flatten(skeleton.shapes) if p.startswith("head/")} and len(without) == 4
  assert "head" not in hub.load(folder, skeleton.rules, skeleton.shapes, None, without=without, **more)


def test_final_bias_and_padding_are_not_trained():
  """Neither the bias of the logits nor, where the head is taken away, the row of the table that the padding has."""
  skeleton = registry.skeleton(tiny.CONFIGS["marian"], **HOW)
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), skeleton.shapes)
  rows = parity.batch("seq2seq", tiny.CONFIGS["marian"])

  def loss(p):
    model = skeleton.bind(p)
    hidden = model.hidden(rows, None)
    return jnp.sum(jnp.sin(model.logits(hidden))), jnp.sum(jnp.sin(hidden))

  (whole, body) = jax.jit(jax.jacrev(loss), compiler_options=FAST)(params)
  assert not np.any(whole["head"]["bias"]) and np.any(whole["embed"]["embedding"][42])
  assert not np.any(body["embed"]["embedding"][42]) and np.any(body["embed"]["embedding"][41])
