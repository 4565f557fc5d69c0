"""The training state, and the pure step that advances it.

A loss returns sums: (loss sum, weight sum, {name: sum}). They and the gradient are added up over the micro-batches
(and, by the compiler, over the devices) in float32 and divided once, so no cut of the batch can change what a token
weighs.
"""

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import sharding, trees
from jaxft.models import layers

log = logging.getLogger("jaxft")
Tree = Any
Batch = dict[str, jax.Array]
Loss = Callable[
  [Tree, Batch, jax.Array | None], tuple[jax.Array, jax.Array, dict[str, jax.Array]]
]  # (params, batch, key)

KEY = "threefry2x32"  # counter-based and partitionable: the same bits on any number of devices
ROUNDING = 0x726E6473  # folded into the run's key for the rounding of weights, where dropout has steps
RENAMED = dict(correct="accuracy")  # a sum that has another name once it is divided by the weight


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # i32[]: steps done, skipped ones too
  bad: jax.Array  # i32[]: non-finite steps in a row, up to the last one
  params: Tree  # what is trained
  frozen: Tree  # the other parameters: no gradient, no optimizer state
  opt: Tree  # state of the optimizer, float32
  rng: jax.Array  # u32[2]: data of the run's key; never advanced, folded with `step`


def whole(state: TrainState) -> Tree:
  """Returns all parameters of the state, trained and frozen, as one tree."""
  return trees.merge(state.params, state.frozen)


def make_train_step(
  loss_fn: Loss, tx: optax.GradientTransformation, schedule: Callable, micro: int, *, trainable: Tree, pins: Tree | None
) -> Callable:
  """Returns `step(state, batch) -> (state, metrics)`, pure, to be jitted by `jit_train_step`.

  `batch` has leaves [B, ...] with B a multiple of `micro`; micro-batch i takes rows i, i + micro, ..., so rows stay on
  their device. Its dropout key is folded from (seed, step, i). Metrics are float32 scalars: each sum over the weight
  (loss, nll, accuracy), weight, grad_norm (before clipping, of what is trained), param_norm (before the update),
  learning_rate, non_finite (0 or 1) and bad (such steps in a row). Where the loss or the gradient is not finite, only
  `step` and `bad` change. `pins` are the shardings of the trained parameters (None: one device); each micro-batch's
  gradient is reduced into them at once.
  """
  tx = optax.with_extra_args_support(tx)
  gradient = _make_gradient(loss_fn, micro, trainable, pins)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, totals = gradient(state, batch)
    weight = totals.pop("weight")
    per_weight = 1 / jnp.where(weight > 0, weight, 1)
    grads = jax.tree.map(lambda g: g * per_weight, grads)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(totals["loss"])

    updates, opt = tx.update(grads, state.opt, state.params, step=state.step)
    params = _moved(state, updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    bad = jnp.where(good, 0, state.bad + 1)
    metrics = {RENAMED.get(k, k): x * per_weight for k, x in totals.items()} | dict(
      weight=weight,
      grad_norm=norm,
      param_norm=optax.tree.norm(_to_f32(state.params)),
      learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
      non_finite=1 - good.astype(jnp.float32),
      bad=bad.astype(jnp.float32),
    )
    return state.replace(
      step=state.step + 1, bad=bad, params=keep(params, state.params), opt=keep(opt, state.opt)
    ), metrics

  return step


def _moved(state: TrainState, updates: Tree) -> Tree:
  """Returns the parameters plus the updates, added in float32; those in bfloat16 are rounded by a hash of run, step
  and place."""
  words, flat = layers.fold(layers.fold(state.rng, ROUNDING), state.step), trees.flatten(state.params)
  places = {path: i for i, path in enumerate(flat)}

  def one(path: str, p: jax.Array, u: jax.Array) -> jax.Array:
    x = p.astype(jnp.float32) + u
    return layers.rounded(x, layers.fold(words, places[path])) if p.dtype == jnp.bfloat16 else x.astype(p.dtype)

  return trees.map_with_path(one, state.params, updates)


def _make_gradient(loss_fn: Loss, micro: int, trainable: Tree, pins: Tree | None) -> Callable:
  """Returns `gradient(state, batch) -> (gradient, sums)`, both summed over all micro-batches in float32."""
  layers = {p: f for p, f in trees.flatten(trainable).items() if np.any(f) and not np.all(f)}

  def part(params, frozen, rows, key):
    def sums(p):
      loss, weight, more = loss_fn(trees.merge(_held(p, layers), frozen), rows, key)
      return loss, dict(more, loss=loss, weight=weight)

    grads, totals = jax.grad(sums, has_aux=True)(params)
    grads = _to_f32(grads)
    return (grads if pins is None else jax.lax.with_sharding_constraint(grads, pins)), _to_f32(totals)

  def gradient(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=KEY), state.step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(micro))
    if micro == 1:
      return part(state.params, state.frozen, batch, keys[0])

    def body(grads, xs):
      more, totals = part(state.params, state.frozen, *xs)
      return jax.tree.map(jnp.add, grads, more), totals

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params)
    grads, totals = jax.lax.scan(body, zeros, (_split_rows(batch, micro), keys))
    return grads, jax.tree.map(lambda x: jnp.sum(x, 0), totals)

  return gradient


