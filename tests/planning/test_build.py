"""Programs from shapes alone. Catches: a batch, a state or a step other than what training has with the same config; a
well-known model of another size than its makers say.
"""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from jaxft import config, modeling, setup, trees
from jaxft.config import Reader
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.planning import build, shapes
from tests.families.test_t5 import SIZES

HOW = dict(dtype="bfloat16", params_dtype="float32", remat="none", unroll=1, dropout=None)
ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = [(f, "tiny") for f in sorted((ROOT / "configs").glob("*.py")) if f.stem not in ("t5", "starter")]
FILES += [(ROOT / "configs" / "t5.py", ""), (ROOT / "configs" / "gpt2_sentiment.py", "tiny-words")]
COUNTS = {  # parameters, as the models' pages or papers have them, with the head that jaxft gives the model
  "google-bert/bert-base-uncased": 109_482_240,
  "google-bert/bert-large-uncased": 335_141_888,
  "openai-community/gpt2": 124_439_808,
  "openai-community/gpt2-xl": 1_557_611_200,
  "meta-llama/Llama-3.2-1B": 1_235_814_400,
  "meta-llama/Llama-3.2-3B": 3_212_749_824,
  "meta-llama/Llama-3.1-8B": 8_030_261_248,
  "meta-llama/Llama-3.1-70B": 70_553_706_496,
  "Qwen/Qwen2.5-0.5B": 494_032_768,
  "Qwen/Qwen2.5-7B": 7_615_616_512,
  "Qwen/Qwen3-8B": 8_190_735_360,
  "google/gemma-2-2b-it": 2_614_341_888,
  "google/gemma-2-9b-it": 9_241_705_984,
  "google/gemma-2-27b-it": 27_227_128_320,
  "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}


def real(file, name, tmp_path):
  c = runpy.run_path(str(file))["get_config"](name)
  c.data.cache, c.steps = str(tmp_path), 5
  c.mesh = dict(data=2, fsdp=-1, tensor=1)
  return config.check(c)


@pytest.mark.parametrize("file, name", FILES, ids=lambda x: getattr(x, "stem", x))
def test_batch_and_state_are_those_of_training(file, name, tmp_path):
  c = real(file, name, tmp_path)
  r = Reader(c)
  source = modeling.source(r)
  data = setup.training_data(r, source)
  m = setup.model_for(r, source, data)
  want = setup.batches(r, data, m).spec()
  state = setup.program(r, m, data, 5, tuple(setup.numbers(r))).abstract

  if data.labels:
    c.task.labels = tuple(map(str, data.labels))
  found = build.train_step(Reader(c), jax.devices())
  segments = lambda spec: {
    k: (tuple(x if i != 1 or k not in ("labels", "label_weights", "starts", "ends") else 0 for i, x in enumerate(s)), d)
    for k, (s, d) in spec.items()
  }
  assumed = {"input_types"} - set(want)  # the tokenizers of the stand-ins give no types, a real BERT's does
  assert segments({k: x for k, x in found.batch.items() if k not in assumed}) == segments(want)
  assert trees.flatten(found.state.params).keys() == trees.flatten(state.params).keys()
  plain = lambda tree: [(x.shape, x.dtype, x.sharding.spec) for x in jax.tree.leaves(tree)]
  assert plain(found.state) == plain(state)


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_of_well_known_models(name):
  made = registry.skeleton(dict(shapes.MODELS[name]), **HOW)
  assert trees.count(made.shapes) == COUNTS[name]


T5 = [n for n in shapes.MODELS if n.startswith(("google-t5/", "google/t5", "google/flan", "google/mt5", "google/byt5"))]


@pytest.mark.parametrize("name", T5[::3])
def test_sizes_of_t5(name):
  short = name.split("/")[1].removeprefix("t5-") if "v1_1" in name else name.split("/")[1]
  assert trees.count(registry.skeleton(dict(shapes.MODELS[name]), **HOW).shapes) == SIZES[short][1]


def test_where_a_config_json_comes_from(tmp_path, monkeypatch):
  import huggingface_hub

  c = config.check(config.base())
  (tmp_path / "config.json").write_text(json.dumps(dict(shapes.MODELS["openai-community/gpt2"], n_layer=3)))
  c.model.init = str(tmp_path)
  assert build.model_source(Reader(c))[0].json["n_layer"] == 3
  c.model.init = "openai-community/gpt2"
  source, says = build.model_source(Reader(c))
  assert source.json["n_layer"] == 12 and "not in the Hub's cache" in says[0]
  monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "config.json"))
  source, says = build.model_source(Reader(c))
  assert source.json["n_layer"] == 3 and not says
  monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)

  def offline(*a, **k):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
  c.model.init = "openai-community/gpt22"
  with pytest.raises(InputError, match="no network.*did you mean 'openai-community/gpt2'"):
    build.model_source(Reader(c))


def test_decoder():
  c = config.check(config.base())
  c.model.update(config=dict(shapes.MODELS["openai-community/gpt2"], n_layer=2, n_embd=64, n_head=4), tokenizer="x")
  found = build.decoder(Reader(c), jax.devices()[:2], batch=4, length=30, new_tokens=7, beams=1)
  assert found.batch["inputs"][0] == (4, 32) and found.loops == 7 and not found.train
  out = build.lower(found).out_info
  assert out.tokens_BRL.shape == (4, 1, 7)
  assert {np.dtype(x.dtype).name for x in jax.tree.leaves(found.state)} == {"float32"}  # on CPUs


def test_a_head_that_writes_nothing_has_no_decoder():
  c = config.check(config.base())
  c.model.init = "google-bert/bert-base-uncased"
  with pytest.raises(InputError, match="for models that write text"):
    build.decoder(Reader(c), jax.devices()[:1], batch=1, length=8, new_tokens=2, beams=1)
