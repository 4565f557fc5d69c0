"""Our own flash attention, compiled for TPUs and GPUs by their real compilers, which need no device.

Not part of the default run: `pytest -m slow tests/models/test_flash_compiles.py`, with JAX_PLATFORMS=cpu and
TPU_SKIP_MDS_QUERY=1 set; seconds each. Catches: an operation that Mosaic or Triton does not have, tiles that do not fit
fast memory, a kernel that is silently another.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from jaxft import sharding
from jaxft.models import kernels
from jaxft.models.scores import Mask
from jaxft.planning import targets

pytestmark = pytest.mark.slow
RULES = dict(batch=("data", "fsdp"), heads="tensor")


@pytest.mark.parametrize("target", ["v5p:2x2x1", "v5e:2x2", "h100x4"])
@pytest.mark.parametrize("given", [
  dict(bias=True), dict(causal=True, kv=4, head=128), dict(causal=True, prefix=True, window=200),
  dict(softcap=30.0, head=80), dict(causal=True, process="highest"),
], ids=["bias", "shared-keys", "prefix", "cap", "beside a float32 model"])  # fmt: skip
def test_flash_compiles_with_its_gradient(target, given):
  """Our own kernel, by Mosaic and by Triton, for lengths that are no multiple of a tile."""
  plugin, what = ("jax_plugins", "a GPU") if target.startswith("h") else ("libtpu", "a TPU")
  if importlib.util.find_spec(plugin) is None:
    pytest.skip(f"needs {plugin}: that flash compiles for {what} is not covered")
  devices = targets.devices(targets.parse(target))
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=2), devices)
  rows = sharding.batch_sharding(mesh, RULES)
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=rows)
  n, t, head = 16, 1000, given.get("head", 64)

  def loss(q, k, v, bias, segments, prefix, words):
    with sharding.use(mesh, RULES):
      mask = Mask(segments, segments, prefix, given.get("window"), given.get("causal", False))
      out = kernels.attention(q, k, v, bias, mask, 0.1, words, given.get("softcap", 0.0), "flash")
      return out.astype(jnp.float32).sum()

  args = [shape(16, t, n, head), *(shape(16, t, given.get("kv", n), head) for _ in range(2))]
  args += [jax.ShapeDtypeStruct((1, n, t, t), jnp.float32) if given.get("bias") else None]
  tokens = shape(16, t, dtype=jnp.int32)
  args += [tokens, tokens if given.get("prefix") else None, jax.ShapeDtypeStruct((2,), jnp.uint32)]
  wanted = (0, 1, 2, 3) if given.get("bias") else (0, 1, 2)
  with jax.default_matmul_precision(given.get("process", "default")):
    compiled = jax.jit(jax.grad(loss, wanted)).lower(*args).compile()
  text = compiled.as_text()
  assert all(f"flash_{name}" in text for name in ("forward", "of_queries", "of_keys"))
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * n / 2 * t * t * 4, "as much as the scores"
