"""From a config to the real train step, or the real decoder, without weights, tokenizer and data: shapes alone."""

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxft import flops, modeling, setup, sharding, trees
from jaxft.config import Reader
from jaxft.data import objectives
from jaxft.errors import InputError, did_you_mean
from jaxft.families import peft, registry
from jaxft.infer import engine, options
from jaxft.infer.generate import Generator
from jaxft.planning import shapes
from jaxft.train import tiles

log = logging.getLogger("jaxft")
SEGMENTS = 8  # room for the labels of so many examples in a packed row, where the data would say how many


@dataclasses.dataclass(frozen=True)
class Facts:
  """What `setup` asks the training data for, as far as shapes depend on it."""

  labels: tuple[str, ...] | None
  class_counts: np.ndarray | None
  lengths: dict[str, np.ndarray]
  meta: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Built:
  """A program to compile, and the sizes that it was built from."""

  model: modeling.Model
  jitted: Any
  args: tuple  # ShapeDtypeStructs with shardings
  state: Any  # step.TrainState of a train step, the parameters of a decoder
  batch: dict[str, tuple]  # of the rows: name -> (shape, dtype)
  micro: int
  logits: float  # bytes of a device for logits over a vocabulary, those of a tile where the loss makes them in tiles
  flops: float  # of a call over all devices, without what rematerialisation does again
  work: float  # with it
  attention: float  # of `work`, the products of queries, keys and values
  assumed: tuple[str, ...]  # what the data or the network would have said
  tx: Any = None  # the optimizer of a train step; None: a decoder
  loops: int = 1  # turns of a loop whose number the program does not know: new tokens of a decoder

  @property
  def train(self) -> bool:
    return self.tx is not None


def model_source(c: Reader) -> tuple[modeling.Source, tuple[str, ...]]:
  """Returns the model's config.json, without weights and tokenizer, and what there is to say about it.

  From model.config, a folder, the Hub's cache, the shapes of well-known models, or the Hub, which is asked for this one
  file; the first that has it.
  """
  init, given = c.model.init, c.model.config
  c.model.tokenizer, c.model.languages  # noqa: B018  of no effect on shapes
  if bool(init) == bool(given):
    return modeling.source(c), ()  # which says what is wrong
  found, says = (given, ()) if given else _config_json(init)
  return modeling.Source(None, None, found, None, pathlib.Path()), says


def _config_json(init: str) -> tuple[dict, tuple[str, ...]]:
  local = init.startswith("builtin:") or pathlib.Path(init).expanduser().is_dir()
  if local:
    folder = modeling.locate(init)
    if under := peft.base_of(folder):
      return _config_json(under)
    has = any(folder.glob("model*.safetensors*"))
    return (registry.read_config(folder) if has else json.loads((folder / "config.json").read_text())), ()
  name, _, revision = init.partition("@")
  import huggingface_hub  # only where a name of the Hub is looked up

  cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or None)
  if isinstance(cached, str):
    return json.loads(pathlib.Path(cached).read_text()), ()
  if name in shapes.MODELS:
    return dict(shapes.MODELS[name]), (f"{name} is not in the Hub's cache: its shapes are those that jaxft knows",)
  try:
    file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision or None)
  except Exception as e:  # its errors have no common parent
    said = f"{type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}"
    raise InputError(
      f"{init}: there is no folder of that name, its config.json is not in the Hub's cache, the Hub did not give it "
      f"({said}), and its shapes are not among those that jaxft knows{did_you_mean(name, shapes.MODELS)}. Give a "
      "folder with its config.json as model.init, or its numbers as model.config."
    ) from e
  return json.loads(pathlib.Path(file).read_text()), ()


def facts(c: Reader, source: modeling.Source) -> tuple[Facts, tuple[str, ...]]:
  """Returns what stands for the training data, and what was assumed about it."""
  t, says = setup.task(c), ()
  labels = tuple(t.labels) or source.labels or None
  kind = objectives.of(t.kind, t.multi)
  if (kind.labelled or t.multi) and labels is None:
    labels, says = ("LABEL_0", "LABEL_1"), ("2 labels (set task.labels for another number)",)
  counts = np.ones(len(labels), np.int64) if labels and kind.labelled else None
  lengths = {side: np.array([n]) for side, n in c.data.lengths.items()}
  return Facts(labels if kind.labelled or t.multi else None, counts, lengths, dict(width=1)), says


def batch_spec(c: Reader, m: modeling.Model, found: Facts) -> tuple[dict[str, tuple], tuple[str, ...]]:
  """Returns {name: (shape, dtype)} of a batch at the full lengths, as `pipeline.Batches.spec` gives it from data."""
  t, says = setup.task(c), ()
  kind, lengths, rows = objectives.of(t.kind, t.multi), c.data.lengths, c.batch
  c.data.pack, c.data.buckets  # noqa: B018
  out = {}
  for side in kind.sides:
    out[side] = out[f"{side[:-1]}_segments"] = ((rows, lengths[side]), np.dtype(np.int32))
  stack = m.skeleton.spec.stack if hasattr(m.skeleton.spec, "stack") else None
  for name, field in kind.aligned.items():
    there = getattr(stack, "types", 0) > 1 if name == "types" else field.name and name != "words"
    if there:
      out[field.name] = ((rows, lengths[field.side]), np.dtype(field.batch))
  if t.kind in ("mlm", "mlm_nsp"):
    out["targets"] = out["inputs"]
  if kind.weighted or t.kind in ("mlm", "mlm_nsp"):
    side = "targets" if "targets" in kind.sides else "inputs"
    out["weights"] = ((rows, lengths[side]), np.dtype(np.float32))
  segments = SEGMENTS if c.data.pack and kind.scalars else 1
  for name, dtype in kind.scalars.items():
    wide = (len(found.labels),) if t.multi else ()
    out[name] = ((rows, segments, *wide), np.dtype(dtype))
  if kind.scalars:
    out["label_weights"] = ((rows, segments), np.dtype(np.float32))
    says = (f"{segments} examples a packed row",) if segments > 1 else ()
  return out, says


