"""Hugging Face model folders, in and out: names by a table read both ways, bytes by shard, every mismatch together.

A family gives its table as a list of `Rule` (jaxft/names.py). Loading copies from maps of the files only the slices
that this process's devices hold; saving gathers one tensor at a time.
"""

import collections
import functools
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import names, safetensors, trees
from jaxft.errors import InputError
from jaxft.names import Rule

Tree = Any

log = logging.getLogger("jaxft")

WANTED = (  # what `resolve` downloads, in folders below too
  *("*.json", "model*.safetensors", "adapter_model.safetensors", "*.model", "*.spm", "*.jinja"),
  *("merges.txt", "vocab.txt", "dict.txt", "bpe.codes"),
)
TOKENIZER = (  # what `save` takes over
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
  *("vocab.txt", "vocab.json", "merges.txt"),  # WordPiece; the byte-level BPE of GPT-2, RoBERTa, BART
  *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model"),  # T5; Llama; XLM-R, mBART; DeBERTa v3
  *("source.spm", "target.spm", "target_vocab.json"),  # Marian
  *("dict.txt", "bpe.codes"),  # BARTpho; PhoBERT
)


def resolve(path_or_id: str) -> pathlib.Path:
  """Returns a model's folder: the local one of that name, else the Hub's files of ID or ID@REVISION (cached)."""
  path = pathlib.Path(path_or_id).expanduser()
  if path_or_id and path.is_dir():
    return path
  if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@\w[\w./-]*)?", path_or_id):
    raise InputError(
      f"{path_or_id}: there is no such folder, and it does not look like a Hub id (NAME or OWNER/NAME, with @REVISION "
      "where it is not the main one)."
    )
  name, _, revision = path_or_id.partition("@")
  import huggingface_hub  # only where something is fetched

  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
  except Exception as e:  # its errors have no common parent: HTTP, offline mode, missing repository, disk
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    said = f"{type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}"
    raise InputError(
      f"{path_or_id}: no folder of that name here, and the Hub did not give it ({said})."
      f"{' HF_HUB_OFFLINE is set, so only its cache was looked at.' if offline else ''} Check the "
      "name, the network and HF_TOKEN, or give a folder."
    ) from e


def read_json(file: pathlib.Path) -> dict:
  """Returns the object in a JSON file."""
  if not file.exists():
    raise InputError(f"{file} does not exist. A model folder holds config.json and model.safetensors.")
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as e:
    raise InputError(f"{file} is not JSON: {e}.") from None
  if not isinstance(value, dict):
    raise InputError(f"{file} holds no object but a {type(value).__name__}.")
  return value


def tensor_names(folder: pathlib.Path) -> set[str]:
  """Returns the names of all tensors in a model folder."""
  return set(_tensors(folder))


def _tensors(folder: pathlib.Path) -> dict[str, safetensors.Tensor]:
  """Returns the tensors of a folder; one without weights that `resolve` downloaded may have pickles on the Hub.

  That is asked here and not in `resolve`, because such a repository is good for its tokenizer. The cache's folders are
  models--OWNER--NAME/snapshots/COMMIT.
  """
  folder = pathlib.Path(folder)
  if folder.parent.name == "snapshots" and not any(folder.glob("model*.safetensors*")):
    name, commit = folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    import huggingface_hub  # only where something was fetched

    try:
      files = huggingface_hub.list_repo_files(name, revision=commit)
    except Exception:  # offline, or gone; the folder itself is what can be said then
      files = []
    if files:
      source, target = f"'{name}', revision='{commit}'", f"{name.split('/')[-1]}-safetensors"
      raise InputError(
        f"{safetensors.no_weights(name, files, source, target)} Another revision of it may hold safetensors, such as a "
        f"pull request of the Hub's converter (https://huggingface.co/{name}/discussions): {name}@refs/pr/N."
      )
  return safetensors.read_folder(folder)


def equal(folder: pathlib.Path, one: str, other: str) -> bool:
  """Says whether two tensors of a folder hold the same values; reads until the first difference."""
  found = _tensors(folder)
  return found[one].equals(found[other])


