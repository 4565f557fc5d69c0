"""Fills docs/performance.md and its picture from the files in benchmarks/results: python benchmarks/performance.py"""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS = "jaxft"
COLORS = ("#4269d0", "#6cc5b0", "#efb118", "#ff725c", "#9c6b4e", "#a463f2")
NAMES = {
  "trainer": "Trainer",
  "trainer-grouped": "Trainer, group_by_length",
  "trainer-compiled": "Trainer, torch.compile",
  "tunix": "Tunix",
  "easydel": "EasyDeL",
  "flax-t5": "FlaxT5 of transformers 4.44",
  OURS: OURS,
}


def read(name: str) -> dict | None:
  file = RESULTS / name
  return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
  line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
  return "\n".join([line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows)])


def said(found: dict, dates: Iterable[str], commands: Iterable[str], file: str) -> str:
  """Returns machine, versions, dates and commands of results, in a line."""
  versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k not in ("jaxlib", "numpy"))
  told = "; ".join(f"`{c}`" for c in sorted(set(commands)))
  return (
    f"{found['cpu']}, {found['cores']} cores, Python {found['python']}, {versions}; {', '.join(sorted(set(dates)))}; "
    f"{told}; `benchmarks/results/{file}`."
  )


def ratio(r: dict) -> str:
  return f"{r['median']:.2f} ({r['lowest']:.2f}-{r['highest']:.2f})"


def peers() -> str:
  """Returns the tables of training beside other trainers, and draws the picture."""
  found = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(RESULTS.glob("peers_*.json"))]
  cases, out, lost, others = {}, [], [], set()
  for file, of in found:
    for name, case in of["cases"].items():
      name = f"{name}, again" if name in cases else name
      cases[name] = case
      lines, slower, versions = beside(name, case)
      out += lines
      lost += slower
      others |= versions
    dates, commands = ([c[k] for c in of["cases"].values()] for k in ("date", "command"))
    out += [said(of, dates, commands, file.name), ""]
  out += [f"**Faster than jaxft here:** {'; '.join(lost)}." if lost else "No side is faster than jaxft here.", ""]
  out += ["real: share of the places that hold real tokens; warm-up: seconds of the steps before the first round,",
          "with all that is compiled for them.", *(f"{x}." for x in sorted(others))]  # fmt: skip
  if cases:
    picture(cases, DOCS / "pictures" / "performance.png")
  return "\n".join(out)


def beside(name: str, case: dict) -> tuple[list[str], list[str], set[str]]:
  """Returns (lines with the table of a case, who is faster than jaxft in it, versions of peers of another Python)."""
  ratios, rows, lost, others = case["summary"][OURS].get("ratio", {}), [], [], set()
  adapters = case.get("lora", 0)
  called = {n: x.replace("Trainer", "Trainer, PEFT") if adapters else x for n, x in NAMES.items()}
  size = case["summary"][OURS]["parameters"] / 1e6
  for side, s in case["summary"].items():
    own = s["parameters"] / 1e6
    odd = f" ({own:,.1f} M)" if abs(own / size - 1) > 0.05 else ""
    rows.append((
      called[side] + odd, f"{s['tokens_per_second']:,.0f}", f"{s['examples_per_second']:.1f}",
      f"{s['seconds_per_step']:.2f}", f"{s['real_share_of_places']:.0%}", f"{s['peak_mib']:,}",
      f"{s['warm_seconds']:.0f}", ratio(ratios[side]) if side in ratios else ""))  # fmt: skip
    own = case["rounds"][side][0].get("versions")
    others |= {f"{NAMES[side]} with {', '.join(f'{k} {v}' for k, v in own.items())}"} if own else set()
    if side in ratios and ratios[side]["median"] < 1:
      lost.append(f"{called[side]} on {name} (jaxft does {ratio(ratios[side])} of its tokens)")
  rank = f", adapters of rank {adapters} on all linear layers" if adapters else ""
  head = f"**{name}**, {case['kind']}, {size:,.1f} M parameters{rank}, {case['examples']} examples a step:"
  header = ("", "tokens/s", "examples/s", "s/step", "real", "peak MiB", "warm-up s", "jaxft / it")
  return [head, "", table(header, rows), ""], lost, others


