"""Low-rank adapters on the linear layers of a model: y = W x + scale B A x, with W frozen (Hu et al. 2021, LoRA).

An adapter is two parameters beside the kernel it adapts, `.../q/lora_a` and `.../q/lora_b`, so that whatever goes by
the names of parameters (what is trained, rates, shardings, checkpoints) takes it for what it is. A kernel [in, out] has
A [in, rank] and B [rank, out], where in and out may be several axes; stacked layers have their own.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import trees
from jaxft.errors import InputError
from jaxft.models import layers

Tree = Any
A, B = "lora_a", "lora_b"
NAMES = r".*/lora_[ab]"  # of adapters, for rules
RANK = "rank"  # the logical axis that is never split


@dataclasses.dataclass(frozen=True)
class Spec:
  """Adapters in numbers."""

  rank: int
  alpha: float
  dropout: float  # of what goes into A
  targets: tuple[str, ...]  # regexes, one of which matches the whole path of a linear layer
  rslora: bool  # scaled by alpha / sqrt(rank) (Kalajdzievski 2023), not alpha / rank

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapt(module: nnx.Module, spec: Spec) -> None:
  """Adds adapters to the linear layers of a model without values, stacked ones too, whose paths match `spec.targets`.

  Raises InputError where a target matches none.
  """
  if spec.rank < 1 or spec.alpha <= 0 or not 0 <= spec.dropout < 1:
    raise InputError(
      f"config: lora.rank={spec.rank}, lora.alpha={spec.alpha}, lora.dropout={spec.dropout}: the rank is at least 1 (0 "
      "switches adapters off), alpha is above 0, dropout a share of at least 0 and below 1."
    )
  found = dict(_linear(module))
  hits: dict[str, list[str]] = {t: [p for p in found if _matches(t, p)] for t in spec.targets}
  idle = [t for t, paths in hits.items() if not paths]
  if idle or not hits:
    names = ", ".join(sorted({p for p in found if "/layers/" in p}))
    raise InputError(
      f"config: lora.targets: {', '.join(map(repr, idle)) or 'empty'} matches no linear layer. A target is a regular "
      f"expression for a whole name; here there are {names}; all of them: '.*/layers/.*'."
    )
  for path in dict.fromkeys(p for paths in hits.values() for p in paths):
    _attach(found[path], spec)


def _matches(target: str, path: str) -> bool:
  try:
    return re.fullmatch(target, path) is not None
  except re.error as e:
    raise InputError(f"config: lora.targets: {target!r} is not a regular expression ({e}).") from e


def _linear(module: nnx.Module, path: str = "") -> Iterator[tuple[str, layers.Einsum]]:
  for name, child in vars(module).items():
    if isinstance(child, layers.Einsum):
      yield path + name, child
    elif isinstance(child, nnx.Module):
      yield from _linear(child, f"{path}{name}/")


def _attach(layer: layers.Einsum, spec: Spec) -> None:
  kernel, axes = layer.kernel.get_value(), layer.kernel.axes
  lead, (into, out) = int(trees.is_stacked(axes)), sides(layer.equation)
  cut = lead + into
  assert cut + out == len(kernel.shape), (layer.equation, kernel.shape)
  deep, named, width = kernel.shape[:lead], axes[:lead], math.prod(kernel.shape[lead:cut])
  std = (3 * width) ** -0.5  # as PEFT's uniform one (kaiming_uniform with a = sqrt(5)), and B is zero
  setattr(layer, A, layers.param((*kernel.shape[:cut], spec.rank), (*axes[:cut], RANK), kernel.dtype, std=std))
  setattr(layer, B, layers.param((*deep, spec.rank, *kernel.shape[cut:]), (*named, RANK, *axes[cut:]), kernel.dtype))
  layer.adapter = (spec.scale, spec.dropout)


def sides(equation: str) -> tuple[int, int]:
  """Returns how many axes of a layer's kernel are summed over, and how many come out; the first stand first."""
  x, kernel, y = re.fullmatch(r"\.\.\.(\w+),(\w+)->\.\.\.(\w+)", equation).groups()
  assert kernel == x + y, equation
  return len(x), len(y)


def sides_of(module: nnx.Module, path: str) -> int:
  """Returns how many axes of the kernel at `path` are summed over; 1 for what is no linear layer of a model."""
  found = dict(_linear(module)).get(path.removesuffix("/kernel"))
  return sides(found.equation)[0] if found else 1


def adapters(params: Tree) -> dict[str, tuple[Any, Any]]:
  """Returns {path of the kernel: (A, B)}, {} for a model without."""
  flat = trees.flatten(params)
  ends = [p for p in flat if p.endswith(f"/{A}")]
  return {f"{p.removesuffix(A)}kernel": (flat[p], flat[p.removesuffix(A) + B]) for p in ends}


def base(tree: Tree) -> Tree:
  """Returns a tree of parameters, or of what there is for each of them, without that of adapters."""
  return trees.unflatten({p: x for p, x in trees.flatten(tree).items() if not re.fullmatch(NAMES, p)})


def merged(params: Tree, scale: float) -> Tree:
  """Returns the parameters of the model without adapters, W + scale A B, that computes the same.

  A sum has the dtype of its adapter, so that a base in bfloat16 loses nothing of what was learnt; other leaves are what
  they were.
  """
  flat = trees.flatten(base(params))
  for path, (a, b) in adapters(params).items():
    flat[path] = flat[path].astype(a.dtype) + scale * delta(a, b, flat[path].shape).astype(a.dtype)
  return trees.unflatten(flat)


def delta(a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns A B, float32 of the `shape` of the kernel, of adapters that are stacked (or not) as the kernel is."""
  lead = a.ndim + b.ndim - 2 - len(shape)  # both have the axis of layers, the kernel has it once
  rows = a.reshape(*a.shape[:lead], -1, a.shape[-1]).astype(jnp.float32)
  columns = b.reshape(*b.shape[: lead + 1], -1).astype(jnp.float32)
  return jnp.matmul(rows, columns, precision=jax.lax.Precision.HIGHEST).reshape(shape)
