"""From a config to the things a binary needs: the only place that unpacks one. Everything below takes arguments."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft import display, flops, hub, observe, sharding, trees
from jaxft.config import Reader
from jaxft.data import cache, clean, pipeline, tasks, tokens
from jaxft.data import report as data_report
from jaxft.errors import InputError, did_you_mean
from jaxft.eval import evaluators
from jaxft.families import registry
from jaxft.infer import options
from jaxft.infer.generate import Generator
from jaxft.train import checkpoint, loop, losses, optimizer, step

log = logging.getLogger("jaxft")

MODEL = "model"  # in a run folder: config and tokenizer
DONE = "done.json"  # in a run folder: why training ended, once it has
ASSETS = pathlib.Path(jaxft.__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Model:
  """A model without its weights, and where they will live."""

  folder: pathlib.Path | None  # of the weights it starts from; None: fresh ones
  tokens_folder: pathlib.Path
  skeleton: registry.Skeleton
  stored: registry.Skeleton  # as the weights in `folder` are; differs from `skeleton` where the vocabulary grows
  plain: registry.Skeleton  # `skeleton` without rematerialisation, for counting the model's own FLOPs
  tokenizer: tokens.Tokenizer
  mesh: jax.sharding.Mesh
  rules: dict
  shardings: Any

  @property
  def stored_shardings(self) -> Any:
    return sharding.leaf_shardings(self.mesh, self.rules, self.stored.axes, self.stored.shapes)


def locate(name: str) -> pathlib.Path:
  """Returns the folder of a model or tokenizer: builtin:NAME, a folder, or a Hub id (downloaded)."""
  if not name.startswith("builtin:"):
    return hub.resolve(name)
  known = sorted(p.name for p in ASSETS.iterdir() if p.is_dir())
  if name.removeprefix("builtin:") not in known:
    raise InputError(f"there is no {name}; the built-in models are {', '.join(known)}{did_you_mean(name[8:], known)}.")
  return ASSETS / name.removeprefix("builtin:")


def activations(dtype: str) -> jnp.dtype:
  """Returns the dtype of activations; "auto" is bfloat16 on TPU and GPU, float32 on CPU."""
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return floating("model.dtype", dtype, ("auto", "bfloat16", "float32"))


def floating(key: str, dtype: str, known: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> jnp.dtype:
  if dtype not in known:
    raise InputError(f"config: {key} is {dtype!r}{did_you_mean(dtype, known)}; it is one of {', '.join(known)}.")
  return jnp.dtype(dtype)


def model(c: Reader, home: pathlib.Path | None = None) -> Model:
  """Returns the model of `c.model`; with `home`, a run folder, as training left it there (no weights are needed for
  that).
  """
  mesh, rules = sharding.make_mesh(c.mesh), dict(c.rules)
  init, given, named = c.model.init, c.model.config, c.model.tokenizer
  if bool(init) == bool(given):
    raise InputError(
      "config: give either model.init (a folder or Hub id to start from) or model.config=dict(model_type=..., ...) "
      f"(fresh weights); there {'are both' if init else 'is neither'}."
    )
  folder = locate(init) if init and home is None else None
  described = hub.read_json(home / MODEL / "config.json") if home else registry.read_config(folder) if folder else given
  if not (named or folder or home):
    raise InputError("config: model.tokenizer is empty; fresh weights need the folder or Hub id of a tokenizer.")
  source = home / MODEL if home else locate(named) if named else folder
  tokenizer = tokens.load(str(source))
  if activations(c.model.dtype) == jnp.float32:
    # float32 asked for is float32 meant: GPUs and TPUs would multiply in TF32 and bfloat16, a relative error of 1e-3
    jax.config.update("jax_default_matmul_precision", "highest")
  how = dict(
    dtype=activations(c.model.dtype),
    params_dtype=floating("model.params_dtype", c.model.params_dtype),
    remat=c.model.remat,
    unroll=c.model.unroll,
    dropout=c.model.dropout,
  )
  stored = skeleton = registry.skeleton(described, **how)
  if c.model.resize and tokenizer.size > skeleton.generation["vocab"]:
    skeleton = registry.skeleton({**described, "vocab_size": tokenizer.size}, **how)
  plain = skeleton if c.model.remat == "none" else registry.skeleton(skeleton.json, **{**how, "remat": "none"})
  tokens.check_vocab(tokenizer, skeleton.generation["vocab"])
  shardings = sharding.leaf_shardings(mesh, rules, skeleton.axes, skeleton.shapes)
  here = folder or (home / MODEL if home else None)
  return Model(here, source, skeleton, stored, plain, tokenizer, mesh, rules, shardings)


def load(m: Model, seed: int) -> Any:
  """Returns the weights that training starts from, born with their shardings: read from the folder, or fresh."""
  if m.folder is None:
    return step.init_params(m.skeleton.init, seed, m.shardings)
  params = hub.load(m.folder, m.stored.rules, m.stored.shapes, m.stored_shardings)
  if m.stored is m.skeleton:
    return params
  vocab = m.skeleton.generation["vocab"]
  log.info(
    "The vocabulary grows from %d to %d; new rows are the mean of the old ones.", m.stored.generation["vocab"], vocab
  )
  return jax.jit(lambda p: registry.resize(m.stored.json, p, vocab)[1], out_shardings=m.shardings)(params)


def cleaning(c: Reader) -> clean.Options:
  names = ("strip", "unicode", "min_chars", "max_chars", "max_ratio", "dedup")
  return clean.Options(**{k: getattr(c.data.clean, k) for k in names})


def store(c: Reader, tokenizer: tokens.Tokenizer, source: Any, key: str, limit: int = 0) -> cache.Store:
  """Returns the tokenised examples of `source`; `key` names it in messages."""
  if not source:
    raise InputError(
      f"config: {key} is empty; give a path, hub:NAME, tfds:NAME, builtin:NAME, or a dict of parallel text files."
    )
  d, t = c.data, c.task
  wrong = sorted(set(t) - {"kind", "input", "target"})
  if wrong:
    raise InputError(f"config: task.{wrong[0]} does not exist{did_you_mean(wrong[0], ('kind', 'input', 'target'))}.")
  return cache.open_or_build(
    source,
    tokenizer=tokenizer,
    task=tasks.Task(t["kind"], t["input"], t["target"]),
    clean=cleaning(c),
    lengths=d.lengths,
    too_long=d.too_long,
    too_long_share=d.too_long_share,
    limit=limit,
    root=d.cache,
    workers=d.workers,
  )


def batches(c: Reader, data: cache.Store, m: Model) -> pipeline.Batches:
  """Returns the shuffled training batches of `data`."""
  sharding.check_batch(m.mesh, m.rules, c.batch, c.micro)
  return pipeline.Batches(
    data,
    seed=c.seed,
    batch=c.batch,
    lengths=c.data.lengths,
    pack=c.data.pack,
    buckets=tuple(c.data.buckets),
    shuffle=True,
  )


def examples(data: cache.Store, made: pipeline.Batches) -> Callable[[int], list[str]]:
  """Returns the function that says where the examples of a step come from: file and line, or data set and row."""
  return lambda step: [data.where(i) for i in made.example_ids(step)]


def total_steps(c: Reader, data: pipeline.Batches) -> int:
  """Returns `steps`, or as many as `epochs` takes."""
  steps, epochs = c.steps, c.epochs
  if steps < 0 or (not steps and epochs <= 0):
    raise InputError(f"config: steps={steps} and epochs={epochs} leave nothing to do; set one of them above 0.")
  return steps or data.steps(epochs)


def loss(c: Reader, skeleton: registry.Skeleton) -> step.Loss:
  """Returns the loss of training: loss_fn(params, batch, key)."""
  smoothing, z = c.loss.label_smoothing, c.loss.z_loss
  return lambda params, batch, key: losses.seq2seq(
    skeleton.bind(params), batch, key, label_smoothing=smoothing, z_loss=z
  )


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The compiled-on-first-use step and the state it takes."""

  step: Any
  abstract: step.TrainState
  tx: Any
  steps: int
  plain: Any  # the step before jit and without rematerialisation, to count its FLOPs


