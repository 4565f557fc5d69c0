"""The schema of a config: unknown keys are errors with a suggestion, every config file loads and its step compiles.

Catches: a key added to `base` that setup does not read, a check that lets misspelt or foreign keys through.
"""

import pathlib
import re

import jax
import ml_collections
import pytest

from jaxft import config, modeling, setup
from jaxft.errors import InputError

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def test_unknown_key_says_what_was_meant():
  c = config.base()
  with c.unlocked():
    c.optimizer.leer = 1.0
  with pytest.raises(InputError, match=r"optimizer\.leer.*did you mean optimizer\.lr|did you mean 'optimizer\.lr'"):
    config.check(c)


def test_names_of_other_trainers_are_translated():
  c = config.base()
  with c.unlocked():
    c.learning_rate = 1.0
  with pytest.raises(InputError, match="did you mean optimizer.lr"):
    config.check(c)


def test_evals_are_completed_and_checked():
  c = config.base()
  c.evals = dict(bleu=dict(kind="generate", beams=4))
  assert config.check(c).evals.bleu.length_penalty == 1.0
  c = config.base()
  c.evals = dict(bleu=dict(kind="generat"))
  with pytest.raises(InputError, match="generate"):
    config.check(c)
  c = config.base()
  c.evals = dict(bleu=dict(kind="loss", beams=4))
  with pytest.raises(InputError, match="evals.bleu.beams"):
    config.check(c)


def test_json_round_trip_and_differences():
  c = config.base()
  c.optimizer.lr = 0.5
  again = config.from_json(config.to_json(c))
  assert config.differences(again, c) == {}
  assert config.differences(again) == {"optimizer.lr": (1e-3, 0.5)}


def test_the_order_of_parallel_files_survives():
  """It says which language is the input where no template does."""
  c = config.base()
  c.data.train, c.data.validation = dict(en="a", de="b"), [dict(fr="c", en="d"), 2.0]
  again = config.from_json(config.to_json(config.check(c)))
  assert list(config.Reader(again).data.train) == ["en", "de"] and config.differences(again, c) == {}
  assert list(config.Reader(again).data.validation[0]) == ["fr", "en"]


def test_reader_names_what_was_not_read():
  c = ml_collections.ConfigDict(dict(a=1, b=dict(c=2, d=3)))
  r = config.Reader(c)
  assert (r.a, r.b.c) == (1, 2)
  assert r.unread() == ["b.d"]


def test_groups_given_as_a_dict_are_completed():
  c = config.base()
  c.optimizer = dict(name="lion", lr=1)
  c.task = dict(kind="seq2seq", input="{a}")
  c.data = dict(train="a.jsonl")
  config.check(c)
  assert (c.optimizer.lr, c.optimizer.schedule, c.task.target, c.data.lengths.inputs) == (1, "linear", "{target}", 512)


WRONG = {  # words of the message -> a change
  "optimizer.lr is '3e-4', of type str": dict(optimizer=dict(lr="3e-4")),
  "data.pack is 1, of type int; it takes a bool": dict(data=dict(pack=1)),
  "save is 5; it is a group: dict(best=": dict(save=5),
  "trainable is '.*', of type str": dict(trainable=".*"),
  "write evals.bleu = dict(kind=...)": dict(evals=dict(bleu=None)),
  "evals.bleu is 'generate'; write dict(kind='generate')": dict(evals=dict(bleu="generate")),
  "evals.bleu.every is '5', of type str": dict(evals=dict(bleu=dict(kind="generate", every="5"))),
}


@pytest.mark.parametrize("says", WRONG)
def test_values_of_another_type_are_refused(says):
  c = ml_collections.ConfigDict({**config.base().to_dict(), **WRONG[says]})
  with pytest.raises(InputError, match=re.escape(says)):
    config.check(c)


def load(path):
  space = {}
  exec(compile(path.read_text(), path, "exec"), space)
  return space


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_files_load_with_every_argument(path):
  space = load(path)
  for arg in ("", "scratch", *space["HUB"]) if "HUB" in space else ("",):
    config.check(space["get_config"](arg))
  if "HUB" in space:
    with pytest.raises(InputError, match="did you mean 't5-base'"):
      space["get_config"]("t5-bas")
  assert "python -m jaxft.main --config=configs/" in space["__doc__"]
  assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", [f for f in FILES if f.stem in ("t5", "starter")], ids=lambda p: p.stem)
def test_steps_of_config_files_compile(path, tmp_path):
  """The real step at its real size; the built-in data is cut to a few rows, and the compiler does the least it can.

  Of the configs that start from the Hub, the step of a small stand-in runs in test_tiny_configs.py.
  """
  c = load(path)["get_config"]()
  c.data.limit, c.data.cache, c.mesh = 40, str(tmp_path), dict(data=2, fsdp=2, tensor=2)
  c = config.Reader(config.check(c))
  source = modeling.source(c)
  data = setup.training_data(c, source)
  m = setup.model_for(c, source, data)
  batches = setup.batches(c, data, m)
  t = setup.trainer(c, m, data, setup.total_steps(c, batches))
  batch = {k: jax.ShapeDtypeStruct(*x) for k, x in batches.spec().items()}
  lowered = t.step.lower(t.abstract, batch)
  assert lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes > 0
