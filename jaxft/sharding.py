"""Meshes, and where arrays live on them: logical axis names -> mesh axes -> NamedSharding.

Every parameter names its axes ("embed", "heads", ...), one table of rules says which mesh axes split a name, and names
that the table does not have are not split. A size that does not divide, an axis that does not exist or one used twice
raises: nothing is replicated in silence.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft import trees
from jaxft.errors import ClusterError, InputError, did_you_mean

Tree = Any
Rules = Mapping[str, Any]  # logical axis -> mesh axis, tuple of mesh axes, or None

_context: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("jaxft_sharding", default=None)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with the named axis sizes over `devices` (default: all); one size may be -1, taking what is left.

  Axis types are Auto (GSPMD places what is not pinned); jax.make_mesh's own default is Explicit since jax 0.9. Raises
  InputError where the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes, n = dict(sizes), len(devices)
  free = [k for k, v in sizes.items() if v == -1]
  if len(free) > 1 or any(not isinstance(v, int) or v == 0 or v < -1 for v in sizes.values()):
    raise InputError(f"mesh: {_show(sizes)}: a size is a positive whole number, and at most one is -1 (what is left).")
  known = math.prod(v for v in sizes.values() if v != -1)
  if free:
    if n % known:
      raise InputError(
        f"mesh: {_show(sizes)} over {n} devices: the fixed sizes multiply to {known}, which does not divide {n}. "
        f"Their product must be one of {_list(_divisors(n))}."
      )
    sizes[free[0]] = n // known
  elif known != n:
    raise InputError(
      f"mesh: {_show(sizes)} is {known} devices, but there are {n}. Give sizes whose product is {n}, or set one "
      f"of them to -1 (mesh.{max(sizes, key=lambda k: sizes[k])}=-1 takes what the others leave)."
    )
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def mesh_axes(mesh: Mesh, rules: Rules, logical: str | None) -> tuple[str, ...]:
  """Returns the mesh axes that split the `logical` axis; raises InputError where the mesh has no such axis."""
  axes = rules.get(logical) if logical is not None else None
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  for axis in axes:
    if axis not in mesh.shape:
      raise InputError(
        f"rules: {logical} -> {axis!r}, but the mesh has the axes {', '.join(mesh.shape)}"
        f"{did_you_mean(axis, mesh.shape)}. Change rules.{logical}, or add the axis to `mesh`."
      )
  return axes


def check_rules(mesh: Mesh, rules: Rules) -> None:
  """Raises InputError where any of the rules names a mesh axis that does not exist."""
  for logical in rules:
    mesh_axes(mesh, rules, logical)


def spec(mesh: Mesh, rules: Rules, axes: Sequence[str | None], name: str = "array") -> PartitionSpec:
  """Returns the PartitionSpec of an array with these logical `axes`; raises InputError on a mesh axis used twice."""
  parts = [mesh_axes(mesh, rules, a) for a in axes]
  used = [a for p in parts for a in p]
  for axis in used:
    if used.count(axis) > 1:
      both = [str(logical) for logical, p in zip(axes, parts) if axis in p]
      raise InputError(
        f"rules: {name} has the axes ({', '.join(map(str, axes))}), and the mesh axis {axis!r} would split "
        f"{' and '.join(both)} at once. Take it from one of them in `rules`."
      )
  return PartitionSpec(*(p[0] if len(p) == 1 else (p or None) for p in parts))


def leaf_shardings(mesh: Mesh, rules: Rules, axes: Tree, shapes: Tree) -> Tree:
  """Returns a tree of NamedSharding for `shapes` (leaves with `.shape`) with the logical `axes` of the same structure.

  Raises InputError, all leaves together, where a size does not divide over its mesh axes.
  """
  check_rules(mesh, rules)
  wrong = []

  def one(path, shape, names):
    names = names or (None,) * len(shape.shape)
    assert len(names) == len(shape.shape), f"{path}: axes {names} for shape {shape.shape}"
    parts = spec(mesh, rules, names, path)
    for size, logical in zip(shape.shape, names):
      split = mesh_axes(mesh, rules, logical)
      ways = math.prod(mesh.shape[a] for a in split)
      if size % ways:
        wrong.append(
          f"{path} {list(shape.shape)}: {logical} of size {size} over {' x '.join(split)} = {ways}; {size} can be "
          f"split {_list(_divisors(size))} ways"
        )
    return NamedSharding(mesh, parts)

  out = trees.map_with_path(one, shapes, axes)
  if wrong:
    more = f", and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    raise InputError(
      f"mesh: these parameters do not divide: {'. '.join(wrong[:6])}{more}. Change the mesh ({_show(mesh.shape)}) "
      "or the rule of that axis."
    )
  return out


def like(tree: Tree, params: Tree, shardings: Tree) -> Tree:
  """Returns shardings for a tree with parameter-shaped leaves, such as an optimizer's state or a gradient.

  A leaf belongs to the parameter whose path is the longest run of dict keys at the end of the leaf's own path. With
  that parameter's shape it takes its sharding; with one or two axes reduced away (Adafactor; the last one to a size of
  1) or merged into a matrix, those of the axes that are left; anything else (counters) is replicated.
  """
  shapes = {p: tuple(x.shape) for p, x in trees.flatten(params).items()}
  flat = trees.flatten(shardings)
  mesh = next(iter(flat.values())).mesh if flat else None

  def one(keys, leaf):
    names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
    for start in range(len(names)):
      path = "/".join(map(str, names[start:]))
      if path in shapes:
        return NamedSharding(mesh, _reduced_spec(flat[path].spec, shapes[path], tuple(leaf.shape), mesh))
    return NamedSharding(mesh, PartitionSpec()) if mesh else None

  return jax.tree_util.tree_map_with_path(one, tree)


def _reduced_spec(parts: PartitionSpec, shape: tuple, found: tuple, mesh: Mesh) -> PartitionSpec:
  """Returns the spec of an array whose shape `found` is a subsequence of `shape`, or `shape` with a last axis of 1; of
  any other array none is split."""
  parts = tuple(parts) + (None,) * (len(shape) - len(parts))
  if found and found == (*shape[:-1], 1) != shape:
    return PartitionSpec(*parts[:-1], None)
  out, at = [], 0
  for size in found:
    while at < len(shape) and shape[at] != size:
      at += 1
    if at == len(shape):
      return PartitionSpec()
    out.append(parts[at])
    at += 1
  return PartitionSpec(*out)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Makes `pin` work in what is traced inside; tracing happens at the first call, so wrap that (and `lower`) too."""
  token = _context.set((mesh, rules))
  try:
    yield
  finally:
    _context.reset(token)


