"""Tables of names: every layout, fused tensors, bare models and old names, tensors that are not used, heads to be made.

Caught: parts exchanged, or cut by head where they stand one after the other; a fused tensor saved with a hole or twice;
a copy of the whole tensor where a slice is wanted; a message that names a tensor once for each part; a head that is
replaced without having been asked for, or half of it; tensors that vanish in silence.
"""

import dataclasses
import itertools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import hub, names, safetensors, sharding, trees
from jaxft.errors import InputError

L, D, N, K, H, F, V, C = 3, 8, 4, 2, 6, 10, 14, 5
Q = N * H  # width of all heads


def table():
  conv = names.parts((D, 3 * Q), 1, (Q, Q, Q))
  conv_bias = names.parts((3 * Q,), 0, (Q, Q, Q))
  by_head = names.parts((Q * 3, D), 1, (1, 1, 1), view=(N, 3, H, D))
  by_head_bias = names.parts((Q * 3,), 1, (1, 1, 1), view=(N, 3, H))
  uneven = names.parts(((N + 2 * K) * H, D), 0, (N * H, K * H, K * H))
  out = [names.plain("t.wte.weight", "embed/embedding", copies=("lm_head.weight",))]
  for j, x in enumerate("qkv"):
    out += [
      names.conv_heads_in("t.h.{i}.c_attn.weight", f"layers/gpt2/{x}/kernel", part=conv[j]),
      names.heads_bias("t.h.{i}.c_attn.bias", f"layers/gpt2/{x}/bias", part=conv_bias[j]),
      names.heads_in("t.h.{i}.query_key_value.weight", f"layers/neox/{x}/kernel", part=by_head[j]),
      names.heads_bias("t.h.{i}.query_key_value.bias", f"layers/neox/{x}/bias", part=by_head_bias[j]),
      names.heads_in("t.h.{i}.qkv_proj.weight", f"layers/phi3/{x}/kernel", part=uneven[j]),
    ]
  for x, part in zip(("gate", "up"), names.parts((2 * F, D), 0, (F, F))):
    out.append(names.linear("t.h.{i}.gate_up_proj.weight", f"layers/mlp/{x}/kernel", part=part))
  return out + [
    names.conv_heads_out("t.h.{i}.c_proj.weight", "layers/gpt2/o/kernel"),
    names.plain("t.h.{i}.ln.weight", "layers/norm/scale", copies=("t.h.{i}.old_ln.weight",)),
    names.linear("t.h.{i}.late.weight", "layers/late/kernel", first=1),
    names.linear("score.dense.weight", "head/dense/kernel"),
    names.linear("score.out.weight", "head/out/kernel"),
    names.plain("score.out.bias", "head/out/bias"),
    names.ignore("t.h.{i}.attn.bias"),
    names.ignore("cls.predictions.*"),
  ]


RULES = table()
heads = lambda n: {"kernel": (L, D, n, H), "bias": (L, n, H)}
SHAPES = {
  "embed": {"embedding": (V, D)},
  "layers": {
    "gpt2": {**{x: heads(N) for x in "qkv"}, "o": {"kernel": (L, N, H, D)}},
    "neox": {x: heads(N) for x in "qkv"},
    "phi3": {x: {"kernel": (L, D, n, H)} for x, n in zip("qkv", (N, K, K))},
    "mlp": {x: {"kernel": (L, D, F)} for x in ("gate", "up")},
    "norm": {"scale": (L, D)},
    "late": {"kernel": (L, D, 3)},
  },
  "head": {"dense": {"kernel": (D, D)}, "out": {"kernel": (D, C), "bias": (C,)}},
}
HEAD = {"head/dense/kernel", "head/out/kernel", "head/out/bias"}


def shapes(labels=C):
  given = {**SHAPES, "head": {"dense": {"kernel": (D, D)}, "out": {"kernel": (D, labels), "bias": (labels,)}}}
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), given, is_leaf=lambda x: isinstance(x, tuple))


def params():
  count = itertools.count()
  draw = lambda s: np.random.RandomState(next(count)).standard_normal(s.shape).astype(np.float32)
  out = jax.tree.map(draw, shapes())
  out["layers"]["late"]["kernel"][0] = 1  # the Hub has none for this layer
  return out