def trainer(c: Reader, m: Model, steps: int) -> Trainer:
  o = c.optimizer
  trainable = trees.trainable(c.trainable, m.skeleton.shapes, m.skeleton.axes)
  names = (
    "name",
    "lr",
    "schedule",
    "warmup",
    "cooldown",
    "end",
    "clip",
    "b1",
    "b2",
    "eps",
    "decay",
    "decay_rules",
    "lr_rules",
  )
  tx, schedule = optimizer.make(
    **{n: getattr(o, n) for n in names},
    steps=steps,
    shapes=m.skeleton.shapes,
    axes=m.skeleton.axes,
    trainable=trainable,
  )
  abstract = step.abstract_state(m.skeleton.shapes, m.shardings, tx, trainable)
  one = lambda skeleton: step.make_train_step(
    loss(c, skeleton), tx, schedule, c.micro, trainable=trainable, pins=step.shardings_of(abstract.params)
  )
  jitted = step.jit_train_step(one(m.skeleton), m.mesh, m.rules, abstract)
  return Trainer(jitted, abstract, tx, steps, one(m.plain))


def evaluators_of(c: Reader, m: Model, home: pathlib.Path | None, *, needed: bool = False) -> list:
  """Returns the evaluators of `c.evals`; samples go to home/samples. `needed`: that there are none is an InputError."""
  made = []
  if needed and not c.evals:
    raise InputError("config: evals is empty; add for example c.evals = dict(loss=dict(kind='loss')).")
  for name, e in c.evals.items():
    if e["every"] < 0:
      raise InputError(f"config: evals.{name}.every is {e['every']}; it is a number of steps, or 0 for the end alone.")
    bar = functools.partial(display.Bar, f"eval/{name}", quiet=3.0, live=needed)  # training has a bar of its own
    made.append(_evaluator(c, m, home, name, e, bar))
    made[-1].start = e["start"]
  return made


