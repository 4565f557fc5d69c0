"""How far the tokenising is, for whoever waits."""

import logging
import sys
import time

import rich.progress

from jaxft.data.files import Meter

log = logging.getLogger("jaxft")


class Progress:
  """A bar on a terminal, a line every 10 s elsewhere; nothing at all for the first 3 s."""

  def __init__(self, meter: Meter):
    self.meter, self.bar = meter, None
    self.began = self.said = time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self.bar is not None:
      self.bar.stop()

  def update(self, rows: int) -> None:
    now = time.monotonic()
    if now - self.began < 3:
      return
    if sys.stderr.isatty():
      if self.bar is None:
        columns = rich.progress.Progress.get_default_columns()
        self.bar = rich.progress.Progress(*columns, "{task.fields[note]}", console=rich.console.Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task("tokenising", total=self.meter.total or None, note="")
      self.bar.update(self.task, completed=self.meter.done, note=f"{rows:,} rows, {rows / (now - self.began):,.0f}/s")
    elif now - self.said > 10:
      self.said = now
      share = f" ({self.meter.done / self.meter.total:.0%} of the files)" if self.meter.total else ""
      log.info("tokenising: %s rows%s, %s rows/s", f"{rows:,}", share, f"{rows / (now - self.began):,.0f}")