def theirs(p):
  """The tensors under the Hub's names and layouts, written out by hand."""
  layers, flat = p["layers"], lambda x: x.reshape(D, -1)
  out = {"t.wte.weight": p["embed"]["embedding"]}
  for i in range(L):
    at = f"t.h.{i}."
    gpt2, neox = ({x: {k: v[i] for k, v in layers[name][x].items()} for x in "qkv"} for name in ("gpt2", "neox"))
    out[at + "c_attn.weight"] = np.concatenate([flat(gpt2[x]["kernel"]) for x in "qkv"], 1)
    out[at + "c_attn.bias"] = np.concatenate([gpt2[x]["bias"].reshape(-1) for x in "qkv"])
    rows = [neox[x]["kernel"][:, n, h] for n in range(N) for x in "qkv" for h in range(H)]
    out[at + "query_key_value.weight"] = np.stack(rows)
    out[at + "query_key_value.bias"] = np.array(
      [neox[x]["bias"][n, h] for n in range(N) for x in "qkv" for h in range(H)]
    )
    out[at + "qkv_proj.weight"] = np.concatenate([flat(layers["phi3"][x]["kernel"][i]).T for x in "qkv"])
    out[at + "gate_up_proj.weight"] = np.concatenate([layers["mlp"][x]["kernel"][i].T for x in ("gate", "up")])
    out[at + "c_proj.weight"] = np.stack([layers["gpt2"]["o"]["kernel"][i, n, h] for n in range(N) for h in range(H)])
    out[at + "ln.weight"] = layers["norm"]["scale"][i]
    if i:
      out[at + "late.weight"] = layers["late"]["kernel"][i].T
  head = p["head"]
  out["score.dense.weight"], out["score.out.weight"] = head["dense"]["kernel"].T, head["out"]["kernel"].T
  return {**out, "score.out.bias": head["out"]["bias"]}


def write(folder, tensors):
  folder.mkdir(exist_ok=True)
  sizes = {n: t.shape for n, t in tensors.items()}
  safetensors.write(folder / "model.safetensors", sizes, np.dtype(np.float32), tensors.items())
  return folder


def save(folder, p):
  hub.save(folder, RULES, p, {}, dtype="float32", shard_gb=5.0, generation_config=None, tokenizer_from=None)
  return folder


def load(folder, labels=C, **how):
  return hub.load(folder, RULES, shapes(labels), None, **how)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_layouts_and_round_trip(tmp_path):
  p = params()
  equal(load(write(tmp_path / "in", theirs(p))), p)
  found = safetensors.read_folder(save(tmp_path / "out", p))
  equal({n: t.view() for n, t in found.items()}, theirs(p))
  assert hub.verify(tmp_path / "out", RULES, p) == 0.0
  for path in ("gpt2/k/kernel", "gpt2/v/bias", "neox/k/kernel", "neox/q/bias", "phi3/v/kernel", "mlp/up/kernel"):
    moved = trees.flatten(p)
    moved["layers/" + path] = leaf = moved["layers/" + path].copy()
    leaf[1] += 0.5
    assert hub.verify(tmp_path / "out", RULES, trees.unflatten(moved)) == pytest.approx(0.5, abs=1e-6), path


def test_tensors_are_cut_without_a_copy():
  flat = trees.flatten(shapes())
  for rule in (r for r in RULES if r.ours):
    shape = flat[rule.ours].shape
    whole = np.arange(np.prod(rule.hub_shape(shape)), dtype=np.float32).reshape(rule.hub_shape(shape))
    assert np.shares_memory(rule.to_ours(whole, shape), whole), rule


