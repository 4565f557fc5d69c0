"""Meshes and placements.

Catches: replication in silence, an axis used twice, a wrong order of dimensions, messages without a way out, `pin`
leaking out of its context.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxft import sharding
from jaxft.errors import InputError

RULES = dict(batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
MESH = dict(data=2, fsdp=2, tensor=2)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_mesh_takes_what_is_left():
  mesh = sharding.make_mesh(dict(data=2, fsdp=-1, tensor=1))
  assert dict(mesh.shape) == dict(data=2, fsdp=4, tensor=1) and set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  "sizes,words",
  [
    (dict(data=3, fsdp=-1, tensor=1), "1, 2, 4, 8"),
    (dict(data=3, fsdp=2, tensor=1), "6 devices, but there are 8"),
    (dict(data=-1, fsdp=-1, tensor=1), "at most one is -1"),
    (dict(data=0, fsdp=-1, tensor=1), "positive"),
  ],
)
def test_mesh_that_does_not_fit(sizes, words):
  with pytest.raises(InputError, match=words):
    sharding.make_mesh(sizes)


def test_leaf_shardings():
  mesh = sharding.make_mesh(MESH)
  got = sharding.leaf_shardings(
    mesh, RULES, dict(a=("layers", "embed", "heads", "head_dim"), b=(None,)), dict(a=shape(3, 4, 6, 5), b=shape(3))
  )
  assert got["a"].spec == P(None, "fsdp", "tensor", None) and got["b"].spec == P(None)


def test_what_does_not_divide_is_named_all_together():
  mesh = sharding.make_mesh(MESH)
  with pytest.raises(InputError) as e:
    sharding.leaf_shardings(mesh, RULES, dict(a=("embed", "mlp"), b=("heads",)), dict(a=shape(9, 4), b=shape(15)))
  assert "a [9, 4]: embed of size 9 over fsdp = 2; 9 can be split 1, 3, 9 ways" in str(
    e.value
  ) and "b [15]: heads" in str(e.value)


def test_rules_that_make_no_sense():
  mesh = sharding.make_mesh(MESH)
  with pytest.raises(InputError, match=r"'tensr'.*did you mean 'tensor'"):
    sharding.leaf_shardings(mesh, dict(RULES, mlp="tensr"), dict(a=("embed",)), dict(a=shape(4)))
  with pytest.raises(InputError, match=r"'tensor' would split heads and mlp at once"):
    sharding.leaf_shardings(mesh, RULES, dict(a=("heads", "mlp")), dict(a=shape(4, 4)))


def test_optimizer_state_lives_where_its_parameter_lives():
  mesh = sharding.make_mesh(MESH)
  shapes = dict(layers=dict(q=shape(3, 256, 512)), bias=shape(4))
  places = sharding.leaf_shardings(
    mesh, RULES, dict(layers=dict(q=("layers", "embed", "heads")), bias=("heads",)), shapes
  )
  adam = sharding.like(jax.eval_shape(optax.scale_by_adam().init, shapes), shapes, places)
  assert (
    adam.mu["layers"]["q"].spec == P(None, "fsdp", "tensor")
    and adam.nu["bias"].spec == P("tensor")
    and adam.count.spec == P()
  )
  factored = sharding.like(jax.eval_shape(optax.scale_by_factored_rms().init, shapes), shapes, places)
  assert factored.v_row["layers"]["q"].spec == P(None, "fsdp") and factored.v_col["layers"]["q"].spec == P(
    None, "tensor"
  )


def test_a_number_for_each_row_lives_where_the_row_lives():
  mesh = sharding.make_mesh(MESH)
  shapes, axes = dict(q=shape(3, 6, 512)), dict(q=("layers", "batch", "heads"))
  places = sharding.leaf_shardings(mesh, dict(RULES, batch="data"), axes, shapes)
  spec = lambda *sizes: sharding.like(dict(q=shape(*sizes)), shapes, places)["q"].spec
  assert spec(3, 6, 512) == P(None, "data", "tensor") and spec(3, 6, 1) == P(None, "data", None)
  assert spec(3, 6, 7) == spec(3, 3, 1) == P()
  narrow = dict(q=shape(4, 1))
  places = sharding.leaf_shardings(mesh, RULES, dict(q=("embed", "layers")), narrow)
  assert sharding.like(narrow, narrow, places)["q"].spec == P("fsdp", None)


def test_pin_works_inside_of_use_only():
  mesh = sharding.make_mesh(MESH)
  fn = lambda x: sharding.pin(x * 2, ("batch", None, "mlp"))
  with sharding.use(mesh, RULES):
    assert jax.jit(lambda x: fn(x))(jnp.ones((4, 3, 6))).sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert jax.jit(lambda x: fn(x))(jnp.ones((3, 3, 6))).sharding.is_equivalent_to(
      jax.NamedSharding(mesh, P(None, None, "tensor")), 3
    )
  assert "sharding_constraint" not in str(jax.make_jaxpr(fn)(jnp.ones((4, 3, 6))))


@pytest.mark.parametrize("batch,micro,near", [(13, 2, "8, 16"), (3, 1, "4"), (24, 5, "20, 40"), (0, 1, "4")])
def test_batch_that_does_not_divide_names_the_nearest(batch, micro, near):
  mesh = sharding.make_mesh(MESH)
  sharding.check_batch(mesh, RULES, 24, 3)
  with pytest.raises(InputError, match=f"nearest: {near}\\."):
    sharding.check_batch(mesh, RULES, batch, micro)


def test_put_batch():
  mesh = sharding.make_mesh(MESH)
  place, rows = sharding.batch_sharding(mesh, RULES), np.arange(24).reshape(8, 3)
  out = sharding.put_batch(dict(a=rows), place, 8)["a"]
  np.testing.assert_array_equal(out, rows)
  assert out.sharding.shard_shape(out.shape) == (2, 3) and sharding.feed(place, 8) == (0, 1)
  with pytest.raises(AssertionError, match="8 rows, expected 16"):
    sharding.put_batch(dict(a=rows), place, 16)
