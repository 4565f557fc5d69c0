"""The real train step of real sizes, compiled by the real TPU compiler, which needs no TPU (libtpu, in the `tpu`
extra).

Not part of the default run: `pytest -m slow tests/test_tpu.py`, with JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 set.
Catches: a step that does not compile for a TPU or does not fit one, and activations that the partitioner replicates.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from jaxft import sharding, trees
from jaxft.families import registry
from jaxft.train import losses, optimizer, step
from tests.families.test_t5 import SIZES, t5_config

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: that steps compile and fit on TPUs is not covered"
  ),
]
RULES = dict(batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
HBM = dict(v5e=16, v5p=95, v6e=32)  # GiB a device
ROWS = dict(inputs=512, input_segments=512, targets=128, target_segments=128)


@pytest.mark.parametrize(
  "size, topology, axes, batch, remat",
  [
    ("t5-base", "v5e:2x4", dict(data=1, fsdp=-1, tensor=1), 64, "none"),
    ("v1_1-large", "v6e:2x4", dict(data=2, fsdp=2, tensor=2), 64, "dots"),
    ("v1_1-xl", "v5p:2x2x2", dict(data=1, fsdp=-1, tensor=1), 64, "block"),
    ("t5-11b", "v5p:2x2x4", dict(data=1, fsdp=8, tensor=2), 64, "block"),
  ],
)
def test_step_compiles_and_fits(size, topology, axes, batch, remat, capfd):
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = sharding.make_mesh(axes, devices)
  config = t5_config(*SIZES[size][0])
  m = registry.skeleton(config, dtype=jnp.bfloat16, params_dtype=jnp.float32, remat=remat, unroll=1, dropout=None)
  places = sharding.leaf_shardings(mesh, RULES, m.axes, m.shapes)
  flags = trees.trainable(((".*", True),), m.shapes, m.axes)
  tx, rate = optimizer.make(
    name="adamw", lr=1e-3, schedule="linear", warmup=10, cooldown=0.0, end=0.0, clip=1.0, b1=0.9, b2=0.999, eps=1e-8,
    decay=0.01, decay_rules=((r".*norm.*", 0.0), (r".*", 1.0)), lr_rules=((r".*", 1.0),), layer_decay=1.0,
    toward_init=0.0, unfreeze=(), steps=100, shapes=m.shapes, axes=m.axes, trainable=flags)  # fmt: skip
  abstract = step.abstract_state(m.shapes, places, tx, flags)
  loss = lambda p, rows, key: losses.seq2seq(m.bind(p), rows, key, losses.Options(0.1, 1e-4))
  fn = step.make_train_step(loss, tx, rate, 1, trainable=flags, pins=step.shardings_of(abstract.params))
  rows = {k: jax.ShapeDtypeStruct((batch, n), jnp.int32) for k, n in ROWS.items()}
  rows["weights"] = jax.ShapeDtypeStruct((batch, ROWS["targets"]), jnp.float32)
  compiled = step.jit_train_step(fn, mesh, RULES, abstract).lower(abstract, rows).compile()
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  with capfd.disabled():
    print(f"\n{size} on {topology}, batch {batch}: {memory.argument_size_in_bytes / 2**30:.2f} GiB of state and batch, "
          f"{memory.temp_size_in_bytes / 2**30:.2f} GiB temporary, of {HBM[topology[:3]]} GiB a device")  # fmt: skip
  assert held < HBM[topology[:3]] * 2**30
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