def load(
  folder: pathlib.Path,
  rules: Sequence[Rule],
  shapes: Tree,
  shardings: Tree | None,
  *,
  prefix: str = "",
  renames: names.Renames = (),
  without: Collection[str] = (),
) -> Tree:
  """Returns the parameters of a model folder, each born with its sharding and in the dtype of its entry of `shapes`.

  `shapes` has ShapeDtypeStruct leaves; `shardings` None puts everything on the default device. Host memory holds the
  slices of one leaf at a time. `prefix` and `renames`: see `names.canonical`. The leaves `without` (paths, such as
  those of `lacking`) are neither read nor returned. Logs which tensors are not used; raises InputError with all that
  is missing, unexpected or misshapen.
  """
  flat = trees.flatten(shapes)
  found = _named(folder, rules, prefix, renames)
  tensors = _match(pathlib.Path(folder), rules, flat, *found, without)
  where = trees.flatten(shardings) if shardings is not None else {}
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  out = {}
  for rule in (r for r in rules if r.ours and r.ours not in without):
    want = flat[rule.ours]
    layers = [None] * rule.first + [tensors[n] for n in rule.names(want.shape)]
    out[rule.ours] = _leaf(rule, want, layers, where.get(rule.ours, default))
  return trees.unflatten({path: out[path] for path in flat if path in out})


def lacking(
  folder: pathlib.Path,
  rules: Sequence[Rule],
  shapes: Tree,
  heads: Sequence[str],
  *,
  prefix: str = "",
  renames: names.Renames = (),
  replace: bool = False,
) -> set[str]:
  """Returns the paths of the leaves that a folder does not give, and that the caller has to make: those of whole heads.

  The leaves whose paths one regex of `heads` matches are one head, such as "head/.*": it is in the file with all its
  tensors, or it is lacking. (`load` refuses a head of which a part is missing.) A head of another shape is an error
  which says how many labels there are, unless `replace`: then a head that does not fit is lacking too. Give the result
  to `load` as `without`.
  """
  flat = trees.flatten(shapes)
  found, called = _named(folder, rules, prefix, renames)
  entries, out = names.entries(rules, flat), set()
  for head in heads:
    mine = [e for e in entries if any(re.fullmatch(head, r.ours) for r in e.rules)]
    there = [(e, n) for e in mine for n in (e.name, *e.copies) if n in found]
    other = [(e, n) for e, n in there if found[n].shape != e.shape]
    if not there or (replace and (other or len({e.name for e, _ in there}) < len(mine))):
      out |= {r.ours for e in mine for r in e.rules}
    elif other:
      entry, name = other[0]
      has, want = found[name].shape, entry.shape
      labels = has[1:] == want[1:] and len(has) > 0
      said = f": the head in the file has {has[0]} labels, this one {want[0]}" if labels else ""
      raise InputError(
        f"{folder}: {called[name]} is {list(has)}, and {list(want)} is needed{said}. Take the labels of the file "
        "(id2label in its config.json), or let the head begin anew."
      )
  return out


def _named(folder: pathlib.Path, rules, prefix: str, renames) -> tuple[dict[str, safetensors.Tensor], dict[str, str]]:
  """Returns ({name as the table has it: tensor}, {the same: name in the file}) of a folder."""
  found = _tensors(folder)
  called = names.canonical(str(folder), found, rules, prefix, renames)
  return {name: found[n] for name, n in called.items()}, called


