"""Reads the text of a compiled module: what moves between devices, through memory, and how often each loop turns.

XLA's own cost_analysis counts the body of a loop once, whatever its length; here bodies count as often as they run. All
numbers are for one device and one call of the program.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = dict(
  pred=1, s4=0.5, u4=0.5, s8=1, u8=1, s16=2, u16=2, s32=4, u32=4, s64=8, u64=8, bf16=2, f16=2, f32=4, f64=8, c64=8,
  f8e4m3fn=1, f8e5m2=1, f8e4m3=1, f8e3m4=1, f8e4m3b11fnuz=1, token=0,
)  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = frozenset(  # instructions that move nothing: names, views and constants
  "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier".split()
)
ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^}]*?\})?")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
CALL = re.compile(r"^([\w\-]+)\((.*)$")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  op: str
  shape: str  # of what it gives, in HLO's notation
  operands: tuple[str, ...]
  rest: str  # attributes
  root: bool
  literal: str  # of a constant


@dataclasses.dataclass(frozen=True)
class Moved:
  """One instruction that moves data between devices."""

  kind: str  # of COLLECTIVES
  shape: str  # of what a device holds afterwards
  bytes: float
  group: int  # devices that take part, 2 for a neighbour exchange
  times: float  # that it runs in a call
  where: str  # the operation that it comes from, as jax names it
  waits: bool  # nothing else runs meanwhile


@dataclasses.dataclass(frozen=True)
class Module:
  collectives: tuple[Moved, ...]
  bytes: float  # through memory
  cycles: float  # as the compiler of TPUs estimates them; 0: it gave none
  kernels: float  # runs of kernels that it gave none for
  unknown_loops: int  # whose number of turns is not in the text


def read(text: str, *, loops: int = 1, devices: int = 1) -> Module:
  """Reads `compiled.as_text()`; `loops` are the turns of a loop whose number is not in it."""
  if not text:  # of a program that did not compile
    return Module((), 0.0, 0.0, 0.0, 0)
  computations, entry = parse(text)
  turns, unknown = _turns(computations, entry, loops)
  moved: list[Moved] = []
  total = cycles = kernels = 0.0
  for name, times in turns.items():
    lines = computations[name]
    shapes = {i.name: i.shape for i in lines}
    for i in lines:
      kind = _collective(i.op)
      if kind:
        moved.append(_moved(kind, i, times, devices))
      found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
      cycles += times * int(found.group(1)) if found else 0
      kernels += times if 'custom_call_target="tpu_custom_call"' in i.rest and not found else 0
      total += times * _traffic(i, shapes, computations)
  return Module(tuple(moved), total, cycles, kernels, unknown)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns ({computation: its instructions}, name of the entry)."""
  out: dict[str, list[Instruction]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    head = HEAD.match(line)
    if head:
      lines = out.setdefault(head.group(1), [])
      entry = head.group(1) if line.startswith("ENTRY") else entry
      continue
    found = LINE.match(line)
    if found:
      lines.append(_instruction(*found.groups()))
  return out, entry


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  if rest.startswith("("):  # a tuple, whose arrays may have layouts with parentheses
    end = _closing(rest, 0) + 1
  else:
    end = rest.index(" ")
  shape, call = rest[:end], CALL.match(rest[end:].strip())
  if not call:
    return Instruction(name, "", shape, (), rest, bool(root), "")
  op, after = call.groups()
  close = _closing("(" + after, 0) - 1
  inside, attributes = after[:close], after[close + 1 :]
  literal = inside if op in ("constant", "parameter") else ""
  return Instruction(name, op, shape, tuple(NAME.findall(inside)), attributes, bool(root), literal)


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  return len(text) - 1


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
  """Yields (dtype, dimensions, whether it lies in the chip's own memory) of each array in a shape."""
  for found in ARRAY.finditer(shape):
    dims = tuple(int(d) for d in found.group(2).split(",") if d)
    yield found.group(1), dims, bool(re.search(r"S\([1-9]\)", found.group(0)))


def size(shape: str, *, near: bool = True) -> float:
  """Returns the bytes of a shape; not `near`: without what lies in the chip's own memory (VMEM)."""
  return sum(BYTES.get(d, 4) * math.prod(dims) for d, dims, inside in arrays(shape) if near or not inside)


def _turns(computations: dict, entry: str, loops: int) -> tuple[dict[str, float], int]:
  """Returns ({computation that is run by itself: how often}, number of loops of unknown length)."""
  out: dict[str, float] = {}
  unknown = 0

  def visit(name: str, times: float) -> None:
    nonlocal unknown
    out[name] = out.get(name, 0) + times
    for i in computations.get(name, ()):
      named = dict(re.findall(r"(\w+)=%([\w.\-]+)", i.rest))
      if i.op == "while":
        n = trips(i, computations)
        if n is None:
          unknown, n = unknown + 1, loops
        visit(named["body"], times * n)
      elif i.op == "call":
        visit(named["to_apply"], times)
      elif i.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        for b in NAME.findall(branches.group(1)) if branches else [v for k, v in named.items() if "comput" in k]:
          visit(b, times)
      elif i.op.startswith("async-start") and "calls" in named:
        visit(named["calls"], times)

  visit(entry, 1.0)
  return out, unknown


def trips(loop: Instruction, computations: dict) -> int | None:
  """Returns the turns of a while: as the compiler says, or as its condition has them (i < N); None: neither."""
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known.group(1))
  condition = re.search(r"condition=%([\w.\-]+)", loop.rest).group(1)
  lines = {i.name: i for i in computations.get(condition, ())}
  ends = [i for i in lines.values() if i.root]
  if not ends or ends[0].op not in ("compare", "fusion"):
    return None
  limits = [lines[n].literal for n in ends[0].operands if n in lines and lines[n].op == "constant"]
  if len(limits) != 1 or not limits[0].lstrip("-").isdigit():
    return None
  return int(limits[0])