def picture(cases: dict, file: pathlib.Path) -> None:
  """Draws the ratios, with their range, as bars."""
  sides = [s for s in NAMES if s != OURS and any(s in c["summary"][OURS].get("ratio", {}) for c in cases.values())]
  rows = [(name, s) for name, c in cases.items() for s in sides if s in c["summary"][OURS].get("ratio", {})]
  figure = Figure(figsize=(8, 0.3 * len(rows) + 1.1), layout="constrained")
  axes = figure.subplots()
  for y, (name, side) in enumerate(rows):
    r = cases[name]["summary"][OURS]["ratio"][side]
    ends = [[r["median"] - r["lowest"]], [r["highest"] - r["median"]]]
    axes.barh(y, r["median"], color=COLORS[sides.index(side)], height=0.72, xerr=ends, ecolor="#555", capsize=2)
    axes.text(max(r["highest"], 1) + 0.03, y, f"{r['median']:.2f}  {NAMES[side]}", va="center", fontsize=8)
  starts = {name: next(i for i, row in enumerate(rows) if row[0] == name) for name in cases}
  axes.set_yticks(list(starts.values()), list(starts), fontsize=9, fontweight="bold")
  axes.invert_yaxis()
  axes.axvline(1, color="black", linewidth=1)
  axes.set_xlabel("real tokens a second of jaxft, divided by those of the other (range over the rounds)", fontsize=9)
  axes.set_xlim(0, 1.35 * max(c["summary"][OURS]["ratio"][s]["highest"] for c in cases.values() for s in sides
                              if s in c["summary"][OURS]["ratio"]))  # fmt: skip
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.tick_params(axis="y", length=0)
  figure.savefig(file, dpi=110)


def bench() -> str:
  """Returns the tables of jaxft.bench."""
  out = []
  for file in sorted(RESULTS.glob("bench_*.json")):
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for name, r in found["summary"].items():
      target, stall, mfu = r["target_tokens_per_second"], r["save_stall_seconds"], r["mfu"]
      first = [x["first_step_seconds"] for x in found["rounds"][name]]
      rows.append((
        f"`{name}`", f"{1e3 * r['step_seconds']:,.0f}", f"{r['samples_per_second']:,.1f}",
        f"{r['tokens_per_second']:,.0f}", f"{r['padded_tokens_per_second']:,.0f}", f"{target:,.0f}" if target else "",
        f"{mfu:.0%}" if mfu else "", f"{r['peak_bytes'] / 2**30:.2f}", f"{r['compile_seconds']:.0f}",
        f"{r['data_wait']:.1%}", f"{stall:.2f}" if stall is not None else "", f"{first[0]:.0f}",
        f"{min(first[1:]):.0f}" if first[1:] else ""))  # fmt: skip
    header = ("case", "ms/step", "examples/s", "tokens/s", "padded", "target", "MFU", "peak GiB", "compile s",
              "data wait", "save s", "first step s", "warm s")  # fmt: skip
    one = next(iter(found["summary"].values()))
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("jax", "flax", "optax"))
    command = re.sub(r"(--config\.(model\.init|data\.\w+)=)\S+", r"\1FOLDER", found["command"])
    out += [
      table(header, rows), "",
      "first step: seconds from the command to the end of the first step, with nothing kept from before, and with",
      "tokens and programs kept (warm). MFU on a CPU is against a product that was measured in the same process.",
      f"Peak memory is that of the {one['peak_of']}. {one['devices']} x {one['device']}, {versions}; {found['date']};",
      f"`{command}`; `benchmarks/results/{file.name}`.", ""]  # fmt: skip
  return "\n".join(out).rstrip()


def trace() -> str:
  """Returns the tables of operations that traced runs have left."""
  out = []
  for file in sorted(RESULTS.glob("operations_*.txt")):
    out += [f"    {x}".rstrip() for x in file.read_text(encoding="utf-8").splitlines()]
  return "\n".join(out)


def reading() -> str:
  """Returns the table of making batches."""
  found = read("input_cpu.json")
  if not found:
    return ""
  rows = [
    (name, f"{c['tokens'] / 1e6:.1f} M", f"{c['tokenise_tokens_per_second'] / 1e6:.2f} M",
     f"{c['tokens_per_second'] / 1e6:.2f} M ({c['lowest'] / 1e6:.2f}-{c['highest'] / 1e6:.2f})")
    for name, c in found["cases"].items()]  # fmt: skip
  header = ("rows", "tokens", "tokenised a second", "real tokens a second from the cache")
  return "\n".join([table(header, rows), "", said(found, [found["date"]], [found["command"]], "input_cpu.json")])


def main() -> None:
  page = DOCS / "performance.md"
  text = page.read_text(encoding="utf-8")
  for name, of in dict(peers=peers, bench=bench, trace=trace, input=reading).items():
    head, rest = text.split(f"<!-- {name} -->\n")
    text = f"{head}<!-- {name} -->\n{of()}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
  page.write_text(text, encoding="utf-8")
  print(f"written: {page}")


if __name__ == "__main__":
  main()
