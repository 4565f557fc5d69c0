"""From a config to its model: where the weights come from, which head the task asks for, where the parameters live."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxft
from jaxft import hub, sharding, trees
from jaxft.config import Reader
from jaxft.data import tokens
from jaxft.errors import InputError, did_you_mean
from jaxft.families import peft, registry
from jaxft.models import lora
from jaxft.train import step

log = logging.getLogger("jaxft")

FOLDER = "model"  # in a run folder: config and tokenizer
BASE = "base.txt"  # in that, of a run with adapters: Source.base
PRECISION = jax.config.jax_default_matmul_precision  # before a float32 model has raised it for the process
ASSETS = pathlib.Path(jaxft.__file__).parent / "assets"

HEADS = dict(  # kind of task -> (kind of head, of registry.KINDS; what the model must be)
  seq2seq=("lm", "encoder-decoder"),
  span_corruption=("lm", "encoder-decoder"),
  causal=("lm", "decoder"),
  sft=("lm", "decoder"),
  prefix_lm=("lm", "decoder"),
  classify=("classify", ""),
  regress=("classify", ""),
  tag=("tag", "encoder or decoder"),
  qa=("qa", "encoder or decoder"),
  mlm=("mlm", "encoder"),
  mlm_nsp=("mlm_nsp", "encoder"),
)
PARTS = (r"{}/dense/.*", r"{}/norm/.*", r"{}/(kernel|bias)")  # of a head, each of which a file has as a whole or not


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a model comes from."""

  folder: pathlib.Path | None  # of the weights it starts from; None: fresh ones
  home: pathlib.Path | None  # a run folder, where there is one
  json: dict  # config.json
  tokenizer: tokens.Tokenizer | None  # None: shapes alone are asked for
  tokens_folder: pathlib.Path
  adapter: pathlib.Path | None = None  # a PEFT folder whose adapters are added to the weights
  base: str = ""  # its name, as other programs call it; "": fresh weights, or with adapters in them

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of the labels of its head, () where it has none or they are placeholders."""
    names = registry.label_names(self.json) if registry.head_kind(self.json) in registry.LABELLED else ()
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


@dataclasses.dataclass(frozen=True)
class Model:
  """A model without its weights, and where they will live."""

  folder: pathlib.Path | None  # of the weights it starts from; None: fresh ones
  adapter: pathlib.Path | None  # see Source
  base: str  # see Source
  tokens_folder: pathlib.Path
  skeleton: registry.Skeleton
  stored: registry.Skeleton  # as the weights in `folder` are; differs from `skeleton` where the vocabulary grows
  merged: registry.Skeleton  # `skeleton` once its adapters are part of its weights; itself without
  plain: registry.Skeleton  # `skeleton` as plain XLA and without rematerialisation: the model's own FLOPs are counted
  again: registry.Skeleton  # the same with it
  tokenizer: tokens.Tokenizer
  mesh: jax.sharding.Mesh
  rules: dict
  trained: trees.Rules  # what of `skeleton` is trained
  shardings: Any  # of the parameters of `skeleton`

  @property
  def trainable(self) -> Any:
    """The flags of what is trained, see trees.trainable."""
    return trees.trainable(self.trained, self.skeleton.shapes, self.skeleton.axes)

  def of(self, skeleton: registry.Skeleton) -> Any:
    """Returns the shardings of the parameters of one of its skeletons."""
    return sharding.leaf_shardings(self.mesh, self.rules, skeleton.axes, skeleton.shapes)


def whole(m: Model, params: Any) -> tuple[Model, Any]:
  """Returns (model, parameters) in which the adapters are part of the weights that they adapt."""
  if m.skeleton.lora is None:
    return m, params
  scale = m.skeleton.lora.scale
  merged = jax.jit(lambda p: lora.merged(p, scale), out_shardings=m.of(m.merged))(params)
  return dataclasses.replace(m, skeleton=m.merged, shardings=m.of(m.merged)), merged


def locate(name: str) -> pathlib.Path:
  """Returns the folder of a model or tokenizer: builtin:NAME, a folder, or a Hub id (downloaded)."""
  if not name.startswith("builtin:"):
    return hub.resolve(name)
  known = sorted(p.name for p in ASSETS.iterdir() if p.is_dir())
  if name.removeprefix("builtin:") not in known:
    raise InputError(f"there is no {name}; the built-in models are {', '.join(known)}{did_you_mean(name[8:], known)}.")
  return ASSETS / name.removeprefix("builtin:")


def activations(dtype: str, platform: str = "") -> jnp.dtype:
  """Returns the dtype of activations on a platform ("": the one here); "auto" is float32 on CPU, else bfloat16."""
  if dtype == "auto":
    dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
  return floating("model.dtype", dtype, ("auto", "bfloat16", "float32"))


def floating(key: str, dtype: str, known: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> jnp.dtype:
  if dtype not in known:
    raise InputError(f"config: {key} is {dtype!r}{did_you_mean(dtype, known)}; it is one of {', '.join(known)}.")
  return jnp.dtype(dtype)


def source(c: Reader, home: pathlib.Path | None = None) -> Source:
  """Returns where the model of `c.model` comes from; with `home`, a run folder, what training left there (no weights
  are needed for that).
  """
  init, given, named = c.model.init, c.model.config, c.model.tokenizer
  if bool(init) == bool(given):
    raise InputError(
      "config: give either model.init (a folder or Hub id to start from) or model.config=dict(model_type=..., ...) "
      f"(fresh weights); there {'are both' if init else 'is neither'}."
    )
  folder = locate(init) if init and home is None else None
  adapter, under = folder, peft.base_of(folder) if folder else ""
  if under:
    folder, named = locate(under), named or (under if not any(folder.glob("tokenizer*")) else str(folder))
    log.info("%s holds adapters for %s.", init, under)
  json = hub.read_json(home / FOLDER / "config.json") if home else registry.read_config(folder) if folder else given
  if not (named or folder or home):
    raise InputError("config: model.tokenizer is empty; fresh weights need the folder or Hub id of a tokenizer.")
  json = with_head_of(adapter, json) if under else json
  from_ = home / FOLDER if home else locate(named) if named else folder
  loaded = tokens.load(str(from_), tuple(c.model.languages))
  kept = home / FOLDER / BASE if home else None
  base = kept.read_text(encoding="utf-8") if kept and kept.exists() else "" if under else _named(init)
  return Source(folder, home, json, loaded, from_, adapter if under else None, base)


def with_head_of(adapter: pathlib.Path, json: dict) -> dict:
  """Returns the config.json of an adapter's base with the head that the adapter is for."""
  kind, whole = peft.head(adapter)
  if kind == "lm":
    return json
  out = whole.get(f"{registry.family(json).heads[kind].hub['out']}.weight")
  labels = tuple(f"LABEL_{i}" for i in range(out.shape[0])) if out and kind in registry.LABELLED else ()
  return registry.wanted(json, registry.Wanted(kind, labels))


