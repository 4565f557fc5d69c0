"""Model folders: what is refused and how it is said; shards, copies, dtypes; a mesh reads its own slices only.

Caught: a header that lies about sizes, overlaps or holes; a path in an index; a transposed reshape; a mismatch that
ends the list of mismatches; a file that stays behind; the whole tensor read where a slice is wanted.
"""

import fnmatch
import json
import os
import pathlib
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import hub, names, safetensors, sharding
from jaxft.errors import InputError

L, D, N, H, V = 3, 8, 2, 5, 24
RULES = [
  names.Rule("shared.weight", "embed/embedding", copies=("lm_head.weight", "enc.embed.weight")),
  names.heads_in("b.{i}.q.weight", "layers/q/kernel"),
  names.heads_out("b.{i}.o.weight", "layers/o/kernel"),
  names.linear("b.{i}.wi.weight", "layers/wi/kernel"),
  names.Rule("norm.weight", "norm/scale"),
  names.ignore("old.bias"),
]
SHAPES = {
  "embed": {"embedding": (V, D)},
  "norm": {"scale": (D,)},
  "layers": {"q": {"kernel": (L, D, N, H)}, "o": {"kernel": (L, N, H, D)}, "wi": {"kernel": (L, D, 7)}},
}
CONFIG = dict(model_type="toy", width=D)


def shapes(dtype=jnp.float32):
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def params(dtype=np.float32):
  return jax.tree.map(lambda s: np.random.RandomState(s.size).standard_normal(s.shape).astype(dtype), shapes())


def theirs(p):
  """The same tensors under the Hub's names and layouts, written out by hand."""
  out = {"shared.weight": p["embed"]["embedding"], "norm.weight": p["norm"]["scale"]}
  for i in range(L):
    out[f"b.{i}.q.weight"] = np.stack([p["layers"]["q"]["kernel"][i, :, n, h] for n in range(N) for h in range(H)])
    out[f"b.{i}.o.weight"] = np.stack([p["layers"]["o"]["kernel"][i, n, h, :] for n in range(N) for h in range(H)], 1)
    out[f"b.{i}.wi.weight"] = p["layers"]["wi"]["kernel"][i].T
  return out


def write(folder, tensors, name="model.safetensors", dtype=np.float32):
  safetensors.write(folder / name, {n: t.shape for n, t in tensors.items()}, np.dtype(dtype), tensors.items())
  return folder


def save(folder, p, dtype="float32", shard_gb=5.0, **kw):
  given = dict(generation_config=None, tokenizer_from=None) | kw
  hub.save(folder, RULES, p, CONFIG, dtype=dtype, shard_gb=shard_gb, **given)
  return folder


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_layouts_and_round_trip(tmp_path):
  p = params()
  equal(hub.load(write(tmp_path, theirs(p)), RULES, shapes(), None), p)
  save(tmp_path / "out", p)
  equal({n: t.view() for n, t in safetensors.read_folder(tmp_path / "out").items()}, theirs(p))
  assert hub.verify(tmp_path / "out", RULES, p) == 0.0
  moved = jax.tree.map(lambda x: x + np.float32(0.5), p)
  assert hub.verify(tmp_path / "out", RULES, moved) == pytest.approx(0.5, abs=1e-6)
  p["norm"]["scale"][3] = np.nan
  assert np.isnan(hub.verify(tmp_path / "out", RULES, p))


def test_files_are_read_by_the_reference_library(tmp_path):
  """Not only by our own reader: the safetensors package, where it is installed, opens them and finds the metadata."""
  library = pytest.importorskip("safetensors", reason="no safetensors package: our own reader alone reads them back")
  p = params()
  save(tmp_path, p)
  with library.safe_open(tmp_path / "model.safetensors", "np") as f:
    assert f.metadata() == {"format": "pt"}
    equal({n: f.get_tensor(n) for n in f.keys()}, theirs(p))


