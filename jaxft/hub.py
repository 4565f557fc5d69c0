"""Hugging Face model folders, in and out: names by a table read both ways, bytes by shard, every mismatch together.

A family gives its table as a list of `Rule`. Loading copies from maps of the files only the slices that this process's
devices hold; saving gathers one tensor at a time.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import safetensors, trees
from jaxft.errors import InputError

Tree = Any

WANTED = ("*.json", "model*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")  # what `resolve` downloads
TOKENIZER = (
  "tokenizer.json",
  "tokenizer_config.json",
  "spiece.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "sentencepiece.bpe.model",
  "tokenizer.model",
  "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of the table between Hub tensors and our parameters.

  hub: tensor name; with `{i}` our leaf stacks the layers on its leading axis.
  ours: path of the leaf; empty: a tensor that is allowed in files and ignored.
  dims: for each dimension of the Hub tensor, those of ours (without the layers) that it merges, major first; None: the
  same.
  copies: names under which old files repeat the tensor; they must be equal to it, and stand in for it where it is
  absent.
  """

  hub: str
  ours: str
  dims: tuple[tuple[int, ...], ...] | None = None
  copies: tuple[str, ...] = ()

  @property
  def stacked(self) -> bool:
    return "{i}" in self.hub

  def names(self, shape: Sequence[int]) -> list[str]:
    """Returns the Hub names of a leaf of this shape."""
    return [self.hub.replace("{i}", str(i)) for i in range(shape[0])] if self.stacked else [self.hub]

  def hub_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the tensor on the Hub for a leaf of `shape`."""
    own = tuple(shape[1:] if self.stacked else shape)
    return own if self.dims is None else tuple(math.prod(own[d] for d in dims) for dims in self.dims)

  def to_ours(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns a Hub tensor as one layer of a leaf of `shape`, as a view."""
    own = tuple(shape[1:] if self.stacked else shape)
    if self.dims is None:
      return x.reshape(own)
    order = [d for dims in self.dims for d in dims]
    return x.reshape([own[d] for d in order]).transpose(np.argsort(order))

  def to_hub(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns one layer of a leaf of `shape` as the tensor on the Hub."""
    if self.dims is None:
      return x
    return x.transpose([d for dims in self.dims for d in dims]).reshape(self.hub_shape(shape))


def linear(hub: str, ours: str) -> Rule:
  """[out, in] there, [in, out] here."""
  return Rule(hub, ours, ((1,), (0,)))


def heads_in(hub: str, ours: str) -> Rule:
  """[heads * head_dim, in] there, [in, heads, head_dim] here."""
  return Rule(hub, ours, ((1, 2), (0,)))


def heads_out(hub: str, ours: str) -> Rule:
  """[out, heads * head_dim] there, [heads, head_dim, out] here."""
  return Rule(hub, ours, ((2,), (0, 1)))


def ignore(hub: str) -> Rule:
  """A tensor that files may hold and that nobody uses."""
  return Rule(hub, "")


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
  return _equal(found[one], found[other])


def _equal(a: safetensors.Tensor, b: safetensors.Tensor) -> bool:
  if a.shape != b.shape or not {a.dtype, b.dtype} <= set(safetensors.DTYPES):
    return False
  x, y = a.view(), b.view()
  rows = max(1, 2**24 // max(1, math.prod(a.shape[1:])))
  return all(np.array_equal(x[i : i + rows], y[i : i + rows]) for i in range(0, a.shape[0], rows))


def load(folder: pathlib.Path, rules: Sequence[Rule], shapes: Tree, shardings: Tree | None) -> Tree:
  """Returns the parameters of a model folder, each born with its sharding and in the dtype of its entry of `shapes`.

  `shapes` has ShapeDtypeStruct leaves; `shardings` None puts everything on the default device. Host memory holds the
  slices of one leaf at a time. Raises InputError with all that is missing, unexpected or misshapen.
  """
  flat = trees.flatten(shapes)
  found = _tensors(folder)
  tensors = _match(pathlib.Path(folder), rules, flat, found)
  where = trees.flatten(shardings) if shardings is not None else {}
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  out = {r.ours: _leaf(r, flat[r.ours], tensors[r.ours], where.get(r.ours, default)) for r in rules if r.ours}
  return trees.unflatten({path: out[path] for path in flat})


def _match(folder, rules, flat: dict, found: dict) -> dict[str, list[safetensors.Tensor]]:
  """Returns {path: tensors of its layers}; raises InputError with every mismatch."""
  named = {r.ours for r in rules if r.ours}
  assert named == set(flat), f"table and model differ: {sorted(named ^ set(flat))}"
  out, missing, wrong, used = {}, [], [], set()
  for rule in rules:
    if not rule.ours:
      used.add(rule.hub)
      continue
    shape = flat[rule.ours].shape
    out[rule.ours] = []
    for name in rule.names(shape):
      there = [n for n in (name, *rule.copies) if n in found]
      used |= {name, *rule.copies}
      if not there:
        missing.append(f"{name} {list(rule.hub_shape(shape))}")
        continue
      tensor = found[there[0]]
      out[rule.ours].append(tensor)
      if tensor.shape != rule.hub_shape(shape):
        wrong.append(f"{there[0]} is {list(tensor.shape)}, expected {list(rule.hub_shape(shape))}")
      elif tensor.dtype not in safetensors.DTYPES:
        wrong.append(f"{there[0]} is {tensor.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
      differ = [n for n in there[1:] if not _equal(found[n], tensor)]
      wrong += [f"{n} differs from {there[0]}, of which it should be a copy" for n in differ]
  unexpected = [f"{n} {list(t.shape)}" for n, t in found.items() if n not in used]
  if missing or wrong or unexpected:
    lists = (("missing in the file", missing), ("not known to the model", unexpected), ("wrong", wrong))
    more = lambda names: ", ..." if len(names) > 40 else ""
    parts = [f"{title} ({len(names)}): {', '.join(names[:40])}{more(names)}" for title, names in lists if names]
    raise InputError(
      f"{folder}: weights and config.json do not match. {'; '.join(parts)}. Check that the two belong together."
    )
  return out


def _leaf(rule: Rule, want: jax.ShapeDtypeStruct, tensors: list, sharding: jax.sharding.Sharding) -> jax.Array:
  kept: dict[tuple, np.ndarray] = {}  # replicas share one copy

  def read(index: tuple) -> np.ndarray:
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, want.shape))
    if spans not in kept:
      part = _aligned([b - a for a, b in spans], want.dtype)
      if rule.stacked:
        for i in range(*spans[0]):
          part[i - spans[0][0]] = rule.to_ours(tensors[i].view(), want.shape)[index[1:]]
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
  entries = [(name, rule, i) for rule in rules if rule.ours for i, name in enumerate(rule.names(flat[rule.ours].shape))]
  entries.sort(key=lambda e: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", e[0])])
  sizes = {name: rule.hub_shape(flat[rule.ours].shape) for name, rule, _ in entries}
  files = _plan(sizes, kind, shard_gb)
  writes = jax.process_index() == 0
  if writes:
    folder.mkdir(parents=True, exist_ok=True)
  by_name = {name: (rule, i) for name, rule, i in entries}
  for file, names in files.items():
    values = ((n, _fetch(*by_name[n], flat)) for n in names)
    if writes:
      safetensors.write(folder / file, {n: sizes[n] for n in names}, kind, values)
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
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _fetch(rule: Rule, i: int, flat: dict) -> np.ndarray:
  """Returns layer `i` of a rule's leaf as the Hub's tensor, on the host."""
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
    "weight_map": {name: file for file, names in files.items() for name in names},
  }


def _finish(folder: pathlib.Path, files: dict, jsons: dict, tokenizer_from: pathlib.Path | None) -> None:
  for old in folder.glob("model*.safetensors*"):
    if old.name not in files and old.name not in jsons:
      old.unlink()
  for name, value in jsons.items():
    _write_json(folder / name, value)
  for name in TOKENIZER if tokenizer_from is not None else ():
    source = pathlib.Path(tokenizer_from) / name
    if source.exists() and source.resolve() != (folder / name).resolve():
      shutil.copyfile(source, folder / name)


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
  tensors = _match(pathlib.Path(folder), rules, flat, safetensors.read_folder(pathlib.Path(folder))) if reads else {}
  worst = [0.0]
  for rule in (r for r in rules if r.ours):
    for i in range(len(rule.names(flat[rule.ours].shape))):
      ours = _fetch(rule, i, flat)
      if reads and ours.size:
        worst.append(np.abs(ours.astype(np.float32) - tensors[rule.ours][i].view().astype(np.float32)).max())
  return float(np.max(worst))
