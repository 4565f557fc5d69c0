"""What a run leaves for people: RUN/report.html, one file with everything in it, RUN/curves.png, and the run card
RUN/README.md.

All of it is made from the run folder (metrics.jsonl, samples/*.jsonl) and from facts that the caller gives, and can be
made again.
"""

import base64
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import display, observe

COLORS = ("#1f5fa8", "#d1622b", "#3a8f5c", "#8a4fa3", "#b3902b", "#555555")
HIDDEN = ("seconds",)  # evaluation values that are no result
COUNTS = ("tokens", "examples")  # those that say how much was evaluated: no curve
SAME = ("word_perplexity", "byte_perplexity")  # whose curve is that of bits_per_byte, on another scale
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}img{max-width:100%}
table{border-collapse:collapse;font-size:.92em}
td,th{border:1px solid #ddd;padding:.3em .6em;text-align:left;vertical-align:top}
th{background:#f5f5f5}td{white-space:pre-wrap;overflow-wrap:anywhere}pre{background:#f5f5f5;padding:.8em;white-space:pre-wrap}"""


def curves(
  runs: Mapping[str, str | pathlib.Path],
  path: str | pathlib.Path | None = None,
  *,
  title: str = "",
  only: Sequence[str] = (),
) -> bytes:
  """Returns a PNG with the curves of `runs` (label -> run folder): loss, every evaluation metric, learning rate,
  throughput.

  With `path` it is written there too. Several runs share the panels. `only` names the panels wanted, by keys of
  metrics.jsonl such as "loss" (the evaluations' losses are with it) or "eval/bleu/sacrebleu". Without metrics the
  picture says so.
  """
  rows = {label: observe.read_metrics(folder) for label, folder in runs.items()}
  panels = [(name, keys) for name, keys in _panels(rows) if not only or set(keys) & set(only)]
  columns = min(len(panels), 3) or 1
  height = math.ceil(len(panels) / columns) or 1
  mpl = display.matplotlib()
  with mpl.rc_context(
    {
      "font.size": 9,
      "axes.spines.top": False,
      "axes.spines.right": False,
      "axes.titlesize": 10,
      "axes.titleweight": "bold",
      "axes.titlelocation": "left",
    }
  ):
    figure = mpl.figure.Figure(figsize=(4.2 * columns, 2.9 * height + 0.3), layout="constrained")
    for i, (name, keys) in enumerate(panels):
      _panel(figure.add_subplot(height, columns, i + 1), name, keys, rows)
    if not panels:
      figure.text(0.5, 0.5, "no metrics yet", ha="center")
    if title:
      figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
  if path is not None:
    _write(pathlib.Path(path), out.getvalue())
  return out.getvalue()


def _panels(rows: Mapping[str, Sequence[Mapping]]) -> list[tuple[str, list[str]]]:
  """Returns (title, keys) of the panels for which there is something to show."""
  largest: dict[str, float] = {}
  for run in rows.values():
    for row in run:
      for k, v in row.items():
        if isinstance(v, (int, float)):
          largest[k] = max(largest.get(k, -math.inf), v)
  evals = sorted(k for k in largest if k.startswith("eval/") and k.rsplit("/")[-1] not in (*HIDDEN, *COUNTS, *SAME))
  losses = [k for k in evals if k.endswith("/loss")]
  rates = ("padded_tokens_per_second", "tokens_per_second", "target_tokens_per_second")
  panels = [("loss", ["loss", *losses])] + [(_metric_title(k), [k]) for k in evals if k not in losses]
  panels += [("gradient norm", ["grad_norm"]), ("learning rate", ["learning_rate"])]
  panels += [("examples per second", ["examples_per_second"])]
  panels += [("tokens per second", list(rates) if len(rows) == 1 else ["tokens_per_second"]), ("MFU", ["mfu"])]
  panels += [("time waiting for data", ["data_wait"])] if largest.get("data_wait", 0) > 0.05 else []
  return [(name, found) for name, keys in panels if (found := [k for k in keys if k in largest])]


def _metric_title(key: str) -> str:
  _, name, metric = key.split("/", 2)
  return f"{metric} ({name})"


def _panel(axes: Any, name: str, keys: Sequence[str], rows: Mapping[str, Sequence[Mapping]]) -> None:
  low, high, drawn, ticks = [], [], 0, display.matplotlib().ticker
  for i, (label, run) in enumerate(rows.items()):
    for j, key in enumerate(keys):
      points = [(r["step"], r[key]) for r in run if isinstance(r.get(key), (int, float))]
      if points:
        y = _curve(
          axes,
          key,
          np.array(points, float).T,
          COLORS[(i if len(rows) > 1 else j) % len(COLORS)],
          _label(label, key, len(rows), len(keys)),
          dashed=len(rows) > 1 and j > 0,
          value=len(keys) == 1,
        )
        low, high, drawn = [*low, np.min(y)], [*high, np.max(y)], drawn + 1
  axes.set_title(name)
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(ticks.MaxNLocator(5, integer=True))
  axes.grid(alpha=0.25)
  axes.margins(y=0.15)
  if (
    (name.startswith(("loss", "gradient norm")) or "perplexity" in name)
    and low
    and min(low) > 0
    and max(high) / min(low) > 20
  ):
    axes.set_yscale("log")
  elif name in ("tokens per second", "time waiting for data", "MFU") or (
    low and 0 <= min(low) < 0.3 * max(high) and not name.startswith(("loss", "learning rate"))
  ):
    axes.set_ylim(0, 1.15 * max([*high, 1e-3]))
  if name == "tokens per second":
    axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}"))
  if name in ("time waiting for data", "MFU"):
    axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda v, _: f"{v:.0%}"))
  if drawn > 1:
    axes.legend(frameon=False, fontsize=8, loc="upper right" if name.startswith("loss") else "best")


