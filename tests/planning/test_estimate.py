"""Figures of compiled programs. Catches: memory that does not add up to what the compiler says, a state that is counted
whole on each device, a refusal for want of memory that ends in a traceback or passes for a fit, a collective at the
wrong speed, a stale plan from the cache, a change of a config that is said to fit and was never compiled.
"""

import dataclasses
import pathlib
import runpy

import jax
import pytest

from jaxft import config, trees
from jaxft.config import Reader
from jaxft.errors import InputError
from jaxft.planning import build, cache, estimate, hlo, ladder, plans, show, targets

ROOT = pathlib.Path(__file__).parent.parent.parent
CPU8 = targets.Target("cpux8", "cpu", 8, None, "")


def tiny(name="llama_sft", **change):
  c = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("tiny")
  c.steps, c.data.lengths = 10, dict(inputs=64)
  c.update(change)
  return config.check(c)


@pytest.fixture(scope="module")
def made():
  built = build.train_step(Reader(tiny()), jax.devices())
  return built, estimate.make(built, CPU8, jax.devices()[0])


def test_memory_adds_up(made):
  built, e = made
  m = build.lower(built).compile().memory_analysis()
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  assert e.total == m.argument_size_in_bytes + m.temp_size_in_bytes + outputs
  # of 8 shards, save what is small and split nowhere
  assert trees.nbytes(built.state.params) / 8 <= e.memory["parameters"] < trees.nbytes(built.state.params) / 6
  assert e.memory["optimizer"] == pytest.approx(2 * e.memory["parameters"], abs=100)
  assert e.memory["gradients"] == e.memory["parameters"] and e.memory["logits"] == 4 * 1 * 64 * 264
  assert e.state == trees.nbytes(built.state) and e.trained == e.parameters == trees.count(built.state.params)
  assert (e.tokens, e.rows) == (8 * 64, 8)
  assert e.model_flops > 6 * (e.parameters - 264 * 64) * e.tokens  # 6 N D, and attention
  assert e.model_flops < e.flops < 1.1 * e.model_flops  # scores are made again


def test_rematerialisation_is_work_but_not_the_models():
  built = build.train_step(Reader(tiny(model=dict(tiny().model, remat="block"))), jax.devices())
  e = estimate.make(built, CPU8, jax.devices()[0])
  assert 1.15 * e.model_flops < e.flops < 1.4 * e.model_flops


def test_a_frozen_body_and_micro_batches():
  c = tiny("bert_frozen_head")
  c.trainable = (("head/.*", True), (".*", False))
  e = estimate.make(build.train_step(Reader(c), jax.devices()), CPU8, jax.devices()[0])
  assert e.memory["frozen"] > 5 * e.memory["parameters"] > 0 and e.trained < e.parameters / 7
  one = estimate.make(build.train_step(Reader(tiny(batch=16)), jax.devices()), CPU8, jax.devices()[0])
  two = estimate.make(build.train_step(Reader(tiny(batch=16, micro=2)), jax.devices()), CPU8, jax.devices()[0])
  assert two.memory["gradients"] == 2 * one.memory["gradients"] and two.memory["logits"] == one.memory["logits"] / 2


@pytest.mark.parametrize(
  "said, temporaries",
  [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (34.00G) exceeds "
     "available HBM (15.75G).", 34 * 2**30),
    ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 34.00G of 15.48G hbm. Exceeded hbm "
     "capacity by 18.52G.", None),
  ],
)  # fmt: skip
def test_a_refusal_for_want_of_memory_is_a_figure(made, monkeypatch, said, temporaries):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(said)

  built, e = made
  monkeypatch.setattr(build, "lower", lambda of: Lowered())
  target = targets.parse("v5e:2x4")
  out = estimate.make(built, target, jax.devices()[0])
  assert not out.compiled and not out.fits and out.limit == 15.75 * 2**30
  held = sum(map(estimate.local, jax.tree.leaves(built.args)))
  assert out.total == pytest.approx(held + temporaries if temporaries else 34 * 2**30, rel=1e-6)
  text = show.screen("x", plans.Plan(out, None, None), show.Run(10, 0.0, 0.0, 2, 1e9, False))
  assert "does NOT fit" in text and "No change that was tried" in text
  assert estimate.from_json(estimate.to_json(out)) == out


