"""Adapters as folders of the PEFT library: adapter_config.json and adapter_model.safetensors, written and read.

A fused layer of the Hub (q, k and v of GPT-2, NeoX and Phi-3 in one matrix) has one adapter there and one for each part
here: their A are stacked and their B stand in blocks, so that the adapter there has a rank of so many times ours and
computes the very same. Letters: r rank, k adapted parts of a fused layer.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import names, safetensors, sharding, trees
from jaxft.errors import InputError, NumbersError
from jaxft.models import lora

log = logging.getLogger("jaxft")
Tree = Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")
TASKS = dict(lm="CAUSAL_LM", classify="SEQ_CLS", tag="TOKEN_CLS", qa="QUESTION_ANS")  # kind of head -> task_type


def write(folder: pathlib.Path, s: Any, params: Tree, trainable: Tree, base: str, mesh: jax.sharding.Mesh) -> bool:
  """Writes the adapters in `params`, and what is trained beside them, as a PEFT folder for the model `base`; reads it
  again, and raises NumbersError where it differs.

  `s` is the registry.Skeleton with adapters, `trainable` says what of it is trained. Every process must call it;
  process 0 writes. Returns False, and logs why, where something is trained that PEFT has no place for.
  """
  flags = {p: bool(np.any(f)) for p, f in trees.flatten(trainable).items()}
  adapted = {p.removesuffix("kernel") for p in lora.adapters(params)}
  odd = [p for p in flags if flags[p] and not re.fullmatch(lora.NAMES, p) and p[: p.rindex("/") + 1] in adapted]
  if odd:
    log.info("No PEFT folder is written: %s is trained beside its adapter. The export holds both.", odd[0])
    return False
  moved = {p: x for p, x in trees.flatten(params).items() if flags[p]}
  moved = jax.jit(lambda t: t, out_shardings=sharding.replicated(mesh))(moved)
  if jax.process_index():
    return True
  made = _Folder(s, {p: np.asarray(x, np.float32) for p, x in moved.items()})
  folder.mkdir(parents=True, exist_ok=True)
  shapes = {n: x.shape for n, x in made.tensors.items()}
  safetensors.write(folder / WEIGHTS, shapes, np.dtype(np.float32), iter(made.tensors.items()))
  _write(folder / CONFIG, json.dumps(made.config(base), indent=2, sort_keys=True) + "\n")
  _write(folder / "README.md", CARD.format(base=base.partition("@")[0]))
  for name, x in safetensors.read_header(folder / WEIGHTS).items():
    if not np.array_equal(x.view(), made.tensors[name]) or not np.isfinite(made.tensors[name]).all():
      raise NumbersError(f"export: {name} in {folder} is not what is in memory, or not finite; it must not be used.")
  log.info("The adapters, %s numbers, are in %s for PEFT.", f"{trees.count(made.tensors):,}", folder)
  return True


CARD = """---
base_model: {base}
library_name: peft
---