def _curve(axes: Any, key: str, points: np.ndarray, color: str, label: str, *, dashed: bool, value: bool) -> np.ndarray:
  """Draws points [2, N] and returns the y values of the line; `value` writes the last one of an evaluation beside
  it."""
  x, y = points
  measured = key.startswith("eval/")
  if (
    len(x) > 60 and not measured and key != "learning_rate"
  ):  # single steps are noisy: pale, with a running median on top
    axes.plot(x, y, color=color, alpha=0.22, lw=0.8)
    y = _smooth(y)
  axes.plot(
    x,
    y,
    color=color,
    lw=1.6,
    ls="--" if dashed else "-",
    marker="o" if measured or len(x) < 3 else None,
    ms=3.5,
    label=label,
  )
  if measured and value:
    axes.annotate(
      f"{y[-1]:.4g}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 6), ha="right", color=color, fontsize=8
    )
  return y


def _label(run: str, key: str, runs: int, keys: int) -> str:
  short = {
    "loss": "train",
    "tokens_per_second": "real",
    "padded_tokens_per_second": "with padding",
    "target_tokens_per_second": "target",
  }
  part = short.get(key, "eval " + key.removeprefix("eval/").removesuffix("/loss"))
  return run if keys == 1 else part if runs == 1 else f"{run}, {part}"