def _match(folder, rules, flat: dict, found: dict, called: dict, without=()) -> dict[str, safetensors.Tensor]:
  """Returns {name of the table: tensor}; logs what is not used; raises InputError with every mismatch."""
  out, missing, wrong, used = {}, [], [], set()
  for entry in names.entries(rules, flat, without):
    there = [n for n in (entry.name, *entry.copies) if n in found]
    used |= {entry.name, *entry.copies}
    if not there:
      missing.append(f"{entry.name} {list(entry.shape)}")
      continue
    tensor = out[entry.name] = found[there[0]]
    if tensor.shape != entry.shape:
      wrong.append(f"{called[there[0]]} is {list(tensor.shape)}, expected {list(entry.shape)}")
    elif tensor.dtype not in safetensors.DTYPES:
      wrong.append(f"{called[there[0]]} is {tensor.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
    differ = [n for n in there[1:] if not tensor.equals(found[n])]
    wrong += [f"{called[n]} differs from {called[there[0]]}, of which it should be a copy" for n in differ]
  spare = [r for r in rules if not r.ours or r.ours in without]
  unexpected, unused = [], collections.Counter()
  for name in (n for n in found if n not in used):
    rule = next((r for r in spare if r.matches(name)), None)
    if rule is None:
      unexpected.append(f"{called[name]} {list(found[name].shape)}")
    elif rule.ours or "*" in rule.hub:
      unused[rule.hub] += 1
  if missing or wrong or unexpected:
    lists = (("missing in the file", missing), ("not known to the model", unexpected), ("wrong", wrong))
    more = lambda x: ", ..." if len(x) > 40 else ""
    parts = [f"{title} ({len(x)}): {', '.join(x[:40])}{more(x)}" for title, x in lists if x]
    raise InputError(
      f"{folder}: weights and config.json do not match. {'; '.join(parts)}. Check that the two belong together."
    )
  if unused:
    counts = (f"{name} ({n} tensor{'s' if n > 1 else ''})" for name, n in unused.items())
    log.info("%s: not used: %s.", folder, ", ".join(counts))
  return out


def _leaf(rule: Rule, want: jax.ShapeDtypeStruct, tensors: list, sharding: jax.sharding.Sharding) -> jax.Array:
  kept: dict[tuple, np.ndarray] = {}  # replicas share one copy

  def read(index: tuple) -> np.ndarray:
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, want.shape))
    if spans not in kept:
      part = _aligned([b - a for a, b in spans], want.dtype)
      if rule.stacked:
        for i in range(*spans[0]):
          part[i - spans[0][0]] = rule.to_ours(tensors[i].view(), want.shape)[index[1:]] if i >= rule.first else 1
      else:
        part[...] = rule.to_ours(tensors[0].view(), want.shape)[index]
      kept[spans] = part
    return kept[spans]

  return jax.make_array_from_callback(want.shape, sharding, read)


