"""The launch scripts: what they would run, and how they work with stand-ins for gcloud, gcsfuse, docker, nvidia-smi.

Catches: a lost or doubly quoted flag, a name that a remote shell would read, a restart on a code that must not be
repeated or none on one that must, a SIGTERM that does not reach the command or restarts it, a preempted VM that is not
made anew, a VM that is forgotten with its bill, a work directory that is no folder, a bucket mounted twice, not at all,
or gone while a run still saves, a container without its config, data or caches, GPUs left idle, an empty archive.
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


def checkout(folder):
  """Returns a copy of the launch scripts in `folder`, where nothing is installed and git knows nothing."""
  shutil.copytree(LAUNCH, folder / "launch")
  return folder / "launch"


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


def test_gpu():
  words = [*JOB[:2], "--workdir=/data/t5-1"]
  (local,) = commands("gpu/run_local.sh", *words, "--", "--config.batch=8")
  assert local[:3] == ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "launch/restart.sh"]  # no exec: it can be pasted
  assert local[local.index("--") + 2 :] == ["-m", "jaxft.main", *words[1:], "--config.batch=8"]


@pytest.mark.parametrize(
  "variables, cache, hub",
  [
    ({}, "/home/me/.cache/jaxft", "/home/me/.cache/huggingface"),
    (dict(JAXFT_CACHE="/big/jaxft", HF_HOME="/big/hf"), "/big/jaxft", "/big/hf"),
  ],
)
def test_docker(monkeypatch, variables, cache, hub):
  for name, value in dict(HOME="/home/me", JAXFT_CACHE="", HF_HOME="").items():
    monkeypatch.setenv(name, variables.get(name, value))
  words, extra = [*JOB[:2], "--workdir=/data/t5-1"], "--config.data.train=/sets/a/x.csv"
  flags = [*words, "--docker", "--mount=/sets/a", "--mount=/sets/b", "--", extra]
  made, build, docker = commands("gpu/run_local.sh", *flags)
  assert made == ["mkdir", "-p", "/data/t5-1", hub, cache]
  assert build == ["docker", "build", "-f", "launch/gpu/Dockerfile", "-t", "jaxft", "."]
  volumes = {"/data/t5-1:/data/t5-1", f"{hub}:/root/.cache/huggingface", f"{cache}:/root/.cache/jaxft"}
  volumes |= {"/sets/a:/sets/a:ro", "/sets/b:/sets/b:ro"}
  assert {w.removeprefix("--volume=") for w in docker if w.startswith("--volume=")} == volumes
  assert docker[:2] == ["docker", "run"] and {"--gpus=all", "--shm-size=16g"} <= set(docker)
  assert docker[docker.index("jaxft") :] == ["jaxft", "-m", "jaxft.main", *words[1:], extra]


@pytest.mark.parametrize(
  "config, mounts, inside",
  [
    ("configs/t5.py:t5-base", [], "configs/t5.py:t5-base"),
    (f"{ROOT}/configs/t5.py:t5-base", [], "configs/t5.py:t5-base"),  # the image has this checkout elsewhere
    ("/sets/mine.py", ["/other", "/sets"], "/sets/mine.py"),
    ("/data/t5-1/mine.py", [], "/data/t5-1/mine.py"),
    ("/sets/mine.py", [], None),
    ("/sets-2/mine.py", ["/sets"], None),
    ("runs/a/mine.py", [], None),  # not in the image: Dockerfile.dockerignore
    ("./runs/a/mine.py", [f"{ROOT}/runs"], f"{ROOT}/runs/a/mine.py"),
  ],
)
def test_a_config_is_in_the_image_or_mounted(config, mounts, inside):
  words = ["--run=a", f"--config={config}", "--workdir=/data/t5-1", "--docker", *(f"--mount={m}" for m in mounts)]
  done = call("gpu/run_local.sh", *words, "--dry_run")
  if inside:
    assert done.returncode == 0 and f"--config={inside}" in shlex.split(done.stdout.splitlines()[-1])
  else:
    assert done.returncode == 2 and "is not in the image" in done.stderr and not done.stdout


def test_docker_refuses_what_is_not_there(tmp_path):
  env = dict(PATH=f"{stand_in(tmp_path, 'docker', 'true')}:{os.environ['PATH']}", HOME=str(tmp_path))
  words = ["--run=a", f"--workdir={tmp_path}/run", "--docker"]
  absent = call("gpu/run_local.sh", *words, JOB[1], f"--mount={tmp_path}/absent", env=env)
  assert absent.returncode == 2 and "is not a folder" in absent.stderr
  absent = call("gpu/run_local.sh", *words, "--config=configs/absent.py", env=env)
  assert absent.returncode == 2 and "there is no file" in absent.stderr
  relative = call("gpu/run_local.sh", *words, JOB[1], env={**env, "JAXFT_CACHE": "cache"})
  assert relative.returncode == 2 and "JAXFT_CACHE" in relative.stderr and not calls(tmp_path)
  done = call("gpu/run_local.sh", *words, JOB[1], f"--mount={tmp_path}/bin", env=env)
  assert done.returncode == 0 and [c.split()[1] for c in calls(tmp_path)] == ["build", "run"]
  assert (tmp_path / ".cache/jaxft").is_dir() and (tmp_path / "run").is_dir()


def test_docker_takes_the_place_of_the_script(tmp_path):
  """So that a SIGTERM to the script is one to `docker run`, which hands it on."""
  folder = stand_in(tmp_path, "docker", f"echo $$ >{tmp_path}/pid")
  env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
  words = [str(LAUNCH / "gpu/run_local.sh"), *JOB[:2], f"--workdir={tmp_path}/run", "--docker"]
  script = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL)
  assert script.wait(30) == 0 and int((tmp_path / "pid").read_text()) == script.pid


INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ".[gpu]"'


def gpu_machine(folder, smi, backend, *words, **variables):
  """Runs run_local.sh where nvidia-smi does `smi` and the default backend of .venv's JAX is printed by `backend`."""
  scripts = checkout(folder / "code")
  stand_in(folder, "nvidia-smi", smi)
  python = folder / "code/.venv/bin/python"
  python.parent.mkdir(parents=True)
  stand_in(folder, "python", f'[ "$1" != -c ] || {{ {backend}; }}').joinpath("python").rename(python)
  env = {"JAX_PLATFORMS": "", **variables, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
  return call(scripts / "gpu/run_local.sh", *JOB[:2], f"--workdir={folder}/run", *words, env=env)


CARD, NONE = "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'", "echo 'No devices found.'; exit 6"


@pytest.mark.parametrize(
  "smi, backend, words, code, said, runs",
  [
    (CARD, "echo cpu", [], 2, "finds only the CPU", 0),
    (CARD, "echo no jax >&2; exit 1", [], 2, "does not start", 0),
    (CARD, "echo gpu", [], 0, "", 1),
    (NONE, "echo cpu", [], 0, "No devices found", 1),
    (CARD, "echo cpu", ["--dry_run"], 0, "", 0),
  ],
)
def test_gpus_are_not_left_idle(tmp_path, smi, backend, words, code, said, runs):
  done = gpu_machine(tmp_path, smi, backend, *words)
  assert done.returncode == code and said in done.stderr
  assert (INSTALL in done.stderr) == (code == 2) and (code == 2) <= (not done.stdout)
  assert len([c for c in calls(tmp_path) if c.startswith("python -m jaxft.main")]) == runs
  assert not words or not calls(tmp_path)  # a dry run asks nobody


def test_the_refusal_of_idle_gpus_is_one_line_that_the_readme_repeats(tmp_path):
  done = gpu_machine(tmp_path, CARD, "echo cpu", JAX_PLATFORMS="cpu")
  assert len(done.stderr.splitlines()) == 1 and "JAX_PLATFORMS=cpu is set" in done.stderr
  assert f"\n    {INSTALL}\n" in (LAUNCH / "README.md").read_text()


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


def test_no_dry_run_ends_the_shell_that_it_is_pasted_into():
  for script, words in re.findall(r"\| `launch/(\S+) ([^`]*)` \|", (LAUNCH / "README.md").read_text()):
    assert not [c for c in commands(script, *shlex.split(words)) if c[0] in ("exec", "exit", "cd", "set")], script
