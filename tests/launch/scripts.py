"""How the tests call the launch scripts, and stand-ins for the programs that these call."""

import os
import pathlib
import shlex
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
VM = ["--name=my-tpu", "--zone=us-central2-b"]
JOB = ["--run=t5-1", "--config=configs/t5.py:t5-base", "--workdir=/mnt/my-bucket/t5-1"]


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


def stand_in(folder, name, body):
  """Writes a program folder/bin/NAME, which notes its words in folder/calls, and returns folder/bin."""
  path = folder / "bin" / name
  path.parent.mkdir(exist_ok=True)
  note = f'echo "{name} $*" >>{shlex.quote(str(folder / "calls"))}\n'
  path.write_text("#!/usr/bin/env bash\n" + note + body + "\n")
  path.chmod(0o755)
  return path.parent


def calls(folder):
  return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def checkout(folder):
  """Returns a copy of the launch scripts in `folder`, where nothing is installed and git knows nothing."""
  shutil.copytree(LAUNCH, folder / "launch")
  return folder / "launch"
