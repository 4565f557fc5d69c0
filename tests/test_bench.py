"""jaxft.bench and what it is made of. Catches: a rate that counts the warm-up or the wrong steps; a packed row counted
as one example; a case that fails and takes the others with it; a ratio that is not formed round by round; data, weights
or TensorFlow asked for where everything is made up; a checkpoint left behind.
"""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxft import benching, config, display
from jaxft.planning import build

ROOT = pathlib.Path(__file__).parent.parent


def tiny(name, **changes):
  c = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny")
  c.update(changes)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  return c


def result(samples, **more):
  return dict(
    device="cpu", devices=1, step_seconds=0.5, samples_per_second=samples, tokens_per_second=1e3, mfu=0.25,
    data_wait=0.0, padded_tokens_per_second=2e3, target_tokens_per_second=None, peak_bytes=2**30, peak_of="process",
    compile_seconds=3.0, compile_kept=False, save_stall_seconds=None, loss=1.0) | more  # fmt: skip


def test_summary_takes_ratios_round_by_round():
  found = benching.summary(dict(a=[result(1.0), result(10.0), result(4.0)], b=[result(2.0), result(10.0), result(6.0)]))
  assert found["b"]["ratio"] == (1.5, 1.0, 2.0) and "ratio" not in found["a"]
  assert found["a"]["samples_per_second"] == 4.0  # the median


def test_table_fits_and_says_what_failed():
  second = result(5e5, compile_kept=True, target_tokens_per_second=9.0)
  found = benching.summary({"a" * 60: [result(1e6)], "b": [second]})
  text = benching.table(found, dict(c="ended with exit code 2"))
  assert max(map(len, text.splitlines())) <= 110
  assert "  2  b" in text and "0.50 (0.50-0.50) of 1" in text and "3s*" in text and "c: ended with exit code 2" in text
  assert benching.table({}, dict(c="was killed")) == "  c: was killed"


def test_rates_leave_the_warmup_out():
  rows = [
    dict(step=i, step_time=t, tokens_per_second=100 / t, padded_tokens_per_second=200 / t, data_wait=0.5, loss=1.0,
         target_tokens_per_second=50 / t)
    for i, t in enumerate((9.0, 9.0, 1.0, 2.0, 1.0), 1)
  ]  # fmt: skip
  plan = type("P", (), dict(unit="target_tokens", peak=100.0, flops=staticmethod(lambda step: 40.0)))
  ready = type("R", (), dict(plan=plan, samples=staticmethod(lambda step: step)))
  found = benching._rates(rows, 4.0, 2, ready)
  assert found["steps"] == 3 and found["step_seconds"] == 1.0
  assert found["samples_per_second"] == (2 + 3 + 4) / 4  # the batches of steps 3, 4 and 5 count from 0
  assert found["tokens_per_second"] == 75.0 and found["target_tokens_per_second"] == 37.5
  assert found["mfu"] == pytest.approx(3 * 40 / 4 / 100) and found["data_wait"] == 0.5


def test_made_up_rows_are_full_and_of_several_examples():
  c = config.Reader(tiny("bert_frozen_head", batch=8))
  built = build.train_step(c, jax.devices()[:1])
  batch = build.made_up(built.model, built.batch)
  assert {k: (x.shape, x.dtype) for k, x in batch.items()} == built.batch
  segments, L = batch["input_segments"], batch["inputs"].shape[1]
  assert segments.min() == 1 and segments.max() == build.SEGMENTS == batch["label_weights"].shape[1]
  assert (np.diff(segments, axis=1) >= 0).all() and np.bincount(segments[0]).max() <= -(-L // build.SEGMENTS)
  assert batch["inputs"].max() < built.model.skeleton.generation["vocab"]


def test_measures_the_data_of_a_config(tmp_path):
  c = tiny("gpt2_lm", batch=8)
  found = benching.measure(c, tmp_path, steps=2, warmup=1, synthetic=False, save_to=str(tmp_path), began=0.0)
  assert found["steps"] == 2 and found["loss"] > 0 and found["rows"] == 8 and found["compile_seconds"] > 0
  assert 0 < found["tokens_per_second"] <= found["padded_tokens_per_second"]
  assert found["target_tokens_per_second"] <= found["tokens_per_second"]
  assert 0 < found["save_stall_seconds"] <= found["save_seconds"]
  assert c.steps != 3 and c.evals  # the caller's config is left alone


def bench(tmp_path, *flags, code=0):
  env = os.environ | dict(JAXFT_CACHE=str(tmp_path), TMPDIR=str(tmp_path))
  env["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
  env.pop("GLIBC_TUNABLES", None)  # so that it starts itself again, for large pages
  done = subprocess.run([sys.executable, "-m", "jaxft.bench", *flags], capture_output=True, text=True, env=env)
  assert done.returncode == code, done.stderr
  assert "Traceback" not in done.stderr
  return done.stdout, done.stderr


def test_command_with_cases(tmp_path):
  file = tmp_path / "out.json"
  short = ("--steps=2", "--warmup=1", "--config.data.lengths.inputs=32", "--synthetic", f"--output={file}")
  cases = ("--case=batch=2 seed=1", "--case=batch=x")
  out, err = bench(tmp_path, "--config=configs/gpt2_lm.py:tiny", *cases, *short, code=1)
  assert "  1  batch=2 seed=1" in out and "batch=x: ended with exit code 2" in out
  assert "batch=x: invalid literal" in err
  found = json.loads(file.read_text())
  assert found["command"].startswith("python -m jaxft.bench --config=configs/gpt2_lm.py:tiny") and found["date"]
  (case,) = found["summary"].values()
  assert case["rows"] == 2 and case["tokens_per_second"] == case["padded_tokens_per_second"] > 0
  assert not list(tmp_path.glob("jaxft-bench-*"))  # the checkpoints are gone


@pytest.mark.parametrize("flags, said", [((), "--config=FILE is missing"), (("--steps=0",), "are 1 or more")])
def test_bad_input_is_one_paragraph(tmp_path, flags, said):
  assert said in bench(tmp_path, *flags, code=2)[1]


def test_numbers_for_people():
  assert [display.si(x) for x in (0.5, 999.0, 1234.0, 2.5e6)] == ["0.5", "999", "1.23k", "2.5M"]
  assert display.size(2**20) == "1.0 MiB" and display.size(3 * 2**29) == "1.50 GiB"
