"""From a config to the things a binary needs: the only place that unpacks one. Everything below takes arguments."""

import copy
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import flops, kinds, modeling, observe, sharding, trees
from jaxft.config import Reader
from jaxft.data import cache, clean, hidden, pipeline, tokens
from jaxft.errors import InputError, did_you_mean
from jaxft.families import registry
from jaxft.models import layers
from jaxft.train import checkpoint, loop, losses, optimizer, step

log = logging.getLogger("jaxft")
task = kinds.task

DONE = "done.json"  # in a run folder: why training ended, once it has

# Numbers of a config that are arguments of the compiled step: other values compile nothing. Those of the second row
# only where a sweep varies them: a constant 1 - b2 is rounded once, in float64.
TRACED = ("optimizer.lr", "optimizer.eps", "optimizer.decay", "loss.label_smoothing", "loss.z_loss")
TRACED_IN_SWEEPS = ("optimizer.b1", "optimizer.b2")


def alone(make: Callable, c: Reader, *args: Any) -> Any:
  """Returns make(c, *args): each part of a run made for itself, where `Way.part` may take one of an earlier run."""
  return make(c, *args)


@dataclasses.dataclass(frozen=True)
class Way:
  """How a run is made: by default by itself; a sweep has its own way for its trials."""

  part: Callable = alone
  live: tuple[str, ...] = ()  # paths in the config of what differs between runs that share parts
  judge: Callable[[loop.EarlyStop, int, pathlib.Path], loop.EarlyStop] = lambda stop, steps, home: stop
  export: bool = True  # and the report
  logging: Callable = observe.setup_logging


def cleaning(c: Reader) -> clean.Options:
  names = ("strip", "unicode", "min_chars", "max_chars", "max_ratio", "dedup")
  return clean.Options(**{k: getattr(c.data.clean, k) for k in names})


def store(
  c: Reader, tokenizer: tokens.Tokenizer, source: Any, key: str, *, labels: tuple[str, ...], limit: int = 0,
  mixed: bool = True, ranked: bool = False,
) -> cache.Store:  # fmt: skip
  """Returns the tokenised examples of `source`; `key` names it in messages, `labels` are all it may have ((): any).

  Not `mixed`: each row once, by the first pair of templates, as for evaluation; `ranked`: once with each word of
  task.verbalizer for an answer.
  """
  if not source:
    raise InputError(
      f"config: {key} is empty; give a path, hub:NAME, tfds:NAME, builtin:NAME, or a dict of parallel text files."
    )
  d = c.data
  return cache.open_or_build(
    source,
    tokenizer=tokenizer,
    task=task(c) if mixed else dataclasses.replace(task(c), mix=(), ranked=ranked),
    clean=cleaning(c),
    lengths=kinds.lengths(c),
    too_long=d.too_long,
    too_long_share=d.too_long_share,
    limit=limit,
    root=d.cache,
    workers=d.workers,
    labels=labels,
    template=kinds.chats(c, tokenizer),
  )


def model_for(
  c: Reader, source: modeling.Source, data: cache.Store, devices: Sequence[jax.Device] | None = None
) -> modeling.Model:
  """Returns the model with the head that the task and the labels of `data` ask for, on `devices` (None: all here)."""
  t, head = task(c), c.model.head
  values = data.meta["width"] if t.kind == "regress" else 0
  labels = tuple(map(str, data.labels or ())) or tuple(f"LABEL_{i}" for i in range(values))
  if head.width and head.act not in layers.ACTIVATIONS:
    known = ", ".join(layers.ACTIVATIONS)
    raise InputError(
      f"config: model.head.act is {head.act!r}{did_you_mean(head.act, layers.ACTIVATIONS)}; it is one of {known}."
    )
  want = modeling.wanted(t.kind, source.json, labels, multi=t.multi, mlp=(head.width, head.act))
  m = modeling.make(c, source, want, devices)
  check_positions(c, m, data, "data.train")
  return m


def model_to_judge(c: Reader, source: modeling.Source) -> modeling.Model:
  """Returns the model with its own head, which must be of the kind that the task needs."""
  kind = modeling.HEADS[task(c).kind][0]
  own = registry.head_kind(source.json)
  if kind != own:
    raise InputError(
      f"{source.folder}: its head is for {registry.KINDS[own]}, and task.kind={task(c).kind} needs one for "
      f"{registry.KINDS[kind]}. Train it first (python -m jaxft.main), or set task.kind."
    )
  return modeling.make(c, source, None)