def unshared(m: Model) -> str:
  """Returns why nobody else has the model that the adapters of `m` stand on, "" where others have."""
  if m.stored.generation["vocab"] != m.skeleton.generation["vocab"]:
    return "the vocabulary has grown"
  if registry.JAXFT_HEAD in m.skeleton.json:
    return "its head is not one that transformers has"
  return "" if m.base else "the model began from fresh weights or other adapters"


def make(c: Reader, s: Source, want: registry.Wanted | None, devices: Sequence[jax.Device] | None = None) -> Model:
  """Returns the model of a source with the head `want` (None: its own), on the mesh of the config over `devices`
  (None: those of this machine)."""
  mesh, rules = sharding.make_mesh(c.mesh, devices), dict(c.rules)
  platform = mesh.devices.flat[0].platform
  dtype = activations(c.model.dtype, platform)
  # float32 asked for is float32 meant: GPUs and TPUs would multiply in TF32 and bfloat16, a relative error of 1e-3
  jax.config.update("jax_default_matmul_precision", "highest" if dtype == jnp.float32 else PRECISION)
  how = dict(
    dtype=dtype,
    params_dtype=floating("model.params_dtype", c.model.params_dtype),
    remat=c.model.remat,
    unroll=c.model.unroll or (12 if platform == "cpu" and c.model.remat == "none" else 1),
    dropout=c.model.dropout,
    attention_dropout=c.model.attention_dropout,
    head_dropout=c.model.head_dropout,
    neftune=c.model.neftune,
    attention=c.model.attention,
    prefix=c.task["kind"] == "prefix_lm",
    want=want,
  )
  stored = merged = registry.skeleton(s.json, **how)
  if c.model.resize and s.tokenizer and s.tokenizer.size > merged.generation["vocab"]:
    merged = registry.skeleton(registry.with_vocab(s.json, s.tokenizer.size), **how)
  if s.tokenizer:
    tokens.check_vocab(s.tokenizer, merged.generation["vocab"])
  how["adapters"] = adapters(c)
  skeleton = registry.skeleton(merged.json, **how) if how["adapters"] else merged
  trained, frozen = _trained(c, skeleton), c.model.frozen_dtype
  if frozen:
    frozen, flags = floating("model.frozen_dtype", frozen), trees.trainable(trained, skeleton.shapes, skeleton.axes)
    skeleton, stored = skeleton.with_frozen(flags, frozen), stored.with_frozen(flags, frozen)
    adapted = lora.adapters(flags)
    flags = trees.map_with_path(lambda path, flag: flag if path not in adapted else True, lora.base(flags))
    merged = merged.with_frozen(flags, frozen)
  plain = registry.skeleton(skeleton.json, **{**how, "remat": "none", "attention": "dense"})
  again = registry.skeleton(skeleton.json, **{**how, "attention": "dense"})
  here = s.folder or (s.home / FOLDER if s.home else None)
  shardings = sharding.leaf_shardings(mesh, rules, skeleton.axes, skeleton.shapes)
  return Model(
    here, s.adapter, s.base, s.tokens_folder, skeleton, stored, merged, plain, again, s.tokenizer, mesh, rules, trained,
    shardings)  # fmt: skip