An adapter for {base}, trained with jaxft. Load it with `peft.PeftModel.from_pretrained(model, FOLDER)`.
"""


def _write(file: pathlib.Path, text: str) -> None:
  part = file.with_name(file.name + ".part")
  part.write_text(text, encoding="utf-8")
  os.replace(part, file)


class _Folder:
  """What goes into a folder: tensors by their names there, and its config."""

  def __init__(self, s: Any, flat: Mapping[str, np.ndarray]):
    """`flat` holds the adapters and all else that is trained, by path, whole."""
    self._s, self._pairs = s, lora.adapters(trees.unflatten(dict(flat)))
    self.tensors: dict[str, np.ndarray] = {}
    self._layers: dict[str, int] = {}  # adapted layer there, with {i} for a number -> its rank
    self._whole: list[str] = []  # modules that are trained whole
    self._first = False  # whether kernels there are [in, out]
    for entry in names.entries(s.rules, trees.flatten(lora.base(s.shapes))):
      if any(r.ours in self._pairs for r in entry.rules):
        self._adapter(entry)
      elif any(r.ours in flat for r in entry.rules):
        pieces = [r.to_hub(_layer(flat[r.ours], r, entry.layer), flat[r.ours].shape) for r in entry.rules]
        self.tensors[PREFIX + entry.name] = entry.join(pieces)
        self._whole.append(entry.name.rpartition(".")[0])

  def _adapter(self, entry: names.Entry) -> None:
    """Adds A [k r, in] and B [out, k r] of a tensor on the Hub."""
    mine = [r for r in entry.rules if r.ours in self._pairs]
    a, b = ([_layer(self._pairs[r.ours][i], r, entry.layer) for r in mine] for i in (0, 1))
    kernel = trees.flatten(self._s.shapes)[mine[0].ours].shape
    self._first = inputs_first(mine[0], len(a[0].shape) - 1)
    A = np.concatenate([x.reshape(-1, x.shape[-1]).T for x in a])
    rank = self._s.lora.rank
    if mine[0].part is None:
      B = b[0].reshape(rank, -1).T
    else:
      B = np.zeros(_with_rank(mine[0].part, len(A), self._first).whole, np.float32)
      for i, (rule, x) in enumerate(zip(mine, b)):
        cut = _with_rank(rule.part, len(A), self._first).cut(B)
        cut = cut[i * rank : (i + 1) * rank] if self._first else cut[..., i * rank : (i + 1) * rank]
        cut[...] = rule.to_hub(x, (*kernel[: rule.stacked], *x.shape)).reshape(cut.shape)
      B = B.T if self._first else B
    layer = PREFIX + entry.name.removesuffix(".weight")
    self.tensors |= {layer + end: np.ascontiguousarray(x) for end, x in zip(ENDS, (A, B))}
    self._layers[mine[0].hub.removesuffix(".weight")] = len(A)

  def config(self, base: str) -> dict:
    """Returns adapter_config.json."""
    spec, (name, _, revision) = self._s.lora, base.partition("@")
    short, pattern = self._short(), {}
    for layer, rank in self._layers.items():
      key = re.escape(short[layer]).replace(r"\{i\}", r"\d+")
      pattern |= {key: rank} if rank != spec.rank else {}
    numbered = any("{i}" in x for x in short.values())
    pick = "|".join(re.escape(x).replace(r"\{i\}", r"\d+") for x in self._layers)
    kind = self._s.kind
    return dict(
      peft_type="LORA",
      task_type="SEQ_2_SEQ_LM" if kind == "lm" and self._s.encoder_decoder else TASKS.get(kind),
      base_model_name_or_path=name,
      revision=revision or None,
      r=spec.rank,
      lora_alpha=spec.alpha,
      lora_dropout=spec.dropout,
      use_rslora=spec.rslora,
      use_dora=False,
      bias="none",
      fan_in_fan_out=self._first,
      target_modules=pick if numbered else sorted(set(short.values())),
      modules_to_save=sorted(set(self._whole)) or None,
      rank_pattern=pattern,
      # the scale stays that of one part
      alpha_pattern={k: spec.alpha * (n / spec.rank) ** (0.5 if spec.rslora else 1) for k, n in pattern.items()},
      init_lora_weights=True,
      inference_mode=True,
    )

  def _short(self) -> dict[str, str]:
    """Returns for each adapted layer the shortest end of its name that no other module's name has."""
    known = {n for r in self._s.rules if r.ours for n in _parents(r.hub)}
    out = {}
    for layer in self._layers:
      words = layer.split(".")
      ends = (".".join(words[i:]) for i in range(len(words) - 1, -1, -1))
      others = known - set(self._layers)
      out[layer] = next(e for e in ends if not any(o == e or o.endswith(f".{e}") for o in others))
    return out


def _parents(name: str) -> Iterator[str]:
  words = name.split(".")
  return (".".join(words[:i]) for i in range(1, len(words)))


def _layer(x: np.ndarray, rule: names.Rule, i: int) -> np.ndarray:
  return x[i] if rule.stacked else x


def inputs_first(rule: names.Rule, into: int) -> bool:
  """Says whether a kernel on the Hub is [in, out] (Conv1D), for one here whose first `into` axes are summed over."""
  return rule.dims is None or rule.dims[0][0] < into


def _with_rank(part: names.Part, rank: int, first: bool) -> names.Part:
  """Returns the part of B as `part` is of the kernel: the side of the inputs is the rank."""
  change = lambda x: (rank, *x[1:]) if first else (*x[:-1], rank)
  return dataclasses.replace(part, whole=change(part.whole), view=change(part.view))


# ---- reading


def base_of(folder: pathlib.Path) -> str:
  """Returns the name of the model that the adapter in `folder` is for, "" where it holds none."""
  file = folder / CONFIG
  if not file.exists() or (folder / "config.json").exists():
    return ""
  given = _read(folder)
  name, revision = given.get("base_model_name_or_path"), given.get("revision")
  if not name:
    raise InputError(f"{file} does not say what it is an adapter for: base_model_name_or_path is {name!r}.")
  return f"{name}@{revision}" if revision and "/" in name and not pathlib.Path(name).is_dir() else name