def training_data(c: Reader, source: modeling.Source) -> cache.Store:
  """Returns the examples of `data.train`; where they have the labels of the model's own head, in the model's order."""
  given = dict(limit=c.data.limit)
  data = store(c, source.tokenizer, c.data.train, "data.train", labels=(), **given)
  own = source.labels
  if data.labels and not task(c).labels and data.labels != own and sorted(data.labels) == sorted(own):
    log.info("The labels keep the order that the model has: %s.", ", ".join(own))
    data = store(c, source.tokenizer, c.data.train, "data.train", labels=own, **given)
  return data


def check_positions(c: Reader, m: modeling.Model, data: cache.Store, key: str) -> None:
  """Raises InputError where an example is longer than the model has positions."""
  longest, most = min(int(data.lengths["inputs"].max()), c.data.lengths["inputs"]), m.skeleton.positions
  if most and longest > most:
    raise InputError(
      f"config: data.lengths.inputs is {c.data.lengths['inputs']}, but this {m.skeleton.json['model_type']} has {most} "
      f"positions, and {key} has examples of {longest} tokens. Set --config.data.lengths.inputs={most}."
    )


def batches(c: Reader, data: cache.Store, m: modeling.Model) -> pipeline.Batches:
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
    balance=c.data.balance,
    dynamic=kinds.dynamic(c, m.tokenizer),
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


def loss_options(
  c: Reader, m: modeling.Model, data: cache.Store, names: Collection[str] = (), *, plain: bool = False
) -> losses.Options:
  """Returns what the loss of training is told, or `plain`, that of evaluation: without what only training wants.

  The numbers `names` are left at 0, to be put in when the step is traced.
  """
  most = c.loss.logits_mib or (128 if m.mesh.devices.flat[0].platform == "cpu" else 512)
  beside = dict(logits=max(most, 0) * 2.0**20)
  if c.task["kind"] == "mlm_nsp":  # so that the loss of the pairs weighs as much as that of the tokens
    beside["nsp_scale"] = hidden.mean_hidden(data.lengths["inputs"], c.task["mask"]["share"])
  if plain:
    return losses.Options(multi=task(c).multi, **beside)
  weights, counts = c.loss.class_weights, data.class_counts
  if weights == "balanced" and counts is not None:
    weights = tuple(float(counts.sum() / (len(counts) * max(n, 1))) for n in counts)
  weights = tuple(weights or ())
  if weights and (
    counts is None or len(weights) != len(counts) or not all(isinstance(w, (int, float)) for w in weights)
  ):
    raise InputError(
      f"config: loss.class_weights is {c.loss.class_weights!r}; it is 'balanced' or a number for each of the labels "
      f"{', '.join(map(str, data.labels or ())) or '(this task has none)'}."
    )
  smoothing, z = (0.0 if path in names else _at(c, path) for path in ("loss.label_smoothing", "loss.z_loss"))
  return losses.Options(smoothing, z, weights, multi=task(c).multi, **beside)


def loss(
  c: Reader, m: modeling.Model, skeleton: registry.Skeleton, data: cache.Store, names: Collection[str]
) -> Callable:
  """Returns what gives the loss of training, loss_fn(params, batch, key), for values of the numbers `names`."""
  kind, told = task(c).kind, loss_options(c, m, data, names)

  def of(given: Mapping[str, Any]) -> step.Loss:
    one = losses.make(kind, dataclasses.replace(told, **_group("loss", given)))
    return lambda params, batch, key: one(skeleton.bind(params), batch, key)

  return of