def _collective(op: str) -> str:
  return next((k for k in COLLECTIVES if op in (k, f"{k}-start")), "")


def _moved(kind: str, i: Instruction, times: float, devices: int) -> Moved:
  shape = i.shape
  if shape.startswith("(") and i.op.endswith("-start"):  # (operand, result, ...): what a device holds afterwards
    parts = [m.group(0) for m in ARRAY.finditer(shape) if m.group(2)]
    half = parts[len(parts) // 2 :] if len(parts) % 2 == 0 else parts[1:]
    shape = ", ".join(half if kind != "collective-permute" else parts[1:2])
  where = re.search(r'op_name="([^"]*)"', i.rest)
  group = 2 if kind == "collective-permute" else _group(i.rest, devices)
  return Moved(kind, shape, size(shape), group, times, where.group(1) if where else "", not i.op.endswith("-start"))


def _group(rest: str, devices: int) -> int:
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  if listed:
    return len(listed.group(1).split(","))
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if named:  # mesh['axis_0'=64,'axis_1'=2] {'axis_0'}: over some axes of a mesh
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
    return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", named.group(2)))
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
  return int(iota.group(2)) if iota else devices


def _traffic(i: Instruction, shapes: dict[str, str], computations: dict) -> float:
  """Returns the bytes that one run of an instruction reads from memory and writes to it."""
  if i.op in FREE or not i.op or i.op.endswith("-done") or i.op in ("while", "call", "conditional"):
    return 0.0
  out = size(i.shape, near=False)
  if i.op in ("dynamic-slice", "slice", "gather"):
    return 2 * out
  if i.op == "dynamic-update-slice":
    return 2 * size(shapes.get(i.operands[1], ""), near=False)
  if i.op.endswith("-start"):  # a copy between memories names its operand among its results
    return out / (1 if "S(" in i.shape else 2)
  read = [size(shapes.get(n, ""), near=False) for n in i.operands]
  called = re.search(r"calls=%([\w.\-]+)", i.rest)
  if i.op == "fusion" and called and called.group(1) in computations:
    inner = computations[called.group(1)]
    read = [min(r, _used(inner, k, r)) for k, r in enumerate(read)]
    out = min(out, _written(inner, out))
  return out + sum(read)


def _used(inner: list[Instruction], number: int, whole: float) -> float:
  """Returns the bytes that a fusion reads of its operand `number`: parts of it, where all it takes are slices."""
  name = next((i.name for i in inner if i.op == "parameter" and i.literal == str(number)), None)
  users = [i for i in inner if name in i.operands]
  used = 0.0
  for user in users:
    if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      used += size(user.shape)
    elif user.op == "dynamic-update-slice" and user.operands[0] == name:
      used += 0.0  # updated in place
    elif user.op == "bitcast":
      return whole if not _sliced(inner, user.name) else _sliced(inner, user.name)
    else:
      return whole
  return used


def _sliced(inner: list[Instruction], name: str) -> float:
  users = [i for i in inner if name in i.operands]
  if users and all(u.op in ("dynamic-slice", "slice") and u.operands[0] == name for u in users):
    return sum(size(u.shape) for u in users)
  return 0.0


def _written(inner: list[Instruction], whole: float) -> float:
  """Returns the bytes that a fusion writes: what it changes, where it updates an operand in place."""
  by_name = {i.name: i for i in inner}
  root = next((i for i in inner if i.root), None)
  if root is None:
    return whole
  ends = [by_name[n] for n in root.operands if n in by_name] if root.op == "tuple" else [root]
  total = 0.0
  for end in ends:
    while end.op == "bitcast" and end.operands[0] in by_name:
      end = by_name[end.operands[0]]
    changed = end.op == "dynamic-update-slice" and len(end.operands) > 1 and end.operands[1] in by_name
    total += size(by_name[end.operands[1]].shape if changed else end.shape)
  return total