@pytest.mark.parametrize("dtype,exact", (("float32", True), ("bfloat16", False), ("float16", False)))
def test_dtypes(tmp_path, dtype, exact):
  p = params()
  save(tmp_path, p, dtype)
  kind = jnp.dtype(dtype)
  rounded = jax.tree.map(lambda x: x.astype(kind), p)
  equal(hub.load(tmp_path, RULES, shapes(), None), jax.tree.map(lambda x: x.astype(np.float32), rounded))
  equal(hub.load(tmp_path, RULES, shapes(kind), None), rounded)
  assert (hub.verify(tmp_path, RULES, p) == 0) == exact and hub.verify(tmp_path, RULES, rounded) == 0
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_shards(tmp_path):
  """Files below the limit, an index that says what is where, and nothing left of what was in the folder."""
  p = params()
  save(tmp_path, p)
  save(tmp_path, p, shard_gb=700e-9)
  files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  total = sum(x.size for x in jax.tree.leaves(p))
  assert index["metadata"] == {"total_parameters": total, "total_size": 4 * total}
  assert set(index["weight_map"]) == set(theirs(p))
  for name in files:
    found = safetensors.read_header(tmp_path / name)
    assert len(found) == 1 or sum(t.view().nbytes for t in found.values()) <= 700
  equal(hub.load(tmp_path, RULES, shapes(), None), p)
  save(tmp_path, p)
  assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_sharded_load_touches_its_own_slices(tmp_path, monkeypatch):
  """On 8 devices: values equal, every shard of its own size, and each byte copied once although replicas share it."""
  p = params()
  save(tmp_path, p)
  mesh = sharding.make_mesh(dict(a=4, b=2))
  layers = {"q": {"kernel": (None, "a", "b")}, "o": {"kernel": (None, "b", None, "a")}, "wi": {"kernel": (None, "a")}}
  specs = {"embed": {"embedding": ("a", None)}, "layers": layers, "norm": {"scale": ()}}
  places = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s)), specs, is_leaf=lambda x: isinstance(x, tuple))
  made = []
  kept = hub._aligned
  monkeypatch.setattr(hub, "_aligned", lambda shape, dtype: (made.append(int(np.prod(shape))), kept(shape, dtype))[1])
  found = hub.load(tmp_path, RULES, shapes(), places)
  equal(found, p)
  assert found["layers"]["q"]["kernel"].addressable_shards[0].data.shape == (L, D // 4, 1, H)
  assert found["layers"]["q"]["kernel"].sharding.is_equivalent_to(places["layers"]["q"]["kernel"], 4)
  assert sum(made) == sum(x.size for x in jax.tree.leaves(p)) and max(made) < V * D
  save(tmp_path / "again", found)  # from shards back into the same file
  assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
  assert hub.verify(tmp_path / "again", RULES, found) == 0.0


def test_copies_and_ignored_tensors(tmp_path):
  p = params()
  t = theirs(p)
  old = {**t, "lm_head.weight": t["shared.weight"], "old.bias": np.ones(3, np.float32)}
  equal(hub.load(write(tmp_path, old), RULES, shapes(), None), p)
  only = {("enc.embed.weight" if n == "shared.weight" else n): x for n, x in t.items()}
  equal(hub.load(write(tmp_path, only), RULES, shapes(), None), p)
  other = {**t, "lm_head.weight": t["shared.weight"] + np.float32(1e-6)}
  with pytest.raises(InputError, match="lm_head.weight differs from shared.weight"):
    hub.load(write(tmp_path, other), RULES, shapes(), None)


def test_every_mismatch_in_one_message(tmp_path):
  t = theirs(params())
  t["b.1.wi.weight"] = t["b.1.wi.weight"][:, :5]
  t["stranger"] = t.pop("b.2.q.weight")
  del t["norm.weight"]
  with pytest.raises(InputError) as e:
    hub.load(write(tmp_path, t), RULES, shapes(), None)
  for part in (
    "missing in the file (2): b.2.q.weight [10, 8], norm.weight [8]",
    "not known to the model (1): stranger [10, 8]",
    str(tmp_path),
    "wrong (1): b.1.wi.weight is [7, 5], expected [7, 8]",
  ):
    assert part in str(e.value), part


def raw(folder, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, start, stop, dtype="F32"):
  return dict(dtype=dtype, shape=shape, data_offsets=[start, stop])


@pytest.mark.parametrize(
  "header,data,length",
  [
    (b"", b"", 10**15),
    (b"{}", b"", 3),
    (b"[1]", b"", None),
    (b"{nonsense", b"", None),
    (b'{"a":1,"a":2}', b"", None),
    ({"a": entry([2], 0, 8)}, b"1234", None),
    ({"a": entry([2], 0, 4)}, b"1234", None),
    ({"a": entry([-1], 0, -4)}, b"", None),
    ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", None),
    ({"a": entry([1], 4, 8)}, b"12345678", None),
    ({"a": entry([1], 0, 4)}, b"12345678", None),
    ({"a": entry([1], 0, 4, "Q4")}, b"1234", None),
    ({"a": entry([1.0], 0, 4)}, b"1234", None),
    ({"a": dict(dtype="F32", shape=[1])}, b"1234", None),
    ({"a": entry([True], 0, 4)}, b"1234", None),
  ],
)
def test_bad_header_is_refused(tmp_path, header, data, length):
  raw(tmp_path, header, data, length)
  with pytest.raises(InputError, match="not a whole safetensors file"):
    safetensors.read_folder(tmp_path)


@pytest.mark.parametrize("content", (b"", b"\x01\x02"))
def test_cut_file_is_refused(tmp_path, content):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(InputError, match="not a whole"):
    safetensors.read_folder(tmp_path)


@pytest.mark.parametrize(
  "name",
  (
    "../secret.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "..safetensors",
    "model.bin",
    3,
    "a\\b.safetensors",
  ),
)
def test_index_cannot_leave_the_folder(tmp_path, name):
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(InputError):
    safetensors.read_folder(tmp_path)


def test_index_must_tell_the_truth(tmp_path):
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
  write(tmp_path, {"a": np.ones(2, np.float32)}, "one.safetensors")
  with pytest.raises(InputError, match="two.safetensors"):
    safetensors.read_folder(tmp_path)
  write(tmp_path, {"c": np.ones(2, np.float32)}, "two.safetensors")
  with pytest.raises(InputError, match="promises tensors.*b"):
    safetensors.read_folder(tmp_path)
  index.write_text("[]")
  with pytest.raises(InputError, match="not an index"):
    safetensors.read_folder(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
  with pytest.raises(InputError, match=r"pickle.*save_pretrained"):
    hub.load(tmp_path, RULES, shapes(), None)
  with pytest.raises(InputError, match="neither"):
    hub.load(pathlib.Path(__file__).parent, RULES, shapes(), None)


def test_resolve(tmp_path, monkeypatch):
  assert hub.resolve(str(tmp_path)) == tmp_path
  for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c", "no such name", ""):
    with pytest.raises(InputError, match="no such folder"):
      hub.resolve(name)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
    hub.resolve("somebody/no-such-model-here")


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A Hub with one repository, in the layout of the cache; returns (files it has, what was asked)."""
  import huggingface_hub

  files, asked = ["config.json", "pytorch_model.bin", "spiece.model"], []
  folder = tmp_path / "models--owner--a-model" / "snapshots" / "c0ffee"
  folder.mkdir(parents=True)

  def download(name, *, revision, allow_patterns):
    asked.append((name, revision))
    return str(folder)

  def listed(name, *, revision):
    asked.append((name, revision))
    if not files:
      raise OSError("offline")
    return files

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
  return files, asked


def test_pickles_of_a_repository_are_refused_with_the_way_out(repository):
  """What was not downloaded is asked for, where weights are wanted; a tokenizer may come from such a repository."""
  files, asked = repository
  folder = hub.resolve("owner/a-model")
  assert asked == [("owner/a-model", None)]
  with pytest.raises(InputError) as e:
    hub.tensor_names(folder)
  for part in (
    "owner/a-model holds its weights as a pickle (pytorch_model.bin)",
    "M.from_pretrained('owner/a-model', revision='c0ffee').save_pretrained('a-model-safetensors')",
    "owner/a-model@refs/pr/N",
  ):
    assert part in str(e.value), part
  assert asked[1:] == [("owner/a-model", "c0ffee")]
  files[:] = ["tf_model.h5"]
  with pytest.raises(InputError, match="owner/a-model has neither .* holds tf_model.h5"):
    hub.load(folder, RULES, shapes(), None)
  files.clear()
  with pytest.raises(InputError, match="c0ffee has neither"):
    hub.tensor_names(folder)
  write(folder, theirs(params()))
  del asked[:]
  assert "norm.weight" in hub.tensor_names(folder) and not asked


def test_what_is_downloaded():
  want = ("config.json", "model-00001-of-00002.safetensors", "adapter_model.safetensors", "adapter_config.json")
  wanted = lambda name: any(fnmatch.fnmatch(name, p) for p in hub.WANTED)
  assert all(map(wanted, want))
  assert not any(map(wanted, ("pytorch_model.bin", "adapter_model.bin", "tf_model.h5", "optimizer.pt")))


def test_revisions(repository):
  for name in ("owner/a-model@refs/pr/3", "a-model@v1.0-b"):
    hub.resolve(name)
  assert repository[1] == [("owner/a-model", "refs/pr/3"), ("a-model", "v1.0-b")]
  for name in ("owner/a-model@", "@main", "owner/a-model@a b", "a@b@c"):
    with pytest.raises(InputError, match="@REVISION"):
      hub.resolve(name)


def test_tokenizer_and_generation_files(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  for name in ("tokenizer.json", "spiece.model", "training_args.bin"):
    (source / name).write_bytes(name.encode())
  out = save(tmp_path / "out", params(), generation_config={"eos_token_id": 1}, tokenizer_from=source)
  assert sorted(os.listdir(out)) == [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "spiece.model",
    "tokenizer.json",
  ]
  assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1


def test_unaligned_and_empty_tensors(tmp_path):
  """Tensors may start at any byte; ml_dtypes' bfloat16 and a tensor without entries are read as well."""
  x = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
  header = {"a": entry([1], 0, 1, "U8"), "b": entry([2, 3], 1, 13, "BF16"), "c": entry([0, 4], 13, 13)}
  raw(tmp_path, header, b"\x07" + x.tobytes())
  found = safetensors.read_folder(tmp_path)
  np.testing.assert_array_equal(found["b"].view(), x)
  assert found["c"].view().shape == (0, 4)
