"""The launch scripts: what they would run, and how they work with stand-ins for gcloud, gcsfuse, docker, nvidia-smi.

Catches: a lost or doubly quoted flag, a name that a remote shell would read, a restart on a code that must not be
repeated or none on one that must, a SIGTERM that does not reach the command or restarts it, a preempted VM that is not
made anew, a VM that is forgotten with its bill, a work directory that is no folder, a bucket mounted twice, not at all,
or gone while a run still saves, a container without its config, data or caches, GPUs left idle, an empty archive.
"""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.scripts import JOB, LAUNCH, SCRIPTS, VM, call, calls, checkout, commands, stand_in


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
  assert pack[:4] == ["bash", "-o", "pipefail", "-c"] and "git ls-files" in pack[-1]
  assert copy[3:5] == ["tpu-vm", "scp"] and copy[-1] == install[-2] == "--worker=all"
  assert install[-1].endswith("on_worker.sh setup")
  assert commands("tpu_vm/setup.sh", *VM, "--bucket=my-bucket")[-1][-1].endswith("on_worker.sh setup my-bucket")


def test_setup_packs_what_git_lists_and_refuses_where_it_lists_nothing(tmp_path):
  scripts = checkout(tmp_path / "code")
  env = dict(GCLOUD=str(stand_in(tmp_path, "gcloud", f'[ "$4" != scp ] || cp "$5" {tmp_path}/sent.tgz') / "gcloud"))
  env["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
  refused = call(scripts / "tpu_vm/setup.sh", *VM, env=env)
  assert refused.returncode == 2 and "is not a git checkout" in refused.stderr and not calls(tmp_path)
  assert len(refused.stderr.splitlines()) == 1
  if not shutil.which("git"):
    return
  subprocess.run(["git", "init", "-q", str(scripts.parent)], check=True)
  (scripts.parent / "mine.py").write_text("c = 1")
  done = call(scripts / "tpu_vm/setup.sh", *VM, env=env)
  assert done.returncode == 0, done.stderr
  names = subprocess.run(["tar", "-tzf", str(tmp_path / "sent.tgz")], capture_output=True, text=True).stdout.split()
  assert {"mine.py", "launch/lib.sh", "launch/tpu_vm/on_worker.sh"} <= set(names)
  (scripts.parent / ".gitignore").write_text("launch\n")  # as where the checkout lies in another, which ignores it
  assert call(scripts / "tpu_vm/setup.sh", *VM, env=env).returncode == 2


# `sudo systemd-run ... gcsfuse ... AT` mounts: the folder `mounted` stands for the kernel's table.
SUDO = """
case "$*" in
  *--unit=jaxft-mount-*) [ ! -e {folder}/broken ] || exit 1; touch {folder}/mounted ;;
esac
"""


def worker(folder, *words, installed=True, running=False):
  """Runs on_worker.sh with stand-ins and folder/home as the home; returns the process."""
  (folder / "home").mkdir(exist_ok=True)
  place = shlex.quote(str(folder))
  stand_in(folder, "sudo", SUDO.format(folder=place))
  stand_in(folder, "mountpoint", f"[ -e {place}/mounted ]")
  stand_in(folder, "systemctl", "true" if running else "false")
  for name in ("python3.13", "python3.12", "python3.11"):
    stand_in(folder, name, "true")
  if installed:
    stand_in(folder, "gcsfuse", "true")
  if not (folder / "code").exists():
    checkout(folder / "code")
    stand_in(folder, "pip", "true")
    (folder / "code/.venv/bin").mkdir(parents=True)
    (folder / "bin/pip").rename(folder / "code/.venv/bin/pip")
  env = dict(PATH=f"{folder / 'bin'}:/usr/bin:/bin", HOME=str(folder / "home"))
  return call(folder / "code/launch/tpu_vm/on_worker.sh", *words, env=env)


def mounts(folder):
  return [shlex.split(line) for line in calls(folder) if "systemd-run --collect --unit=jaxft-mount" in line]


@pytest.mark.skipif(bool(shutil.which("gcsfuse", path="/usr/bin:/bin")), reason="gcsfuse is installed here")
def test_a_worker_without_gcsfuse_says_what_to_install(tmp_path):
  done = worker(tmp_path, "setup", "my-bucket", installed=False)
  (line,) = done.stderr.splitlines()
  assert done.returncode == 44 and "Install Cloud Storage FUSE" in line and "any other shared file system" in line
  assert not [c for c in calls(tmp_path) if c.startswith(("sudo", "pip"))]
  assert worker(tmp_path, "setup", installed=False).returncode == 0  # nothing is remembered of it


def test_a_worker_mounts_its_bucket_once_and_again_after_a_reboot(tmp_path):
  assert worker(tmp_path, "setup", "my-bucket").returncode == 0
  (words,) = mounts(tmp_path)
  flags = words[words.index(str(tmp_path / "bin/gcsfuse")) + 1 :]
  assert flags[:4] == ["-o", "allow_other", f"--uid={os.getuid()}", f"--gid={os.getgid()}"]
  assert "--implicit-dirs" in flags and "--metadata-cache-ttl-secs=0" in flags
  assert int(next(f for f in flags if f.startswith("--rename-dir-limit=")).split("=")[1]) >= 100_000
  assert flags[-2:] == ["my-bucket", "/mnt/my-bucket"] and "--service-type=forking" in words
  assert worker(tmp_path, "setup", "my-bucket").returncode == 0 and len(mounts(tmp_path)) == 1
  assert worker(tmp_path, "start", "t5-1", *JOB[1:]).returncode == 0 and len(mounts(tmp_path)) == 1
  (tmp_path / "mounted").unlink()  # a reboot
  assert worker(tmp_path, "start", "t5-1", *JOB[1:], running=True).stdout == "running\n"
  assert worker(tmp_path, "start", "t5-1", *JOB[1:]).returncode == 0 and len(mounts(tmp_path)) == 2
  start = shlex.split(calls(tmp_path)[-1])
  assert "--unit=jaxft-t5-1" in start and "--property=LimitMEMLOCK=infinity" in start
  # a shutdown stops a service before those that it comes after: the run, which saves, before the mount and the network
  order = {"network-online.target", "jaxft-mount-my-bucket.service"}
  assert {f"--property=After={unit}" for unit in order} | {"--property=RequiresMountsFor=/mnt/my-bucket"} <= set(start)


def test_a_run_does_not_start_without_its_bucket(tmp_path):
  worker(tmp_path, "setup", "my-bucket")
  (tmp_path / "mounted").unlink()
  (tmp_path / "broken").touch()
  done = worker(tmp_path, "start", "t5-1", *JOB[1:])
  assert done.returncode == 44 and "journalctl -u jaxft-mount-my-bucket" in done.stderr
  assert not [c for c in calls(tmp_path) if "--unit=jaxft-t5-1" in c]
  assert worker(tmp_path, "status", "t5-1").stdout == "status 44\n"  # which ends the babysitter


def test_a_worker_without_a_bucket_mounts_nothing(tmp_path):
  assert worker(tmp_path, "setup").returncode == worker(tmp_path, "start", "t5-1", *JOB[1:]).returncode == 0
  assert not mounts(tmp_path) and "/mnt" not in " ".join(shlex.split(calls(tmp_path)[-1])[:-2])


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
  mounting = call("tpu_vm/on_worker.sh", "setup", "my-bucket", env=dict(DRY_RUN="1")).stdout.splitlines()
  assert mounting[1].startswith("sudo mkdir -p /mnt/my-bucket") and " gcsfuse -o allow_other " in mounting[2]


def test_logs_and_stop():
  (follow,) = commands("tpu_vm/logs.sh", *VM, "--run=t5-1")
  assert follow[-2:] == ["--worker=0", "--command=tail -n 200 -F logs/t5-1.log"]
  stop, delete = commands("tpu_vm/stop.sh", *VM, "--run=t5-1", "--delete")
  assert stop[-1].endswith("on_worker.sh stop t5-1") and delete[3:5] == ["queued-resources", "delete"]
  assert len(commands("tpu_vm/stop.sh", *VM, "--run=t5-1")) == 1


@pytest.mark.parametrize(
  "script, words, message",
  [
    ("tpu_vm/run.sh", ["--name=my tpu", VM[1], *JOB], "--name=my tpu is not allowed"),
    ("tpu_vm/run.sh", ["--name=My-tpu;ls", VM[1], *JOB], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a b", *JOB[1:]], "--run=a b is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a/b", *JOB[1:]], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, "--run=a..b", *JOB[1:]], "'..' is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2], "--workdir=/mnt/b/$(id)"], "is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2], "--workdir=/mnt/b/../c"], "'..' is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2], "--workdir=gs://b/t5-1"], "--workdir=/mnt/b/t5-1 (on TPU VMs"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2], "--workdir=runs/t5-1"], "--workdir=runs/t5-1 is not an absolute path"),
    ("tpu_vm/babysit.sh", [*VM, "--type=v4-8", *JOB[:2], "--workdir=gs://b/t5-1"], "mount the bucket"),
    ("tpu_vm/babysit.sh", [*VM, "--type=v4-8", *JOB[:2], "--workdir=runs/t5-1"], "is not an absolute path"),
    ("tpu_vm/babysit.sh", [*VM, "--type=v4-8", *JOB, "--bucket=b;ls"], "--bucket=b;ls is not allowed"),
    ("tpu_vm/setup.sh", [*VM, "--bucket=gs://my-bucket"], "for example --bucket=my-bucket"),
    ("tpu_vm/setup.sh", [*VM, "--bucket=my bucket"], "is not allowed"),
    ("tpu_vm/setup.sh", [*VM, "--bucket=a..b"], "'..' is not allowed"),
    ("tpu_vm/run.sh", [*VM, *JOB[:2]], "--workdir is missing"),
    ("tpu_vm/run.sh", [*VM, "--rum=t5", *JOB], "there is no --rum=t5"),
    ("tpu_vm/create.sh", [*VM, "--type=v9-8"], "--version"),
    ("tpu_vm/create.sh", [VM[0], "--zone=nowhere", "--type=v4-8"], "--zone=nowhere is not allowed"),
    ("tpu_vm/stop.sh", VM, "say --run"),
    ("gpu/run_local.sh", [*JOB[:2], "--workdir=gs://b/t5-1"], "is an address"),
    ("gpu/run_local.sh", [*JOB[:2], "--workdir=runs/t5-1", "--docker"], "is not an absolute path"),
    ("gpu/run_local.sh", [*JOB, "--mount=/sets"], "--mount is for --docker"),
    ("gpu/run_local.sh", [*JOB, "--docker", "--mount=sets"], "--mount=sets is not an absolute path"),
    ("gpu/run_local.sh", [*JOB, "--docker", "--mount=/a:/etc"], "--mount=/a:/etc is not allowed"),
    ("gpu/run_local.sh", [*JOB, "--docker", "--mount=/usr", "--mount=/b/$(id)"], "is not allowed"),
    ("restart.sh", ["--max=x", "--", "true"], "not a number"),
  ],
)
def test_bad_input_is_refused_before_anything_runs(script, words, message):
  done = call(script, *words, env=dict(GCLOUD="/nonexistent"))
  assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_no_dry_run_ends_the_shell_that_it_is_pasted_into():
  for script, words in re.findall(r"\| `launch/(\S+) ([^`]*)` \|", (LAUNCH / "README.md").read_text()):
    assert not [c for c in commands(script, *shlex.split(words)) if c[0] in ("exec", "exit", "cd", "set")], script
