"""A run with adapters from the data to the exported folder, and what reads it.

Catches: a base that moves or keeps another dtype than it is told, adapters that a checkpoint, an evaluation, a decode
or an export forgets, numbers that depend on the mesh or on a restart, adapters that are added to a model that has them.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxft import config, decoding, evaluate, hub, main, modeling, runs, trees
from jaxft.config import Reader
from jaxft.errors import InputError
from jaxft.infer import options
from jaxft.infer.generate import Generator
from jaxft.planning import build
from tests import road_config

WORDS = "the old harbour sleeps under seven small stars while winter rain keeps falling on red roofs".split()
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  home = tmp_path_factory.mktemp("adapters")
  for name, n, skip in (("train", 40, 0), ("dev", 9, 5)):
    rows = [" ".join(WORDS[(i * 7 + skip + j) % len(WORDS)] for j in range(1 + i % 4)) for i in range(n)]
    text = "".join(json.dumps(dict(id=f"r{i}", lower=r, upper=r.upper())) + "\n" for i, r in enumerate(rows))
    (home / f"{name}.jsonl").write_text(text)
  return home


def given(folder, **lora):
  c = road_config.get_config(str(folder))
  c.model.init, c.model.config, c.model.tokenizer = "builtin:starter", ConfigDict(), ""
  c.steps, c.optimizer.lr, c.optimizer.decay = STEPS, 1e-2, 0.0
  c.lora = dict(rank=3, alpha=6.0, dropout=0.1, targets=(r".*_attn/[qv]", r".*/mlp/.*"), rslora=True) | lora
  c.mesh, c.batch = dict(data=1, fsdp=-1, tensor=1), 16
  c.evals = dict(loss=dict(kind="loss", every=3, batch=4))
  c.save.update(every=3, keep=2, best="", mode="min")
  c.log.tensorboard = False
  return c


@pytest.fixture(scope="module")
def finished(folder):
  outcome = main.train(given(folder), str(folder / "whole"))
  assert outcome.reason == "done"
  return folder / "whole"


def metrics(home, name):
  rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
  return {r["step"]: r[name] for r in rows if name in r}


def state(home):
  """Checksums of the whole last state."""
  return json.loads((home / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())["body"]["leaves"]


def weights(home):
  _, m, checkpointer = runs.run(str(home))
  return m, runs.weights(m, checkpointer, STEPS)


def test_adapters_alone_are_trained(finished):
  m, params = weights(finished)
  names = {p.partition("/")[0] for p in state(finished)}
  assert {"params", "frozen"} <= names
  trained = {p.removeprefix("params/") for p in state(finished) if p.startswith("params/")}
  assert trained and all("/lora_" in p for p in trained), trained
  base = hub.load(modeling.locate("builtin:starter"), m.merged.rules, m.merged.shapes, None, prefix=m.merged.prefix)
  for path, x in trees.flatten(base).items():
    np.testing.assert_array_equal(x, trees.flatten(params)[path], err_msg=path)
  loss = metrics(finished, "eval/loss/loss")
  assert loss[STEPS] < loss[3]


def test_whoever_reads_the_run_sees_the_adapters(folder, finished):
  want = metrics(finished, "eval/loss/loss")[STEPS]
  of_run = evaluate.evaluate(None, folder=str(finished), which="latest")["eval/loss/loss"]
  whole = evaluate.evaluate(given(folder), name=str(finished / "export"))["eval/loss/loss"]
  c = given(folder)
  c.model.frozen_dtype = "bfloat16"  # which a model folder has nothing to do with
  adapter = evaluate.evaluate(c, name=str(finished / "export" / "adapter"))["eval/loss/loss"]
  bare = evaluate.evaluate(given(folder), name="builtin:starter")["eval/loss/loss"]
  np.testing.assert_allclose([of_run, whole, adapter], want, rtol=2e-6)
  assert abs(bare - want) > 0.05 * want


def test_decode_of_the_run_is_that_of_the_export(finished):
  answers = []
  for name in (str(finished), str(finished / "export"), str(finished / "export" / "adapter")):
    of = decoding.load(name, "latest", "float32")
    assert of.model.skeleton.lora is None, "merged: an adapter would cost two more products a layer and token"
    m, how = of.model, options.read(of.model.skeleton.generation, {}, length=9)
    made = Generator(m.skeleton, m.tokenizer, how, batch=4, mesh=m.mesh, rules=m.rules)
    rows = made.encode([f"up: {w}" for w in WORDS[:4]])
    answers.append([(a.texts, a.lengths) for _, many in made.stream(of.params, rows) for a in many])
  assert answers[0] == answers[1] == answers[2] and any(answers[0])


def test_a_restart_changes_no_bit(folder, finished):
  copy = folder / "again"
  shutil.copytree(finished, copy)
  shutil.rmtree(copy / "checkpoints" / str(STEPS))
  (copy / "done.json").unlink()
  main.train(given(folder), str(copy))
  assert state(copy) == state(finished)


def test_the_mesh_does_not_change_the_numbers(folder, finished):
  c = given(folder)
  c.mesh = dict(data=2, fsdp=2, tensor=2)
  main.train(c, str(folder / "mesh"))
  for name in ("loss", "grad_norm"):
    a, b = metrics(finished, name), metrics(folder / "mesh", name)
    np.testing.assert_allclose([a[s] for s in sorted(a)], [b[s] for s in sorted(b)], rtol=5e-5, err_msg=name)


def test_a_frozen_base_in_bfloat16(folder):
  c = given(folder)
  c.model.frozen_dtype, c.steps, c.optimizer.warmup = "bfloat16", 2, 0
  main.train(c, str(folder / "half"))
  _, m, checkpointer = runs.run(str(folder / "half"))
  params = runs.weights(m, checkpointer, 2)
  kinds = {p: x.dtype for p, x in trees.flatten(params).items()}
  assert all(d == (jnp.float32 if "/lora_" in p else jnp.bfloat16) for p, d in kinds.items()), kinds
  m, params = modeling.whole(m, params)
  assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, m.skeleton.shapes)
  exported = hub.load(folder / "half" / "export", m.skeleton.rules, m.skeleton.shapes, None)
  for (path, x), y in zip(trees.flatten(exported).items(), trees.flatten(params).values()):
    np.testing.assert_array_equal(x, y, err_msg=path)


def make(c):
  reader = Reader(config.check(c))
  return modeling.make(reader, modeling.source(reader), None)


@pytest.mark.parametrize("rules, trained", [
  (((".*", True),), {"lora"}), (((".*norm.*", True), (".*", False)), {"lora", "norm"}),
])  # fmt: skip
def test_what_is_trained_beside_adapters(folder, rules, trained):
  c = given(folder)
  c.trainable = rules
  flags = trees.flatten(make(c).trainable)
  kinds = {"lora" if "/lora_" in p else "norm" if "norm" in p else p for p, f in flags.items() if np.any(f)}
  assert kinds == trained


def test_training_goes_on_from_an_adapter_folder(folder, finished):
  c = given(folder, rank=0)
  c.model.init = str(finished / "export" / "adapter")
  assert build.model_source(Reader(config.check(c)))[0].json["d_model"] == 128, "a plan asks for the base's shapes"
  m = make(c)
  found = trees.flatten(modeling.load(m, 0))
  want = trees.flatten(modeling.whole(*weights(finished))[1])
  assert m.base == "" and "other adapters" in modeling.unshared(m) and found.keys() == want.keys()
  for path, x in want.items():
    np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)
  c.lora.rank, c.steps, c.optimizer.warmup = 2, 1, 0
  main.train(c, str(folder / "twice"))
  assert modeling.unshared(runs.run(str(folder / "twice"))[1]), "its readers know, too, that no one else has its base"
  assert not (folder / "twice" / "export" / "adapter").exists()


def test_where_no_one_else_has_the_base(folder):
  c = given(folder)
  assert modeling.unshared(make(c)) == ""
  c.task.kind, c.task.target, c.model.head.width = "classify", "", 16
  reader = Reader(config.check(c))
  source = modeling.source(reader)
  m = modeling.make(reader, source, modeling.wanted("classify", source.json, ("a", "b"), multi=False, mlp=(16, "tanh")))
  assert "its head is not one" in modeling.unshared(m)
  flags = trees.flatten(m.trainable)
  assert all(np.any(flags[p]) == (p.startswith("head/") or "/lora_" in p) for p in flags), "a new head learns"


def test_names_that_people_type(folder):
  c = given(folder, r=4)
  with pytest.raises(InputError, match="lora.rank"):
    config.check(c)


def test_a_float32_model_does_not_raise_the_precision_of_those_after_it(folder):
  c = given(folder)
  make(c)
  assert jax.config.jax_default_matmul_precision == "highest"
  c.model.dtype = "bfloat16"
  make(c)
  assert jax.config.jax_default_matmul_precision == modeling.PRECISION != "highest"
