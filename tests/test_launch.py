"""The launch scripts: what they would run, and the restart loop and the babysitter at work with a stand-in for gcloud.

Catches: a lost or doubly quoted flag, a name that a remote shell would read, a restart on a code that must not be
repeated or none on one that must, a SIGTERM that does not reach the command or restarts it, a preempted VM that is not
made anew.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
VM = ["--name=my-tpu", "--zone=us-central2-b"]
JOB = ["--run=t5-1", "--config=configs/t5.py:t5-base", "--workdir=gs://bucket/t5-1"]


def call(script, *words, env=None, timeout=30):
  environment = {**os.environ, "GCLOUD": "gcloud", "POLL_SECONDS": "0", **(env or {})}
  command = [str(LAUNCH / script), *words]
  return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def commands(script, *words):
  """Returns the words of each command that a dry run prints."""
  cut = words.index("--") if "--" in words else len(words)
  done = call(script, *words[:cut], "--dry_run", *words[cut:])
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(LAUNCH)))
def test_scripts_parse_and_are_strict(path):
  assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
  text = path.read_text()
  if path.name != "lib.sh":
    assert "set -euo pipefail" in text and os.access(path, os.X_OK)
  assert not re.search(r"https?://|index-url|find-links", text)
  if shutil.which("shellcheck"):
    assert subprocess.run(["shellcheck", "-x", "-e", "SC1091,SC2034,SC2153", str(path)]).returncode == 0


def test_the_readme_names_every_script_and_its_commands_work():
  text = (LAUNCH / "README.md").read_text()
  for path in SCRIPTS:
    if path.name not in ("lib.sh", "on_worker.sh"):
      assert f"`{path.relative_to(LAUNCH)}`" in text
  examples = re.findall(r"\| `launch/(\S+) ([^`]*)` \|", text)
  assert len(examples) == 9
  for script, words in examples:
    found = commands(script, *shlex.split(words))
    assert found, script


def test_create():
  create, describe = commands("tpu_vm/create.sh", *VM, "--type=v5litepod-16", "--spot", "--project=my-project")
  assert create == [
    "gcloud",
    "compute",
    "tpus",
    "queued-resources",
    "create",
    "my-tpu",
    "--zone=us-central2-b",
    "--project=my-project",
    "--node-id=my-tpu",
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
  ]
  assert describe[:6] == ["gcloud", "compute", "tpus", "queued-resources", "describe", "my-tpu"]
  assert "--spot" not in commands("tpu_vm/create.sh", *VM, "--type=v4-8")[0]


def test_setup_copies_and_installs_on_all_workers():
  pack, copy, install = commands("tpu_vm/setup.sh", *VM)
  assert "git ls-files" in pack[2]
  assert copy[3:5] == ["tpu-vm", "scp"] and copy[-1] == install[-2] == "--worker=all"
  assert install[-1].endswith("on_worker.sh setup")


def test_run_hands_every_word_over_as_it_is(tmp_path):
  extra = ["--config.task.input=say it: {a} \"b\" $HOME 'c'", "--config.steps=7"]
  (ssh,) = commands("tpu_vm/run.sh", *VM, *JOB, "--", *extra)
  assert ssh[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-central2-b"]
  remote = ssh[-1].removeprefix("--command=")
  expected = ["bash", "jaxft/launch/tpu_vm/on_worker.sh", "start", "t5-1", *JOB[1:], *extra]
  assert shlex.split(remote) == expected
  # and the worker's own shell reads the same words
  env = {**os.environ, "DRY_RUN": "1", "HOME": str(tmp_path)}
  here = ["bash", "-c", remote.replace("jaxft/launch", str(LAUNCH))]
  started = subprocess.run(here, capture_output=True, text=True, env=env)
  words = shlex.split(started.stdout)
  assert words[:3] == ["sudo", "systemd-run", "--collect"] and "--unit=jaxft-t5-1" in words
  assert words[words.index("--") + 1 :] == [".venv/bin/python", "-m", "jaxft.main", *JOB[1:], *extra]
  assert words[words.index("launch/restart.sh") + 1] == "--also=41"


def test_worker_setup_needs_no_index():
  done = call("tpu_vm/on_worker.sh", "setup", env=dict(DRY_RUN="1"))
  last = shlex.split(done.stdout.splitlines()[-1])
  assert last == [".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", ".[tpu]"]


def test_logs_and_stop():
  (follow,) = commands("tpu_vm/logs.sh", *VM, "--run=t5-1")
  assert follow[-2:] == ["--worker=0", "--command=tail -n 200 -F logs/t5-1.log"]
  stop, delete = commands("tpu_vm/stop.sh", *VM, "--run=t5-1", "--delete")
  assert stop[-1].endswith("on_worker.sh stop t5-1") and delete[3:5] == ["queued-resources", "delete"]
  assert len(commands("tpu_vm/stop.sh", *VM, "--run=t5-1")) == 1


def test_gpu():
  words = [*JOB[:2], "--workdir=/data/t5-1"]
  (local,) = commands("gpu/run_local.sh", *words, "--", "--config.batch=8")
  assert local[:2] == ["exec", "env"]
  assert local[local.index("--") + 2 :] == ["-m", "jaxft.main", *words[1:], "--config.batch=8"]
  build, docker = commands("gpu/run_local.sh", *words, "--docker")
  assert build == ["docker", "build", "-f", "launch/gpu/Dockerfile", "-t", "jaxft", "."]
  assert {"--gpus=all", "--shm-size=16g", "--volume=/data/t5-1:/data/t5-1"} <= set(docker)
  assert docker[-4:] == ["-m", "jaxft.main", *words[1:]]


@pytest.mark.parametrize(
  "script, words, message",
  [
    ("tpu_vm/run.sh", ["--name=my tpu", VM[1], *JOB], "--name=my tpu is not allowed"),
    ("tpu_vm/run.sh", ["--name=My-tpu;ls", VM[1], *JOB], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a b", *JOB[1:]], "--run=a b is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a/b", *JOB[1:]], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a..b", *JOB[1:]], "'..' is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2], "--workdir=gs://b/$(id)"], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2]], "--workdir is missing"),
    ("tpu_vm/run.sh", [*VM, "--rum=t5", *JOB], "there is no --rum=t5"),
    ("tpu_vm/create.sh", [*VM, "--type=v9-8"], "--version"),
    ("tpu_vm/create.sh", [VM[0], "--zone=nowhere", "--type=v4-8"], "--zone=nowhere is not allowed"),
    ("tpu_vm/stop.sh", VM, "say --run"),
    ("gpu/run_local.sh", [*JOB, "--docker"], "--workdir=gs://bucket/t5-1 is not allowed"),
    ("restart.sh", ["--max=x", "--", "true"], "not a number"),
  ],
)
def test_bad_input_is_refused_before_anything_runs(script, words, message):
  done = call(script, *words, env=dict(GCLOUD="/nonexistent"))
  assert done.returncode == 2 and message in done.stderr and not done.stdout


def restart(tmp_path, codes, *flags, pause="0"):
  """Runs the loop over a command that exits with `codes` in turn (137: kills itself); returns (code, runs)."""
  counter = tmp_path / "runs"
  counter.write_text("")
  body = (
    f"import os, signal\nn = len(open({str(counter)!r}).read())\nopen({str(counter)!r}, 'a').write('x')\n"
    f"code = {codes!r}[n]\nos.kill(os.getpid(), signal.SIGKILL) if code == 137 else os._exit(code)"
  )
  done = call("restart.sh", f"--wait={pause}", *flags, "--", sys.executable, "-c", body)
  return done.returncode, len(counter.read_text())


@pytest.mark.parametrize(
  "codes, flags, expected",
  [
    ([42, 42, 0], [], (0, 3)),
    ([137, 134, 0], [], (0, 3)),
    ([2], [], (2, 1)),
    ([43], [], (43, 1)),
    ([44], [], (44, 1)),
    ([1], [], (1, 1)),
    ([45], [], (45, 1)),
    ([127], [], (127, 1)),
    ([41], [], (41, 1)),
    ([42, 43], [], (43, 2)),
    ([41, 42, 0], ["--also=41"], (0, 3)),
    ([42] * 9, ["--max=3"], (42, 4)),
  ],
)
def test_restart_codes(tmp_path, codes, flags, expected):
  assert restart(tmp_path, codes, f"--status={tmp_path / 'status'}", *flags) == expected
  assert (tmp_path / "status").read_text() == f"{expected[0]}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_saves_and_is_not_restarted(tmp_path, number):
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  body = (
    "import signal, sys, time\n"
    f"def save(*_):\n  time.sleep(0.5)\n  open({str(saved)!r}, 'a').write('x')\n  sys.exit(42)\n"
    f"signal.signal(signal.SIGTERM, save)\nopen({str(ready)!r}, 'w').close()\nwhile True: time.sleep(0.05)"
  )
  loop = subprocess.Popen([str(LAUNCH / "restart.sh"), "--wait=0", "--", sys.executable, "-c", body])
  deadline = time.time() + 20
  while not ready.exists() and time.time() < deadline:
    time.sleep(0.05)
  loop.send_signal(number)
  assert loop.wait(20) == 42 and saved.read_text() == "x"


GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
cd {folder}
echo "$*" >>calls
next() {{ head -n 1 "$1"; if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi; }}
case "$*" in
  *"queued-resources describe"*) echo ACTIVE ;;
  *"tpu-vm describe"*)
    state=$(next states)
    if [ "$state" = absent ]; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi
    echo "$state" ;;
  *"on_worker.sh status"*) next runs ;;
esac
"""