def _held(params: Tree, layers: Mapping[str, np.ndarray]) -> Tree:
  """Returns `params` with a gradient of exactly zero in the frozen layers of stacked leaves."""
  if not layers:
    return params
  hold = lambda path, p: jnp.where(layers[path], p, jax.lax.stop_gradient(p)) if path in layers else p
  return trees.map_with_path(hold, params)


def _split_rows(batch: Batch, micro: int) -> Batch:
  """Returns leaves [micro, B / micro, ...]; splitting the other way round would move rows between devices."""
  split = lambda x: x.reshape(x.shape[0] // micro, micro, *x.shape[1:]).swapaxes(0, 1)
  return {k: sharding.pin(split(x), (None, "batch") + (None,) * (x.ndim - 1)) for k, x in batch.items()}


def _to_f32(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def make_eval_step(loss_fn: Loss) -> Callable:
  """Returns `step(params, batch) -> {"loss", "weight", ...}`: float32 sums without dropout, divided at the end."""

  def step(params: Tree, batch: Batch) -> dict[str, jax.Array]:
    loss, weight, more = loss_fn(params, batch, None)
    return _to_f32(dict(more, loss=loss, weight=weight))

  return step


def abstract_state(shapes: Tree, shardings: Tree, tx: optax.GradientTransformation, trainable: Tree) -> TrainState:
  """Returns a TrainState of ShapeDtypeStruct with shardings: what `init_state` makes, and what a checkpoint is restored
  into.

  `shapes` and `shardings` are those of all parameters. Moments of the optimizer live where their parameter lives.
  """
  mesh = next(iter(trees.flatten(shardings).values())).mesh
  places, names = trees.split_trainable(shardings, trainable), trees.split_trainable(shapes, trainable)
  opt = jax.eval_shape(tx.init, names[0])
  count = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(
    step=count, bad=count, params=names[0], frozen=names[1], opt=opt, rng=jax.ShapeDtypeStruct((2,), jnp.uint32)
  )
  one = sharding.replicated(mesh)
  where = TrainState(
    step=one, bad=one, params=places[0], frozen=places[1], opt=sharding.like(opt, names[0], places[0]), rng=one
  )
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def shardings_of(tree: Tree) -> Tree:
  """Returns the tree of the shardings of arrays or of ShapeDtypeStructs."""
  return jax.tree.map(lambda x: x.sharding, tree)


def init_params(init: Callable[[jax.Array], Tree], seed: int, shardings: Tree) -> Tree:
  """Returns fresh parameters, `init(key)`, each born with its sharding; the same `init` again compiles nothing."""
  places, tree = jax.tree.flatten(shardings)
  return _jit_init(init, tuple(places), tree)(_key_data(seed))


@functools.lru_cache(maxsize=2)
def _jit_init(init: Callable[[jax.Array], Tree], places: tuple, tree: Any) -> Callable:
  start = lambda key: init(jax.random.wrap_key_data(key, impl=KEY))
  return jax.jit(start, out_shardings=jax.tree.unflatten(tree, places))


def init_state(params: Tree, seed: int, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
  """Returns the state of step 0 around `params` (fresh or loaded, with their shardings); the optimizer's part is born
  sharded.

  The state holds the very arrays of `params`, so a step that donates it consumes them.
  """
  wrong = trees.differences(whole(abstract), params)
  assert not wrong, wrong
  flat = trees.flatten(params)
  part = lambda of: trees.map_with_path(lambda path, _: flat[path], of)
  trained, frozen = part(abstract.params), part(abstract.frozen)
  small = lambda x, like: jax.device_put(x, like.sharding)
  return TrainState(
    step=small(np.int32(0), abstract.step),
    bad=small(np.int32(0), abstract.bad),
    params=trained,
    frozen=frozen,
    opt=jax.jit(tx.init, out_shardings=shardings_of(abstract.opt))(trained),
    rng=small(_key_data(seed), abstract.rng),
  )


def _key_data(seed: int) -> np.ndarray:
  return np.asarray(jax.random.key_data(jax.random.key(seed, impl=KEY)))


# XLA:CPU copies parameters and statistics whole before the update writes over them, unless it looks more closely at who
# still reads them: a fifth of the memory of a step of GPT-2 (2 x 256 tokens), and up to an eighth of its time.
ON_CPU = dict(xla_cpu_copy_insertion_use_region_analysis=True)


def jit_train_step(
  step: Callable, mesh: Mesh, rules: sharding.Rules, abstract: TrainState, *, hyper: bool = False
) -> Callable:
  """Returns `step` compiled for the shardings of `abstract`; the state given to it is consumed (donated).

  With `hyper` it is step(state, batch, hyper), whose last argument is a dict of scalars; see `Bound`.
  """
  one, places = sharding.replicated(mesh), shardings_of(abstract)
  return jax.jit(
    pinned(step, mesh, rules),
    donate_argnums=0,
    in_shardings=(places, sharding.batch_sharding(mesh, rules), *((one,) if hyper else ())),
    out_shardings=(places, one),
    compiler_options=ON_CPU if mesh.devices.flat[0].platform == "cpu" else None,
  )


class Bound:
  """A jitted step(state, batch, hyper) together with its `hyper`, to be called, and lowered, as step(state, batch).

  The numbers are arguments of the program and not part of it: another learning rate compiles nothing. A batch of a
  shape that none had before is said, since it compiles the step anew.
  """

  def __init__(self, jitted: Callable, hyper: Mapping[str, float], mesh: Mesh):
    self.jitted = jitted
    self._hyper = {k: jax.device_put(np.float32(v), sharding.replicated(mesh)) for k, v in hyper.items()}
    self._seen: dict[tuple, dict[str, str]] = {}
    self._early: concurrent.futures.Future | None = None

  def prepare(self, state: TrainState, batch: Batch) -> None:
    """Compiles for these ShapeDtypeStructs, with their shardings, in a thread; the first call waits for it, and raises
    what it raised."""
    pool = concurrent.futures.ThreadPoolExecutor(1, "jaxft-compile")
    self._early = pool.submit(lambda: self.lower(state, batch).compile())
    pool.shutdown(wait=False)

  def _watch(self, batch: Batch) -> None:
    key = tuple((k, x.shape, x.dtype) for k, x in batch.items())
    if key in self._seen:
      return
    now = {k: f"{x.dtype}{list(x.shape)}" for k, x in sorted(batch.items())}
    if self._seen:
      before = list(self._seen.values())[-1]
      changed = [f"{k} was {before.get(k, 'not there')}, is {now.get(k, 'not there')}" for k in sorted({*before, *now})
                 if before.get(k) != now.get(k)]  # fmt: skip
      log.warning(
        "The step is compiled again (the %d. shape of a batch): %s. With data.buckets that happens once for each; "
        "otherwise something changes the shapes.",
        len(self._seen) + 1,
        "; ".join(changed[:4]),
      )
    self._seen[key] = now

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    self._watch(batch)
    if self._early is not None:
      self._early.result()  # what was compiled there is found by the call
      self._early = None
    return self.jitted(state, batch, self._hyper)

  def lower(self, state: TrainState, batch: Batch) -> Any:
    return self.jitted.lower(state, batch, self._hyper)


def jit_eval_step(step: Callable, mesh: Mesh, rules: sharding.Rules, shardings: Tree) -> Callable:
  """Returns `step(params, batch)` compiled for parameters with `shardings`; the sums are on every device."""
  return jax.jit(
    pinned(step, mesh, rules),
    in_shardings=(shardings, sharding.batch_sharding(mesh, rules)),
    out_shardings=sharding.replicated(mesh),
  )


def pinned(step: Callable, mesh: Mesh, rules: sharding.Rules) -> Callable:
  """Returns `step`, in which `sharding.pin` and what asks for the mesh work while it is traced."""

  def run(*args):  # the body runs when jax traces it, which is when `pin` is called
    with sharding.use(mesh, rules):
      return step(*args)

  return run
