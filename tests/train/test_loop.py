"""The loop under kills, signals, bad numbers and resumes, on a toy with the real step and the real checkpoints.

Catches: a batch or a key that depends on anything but the step; metrics, evaluations or the state of early stopping
that a resume loses or repeats; a NaN that reaches the weights; a signal that loses work or leaves an empty step; errors
of the input thread that get lost; a wrong count of tokens.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxft import observe
from jaxft.errors import InputError, NumbersError, Preempted, StorageError
from jaxft.train import loop, prefetch
from tests.train import crash_toy as toy

SCRIPT = pathlib.Path(toy.__file__)
TIMING = ("second", "step_time", "data_wait", "mfu", "eta")


def lines(folder):
  """metrics.jsonl without what depends on the clock."""
  return [{k: v for k, v in row.items() if not any(t in k for t in TIMING)} for row in observe.read_metrics(folder)]


def equal(a, b):
  a, b = (x if isinstance(x, dict) else toy.arrays(x.state) for x in (a, b))
  return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted: its folder and outcome."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, toy.run(folder, eval_every=5)[0]


def start(folder, cache, **options):
  """Starts the toy in a process; compiled programs are kept, which halves its 12 s and puts their files under the kills
  too."""
  env = dict(
    os.environ,
    PYTHONPATH=str(SCRIPT.parents[2]),
    JAX_COMPILATION_CACHE_DIR=str(cache),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
  )
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), str(folder), json.dumps(options)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(condition, process, seconds=90):
  end = time.monotonic() + seconds
  while not condition() and process.poll() is None and time.monotonic() < end:
    time.sleep(0.005)
  assert time.monotonic() < end, "the run did not get there"


def last_step(folder):
  rows = observe.read_metrics(folder)
  return rows[-1]["step"] if rows else 0


def test_kill_9_at_random_moments(tmp_path, whole, cache):
  """Weights, optimizer, step and metrics are those of the uninterrupted run, bit for bit."""
  rng = np.random.default_rng(4)
  kills = 0
  for _ in range(12):
    run = start(tmp_path, cache, eval_every=5, sleep=0.03)
    if kills < 3:
      goal = last_step(tmp_path) + int(rng.integers(4, 12))
      wait_for(lambda goal=goal: last_step(tmp_path) >= goal, run)
      time.sleep(float(rng.random()) * 0.1)
      kills += run.poll() is None
      run.kill()
    text, _ = run.communicate(timeout=120)
    if run.returncode == 0:
      break
    assert run.returncode == -signal.SIGKILL, text
  assert run.returncode == 0 and kills >= 2, text
  with np.load(tmp_path / "final.npz") as final:
    assert equal({k.replace("|", "/"): final[k] for k in final.files}, whole[1])
  assert lines(tmp_path) == lines(whole[0])


def test_sigterm_saves_and_exits_42_and_a_second_one_changes_nothing(tmp_path, whole, cache):
  run = start(tmp_path, cache, eval_every=5, sleep=0.1)
  wait_for(lambda: last_step(tmp_path) >= 6, run)
  run.send_signal(signal.SIGTERM)
  time.sleep(0.02)
  run.send_signal(signal.SIGINT)
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 42 and "Traceback" not in text and "Run the same command again" in text, text
  steps = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert steps and all(s.isdigit() for s in steps) and not (tmp_path / "lock.json").exists()
  outcome = toy.run(tmp_path, eval_every=5)[0]
  assert equal(outcome, whole[1]) and lines(tmp_path) == lines(whole[0])


@pytest.mark.parametrize("at", [1, 9, 14, 15, 29])
def test_resume_is_exact_wherever_it_stops(tmp_path, whole, at):
  with pytest.raises(Preempted, match="step|first"):
    toy.run(tmp_path, eval_every=5, stop_after=at)
  outcome, evaluator, _ = toy.run(tmp_path, eval_every=5)
  assert equal(outcome, whole[1]) and lines(tmp_path) == lines(whole[0])
  assert outcome.evals == whole[1].evals


def test_asked_to_stop_before_the_first_step_leaves_nothing(tmp_path):
  with pytest.raises(Preempted, match="before the first step"):
    with loop.Signals() as signals:
      os.kill(os.getpid(), signal.SIGTERM)
      assert signals.asked(0)
      loop._Saver(None, None, None, None).before_leaving(None, 0)


def test_a_finished_run_does_nothing_again(tmp_path):
  first, asked, _ = toy.run(tmp_path, steps=8, eval_every=4)
  again, evaluator, _ = toy.run(tmp_path, steps=8, eval_every=4)
  assert asked.asked == [4, 8] and evaluator.asked == [] and equal(first, again)
  assert again.evals == first.evals and again.reason == "done"


def test_what_is_measured_on_a_finished_run_is_kept(tmp_path):
  toy.run(tmp_path, steps=8)
  _, asked, saves = toy.run(tmp_path, steps=8, eval_every=2, best="eval/toy/loss")
  assert asked.asked == [8] and saves.best_step() == 8
  again, asked, saves = toy.run(tmp_path, steps=8, eval_every=2, best="eval/toy/loss")
  assert asked.asked == [] and [s for s, _ in again.evals] == [8] and saves.steps() == [7, 8]


def test_a_good_start_does_not_hide_the_best_step(tmp_path):
  """Step 0 is never saved: what counts is the best of the steps after it."""
  given = dict(steps=8, eval_every=2, first=1.0, values=(3.0, 1.5, 2.5, 2.6), best="eval/toy/loss")
  given |= dict(save_every=100, keep=1)
  _, evaluator, saves = toy.run(tmp_path, **given)
  assert evaluator.asked == [0, 2, 4, 6, 8] and saves.best_step() == 4 and saves.steps() == [4, 8]


# -- numbers


def test_nan_is_skipped_and_told(tmp_path, caplog):
  plain = toy.run(tmp_path / "a", steps=4)[0]
  bad = toy.run(tmp_path / "b", steps=6, nan=(4, 5), save_every=100)[0]
  assert equal(
    {k: v for k, v in toy.arrays(plain.state).items() if "params" in k or "opt" in k},
    {k: v for k, v in toy.arrays(bad.state).items() if "params" in k or "opt" in k},
  ), "a bad step changes no weight"
  assert "Step 5 is not finite" in caplog.text and "toy.jsonl, line 104; line 204" in caplog.text
  row = [r for r in observe.read_metrics(tmp_path / "b") if r["step"] == 6 and "loss" in r][0]
  assert row["loss"] is None


def test_more_than_skip_in_a_row_ends_with_the_ids(tmp_path):
  with pytest.raises(NumbersError) as e:
    toy.run(tmp_path, steps=30, nan=(3, 8, 9, 10, 11, 12), save_every=4)
  assert e.value.code == 43 and "4 times in a row" in str(e.value)
  for step in (9, 10, 11, 12):
    assert f"step {step}: examples toy.jsonl, line {99 + step}; line {199 + step}" in str(e.value)
  assert "step 4" not in str(e.value)
  with pytest.raises(NumbersError):  # the same command again meets the same rows, from the checkpoint
    toy.run(tmp_path, steps=30, nan=(3, 8, 9, 10, 11, 12), save_every=4)
  assert toy.run(tmp_path, steps=14)[0].step == 14
  assert toy.run(tmp_path / "ok", steps=14, nan=(8, 9, 10, 12), save_every=4)[0].step == 14


def test_the_count_of_bad_steps_survives_a_resume(tmp_path):
  with pytest.raises(Preempted):
    toy.run(tmp_path, stop_after=6, nan=(3, 4, 5, 6, 7, 8, 9), skip=7)
  with pytest.raises(NumbersError, match="[45] times in a row"):  # 5 where the signal came late
    toy.run(tmp_path, nan=(3, 4, 5, 6, 7, 8, 9), skip=3)


# -- early stopping and the best

VALUES = (9, 8, 7, 7.5, float("nan"), 7.2, 7.1, 6.0, 5.0, 4.0)
STOP = dict(eval_every=2, values=VALUES, metric="eval/toy/loss", best="eval/toy/loss", patience=4, save_every=3)


@pytest.mark.parametrize("cut", [None, 7, 9, 12])
def test_early_stop_is_the_same_across_a_resume(tmp_path, cut):
  if cut:
    with pytest.raises(Preempted):
      toy.run(tmp_path, stop_after=cut, **STOP)
  outcome, _, saves = toy.run(tmp_path, **STOP)
  assert (outcome.step, outcome.reason) == (14, "early stop")
  assert saves.best_step() == 6 and 14 in saves.steps()
  assert [s for s, _ in outcome.evals] == [2, 4, 6, 8, 10, 12, 14]
  again, evaluator, _ = toy.run(tmp_path, **STOP)
  assert again.step == 14 and not evaluator.asked


@pytest.mark.parametrize(
  "mode, delta, values, stops",
  [
    ("min", 0.0, (3, 2, 2, 2), 4),
    ("max", 0.0, (1, 2, 3, 4), None),
    ("max", 1.0, (1, 1.5, 2, 9), 3),
    ("min", 0.0, (float("nan"),) * 2, 2),
    ("min", 0.0, (3, 4, 2, 3), None),
  ],
)
def test_early_stop_by_hand(mode, delta, values, stops):
  stop = loop.EarlyStop(metric="m", mode=mode, patience=2, min_delta=delta)
  at = None
  for i, v in enumerate(values, 1):
    stop.see(dict(m=float(v)))
    stop.see(dict(other=0.0))
    at = at or (i if stop.stopped else None)
  assert at == stops


def test_a_metric_that_nobody_measures_is_refused(tmp_path):
  for name in ("eval/toi/loss", "loss", "eval/toy/los"):
    with pytest.raises(InputError, match="save.best is .* none of the evaluations gives.*they give eval/toy/loss"):
      toy.run(tmp_path / name.replace("/", "-"), steps=4, eval_every=2, best=name)


# -- the rest


def test_saves_by_the_clock(tmp_path):
  outcome, _, saves = toy.run(tmp_path, steps=12, save_every=0, save_minutes=0.0005, log_every=1, sleep=0.05, keep=9)
  assert len(saves.steps()) > 3 and saves.steps()[-1] == 12


def test_disk_full_ends_the_run_with_44(tmp_path):
  code = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY));"
    f"sys.argv = ['x', {str(tmp_path)!r}, '{{\"width\": 4000, \"lock\": false}}']; import runpy;"
    f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=120,
    env=dict(os.environ, PYTHONPATH=str(SCRIPT.parents[2])),
  )
  assert done.returncode == StorageError.code, done.stderr
  assert "The checkpoint of step 7 could not be written" in done.stderr and "Traceback" not in done.stderr


def test_an_error_of_the_input_arrives(tmp_path):
  def batches(a, b):
    yield a, toy.batch_of(a)
    raise InputError("row 17 is broken")

  with pytest.raises(InputError, match="row 17"):
    with prefetch.Prefetch(batches(0, 5), lambda rows: rows) as stream:
      for _ in range(3):
        prefetch.checked(next(stream, None), 0)


def test_batches_are_made_ahead_and_the_thread_ends():
  made = []

  def batches():
    for i in range(100):
      made.append(i)
      yield i, toy.batch_of(i)

  ahead = prefetch.Prefetch(batches(), jax.device_put)
  with ahead as stream:
    assert next(stream)[0] == 0
    time.sleep(0.5)
    assert prefetch.AHEAD <= len(made) <= prefetch.AHEAD + 2
  assert not ahead._thread.is_alive()


def test_token_counts(tmp_path):
  toy.run(tmp_path, steps=9, log_every=9, sleep=0.02)
  row = [r for r in observe.read_metrics(tmp_path) if r["step"] == 9][0]
  real = np.mean([np.count_nonzero(toy.batch_of(s)["segments"]) for s in range(1, 9)])
  assert row["tokens_per_second"] * row["step_time"] == pytest.approx(real, rel=1e-6)
  assert row["padded_tokens_per_second"] * row["step_time"] == pytest.approx(12, rel=1e-6)
  assert row["target_tokens_per_second"] * row["step_time"] == pytest.approx(4, rel=1e-6)
  assert row["data_wait"] > 0.5 and row["mfu"] is None and row["eta"] == 0
