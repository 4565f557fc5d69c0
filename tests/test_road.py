"""The whole road by its binaries: train, kill, resume, evaluate, decode, export, on one and on several processes.

Catches: state that is not saved or not restored (checksums of all of it after kill -9), batches that depend on the
number of hosts or devices, an evaluation that differs between a run and its export, an error that leaves a traceback or
the wrong exit code, a config key that nobody reads, checkpoints that a second look at a run moves or removes.
"""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from jaxft import evaluate, runs
from jaxft.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "road_config.py"
STARTER = ROOT / "jaxft" / "assets" / "starter"
WORDS = "the old harbour sleeps under seven small stars while winter rain keeps falling on red roofs".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  home = tmp_path_factory.mktemp("road")
  for name, n, skip in (("train", 60, 0), ("dev", 9, 5)):
    rows = [" ".join(WORDS[(i * 7 + skip + j) % len(WORDS)] for j in range(1 + i % 4)) for i in range(n)]
    (home / f"{name}.jsonl").write_text(
      "".join(json.dumps(dict(id=f"r{i}", lower=r, upper=r.upper())) + "\n" for i, r in enumerate(rows))
    )
  (home / "broken.jsonl").write_text('{"lower": "a", "upper": "A"}\n{"lower": "b", "upper": \n')
  (home / "empty.jsonl").write_text("")
  (home / "broken.py").write_text("from jaxft import config\ndef get_config():\n  return nothing\n")
  starter = json.loads((STARTER / "config.json").read_text())
  for name, weights, other in (
    ("other", "model.safetensors", dict(d_model=48)), ("pickled", "pytorch_model.bin", {})
  ):  # fmt: skip
    (home / name).mkdir()
    (home / name / "config.json").write_text(json.dumps(starter | other))
    for file, copy in (("model.safetensors", weights), ("tokenizer_config.json",) * 2):
      shutil.copy(STARTER / file, home / name / copy)
    (home / f"{name}.py").write_text(
      "from tests import road_config\n"
      "def get_config():\n"
      f"  c = road_config.get_config({str(home)!r})\n"
      f"  c.model.init, c.model.config = {str(home / name)!r}, {{}}\n"
      "  return c\n"
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
  """Returns what names every bit of a finished run: checksums of the whole last state, and of the exported weights."""
  workdir = pathlib.Path(workdir)
  last = json.loads((workdir / "checkpoints" / "12" / "meta" / "metadata").read_text())["body"]["leaves"]
  return last, hashlib.sha256((workdir / "export" / "model.safetensors").read_bytes()).hexdigest()


def checkpoints(workdir):
  return sorted((pathlib.Path(workdir) / "checkpoints").iterdir())


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def metrics(workdir, name):
  return {row["step"]: row[name] for row in rows(pathlib.Path(workdir) / "metrics.jsonl") if name in row}


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
  samples = rows(finished / "samples" / "text-12.jsonl")
  assert len(samples) == 3 and {"input", "reference", "output"} <= samples[0].keys()
  assert "lock.json" not in there
  assert [int(p.name) for p in checkpoints(finished)] == [12, 6, 9], "the best, which is step 6, and the latest two"
  assert json.loads((finished / "done.json").read_text()) == dict(ended="done", step=12)
  assert json.loads((finished / "model" / "task.json").read_text()) == dict(
    inputs=["up: {lower}"], pairs=[""]
  ), "what decode takes"


def test_same_command_again_changes_nothing(folder, finished):
  before = digest(finished), checkpoints(finished), metrics(finished, "loss")
  assert "Going on from the checkpoint of step 12" in train(folder, finished)
  assert (digest(finished), checkpoints(finished), metrics(finished, "loss")) == before


def watched(args, env, workdir, until):
  """Starts a training and returns its processes once `until` steps are in its metrics."""
  children = [
    subprocess.Popen(args, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for e in env
  ]
  end = time.time() + 240
  while time.time() < end and all(c.poll() is None for c in children):
    if (workdir / "metrics.jsonl").exists() and max(metrics(workdir, "loss"), default=0) >= until:
      break
    time.sleep(0.005)
  return children


def test_killed_and_restarted_gives_the_same_bits(folder, finished):
  workdir = folder / "killed"
  for until in (2, 7):
    args = command("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}")
    (child,) = watched(args, [environment()], workdir, until)
    child.kill()
    child.communicate()
  train(folder, workdir)
  assert digest(workdir) == digest(finished)
  assert metrics(workdir, "loss") == metrics(finished, "loss")


def two_processes():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = dict(JAXFT_COORDINATOR=f"127.0.0.1:{port}", JAXFT_PROCESSES="2")
  return [environment(devices=2, **env, JAXFT_PROCESS=str(i)) for i in range(2)]


def test_sigterm_to_one_of_two_processes_saves_and_exits_42(folder):
  workdir = folder / "asked"
  more = ["--config.steps=4000", "--config.evals.loss.every=0", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
  args = command("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}", *more)
  children = watched(args, two_processes(), workdir, 1)
  children[1].send_signal(signal.SIGTERM)
  outs = [c.communicate(timeout=120)[0] for c in children]
  assert [c.returncode for c in children] == [42, 42], "\n".join(outs)
  assert "Run the same command again" in outs[0]
  assert any(p.name.isdigit() for p in checkpoints(workdir))


def test_evaluation_decode_and_export_agree(folder, finished):
  before = digest(finished), checkpoints(finished)
  run("evaluate", f"--workdir={finished}", "--watch", f"--output={folder / 'e1'}")
  run("export", f"--workdir={finished}", f"--output={folder / 'out'}", "--checkpoint=latest")
  run("evaluate", f"--config={CONFIG}:{folder}", f"--model={folder / 'out'}", f"--output={folder / 'e2'}",
      "--config.evals.loss.batch=3")  # fmt: skip
  watched, (two,) = rows(folder / "e1" / "eval.jsonl"), rows(folder / "e2" / "eval.jsonl")
  assert [row["step"] for row in watched] == [6, 9, 12], "each checkpoint once"
  one = watched[-1]
  assert {k: v for k, v in one.items() if "text" in k} == {k: v for k, v in two.items() if "text" in k}
  assert one["eval/loss/loss"] == pytest.approx(two["eval/loss/loss"], rel=1e-6)
  assert one["eval/loss/loss"] == pytest.approx(metrics(finished, "eval/loss/loss")[12], rel=1e-6)

  run("decode", f"--model={finished}", "--checkpoint=latest", f"--input={folder / 'dev.jsonl'}",
      f"--output={folder / 'dec.jsonl'}", "--max_new_tokens=12")  # fmt: skip
  decoded = rows(folder / "dec.jsonl")
  assert [r["id"] for r in decoded] == [f"r{i}" for i in range(9)]
  samples = rows(finished / "samples" / "text-12.jsonl")
  assert {f"r{s['id']}": s["output"] for s in samples}.items() <= {r["id"]: r["output"] for r in decoded}.items()
  assert (digest(finished), checkpoints(finished)) == before, "looking at a run changes nothing in it"


def test_watching_again_does_nothing(folder, finished):
  (folder / "e3").mkdir()
  done = "".join(json.dumps(dict(step=s)) + "\n" for s in (6, 9, 12)) + '{"step": 1'  # the last one cut by a kill
  (folder / "e3" / "eval.jsonl").write_text(done)
  evaluate.watch(None, folder=str(finished), output=str(folder / "e3"))
  assert (folder / "e3" / "eval.jsonl").read_text() == done


def test_other_data_is_refused(finished):
  meta = json.loads((finished / "checkpoints" / "12" / "meta" / "metadata").read_text())["body"]
  checkpointer = types.SimpleNamespace(restore=lambda abstract: (types.SimpleNamespace(step=12), meta))
  with pytest.raises(InputError, match="is not what step 12 of this work directory was trained on"):
    runs.start(None, None, types.SimpleNamespace(abstract=None), checkpointer, "other")
  assert runs.start(None, None, types.SimpleNamespace(abstract=None), checkpointer, meta["data"])[0].step == 12


def test_devices_and_processes_do_not_change_the_numbers(folder, finished):
  """Two processes of two devices each, parameters split over two of the four; tests/train has more meshes in one."""
  workdir = folder / "two"
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
  args = command("main", f"--config={CONFIG}:{folder}", f"--workdir={workdir}", *mesh)
  children = watched(args, two_processes(), workdir, 12)
  outs = [c.communicate(timeout=300)[0] for c in children]
  assert [c.returncode for c in children] == [0, 0], "\n".join(outs)
  here, there = metrics(workdir, "loss"), metrics(finished, "loss")
  np.testing.assert_allclose([here[s] for s in sorted(here)], [there[s] for s in sorted(there)], rtol=2e-5)
  assert metrics(workdir, "eval/text/chrf")[12] == pytest.approx(metrics(finished, "eval/text/chrf")[12], abs=1e-9)


BAD = {  # what is added to the command line -> exit code, and words of the message
  "missing file": (["--config.data.train=nowhere.jsonl"], 2, "nowhere.jsonl"),
  "bad line": (["--config.data.train={folder}/broken.jsonl"], 2, "broken.jsonl, line 2"),
  "no rows": (["--config.data.validation={folder}/empty.jsonl"], 2, "empty.jsonl has no rows"),
  "missing field": (["--config.task.target={upppper}"], 2, "upper"),
  "misspelt key": (["--config.optimizer.leer=1"], 2, "optimizer.lr"),
  "batch and mesh": (["--config.batch=7"], 2, "nearest"),
  "unknown dtype": (["--config.model.dtype=bfloat15"], 2, "bfloat16"),
  "wrong tokenizer": (["--config.model.config.vocab_size=100"], 2, "vocabulary"),
  "broken config": (["--config={folder}/broken.py"], 2, "broken.py, line 3: NameError"),
  "weights of another model": (["--config={folder}/other.py"], 2, "weights and config.json do not match"),
  "pickled weights": (["--config={folder}/pickled.py"], 2, "safetensors"),
  "workdir on a bucket": (["--workdir=gs://bucket/run"], 2, "gcsfuse"),
  "workdir that cannot be": (["--workdir=/dev/null/run"], 44, "/dev/null/run"),
  "log every 0": (["--config.log.every=0"], 2, "log.every"),
  "unknown metric": (["--config.save.best=eval/loss/los"], 2, "eval/loss/loss"),
}


# Each case is a fork of one process that has imported what all of them import, which takes longer than all of them.
FORKS = """
import json, os, sys
from jaxft import cli, main
from jaxft.data import tokens
tokens.load(sys.argv[1])
for argv, path in json.load(sys.stdin):
  child = os.fork()
  if not child:
    for stream, name in ((1, ".out"), (2, ".err")):
      os.dup2(os.open(path + name, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = argv
    cli.run(main.main, cli.parse(main.define, main.__doc__))
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(folder):
  """Returns {case of BAD: (exit code, standard output, standard error)}."""
  home = folder / "bad"
  home.mkdir()
  jobs = [
    (["main", f"--config={CONFIG}:{folder}", f"--workdir={home / f'run{i}'}",
      *(a.replace("{folder}", str(folder)) for a in args)],
     str(home / f"{i}"))  # fmt: skip
    for i, (args, _, _) in enumerate(BAD.values())
  ]
  done = subprocess.run(
    [sys.executable, "-c", FORKS, str(STARTER)],
    input=json.dumps(jobs), capture_output=True, text=True, env=environment(), timeout=300)  # fmt: skip
  assert done.returncode == 0, done.stderr
  return {
    name: (int(code), *(pathlib.Path(path + end).read_text() for end in (".out", ".err")))
    for name, code, (_, path) in zip(BAD, done.stdout.split(), jobs, strict=True)
  }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_paragraph(refusals, name):
  _, code, says = BAD[name]
  found, out, err = refusals[name]
  assert found == code and not out, (found, out, err)
  *_, told = err.rstrip().split("\njaxft: ")
  assert says in told and "\n\n" not in told and "Traceback" not in err, err


def test_workdir_of_another_config_is_refused(folder, finished):
  text = train(folder, finished, "--config.optimizer.lr=0.5", code=2)
  assert "optimizer.lr" in text and "0.5" in text and "Traceback" not in text