def test_another_error_of_the_compiler_is_one_paragraph(made, monkeypatch):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")

  monkeypatch.setattr(build, "lower", lambda of: Lowered())
  with pytest.raises(InputError, match="the compiler refuses this step: INTERNAL: Mosaic failed"):
    estimate.make(made[0], CPU8, jax.devices()[0])


def test_time_of_collectives():
  v5p = targets.parse("v5p:2x2x2")
  of = lambda kind, group=8, bytes=5.4e11: hlo.Moved(kind, "", bytes, group, 1, "", False)
  assert estimate._seconds(of("all-gather"), v5p) == pytest.approx(7 / 8)
  assert estimate._seconds(of("all-reduce"), v5p) == pytest.approx(2 * 7 / 8)
  assert estimate._seconds(of("reduce-scatter", bytes=5.4e11 / 8), v5p) == pytest.approx(7 / 8)
  assert estimate._seconds(of("collective-permute", 2), v5p) == pytest.approx(3)  # one of six links each way
  assert targets.parse("h100x16").link == 5e10 and targets.parse("h100x8").link == 4.5e11


# ---- the ladder


SAVED = dict(none=1.0, dots=0.5, attention=0.3, block=0.2, offload=0.1)


def figures(c, *, state, activations, limit):
  """What a step needs, as a device with `limit` bytes would: exact where the predictions of the ladder are rough."""
  rows, trained = c.batch / c.micro / 8, 0.01 if c.lora.rank else 1.0
  small = "bfloat16" in (c.model.params_dtype, c.model.frozen_dtype)
  moments = dict(adamw=1.0, adamw_8bit=0.25, adafactor=0.0)[c.optimizer.name]
  m = dict.fromkeys(estimate.KINDS, 0.0) | dict(
    parameters=state / (6 if small else 3), optimizer=state * 2 / 3 * moments * trained,
    gradients=state / 3 * trained * (2 if c.micro > 1 else 1),
    activations=activations * rows * SAVED[c.model.remat])  # fmt: skip
  return estimate.Estimate(
    target="t", devices=8, mesh=dict(data=1, fsdp=8, tensor=1), compiled=True, memory=m, limit=limit, state=8 * state,
    parameters=1, trained=1, model_flops=1.0, flops=1.0, traffic=0.0, collectives=[], seconds={}, step=1.0, source="",
    tokens=1, rows=c.batch, peak=1.0, compile_s=0.0, assumed=[])  # fmt: skip


@pytest.mark.parametrize(
  "state, activations, limit, flags",
  [
    (3.0, 2.0, 8.5, {"micro": 4}),  # 3 + 2 + 2 a row: four passes of one row each are the cheapest that fits
    (3.0, 4.0, 8.5, {"micro": 4, "model.remat": "dots"}),
    (3.0, 9.0, 8.0, {"micro": 4, "model.remat": "attention"}),
    (3.0, 12.0, 8.0, {"micro": 4, "model.remat": "block"}),
    (3.0, 20.0, 8.0, {"micro": 4, "model.remat": "offload"}),
    (6.0, 1.0, 7.0, {"model.remat": "block", "optimizer.name": "adamw_8bit"}),
    (9.0, 1.0, 7.2, {"model.remat": "block", "model.params_dtype": "bfloat16", "optimizer.name": "adamw_8bit"}),
    (30.0, 1.0, 7.0, {"model.remat": "block", "lora.rank": 16, "model.frozen_dtype": "bfloat16"}),
    (60.0, 1.0, 7.0, None),
  ],
)
def test_the_cheapest_change_that_fits(state, activations, limit, flags):
  c = tiny(batch=32)
  compiled = []

  def compile_(new):
    compiled.append(new)
    return figures(new, state=state, activations=activations, limit=limit)

  first = figures(c, state=state, activations=activations, limit=limit)
  assert not first.fits
  found = ladder.climb(c, first, 8, compile_, 8)
  if flags is None:
    assert found is None
    return
  change, after = found
  assert dict(change.flags) == flags and after.fits
  assert change.same == (not {"optimizer.name", "lora.rank"} & set(flags))
  got = compiled[-1]
  assert got.micro == flags.get("micro", 1) and got.model.remat == flags.get("model.remat", "none")
  assert c.micro == 1 and c.model.remat == "none", "the config itself stays as it is"
  assert " ".join(f"--config.{k}={v}" for k, v in flags.items()) == change.text()


