"""The GPU script and its container. Catches what tests/launch/test_tpu_vm.py says, for a machine with GPUs."""

import os
import shlex
import subprocess

import pytest

from tests.launch.scripts import JOB, LAUNCH, ROOT, call, calls, checkout, commands, stand_in


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
