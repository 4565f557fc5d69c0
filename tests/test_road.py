"""The whole road by its binaries: train, kill, resume, evaluate, decode, export, on one and on several devices and processes.

Catches: state that is not saved or not restored (bitwise comparison after kill -9), batches that depend on the number of hosts or devices,
an evaluation that differs between a run and its export, an error that leaves a traceback or the wrong exit code, a config key nobody reads.
"""

import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "road_config.py"
WORDS = "the old harbour sleeps under seven small stars while winter rain keeps falling on red roofs".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  home = tmp_path_factory.mktemp("road")
  for name, n, skip in (("train", 60, 0), ("dev", 9, 5)):
    rows = [" ".join(WORDS[(i * 7 + skip + j) % len(WORDS)] for j in range(1 + i % 4)) for i in range(n)]
    (home / f"{name}.jsonl").write_text(
      "".join(json.dumps(dict(id=f"r{i}", lower=r, upper=r.upper())) + "\n" for i, r in enumerate(rows))
    )
  return home


def environment(devices=1, **more):
  env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling takes most of the time of these runs
  return env | dict(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES=str(devices),
    JAXFT_CACHE=str(pathlib.Path.home() / ".cache" / "jaxft"),
    PYTHONPATH=str(ROOT),
    **more,
  )


def command(binary, *args):
  return [sys.executable, "-m", f"jaxft.{binary}", *args]


def run(binary, *args, code=0, **env):
  done = subprocess.run(command(binary, *args), capture_output=True, text=True, env=environment(**env), timeout=300)
  assert done.returncode == code, (
    f"{binary} {args}: exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
  )
  return done.stdout + done.stderr


def train(folder, workdir, *more, **env):
  return run("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}", *more, **env)


def digest(workdir):
  return hashlib.sha256((pathlib.Path(workdir) / "export" / "model.safetensors").read_bytes()).hexdigest()


def metrics(workdir, name):
  rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
  return {row["step"]: row[name] for row in rows if name in row}


@pytest.fixture(scope="module")
def finished(folder):
  train(folder, os.path.relpath(folder / "whole"))  # relative, as people type it
  return folder / "whole"


def test_training_leaves_what_it_promises(finished):
  there = {p.name for p in finished.iterdir()}
  assert {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "export",
    "samples",
    "report.html",
    "README.md",
    "done.json",
    "log.txt",
  } <= there
  loss = metrics(finished, "loss")
  assert sorted(loss) == list(range(1, 13)) and loss[12] < loss[1]
  assert sorted(metrics(finished, "eval/loss/loss")) == [6, 12]
  samples = [json.loads(line) for line in (finished / "samples" / "text-12.jsonl").read_text().splitlines() if line.endswith("}")]
  assert len(samples) == 3 and {"input", "reference", "output"} <= samples[0].keys()
  assert "lock.json" not in there


def test_same_command_again_changes_nothing(folder, finished):
  before = digest(finished)
  train(folder, finished)
  assert digest(finished) == before


