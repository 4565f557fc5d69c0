"""A small run through the real step, loop and checkpoints, in this process or (as a script) in one that tests kill.

python tests/train/crash_toy.py WORKDIR '{"steps": 40}' ends with jaxft's exit codes and writes WORKDIR/final.npz.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import errors, observe, sharding, trees
from jaxft.train import checkpoint, loop, manifest, workdir
from jaxft.train import step as train_step

OPTIONS = dict(
  steps=30,
  save_every=7,
  save_minutes=0.0,
  log_every=3,
  eval_every=0,
  metric="",
  best="",
  mode="min",
  patience=0,
  keep=2,
  skip=3,
  nan=(),
  values=(),
  first=None,
  sleep=0.0,
  mesh=2,
  width=6,
  stop_after=0,
  lock=True,
)
RULES = dict(batch="fsdp", embed="fsdp")
AXES = {"a": {"kernel": ("embed", None)}, "b": {"kernel": (None, "embed")}}


def batch_of(step, nan=()):
  """Rows of step `step`, a function of it alone."""
  rng = np.random.default_rng((5, step))
  x = rng.normal(size=(4, 6)).astype(np.float32)
  if step in nan:
    x[1, 2] = np.nan
  return dict(x=x, y=np.sin(x.sum(1, keepdims=True)), segments=(rng.random((4, 3)) < 0.7).astype(np.int32))


def loss_fn(params, batch, key):
  h = jnp.tanh(batch["x"] @ params["a"]["kernel"])
  h = h if key is None else h * jax.random.bernoulli(key, 0.9, h.shape)
  loss = jnp.sum((h @ params["b"]["kernel"] - batch["y"]) ** 2)
  return loss, jnp.float32(4), dict(accuracy=jnp.float32(1))


def init(key, width):
  return {"a": {"kernel": jax.random.normal(key, (6, width))}, "b": {"kernel": jax.random.normal(key, (width, 2)) / 3}}


@functools.cache
def build(devices, width):
  """Returns (step function, abstract state, the arrays of a fresh state, sharding of a batch)."""
  mesh = sharding.make_mesh(dict(fsdp=devices), jax.devices()[:devices])
  shapes = jax.eval_shape(lambda k: init(k, width), jax.random.key(0))
  places = sharding.leaf_shardings(mesh, RULES, AXES, shapes)
  trainable = trees.by_rules(((".*", True),), shapes)
  tx, schedule = optax.adam(0.03), lambda s: 0.03 / (1 + s)
  abstract = train_step.abstract_state(shapes, places, tx, trainable)
  params = train_step.init_params(lambda k: init(k, width), 3, places)
  fn = train_step.make_train_step(loss_fn, tx, schedule, 1, trainable=trainable, pins=places)
  state = train_step.init_state(params, 3, tx, abstract)
  return (
    train_step.jit_train_step(fn, mesh, RULES, abstract),
    abstract,
    jax.device_get(state),
    sharding.batch_sharding(mesh, RULES),
  )


class Fixed:
  """An evaluator with given values, or the norm of the weights; remembers when it was asked."""

  gives = ("loss",)

  def __init__(self, name, every, values, first):
    self.name, self.every, self.values, self.asked = name, every, values, []
    self.start, self.first = first is not None, first  # the value before the first step

  def run(self, params, step):
    self.asked.append(step)
    if step == 0:
      return dict(loss=self.first)
    norm = float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(params))))
    return dict(loss=self.values[len(self.values) and step // self.every - 1] if self.values else norm)


def run(folder, **given):
  """Trains in `folder`; returns (outcome, evaluator, checkpointer)."""
  o = {**OPTIONS, **given}
  folder = workdir.probe(folder)
  step_fn, abstract, fresh, where = build(o["mesh"], o["width"])
  state = jax.tree.map(lambda x, a: jax.device_put(np.array(x), a.sharding), fresh, abstract)
  saves = checkpoint.Checkpointer(
    str(folder / "checkpoints"), keep=o["keep"], best=o["best"], mode=o["mode"], facts=dict(config="toy")
  )
  restored = saves.restore(abstract)
  state, evals = (restored[0], loop.evals_of(restored[1])) if restored else (state, [])
  plan = loop.Plan(
    steps=o["steps"],
    epoch_steps=11.0,
    log_every=o["log_every"],
    save_every=o["save_every"],
    save_minutes=o["save_minutes"],
    skip=o["skip"],
    flops=lambda step: 0.0,
    peak=0.0,
  )

  def batches(start, stop):
    for step in range(start, stop):
      time.sleep(o["sleep"])
      if o["stop_after"] and step >= o["stop_after"]:
        signals._handle(15, None)
      yield step, batch_of(step, o["nan"])

  evaluator = Fixed("toy", o["eval_every"], list(o["values"]), o["first"])
  observer = observe.Observer(folder, steps=o["steps"], start=int(state.step), tensorboard=False)
  try:
    with loop.Signals() as signals:
      outcome = loop.train(
        step_fn,
        state,
        batches,
        plan,
        put=lambda rows: sharding.put_batch(rows, where, 4),
        examples=lambda s: [f"toy.jsonl, line {100 + s}", f"toy.jsonl, line {200 + s}"],
        evaluators=[evaluator] if o["eval_every"] else [],
        checkpointer=saves,
        observer=observer,
        signals=signals,
        evals=evals,
        stop=loop.EarlyStop(metric=o["metric"], mode=o["mode"], patience=o["patience"], min_delta=0.0),
      )
  finally:
    observer.close()
  return outcome, evaluator, saves


def arrays(state):
  return {p: np.asarray(x) for p, x in manifest.paths(state).items()}


def main(argv):
  folder, options = pathlib.Path(argv[1]), json.loads(argv[2])
  observe.setup_logging(folder)
  if options.get("lock", True):
    with workdir.Lock(workdir.probe(folder)):
      outcome, _, saves = run(folder, **options)
  else:
    outcome, _, saves = run(folder, **options)
  saves.close()
  np.savez(folder / "final.npz", **{p.replace("/", "|"): x for p, x in arrays(outcome.state).items()})
  return 0


if __name__ == "__main__":
  errors.run(main, sys.argv)
