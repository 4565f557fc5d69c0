"""How much arithmetic a function is, and how much a device can do: the two halves of MFU.

XLA's own cost_analysis counts the body of a scan once whatever its length, so FLOPs are counted here from the jaxpr.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device, as jax numbers devices, by the makers' data sheets.
PEAK_BF16 = (  # (part of device_kind in lower case, FLOP/s): the first that fits
  ("tpu v6", 918e12),
  ("tpu v5p", 459e12),
  ("tpu v5 lite", 197e12),
  ("tpu v5e", 197e12),
  ("tpu v5", 459e12),
  ("tpu v4 lite", 138e12),
  ("tpu v4", 275e12),
  ("tpu v3", 61.5e12),
  ("tpu v2", 22.5e12),
  ("tpu7", 2307e12),
  ("gb200", 2500e12),
  ("b200", 2250e12),
  ("b300", 2250e12),
  ("h200", 989e12),
  ("h100 pcie", 756e12),
  ("h100 nvl", 835e12),
  ("h100", 989e12),
  ("h800", 989e12),
  ("gh200", 989e12),
  ("h20", 148e12),
  ("a100", 312e12),
  ("a800", 312e12),
  ("l40s", 362e12),
  ("l40", 181e12),
  ("l4", 121e12),
  ("a10g", 70e12),
  ("a10", 125e12),
  ("a6000", 155e12),
  ("rtx 6000 ada", 364e12),
  ("rtx 4090", 165e12),
  ("rtx 3090", 71e12),
)


# of jax.named_scope: products that a backward pass makes a second time; those of queries, keys and values
AGAIN, ATTENTION = "computed_again", "attention_products"


def count(fn: Callable, *args: Any, again: bool = True, only: str = "") -> float:
  """Returns the FLOPs of the products in one call of `fn(*args)`: matrix products and convolutions, 2 for a
  multiply-add.

  `args` may be ShapeDtypeStructs. Bodies of scans count times their length; those of a while once, as its length is not
  in the program; of a cond the dearest branch counts. What rematerialisation computes again counts as work done: for
  model FLOPs (MFU) count the step without it, and not `again`: without what stands in the scope AGAIN.
  `only`: what stands in this scope.
  """
  return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, again, only)


def _jaxpr(jaxpr: Any, again: bool, only: str) -> float:
  return float(sum(_equation(e, again, only) for e in jaxpr.eqns))


def _equation(e: Any, again: bool, only: str) -> float:
  name, scope = e.primitive.name, str(e.source_info.name_stack)
  if not again and AGAIN in scope:
    return 0.0
  only = "" if only in scope else only
  if only and not _inner(e):
    return 0.0
  if name == "dot_general":
    (contract, _), _ = e.params["dimension_numbers"]
    return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[a] for a in contract)
  if name == "conv_general_dilated":
    kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
    return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
  if name == "cond":
    return max(_jaxpr(b.jaxpr, again, only) for b in e.params["branches"])
  times = e.params["length"] if name == "scan" else 1
  if name == "shard_map":  # its body is the part of one device
    times = e.params["mesh"].size
  if name == "pallas_call":
    times = math.prod(n for n in e.params["grid_mapping"].grid if isinstance(n, int))
  return times * sum(_jaxpr(j, again, only) for j in _inner(e))


def _inner(e: Any) -> list[Any]:
  """Returns the jaxprs that run when equation `e` runs; the rules for derivatives beside them do not."""
  found = []
  for key, value in e.params.items():
    if key in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
      continue
    for v in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(v, "jaxpr", v)
      if hasattr(inner, "eqns"):
        found.append(inner)
  return found


def peak(device: jax.Device, dtype: Any) -> tuple[float, str]:
  """Returns (FLOP/s of `device` for products in `dtype`, where the number comes from).

  Known TPUs and GPUs answer by their data sheet for bfloat16 and float16 (dense), which is what MFU is measured against
  whatever `dtype` is; a CPU answers with what a short float32 product reaches on it, shared by the devices that it
  pretends to be. (0.0, reason) where nothing is known: no MFU then.
  """
  kind = device.device_kind.lower()
  if device.platform != "cpu":
    found = next(((part, flops) for part, flops in PEAK_BF16 if part in kind), None)
    return (
      (found[1], f"data sheet, {found[0]}, bfloat16 dense")
      if found
      else (0.0, f"no peak is known for {device.device_kind}")
    )
  return _measured(device, dtype), f"measured: a {jnp.dtype(dtype).name} product of 1024 x 1024 on this CPU"


def _measured(device: jax.Device, dtype: Any, n: int = 1024) -> float:
  x = jax.device_put(jnp.ones((n, n), dtype), device)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  best = math.inf
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2.0 * n**3 / best / len(jax.local_devices(backend="cpu"))
