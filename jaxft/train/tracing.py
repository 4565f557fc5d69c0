"""Traces some steps of a run for TensorBoard and Perfetto, and says in a table what they took their time for."""

import collections
import contextlib
import logging
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxft import display
from jaxft.errors import InputError

log = logging.getLogger("jaxft")
FOLDER, TABLE = "profile", "operations.txt"  # in a run folder; the table, beside the trace
TOP = 10  # rows of the table
CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")  # whose time is that of what they hold
METADATA = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(.*metadata=\{(.*?)\}(?:,|$)")
OWN = re.compile(r"(?:^|/)(jaxft|optax|flax)/(.*)")  # a path inside of what people look into


class Operation(NamedTuple):
  """What an instruction of a compiled program came from."""

  part: str  # forward, backward, or update: the optimizer, and all else outside the gradient
  kind: str  # the primitive of JAX at its root, such as dot_general
  source: str  # file and line


class Row(NamedTuple):
  operation: Operation
  calls: float  # a step
  seconds: float  # a step
  share: float  # of the time of all operations


def parse(text: str) -> tuple[int, int]:
  """Returns (first, last) step of "10:15" (both traced), or of "10"; raises InputError."""
  found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
  first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
  if not 1 <= first <= last:
    raise InputError(
      f"--profile_steps={text}: give the first and the last step to trace, such as 10:15; steps count from 1, and the "
      "first one is mostly compilation."
    )
  return first, last


def traced(step: Any, steps: str, last: int, home: pathlib.Path, *, main: bool = True) -> Any:
  """Returns a context that gives `step`, or where `steps` is not empty one that traces them, of a run of `last`."""
  if not steps:
    return contextlib.nullcontext(step)
  window = parse(steps)
  if window[1] > last:
    raise InputError(f"--profile_steps={steps}: the run has {last} steps; give earlier ones.")
  return contextlib.closing(Traced(step, *window, home / FOLDER, main=main))


class Traced:
  """A step(state, batch) whose calls for the steps `first` to `last` are traced into `folder`.

  It waits for the device where the window begins and where it ends, and nowhere else. Processes trace themselves; the
  `main` one writes the table.
  """

  def __init__(self, step: Any, first: int, last: int, folder: pathlib.Path, *, main: bool = True):
    self._step, self._first, self._last, self._folder, self._main = step, first, last, folder, main
    self._next = 0  # the step of the next call, once it is known
    self._on = False

  def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
    step = self._next or int(state.step) + 1
    self._next = step + 1
    if not self._on and step == self._first:
      jax.block_until_ready(state)
      self._begin()
    if not self._on:
      return self._step(state, batch)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      state, metrics = self._step(state, batch)
    if step == self._last:
      jax.block_until_ready((state, metrics))
      self._end(lambda: self._step.lower(state, batch).compile().as_text())
    return state, metrics

  def close(self) -> None:
    """Ends a window that the run has not come to the end of, or says that it never began."""
    if self._on:
      self._end(None)
    elif self._next <= self._first:
      log.warning("Steps %d to %d were to be traced, but the run did not come to them.", self._first, self._last)

  def _begin(self) -> None:
    how = jax.profiler.ProfileOptions()
    how.python_tracer_level = 0  # a line for each Python call hides the rest, and slows the steps
    jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=how)
    self._on, self._since = True, time.perf_counter()

  def _end(self, text: Callable[[], str] | None) -> None:
    seconds, steps = time.perf_counter() - self._since, self._next - self._first
    jax.profiler.stop_trace()
    self._on = False
    folder = max((self._folder / "plugins" / "profile").iterdir())
    log.info(
      "Traced steps %d to %d into %s: tensorboard --logdir=%s, or perfetto_trace.json.gz in ui.perfetto.dev. Their "
      "times are those of traced steps.", self._first, self._next - 1, folder, self._folder)  # fmt: skip
    if self._main:
      found = table(folder, steps, seconds, operations(text()) if text else {})
      (folder / TABLE).write_text(found + "\n", encoding="utf-8")
      log.info("%s\n", found)