def test_what_is_no_longer_the_same_run_is_tried_in_this_order():
  c = tiny(batch=32)
  found = [dict(x.flags) for x in ladder.changes(c, 8) if not x.same]
  names = [tuple(k for k in x if k not in ("micro", "model.remat")) for x in found]
  both = ("model.params_dtype", "optimizer.name")
  frozen = ("lora.rank", "model.frozen_dtype")
  order = [("optimizer.name",), both[:1], both, ("optimizer.name",), frozen, ("batch",)]
  assert [n for n, before in zip(names, [None, *names]) if n != before] == order
  assert [x["optimizer.name"] for x in found if "optimizer.name" in x][::2] == ["adamw_8bit", "adamw_8bit", "adafactor"]
  for change in (dict(lora=dict(c.lora, rank=4)), dict(optimizer=dict(c.optimizer, name="adafactor"))):
    other = tiny(batch=32)
    other.update(change)
    key = "lora.rank" if "lora" in change else "optimizer.name"
    assert not any(key in dict(x.flags) for x in ladder.changes(other, 8))


def test_no_more_trials_than_asked_for(caplog):
  c = tiny(batch=32)
  first = figures(c, state=3.0, activations=2.0, limit=8.5)
  wrong = dataclasses.replace(first, memory={**first.memory, "activations": 9.0})
  caplog.set_level("INFO")
  assert ladder.climb(c, first, 8, lambda new: wrong, 1) is None
  assert caplog.text.count("Trying") == 1


# ---- the cache


def test_a_plan_is_made_once(made, monkeypatch, tmp_path, caplog):
  monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
  asked = []
  monkeypatch.setattr(estimate, "make", lambda built, *a: asked.append(built) or made[1])
  monkeypatch.setattr(build, "train_step", lambda reader, devices: reader)
  one = lambda c, name="cpu": plans.plan(c, targets.parse(name))
  assert one(tiny()) == one(tiny()) == plans.Plan(made[1], None, None) and len(asked) == 1
  one(tiny(batch=16))
  one(tiny(), "cpux2")
  assert len(asked) == 3
  for file in (tmp_path / "plans").glob("*.json"):
    file.write_text("{")
  assert one(tiny()).estimate == made[1] and "cannot be read" in caplog.text and len(asked) == 4
  monkeypatch.setattr(cache.observe, "versions", lambda *_: dict(jax="another"))
  one(tiny())
  assert len(asked) == 5


def test_picture_and_table(made):
  _, e = made
  limit = dataclasses.replace(e, target="v5e:2x4", limit=16.0 * 2**30)
  assert show.picture({"cpux8": e, "v5e:2x4": limit}, "memory")[:4] == b"\x89PNG"
  run = show.Run(1000, 2.5, 2.0, 3, 1e9, False)
  text = show.table({"v5e:2x4": plans.Plan(limit, None, None), "h100x8": "no compiler"}, run)
  assert "h100x8: no compiler" in text and "yes" in text and max(map(len, text.splitlines())) <= 100