def made_up(m: modeling.Model, spec: dict[str, tuple], seed: int = 0) -> dict[str, np.ndarray]:
  """Returns a batch of full rows for what `batch_spec` says: random tokens and labels, every weight 1, as many examples
  a row as there is room for labels."""
  rng, kind, made = np.random.default_rng(seed), m.skeleton.kind, {}
  examples = spec["label_weights"][0][1] if "label_weights" in spec else 1
  for name, (shape, dtype) in spec.items():
    if name.endswith("segments"):
      made[name] = np.broadcast_to(1 + np.arange(shape[1]) * examples // shape[1], shape).astype(dtype)
    elif "weights" in name:
      made[name] = np.ones(shape, dtype)
    elif name == "inputs" or (name == "targets" and kind in ("lm", "mlm", "mlm_nsp")):
      made[name] = rng.integers(0, m.skeleton.generation["vocab"], shape).astype(dtype)
    else:
      made[name] = (rng.random(shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)).astype(dtype)
  return made


def train_step(c: Reader, devices: Sequence[Any]) -> Built:
  """Returns the train step of a config for a mesh of `devices`, which need not be there."""
  source, first = model_source(c)
  found, second = facts(c, source)
  m = setup.model_for(c, source, found, devices)
  batch, third = batch_spec(c, m, found)
  sharding.check_batch(m.mesh, m.rules, c.batch, c.micro)
  program = setup.program(c, m, found, max(c.steps, 1000), tuple(setup.numbers(c)))
  rows = sharding.batch_sharding(m.mesh, m.rules)
  place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  numbers = {k: jax.ShapeDtypeStruct((), np.float32) for k in program.names}
  args = (program.abstract, {k: place(*x) for k, x in batch.items()}, numbers)
  said = (*first, *second, *third)
  logits = _logits(m, batch.get("targets", batch["inputs"])[0], c.micro, setup.loss_options(c, m, found).logits)
  work = program.flops(batch), *(program.flops(batch, again=True, only=x) for x in ("", flops.ATTENTION))
  return Built(m, program.jitted, args, program.abstract, batch, c.micro, logits, *work, said, program.tx)


def _logits(m: modeling.Model, shape: tuple[int, int], micro: int, most: float) -> float:
  if m.skeleton.kind not in ("lm", "mlm", "mlm_nsp"):
    return 0.0
  (rows, length), vocab = shape, m.skeleton.generation["vocab"]
  with sharding.use(m.mesh, m.rules):
    t = tiles.tile(rows // micro, length, vocab, "vocab", most) or length
    return 4.0 * rows / micro / sharding.ways("batch") * t * vocab / sharding.ways("vocab")


def decoder(c: Reader, devices: Sequence[Any], *, batch: int, length: int, new_tokens: int, beams: int) -> Built:
  """Returns the program that writes `new_tokens` for `batch` prompts of `length` tokens, with weights in the dtype of
  the activations, as jaxft.decode has them for a model folder."""
  source, said = model_source(c)
  m = modeling.make(c, source, None, devices)
  if m.skeleton.kind != "lm":
    what = registry.KINDS[m.skeleton.kind]
    raise InputError(f"plan: --decode is for models that write text; the head of this one is for {what}.")
  how = options.read(m.skeleton.generation, m.skeleton.generation_config, length=new_tokens, beams=beams)
  m = dataclasses.replace(m, skeleton=m.merged, shardings=m.of(m.merged))
  made = Generator(m.skeleton, None, how, batch=batch, mesh=m.mesh, rules=m.rules)
  weigh = lambda x, s: jax.ShapeDtypeStruct(x.shape, m.skeleton.dtype, sharding=s)
  params = jax.tree.map(weigh, m.skeleton.shapes, m.shardings)
  rows = sharding.batch_sharding(m.mesh, m.rules)
  sharding.check_batch(m.mesh, m.rules, batch, 1)
  T = engine.bucket(length)
  place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  tokens = place((batch, T), np.int32)
  args = (params, tokens, tokens, place((batch, 2), np.uint32))
  spec = dict(inputs=((batch, T), np.dtype(np.int32)))
  # two for each weight and token, read and written, without attention's own products
  work = 2.0 * trees.count(m.skeleton.shapes) * batch * (T + new_tokens * how.width)
  logits = _logits(m, (batch * how.width, 1), 1, 0.0)
  return Built(m, made.jitted, args, params, spec, 1, logits, work, work, 0.0, said, loops=new_tokens)


def lower(of: Built) -> Any:
  with sharding.use(of.model.mesh, of.model.rules):
    return of.jitted.lower(*of.args)


def pick_platform(target_platform: str, devices: int) -> None:
  """Makes this process see CPUs alone, `devices` of them, which must happen before JAX starts."""
  quiet = dict(TPU_SKIP_MDS_QUERY="1", TPU_STDERR_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3", TF_CPP_MIN_LOG_LEVEL="3")
  quiet |= dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5litepod-1")  # of none here
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that this one starts
  jax.config.update("jax_platforms", "cpu")
  if target_platform == "cpu":
    own = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{own} --xla_force_host_platform_device_count={devices}".strip()
