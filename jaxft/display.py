"""What people look at in a terminal: tables, and progress of work that is counted. Logs lines where there is no
terminal.
"""

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.progress
import rich.table

from jaxft import observe

log = logging.getLogger("jaxft")
SECONDS = 10.0  # between two lines where there is no terminal


def matplotlib() -> Any:
  """Returns matplotlib with its figures, colours and ticks. Importing it takes a second, so that happens when something
  is drawn."""
  import matplotlib.colors
  import matplotlib.figure
  import matplotlib.ticker

  return matplotlib


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Returns a table as text of at most 100 columns; the first column stands left, numbers stand right."""
  out = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="")
  for i, name in enumerate(header):
    out.add_column(name, justify="right" if i else "left")
  for row in rows:
    out.add_row(*map(_cell, row))
  console = rich.console.Console(width=100, no_color=True)
  with console.capture() as text:
    console.print(out)
  return "\n".join(line.rstrip() for line in text.get().rstrip().splitlines())


def examples(title: str, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns rows of name -> text, one under the other, each name in a column of its own; long texts end with dots."""
  wide = max(len(name) for row in rows for name in row)
  short = lambda text: text if len(text) <= 96 - wide else text[: 93 - wide] + "..."
  blocks = ("\n".join(f"  {name:<{wide}}  {short(text)}" for name, text in row.items()) for row in rows)
  return f"{title}\n\n" + "\n\n".join(blocks)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return (
      f"{value:,.0f}"
      if value.is_integer() and abs(value) >= 1000
      else f"{value:,.4f}"
      if abs(value) < 1e6
      else f"{value:.3g}"
    )
  return f"{value:,}" if isinstance(value, int) else str(value)


def gib(n: float) -> str:
  """Returns bytes in GiB, as a number alone."""
  return f"{n / 2**30:,.2f}" if n < 100 * 2**30 else f"{n / 2**30:,.0f}"


def size(n: float) -> str:
  """Returns bytes in GiB or MiB."""
  return f"{gib(n)} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def si(n: float) -> str:
  """Returns a number in three digits and a prefix: 1234567 is 1.23M."""
  power = min(int(math.log10(n) // 3), 6) if n >= 1 else 0
  return f"{n / 10 ** (3 * power):.3g}{' kMGTPE'[power].strip()}"


class Bar:
  """Rows done, rows a second and the time left: a bar on a terminal, elsewhere a line every 10 s and at the end.

  Nothing is shown in the first `quiet` seconds, nor of work that ends in them. Not `live`: lines on a terminal too,
  where another bar is on it.
  """

  def __init__(self, name: str, *, quiet: float = 0.0, live: bool = True):
    self._name, self._quiet = name, quiet
    self._live = live and sys.stderr.isatty()
    self._begun = self._said = time.monotonic()
    self._first, self._bar, self._task = None, None, None

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    first = self._first is None
    if first:
      self._first, self._begun = done, now
    if jax.process_index() or (self._bar is None and self._said == self._begun and now - self._begun < self._quiet):
      return
    rate = (done - self._first) / max(now - self._begun, 1e-9)
    text = f"{rate:,.1f} rows/s, {observe.duration((total - done) / rate)} left" if rate else "compiling"
    if self._live:
      self._draw(done, total, text)
    elif first or done == total or now - self._said >= SECONDS:
      self._said = now
      log.info("%s %d/%d  %s", self._name, done, total, text)

  def _draw(self, done: int, total: int, text: str) -> None:
    if self._bar is None:
      columns = [
        rich.progress.TextColumn(self._name),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
      ]
      self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
      self._task = self._bar.add_task(self._name, total=total, text=text)
      self._bar.start()
    self._bar.update(self._task, completed=done, text=text)
    if done == total:
      self._bar.stop()
