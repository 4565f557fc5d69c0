"""The real train step of real sizes, compiled by the real TPU compiler, which needs no TPU (libtpu, in the `tpu`
extra).

Not part of the default run: `pytest -m slow tests/test_tpu.py`, with JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 set;
about half an hour on 2 cores. Catches: a step or a kernel that does not compile for a TPU or does not fit one,
activations that the partitioner replicates, a config whose real size fits nowhere.
"""

import importlib.util
import os
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from jaxft import config, sharding, trees
from jaxft.families import registry
from jaxft.models import kernels
from jaxft.models.scores import Mask
from jaxft.planning import plans, targets
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


CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
ARGS = dict(t5=("t5-base", "flan-t5-large"), llama_sft=("", "3b", "8b"), bert_mlm_nsp=("", "mlm"))
FEW = ("bert_qa-", "bert_stsb-", "topic_trec-")  # whose 12 or 4 rows 8 devices cannot share
SLICES = {"llama_sft-8b": "v5p:2x2x2", **dict.fromkeys(FEW, "v5e:2x2")}
FILES = [(f.stem, a) for f in sorted(CONFIGS.glob("*.py")) for a in ARGS.get(f.stem, ("",))]


@pytest.mark.parametrize("name, arg", FILES)
def test_every_config_fits_a_slice(name, arg, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  c = config.check(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](arg))
  e = plans.one(c, targets.parse(SLICES.get(f"{name}-{arg}", "v5e:2x4")))
  with capfd.disabled():
    print(f"\n{name}:{arg} on {e.target}: {e.total / 2**30:.2f} of {e.limit / 2**30:.2f} GiB, {e.step:.3g} s a step, "
          f"MFU {e.mfu:.2f}, compiled in {e.compile_s:.0f} s")  # fmt: skip
  assert e.fits and "compiler" in e.seconds and 0.01 < e.mfu < 0.9
  assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("head, kv, window, softcap, causal", [
  (128, 8, None, 0.0, True), (64, 12, None, 0.0, False), (64, 4, 256, 0.0, True), (256, 4, None, 50.0, True),
])  # fmt: skip
def test_splash_compiles_with_its_gradient(head, kv, window, softcap, causal):
  devices = targets.devices(targets.parse("v5p:2x2x1"))
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=2), devices)
  rows = sharding.batch_sharding(mesh, RULES)
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=rows)

  def loss(q, k, v, segments):
    with sharding.use(mesh, RULES):
      mask = Mask(segments, segments, None, window, causal)
      return kernels.attention(q, k, v, None, mask, 0.0, None, softcap, "strict").astype(jnp.float32).sum()

  n, t = 12 if kv == 12 else 16, 1000  # not a multiple of a block
  args = shape(4, t, n, head), shape(4, t, kv, head), shape(4, t, kv, head), shape(4, t, dtype=jnp.int32)
  memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 2 * n / 2 * t * t * 4 / 2, "as much as the scores"
