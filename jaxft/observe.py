"""What a run tells people: log, metrics.jsonl, TensorBoard, progress, timers, and where the compiled programs are kept.

Only process 0 writes; the others keep their warnings. Whatever is written goes through `redact` first.
"""

import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from rich import progress as rich_progress
from rich.console import Console

from jaxft.errors import StorageError

log = logging.getLogger("jaxft")

SECRET_VARIABLES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)", re.IGNORECASE)
SECRET_SHAPES = re.compile(
  r"\bhf_[A-Za-z0-9]{16,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal


def redact(text: str) -> str:
  """Returns `text` without the values of secret environment variables and without what looks like a token."""
  for name, value in os.environ.items():
    if len(value) >= 8 and SECRET_VARIABLES.search(name) and not value.startswith(("/", "true", "false")):
      text = text.replace(value, f"[{name}]")
  return SECRET_SHAPES.sub("[secret]", text)


class _Formatter(logging.Formatter):
  """Redacts the whole text, tracebacks too, which a filter on the message would miss."""

  def format(self, record: logging.LogRecord) -> str:
    return redact(super().format(record))


def setup_logging(folder: str | pathlib.Path | None, *, main: bool = True) -> None:
  """Sends jaxft's messages to stderr (short) and, with `folder`, everything with tracebacks to folder/log.txt.

  Processes that are not `main` write warnings to stderr and nothing to the file.
  """
  root = logging.getLogger()
  for handler in list(root.handlers):
    ours = getattr(handler, "jaxft", False)
    if (
      ours or type(handler) is logging.StreamHandler or type(handler).__module__.startswith("absl")
    ):  # libraries put some there
      root.removeHandler(handler)
  log.setLevel(logging.DEBUG)
  root.setLevel(logging.WARNING)
  console = logging.StreamHandler(sys.stderr)
  console.setFormatter(_Formatter("%(message)s"))
  console.setLevel(logging.INFO if main else logging.WARNING)
  # asyncio reports each of Orbax's writes that a full disk has cut short; the run's one paragraph says it once.
  console.addFilter(
    lambda record: record.name.startswith("jaxft") or record.levelno >= logging.ERROR and record.name != "asyncio"
  )
  handlers: list[logging.Handler] = [console]
  if folder is not None and main:
    try:
      pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
      file = logging.FileHandler(pathlib.Path(folder) / "log.txt", encoding="utf-8")
    except OSError as e:
      raise StorageError(
        f"{folder}/log.txt cannot be written: {e}. Give a --workdir that this user may write to."
      ) from e
    file.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s"))
    handlers.append(file)
  for handler in handlers:
    handler.jaxft = True
    root.addHandler(handler)
  sys.unraisablehook = _unraisable


def _unraisable(told: Any) -> None:
  """Logs what Python cannot raise. After a disk-full error, TensorStore's threads call into a closed event loop of
  Orbax's; a traceback of that on stderr would hide the message that matters."""
  log.debug("ignored in %r", told.object, exc_info=(told.exc_type, told.exc_value, told.exc_traceback))


def versions(*names: str) -> dict[str, str]:
  """Returns the versions of the packages that are installed."""
  out = {}
  for name in names:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return out


def environment() -> dict[str, Any]:
  """Returns hardware and library versions, for the run card and the checkpoints."""
  device = jax.devices()[0]
  return dict(
    devices=f"{jax.device_count()} x {device.device_kind}",
    processes=jax.process_count(),
    cores=os.cpu_count(),
    platform=platform.platform(),
    python=platform.python_version(),
    versions=versions(
      "jaxft",
      "jax",
      "jaxlib",
      "flax",
      "optax",
      "orbax-checkpoint",
      "transformers",
      "tensorflow",
      "tensorflow-cpu",
      "numpy",
    ),
  )


def read_metrics(folder: str | pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
  """Returns the objects of a file of metrics in order; a half written last line is left out."""
  path = pathlib.Path(folder) / name
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return rows


class MetricsWriter:
  """Appends to folder/metrics.jsonl and to TensorBoard events, starting after `start` (a resumed step; 0: a new run).

  Lines beyond `start` belong to work that was lost with the previous process; they are cut off, so that each step is
  there once.
  """

  def __init__(self, folder: str | pathlib.Path, *, start: int, tensorboard: bool, main: bool = True):
    self._file = self._events = None
    if not main:
      return
    folder = pathlib.Path(folder)
    path = folder / "metrics.jsonl"
    try:
      folder.mkdir(parents=True, exist_ok=True)
      kept = [row for row in read_metrics(folder) if row["step"] <= start] if start else []
      fresh = path.with_suffix(".tmp")
      fresh.write_text("".join(_line(row) for row in kept), encoding="utf-8")
      os.replace(fresh, path)
      self._file = open(path, "ab", buffering=0)  # a line is one write: a kill leaves whole lines
      if not start:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of a process that died before its first checkpoint
      if tensorboard:
        self._events = _event_writer(folder / "tensorboard", start)
    except OSError as e:
      raise StorageError(f"{path} cannot be written: {e}. Free some space or give another --workdir.") from e

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes one line; a value that is not finite becomes null, as JSON has no NaN."""
    if self._file is None:
      return
    try:
      self._file.write(_line({"step": step, **values}).encode())
      for name, value in values.items() if self._events else ():
        if value is not None:
          self._events.add_scalar(name, value, step)
    except OSError as e:
      raise StorageError(
        f"{self._file.name} cannot be written: {e}. The run stopped at step {step}; free some space and run the "
        "same command again: it goes on from the last checkpoint."
      ) from e

  def close(self) -> None:
    for sink in (self._file, self._events):
      if sink is not None:
        sink.close()
    self._file = self._events = None


def _event_writer(folder: pathlib.Path, start: int) -> Any:
  """Returns a TensorBoard writer whose events after step `start` replace those of a lost process."""
  # tensorboardX imports torch where it is installed, which takes 9 s on 2 cores and is used for tensors only.
  hide = "torch" not in sys.modules
  if hide:
    sys.modules["torch"] = None
  try:
    import tensorboardX
  finally:
    if hide:
      del sys.modules["torch"]
  return tensorboardX.SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _line(row: Mapping[str, Any]) -> str:
  clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
  return json.dumps(clean, ensure_ascii=False) + "\n"


class Progress:
  """A bar on a terminal; elsewhere one compact line every 10 seconds, and the first and the last step."""

  def __init__(self, total: int, start: int, *, main: bool = True):
    self._total, self._main, self._bar, self._said, self._last = total, main, None, -math.inf, None
    if main and sys.stderr.isatty():
      columns = [
        rich_progress.TextColumn("[bold]{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
      ]
      self._bar = rich_progress.Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
      self._task = self._bar.add_task("train", total=total, completed=start, text="compiling the step")
      self._bar.start()

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows `step` with loss, tokens_per_second, mfu and eta (seconds) of `values`, as far as they are there."""
    if not self._main:
      return
    text = _compact(values)
    if self._bar:
      self._bar.update(self._task, completed=step, text=text)
      return
    self._last = (step, text)
    if time.monotonic() - self._said >= PLAIN_SECONDS:
      self._say()

  def _say(self) -> None:
    if self._last:
      log.info("step %d/%d  %s", self._last[0], self._total, self._last[1])
      self._said, self._last = time.monotonic(), None

  def close(self) -> None:
    self._say()
    if self._bar:
      self._bar.stop()
      self._bar = None


def _compact(values: Mapping[str, Any]) -> str:
  parts = []
  for name, form in (
    ("loss", "loss {:.4g}"),
    ("accuracy", "acc {:.3f}"),
    ("learning_rate", "lr {:.3g}"),
    ("target_tokens_per_second", "{:,.0f} target tok/s"),
    ("examples_per_second", "{:,.1f} examples/s"),
    ("tokens_per_second", "{:,.0f} tok/s"),
  ):
    if values.get(name) is not None:
      parts.append(form.format(values[name]))
  if values.get("mfu") is not None:
    parts.append(f"MFU {values['mfu']:.1%}")
  if (values.get("data_wait") or 0) > 0.05:
    parts.append(f"waits for data {values['data_wait']:.0%}")
  if values.get("eta") is not None:
    parts.append(f"eta {duration(values['eta'])}")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Returns `seconds` for people: 42s, 3m10s, 2h05m, 3d04h."""
  s = max(int(seconds + 0.5), 0)
  if s < 60:
    return f"{s}s"
  if s < 3600:
    return f"{s // 60}m{s % 60:02d}s"
  return f"{s // 3600}h{s % 3600 // 60:02d}m" if s < 86400 else f"{s // 86400}d{s % 86400 // 3600:02d}h"


class Observer:
  """Everything that `train.loop` tells: one `log` a line, `note` for events; close it at the end, also after an
  error."""

  def __init__(self, folder: str | pathlib.Path, *, steps: int, start: int, tensorboard: bool, main: bool = True):
    self._writer = MetricsWriter(folder, start=start, tensorboard=tensorboard, main=main)
    self._progress = Progress(steps, start, main=main)

  def log(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes a line of metrics and moves the progress to `step`."""
    self._writer.write(step, values)
    if "loss" in values:
      self._progress.update(step, values)

  def note(self, message: str, *args: Any) -> None:
    """Tells an event that people should see, such as a checkpoint or an evaluation."""
    log.info(message, *args)

  def close(self) -> None:
    self._progress.close()
    self._writer.close()


class Meter:
  """Counts steps, tokens and seconds between two lines of metrics; `exclude` takes evaluations and saves out of the
  time.

  FLOPs and `peak` FLOP/s are those of all devices together; 0 means unknown, and then MFU is None.
  """

  def __init__(self, *, peak: float, unit: str = "target_tokens"):
    """`unit` is what a loss is divided by: target_tokens or examples."""
    self._peak, self._unit = peak, unit
    self._tokens: dict[int, tuple[float, float]] = {}  # step -> (real, padded), noted when its batch was made
    self.reset()

  def reset(self) -> None:
    self._since, self._wait, self._out = time.perf_counter(), 0.0, 0.0
    self._steps, self._real, self._padded, self._target, self._work = 0, 0.0, 0.0, 0.0, 0.0

  def batch(self, step: int, real: float, padded: float, waited: float) -> None:
    """Notes the tokens of the batch of `step` and the seconds for which the loop waited for it."""
    self._tokens[step] = (real, padded)
    self._wait += waited

  def done(self, step: int, target: float, flops: float) -> None:
    """Notes that `step` has left the device, with its target tokens (or examples) and FLOPs."""
    real, padded = self._tokens.pop(step, (0.0, 0.0))
    self._steps += 1
    self._real += real
    self._padded += padded
    self._target += target
    self._work += flops

  def exclude(self, seconds: float) -> None:
    self._out += seconds

  def seconds(self) -> float:
    """Returns the seconds since the last `reset`, without what was excluded."""
    return max(time.perf_counter() - self._since - self._out, 1e-9)

  def read(self, left: int) -> dict[str, float | None]:
    """Returns rates since the last `reset`, with the seconds that `left` steps will take, and starts again."""
    seconds = self.seconds()
    step_time = seconds / max(self._steps, 1)
    out = {f"{self._unit}_per_second": self._target / seconds} | dict(
      tokens_per_second=self._real / seconds,
      padded_tokens_per_second=self._padded / seconds,
      step_time=step_time,
      data_wait=min(self._wait / seconds, 1.0),
      mfu=self._work / seconds / self._peak if self._work and self._peak else None,
      eta=left * step_time,
    )
    self.reset()
    return out


def count_tokens(batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
  """Returns (real, all) token positions of a batch, from its leaves named `...segments` (0 is padding)."""
  segments: Iterable[np.ndarray] = [x for name, x in batch.items() if name.endswith("segments")]
  return sum(int(np.count_nonzero(x)) for x in segments), sum(x.size for x in segments)
