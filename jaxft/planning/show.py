"""A plan as people read it: one screen of text, a table over targets, a picture of the memory."""

import io
from collections.abc import Mapping
from typing import NamedTuple

from jaxft import display, observe
from jaxft.display import gib, si, size
from jaxft.planning import plans
from jaxft.planning.estimate import KINDS, Estimate

NAMES = dict(
  parameters="parameters",
  frozen="frozen parameters",
  optimizer="optimizer state",
  batch="batch",
  gradients="gradients",
  logits="logits",
  activations="activations, work space",
)
COLORS = dict(zip(KINDS, ("#4269d0", "#97bbf5", "#efb118", "#9c6b4e", "#ff725c", "#3ca951", "#a463f2")))
WIDTH = 36  # characters of a whole device


class Run(NamedTuple):
  """What a run is beside its step."""

  steps: int  # 0: unknown
  price: float  # of a device and hour; 0: unknown
  saves: float  # checkpoints written; 0: unknown
  kept: int  # checkpoints on disk at a time
  disk: float  # bytes/s that checkpoints are written with
  decode: bool


def count(n: int) -> str:
  return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def screen(name: str, plan: plans.Plan, run: Run) -> str:
  """Returns the plan on one screen of at most 100 columns."""
  e = plan.estimate
  what = "new tokens" if run.decode else "tokens with padding"
  lines = [_title(name, e), "", *_memory(e), "", *_work(e, what), *_whole(e, run)]
  lines += [f"  assumed          {line}" for line in e.assumed]
  if plan.change:
    lines += ["", *_better(plan)]
  elif not e.fits:
    lines += ["", "  No change that was tried makes it fit. More devices (another --target), a smaller model, or a",
              "  frozen body (trainable) would."]  # fmt: skip
  return "\n".join(lines)


def _title(name: str, e: Estimate) -> str:
  mesh = " ".join(f"{k}={v}" for k, v in e.mesh.items())
  trained = f", {count(e.trained)} of them trained" if e.trained and e.trained != e.parameters else ""
  return (
    f"{name} on {e.target}: {e.devices} device{'s' if e.devices > 1 else ''} ({mesh}), "
    f"{count(e.parameters)} parameters{trained}"
  )


def verdict(e: Estimate) -> str:
  if not e.limit:
    return f"needs {size(e.total)} of the machine's memory, beside what Python and its libraries take"
  over = e.total - e.limit
  if e.fits:
    return f"fits: {gib(e.total)} of {gib(e.limit)} GiB a device ({e.total / e.limit:.0%})"
  return f"does NOT fit: {gib(e.total)} of {gib(e.limit)} GiB a device, {gib(max(over, 0))} GiB too much"


def _memory(e: Estimate) -> list[str]:
  whole = max(e.limit, e.total)
  bar = lambda n, mark: mark * round(WIDTH * n / whole) or "▏"
  out = [f"  It {verdict(e)}", "", "  memory of a device"]
  out += [f"  {NAMES[k]:<24} {size(e.memory[k]):>12}  {bar(e.memory[k], '█')}" for k in KINDS if e.memory[k]]
  if e.limit > e.total:
    out.append(f"  {'free':<24} {size(e.limit - e.total):>12}  {bar(e.limit - e.total, '░')}")
  return out


def _work(e: Estimate, what: str) -> list[str]:
  again = f" ({si(e.flops)} with what is computed again)" if e.flops > 1.01 * e.model_flops else ""
  out = [f"  work             {si(e.model_flops)}FLOPs{again}, {si(e.tokens)} {what}, {e.rows} rows"]
  if e.traffic and e.limit:
    out.append(f"  traffic          {si(e.traffic)}B through the memory of a device")
  if e.collectives:
    said = [f"{k} {si(b)}B in {si(n)}" for k, n, b in e.collectives]
    out.append(f"  between devices  {'; '.join(said)}")
  if not e.compiled:
    return [*out, "  The compiler gave up for want of memory: no times, no traffic."]
  alone = ", ".join(f"{k} {v:.3g} s" for k, v in e.seconds.items() if v)
  out.append(f"  each alone       {alone}")
  if e.step:
    name = "expected" if "compiler" in e.seconds else "at best"
    speed = f"{si(e.tokens / e.step)} tokens/s, MFU {e.mfu:.2f}"
    out += [f"  {name:<16} {e.step:.3g} s: {speed}", f"                   from {e.source}"]
  return out


