"""What the trials of a sweep have come to: tables for people and programs, and pictures."""

import base64
import dataclasses
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import display, observe, report
from jaxft.space import Range, Space

COLORS = dict(done="#1f5fa8", pruned="#b3902b", failed="#b03030", best="#d1622b", pale="#9db4cc")
WIDTH = 100  # columns of a table
ROWS = 40  # of the table in the terminal
MANY = 8  # values of a list beside each other in a picture


@dataclasses.dataclass
class Trial:
  number: int
  values: dict[str, Any]  # path in the config -> value
  state: str = "running"  # running, done, pruned or failed
  metric: float | None = None  # the best of `evals`
  step: int | None = None  # where that is
  seconds: float = 0.0  # of the process that ended it
  evals: list = dataclasses.field(default_factory=list)  # (step, metric) in order, from step 1
  note: str = ""

  def says(self) -> str:
    """Returns the values in a few words."""
    return " ".join(f"{k}={value(v)}" for k, v in zip(names(list(self.values)), self.values.values()))

  def take(self, found: Sequence[tuple[int, float]], mode: str) -> None:
    """Takes the evaluations of a run that has ended; one without any has failed."""
    self.evals = [list(e) for e in found]
    if found:
      self.step, self.metric = (max if mode == "max" else min)(found, key=lambda e: e[1])
    elif self.state == "done":
      self.state, self.note = "failed", "the metric was never a finite number"


def evals(folder: pathlib.Path, metric: str) -> list[tuple[int, float]]:
  """Returns (step, value) of a metric in the metrics of a run, from step 1, where it is a number."""
  rows = observe.read_metrics(folder)
  return [(r["step"], r[metric]) for r in rows if r["step"] and r.get(metric) is not None]


def best(trials: Sequence[Trial], mode: str) -> Trial | None:
  """Returns the best trial of those that are done, the first of equals."""
  sign = -1 if mode == "max" else 1
  return min((t for t in trials if t.state == "done"), key=lambda t: sign * t.metric, default=None)


def value(x: Any) -> str:
  """Returns a value in few characters."""
  return f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)


def short(metric: str) -> str:
  return metric.removeprefix("eval/")


def names(axes: Sequence[str]) -> list[str]:
  """Returns the last part of each path, or the path where another ends alike."""
  last = [a.split(".")[-1] for a in axes]
  return [x if last.count(x) == 1 else a for a, x in zip(axes, last)]


def table(trials: Sequence[Trial], what: Space) -> str:
  """Returns the trials as a table of at most 100 columns, the best ones first."""
  first = best(trials, what.mode)
  sign = -1 if what.mode == "max" else 1
  order = sorted(trials, key=lambda t: (t.state != "done", t.metric is None, sign * (t.metric or 0.0), t.number))
  axes = list(what.axes)
  end = lambda t: (value(t.metric), value(t.step), "best" if t is first else t.state, f"{t.seconds:.1f}")
  header = ["trial", *names(axes), short(what.metric), "best step", "state", "seconds"]
  rows = [[str(t.number), *(value(t.values[a]) for a in axes), *end(t)] for t in order[:ROWS]]
  wide = [max(len(r[i]) for r in [header, *rows]) + 2 for i in range(len(header))]
  if sum(wide) > WIDTH - 4:  # one column for all the values, which may go on in the next line
    header = ["trial", *header[1 + len(axes) :]]
    rows = [[f"{t.number:<3} {t.says()}", *end(t)] for t in order[:ROWS]]
  more = f"\n{len(order) - ROWS} more are in sweep.jsonl." if len(order) > ROWS else ""
  return display.table("Trials", header, rows) + more