def table(folder: pathlib.Path, steps: int, seconds: float, known: dict[str, Operation]) -> str:
  """Returns as text what `steps` traced steps took `seconds` for, from the trace in `folder`."""
  device, events = _events(folder)
  found, busy = rows(events, steps, known), _union((a, b) for _, a, b in events) / 1e9
  if not found:
    return f"The trace of {device} holds no operations, so there is no table."
  total = sum(r.share for r in found[:TOP])
  body = [
    (f"{r.operation.part:<9}{r.operation.kind:<17} {r.operation.source}", f"{r.calls:,.4g}",
     f"{1e3 * r.seconds:,.2f}", f"{r.share:.1%}") for r in found[:TOP]]  # fmt: skip
  title = f"What a step takes its time for ({device}; {steps} steps of {1e3 * seconds / steps:,.1f} ms)"
  said = display.table(title, ("operation, and where it is from", "calls", "ms", "share"), body)
  return (
    f"{said}\n  {total:.0%} of the time of all operations is in these {len(body)} of {len(found)} kinds. "
    f"Busy {min(busy / seconds, 1):.0%} of the time."
  )


def rows(events: list[tuple[str, int, int]], steps: int, known: dict[str, Operation]) -> list[Row]:
  """Returns the kinds of operations of (name, begin, end in ns), those that take longest first."""
  calls, spent = collections.Counter(), collections.Counter()
  for name, begin, end in events:
    of = known.get(name) or Operation("", re.sub(r"[.\d]+$", "", name), "")
    if of.kind not in CONTAINERS:
      calls[of] += 1
      spent[of] += end - begin
  whole = sum(spent.values())
  return [Row(of, calls[of] / steps, ns / 1e9 / steps, ns / whole) for of, ns in spent.most_common() if ns]


def operations(text: str) -> dict[str, Operation]:
  """Returns what the instructions of a compiled program (its HLO text) came from, by their names."""
  frames, out = _frames(text), {}
  for line in text.splitlines():
    found = METADATA.match(line)
    if not found:
      continue
    name, opcode, told = found.groups()
    path = (re.search(r'op_name="([^"]*)"', told) or ["", ""])[1]
    part = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "update"
    kind = opcode if opcode in CONTAINERS else path.rpartition("/")[2] or opcode
    place = re.search(r'source_file="([^"]*)".*?source_line=(\d+)', told)
    frame = re.search(r"stack_frame_id=(\d+)", told)
    source = f"{place[1]}:{place[2]}" if place else frames.get(frame[1], "") if frame else ""
    out[name] = Operation(part, kind, _short(source))
  return out


def _frames(text: str) -> dict[str, str]:
  """Returns {id: "file:line"} of the tables of stack frames at the head of an HLO text."""
  names = dict(re.findall(r'^(\d+) "([^"]*)"$', _section(text, "FileNames"), re.M))
  places = {
    i: f"{names.get(file, '')}:{line}"
    for i, file, line in re.findall(r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)", _section(text, "FileLocations"), re.M)
  }
  return {
    i: places.get(place, "")
    for i, place in re.findall(r"^(\d+) \{file_location_id=(\d+)", _section(text, "StackFrames"), re.M)
  }


def _section(text: str, name: str) -> str:
  found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
  return found[1] if found else ""


def _short(source: str) -> str:
  found = OWN.search(source)
  return (found[2] if found[1] == "jaxft" else f"{found[1]}/{found[2]}") if found else source.rpartition("/")[2]


def _events(folder: pathlib.Path) -> tuple[str, list[tuple[str, int, int]]]:
  """Returns (device, [(name of an instruction, begin, end in ns)]) of one device of a trace, or of the CPU."""
  file = next(iter(sorted(folder.glob("*.xplane.pb"))))
  planes = {p.name: p for p in jax.profiler.ProfileData.from_file(str(file)).planes}
  device = min((n for n in planes if re.match(r"/device:(GPU|TPU)", n)), default="/host:CPU")
  lines = list(planes[device].lines) if device in planes else []
  chosen = [x for x in lines if x.name == "XLA Ops"] or lines
  out = []
  for line in chosen:
    for e in line.events:
      name = dict(e.stats).get("hlo_op") or (line.name == "XLA Ops" and e.name.split(" = ")[0].lstrip("%"))
      if name:
        out.append((str(name), int(e.start_ns), int(e.start_ns + e.duration_ns)))
  return device.rpartition("/")[2], out


def _union(spans: Iterable[tuple[int, int]]) -> float:
  """Returns the length of the union of spans."""
  total, until = 0, 0
  for begin, end in sorted(spans):
    total += max(0, end - max(begin, until))
    until = max(until, end)
  return float(total)