def _named(init: str) -> str:
  """Returns a name of the Hub as it is, and that of a folder from the root."""
  folder = locate(init) if init.startswith("builtin:") else pathlib.Path(init).expanduser()
  return str(folder.resolve()) if init and folder.is_dir() else init


def adapters(c: Reader) -> lora.Spec | None:
  """Returns the adapters of a config in numbers, None without."""
  given = c.lora
  spec = lora.Spec(given.rank, given.alpha, given.dropout, tuple(given.targets), given.rslora)
  return spec if spec.rank else None


def _trained(c: Reader, skeleton: registry.Skeleton) -> trees.Rules:
  """Returns the rules of what is trained: those of the config, under adapters after these; left as they are, they
  mean all that has no meaning yet: heads for labels and spans.
  """
  given = tuple(map(tuple, c.trainable))
  if skeleton.lora is None:
    return given
  if given == ((".*", True),):
    labels = ((r"head/.*", True),) if skeleton.kind in (*registry.LABELLED, "qa") else ()
    given = (*labels, (r".*", False))
  return ((lora.NAMES, True), *given)


def wanted(kind: str, json: dict, labels: tuple[str, ...], *, multi: bool, mlp: tuple[int, str]) -> registry.Wanted:
  """Returns the head for a task of `kind` with these labels; raises InputError where the model is of the wrong sort.

  `mlp` is (width, activation) of a head of our own, a width of 0 the family's head.
  """
  head, sort = HEADS[kind]
  is_ = registry.sort(json)
  if sort and is_ not in sort.split(" or "):
    fit = [k for k, (_, s) in HEADS.items() if not s or is_ in s.split(" or ")]
    raise InputError(
      f"config: task.kind is {kind!r}, which needs an {sort}, and a {json['model_type']} is an {is_}; for it there is "
      f"{', '.join(fit)}."
    )
  problem = None
  if head == "classify":
    problem = (
      "regression" if kind == "regress" else "multi_label_classification" if multi else "single_label_classification"
    )
  return registry.Wanted(head, labels, problem, mlp if mlp[0] else None)


def load(m: Model, seed: int, *, fresh: bool = False) -> Any:
  """Returns the weights that training starts from, born with their shardings: read from the folder, or fresh.

  `fresh`: what of the head the folder lacks, or has for other labels, is drawn anew, which is logged; otherwise it is
  an error.
  """
  if m.folder is None:
    return step.init_params(m.skeleton.init, seed, m.shardings)
  names = dict(prefix=m.stored.prefix, renames=m.stored.renames)
  heads = [part.format(name) for name, _ in m.stored.spec.heads for part in PARTS]
  fresh_head = fresh or m.adapter is not None  # which brings its head with it
  without = hub.lacking(m.folder, m.stored.rules, m.stored.shapes, heads, replace=fresh_head, **names)
  buffers = {f"{name}/bias" for name, head in m.stored.spec.heads if head.fixed_bias}  # zeros where a file has none
  if without - buffers and not fresh_head:
    raise InputError(
      f"{m.folder}: it has no head for this task ({', '.join(sorted(without))}); its outputs would be noise. Train it "
      "first (python -m jaxft.main), or give the folder of a model that was."
    )
  params = hub.load(m.folder, m.stored.rules, m.stored.shapes, m.of(m.stored), without=without, **names)
  if without:
    log.info("Not in %s and drawn anew: %s.", m.folder, ", ".join(sorted(without)))
    params = _drawn(m, m.stored, params, seed)
  if m.adapter is not None:
    params = peft.merge(m.adapter, m.stored, params, () if fresh else sorted(without - buffers))
  vocab = m.skeleton.generation["vocab"]
  if m.stored.generation["vocab"] != vocab:
    log.info(
      "The vocabulary grows from %d to %d; new rows are the mean of the old ones.", m.stored.generation["vocab"], vocab
    )
    grow = lambda p: registry.resize(m.stored.json, p, vocab)[1]
    params = jax.jit(grow, out_shardings=lora.base(m.shardings))(params)
  return params if m.skeleton.lora is None else _drawn(m, m.skeleton, params, seed)


def _drawn(m: Model, skeleton: registry.Skeleton, params: Any, seed: int) -> Any:
  """Returns `params` with what they lack of the skeleton, drawn anew."""
  there, flat = trees.flatten(params), trees.flatten(m.of(skeleton))
  new = lambda tree: trees.unflatten({p: x for p, x in trees.flatten(tree).items() if p not in there})
  drawn = step.init_params(lambda key: new(skeleton.init(key)), seed, new(m.of(skeleton)))
  both = there | trees.flatten(drawn)
  return trees.unflatten({p: both[p] for p in flat})


def generation_config(m: Model) -> dict:
  """Returns the generation_config.json beside the weights, or what transformers writes for a model that has none.

  Where the tokenizer marks the language of what is written, that mark is what answers start with.
  """
  file = m.folder / "generation_config.json" if m.folder else None
  given = hub.read_json(file) if file and file.exists() else m.skeleton.generation_config
  if m.tokenizer.target_start is None:
    return given
  place, code = m.tokenizer.target_start
  return {**given, "forced_bos_token_id" if place == 0 else "decoder_start_token_id": code}
