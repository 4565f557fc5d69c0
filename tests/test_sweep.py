"""Sweeps: what is tried, what ends early, what is compiled again, and that a kill changes nothing in the table.

Catches: a trial that depends on how often the process was started, a finished trial that runs again, a program compiled
for a number that could be an argument, a trial that differs from an ordinary run, checkpoints of losers that stay, a
failure that ends the sweep, a misspelt name that is passed over.
"""

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import config, main, observe, setup, space, trees, trials, tuning
from jaxft.errors import InputError, NumbersError
from jaxft.train import loop, optimizer
from tests import road_config

ROOT = pathlib.Path(__file__).parent.parent
METRIC = "eval/loss/loss"
WORDS = "the old harbour sleeps under seven small stars while winter rain keeps falling on red roofs".split()


def tiny(folder="."):
  c = road_config.get_config(str(folder))
  c.steps, c.micro, c.batch, c.mesh = 6, 1, 8, dict(data=1, fsdp=1, tensor=1)
  c.evals = dict(loss=dict(kind="loss", every=2, batch=8))
  c.save.update(every=2, mode="min", best=METRIC)
  c.numbers.skip = 0
  return config.check(c)


def fake(c, folder, way):
  """Trains nothing in 4 steps: the loss is least at a rate of 1e-3, and above 0.1 there is none."""
  home = pathlib.Path(folder)
  (home / "checkpoints").mkdir(parents=True, exist_ok=True)
  (home / "metrics.jsonl").write_text("")
  judge = way.judge(loop.EarlyStop(metric="", mode="min", patience=0, min_delta=0.0), 4, home)
  time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
  if c.optimizer.lr > 0.1:
    raise NumbersError("not finite")
  for step in range(1, 5):
    value = (math.log10(c.optimizer.lr) + 3) ** 2 + 1 / step + c.seed / 100
    with open(home / "metrics.jsonl", "a") as f:
      f.write(json.dumps({"step": step, METRIC: value}) + "\n")
    judge.see({METRIC: value})


def sweep(given, home, train=fake):
  home.mkdir(exist_ok=True)
  c = tiny()
  made = tuning.Sweep(train, c, space.read(given, c), home)
  made.run()
  return made


def told(made):
  """What the trials came to, without what depends on the clock."""
  return [{k: v for k, v in vars(t).items() if k != "seconds"} for t in made.trials]


def test_grid_tries_all_in_order_and_keeps_the_best(tmp_path):
  made = sweep("optimizer.lr=[1e-4,1e-3] seed=range(3)", tmp_path)
  assert [(t.values["optimizer.lr"], t.values["seed"]) for t in made.trials] == [
    (lr, s) for lr in (1e-4, 1e-3) for s in range(3)
  ]
  assert made.best().number == 3 and made.best().step == 4 and made.best().metric == pytest.approx(0.25)
  left = [p.parent.name for p in sorted(tmp_path.glob("trial-*/checkpoints"))]
  assert left == ["trial-003"], "the others lose their checkpoints, and nothing else"
  assert len(list(tmp_path.glob("trial-*/metrics.jsonl"))) == 6
  rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
  assert [r["seed"] for r in rows] == [0, 1, 2] * 2 and rows[0]["state"] == "done"


def test_random_follows_the_seed_alone(tmp_path):
  given = "optimizer.lr=log(1e-5,1e-2) optimizer.name=[adamw,lion] batch=int(8,9) trials=5 method=random"
  one, two = sweep(given, tmp_path / "a"), sweep(given, tmp_path / "b")
  assert told(one) == told(two)
  other = sweep(given + " sampler_seed=1", tmp_path / "c")
  values = [t.values for t in one.trials]
  assert values != [t.values for t in other.trials]
  assert len({v["optimizer.lr"] for v in values}) == 5 and all(1e-5 <= v["optimizer.lr"] <= 1e-2 for v in values)
  assert {v["optimizer.name"] for v in values} <= {"adamw", "lion"} and {v["batch"] for v in values} <= {8, 9}


def test_tpe_looks_where_it_is_good(tmp_path):
  made = sweep("optimizer.lr=log(1e-9,1e-1) method=tpe trials=24 startup=6", tmp_path)
  far = [abs(math.log10(t.values["optimizer.lr"]) + 3) for t in made.trials]
  assert sum(far[-8:]) / 8 < 0.6 * sum(far[:6]) / 6


def test_the_same_values_are_not_run_twice(tmp_path):
  made = sweep("seed=[1,2] optimizer.lr=[1e-3,1e-2] method=random trials=12", tmp_path)
  ran = len(list(tmp_path.glob("trial-*/metrics.jsonl")))
  assert len(made.trials) == 12 and ran <= 4 and sum("the same as trial" in t.note for t in made.trials) == 12 - ran