def test_killed_and_restarted_gives_the_same_bits(folder, finished):
  workdir = folder / "killed"
  for until in (2, 7):
    child = subprocess.Popen(
      command("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}"),
      env=environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    end = time.time() + 240
    while time.time() < end and not (workdir / "metrics.jsonl").exists():
      time.sleep(0.02)
    while time.time() < end and child.poll() is None and max(metrics(workdir, "loss"), default=0) < until:
      time.sleep(0.005)
    child.kill()
    child.wait()
  train(folder, workdir)
  assert digest(workdir) == digest(finished)
  assert metrics(workdir, "loss") == metrics(finished, "loss")


def test_sigterm_saves_and_exits_42(folder, finished):
  workdir = folder / "asked"
  child = subprocess.Popen(
    command(
      "main",
      f"--config={CONFIG}:{folder}",
      f"--workdir={workdir}",
      "--config.steps=4000",
      "--config.evals.loss.every=0",
    ),
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  end = time.time() + 240
  while time.time() < end and not (workdir / "metrics.jsonl").exists():
    time.sleep(0.05)
  while time.time() < end and child.poll() is None and not metrics(workdir, "loss"):
    time.sleep(0.05)
  child.send_signal(signal.SIGTERM)
  out, _ = child.communicate(timeout=120)
  assert child.returncode == 42, out
  assert "Run the same command again" in out
  assert any(p.name.isdigit() for p in (workdir / "checkpoints").iterdir())


def test_evaluation_decode_and_export_agree(folder, finished):
  run("evaluate", f"--workdir={finished}", "--checkpoint=latest", f"--output={folder / 'e1'}")
  run("export", f"--workdir={finished}", f"--output={folder / 'out'}", "--checkpoint=latest")
  run(
    "evaluate",
    f"--config={CONFIG}:{folder}",
    f"--model={folder / 'out'}",
    f"--output={folder / 'e2'}",
    "--config.evals.loss.batch=3",
  )
  one, two = (json.loads((folder / e / "eval.jsonl").read_text()) for e in ("e1", "e2"))
  assert {k: v for k, v in one.items() if "text" in k} == {k: v for k, v in two.items() if "text" in k}
  assert one["eval/loss/loss"] == pytest.approx(two["eval/loss/loss"], rel=1e-6)
  assert one["eval/loss/loss"] == pytest.approx(metrics(finished, "eval/loss/loss")[12], rel=1e-6)

  run(
    "decode",
    f"--model={finished}",
    "--checkpoint=latest",
    f"--input={folder / 'dev.jsonl'}",
    f"--output={folder / 'dec.jsonl'}",
    "--max_new_tokens=12",
  )
  rows = [json.loads(line) for line in (folder / "dec.jsonl").read_text().splitlines() if line.endswith("}")]
  assert [r["id"] for r in rows] == [f"r{i}" for i in range(9)]
  samples = [json.loads(line) for line in (finished / "samples" / "text-12.jsonl").read_text().splitlines() if line.endswith("}")]
  assert {f"r{s['id']}": s["output"] for s in samples}.items() <= {r["id"]: r["output"] for r in rows}.items()


@pytest.mark.parametrize("mesh", ["data=4", "data=1 fsdp=4", "data=2 fsdp=2"])
def test_devices_do_not_change_the_numbers(folder, finished, mesh):
  # d_model 24 divides by 4, the 3 heads stay whole; no dropout difference either: its bits follow from (seed, step, place)
  sizes = dict(data=1, fsdp=1, tensor=1) | {k: int(v) for k, v in (part.split("=") for part in mesh.split())}
  workdir = folder / mesh.replace(" ", "-")
  train(folder, workdir, *[f"--config.mesh.{k}={v}" for k, v in sizes.items()], devices=4)
  here, there = metrics(workdir, "loss"), metrics(finished, "loss")
  np.testing.assert_allclose([here[s] for s in sorted(here)], [there[s] for s in sorted(there)], rtol=2e-5)


def test_two_processes_give_what_one_gives(folder, finished):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  workdir = folder / "two"
  args = command("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}")
  env = dict(JAXFT_COORDINATOR=f"127.0.0.1:{port}", JAXFT_PROCESSES="2")
  children = [
    subprocess.Popen(
      args, env=environment(**env, JAXFT_PROCESS=str(i)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for i in range(2)
  ]
  try:
    outs = [c.communicate(timeout=300)[0] for c in children]
  finally:
    for c in children:
      c.kill()
  assert [c.returncode for c in children] == [0, 0], "\n".join(outs)
  here, there = metrics(workdir, "loss"), metrics(finished, "loss")
  np.testing.assert_allclose([here[s] for s in sorted(here)], [there[s] for s in sorted(there)], rtol=2e-5)
  assert metrics(workdir, "eval/text/chrf")[12] == pytest.approx(metrics(finished, "eval/text/chrf")[12], abs=1e-9)


BAD = {
  "missing file": (["--config.data.train=nowhere.jsonl"], 2, "nowhere.jsonl"),
  "missing field": (["--config.task.target={upppper}"], 2, "upper"),
  "misspelt key": (["--config.optimizer.leer=1"], 2, "optimizer.lr"),
  "batch and mesh": (["--config.batch=7"], 2, "nearest"),
  "unknown dtype": (["--config.model.dtype=bfloat15"], 2, "bfloat16"),
  "wrong tokenizer": (["--config.model.config.vocab_size=100"], 2, "vocabulary"),
  "unknown metric": (["--config.save.best=eval/loss/los"], 2, "eval/loss/loss"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_paragraph(folder, name, tmp_path):
  args, code, says = BAD[name]
  text = train(folder, tmp_path / "run", *args, code=code)
  assert says in text, text
  assert "Traceback" not in text, text


def test_workdir_of_another_config_is_refused(folder, finished):
  text = train(folder, finished, "--config.optimizer.lr=0.5", code=2)
  assert "optimizer.lr" in text and "0.5" in text and "Traceback" not in text


def test_pickles_are_refused(folder, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text(json.dumps(dict(model_type="t5")))
  (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  text = run("evaluate", f"--config={CONFIG}:{folder}", f"--model={tmp_path / 'model'}", code=2)
  assert "safetensors" in text and "Traceback" not in text