def _read(folder: pathlib.Path) -> dict:
  try:
    given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  except ValueError as e:
    raise InputError(f"{folder / CONFIG} is not JSON: {e}.") from None
  odd = dict(peft_type="LORA", use_dora=False, bias="none", layer_replication=None, trainable_token_indices=None)
  wrong = [f"{k}={given[k]!r}" for k, v in odd.items() if k in given and given[k] != v]
  if wrong:
    raise InputError(
      f"{folder / CONFIG}: {', '.join(wrong)}; jaxft reads LoRA adapters without these. Merge it with PEFT: "
      "AutoPeftModel.from_pretrained(FOLDER).merge_and_unload().save_pretrained(WHOLE), and give WHOLE."
    )
  if not (folder / WEIGHTS).exists():
    raise InputError(f"{folder} has no {WEIGHTS}; jaxft reads no pickles.")
  return given


def head(folder: pathlib.Path) -> tuple[str, dict[str, safetensors.Tensor]]:
  """Returns (kind of the head that the adapter in `folder` is for, tensors it brings whole, by the model's names)."""
  task = _read(folder).get("task_type")
  found = safetensors.read_header(folder / WEIGHTS)
  whole = {n.removeprefix(PREFIX): x for n, x in found.items() if not n.endswith(ENDS)}
  return next((k for k, t in TASKS.items() if t == task), "lm"), whole


def merge(folder: pathlib.Path, s: Any, params: Tree, lacking: Sequence[str]) -> Tree:
  """Returns `params` of the model `s` (a registry.Skeleton) without adapters, with those of `folder` in its weights.

  Raises InputError where the folder holds what the model has no place for, or not what is `lacking` (paths).
  """
  given, found = _read(folder), safetensors.read_header(folder / WEIGHTS)
  shapes, used, jobs, new = trees.flatten(s.shapes), set(), {}, set()

  def value(entry: names.Entry) -> np.ndarray:
    """Returns what the tensor `entry` becomes, or what is added to it."""
    layer = entry.name.removesuffix(".weight")
    if PREFIX + entry.name in found:
      return np.asarray(found[PREFIX + entry.name].view(), np.float32)
    a, b = (np.asarray(found[PREFIX + layer + end].view(), np.float32) for end in ENDS)
    x = _scale(given, layer, len(a)) * (b @ a)
    return x.T if inputs_first(entry.rules[0], lora.sides_of(s.module, entry.rules[0].ours)) else x

  for entry in names.entries(s.rules, shapes):
    whole, pair = PREFIX + entry.name, {PREFIX + entry.name.removesuffix(".weight") + end for end in ENDS}
    brings = {whole} if whole in found else pair if pair <= set(found) else set()
    used |= brings
    for rule in entry.rules if brings else ():
      jobs.setdefault(rule.ours, []).append((entry, rule))
      new |= {rule.ours} if whole in found else set()
  rest, without = sorted(set(found) - used), sorted(set(lacking) - new)
  if rest or without:
    lists = (("the model has no place for", rest), ("it does not bring", without))
    said = "; ".join(f"{t} {', '.join(x[:8])}{' ...' if len(x) > 8 else ''}" for t, x in lists if x)
    raise InputError(f"{folder} does not fit its model: {said}.")

  def one(path: str, p: jax.Array) -> jax.Array:
    by = np.zeros(p.shape if path in jobs else (), np.float32)  # of one leaf at a time, in the host's memory
    for entry, rule in jobs.get(path, ()):
      x = value(entry)
      if x.shape != entry.shape:
        raise InputError(f"{folder}: {entry.name} is {list(x.shape)} there, and {list(entry.shape)} in the model.")
      (by[entry.layer] if rule.stacked else by)[...] = rule.to_ours(x, p.shape)
    return _changed(p, by, path in new) if path in jobs else p

  log.info("%s: adapters of %d layers are added to the weights.", folder, sum(n.endswith(ENDS[0]) for n in used))
  return trees.map_with_path(one, params)


def _scale(given: Mapping[str, Any], layer: str, rank: int) -> float:
  pattern = given.get("alpha_pattern") or {}
  key = next((k for k in pattern if re.fullmatch(rf"(.*\.)?({k})", layer)), None)
  alpha = given.get("lora_alpha", 8) if key is None else pattern[key]
  return alpha / (rank**0.5 if given.get("use_rslora") else rank)


def _changed(p: jax.Array, by: np.ndarray, replace: bool) -> jax.Array:
  x = jax.make_array_from_callback(p.shape, p.sharding, lambda index: by[index])
  add = lambda p, x: (x if replace else p.astype(np.float32) + x).astype(p.dtype)
  return jax.jit(add, out_shardings=p.sharding)(p, x)