def write(home: pathlib.Path, trials: Sequence[Trial]) -> None:
  """Writes home/sweep.jsonl: a trial a line, with its values under their paths."""
  rows = [
    dict(trial=t.number, **t.values, **{k: getattr(t, k) for k in ("metric", "step", "state", "seconds", "note")})
    for t in trials
  ]
  _write(home / "sweep.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())


def _write(path: pathlib.Path, data: bytes) -> None:
  fresh = path.with_name(f".{path.name}.tmp")
  fresh.write_bytes(data)
  os.replace(fresh, path)


def picture(home: pathlib.Path, trials: Sequence[Trial], what: Space) -> None:
  """Writes home/sweep.png and, with it and a table, home/sweep.html."""
  panels = [_history, _learning, *(lambda ax, t, w, a=a: _parameter(ax, t, w, a) for a in what.axes)]
  columns = min(len(panels), 3)
  rows = math.ceil(len(panels) / columns)
  look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
          "axes.titleweight": "bold", "axes.titlelocation": "left"}  # fmt: skip
  mpl = display.matplotlib()
  with mpl.rc_context(look):
    figure = mpl.figure.Figure(figsize=(4.2 * columns, 3.0 * rows + 0.5), layout="constrained")
    for i, draw in enumerate(panels):
      draw(figure.add_subplot(rows, columns, i + 1), trials, what)
    figure.suptitle(f"{short(what.metric)} ({what.mode}) of {len(trials)} trials by {what.method}", x=0.01, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
  _write(home / "sweep.png", out.getvalue())
  _write(home / "sweep.html", observe.redact(_html(home.name, out.getvalue(), trials, what)).encode())


def _marks(axes: Any, x: Mapping[int, float], trials: Sequence[Trial], what: Space, *, legend: bool = False) -> None:
  """Draws a mark for each trial at x[number], the best one larger; one without a metric stands at the lower edge."""
  first = best(trials, what.mode)
  looks = dict(
    done=dict(marker="o", facecolors=COLORS["done"]),
    pruned=dict(marker="v", facecolors="none"),
    failed=dict(marker="X"),
  )
  for state, look in looks.items():
    some = [t for t in trials if t.state == state and t is not first]
    look |= dict(edgecolors=COLORS[state], s=26, zorder=3)
    for there in (True, False):
      these = [t for t in some if (t.metric is not None) == there]
      y = [t.metric if there else 0.02 for t in these]
      where = {} if there else dict(transform=axes.get_xaxis_transform())
      if these:
        axes.scatter([x[t.number] for t in these], y, label=state, **look, **where)
  if first is not None:
    axes.scatter([x[first.number]], [first.metric], s=80, marker="*", color=COLORS["best"], label="best", zorder=4)
  axes.grid(alpha=0.25)
  axes.margins(0.08)
  if legend:
    axes.legend(frameon=False, fontsize=8)


def _history(axes: Any, trials: Sequence[Trial], what: Space) -> None:
  _marks(axes, {t.number: t.number for t in trials}, trials, what, legend=True)
  so_far = [b.metric if (b := best(trials[: i + 1], what.mode)) else math.nan for i in range(len(trials))]
  axes.step(range(len(trials)), so_far, where="post", color=COLORS["best"], lw=1.2, zorder=2)
  axes.set_title("trials, and the best so far")
  axes.set_xlabel("trial")
  axes.xaxis.set_major_locator(display.matplotlib().ticker.MaxNLocator(6, integer=True))


def _learning(axes: Any, trials: Sequence[Trial], what: Space) -> None:
  first = best(trials, what.mode)
  for t in sorted(trials, key=lambda t: t is first):
    color = COLORS["best"] if t is first else COLORS["pruned"] if t.state == "pruned" else COLORS["pale"]
    if t.evals:
      x, y = np.array(t.evals, float).T
      axes.plot(x, y, color=color, lw=2 if t is first else 1, marker="o", ms=2.5)
  axes.set_title("on the way")
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(display.matplotlib().ticker.MaxNLocator(5, integer=True))
  axes.grid(alpha=0.25)


def _parameter(axes: Any, trials: Sequence[Trial], what: Space, axis: str) -> None:
  """The metric over one parameter; values of a list stand side by side in its order, unless they are many numbers."""
  kind = what.axes[axis]
  if isinstance(kind, Range) or (len(kind) > MANY and all(type(v) in (int, float) for v in kind)):
    x = {t.number: t.values[axis] for t in trials}
    if getattr(kind, "kind", "") == "log":
      axes.set_xscale("log")
  else:
    keys = [json.dumps(v, default=list) for v in kind]
    shift = lambda t: 0.3 * ((t.number * 0.618) % 1 - 0.5)  # so that equal ones do not hide each other
    x = {t.number: keys.index(json.dumps(t.values[axis], default=list)) + shift(t) for t in trials}
    axes.set_xticks(range(len(kind)), [value(v)[:16] for v in kind])
    axes.set_xlim(-0.5, len(kind) - 0.5)
  _marks(axes, x, trials, what)
  axes.set_title(axis)


def _html(name: str, png: bytes, trials: Sequence[Trial], what: Space) -> str:
  cell = lambda tag, x: f"<{tag}>{html.escape(str(x))}</{tag}>"
  axes, first = list(what.axes), best(trials, what.mode)
  header = ["trial", *names(axes), short(what.metric), "best step", "state", "seconds", "note"]
  body = []
  for t in trials:
    row = [*(value(t.values[a]) for a in axes), value(t.metric), value(t.step), "best" if t is first else t.state]
    link = f'<td><a href="trial-{t.number:03d}/">{t.number}</a></td>'
    body.append(f"<tr>{link}{''.join(cell('td', x) for x in [*row, f'{t.seconds:.1f}', t.note[:200]])}</tr>")
  facts = "".join(f"<tr>{cell('td', k)}{cell('td', v)}</tr>" for k, v in what.json().items())
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
    f"<style>{report.STYLE}</style>\n<h1>Sweep {html.escape(name)}</h1>\n"
    f'<img alt="results" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
    f"<h2>Trials</h2><table><tr>{''.join(cell('th', x) for x in header)}</tr>{''.join(body)}</table>\n"
    f"<h2>What was tried</h2><table>{facts}</table></html>\n"
  )
