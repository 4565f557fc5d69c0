"""python -m jaxft.plan as people run it. Catches: a screen that is too wide or lacks what was asked; a wrong exit code;
a traceback where a compiler is missing; TensorFlow or weights loaded for figures.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

CONFIG = "--config=configs/gpt2_lm.py:tiny"


def plan(tmp_path, *flags, code=0):
  env = os.environ | dict(JAXFT_CACHE=str(tmp_path))
  env.pop("JAX_PLATFORMS", None)  # plan sets it itself, and the number of devices
  env["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
  done = subprocess.run([sys.executable, "-m", "jaxft.plan", *flags], capture_output=True, text=True, env=env)
  assert done.returncode == code, done.stderr
  assert "Traceback" not in done.stderr and "tensorflow" not in done.stderr.lower()
  return done.stdout, done.stderr


def test_screen_table_and_picture(tmp_path):
  file = tmp_path / "plan.png"
  short = "--config.data.lengths.inputs=64"
  out, err = plan(tmp_path, CONFIG, "--target=cpux2", f"--picture={file}", short, "--price=2")
  assert "compiling for 2 x cpu" in err and "MFU" in out and "150 steps" in out and "2 devices (data=1 fsdp=2" in out
  assert max(map(len, out.splitlines())) <= 110 and file.read_bytes()[:4] == b"\x89PNG"
  kept = [json.loads(f.read_text()) for f in (tmp_path / "plans").glob("*.json")]
  assert len(kept) == 1 and kept[0]["devices"] == 2
  again, err = plan(tmp_path, CONFIG, "--sweep_targets=cpux2,cpux3", short, "--trials=0")
  assert "figures of an earlier plan" in err and "cpux2" in again
  assert "cpux3: mesh: these parameters do not divide" in again


def test_decode(tmp_path):
  out, _ = plan(tmp_path, CONFIG, "--target=cpu", "--decode", "--batch=2", "--length=16", "--new_tokens=4")
  assert "whole run" not in out and "for 2 rows of 4 new tokens" in out


@pytest.mark.parametrize(
  "flags, said",
  [
    ((CONFIG,), "--target=v5p:2x2x2 for one target, or --sweep_targets"),
    ((CONFIG, "--target=v5q:2x2"), "it is a slice of TPUs"),
    ((CONFIG, "--target=cpu", "--config.model.remat=blok"), "remat"),
  ],
)
def test_bad_input_is_one_paragraph(tmp_path, flags, said):
  _, err = plan(tmp_path, *flags, code=2)
  assert said in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here; without it is not covered")
def test_no_compiler_for_tpus(tmp_path):
  _, err = plan(tmp_path, CONFIG, "--target=v5e:2x2", code=2)
  assert "pip install 'jaxft[tpu]'" in err
