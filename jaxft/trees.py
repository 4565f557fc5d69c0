"""Trees of parameters by name: paths, ordered rules, what is trained, and readable differences.

A tree is a nested dict; the path of a leaf is its keys joined by "/", such as `encoder/layers/self_attn/q/kernel`. A
leaf whose logical axes start with "layers" stacks L layers; to rules, its layers are leaves of their own, with the
number after the key "layers": `encoder/layers/3/self_attn/q/kernel`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.errors import InputError

Tree = Any  # nested dict
Rules = Sequence[tuple[str, Any]]  # (regex, value): the first regex that matches a whole path gives the value

STACKED = "layers"  # the logical axis, and the key of the path, of stacked layers


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
  """Returns {path: leaf} of a nested dict; everything that is not a dict is a leaf, empty dicts vanish."""
  out = {}
  for key, value in tree.items():
    assert isinstance(key, str) and key and "/" not in key, f"a key must be a string without '/': {key!r}"
    out.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value})
  return out


def unflatten(flat: dict[str, Any]) -> Tree:
  """Returns the nested dict of {path: leaf}."""
  tree: Tree = {}
  for path, leaf in flat.items():
    *parents, key = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[key] = leaf
  return tree


def map_with_path(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
  """Returns the tree of `fn(path, leaf, *leaves of rest at that path)`."""
  others = [flatten(r) for r in rest]
  return unflatten({path: fn(path, leaf, *(o[path] for o in others)) for path, leaf in flatten(tree).items()})


def is_stacked(axes: tuple | None) -> bool:
  """Says whether the logical `axes` of a leaf start with stacked layers."""
  return bool(axes) and axes[0] == STACKED


def layer_paths(path: str, depth: int) -> list[str]:
  """Returns the `depth` paths of the layers stacked in the leaf `path`."""
  keys = path.split("/")
  assert STACKED in keys, f"{path} has the axis {STACKED!r} but no key of that name"
  at = keys.index(STACKED) + 1
  return ["/".join([*keys[:at], str(i), *keys[at:]]) for i in range(depth)]


def by_rules(
  rules: Rules, shapes: Tree, axes: Tree | None = None, *, name: str = "rules", all_used: bool = False
) -> Tree:
  """Returns a tree of values: for each leaf that of the first rule whose regex matches its whole path.

  `shapes` has leaves with a `.shape`. With `axes`, the layers of a stacked leaf are matched one by one; where their
  values differ the result is a numpy vector [L, 1, 1, ...] that broadcasts against the leaf. Raises InputError where a
  leaf matches no rule, or (with `all_used`) where a rule decides about no leaf; `name` says in messages whose rules.
  """
  compiled = _compile(rules, name)
  used, missing, out = set(), [], {}
  flat_axes = flatten(axes) if axes is not None else {}

  def value(path):
    for i, (regex, v) in enumerate(compiled):
      if regex.fullmatch(path):
        used.add(i)
        return v
    missing.append(path)

  for path, leaf in flatten(shapes).items():
    if is_stacked(flat_axes.get(path)):
      values = [value(p) for p in layer_paths(path, leaf.shape[0])]
      same = all(v == values[0] for v in values)
      out[path] = values[0] if same or missing else np.array(values).reshape(-1, *[1] * (len(leaf.shape) - 1))
    else:
      out[path] = value(path)

  if missing:
    raise InputError(
      f"{name}: no rule matches {_some(missing)}. Rules are tried in order and must match the whole name; "
      f"end them with ('.*', ...). The rules are {_show(rules)}."
    )
  unused = [rules[i][0] for i in range(len(rules)) if i not in used]
  if all_used and unused:
    raise InputError(
      f"{name}: {_some([repr(u) for u in unused])} decides about no parameter, because none has such a name or "
      f"an earlier rule takes it. A rule must match the whole name; names are such as {_some(list(out), 4)}."
    )
  return unflatten(out)


def _compile(rules: Rules, name: str) -> list[tuple[re.Pattern, Any]]:
  out = []
  for pair in rules:
    try:
      regex, value = pair
      out.append((re.compile(regex), value))
    except (re.error, TypeError, ValueError) as e:
      raise InputError(f"{name}: {pair!r} is not a pair of a regular expression and a value ({e}).") from e
  return out


def trainable(rules: Rules, shapes: Tree, axes: Tree) -> Tree:
  """Returns the tree that says what is trained: True, False, or a vector of both [L, 1, ...] for stacked layers.

  Raises InputError on a rule without effect, a value that is no bool, and where nothing is trained.
  """
  wrong = [pair for pair in rules if not isinstance(pair[-1], bool)]
  if wrong:
    raise InputError(f"trainable: the value of {wrong[0]!r} must be True (trained) or False (frozen).")
  flags = by_rules(rules, shapes, axes, name="trainable", all_used=True)
  if not any(np.any(f) for f in flatten(flags).values()):
    raise InputError(f"trainable: the rules {_show(rules)} freeze every parameter. End them with ('.*', True).")
  return flags


def split_trainable(params: Tree, trainable: Tree) -> tuple[Tree, Tree]:
  """Returns (trained, frozen): the leaves of `params` with any True in `trainable`, and those with none."""
  flags = flatten(trainable)
  flat = flatten(params)
  trained = {path: leaf for path, leaf in flat.items() if np.any(flags[path])}
  return unflatten(trained), unflatten({path: leaf for path, leaf in flat.items() if path not in trained})


def merge(trained: Tree, frozen: Tree) -> Tree:
  """Returns the whole tree that `split_trainable` cut in two."""
  return unflatten({**flatten(trained), **flatten(frozen)})


def count(tree: Tree) -> int:
  """Returns the number of elements of all leaves (anything with a `.shape`)."""
  return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
  """Returns the bytes of all leaves (anything with `.shape` and `.dtype`), counted once over all devices."""
  return sum(int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def differences(expected: Tree, found: Tree) -> list[str]:
  """Returns one line for each leaf that is missing, unexpected, or of another shape or dtype; empty if all agree."""
  want, have = flatten(expected), flatten(found)
  lines = [f"missing: {p} {_kind(want[p])}" for p in want if p not in have]
  lines += [f"unexpected: {p} {_kind(have[p])}" for p in have if p not in want]
  return lines + [
    f"differs: {p} is {_kind(have[p])}, expected {_kind(want[p])}"
    for p in want
    if p in have and _kind(want[p]) != _kind(have[p])
  ]


def _kind(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)


def _some(names: Iterable[str], most: int = 8) -> str:
  names = list(names)
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _show(rules: Rules) -> str:
  return ", ".join(f"({pattern!r}, {value!r})" for pattern, value in rules)