def _evaluator(c: Reader, m: Model, home: pathlib.Path | None, name: str, e: dict, bar: Any) -> Any:
  if isinstance(e["data"], dict) and (c.task["input"], c.task["target"]) == tasks.DEFAULTS:
    raise InputError(
      f"config: evals.{name}.data is a dict of parallel files, whose order a config does not keep here; say which "
      f"column is which: task.input='{{{next(iter(e['data']))}}}' and so on."
    )
  data = store(c, m.tokenizer, e["data"] or c.data.validation, f"data.validation (or evals.{name}.data)", e["limit"])
  said = data_report.notice(data.report)
  if said:
    log.warning("The data of evals.%s: %s.", name, said)
  if e["kind"] == "loss":
    rows = evaluators.whole_batch(e["batch"], m.mesh, m.rules)
    once = pipeline.Batches(
      data, seed=0, batch=rows, lengths=c.data.lengths, pack=c.data.pack, buckets=tuple(c.data.buckets), shuffle=False
    )
    plain = lambda model, batch, key: losses.seq2seq(model, batch, key, label_smoothing=0.0, z_loss=0.0)
    return evaluators.LossEvaluator(
      name, e["every"], skeleton=m.skeleton, batches=once, loss_fn=plain, mesh=m.mesh, rules=m.rules, progress=bar
    )
  how = options.read(
    m.skeleton.generation,
    generation_config(m),
    beams=e["beams"],
    temperature=0.0,
    length_penalty=e["length_penalty"],
    length=e["length"] or evaluators.answer_length(data),
  )
  engine = Generator(m.skeleton, m.tokenizer, how, batch=e["batch"], mesh=m.mesh, rules=m.rules)
  return evaluators.GenerateEvaluator(
    name,
    e["every"],
    generator=engine,
    store=data,
    names=e["metrics"],
    samples=e["samples"],
    folder=home / "samples" if home else None,
    progress=bar,
  )