def test_sharded(tmp_path, monkeypatch):
  """On 8 devices: equal values, own slices only, and the same file again from the shards."""
  p = params()
  write(tmp_path / "in", theirs(p))
  mesh = sharding.make_mesh(dict(a=4, b=2))
  spec = {"q": (None, "a", "b"), "k": (None, "a", "b"), "v": (None, "b"), "o": (None, "b", None, "a")}
  place = lambda path, s: NamedSharding(
    mesh, PartitionSpec(*spec.get(path.split("/")[-2], ()) if len(s.shape) > 3 else ())
  )
  places = trees.map_with_path(place, shapes())
  made, kept = [], hub._aligned
  monkeypatch.setattr(hub, "_aligned", lambda shape, dtype: (made.append(int(np.prod(shape))), kept(shape, dtype))[1])
  found = hub.load(tmp_path / "in", RULES, shapes(), places)
  equal(found, p)
  assert found["layers"]["neox"]["k"]["kernel"].addressable_shards[0].data.shape == (L, D // 4, N // 2, H)
  assert sum(made) == sum(x.size for x in jax.tree.leaves(p))
  save(tmp_path / "sharded", found)
  save(tmp_path / "plain", p)
  one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sharded", "plain"))
  assert one == other
  assert hub.verify(tmp_path / "sharded", RULES, found) == 0.0


def test_a_fused_tensor_is_shared_out_whole():
  flat = trees.flatten(shapes())
  assert len(names.entries(RULES, flat)) == len(theirs(params()))
  at = next(i for i, r in enumerate(RULES) if r.ours == "layers/phi3/k/kernel")
  rule, change = RULES[at], lambda **f: [*RULES[:at], dataclasses.replace(RULES[at], **f), *RULES[at + 1 :]]
  move = lambda **f: change(part=dataclasses.replace(rule.part, **f))
  without = {k: v for k, v in flat.items() if k != rule.ours}
  for rules, leaves, message in (
    (RULES[:at] + RULES[at + 1 :], without, "do not cover"),  # a part is missing
    (move(stop=rule.part.stop + 1), flat, "do not cover"),  # overlaps the next
    (move(start=rule.part.start + 1), flat, "do not cover"),  # a gap
    (move(whole=(4, 4)), flat, "different ways"),
    (change(part=None), flat, "two rules without a part"),
    (RULES, {**flat, rule.ours: jax.ShapeDtypeStruct((L, D, K + 1, H), jnp.float32)}, "values a layer"),
    (RULES, {**flat, rule.ours: jax.ShapeDtypeStruct((L + 1, D, K, H), jnp.float32)}, "different layers"),
    ([*RULES, rule], flat, "names twice"),
    (RULES, without, "table and model differ"),
  ):
    with pytest.raises(AssertionError, match=message):
      names.entries(rules, leaves)
  with pytest.raises(AssertionError):
    names.parts((8, 6), 1, (2, 2))
  twice = [names.plain("a.{i}.b", "x"), names.plain("a.1.b", "y")]
  with pytest.raises(AssertionError, match="two rules"):
    names.entries(twice, {"x": np.zeros((2, 3)), "y": np.zeros(3)})


def test_messages_name_a_fused_tensor_once(tmp_path):
  t = theirs(params())
  del t["t.h.1.c_attn.weight"]
  t["t.h.2.qkv_proj.weight"] = t["t.h.2.qkv_proj.weight"][:7]
  t["t.h.3.c_attn.bias"] = np.zeros(3 * Q, np.float32)
  with pytest.raises(InputError) as e:
    load(write(tmp_path, t))
  for part in (
    f"missing in the file (1): t.h.1.c_attn.weight [{D}, {3 * Q}];",
    f"not known to the model (1): t.h.3.c_attn.bias [{3 * Q}];",
    f"wrong (1): t.h.2.qkv_proj.weight is [7, {D}], expected [{(N + 2 * K) * H}, {D}].",
  ):
    assert part in str(e.value), e.value


def test_copies_of_stacked_tensors(tmp_path):
  p = params()
  t = theirs(p)
  old = {n.replace(".ln.", ".old_ln."): x for n, x in t.items()}
  equal(load(write(tmp_path, old)), p)
  t["t.h.1.old_ln.weight"] = t["t.h.2.ln.weight"]
  with pytest.raises(InputError, match="t.h.1.old_ln.weight differs from t.h.1.ln.weight"):
    load(write(tmp_path, t))


def test_bare_models(tmp_path):
  """Names without the prefix; those known as they are stay, and messages say the file's names."""
  p = params()
  bare = {n.removeprefix("t."): x for n, x in theirs(p).items()}
  with pytest.raises(InputError, match="not known to the model"):
    load(write(tmp_path, bare))
  buffers = {"h.0.attn.bias": np.zeros(2, np.float32), "lm_head.weight": bare["wte.weight"]}
  equal(load(write(tmp_path, {**bare, **buffers}), prefix="t."), p)
  equal(load(write(tmp_path, theirs(p)), prefix="t."), p)
  with pytest.raises(InputError, match=r"not known to the model \(1\): stranger \[2\]\. Check"):
    load(write(tmp_path, {**bare, "stranger": np.zeros(2, np.float32)}), prefix="t.")
  mixed = {**theirs(p), "wte.weight": bare["wte.weight"]}
  with pytest.raises(InputError, match=r"not known to the model \(1\): wte.weight"):
    load(write(tmp_path, mixed), prefix="t.")


def test_old_names(tmp_path):
  p = params()
  renames = ((r"\.ln\.gamma$", ".ln.weight"), (r"^transformer\.", "t."))
  old = {n.replace("t.h.", "transformer.h.").replace(".ln.weight", ".ln.gamma"): x for n, x in theirs(p).items()}
  equal(load(write(tmp_path, old), renames=renames), p)
  both = {n.removeprefix("t.").replace(".ln.weight", ".ln.gamma"): x for n, x in theirs(p).items()}
  equal(load(write(tmp_path, both), prefix="t.", renames=renames), p)
  old["t.h.1.ln.weight"] = old["transformer.h.1.ln.gamma"]
  with pytest.raises(InputError, match="transformer.h.1.ln.gamma and t.h.1.ln.weight both stand for t.h.1.ln.weight"):
    load(write(tmp_path, old), renames=renames)


def test_what_is_not_used_is_said_once(tmp_path, caplog):
  p = params()
  caplog.set_level(logging.INFO, "jaxft")
  buffers = {f"t.h.{i}.attn.bias": np.zeros(2, np.float32) for i in (0, 11)}
  equal(load(write(tmp_path, {**theirs(p), **buffers})), p)
  assert not caplog.records
  others = {f"cls.predictions.{x}": np.zeros(2, np.float32) for x in ("bias", "decoder.weight", "transform.weight")}
  equal(load(write(tmp_path, {**theirs(p), **buffers, **others})), p)
  assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}: not used: cls.predictions.* (3 tensors)."]
  for name in ("t.h.x.attn.bias", "t.h.0.attn.bias2", "cls.prediction.bias"):
    with pytest.raises(InputError, match="not known"):
      load(write(tmp_path, {**theirs(p), name: np.zeros(2, np.float32)}))