def test_worse_trials_are_pruned_and_failures_go_on(tmp_path):
  made = sweep("optimizer.lr=[1e-3,2e-3,1e-7,1,1.1e-3] prune=median startup=2", tmp_path)
  assert [t.state for t in made.trials] == ["done", "done", "pruned", "failed", "done"]
  assert [len(t.evals) for t in made.trials] == [4, 4, 1, 0, 4]
  text = trials.table(made.trials, space.read("optimizer.lr=[1e-3,2e-3,1e-7,1,1.1e-3] prune=median startup=2", tiny()))
  assert "pruned" in text and "failed" in text and max(map(len, text.splitlines())) <= 100
  assert json.loads((tmp_path / "trial-002" / "done.json").read_text()) == dict(ended="pruned", step=1)


GIVEN = "optimizer.lr=log(1e-6,0.2) seed=[0,1] method=tpe trials=9 prune=median startup=3"
SCRIPT = """
import pathlib, sys
from tests import test_sweep
test_sweep.sweep(test_sweep.GIVEN, pathlib.Path(sys.argv[1]))
"""


def test_killed_and_started_again_gives_the_same_table(tmp_path, monkeypatch):
  whole = sweep(GIVEN, tmp_path / "whole")
  env = dict(os.environ, PYTHONPATH=str(ROOT), FAKE_SLEEP="0.2")
  child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "killed")], env=env)
  end = time.monotonic() + 120
  while not (tmp_path / "killed" / "trial-004").exists() and child.poll() is None and time.monotonic() < end:
    time.sleep(0.01)
  child.kill()
  assert child.wait() == -9
  there = json.loads((tmp_path / "killed" / "sweep.journal").read_text())["trials"]
  assert 4 < len(there) <= 6 and there[-1]["state"] == "running"
  ran = []
  again = sweep(GIVEN, tmp_path / "killed", lambda c, folder, way: (ran.append(folder), fake(c, folder, way)))
  assert told(again) == told(whole) and len(ran) == 9 - len(there) + 1, "those that had ended are not run again"
  assert told(sweep(GIVEN, tmp_path / "killed", None)) == told(whole)


def test_another_sweep_in_the_folder_is_refused(tmp_path):
  sweep("optimizer.lr=[1e-3,1e-2]", tmp_path)
  with pytest.raises(InputError, match=r"optimizer.lr: \[0.001, 0.01\] there, \[0.001\] now"):
    sweep("optimizer.lr=[1e-3]", tmp_path)
  c = tiny()
  c.batch, c.log.every = 16, 5
  with pytest.raises(InputError, match="batch: 8 there, 16 now") as e:
    tuning.Sweep(fake, c, space.read("optimizer.lr=[1e-3,1e-2]", c), tmp_path)
  assert "log.every" not in str(e.value)


def test_a_refused_config_stops_the_sweep_and_leaves_the_folder_free(tmp_path):
  def refuse(c, folder, way):
    pathlib.Path(folder).mkdir()
    raise InputError("config: batch=7 does not fit")

  with pytest.raises(InputError, match=r"trial 0 \(lr=0.001\): config: batch=7"):
    sweep("optimizer.lr=[1e-3]", tmp_path, refuse)
  assert len(sweep("optimizer.lr=[1e-3,1e-2]", tmp_path).trials) == 2


