"""Every config of configs/ runs offline as `:tiny` for two steps: data, step, evaluation, checkpoint, export.

The heads for labels, tags and answers are decoded with, too. Catches: a config that names an option, a metric or a
column that is not there; a task, head or family that is not joined up somewhere between the data and the exported
folder.
"""

import json
import pathlib
import runpy

import numpy as np
import pytest

from jaxft import config, decode, main
from jaxft.families import registry

ROOT = pathlib.Path(__file__).parent.parent
DECODED = ("bert_mrpc", "bert_ner", "bert_qa")  # a kind of head each
OWN = ("t5", "starter")  # they have tests of their own: the starter weights and tests/test_road.py
FILES = [(f, "tiny") for f in sorted((ROOT / "configs").glob("*.py")) if f.stem not in OWN]
FILES.append((ROOT / "configs" / "gpt2_sentiment.py", "tiny-words"))


@pytest.mark.parametrize("file, name", FILES, ids=lambda x: getattr(x, "stem", x))
def test_two_steps(file, name, tmp_path):
  c = runpy.run_path(str(file))["get_config"](name)
  c.steps, c.data.cache, c.log.tensorboard = 2, str(tmp_path / "cache"), False
  c.mesh = dict(data=2, fsdp=-1, tensor=1)
  for e in c.evals.values():
    e.limit = 6
    if e.kind == "generate":
      e.length, e.beams = 6, min(e.beams, 2)
  outcome = main.train(c, str(tmp_path / "run"))
  assert outcome.step == 2
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert all(np.isfinite(r["loss"]) for r in rows if "loss" in r)
  assert any(k.startswith("eval/") for r in rows for k in r)
  made = registry.read_config(tmp_path / "run" / "export")
  assert registry.head_kind(made) == registry.head_kind(json.loads((tmp_path / "run/model/config.json").read_text()))
  assert c.save.best in {k for r in rows for k in r}, f"save.best={c.save.best} is no metric of this config"
  config.check(runpy.run_path(str(file))["get_config"](""))
  if file.stem in DECODED:
    report = decode.decode(str(tmp_path / "run"), c.data.validation, str(tmp_path / "out.jsonl"))
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert report.code == 0 and len(made) == report.rows and all(r["output"] is not None for r in made)