def pin(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Constrains the sharding of `x` in traced code to its logical `axes`; the same `x` outside of `use`.

  An axis whose size does not divide is left whole here (a beam or a probe batch of 3 rows on 8 devices is legitimate);
  parameters and batches are checked where they are placed.
  """
  context = _context.get()
  if context is None:
    return x
  mesh, rules = context
  assert len(axes) == x.ndim, f"{len(axes)} axis names for an array of shape {x.shape}"
  parts = spec(mesh, rules, axes)
  fits = [
    a if x.shape[i] % math.prod(mesh.shape[m] for m in mesh_axes(mesh, rules, a)) == 0 else None
    for i, a in enumerate(axes)
  ]
  parts = parts if tuple(fits) == tuple(axes) else spec(mesh, rules, fits)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, parts))


def current() -> tuple[Mesh, Rules] | None:
  """Returns (mesh, rules) inside of `use`, None outside."""
  return _context.get()


def platform() -> str:
  """Returns what is traced for: the platform of the mesh inside of `use`, outside JAX's default one."""
  context = _context.get()
  return context[0].devices.flat[0].platform if context else jax.default_backend()


def ways(logical: str | None) -> int:
  """Returns how many parts a logical axis is split into inside of `use`, 1 outside."""
  context = _context.get()
  return math.prod(context[0].shape[a] for a in mesh_axes(*context, logical)) if context else 1


def place(logical: str) -> jax.Array | int:
  """Returns which of the `ways(logical)` parts this device has, inside of jax.shard_map; 0 where none splits it."""
  context = _context.get()
  axes = mesh_axes(*context, logical) if context else ()
  return jax.lax.axis_index(axes) if axes else 0


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
  """Returns the sharding of batch leaves [B, ...]: rows over the mesh axes of "batch"."""
  return NamedSharding(mesh, spec(mesh, rules, ("batch",)))


def check_batch(mesh: Mesh, rules: Rules, batch: int, micro: int) -> None:
  """Raises InputError, with the nearest valid values, where `batch` rows in `micro` parts do not fit the mesh."""
  axes = mesh_axes(mesh, rules, "batch")
  ways = math.prod(mesh.shape[a] for a in axes)
  unit = ways * micro
  if batch < 1 or micro < 1 or batch % unit:
    near = sorted({max(batch // unit, 1) * unit, (batch // unit + 1) * unit}) if unit > 0 else []
    raise InputError(
      f"batch: {batch} rows cannot be split into {micro} micro-batches over {ways} devices "
      f"({' x '.join(f'{a}={mesh.shape[a]}' for a in axes) or 'unsplit'}). It must be a multiple of {unit}; nearest: "
      f"{_list(near)}."
    )


def feed(sharding: NamedSharding, rows: int) -> tuple[int, int]:
  """Returns (host, hosts) for reading data: this process must bring part `host` of `hosts` equal parts of `rows` rows.

  Parts follow the order of the mesh, not of the process numbers, so the global batch is the same on any layout;
  processes that hold the same rows (tensor axis across hosts) get the same part.
  """
  spans: dict[int, set] = {}
  for device, index in sharding.devices_indices_map((rows,)).items():
    start, stop, _ = index[0].indices(rows)
    spans.setdefault(device.process_index, set()).update(range(start, stop))
  parts = sorted({(min(s), max(s) + 1) for s in spans.values()})
  mine = spans[jax.process_index()]
  even = all((lo, hi) == (i * rows // len(parts), (i + 1) * rows // len(parts)) for i, (lo, hi) in enumerate(parts))
  if not even or len(mine) != rows // len(parts):
    raise ClusterError(
      f"mesh: the rows of a batch of {rows} do not fall into equal runs, one for each host (they are {parts}). "
      "Put `tensor` inside a host, or choose data x fsdp as a multiple of the number of hosts."
    )
  return parts.index((min(mine), max(mine) + 1)), len(parts)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding, rows: int) -> dict[str, jax.Array]:
  """Returns the global arrays of a batch of `rows` rows, from this process's rows (its part as `feed` says)."""
  if jax.process_count() == 1:
    for name, x in batch.items():
      assert x.shape[0] == rows, f"{name}: {x.shape[0]} rows, expected {rows}"
    return jax.device_put(dict(batch), sharding)
  out = {}
  for name, x in batch.items():
    shape = (rows, *x.shape[1:])
    out[name] = jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)
    assert out[name].shape == shape, f"{name}: global shape {out[name].shape}, expected {shape}"
  return out


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0] if n <= 1 << 20 else [1]


def _list(values: Sequence[int]) -> str:
  values = list(values)
  shown = ", ".join(map(str, values[:12]))
  return shown + (", ..." if len(values) > 12 else "")


def _show(sizes: Mapping[str, int]) -> str:
  return " x ".join(f"{k}={v}" for k, v in sizes.items())