BAD = {
  "optimizer.leer=[1]": "no optimizer.leer (did you mean 'optimizer.lr'?)",
  "lr=[1]": "no lr (did you mean optimizer.lr?)",
  "metod=grid seed=[1]": "no metod (did you mean 'method'?)",
  "method=gird seed=[1]": "'gird' (did you mean 'grid'?)",
  "optimizer.lr=[fast]": "optimizer.lr='fast' is of type str; the config takes float",
  "batch=[1.5]": "batch=1.5 is of type float; the config takes int",
  "batch=uniform(1,2)": "the config takes int",
  "batch=16": "--config.batch=16",
  "optimizer.lr=logg(1,2)": "no logg (did you mean 'log'?)",
  "optimizer.lr=log(0,1)": "two numbers above 0",
  "optimizer.lr=log(1e-5,1e-3) method=grid": "has no end of them",
  "optimizer.lr=uniform(0,1) trials=0": "trials is 0",
  "seed=[1] trials=3": "method=grid has 1 trials",
  "seed=[1] seed=[2]": "there twice",
  "seed": "'seed' is not NAME=VALUES",
  "seed=[1": "cannot be read",
  "method=random": "names nothing to try",
  "seed=[1] metric=eval/loss/accuracy": "add mode=max or mode=min",
  "save.best=[a]": "save.best cannot be tried",
  "": "--sweep=FILE.py",
  "nowhere.py": "No such file",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_specs(given):
  with pytest.raises(InputError) as e:
    space.read(given, tiny())
  assert BAD[given] in str(e.value) and "\n" not in str(e.value)


def test_pruning_without_evaluations_on_the_way_is_refused():
  c = tiny()
  c.evals.loss.every = 0
  with pytest.raises(InputError, match="evals.loss.every is 0"):
    space.read("seed=[1,2] prune=median", c)


def test_files(tmp_path):
  file = tmp_path / "s.py"
  body = (
    'dict(method="tpe", trials=3, seed=range(2), **{"optimizer.lr": "log(1e-4, 1e-2)", "model.dropout": [0.1, None]})'
  )
  file.write_text(f"def get_sweep():\n  return {body}\n")
  line = "method=tpe trials=3 seed=range(2) optimizer.lr=log(1e-4,1e-2) model.dropout=[0.1, none]"
  assert space.read(str(file), tiny()) == space.read(line, tiny())
  file.write_text("def get_sweep():\n  return nothing\n")
  with pytest.raises(InputError, match="line 2: NameError"):
    space.read(str(file), tiny())
  for path in sorted((ROOT / "configs" / "sweeps").glob("*.py")):
    assert space.read(str(path), tiny()).axes, path


def test_a_name_in_a_config_is_put_where_it_belongs_and_the_config_stays():
  c = tiny()
  changed = space.put(config.check(tiny()), {"evals.loss.batch": 4, "optimizer.lr": 1, "data.lengths.inputs": 64})
  assert (changed.evals.loss.batch, changed.optimizer.lr, changed.data.lengths.inputs) == (4, 1.0, 64)
  space.read("evals.loss.batch=[4] optimizer.lr=[1] seed=int(4,9)", c)
  assert (c.evals.loss.batch, c.optimizer.lr, c.seed) == (8, 3e-3, 3)


def test_a_negative_rate_is_refused():
  c = tiny()
  c.optimizer.lr = -1e-3
  with pytest.raises(InputError, match="optimizer.lr=-0.001"):
    setup.numbers(config.Reader(c))


def test_numbers_that_are_arguments_and_those_that_are_not():
  c = config.Reader(tiny())
  plain = {"optimizer.lr": 3e-3, "optimizer.eps": 1e-8, "optimizer.decay": 0.01}
  assert setup.numbers(c) == plain | {"loss.label_smoothing": 0.03, "loss.z_loss": 1e-4}
  c = tiny()
  c.optimizer.decay = c.loss.label_smoothing = 0.0
  off = {"optimizer.decay", "loss.label_smoothing"}
  assert not off & setup.numbers(config.Reader(c)).keys(), "a shorter program"
  assert {*off, "optimizer.b2"} <= setup.numbers(config.Reader(c), ("optimizer.b2", *off)).keys()
  c.loss.label_smoothing = 1.0
  with pytest.raises(InputError, match="label_smoothing=1.0 is a share"):
    setup.numbers(config.Reader(c))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_numbers_that_are_arguments_give_the_same_updates(name):
  """Also a decay of 0, which is no part of the program otherwise; 1 - b2 of an argument is rounded on the device."""
  params = dict(side=dict(layers=dict(q=dict(kernel=jnp.linspace(-1, 1, 48).reshape(2, 4, 6)))))
  axes = dict(side=dict(layers=dict(q=dict(kernel=("layers", "embed", "mlp")))))
  how = dict(schedule="cosine", warmup=1, cooldown=0.0, end=0.1, clip=1.0, decay_rules=((".*", 1.0),),
             lr_rules=((".*", 0.5),), layer_decay=1.0, toward_init=0.01, unfreeze=(), steps=9, name=name, shapes=params,
             axes=axes, trainable=trees.trainable(((".*", True),), params, axes))  # fmt: skip
  values = dict(lr=0.3, decay=0.0, eps=1e-3, b1=0.8, b2=0.97)

  def updates(traced):
    rest = {k: x for k, x in values.items() if k not in traced}
    make = lambda given: optimizer.make(**how, **rest, **given)[0]

    def two(given):
      tx = make(given)
      first, state = tx.update(params, tx.init(params), params, step=jnp.int32(0))
      return tx.update(jax.tree.map(jnp.sin, params), state, params, step=jnp.int32(1))[0], first

    given = {k: jnp.float32(values[k]) for k in traced}
    return jax.tree.leaves(jax.jit(two).lower(given).compile({"xla_backend_optimization_level": 0})(given))

  for want, got in zip(updates(()), updates(("lr", "decay", "eps"))):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  for want, got in zip(updates(()), updates(tuple(values))):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_parts_are_made_again_where_a_config_that_they_read_differs(tmp_path):
  parts, made = tuning.Parts(), []
  make = lambda c, x: made.append((c.batch, c.optimizer.b1)) or len(made)
  for batch, lr, arg in ((8, 1.0, "a"), (8, 2.0, "a"), (16, 2.0, "a"), (8, 3.0, "b"), (8, 4.0, "a")):
    c = tiny()
    c.batch, c.optimizer.lr = batch, lr
    reader = config.Reader(c)
    parts.of(c)(make, reader, arg)
    assert "batch" not in reader.unread() and "optimizer.lr" in reader.unread(), "what a part read, the run has read"
  assert [b for b, _ in made] == [8, 16, 8]


# ---- with the real training, in a process with one device and a compiler that does the least it can

LRS = "optimizer.lr=[3e-3,1e-2,1e-6,1e30] metric=eval/loss/loss mode=min prune=median startup=1"


def really(home):
  """Sweeps with the tiny T5; trains the best config by itself; sweeps once more in two goes, the first of which ends
  within trial 1, after the evaluation of step 4 and before its checkpoint."""
  one = tuning.run(main.train, tiny(home), LRS, str(home / "whole"))
  compiled = [program.jitted._cache_size() for _, _, program in one.parts._kept[setup.program]]
  (home / "out.json").write_text(json.dumps(dict(told=told(one), made=one.parts.made, compiled=compiled)))
  c = tiny(home)
  c.optimizer.lr = 1e-2
  main.train(c, str(home / "alone"), setup.Way(one.parts.of(c)))  # parts are shared to save the time

  tuning.Parts, see = lambda: one.parts, tuning.Judge.see

  def ends(self, values):
    see(self, values)
    if self._home.name == "trial-001" and trials.evals(self._home, METRIC)[-1][0] == 4:
      raise SystemExit

  tuning.Judge.see = ends
  with contextlib.suppress(SystemExit):
    tuning.run(main.train, tiny(home), LRS, str(home / "cut"))
  tuning.Judge.see = see
  again = tuning.run(main.train, tiny(home), LRS, str(home / "cut"))
  (home / "again.json").write_text(json.dumps(told(again)))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  home = tmp_path_factory.mktemp("sweep")
  for name, n, skip in (("train", 60, 0), ("dev", 9, 5)):
    rows = [" ".join(WORDS[(i * 7 + skip + j) % len(WORDS)] for j in range(1 + i % 4)) for i in range(n)]
    (home / f"{name}.jsonl").write_text("".join(json.dumps(dict(lower=r, upper=r.upper())) + "\n" for r in rows))
  env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  env |= dict(XLA_FLAGS="--xla_backend_optimization_level=0", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
  code = "import pathlib, sys; from tests import test_sweep; test_sweep.really(pathlib.Path(sys.argv[1]))"
  done = subprocess.run([sys.executable, "-c", code, str(home)], env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  return home


def read(path):
  return json.loads(path.read_text())


def test_one_step_is_compiled_for_all_learning_rates(real):
  out = read(real / "out.json")
  assert [t["state"] for t in out["told"]] == ["done", "done", "pruned", "failed"]
  assert out["compiled"] == [1] and set(out["made"].values()) == {1} and {"program", "make"} <= out["made"].keys()
  assert out["told"][1]["metric"] < out["told"][0]["metric"] and len(out["told"][2]["evals"]) == 1


def test_a_trial_is_an_ordinary_run_and_the_best_is_exported(real):
  losses = lambda folder: [r["loss"] for r in observe.read_metrics(folder) if "loss" in r]
  assert losses(real / "alone") == pytest.approx(losses(real / "whole" / "trial-001"), rel=1e-6)
  best = real / "whole" / "best"
  one, other = (folder / "export" / "model.safetensors" for folder in (best, real / "alone"))
  assert one.read_bytes() == other.read_bytes()
  assert read(best / "config.json")["optimizer"]["lr"] == 1e-2 and read(best / "trial.json")["number"] == 1
  assert (real / "whole" / "sweep.html").stat().st_size > 10_000 and not (real / "whole" / "lock.json").exists()
  assert [p.parent.name for p in (real / "whole").glob("trial-*/checkpoints")] == ["trial-001"]


def test_a_trial_that_was_cut_goes_on_from_its_checkpoint(real):
  assert read(real / "again.json") == read(real / "out.json")["told"]
  assert "Going on from the checkpoint of step 2" in (real / "cut" / "trial-001" / "log.txt").read_text()
  one, other = (real / name / "best" / "export" / "model.safetensors" for name in ("cut", "whole"))
  assert one.read_bytes() == other.read_bytes()
