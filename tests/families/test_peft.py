"""Adapter folders of PEFT: PEFT's formula, and PEFT itself where it is installed, make of them what was trained; what
PEFT writes is read.

Catches: a fused layer whose parts are mixed up, a rank or scale of a fused layer, transposed kernels, names that PEFT
does not find or that match more layers than were adapted, heads that are not saved with the adapter, a reader that
drops what it does not know.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxft import hub, modeling, safetensors, sharding, trees
from jaxft.errors import InputError
from jaxft.families import peft, registry
from jaxft.models import lora
from tests.families import parity, tiny
from tests.models.test_lora import SPEC, drawn

MESH = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
PARTS = dataclasses.replace(SPEC, targets=(".*/self_attn/[qv]", ".*/mlp/wo"), rslora=True)
CASES = [
  (name, kind, spec)
  for name, kind in (("bert", "classify"), ("gpt2", "lm"), ("gpt2", "classify"), ("llama", "lm"), ("t5", "lm"),
                     ("neox", "lm"), ("phi3", "lm"), ("bart", "lm"), ("distilbert", "qa"), ("modernbert", "tag"),
                     ("deberta", "classify"))
  for spec in (SPEC, PARTS)
]  # fmt: skip
IDS = [f"{n}-{k}-{'parts' if s is PARTS else 'all'}" for n, k, s in CASES]
HEADS = (("head/.*", True), (".*", False))


def adapted(name, kind, spec):
  """Returns (skeleton with adapters, parameters, flags of what is trained)."""
  json_ = registry.wanted(tiny.CONFIGS[name], registry.Wanted(kind, parity.LABELS if kind in registry.LABELLED else ()))
  s = registry.skeleton(json_, adapters=spec, **parity.HOW)
  labels = HEADS if kind in (*registry.LABELLED, "qa") else HEADS[1:]
  return s, drawn(s), trees.trainable(((lora.NAMES, True), *labels), s.shapes, s.axes)


def written(name, kind, spec, home):
  """Writes home/base, whose head is another one, and home/adapter; returns (skeleton, parameters)."""
  s, params, flags = adapted(name, kind, spec)
  plain = lora.base(params)
  other = {p: x * 0.5 if p.startswith("head/") and kind != "lm" else x for p, x in trees.flatten(plain).items()}
  more = dict(dtype="float32", shard_gb=1.0, generation_config=None, tokenizer_from=None)
  hub.save(home / "base", s.rules, trees.unflatten(other), s.json, **more)
  place = jax.device_put(params, sharding.replicated(MESH))
  assert peft.write(home / "adapter", s, place, flags, str(home / "base"), MESH)
  return s, params


def read(folder):
  return {n: np.asarray(x.view(), np.float32) for n, x in safetensors.read_header(folder / peft.WEIGHTS).items()}


def _of(pattern, default, layer):
  return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", layer)), default)


@pytest.mark.parametrize("name, kind, spec", CASES, ids=IDS)
def test_the_folder_by_the_formula_of_peft(name, kind, spec, tmp_path):
  """W + alpha / r B A with W, r and alpha as the folder says, for the layers that its patterns name and no others."""
  s, params = written(name, kind, spec, tmp_path)
  given, found = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text()), read(tmp_path / "adapter")
  base = {n: np.asarray(x.view()) for n, x in safetensors.read_folder(tmp_path / "base").items()}
  targets, modules = given["target_modules"], {n.rpartition(".")[0] for n in base}
  hit = lambda m: re.fullmatch(targets, m) if isinstance(targets, str) else any(
    m == t or m.endswith(f".{t}") for t in targets)  # fmt: skip
  layers = {n.removeprefix(peft.PREFIX).removesuffix(peft.ENDS[0]) for n in found if n.endswith(peft.ENDS[0])}
  assert layers == {m for m in modules if hit(m)}
  for layer in layers:
    a, b = (found[peft.PREFIX + layer + end] for end in peft.ENDS)
    rank, alpha = (_of(given[f"{x}_pattern"], given[y], layer) for x, y in (("rank", "r"), ("alpha", "lora_alpha")))
    assert len(a) == rank
    d = alpha / (rank**0.5 if given["use_rslora"] else rank) * (b @ a)
    base[f"{layer}.weight"] = base[f"{layer}.weight"] + (d.T if given["fan_in_fan_out"] else d)
  whole = {n.removeprefix(peft.PREFIX): x for n, x in found.items() if "lora_" not in n}
  assert {n.rpartition(".")[0] for n in whole} == set(given["modules_to_save"] or ())
  assert bool(whole) == (kind != "lm")
  want = parity.by_hub_names(s, lora.merged(params, spec.scale))
  for n, x in (base | whole).items():
    np.testing.assert_allclose(x, want[n], rtol=1e-5, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("name, kind, spec", CASES, ids=IDS)
def test_it_is_read_back(name, kind, spec, tmp_path):
  s, params = written(name, kind, spec, tmp_path)
  assert peft.base_of(tmp_path / "adapter") == str(tmp_path / "base")
  json_ = {k: v for k, v in s.json.items() if k not in ("id2label", "label2id")}
  json_ = modeling.with_head_of(tmp_path / "adapter", json_)
  plain = registry.skeleton(json_, **parity.HOW)
  assert plain.kind == kind and (kind not in registry.LABELLED or len(plain.labels) == len(parity.LABELS))
  base = hub.load(tmp_path / "base", plain.rules, plain.shapes, None, prefix=plain.prefix)
  heads = [p for p in trees.flatten(base) if p.startswith("head/")] if kind != "lm" else []
  found = peft.merge(tmp_path / "adapter", plain, base, heads)
  want = parity.by_hub_names(s, lora.merged(params, spec.scale))
  for n, x in parity.by_hub_names(plain, found).items():
    np.testing.assert_allclose(x, want[n], rtol=1e-5, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("name, kind, spec", CASES, ids=IDS)
def test_peft_computes_the_same(name, kind, spec, tmp_path):
  pytest.importorskip("torch", reason="no torch: adapter folders are not opened by PEFT itself")
  library = pytest.importorskip("peft", reason="no peft: adapter folders are not opened by PEFT itself")
  import transformers

  s, params = written(name, kind, spec, tmp_path)
  auto = parity.AUTO["seq2seq" if kind == "lm" and s.encoder_decoder else kind]
  base = getattr(transformers, auto).from_pretrained(tmp_path / "base", attn_implementation="eager")
  model = library.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
  layout = "seq2seq" if kind == "lm" and s.encoder_decoder else kind
  rows = parity.batch(layout, tiny.CONFIGS[name])
  want = parity.theirs(model, layout, rows)[0]
  _, outputs = jax.jit(lambda p: parity.loss_fn(s, p, layout, rows))(params)
  real = rows["target_segments" if layout == "seq2seq" else "input_segments"] > 0
  found = [np.asarray(x) if x.shape[:2] != real.shape else np.asarray(x)[real] for x in outputs]
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("name, targets", [
  ("gpt2", ["c_attn", "mlp.c_proj"]), ("llama", ["q_proj", "down_proj"]), ("neox", ["query_key_value"]),
  ("phi3", ["qkv_proj", "o_proj"]),
])  # fmt: skip
def test_what_peft_writes_is_read(name, targets, tmp_path):
  torch = pytest.importorskip("torch", reason="no torch: adapter folders of PEFT itself are not read")
  library = pytest.importorskip("peft", reason="no peft: adapter folders of PEFT itself are not read")
  model = parity.torch_model(tiny.CONFIGS[name], "lm")
  model.save_pretrained(tmp_path / "base")
  how = library.LoraConfig(
    r=3, lora_alpha=7, target_modules=targets, rank_pattern={targets[-1]: 5}, alpha_pattern={targets[-1]: 4},
    use_rslora=True, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")  # fmt: skip
  made = library.get_peft_model(model, how)
  with torch.no_grad():
    for n, p in made.named_parameters():
      if "lora_B" in n:
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
  made.eval().save_pretrained(tmp_path / "adapter")
  s, base = parity.load(tmp_path / "base")
  params, rows = peft.merge(tmp_path / "adapter", s, base, ()), parity.batch("lm", tiny.CONFIGS[name])
  logits = np.asarray(parity.loss_fn(s, params, "lm", rows)[1][0])[rows["input_segments"] > 0]
  np.testing.assert_allclose(logits, parity.theirs(made, "lm", rows)[0][0], rtol=2e-4, atol=2e-4)


def test_what_is_refused(tmp_path, caplog):
  s, params = written("llama", "lm", SPEC, tmp_path)
  folder, file = tmp_path / "adapter", tmp_path / "adapter" / peft.CONFIG
  base = lora.base(params)
  given = json.loads(file.read_text())
  file.write_text(json.dumps(dict(given, use_dora=True)))
  with pytest.raises(InputError, match="use_dora=True.*merge_and_unload"):
    peft.base_of(folder)
  file.write_text(json.dumps(dict(given, base_model_name_or_path=None)))
  with pytest.raises(InputError, match="does not say what it is an adapter for"):
    peft.base_of(folder)
  file.write_text(json.dumps(given))
  other = registry.skeleton(dict(tiny.CONFIGS["llama"], num_hidden_layers=2), **parity.HOW)
  with pytest.raises(InputError, match="has no place for base_model.model.model.layers.2"):
    peft.merge(folder, other, base, ())
  with pytest.raises(InputError, match="does not bring head/kernel"):
    peft.merge(folder, registry.skeleton(s.json, **parity.HOW), base, ["head/kernel"])
  flags = trees.trainable(((r".*", True),), s.shapes, s.axes)
  with caplog.at_level("INFO"):
    assert not peft.write(tmp_path / "no", s, params, flags, "name", MESH)
  assert "kernel is trained beside its adapter" in caplog.text
  assert not (tmp_path / "no").exists()
