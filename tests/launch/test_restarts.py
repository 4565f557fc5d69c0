"""What is run again after which ending, here and on TPU VMs. Catches a restart that repeats an error for ever."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.scripts import JOB, LAUNCH, VM, call, calls, checkout, stand_in


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
  *"queued-resources delete"*) [ ! -e undeletable ] ;;
  *"tpu-vm describe"*)
    state=$(next states)
    if [ "$state" = absent ]; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi
    echo "$state" ;;
  *"tpu-vm scp"*) if [ -s refusals ]; then sed -i 1d refusals; exit 1; fi ;;
  *"on_worker.sh status"*) next runs ;;
esac
"""
KINDS = {
  "queued-resources delete": "delete",
  "queued-resources create": "create",
  "on_worker.sh setup": "setup",
  "on_worker.sh start": "start",
  "on_worker.sh stop": "stop",
}
BILL = f"my-tpu goes on costing money; this gives it back: launch/tpu_vm/stop.sh {' '.join(VM)} --delete"


def babysit(folder, states, runs, *flags, refusals=0):
  """Returns (process, kinds of calls, calls) of a babysitter that sees `states` and `runs`, the last repeated.

  refusals: how often a copy to the VM fails at first.
  """
  scripts = checkout(folder / "code")
  listing = 'case "$*" in *on_worker.sh) echo launch/tpu_vm/on_worker.sh ;; *) printf "launch\\0" ;; esac'
  stand_in(folder, "git", listing)
  (folder / "states").write_text("".join(s + "\n" for s in states))
  (folder / "runs").write_text("".join(f"status {r}\n" for r in runs))
  (folder / "refusals").write_text("x\n" * refusals)
  (folder / "gcloud").write_text(GCLOUD.format(folder=shlex.quote(str(folder))))
  (folder / "gcloud").chmod(0o755)
  words = [*VM, "--type=v4-8", "--spot", *JOB, "--bucket=my-bucket", *flags, "--", "--config.steps=7"]
  env = dict(GCLOUD=str(folder / "gcloud"), PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
  done = call(scripts / "tpu_vm/babysit.sh", *words, env=env, timeout=60)
  return done, [kind for line in calls(folder) for text, kind in KINDS.items() if text in line], calls(folder)


@pytest.mark.parametrize(
  "states, runs, code, expected",
  [
    (["READY"], ["running", "0"], 0, []),
    (["CREATING", "READY"], ["absent", "running", "0"], 0, ["start"]),
    (["READY", "PREEMPTED", "READY"], ["running", "0"], 0, ["delete", "create", "setup", "start"]),
    (["absent", "READY"], ["0"], 0, ["delete", "create", "setup", "start"]),
    (["READY"], ["running", "42", "0"], 0, ["start"]),
    (["READY"], ["running", "43"], 43, ["stop"]),
    (["READY"], ["44"], 44, ["stop"]),
    (["READY"], ["137"], 137, ["stop"]),
  ],
)
def test_babysit(tmp_path, states, runs, code, expected):
  done, kinds, lines = babysit(tmp_path, states, runs)
  assert (done.returncode, kinds) == (code, expected), done.stderr
  assert done.stdout.splitlines()[-1].endswith(f"babysit: {BILL}") and not done.stderr.count("babysit")
  for line in lines:
    if "create my-tpu" in line:
      assert "--spot" in line and "--accelerator-type=v4-8" in line
    if "on_worker.sh setup" in line:
      assert line.endswith("setup my-bucket")
    if "on_worker.sh start" in line:
      assert line.endswith(f"start t5-1 {JOB[1]} {JOB[2]} --config.steps=7")


def test_babysit_gives_the_vm_back_when_the_run_is_done(tmp_path):
  done, kinds, _ = babysit(tmp_path, ["READY"], ["running", "0"], "--delete")
  assert (done.returncode, kinds) == (0, ["delete"]) and "given back" in done.stdout and BILL not in done.stdout


def test_babysit_keeps_the_vm_and_its_logs_when_the_run_failed(tmp_path):
  done, kinds, _ = babysit(tmp_path, ["READY"], ["43"], "--delete")
  assert (done.returncode, kinds) == (43, ["stop"]) and BILL in done.stdout


def test_babysit_tells_when_the_vm_cannot_be_given_back(tmp_path):
  (tmp_path / "undeletable").touch()
  done, _, _ = babysit(tmp_path, ["READY"], ["0"], "--delete")
  assert done.returncode == 1 and "could not be deleted" in done.stdout and BILL in done.stdout


def test_babysit_tries_a_setup_again_and_gives_up_before_it_costs_a_night(tmp_path):
  done, kinds, _ = babysit(tmp_path, ["absent", "READY"], ["0"], refusals=2)
  assert (done.returncode, kinds) == (0, ["delete", "create", "setup", "start"])
  shutil.rmtree(tmp_path / "code")
  (tmp_path / "calls").unlink()
  done, kinds, _ = babysit(tmp_path, ["absent", "READY"], ["0"], refusals=99)
  assert (done.returncode, kinds) == (1, ["delete", "create"]) and "the setup failed 5 times" in done.stdout
  assert done.stdout.splitlines()[-1].endswith(BILL)


def test_babysit_warns_where_a_preemption_would_lose_the_run():
  words = [*VM, "--type=v4-8", *JOB, "--dry_run"]
  assert "a preemption loses the run" in call("tpu_vm/babysit.sh", *words).stderr
  assert "a preemption loses the run" in call("tpu_vm/babysit.sh", *words, "--bucket=my-buc").stderr
  assert not call("tpu_vm/babysit.sh", *words, "--bucket=my-bucket").stderr