def generation_config(m: Model) -> dict:
  """Returns the generation_config.json beside the weights, or what transformers writes for a model that has none."""
  file = m.folder / "generation_config.json" if m.folder else None
  if file and file.exists():
    return hub.read_json(file)
  return m.skeleton.generation_config


def checkpointer(c: Reader, home: pathlib.Path, m: Model, data: cache.Store) -> checkpoint.Checkpointer:
  s = c.save
  facts = dict(observe.environment(), data=data.folder.name, mesh={k: int(v) for k, v in m.mesh.shape.items()})
  return checkpoint.Checkpointer(str(home / "checkpoints"), keep=s.keep, best=s.best, mode=s.mode, facts=facts)


def early_stop(c: Reader) -> loop.EarlyStop:
  s = c.stop
  return loop.EarlyStop(metric=s.metric, mode=s.mode, patience=s.patience, min_delta=s.min_delta)


def plan(c: Reader, t: Trainer, batches: pipeline.Batches, m: Model) -> loop.Plan:
  """Returns the numbers of the loop; FLOPs are counted from the program of the step, for each shape of a batch."""
  out = dict(log_every=c.log.every, save_every=c.save.every, save_minutes=c.save.minutes, skip=c.numbers.skip)
  if out["log_every"] < 1 or min(out.values()) < 0:
    raise InputError(
      f"config: log.every={c.log.every}, save.every={c.save.every}, save.minutes={c.save.minutes}, numbers.skip="
      f"{c.numbers.skip}: log.every is at least 1, the others are 0 (off) or more."
    )
  peak, source = flops.peak(jax.devices()[0], m.skeleton.dtype)
  work = [flops.count(t.plain, t.abstract, _of_shape(batches.host_batch(0, 0, 1), s)) for s in batches.shapes]
  of = lambda step: work[batches.bucket(step)]
  log.info(
    "A step takes %s FLOPs; peak of a device %.3g FLOP/s (%s).", " or ".join(f"{w:.3g}" for w in work), peak, source
  )
  return loop.Plan(
    steps=t.steps, epoch_steps=batches.steps(1), flops=of, peak=peak * jax.device_count(), **out)  # fmt: skip


def _of_shape(batch: dict[str, np.ndarray], lengths: tuple[int, int]) -> dict:
  """Returns the abstract leaves of a batch with `lengths` of (inputs, targets)."""
  length = lambda name: lengths[0] if name.startswith("input") else lengths[1]
  return {k: jax.ShapeDtypeStruct((x.shape[0], length(k)), x.dtype) for k, x in batch.items()}


def feed(m: Model, batch: int) -> tuple[int, int]:
  """Returns (host, hosts) of this process for reading batches of `batch` rows."""
  return sharding.feed(sharding.batch_sharding(m.mesh, m.rules), batch)


def put(m: Model, batch: int):
  """Returns the function that places this process's rows of a batch on the devices."""
  rows = sharding.batch_sharding(m.mesh, m.rules)
  return lambda local: sharding.put_batch(local, rows, batch)


def export_options(c: Reader) -> dict:
  """Returns dtype and shard_gb of the exported folder."""
  dtype = c.export.dtype or c.model.params_dtype
  floating("export.dtype", dtype)
  return dict(dtype=dtype, shard_gb=c.export.shard_gb)


def summary(m: Model, t: Trainer) -> str:
  """Returns what will run, in a few lines."""
  s, o = m.skeleton, t.abstract
  trained, all_ = trees.count(o.params), trees.count(s.shapes)
  devices = jax.devices()
  lines = [
    f"model     {s.json['model_type']} with {all_ / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M of them trained, "
    f"from {m.folder or 'fresh weights'}",
    f"devices   {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es); mesh "
    + " ".join(f"{k}={v}" for k, v in m.mesh.shape.items()),
    f"numbers   activations {s.dtype.name}, weights {np.dtype(jax.tree.leaves(s.shapes)[0].dtype).name}; state "
    f"{trees.nbytes(o) / 2**20:,.0f} MiB over all devices",
    f"steps     {t.steps:,}",
  ]
  return "\n".join(lines)
