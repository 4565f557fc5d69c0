"""What jaxft.plan says beside what happens: python benchmarks/plan_check.py [--cases t5 bert-base ...] [--write_docs]

Each case is planned for the device that is here and then run for three steps, with fresh weights and made-up tokens, in
a process of its own. On a CPU the peak is that of the process above what it had before the state was made (the
program is compiled before); on a GPU it is the allocator's. Results go to benchmarks/results/plan_check_DEVICE.json,
and with --write_docs the table into docs/plan.md.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CASES = {  # name: (config, changes)
  "starter T5, default run": ("t5.py", {}),
  "t5-small 256/256": ("t5.py:t5-small", {"batch": 8}),
  "t5-small, 4 micro-batches": ("t5.py:t5-small", {"batch": 8, "micro": 4}),
  "t5-small, Adafactor, remat block": ("t5.py:t5-small", {"batch": 8, "model.remat": "block"}),
  "BERT-base 128, classify": ("bert_mrpc.py", {}),
  "BERT-base, frozen body": ("bert_frozen_head.py", {}),
  "BERT-base, masked words": ("bert_mlm_nsp.py:mlm", {"batch": 8}),
  "GPT-2 1024": ("gpt2_lm.py", {"batch": 2}),
  "Qwen 2.5 0.5B 2048, remat": ("qwen_sft.py", {"batch": 1, "optimizer.name": "adafactor"}),
}


def measure(config: str, changes: dict) -> dict:
  """Runs three steps in this process and returns what they took."""
  import runpy

  import jax
  import numpy as np

  from jaxft import config as configs
  from jaxft import programs
  from jaxft.planning import build, estimate, targets
  from jaxft.train import step

  file, _, arg = config.partition(":")
  c = runpy.run_path(str(ROOT / "configs" / file))["get_config"](arg)
  c.steps = 1000
  for path, value in changes.items():
    group = c
    for name in path.split(".")[:-1]:
      group = group[name]
    group[path.split(".")[-1]] = value
  configs.check(c)
  device = jax.devices()[0]
  if device.platform == "cpu":
    target = targets.parse("cpu")
  else:
    kind = next(k for k, chip in targets.CHIPS.items() if chip.kind in device.device_kind.lower())
    target = targets.Target(kind, device.platform, 1, targets.CHIPS[kind], "")
  programs.keep(os.environ.get("JAXFT_PLAN_CHECK_CACHE", ""))
  built = build.train_step(configs.Reader(c), [device])
  said = estimate.make(built, target, device)
  compiled = build.lower(built).compile()
  before = _rss("VmRSS")
  params = step.init_params(built.model.skeleton.init, 0, built.model.shardings)
  state = step.init_state(params, 0, built.tx, built.state)
  del params
  batch = build.made_up(built.model, built.batch)
  numbers = {k: np.float32(1e-4) for k in built.args[2]}
  jax.block_until_ready(state)
  pathlib.Path("/proc/self/clear_refs").write_text("5") if device.platform == "cpu" else None
  seconds = []
  for _ in range(3):
    begun = time.perf_counter()
    state, metrics = compiled(state, jax.device_put(batch, built.args[1]["inputs"].sharding), numbers)
    loss = float(metrics["loss"])
    seconds.append(time.perf_counter() - begun)
  peak = _rss("VmHWM") - before if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]
  assert np.isfinite(loss), loss
  return dict(
    planned=said.total, measured=peak, step=min(seconds), bound=said.step, flops=said.flops, device=device.device_kind,
    memory=said.memory, platform=device.platform)  # fmt: skip


def _rss(key: str) -> int:
  found = re.search(rf"{key}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
  return int(found.group(1)) * 1024


def table(rows: dict) -> str:
  lines = ["| case | plan, MiB | peak, MiB | peak / plan | step, s | bound, s |", "|---|---:|---:|---:|---:|---:|"]
  for name, r in rows.items():
    lines.append(
      f"| {name} | {r['planned'] / 2**20:,.0f} | {r['measured'] / 2**20:,.0f} | {r['measured'] / r['planned']:.2f} | "
      f"{r['step']:.2f} | {r['bound']:.2f} |"
    )
  return "\n".join(lines)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__)
  p.add_argument("--cases", nargs="*", default=list(CASES))
  p.add_argument("--one", default="")
  p.add_argument("--write_docs", action="store_true")
  a = p.parse_args()
  if a.one:
    print("RESULT " + json.dumps(measure(*CASES[a.one])))
    return
  import jax

  rows, device = {}, ""
  for name in a.cases:
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, env=os.environ)
    found = re.search(r"RESULT (.*)", done.stdout)
    if not found:
      print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
      continue
    rows[name] = json.loads(found.group(1))
    device = rows[name]["platform"]
    r = rows[name]
    print(f"{name}: plan {r['planned'] / 2**20:,.0f} MiB, peak {r['measured'] / 2**20:,.0f} MiB", flush=True)
  out = dict(
    command="python " + " ".join(["benchmarks/plan_check.py", *sys.argv[1:]]), date=time.strftime("%Y-%m-%d"),
    device=next(iter(rows.values()))["device"], cores=os.cpu_count(), jax=jax.__version__, rows=rows)  # fmt: skip
  RESULTS.mkdir(exist_ok=True)
  file = RESULTS / f"plan_check_{device}.json"
  if file.exists():  # what was measured before with the same versions on the same device stays
    old = json.loads(file.read_text())
    if (old["jax"], old["device"]) == (out["jax"], out["device"]):
      out["rows"] = {k: r for k in CASES if (r := {**old["rows"], **rows}.get(k))}
  rows = out["rows"]
  file.write_text(json.dumps(out, indent=1) + "\n")
  print(table(rows))
  if a.write_docs:
    write_docs()


def write_docs() -> None:
  """Puts the tables of all result files between the marks in docs/plan.md."""
  page = ROOT / "docs" / "plan.md"
  parts = []
  for file in sorted(RESULTS.glob("plan_check_*.json")):
    found = json.loads(file.read_text())
    said = f"{found['device']}, {found['cores']} cores, jax {found['jax']}, {found['date']}, `{found['command']}`"
    parts.append(f"{said}:\n\n{table(found['rows'])}")
  text = page.read_text(encoding="utf-8")
  begin, end = "<!-- plan_check -->\n", "<!-- end -->"
  head, rest = text.split(begin)
  page.write_text(head + begin + "\n".join(parts) + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
  main()