def lacking(folder, labels=C, heads=("head/.*",), **how):
  return hub.lacking(folder, RULES, shapes(labels), heads, **how)


def test_a_head_that_is_not_in_the_file(tmp_path):
  """It is given to the caller to make, all of it or nothing."""
  p = params()
  write(tmp_path, theirs(p))
  assert lacking(tmp_path) == set() == lacking(tmp_path, replace=True)
  none = {n.removeprefix("t."): x for n, x in theirs(p).items() if "score" not in n}
  write(tmp_path, none)
  missing = lacking(tmp_path, prefix="t.")
  assert missing == HEAD and lacking(tmp_path, prefix="t.", heads=()) == set()
  equal(load(tmp_path, prefix="t.", without=missing), {k: v for k, v in p.items() if k != "head"})
  with pytest.raises(InputError, match=r"missing in the file \(3\): score"):
    load(tmp_path, prefix="t.")
  half = {n: x for n, x in theirs(p).items() if n != "score.dense.weight"}
  write(tmp_path, half)
  assert lacking(tmp_path) == set() and lacking(tmp_path, replace=True) == HEAD
  assert lacking(tmp_path, heads=("head/dense/.*", "head/out/.*")) == {"head/dense/kernel"}
  with pytest.raises(InputError, match=r"missing in the file \(1\): score.dense.weight"):
    load(tmp_path)
  with pytest.raises(AssertionError, match="as a whole or not at all"):
    load(write(tmp_path, theirs(p)), without={"layers/mlp/up/kernel"})
  with pytest.raises(AssertionError, match="not in the model"):
    load(tmp_path, without={"head/stranger"})


def test_a_head_of_another_number_of_labels(tmp_path, caplog):
  p = params()
  bare = {n.removeprefix("t."): x for n, x in theirs(p).items()}
  write(tmp_path, bare)
  with pytest.raises(InputError) as e:
    lacking(tmp_path, labels=7, prefix="t.")
  assert f"score.out.weight is [5, {D}], and [7, {D}] is needed: the head in the file has 5 labels, this one 7" in str(
    e.value
  )
  missing = lacking(tmp_path, labels=7, prefix="t.", replace=True)
  assert missing == HEAD
  caplog.set_level(logging.INFO, "jaxft")
  equal(load(tmp_path, labels=7, prefix="t.", without=missing), {k: v for k, v in p.items() if k != "head"})
  said = "score.dense.weight (1 tensor), score.out.weight (1 tensor), score.out.bias (1 tensor)"
  assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}: not used: {said}."]
  write(tmp_path, {**bare, "score.dense.weight": np.zeros((D, 3), np.float32)})
  with pytest.raises(InputError, match=r"score.dense.weight is \[8, 3\], and \[8, 8\] is needed\. Take"):
    lacking(tmp_path, prefix="t.")


def test_tokenizer_files_are_downloaded_and_copied(tmp_path):
  """All that the tokenizers of transformers are stored in: what an export copies, `resolve` has downloaded."""
  from huggingface_hub.utils import filter_repo_objects

  tokenizers = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json "
    "chat_template.jinja vocab.txt vocab.json merges.txt spiece.model tokenizer.model sentencepiece.bpe.model "
    "spm.model source.spm target.spm target_vocab.json dict.txt bpe.codes additional_chat_templates/tools.jinja"
  ).split()
  weights = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
  not_wanted = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "training_args.bin"]
  listed = tokenizers + weights
  assert list(filter_repo_objects(listed + not_wanted, allow_patterns=list(hub.WANTED))) == listed
  source, out = tmp_path / "source", tmp_path / "out"
  for name in tokenizers + not_wanted:
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text(name)
  for folder in (out, source):  # the second is the folder itself
    hub.save(folder, RULES, params(), {}, dtype="float32", shard_gb=5.0, generation_config=None, tokenizer_from=source)
  held = {str(f.relative_to(out)): f for f in out.rglob("*") if f.is_file()}
  assert set(held) == {*tokenizers, "config.json", "model.safetensors"}
  assert all(held[n].read_text() == n for n in tokenizers)
  assert json.loads(held["config.json"].read_text())["dtype"] == "float32"