def _smooth(y: np.ndarray) -> np.ndarray:
  half = max(len(y) // 40, 2)
  return np.array([np.median(y[max(i - half, 0) : i + half + 1]) for i in range(len(y))])


def final_metrics(folder: str | pathlib.Path) -> dict[str, tuple[Any, Any, int]]:
  """Returns {name: (first, last, step of the last)} of the loss and of every evaluation metric."""
  out: dict[str, tuple] = {}
  for row in observe.read_metrics(folder):
    for k, v in row.items():
      if (k == "loss" or k.startswith("eval/")) and k.rsplit("/")[-1] not in HIDDEN and v is not None:
        out[k] = (out[k][0] if k in out else v, v, row["step"])
  return out


def samples(folder: str | pathlib.Path, most: int = 12) -> dict[str, list[dict[str, Any]]]:
  """Returns {file name: rows} of the first and the last file of each evaluation in folder/samples.

  Files are NAME-STEP.jsonl, with an object a line; `most` rows of each are taken.
  """
  groups: dict[str, list[tuple[int, pathlib.Path]]] = {}
  for path in sorted(pathlib.Path(folder, "samples").glob("*.jsonl")):
    name, _, step = path.stem.rpartition("-")
    groups.setdefault(name or path.stem, []).append((int(step) if step.isdigit() else 0, path))
  out = {}
  for found in groups.values():
    found.sort()
    for path in dict.fromkeys(p for _, p in (found[0], found[-1])):
      lines = path.read_text(encoding="utf-8").splitlines()[:most]
      out[path.stem] = [row if isinstance(row, dict) else dict(output=row) for row in map(json.loads, lines)]
  return out


def before_and_after(folder: str | pathlib.Path, most: int) -> dict[str, list[dict[str, str]]]:
  """Returns {evaluation: rows of texts} from folder/samples: input, reference, and the output at its first and last
  step; where the rows are of labels, which differ from step to step, those of the last."""
  files = sorted(samples(folder).items(), key=lambda item: int(item[0].rpartition("-")[2].removesuffix(".jsonl")))
  out: dict[str, dict] = {}
  for file, rows in files:
    name, _, step = file.removesuffix(".jsonl").rpartition("-")
    if rows and "predicted" in rows[0]:
      out[name] = {i: {k: str(v) for k, v in row.items() if k != "id"} for i, row in enumerate(rows[:most])}
      continue
    for row in rows[:most]:
      shown = out.setdefault(name, {}).setdefault(row["id"], {"input": row["input"], "reference": row["reference"]})
      shown[f"step {step}"] = row["output"]
  return {name: list(rows.values()) for name, rows in out.items()}


def write(folder: str | pathlib.Path, *, title: str, command: str, facts: Mapping[str, Any]) -> None:
  """Writes report.html, curves.png and README.md into the run folder.

  facts: section title -> text, a dict (shown as a table of two columns) or a list of dicts (a table); such as what
  differs from the default config, the data report, the outcome. Environment and versions are added here.
  """
  folder = pathlib.Path(folder)
  picture = curves({"run": folder}, folder / "curves.png")
  results = [
    {"metric": k, "first": _number(a), "last": _number(b), "at step": s}
    for k, (a, b, s) in final_metrics(folder).items()
  ]
  sections = {"Results": results, **facts, "Hardware and versions": _flat(observe.environment())}
  shown = {f"Samples: {name}": rows for name, rows in samples(folder).items()}
  found = sorted((folder / "samples").glob("*.png"))  # of evaluations, such as confusion matrices
  pictures = {"curves": picture, **{path.stem: path.read_bytes() for path in found}}
  _write(folder / "report.html", observe.redact(_html(title, command, pictures, {**sections, **shown})).encode())
  _write(folder / "README.md", observe.redact(_card(title, command, sections, [p.stem for p in found])).encode())


def _html(title: str, command: str, pictures: Mapping[str, bytes], sections: Mapping[str, Any]) -> str:
  body = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(command)}</pre>"]
  for name, data in pictures.items():
    body.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
  for name, value in sections.items():
    body.append(f"<h2>{html.escape(name)}</h2>")
    header, rows = _table(value)
    if rows is None:
      body.append(f"<pre>{html.escape(str(value))}</pre>")
      continue
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
    body.append(
      "<table>" + (cells("th", header) if header else "") + "".join(cells("td", r) for r in rows) + "</table>"
    )
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n'
    + "\n".join(body)
    + "</html>\n"
  )


def _card(title: str, command: str, sections: Mapping[str, Any], pictures: Sequence[str]) -> str:
  links = ["![curves](curves.png)", *(f"![{name}](<samples/{name}.png>)" for name in pictures)]
  out = [f"# {title}", "", "```", command, "```", ""]
  out += [line for link in links for line in (link, "")] + ["Samples and the same figures: `report.html`.", ""]
  for name, value in sections.items():
    out += [f"## {name}", ""]
    header, rows = _table(value)
    if rows is None:
      out += [str(value), ""]
      continue
    clean = lambda row: "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |"
    out += [clean(header or [""] * len(rows[0])), "|" + "---|" * len(header or rows[0])] if rows else ["none"]
    out += [*map(clean, rows), ""]
  return "\n".join(out)


def _table(value: Any) -> tuple[list[str], list[list[str]] | None]:
  """Returns (header, rows) of text for a dict or a list of dicts; rows is None for anything else."""
  if isinstance(value, Mapping):
    return [], [[str(k), _text(v)] for k, v in _flat(value).items()]
  if isinstance(value, (list, tuple)) and all(isinstance(r, Mapping) for r in value):
    header = list(dict.fromkeys(k for r in value for k in r))
    return header, [[_text(r.get(k, "")) for k in header] for r in value]
  return [], None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  out = {}
  for k, v in value.items():
    out.update(_flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {f"{prefix}{k}": v})
  return out


def _text(value: Any) -> str:
  return (
    value
    if isinstance(value, str)
    else _number(value)
    if isinstance(value, float)
    else json.dumps(value, ensure_ascii=False, default=str)
  )


def _number(value: Any) -> str:
  return f"{value:.5g}" if isinstance(value, float) else str(value)


def _write(path: pathlib.Path, data: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_name(f".{path.name}.tmp")
  fresh.write_bytes(data)
  os.replace(fresh, path)
