"""BERT and its relatives beside test_parity.py and test_all.py: variants, what only one of them has, a head of our own.

Caught by these tests and those, each tried once: positions of RoBERTa one place early; the activation of a head, or its
dropout; that of DistilBERT's attention output; an epsilon; ModernBERT's window one wider, ropes exchanged, windows in
other layers, q, k and v or the gate in another order, a norm in its first layer, mean for first; deviations without the
cut; DeBERTa's scale, norm of distances, their direction, vectors of q for those of k, or the border of a bucket.
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
from jaxft.models import attention
from tests.families import parity, reference, tiny
from tests.families.parity import HOW

KINDS = dict(
  xlm_roberta="mlm", electra_base="mlm", deberta_places="tag", modernbert_biases="classify", modernbert_untied="mlm"
)


def torch_or_skip():
  return pytest.importorskip("torch", reason="no torch: families other than T5 are not compared with transformers")


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_variant(name, tmp_path):
  torch_or_skip()
  parity.check(tiny.ENCODERS[name], KINDS[name], tmp_path)
  parity.check_export(tiny.ENCODERS[name], KINDS[name], tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("base,field,value,says", [
  ("bert", "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
  ("bert", "is_decoder", True, "is_decoder=True"),
  ("bert", "num_attention_heads", 5, "hidden_size=24 is no multiple of num_attention_heads=5"),
  ("bert", "embedding_size", 12, "unknown fields.*embedding_size"),
  ("roberta", "pad_token_id", None, "pad_token_id=None"),
  ("distilbert", "sinusoidal_pos_embds", True, "sinusoidal_pos_embds=True"),
  ("distilbert", "n_heads", 5, "dim|hidden_size=24 is no multiple"),
  ("distilbert", "hidden_size", 25, "hidden_size=25 beside dim=24"),
  ("electra", "embedding_size", None, "missing|embedding_size=None"),
  ("modernbert", "classifier_pooling", "max", "classifier_pooling='max'"),
  ("modernbert", "local_attention", 1, "local_attention=1 .it is a whole number above 1"),
  ("modernbert", "layer_types", ["full_attention"], "layer_types has 1 entries"),
  ("modernbert", "rope_scaling", dict(type="linear", factor=2.0), "rope_scaling="),
  ("modernbert", "rope_parameters", dict(rope_type="default", rope_theta=3.0), "one object for each of full_attention"),
  ("modernbert", "rope_parameters", dict(full_attention=dict(partial_rotary_factor=0.5)), "turns whole heads"),
  ("deberta", "conv_kernel_size", 3, "conv_kernel_size=3"),
  ("deberta", "pos_att_type", "c2p", "pos_att_type='c2p'"),
  ("deberta", "share_att_key", False, "share_att_key=False"),
  ("deberta", "relative_attention", ..., "missing: relative_attention"),
  ("deberta", "position_buckets", 3, "position_buckets=3 does not fit"),
  ("deberta", "position_buckets", 40, "position_buckets=40 does not fit distances below 19"),
])  # fmt: skip
def test_config_field_is_refused(base, field, value, says):
  config = {k: v for k, v in {**tiny.CONFIGS[base], field: value}.items() if v is not ...}
  with pytest.raises(InputError, match=says):
    registry.skeleton(config, **HOW)


@pytest.mark.parametrize("base,field", [("bert", "tie_word_embeddings"), ("deberta", "legacy")])
def test_masked_language_models_that_are_not_built(base, field):
  config = {**tiny.CONFIGS[base], field: False}
  assert registry.skeleton(config, want=registry.Wanted("tag"), **HOW).kind == "tag"
  with pytest.raises(InputError, match="masked language model"):
    registry.skeleton(config, want=registry.Wanted("mlm"), **HOW)


def test_old_and_new_ropes_of_modernbert_mean_the_same():
  old = {k: v for k, v in tiny.CONFIGS["modernbert"].items() if k != "rope_parameters"}
  rope = lambda theta: dict(rope_type="default", rope_theta=theta)
  spec = lambda **c: registry.skeleton({**old, **c}, **HOW).spec
  new = spec(rope_parameters=dict(full_attention=rope(5.0), sliding_attention=rope(7.0)))
  assert new == spec(global_rope_theta=5.0, local_rope_theta=7.0)
  assert new == spec(global_rope_theta=5.0, local_rope_theta=9.0, rope_parameters=dict(sliding_attention=rope(7.0)))
  assert [r.theta for r in spec().stack.ropes] == [160_000.0, 10_000.0]


def drawn(skeleton, seed: int = 2):
  rng = np.random.RandomState(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), skeleton.shapes)


def save(folder, skeleton, params) -> dict[str, np.ndarray]:
  more = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(folder, skeleton.rules, params, skeleton.json, **more)
  return safetensors.numpy.load_file(folder / "model.safetensors")


def written(config: dict, kind: str, folder):
  """Writes a model with random weights; returns (skeleton, weights, tensors by name)."""
  skeleton = registry.skeleton(config, want=registry.Wanted(kind), **HOW)
  params = drawn(skeleton)
  return skeleton, params, save(folder, skeleton, params)


NORM = "encoder/layers/self_norm/scale"


def test_norm_that_the_first_layer_lacks(tmp_path):
  """It is not in a file, has no gradient, no effect, and is read as ones; the other layers keep their numbers."""
  skeleton, params, tensors = written(tiny.CONFIGS["modernbert"], "mlm", tmp_path)
  mine = np.asarray(trees.flatten(params)[NORM])
  held = {n: x for n, x in tensors.items() if "attn_norm" in n}
  assert sorted(held) == [f"model.layers.{i}.attn_norm.weight" for i in (1, 2, 3)]
  for i in (1, 2, 3):
    np.testing.assert_array_equal(held[f"model.layers.{i}.attn_norm.weight"], mine[i])
  assert hub.verify(tmp_path, skeleton.rules, params) == 0.0
  _, again = parity.load(tmp_path)
  again = trees.flatten(again)
  np.testing.assert_array_equal(again[NORM], np.concatenate([np.ones_like(mine[:1]), mine[1:]]))
  rows = parity.batch("mlm", skeleton.json)
  step = jax.jit(
    jax.grad(lambda p: parity.loss_fn(skeleton, p, "mlm", rows), has_aux=True), compiler_options=reference.FAST
  )
  grads, (logits,) = step(params)
  grads = trees.flatten(grads)[NORM]
  assert not np.any(grads[0]) and np.all(np.any(grads[1:], -1))
  np.testing.assert_array_equal(step(trees.unflatten(again))[1][0], logits)


def test_buckets_of_distances_are_those_of_transformers():
  torch = torch_or_skip()
  from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

  distance = np.arange(-3000, 3001)
  for half, far in ((256, 512), (6, 19), (9, 29), (64, 4000), (33, 257), (4, 8)):
    wanted = make_log_bucket_position(torch.tensor(distance), half, far).long() + half
    mine = attention.log_buckets(distance, half, far)
    np.testing.assert_array_equal(mine, wanted.clamp(0, 2 * half - 1).numpy(), err_msg=f"{half} {far}")


ACTS = dict(silu=lambda x: x / (1 + np.exp(-x)), relu=lambda x: np.maximum(x, 0), tanh=np.tanh)


@pytest.mark.parametrize(
  "name,kind,act", [("bert", "classify", "silu"), ("roberta", "qa", "relu"), ("modernbert", "tag", "tanh")]
)
def test_head_of_our_own(name, kind, act, tmp_path):
  """It begins on a folder without it, is saved and read again bit for bit, and gives what its formula says for the
  hidden states of transformers, which loads the rest of the folder as the bare model."""
  import transformers

  torch = torch_or_skip()
  parity.torch_model(tiny.CONFIGS[name], "base").save_pretrained(tmp_path / "source")
  want = registry.Wanted(kind, ("a", "b", "c") if kind != "qa" else (), mlp=(13, act))
  skeleton = registry.skeleton(registry.read_config(tmp_path / "source"), want=want, **HOW)
  how = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  missing = hub.lacking(tmp_path / "source", skeleton.rules, skeleton.shapes, ("head/.*",), **how)
  assert missing == {f"head/{x}" for x in ("dense/kernel", "dense/bias", "kernel", "bias")}
  body = hub.load(tmp_path / "source", skeleton.rules, skeleton.shapes, None, without=missing, **how)
  params = {**body, "head": drawn(skeleton)["head"]}
  tensors = save(tmp_path / "made", skeleton, params)
  assert skeleton.json["architectures"] == [registry.FAMILIES[skeleton.json["model_type"]].heads["base"].architecture]
  own = {n for n in tensors if n.startswith("jaxft_head.")}
  assert own == {f"jaxft_head.{x}.{y}" for x in ("dense", "out") for y in ("weight", "bias")}
  out = 2 if kind == "qa" else 3
  assert tensors["jaxft_head.dense.weight"].shape == (13, 24) and tensors["jaxft_head.out.weight"].shape == (out, 13)
  again, found = parity.load(tmp_path / "made")
  assert again.kind == kind and again.spec == skeleton.spec and again.labels == skeleton.labels
  jax.tree.map(np.testing.assert_array_equal, found, params)

  model, said = transformers.AutoModel.from_pretrained(tmp_path / "made", output_loading_info=True)
  assert set(said["unexpected_keys"]) == own and all("pooler" in n for n in said["missing_keys"]), said
  rows = parity.batch(kind, {**skeleton.json, "type_vocab_size": 1})
  run = lambda p, rows: getattr(again.bind(p), "classify" if kind == "classify" else "tag")(rows, None)
  given = dict(input_ids=torch.tensor(rows["inputs"]).long(), attention_mask=torch.tensor(rows["input_segments"]))
  with torch.no_grad():
    hidden = model.eval()(**given).last_hidden_state.numpy()
  dense, head = params["head"]["dense"], params["head"]
  wanted = ACTS[act](hidden @ dense["kernel"] + dense["bias"]) @ head["kernel"] + head["bias"]
  got = np.asarray(jax.jit(run, compiler_options=reference.FAST)(found, rows))
  real = rows["input_segments"] > 0
  one, other = (got[:, 0], wanted[:, 0]) if kind == "classify" else (got[real], wanted[real])
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_our_own_head_and_a_usual_one_replace_each_other(tmp_path, caplog):
  """What the file has of the other is said to be unused."""
  config, parts = tiny.CONFIGS["distilbert"], {f"head/{x}" for x in ("dense/kernel", "dense/bias", "kernel", "bias")}
  want = lambda mlp: registry.Wanted("classify", ("a", "b", "c"), mlp=mlp)
  caplog.set_level(logging.INFO, "jaxft")
  for before, after, unused in (
    (None, (13, "silu"), ("pre_classifier", "classifier")),
    ((13, "silu"), None, ("jaxft_head",)),
    (None, None, ()),
  ):
    skeleton = registry.skeleton(config, want=want(before), **HOW)
    save(tmp_path, skeleton, drawn(skeleton))
    caplog.clear()
    skeleton = registry.skeleton(registry.read_config(tmp_path), want=want(after), **HOW)
    how = dict(prefix=skeleton.prefix, renames=skeleton.renames)
    missing = hub.lacking(tmp_path, skeleton.rules, skeleton.shapes, ("head/.*",), **how)
    assert missing == (set() if before == after else parts)
    hub.load(tmp_path, skeleton.rules, skeleton.shapes, None, without=missing, **how)
    assert all(f"{name}.*" in caplog.text for name in unused) and bool(unused) == bool(caplog.text), caplog.text
