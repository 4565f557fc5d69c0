"""Names and layouts of the tensors on the Hub beside our parameters: a family's table, read both ways.

A family gives its table as a list of `Rule`, made with the helpers below. Most Hub tensors are one of our leaves, or
one layer of it; a fused one (q, k and v in one matrix) holds several, and has a rule for each of its `Part`s.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from jaxft.errors import InputError

Renames = Sequence[tuple[str, str]]  # (regex, replacement), applied in this order to every name of a file


@dataclasses.dataclass(frozen=True)
class Part:
  """What of a fused Hub tensor is ours: start:stop on `axis` of the tensor of shape `whole`, reshaped to `view`."""

  whole: tuple[int, ...]
  view: tuple[int, ...]
  axis: int
  start: int
  stop: int

  def cut(self, x: np.ndarray) -> np.ndarray:
    """Returns the part of a tensor of shape `whole`, as a view where `x` lies in one piece."""
    return x.reshape(self.view)[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


def parts(whole: Sequence[int], axis: int, sizes: Sequence[int], view: Sequence[int] | None = None) -> tuple[Part, ...]:
  """Returns the parts of a fused tensor in their order: `sizes` on `axis` of the tensor, or of its reshape `view`.

  GPT-2's c_attn [D, 3*N*H]: parts((D, 3*N*H), 1, (N*H,) * 3). NeoX's query_key_value [N*3*H, D], where each head has
  its q, k and v: parts((N*3*H, D), 1, (1, 1, 1), view=(N, 3, H, D)). Phi-3's gate_up_proj: parts((2*F, D), 0, (F, F)).
  """
  whole = tuple(whole)
  view = whole if view is None else tuple(view)
  assert math.prod(view) == math.prod(whole) and sum(sizes) == view[axis], (whole, view, axis, sizes)
  ends = np.cumsum(sizes).tolist()
  return tuple(Part(whole, view, axis, end - size, end) for end, size in zip(ends, sizes))


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of the table between Hub tensors and our parameters.

  hub: tensor name; with `{i}` our leaf stacks the layers on its leading axis.
  ours: path of the leaf; empty: tensors that are allowed in files and ignored (see `ignore`).
  dims: for each dimension of the Hub tensor, those of ours (without the layers) that it merges, major first; None: the
  same. Where the tensor is fused, they describe the part, which has as many dimensions.
  copies: names under which old files repeat the tensor; they must be equal to it, and stand in for it where it is
  absent. `{i}` in them is the layer's number too.
  part: what of a fused tensor this leaf is; None: all of it.
  first: the first layer that has a tensor on the Hub; what our leaf holds before it does not count: it is read as ones
  and not saved (the norm that the first layer of ModernBERT lacks).
  """

  hub: str
  ours: str
  dims: tuple[tuple[int, ...], ...] | None = None
  copies: tuple[str, ...] = ()
  part: Part | None = None
  first: int = 0

  @property
  def stacked(self) -> bool:
    return "{i}" in self.hub

  def names(self, shape: Sequence[int]) -> list[str]:
    """Returns the Hub names of a leaf of this shape."""
    return [self.numbered(self.hub, i) for i in range(self.first, shape[0])] if self.stacked else [self.hub]

  def numbered(self, name: str, layer: int) -> str:
    """Returns `name` for layer `layer` of our leaf, counted from 0."""
    return name.replace("{i}", str(layer))

  def matches(self, name: str) -> bool:
    """Says whether this is a tensor of the rule, whatever the layer; `*` stands for any text."""
    return any(_pattern(n).fullmatch(name) for n in (self.hub, *self.copies))

  def plain_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of what `dims` describes, the Hub's tensor or its part, for a leaf of `shape`."""
    own = tuple(shape[1:] if self.stacked else shape)
    return own if self.dims is None else tuple(math.prod(own[d] for d in dims) for dims in self.dims)

  def hub_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the whole tensor on the Hub for a leaf of `shape`."""
    return self.plain_shape(shape) if self.part is None else self.part.whole

  def cut(self, x: np.ndarray) -> np.ndarray:
    """Returns what of a whole Hub tensor is ours."""
    return x if self.part is None else self.part.cut(x)

  def to_ours(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns our part of a whole Hub tensor as one layer of a leaf of `shape`, as a view."""
    own = tuple(shape[1:] if self.stacked else shape)
    if self.dims is None:
      return self.cut(x).reshape(own)
    order = [d for dims in self.dims for d in dims]
    return self.cut(x).reshape([own[d] for d in order]).transpose(np.argsort(order))

  def to_hub(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns one layer of a leaf of `shape` as the tensor on the Hub, or as its part of one, which `Entry.join` fills
    in.
    """
    if self.dims is None:
      return x
    return x.transpose([d for dims in self.dims for d in dims]).reshape(self.plain_shape(shape))


# The helpers: `more` is what else a Rule has (copies, part, first).


def plain(hub: str, ours: str, **more: Any) -> Rule:
  """The same layout on both sides: norms, biases, tables, and Conv1D kernels, which are [in, out] there too."""
  return Rule(hub, ours, **more)


def linear(hub: str, ours: str, **more: Any) -> Rule:
  """[out, in] there, [in, out] here."""
  return Rule(hub, ours, ((1,), (0,)), **more)


def heads_in(hub: str, ours: str, **more: Any) -> Rule:
  """[heads * head_dim, in] there, [in, heads, head_dim] here."""
  return Rule(hub, ours, ((1, 2), (0,)), **more)


def heads_out(hub: str, ours: str, **more: Any) -> Rule:
  """[out, heads * head_dim] there, [heads, head_dim, out] here."""
  return Rule(hub, ours, ((2,), (0, 1)), **more)


def heads_bias(hub: str, ours: str, **more: Any) -> Rule:
  """[heads * head_dim] there, [heads, head_dim] here."""
  return Rule(hub, ours, ((0, 1),), **more)


def conv_heads_in(hub: str, ours: str, **more: Any) -> Rule:
  """[in, heads * head_dim] there (GPT-2's Conv1D), [in, heads, head_dim] here."""
  return Rule(hub, ours, ((0,), (1, 2)), **more)


def conv_heads_out(hub: str, ours: str, **more: Any) -> Rule:
  """[heads * head_dim, out] there (GPT-2's Conv1D), [heads, head_dim, out] here."""
  return Rule(hub, ours, ((0, 1), (2,)), **more)


def ignore(hub: str) -> Rule:
  """Tensors that files may hold and that nobody uses: buffers and leftovers by name, `{i}` for any layer, in silence;
  heads of other tasks by a name with `*`, such as `cls.predictions.*`, which is said once.
  """
  return Rule(hub, "")


@functools.lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern:
  return re.compile(re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\*", ".*"))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor on the Hub, and the rules of the leaves in it: one, or those of a fused tensor's parts."""

  name: str
  rules: tuple[Rule, ...]
  layer: int  # of the leaves, where they are stacked
  shape: tuple[int, ...]  # on the Hub
  copies: tuple[str, ...]

  def join(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the Hub's tensor of what `Rule.to_hub` made of the leaves, in the order of the rules."""
    if self.rules[0].part is None:
      return pieces[0]
    assert len({p.dtype for p in pieces}) == 1, f"{self.name}: its parts have several dtypes"
    out = np.empty(self.shape, pieces[0].dtype)
    for rule, piece in zip(self.rules, pieces, strict=True):
      cut = rule.cut(out)
      cut[...] = piece.reshape(cut.shape)
    return out


def entries(rules: Sequence[Rule], flat: dict[str, Any], without: Collection[str] = ()) -> list[Entry]:
  """Returns the Hub tensors of a model whose leaves, which have a shape, are `flat`, by path.

  Those of the leaves `without` are left out. The table must name every leaf once, every tensor once, and all of a fused
  tensor.
  """
  named = [r.ours for r in rules if r.ours]
  assert set(named) == set(flat), f"table and model differ: {sorted(set(named) ^ set(flat))}"
  assert len(named) == len(flat), f"the table names twice: {sorted({n for n in named if named.count(n) > 1})}"
  assert set(without) <= set(flat), f"not in the model: {sorted(set(without) - set(flat))}"
  groups: dict[str, list[Rule]] = {}
  for rule in rules:
    if rule.ours:
      groups.setdefault(rule.hub, []).append(rule)
  out = []
  for hub, group in groups.items():
    _check(hub, group, flat)
    gone = [r.ours in without for r in group]
    assert all(gone) or not any(gone), f"{hub}: a fused tensor is read as a whole or not at all"
    if not gone[0]:
      shape, rule = flat[group[0].ours].shape, group[0]
      copies = dict.fromkeys(c for r in group for c in r.copies)
      for i, name in enumerate(rule.names(shape), rule.first):
        out.append(Entry(name, tuple(group), i, rule.hub_shape(shape), tuple(rule.numbered(c, i) for c in copies)))
  assert len({e.name for e in out}) == len(out), "two rules of the table name one tensor"
  return out


def _check(hub: str, group: list[Rule], flat: dict[str, Any]) -> None:
  """Asserts that the rules of one Hub tensor share it out without gap or overlap."""
  found = [r.part for r in group]
  if found == [None]:
    return
  assert None not in found, f"{hub}: two rules without a part name one tensor"
  assert len({(p.whole, p.view, p.axis) for p in found}) == 1, f"{hub}: its parts see it in different ways"
  spans = sorted((p.start, p.stop) for p in found)
  length = found[0].view[found[0].axis]
  assert [0, *(b for _, b in spans)] == [*(a for a, _ in spans), length], f"{hub}: {spans} do not cover 0:{length}"
  assert len({tuple(r.names(flat[r.ours].shape)) for r in group}) == 1, f"{hub}: its parts have different layers"
  for rule, p in zip(group, found):
    want, has = math.prod(rule.plain_shape(flat[rule.ours].shape)), math.prod(p.view) // length * (p.stop - p.start)
    assert want == has, f"{hub}: {rule.ours} has {want} values a layer, its part {has}"


def canonical(where: str, found: Iterable[str], rules: Sequence[Rule], prefix: str, renames: Renames) -> dict[str, str]:
  """Returns {name as the table has it: name in the file} for the tensors `found` in `where`.

  `renames` go first. Where no name starts with `prefix` ("bert.", "transformer."), the file is that of the bare model:
  names that the table does not know as they are get the prefix.
  """
  new = {name: functools.reduce(lambda n, r: re.sub(*r, n), renames, name) for name in found}
  if not any(n.startswith(prefix) for n in new.values()):
    known = lambda n: any(r.matches(n) for r in rules)
    new = {name: n if known(n) else prefix + n for name, n in new.items()}
  out: dict[str, str] = {}
  for name, n in new.items():
    if n in out:
      raise InputError(
        f"{where}: the tensors {out[n]} and {name} both stand for {n}, one by an old name. Remove one of the two."
      )
    out[n] = name
  return out
