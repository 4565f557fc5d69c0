"""Contestants in turns: each a process that trains without a pause in its own loop and is stopped at step boundaries,
so that rounds alternate (ours, theirs, ours, ...) and all meet the same disturbances."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

MARK = "REPORT "  # begins the lines of a worker that the parent reads
PAUSE = 0.5  # seconds before a round, in which the last one's threads stop spinning
ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "accelerate", "peft", "numpy")


class Referee:
  """A worker's end of the pipe: `step` after each optimizer step; the worker sleeps in it between its rounds.

  The first step after such a sleep does not count: memory that a worker gave back meanwhile has to be found again,
  which a run without pauses has no part of.
  """

  def __init__(self, warmup: int, **facts):
    self.left, self.facts, self.waking = warmup, facts, False
    self._begin()

  def _begin(self) -> None:
    self.sums, self.start, self.cpu = {}, time.perf_counter(), time.process_time()

  @property
  def last(self) -> bool:
    """Whether the next step ends the round, or what does not count of it: then what is under way is waited for."""
    return self.waking or self.left == 1

  def step(self, loss: float | None = None, **counts: int) -> bool:
    """Adds a step and its counts; at the end of a round reports and waits for the next. False ends the worker."""
    if self.waking:
      self.waking = False
      self._begin()
      return True
    for name, value in counts.items():
      self.sums[name] = self.sums.get(name, 0) + int(value)
    self.left -= 1
    if self.left > 0:
      return True
    seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # Linux counts in KiB
    self.facts.setdefault("warm_seconds", seconds)
    report = dict(self.sums, seconds=seconds, cpu_seconds=cpu, loss=loss, peak_mib=peak, **self.facts)
    print(MARK + json.dumps(report), flush=True)
    order = sys.stdin.readline().strip()
    self.left, self.waking = int(order or 0), True
    return self.left > 0


class Worker:
  """A contestant's process."""

  def __init__(self, name: str, command: list[str], log: pathlib.Path):
    self.name, self.log = name, log
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="true")
    with log.open("w") as errors:
      self.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
      )

  def report(self) -> dict:
    for line in self.process.stdout:
      if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-4000:]}")

  def round(self, steps: int) -> dict:
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    return self.report()

  def end(self) -> None:
    self.process.stdin.close()  # the referee reads nothing and ends the training
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()


def compete(commands: dict[str, list[str]], rounds: int, steps: int) -> dict[str, list[dict]]:
  """Returns the reports of the rounds of every contestant (name -> the command of its process), run in turns; the order
  turns too."""
  workers, found = [], {name: [] for name in commands}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for name, command in commands.items():
        workers.append(Worker(name, command, pathlib.Path(folder) / f"{name}.log"))
        ready = workers[-1].report()
        size = ready["parameters"] / 1e6
        print(f"{name}: {size:.2f} M parameters, warm after {ready['seconds']:.0f} s", flush=True)
      for i in range(rounds):
        for w in workers[i % len(workers) :] + workers[: i % len(workers)]:
          time.sleep(PAUSE)
          found[w.name].append(w.round(steps))
        print(f"round {i + 1}: " + ", ".join(f"{n} {rate(r[-1]):,.0f} tokens/s" for n, r in found.items()), flush=True)
    finally:
      for w in workers:
        w.end()
  return found


def rate(report: dict) -> float:
  return report["tokens"] / report["seconds"]


def summarise(rounds: dict[str, list[dict]], steps: int) -> dict[str, dict]:
  """Returns medians over the rounds, and the ratio of our tokens a second to each of theirs, round by round."""
  out, sums = {}, ("examples", "tokens", "places", "seconds", "cpu_seconds")
  for name, reports in rounds.items():
    total = {k: sum(r[k] for r in reports) for k in sums}
    out[name] = dict(
      tokens_per_second=round(statistics.median(map(rate, reports)), 1),
      examples_per_second=round(statistics.median(r["examples"] / r["seconds"] for r in reports), 3),
      tokens_per_cpu_second=round(total["tokens"] / total["cpu_seconds"], 1),
      seconds_per_step=round(statistics.median(r["seconds"] for r in reports) / steps, 4),
      examples_per_step=round(total["examples"] / steps / len(reports), 2),
      real_share_of_places=round(total["tokens"] / total["places"], 4),
      peak_mib=max(r["peak_mib"] for r in reports),
      warm_seconds=reports[0]["warm_seconds"],
      parameters=reports[0]["parameters"],
      loss=[round(reports[i]["loss"], 4) for i in (0, -1)],
    )
  for ours in (n for n in rounds if n.startswith("jaxft")):
    for theirs in (n for n in rounds if not n.startswith("jaxft")):
      ratios = sorted(rate(a) / rate(b) for a, b in zip(rounds[ours], rounds[theirs]))
      out[ours].setdefault("ratio", {})[theirs] = dict(
        median=round(statistics.median(ratios), 3), lowest=round(ratios[0], 3), highest=round(ratios[-1], 3)
      )
  return out


def machine() -> dict:
  """Returns what the figures depend on besides the code."""
  info = pathlib.Path("/proc/cpuinfo")
  found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
  return dict(
    device="cpu",
    cpu=found[1] if found else platform.processor(),
    cores=os.cpu_count(),
    load_before=os.getloadavg(),
    python=platform.python_version(),
    versions={p: importlib.metadata.version(p) for p in PACKAGES},
  )
