"""Checkpoints under every fault that a disk has.

Catches: a checksum that depends on the layout, misses a flipped bit or an exchange; no verification on restore; a
fallback that deletes, skips too far or starts afresh; NaN as the best metric; keep-best that drops the latest; an async
error that is seen late; a cast or a missing leaf in silence; a save after going back that does nothing.
"""

import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.errors import InputError, StorageError
from jaxft.train import checkpoint, manifest

SIZE = 3001  # floats of the large leaf: enough to be an array file of its own, no power of two


def make(value=1.0, sharding=None):
  rng = np.random.default_rng(int(value * 10))
  tree = dict(
    step=jnp.int32(value),
    params=dict(w=jnp.asarray(rng.normal(size=(8, SIZE)), jnp.float32), h=jnp.full((5, 3), value, jnp.bfloat16)),
    opt=(dict(mu=jnp.arange(24.0).reshape(8, 3) * value), ()),
    rng=jax.random.key(7),
    flag=jnp.array([True, False, True]),
  )
  if sharding is None:
    return tree
  put = lambda x: jax.device_put(x, sharding if x.ndim == 2 and x.shape[0] == 8 else NamedSharding(sharding.mesh, P()))
  return jax.tree.map(put, tree)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
  plain = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(np.array_equal(plain(x), plain(y))), a, b)
  )


def open_(folder, **kw):
  return checkpoint.Checkpointer(str(folder), **{**dict(keep=2, best="", mode="min", facts=dict(data="abc")), **kw})


def save(c, step, value=None, metrics=(), wait=True):
  c.save(step, make(step if value is None else value), metrics=dict(metrics), extra=dict(evals=[]))
  if wait:
    c.wait()


def filled(folder, *steps, **kw):
  c = open_(folder, **kw)
  for s in steps:
    save(c, s)
  return c


def test_round_trip_of_every_kind_of_leaf(tmp_path):
  filled(tmp_path, 1, 4).close()
  state, meta = open_(tmp_path).restore(abstract(make()))
  assert same(state, make(4)) and meta["step"] == 4 and meta["data"] == "abc"
  assert state["params"]["h"].dtype == jnp.bfloat16


def test_save_copies_before_it_returns(tmp_path):
  """The state is donated to the next step while the save is being written."""
  c = open_(tmp_path)
  step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
  x = jnp.arange(400_000.0)
  for i in range(1, 6):
    x = step(x)
    wanted = np.array(x, copy=True)
    c.save(i, dict(x=x), metrics={}, extra={})
    for _ in range(4):
      x = step(x)
    got, _ = c.restore(dict(x=jax.ShapeDtypeStruct(x.shape, x.dtype)))
    assert np.array_equal(got["x"], wanted)


def test_checksum_does_not_depend_on_the_layout_and_sees_every_change():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  rng = np.random.default_rng(0)
  for dtype, parts in (
    (jnp.float32, (P(), P("b", None), P("a", "b"))),
    (jnp.bfloat16, (P(), P("a"))),
    (jnp.uint8, (P(), P("a"))),
  ):
    x = jnp.asarray(rng.integers(1, 100, size=(8, 6, 5)), dtype)
    sums = {int(manifest.checksums([jax.device_put(x, NamedSharding(mesh, p))])[0]) for p in parts}
    assert len(sums) == 1
    flat = np.array(x).reshape(-1)
    changed = set()
    for i in range(0, flat.size, 7):
      y = flat.copy()
      y.view(f"u{y.itemsize}")[i] ^= 1 << int(rng.integers(8 * y.itemsize))
      changed.add(int(manifest.checksums([jnp.asarray(y.reshape(x.shape))])[0]))
      z = flat.copy()
      z[[i, i - 1]] = z[[i - 1, i]]
      if z[i] != z[i - 1]:
        changed.add(int(manifest.checksums([jnp.asarray(z.reshape(x.shape))])[0]))
    assert not sums & changed


def test_restores_onto_another_mesh(tmp_path):
  devices = np.array(jax.devices())
  one = NamedSharding(Mesh(devices.reshape(8), ("a",)), P("a"))
  two = NamedSharding(Mesh(devices[:4].reshape(2, 2), ("a", "b")), P("b", None))
  c = open_(tmp_path)
  c.save(2, make(2, one), metrics={}, extra={})
  state, _ = c.restore(abstract(make(2, two)))
  assert same(state, make(2)) and state["params"]["w"].sharding.is_equivalent_to(two, 2)


