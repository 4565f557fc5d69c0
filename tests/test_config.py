"""The schema of a config: unknown keys are errors with a suggestion, every config file loads, every key is read.

Catches: a key added to `base` that setup does not read, a check that lets misspelt or foreign keys through.
"""

import pathlib
import re

import ml_collections
import pytest

from jaxft import config
from jaxft.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent


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


def test_reader_names_what_was_not_read():
  c = ml_collections.ConfigDict(dict(a=1, b=dict(c=2, d=3)))
  r = config.Reader(c)
  assert (r.a, r.b.c) == (1, 2)
  assert r.unread() == ["b.d"]


def arguments(path):
  """The arguments that a config file offers: the keys of its table of sizes, and none."""
  return [""] + re.findall(r"^\s+\"?([\w.-]+)\"?\s*[:=]\s*dict\(", path.read_text(), re.M)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_config_files_load(path):
  space = {}
  exec(compile(path.read_text(), path, "exec"), space)
  config.check(space["get_config"]())
  assert "python -m jaxft.main --config=configs/" in space["__doc__"]
  assert len(path.read_text().splitlines()) <= 40