def _whole(e: Estimate, run: Run) -> list[str]:
  out, hours = [], run.steps * e.step / 3600
  if run.decode:
    line = f"  an answer        {e.step:.3g} s for {e.rows} rows of {e.tokens // e.rows} new tokens"
    return [line] if e.compiled else []
  if run.steps and e.step and e.compiled:
    cost = f", {hours * e.devices * run.price:,.2f} at {run.price:g} a device and hour" if run.price else ""
    out.append(f"  whole run        {run.steps:,} steps: {observe.duration(hours * 3600)}{cost}")
  else:
    out.append("  whole run        unknown number of steps: give --config.steps=N, or --examples=N")
  hosts = _hosts(e)
  writing = run.saves * e.state / run.disk / hosts
  times = f"; {run.saves:,.0f} of them, {observe.duration(writing)} of writing beside the steps"
  often = times if run.saves >= 1 else ""
  out.append(f"  disk             {size(e.state)} a checkpoint, {size(e.state * run.kept)} kept at a time{often}")
  out.append(
    f"  memory of a host {size(e.state / hosts + 2 * 2**30)}: its part of a checkpoint while it is written, and 2 GiB"
    "\n                   for Python and the input pipeline"
  )
  return out


def _hosts(e: Estimate) -> int:
  return 1 if e.devices <= 8 and not e.target.startswith("v5p") else max(1, e.devices // _of_a_host(e.target))


def _of_a_host(target: str) -> int:
  return 4 if target.startswith("v") else 8


def _better(plan: plans.Plan) -> list[str]:
  change, e = plan.change, plan.after
  kind = "leaves every number of the run as it is" if change.same else "changes the result"
  return [
    f"  What {verdict(e)}, and {kind}:",
    "",
    f"      {change.text()}",
    "",
    f"  It costs: {change.cost}. Expected {e.step:.3g} s a step, {si(e.tokens / e.step) if e.step else '?'} tokens/s.",
  ]


def table(found: Mapping[str, plans.Plan | str], run: Run) -> str:
  """Returns the table over targets; a text in place of a plan says why there is none."""
  rows, notes = [], []
  for name, plan in found.items():
    if isinstance(plan, str):
      notes.append(f"  {name}: {plan}")
      continue
    e = plan.after or plan.estimate
    hours = run.steps * e.step / 3600
    rows.append((
      name, e.devices, f"{gib(e.total)}/{gib(e.limit)}" if e.limit else gib(e.total), "yes" if e.fits else "no",
      f"{e.step:.3g}" if e.compiled and e.step else "-", si(e.tokens / e.step) if e.compiled and e.step else "-",
      f"{e.mfu:.2f}" if e.compiled else "-", f"{hours:,.1f}" if run.steps and e.compiled else "-",
      f"{hours * e.devices * run.price:,.2f}" if run.price and run.steps and e.compiled else "-"))  # fmt: skip
    if plan.change:
      notes.append(f"  {name}: with {plan.change.text()}")
  header = ("target", "devices", "GiB", "fits", "s/step", "tokens/s", "MFU", "hours", "cost")
  return "\n".join([display.table("Targets", header, rows), *notes])


def picture(found: Mapping[str, Estimate], title: str) -> bytes:
  """Returns a PNG: a bar for each target, its memory by kind, and what the device has."""
  mpl = display.matplotlib()
  with mpl.rc_context({"font.size": 9}):
    figure = mpl.figure.Figure(figsize=(8, 1.5 + 0.42 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    names = list(found)
    left = [0.0] * len(names)
    for kind in KINDS:
      sizes = [found[n].memory[kind] / 2**30 for n in names]
      if any(sizes):
        axes.barh(names, sizes, left=left, height=0.6, color=COLORS[kind], label=NAMES[kind])
        left = [a + b for a, b in zip(left, sizes)]
    for i, n in enumerate(names):
      limit = found[n].limit / 2**30
      if limit:
        axes.plot([limit, limit], [i - 0.42, i + 0.42], color="black", linewidth=1.6)
        axes.text(limit, i - 0.44, f" {limit:.0f} GiB", ha="left", va="center", fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max([*left, *(e.limit / 2**30 for e in found.values())]))
    axes.set_xlabel("GiB of a device (black: what it has)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
  return out.getvalue()