def test_part_of_a_checkpoint(tmp_path):
  filled(tmp_path, 3).close()
  c = open_(tmp_path, write=False)
  state, _ = c.restore(dict(params=abstract(make()["params"])), partial=True)
  assert same(state["params"], make(3)["params"])


# -- faults


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


def largest(folder):
  return max((p for p in pathlib.Path(folder, "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


FAULTS = {
  "flipped bit": lambda d: flip(largest(d)),
  "truncated": lambda d: largest(d).write_bytes(largest(d).read_bytes()[:1000]),
  "missing file": lambda d: largest(d).unlink(),
  "missing arrays": lambda d: shutil.rmtree(d / "state"),
  "empty": lambda d: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in list(d.iterdir())],
  "no metadata": lambda d: (d / "meta" / "metadata").unlink(),
  "flipped metadata": lambda d: (d / "meta" / "metadata").write_text(
    (d / "meta" / "metadata").read_text().replace('"abc"', '"abd"')
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, fault, caplog):
  filled(tmp_path, 3, 5).close()
  FAULTS[fault](tmp_path / "5")
  reader = open_(tmp_path, write=False)
  assert reader.restore(abstract(make()))[1]["step"] == 3 and (tmp_path / "5").exists(), "a reader moves nothing"
  c = open_(tmp_path)
  state, meta = c.restore(abstract(make()))
  assert meta["step"] == 3 and same(state, make(3))
  assert "step 5" in caplog.text and "not usable" in caplog.text
  assert [p.name.split("-")[0] for p in (tmp_path / "set_aside").iterdir()] == ["5"]
  save(c, 5)
  assert c.steps() == [3, 5]


def test_every_random_flip_is_caught_or_harmless(tmp_path):
  c = filled(tmp_path, 3)
  good = make(3)
  rng = np.random.default_rng(1)
  for path in sorted(p for p in (tmp_path / "3").rglob("*") if p.is_file() and p.stat().st_size):
    before = path.read_bytes()
    for _ in range(3):
      data = bytearray(before)
      data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
      path.write_bytes(bytes(data))
      try:
        reader = open_(tmp_path, write=False)
        assert same(reader.restore(abstract(good))[0], good), path
      except StorageError:
        continue
      finally:
        reader.close()
    path.write_bytes(before)
  c.close()


def test_refuses_a_silent_fresh_start(tmp_path):
  assert open_(tmp_path).restore(abstract(make())) is None
  filled(tmp_path, 1, 2).close()
  for s in (1, 2):
    flip(largest(tmp_path / str(s)))
  for _ in range(2):  # the second time, too
    with pytest.raises(StorageError, match="None of the checkpoints"):
      open_(tmp_path).restore(abstract(make()))
  assert (tmp_path / "1").exists()


def test_mismatch_lists_everything_and_moves_nothing(tmp_path):
  filled(tmp_path, 2).close()
  tree = make()
  tree["params"]["w"] = jnp.zeros((8, 5))
  tree["params"]["h"] = tree["params"]["h"].astype(jnp.float32)
  tree["params"]["new"] = tree.pop("flag")
  with pytest.raises(InputError) as e:
    open_(tmp_path).restore(abstract(tree))
  for part in (
    "params/w",
    f"float32[8, {SIZE}]",
    "float32[8, 5]",
    "params/h: bfloat16[5, 3]",
    "missing in the checkpoint: params/new",
    "only in the checkpoint: flag",
  ):
    assert part in str(e.value), part
  assert open_(tmp_path).steps() == [2]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
  filled(tmp_path, 2).close()
  for name in ("4.orbax-checkpoint-tmp", "1.orbax-checkpoint-tmp-old"):
    shutil.copytree(tmp_path / "2", tmp_path / name)
  assert open_(tmp_path).steps() == [2]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


# -- what is kept


def test_best_and_latest_stay_and_nan_is_never_best(tmp_path):
  c = open_(tmp_path, best="eval/a/loss")
  kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [6, 7], 8: [7, 8], 9: [7, 8, 9]}
  values = {1: 2.0, 2: 1.0, 3: float("nan"), 4: 1.5, 5: None, 6: float("-inf"), 7: 0.5, 8: 0.5, 9: 9.0}
  kept[7], kept[6] = [6, 7], [2, 5, 6]
  for s, v in values.items():
    save(c, s, metrics={"eval/a/loss": v})
    assert c.steps() == kept[s], s
  c.close()
  again = open_(tmp_path, best="eval/a/loss")
  assert again.best_step() == 7 and again.restore(abstract(make()))[1]["step"] == 9


def test_a_worsening_metric_keeps_the_latest(tmp_path):
  c = open_(tmp_path, best="acc", mode="max")
  for s, v in enumerate((0.9, 0.8, 0.1, 0.2), 1):
    save(c, s, metrics=dict(acc=v))
  assert c.steps() == [1, 3, 4] and c.best_step() == 1


def test_reading_an_older_step_changes_nothing(tmp_path):
  c = filled(tmp_path, 1, 2, 3, keep=3)
  assert c.restore(abstract(make()), step=1)[1]["step"] == 1
  assert c.steps() == [1, 2, 3] and not (tmp_path / "set_aside").exists()
  assert not c.save(3, make(3), metrics={}, extra={}), "the last step is still the last one saved"


def test_a_bad_step_that_is_asked_for_names_the_others(tmp_path):
  filled(tmp_path, 1, 2, keep=3).close()
  (tmp_path / "1" / "meta" / "metadata").write_text("{}")
  with pytest.raises(StorageError, match="step 1 .* cannot be used.*Others there: 2"):
    open_(tmp_path).restore(abstract(make()), step=1)
  assert (tmp_path / "1").exists()


def test_what_is_measured_after_the_save_is_kept(tmp_path):
  c = filled(tmp_path, 1, 2, keep=3, best="a")
  assert c.best_step() is None
  c.annotate(2, metrics=dict(a=3.0), extra=dict(evals=[[2, {"a": 3.0}]]))
  again = open_(tmp_path, keep=3, best="a")
  assert again.best_step() == 2 and again.meta(2)["extra"] == dict(evals=[[2, {"a": 3.0}]])
  assert same(again.restore(abstract(make()))[0], make(2))


def test_a_step_that_is_not_there(tmp_path):
  with pytest.raises(StorageError, match=r"no checkpoint of step 9.*\[2\]"):
    filled(tmp_path, 2).restore(abstract(make()), step=9)


# -- failing disks


def test_disk_full_is_seen_at_once_and_the_old_one_stays(tmp_path):
  c = filled(tmp_path, 1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    with pytest.raises(StorageError, match=r"step 2 could not be written.*Checkpoints there: \[1\]"):
      save(c, 2, wait=False)
      c._orbax._async_manager._thread.join()
      c.poll()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert c.steps() == [1] and sorted(p.name for p in tmp_path.iterdir()) == ["1"]
  save(c, 2)
  assert c.steps() == [1, 2]
  assert same(c.restore(abstract(make()))[0], make(2))


def test_a_file_made_while_the_rest_is_deleted_does_not_hide_the_error(tmp_path, monkeypatch, caplog):
  left = tmp_path / "5.orbax-checkpoint-tmp-1"
  left.mkdir()
  tries = []

  def busy(self, missing_ok):
    tries.append(self.name)
    raise OSError(39, "Directory not empty")

  with monkeypatch.context() as m:
    m.setattr(type(checkpoint.epath.Path("x")), "rmtree", busy)
    m.setattr(checkpoint.time, "sleep", lambda s: None)
    open_(tmp_path)
  assert tries == [left.name] * 4 and "the next start removes it" in caplog.text
  open_(tmp_path)
  assert not left.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(StorageError, match="cannot be written"):
    open_(tmp_path / "file" / "checkpoints")


def test_metadata_is_plain_json_without_nan(tmp_path):
  save(open_(tmp_path), 1, metrics=dict(a=float("nan")))
  text = (tmp_path / "1" / "meta" / "metadata").read_text()
  assert "NaN" not in text and json.loads(text)["body"]["metrics"] == {"a": None}


def test_a_newer_format_says_so(tmp_path, monkeypatch):
  filled(tmp_path, 1).close()
  monkeypatch.setattr(checkpoint, "FORMAT", 0)
  with pytest.raises(InputError, match="newer jaxft"):
    open_(tmp_path).restore(abstract(make()))