def babysit(folder, states, runs):
  """Returns (exit code, kinds of calls, calls) of a babysitter that sees `states` and `runs`, the last repeated."""
  (folder / "states").write_text("".join(s + "\n" for s in states))
  (folder / "runs").write_text("".join(f"status {r}\n" for r in runs))
  (folder / "gcloud").write_text(GCLOUD.format(folder=shlex.quote(str(folder))))
  (folder / "gcloud").chmod(0o755)
  words = [*VM, "--type=v4-8", "--spot", *JOB, "--", "--config.steps=7"]
  done = call("tpu_vm/babysit.sh", *words, env=dict(GCLOUD=str(folder / "gcloud")), timeout=60)
  kinds = {
    "queued-resources delete": "delete",
    "queued-resources create": "create",
    "on_worker.sh setup": "setup",
    "on_worker.sh start": "start",
    "on_worker.sh stop": "stop",
  }
  calls = (folder / "calls").read_text().splitlines()
  return done.returncode, [kind for line in calls for text, kind in kinds.items() if text in line], calls


@pytest.mark.parametrize(
  "states, runs, code, expected",
  [
    (["READY"], ["running", "0"], 0, []),
    (["CREATING", "READY"], ["absent", "running", "0"], 0, ["start"]),
    (["READY", "PREEMPTED", "READY"], ["running", "0"], 0, ["delete", "create", "setup", "start"]),
    (["absent", "READY"], ["0"], 0, ["delete", "create", "setup", "start"]),
    (["READY"], ["running", "42", "0"], 0, ["start"]),
    (["READY"], ["running", "43"], 43, ["stop"]),
    (["READY"], ["137"], 137, ["stop"]),
  ],
)
def test_babysit(tmp_path, states, runs, code, expected):
  found, kinds, calls = babysit(tmp_path, states, runs)
  assert (found, kinds) == (code, expected)
  for line in calls:
    if "create my-tpu" in line:
      assert "--spot" in line and "--accelerator-type=v4-8" in line
    if "on_worker.sh start" in line:
      assert line.endswith("start t5-1 --config=configs/t5.py:t5-base --workdir=gs://bucket/t5-1 --config.steps=7")