def _group(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
  return {path.split(".")[-1]: x for path, x in given.items() if path.startswith(f"{group}.")}


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The compiled-on-first-use step and the state it takes."""

  step: step.Bound  # step(state, batch)
  abstract: step.TrainState
  tx: Any
  steps: int
  flops: Callable[[dict], float]  # of a step, for what `pipeline.Batches.spec` says of its batch


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled of a `Trainer`: step(state, batch, numbers), for any values of the numbers with these names."""

  jitted: Any
  plain: Any  # the step before jit, without rematerialisation and kernels, to count its FLOPs
  again: Any  # the same with rematerialisation
  abstract: step.TrainState
  tx: Any
  steps: int
  names: tuple[str, ...]
  counted: dict  # FLOPs by the shapes of a batch

  def flops(self, spec: Mapping[str, tuple], *, again: bool = False, only: str = "") -> float:
    """Returns the FLOPs of a step whose batch has {name: (shape, dtype)}: see flops.count for `again` and `only`."""
    key = (again, only, *((k, *map(str, x)) for k, x in sorted(spec.items())))
    if key not in self.counted:
      batch, fn = {k: jax.ShapeDtypeStruct(*x) for k, x in spec.items()}, self.again if again else self.plain
      self.counted[key] = flops.count(
        fn, self.abstract, batch, dict.fromkeys(self.names, np.float32(0.5)), again=again, only=only
      )
    return self.counted[key]


def numbers(c: Reader, live: Collection[str] = ()) -> dict[str, float]:
  """Returns {path in the config: value} of what is an argument of the compiled step.

  A decay, smoothing or z-loss of 0 is none: the program without it is shorter. It is one where it is `live`, so that
  all values of a sweep have one program.
  """
  values = {path: float(_at(c, path)) for path in (*TRACED, *TRACED_IN_SWEEPS)}
  lr, decay = values["optimizer.lr"], values["optimizer.decay"]
  if lr < 0 or decay < 0:
    raise InputError(f"config: optimizer.lr={lr} and optimizer.decay={decay} must not be negative.")
  smoothing, z = values["loss.label_smoothing"], values["loss.z_loss"]
  if not 0 <= smoothing < 1 or z < 0:
    raise InputError(
      f"config: loss.label_smoothing={smoothing} is a share, at least 0 and below 1; loss.z_loss={z} is not negative."
    )
  wanted = {"optimizer.lr", "optimizer.eps", *live, *(path for path in TRACED if values[path])}
  return {path: x for path, x in values.items() if path in wanted}


def _at(c: Reader, path: str) -> Any:
  return functools.reduce(getattr, path.split("."), c)


def trainer(c: Reader, m: modeling.Model, data: cache.Store, steps: int, way: Way = Way()) -> Trainer:
  """Returns the trainer of a config; its program may be that of an earlier run."""
  given = numbers(c, way.live)
  p = way.part(program, c, m, data, steps, tuple(given))
  return Trainer(step.Bound(p.jitted, given, m.mesh), p.abstract, p.tx, steps, p.flops)


def program(c: Reader, m: modeling.Model, data: cache.Store, steps: int, names: tuple[str, ...]) -> Program:
  """Returns the program of a config, which reads everything but the values of `names`."""
  trainable = m.trainable
  fields = ("name", "schedule", "warmup", "cooldown", "end", "clip", "decay_rules", "lr_rules", "layer_decay",
            "toward_init")  # fmt: skip
  free = {path: _at(c, path) for path in (*TRACED, *TRACED_IN_SWEEPS) if path not in names}
  how = dict(
    {n: getattr(c.optimizer, n) for n in fields} | _group("optimizer", free),
    unfreeze=c.unfreeze,
    steps=steps,
    shapes=m.skeleton.shapes,
    axes=m.skeleton.axes,
    trainable=trainable,
  )
  made = lambda given: optimizer.make(**how, **_group("optimizer", given))
  tx, _ = made(dict.fromkeys(names, 0.5))  # its state and what it refuses do not depend on the numbers
  abstract = step.abstract_state(m.skeleton.shapes, m.shardings, tx, trainable)
  micro, pins = c.micro, step.shardings_of(abstract.params)

  def one(skeleton):
    of = loss(c, m, skeleton, data, names)
    return lambda state, batch, given: step.make_train_step(
      of(given), *made(given), micro, trainable=trainable, pins=pins
    )(state, batch)

  jitted = step.jit_train_step(one(m.skeleton), m.mesh, m.rules, abstract, hyper=True)
  counted = (step.pinned(one(skeleton), m.mesh, m.rules) for skeleton in (m.plain, m.again))
  return Program(jitted, *counted, abstract, tx, steps, names, {})


def checkpointer(c: Reader, home: pathlib.Path, m: modeling.Model, data: cache.Store) -> checkpoint.Checkpointer:
  s = c.save
  facts = dict(observe.environment(), data=data.folder.name, mesh={k: int(v) for k, v in m.mesh.shape.items()})
  return checkpoint.Checkpointer(str(home / "checkpoints"), keep=s.keep, best=s.best, mode=s.mode, facts=facts)


def early_stop(c: Reader) -> loop.EarlyStop:
  s = c.stop
  return loop.EarlyStop(metric=s.metric, mode=s.mode, patience=s.patience, min_delta=s.min_delta)


_peak = functools.cache(flops.peak)  # on a CPU it is measured


def plan(c: Reader, t: Trainer, batches: pipeline.Batches, m: modeling.Model) -> loop.Plan:
  """Returns the numbers of the loop; FLOPs are counted from the program of the step, for each shape of a batch."""
  out = dict(log_every=c.log.every, save_every=c.save.every, save_minutes=c.save.minutes, skip=c.numbers.skip)
  if out["log_every"] < 1 or min(out.values()) < 0:
    raise InputError(
      f"config: log.every={c.log.every}, save.every={c.save.every}, save.minutes={c.save.minutes}, numbers.skip="
      f"{c.numbers.skip}: log.every is at least 1, the others are 0 (off) or more."
    )
  peak, source = _peak(jax.devices()[0], m.skeleton.dtype)
  work = [t.flops(batches.spec(i)) for i in range(len(batches.shapes))]
  of = lambda step: work[batches.bucket(step)]
  log.info(
    "A step takes %s FLOPs; peak of a device %.3g FLOP/s (%s).", " or ".join(f"{w:.3g}" for w in work), peak, source
  )
  return loop.Plan(
    steps=t.steps, epoch_steps=batches.steps(1), flops=of, peak=peak * jax.device_count(),
    unit="examples" if task(c).kind in losses.OF_EXAMPLES else "target_tokens", **out)  # fmt: skip


def compile_early(t: Trainer, batches: pipeline.Batches, m: modeling.Model, done: int) -> None:
  """Starts to compile the step for the batch after `done` steps in a thread, while weights and TensorFlow are loaded.

  Not with several processes, where each would have to compile in the same order.
  """
  if jax.process_count() == 1 and done < t.steps:
    rows = sharding.batch_sharding(m.mesh, m.rules)
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    t.step.prepare(t.abstract, {k: place(*x) for k, x in batches.spec(batches.bucket(done)).items()})


def feed(m: modeling.Model, batch: int) -> tuple[int, int]:
  """Returns (host, hosts) of this process for reading batches of `batch` rows."""
  return sharding.feed(sharding.batch_sharding(m.mesh, m.rules), batch)


def put(m: modeling.Model, batch: int):
  """Returns the function that places this process's rows of a batch on the devices."""
  rows = sharding.batch_sharding(m.mesh, m.rules)
  return lambda local: sharding.put_batch(local, rows, batch)


def writing_to(home: pathlib.Path, evaluators: list) -> list:
  """Returns copies of evaluators, with the same compiled functions, that write their samples below `home`."""
  out = [copy.copy(e) for e in evaluators]
  for e in out:
    if hasattr(e, "folder"):
      e.folder = home / "samples"
  return out


def export_options(c: Reader, tokenizer: tokens.Tokenizer | None = None) -> dict:
  """Returns dtype and shard_gb of the exported folder, and the chat template that takes the place of the tokenizer's;
  none without `tokenizer`, as for a run folder, whose tokenizer has it."""
  dtype = c.export.dtype or c.model.params_dtype
  modeling.floating("export.dtype", dtype)
  return dict(dtype=dtype, shard_gb=c.export.shard_gb, chat=kinds.chat_text(c, tokenizer) if tokenizer else "")


def _dtypes(tree: Any) -> str:
  return " and ".join(sorted({np.dtype(x.dtype).name for x in jax.tree.leaves(tree)}))


def summary(m: modeling.Model, t: Trainer) -> str:
  """Returns what will run, in a few lines."""
  s, o = m.skeleton, t.abstract
  trained, all_ = trees.count(o.params), trees.count(s.shapes)
  devices = jax.devices()
  still = f", frozen ones {_dtypes(o.frozen)}" if o.frozen else ""
  lines = [
    f"model     {s.json['model_type']} with {all_ / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M of them trained, "
    f"from {m.folder or 'fresh weights'}",
    f"devices   {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es); mesh "
    + " ".join(f"{k}={v}" for k, v in m.mesh.shape.items()),
    f"numbers   activations {s.dtype.name}, weights {_dtypes(o.params)}{still}; state "
    f"{trees.nbytes(o) / 2**20:,.0f} MiB over all devices",
    f"steps     {t.steps:,}",
  ]
  return "\n".join(lines)