def _aligned(shape: Sequence[int], dtype) -> np.ndarray:
  """Returns an empty array on a 64-byte boundary, which the CPU backend takes over instead of copying."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  at = -raw.ctypes.data % 64
  return raw[at : at + size].view(dtype).reshape(shape)


def save(
  folder: pathlib.Path,
  rules: Sequence[Rule],
  params: Tree,
  config_json: dict,
  *,
  dtype: str,
  shard_gb: float,
  generation_config: dict | None,
  tokenizer_from: pathlib.Path | None,
) -> None:
  """Writes a model folder in the layout of transformers 5: weights as `dtype`, in files of at most `shard_gb` GB.

  Every process must call it (sharded leaves are gathered tensor by tensor); process 0 writes. Old weight files of the
  folder are removed at the end. `tokenizer_from` is a folder whose tokenizer files are copied.
  """
  folder = pathlib.Path(folder)
  kind = np.dtype(jnp.dtype(dtype))
  if kind not in safetensors.CODES:
    raise InputError(f"export.dtype is {dtype!r}; it is float32, bfloat16 or float16.")
  flat = trees.flatten(params)
  order = lambda e: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", e.name)]
  entries = {e.name: e for e in sorted(names.entries(rules, flat), key=order)}
  sizes = {name: e.shape for name, e in entries.items()}
  files = _plan(sizes, kind, shard_gb)
  writes = jax.process_index() == 0
  if writes:
    folder.mkdir(parents=True, exist_ok=True)
  for file, held in files.items():
    values = ((n, entries[n].join([_fetch(r, entries[n].layer, flat) for r in entries[n].rules])) for n in held)
    if writes:
      safetensors.write(folder / file, {n: sizes[n] for n in held}, kind, values)
    else:
      _drain(values)
  if writes:
    version = {"transformers_version": importlib.metadata.version("transformers")}
    jsons = {"config.json": {**config_json, "dtype": kind.name, **version}}
    if generation_config is not None:
      jsons["generation_config.json"] = {**generation_config, **version}
    if len(files) > 1:
      jsons[safetensors.INDEX] = _index(files, sizes, kind)
    _finish(folder, files, jsons, tokenizer_from)


def _plan(sizes: dict[str, tuple], dtype: np.dtype, shard_gb: float) -> dict[str, list[str]]:
  """Returns {file: tensor names}, filled in order; a tensor above the limit has a file of its own."""
  limit, groups, room = shard_gb * 1e9, [[]], shard_gb * 1e9
  for name, shape in sizes.items():
    size = math.prod(shape) * dtype.itemsize
    if size > room and groups[-1]:
      groups.append([])
      room = limit
    groups[-1].append(name)
    room -= size
  if len(groups) == 1:
    return {safetensors.SINGLE: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _fetch(rule: Rule, i: int, flat: dict) -> np.ndarray:
  """Returns layer `i` of a rule's leaf as the Hub's tensor, or as its part of one, on the host."""
  x = flat[rule.ours]
  shape = x.shape
  if isinstance(x, jax.Array) and not x.is_fully_replicated:
    x = _whole(x, rule.stacked)(x, i)  # all processes take part; a fresh array, so no host copy stays with `params`
  elif rule.stacked:
    x = x[i]
  return rule.to_hub(np.asarray(x), shape)


def _whole(x: jax.Array, stacked: bool):
  return _gather(NamedSharding(x.sharding.mesh, PartitionSpec()), stacked)


@functools.lru_cache(maxsize=8)
def _gather(sharding: NamedSharding, stacked: bool):
  take = lambda x, i: lax.dynamic_index_in_dim(x, i, keepdims=False) if stacked else x
  return jax.jit(take, out_shardings=sharding)


def _drain(values: Iterator) -> None:
  for _ in values:
    continue


def _index(files: dict, sizes: dict, dtype: np.dtype) -> dict:
  total = sum(math.prod(s) for s in sizes.values())
  return {
    "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
    "weight_map": {name: file for file, held in files.items() for name in held},
  }


def _finish(folder: pathlib.Path, files: dict, jsons: dict, tokenizer_from: pathlib.Path | None) -> None:
  for old in folder.glob("model*.safetensors*"):
    if old.name not in files and old.name not in jsons:
      old.unlink()
  for name, value in jsons.items():
    _write_json(folder / name, value)
  home = pathlib.Path(tokenizer_from) if tokenizer_from is not None else None
  for source in (f for pattern in TOKENIZER for f in sorted(home.glob(pattern))) if home else ():
    target = folder / source.relative_to(home)
    if source.resolve() != target.resolve():
      target.parent.mkdir(exist_ok=True)
      shutil.copyfile(source, target)


def _write_json(file: pathlib.Path, value: dict) -> None:
  part = file.with_name(file.name + ".part")
  part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  os.replace(part, file)


def verify(folder: pathlib.Path, rules: Sequence[Rule], params: Tree) -> float:
  """Returns the largest absolute difference between a folder and `params`; with the dtype of `params` it must be 0.

  Every process must call it; all but process 0 return 0. NaN where either holds one.
  """
  flat = trees.flatten(params)
  reads = jax.process_index() == 0
  tensors = _match(pathlib.Path(folder), rules, flat, *_named(folder, rules, "", ())) if reads else {}
  worst = [0.0]
  for entry in names.entries(rules, flat):
    for rule in entry.rules:
      ours = _fetch(rule, entry.layer, flat)
      if reads and ours.size:
        theirs = rule.cut(tensors[entry.name].view()).astype(np.float32)
        worst.append(np.abs(ours.astype(np.float32).reshape(theirs.shape) - theirs).max())
  return float(np.max(worst))
