"""What moves between devices in the compiled step of each kind of model. Catches: activations gathered on all devices,
a large parameter that every device holds whole, what GSPMD calls an involuntary full rematerialisation.
"""

import math
import pathlib
import runpy

import jax
import pytest

from jaxft import config, trees
from jaxft.config import Reader
from jaxft.planning import build, hlo

ROOT = pathlib.Path(__file__).parent.parent.parent
T = 88  # tokens of a row: a number that no dimension of the models has, so that activations are known by it


def compiled(name, axes, **change):
  name, *adapters = name.split(" with ")
  change |= dict(lora=dict(rank=6)) if adapters else {}
  c = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny")
  c.mesh, c.batch, c.data.lengths = dict(axes), 16, dict.fromkeys(c.data.lengths, T)
  c.update(change)
  built = build.train_step(Reader(config.check(c)), jax.devices())
  return built, build.lower(built).compile()


@pytest.mark.parametrize("axes", [dict(data=1, fsdp=8, tensor=1), dict(data=2, fsdp=2, tensor=2)], ids=["fsdp", "all"])
@pytest.mark.parametrize("name", ["t5_span", "bert_mrpc", "gpt2_lm", "llama_sft", "llama_sft with adapters"])
def test_activations_stay_where_they_are(name, axes, capfd):
  built, program = compiled(name, axes)
  said = capfd.readouterr().err
  assert "Involuntary full rematerialization" not in said, said
  whole = 16 * T * 64  # elements of the activations [B, T, D] of all devices
  moved = hlo.read(program.as_text(), devices=8).collectives
  assert moved
  for m in moved:
    for _, dims, _ in hlo.arrays(m.shape):
      gathered = m.kind in ("all-gather", "all-to-all") and T in dims and math.prod(dims) >= whole / axes["tensor"]
      assert not gathered, m


@pytest.mark.parametrize("name", ["t5_span", "bert_mrpc", "gpt2_lm", "llama_sft"])
def test_large_parameters_are_split(name):
  c = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny")
  built = build.train_step(Reader(config.check(c)), jax.devices())
  flat = trees.flatten(built.state.params)
  large = {p: x for p, x in flat.items() if math.prod(x.shape) >= 64 * 64}
  assert len(large) >= 5
  for path, x in large.items():
    assert math.prod(x.sharding.shard_shape(x.shape)) * 8 == math.prod(x.shape), path
  moments = [x for x in jax.tree.leaves(built.state.opt) if math.prod(x.shape) >= 64 * 64]
  assert len(moments) == 2 * len(large)
  assert all(math.prod(x.sharding.shard_shape(x.shape)) * 8 == math.prod(x.shape) for x in moments)


def test_a_frozen_kernel_has_no_gradient():
  """Under adapters nothing of a kernel's size is summed over the devices, which a gradient of it would be."""
  moved = {}
  for name in ("llama_sft", "llama_sft with adapters"):
    _, program = compiled(name, dict(data=8, fsdp=1, tensor=1))
    found = hlo.read(program.as_text(), devices=8).collectives
    summed = [m for m in found if m.kind in ("all-reduce", "reduce-scatter")]
    moved[name] = max(math.prod(dims) for m in summed for _, dims, _ in hlo.arrays(m.shape))
  assert moved["llama_sft"] >= 2 * 64 * 64 and moved["llama_sft with adapters"] <= 2 * 128 * 6, moved
