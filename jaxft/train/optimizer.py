"""Optimizers out of Optax's parts, learning-rate schedules, and the rules that vary them by parameter.

The order is the same for all: clip the global norm, the algorithm, weight decay, learning rate. Decay is times the
learning rate (as in AdamW) whatever the algorithm. A leaf that stacks L layers is treated as L leaves: stacking changes
no number.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import trees
from jaxft.errors import InputError, did_you_mean
from jaxft.train import eightbit

Tree = Any
Schedule = Callable[[jax.Array | int], jax.Array]

NAMES = ("adamw", "adamw_8bit", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "linear", "constant", "rsqrt", "wsd")


def make_schedule(*, lr: float, schedule: str, warmup: float, cooldown: float, end: float, steps: int) -> Schedule:
  """Returns lr(step) for steps 0 ... `steps` - 1, float32, a function of the step alone.

  Warm-up is linear over `warmup` steps (below 1: that share of `steps`), lr * (step + 1) / warmup: no step is lost to a
  rate of zero, and the last of them has `lr`. With p the share of the steps after it that are done: linear falls to
  `end` * lr, cosine too along half a cosine; rsqrt is lr * sqrt(warmup / (step + 1)) (T5, arXiv 1910.10683 section
  3.1.2); wsd stays at lr, then falls linearly to zero over the last `cooldown` share of all steps (MiniCPM, arXiv
  2404.06395). `lr` may be a traced scalar, of which nobody checks that it is not negative.
  """
  if schedule not in SCHEDULES:
    raise InputError(
      f"optimizer.schedule is {schedule!r}; there are {', '.join(SCHEDULES)}{did_you_mean(schedule, SCHEDULES)}."
    )
  if _negative(lr) or warmup < 0 or steps < 1 or not 0 <= end <= 1 or not 0 <= cooldown <= 1:
    raise InputError(
      f"optimizer: lr={lr}, warmup={warmup}, end={end}, cooldown={cooldown} over {steps} steps: lr and warmup must not "
      "be negative, steps at least 1, end and cooldown (shares) between 0 and 1."
    )
  if warmup >= 1 and warmup != int(warmup):
    raise InputError(f"optimizer.warmup is {warmup}: a number of steps is whole, a share of the steps is below 1.")
  rise = int(warmup) if warmup >= 1 else round(warmup * steps)
  fall = steps - round(cooldown * steps)  # first step of the cooldown
  if rise and rise >= steps:
    raise InputError(
      f"optimizer.warmup is {rise} steps, but the run has only {steps}: it would never reach its learning rate. Lower "
      "warmup (below 1 it is a share of the steps) or raise steps."
    )
  if schedule == "rsqrt" and not rise:
    raise InputError("optimizer.schedule rsqrt falls from the end of the warm-up: set optimizer.warmup above 0.")
  if schedule == "wsd" and rise > fall:
    raise InputError(
      f"optimizer.schedule wsd: warm-up of {rise} and cooldown of {steps - fall} steps do not fit into {steps} steps."
    )

  def rate(step):
    t = jnp.asarray(step, jnp.float32)
    done = jnp.clip((t - rise) / max(steps - rise, 1), 0, 1)
    factor = dict(
      constant=lambda: jnp.float32(1),
      linear=lambda: 1 - (1 - end) * done,
      cosine=lambda: end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
      rsqrt=lambda: jnp.sqrt(rise / jnp.maximum(t + 1, rise)),
      wsd=lambda: jnp.clip((steps - t) / max(steps - fall, 1), 0, 1),
    )[schedule]()
    return lr * (jnp.where(t < rise, (t + 1) / rise, factor) if rise else factor)

  return rate


def make(
  *,
  name: str,
  lr: float,
  schedule: str,
  warmup: float,
  cooldown: float,
  end: float,
  clip: float,
  b1: float,
  b2: float,
  eps: float,
  decay: float,
  decay_rules: trees.Rules,
  lr_rules: trees.Rules,
  layer_decay: float,
  toward_init: float,
  unfreeze: trees.Rules,
  steps: int,
  shapes: Tree,
  axes: Tree,
  trainable: Tree,
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
  """Returns (transformation, schedule) for the trained part of the parameters.

  `shapes` and `axes` describe all parameters; `trainable` is the tree of `trees.trainable`: only its leaves with a True
  are given to the transformation, and layers with False inside of them come out unchanged bit by bit. `update(grads,
  state, params, step=i32[])` wants the number of the step, because the learning rate follows from it and not from the
  state, and gives float32 updates to be added in float32; statistics are float32, or codes, whatever those are.

  `name`: see `_algorithm`. `layer_decay` times the learning rate for each layer further from the head (Clark et al.
  2020, appendix B); it comes on top of `lr_rules`. `toward_init` pulls the weights to where they started (L2-SP, Li et
  al. 2018, section 3.2), as decay does to zero; the state then holds a copy of them. `unfreeze` gives the step (below
  1: the share of `steps`) from which parameters move (gradual unfreezing, Howard and Ruder 2018, section 3.3): before
  it their gradient counts for the statistics of the optimizer and for the global norm, and the update is dropped.

  `lr`, `decay`, `b1`, `b2` and `eps` may be traced scalars: then they are not checked, and a decay of 0 is a decay like
  any other. The state is the same whether they are.
  """
  if name not in NAMES:
    raise InputError(f"optimizer.name is {name!r}; there are {', '.join(NAMES)}{did_you_mean(name, NAMES)}.")
  _check(clip=clip, decay=decay, toward_init=toward_init, layer_decay=layer_decay)
  flags = {p: f for p, f in trees.flatten(trainable).items() if np.any(f)}
  flat_shapes, flat_axes = trees.flatten(shapes), trees.flatten(axes)
  leaves = {p: _leaf(flat_shapes[p].shape, flat_axes[p]) for p in flags}
  times_lr = _rates(lr_rules, layer_decay, shapes, axes)
  starts = _starts(unfreeze, steps, shapes, axes)
  times_decay = trees.flatten(trees.by_rules(decay_rules, shapes, axes, name="optimizer.decay_rules"))
  rate = make_schedule(lr=lr, schedule=schedule, warmup=warmup, cooldown=cooldown, end=end, steps=steps)
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  parts += [_algorithm(name, leaves, b1, b2, eps)]
  if toward_init:
    parts += [_toward_init(toward_init)]
  if _traced(decay) or decay:
    parts += [_stateless(lambda u, p, step, path: u + p * _times(decay, times_decay[path]))]
  parts += [_stateless(lambda u, p, step, path: u * (-rate(step) * _f32(times_lr[path])))]
  if starts:
    parts += [_stateless(lambda u, p, step, path: _where(step >= starts[path], u))]
  parts += [_stateless(lambda u, p, step, path: u if np.all(flags[path]) else _where(flags[path], u))]
  return _in_float32(optax.chain(*parts)), rate


def _check(*, layer_decay: float, **others: Any) -> None:
  wrong = [f"{k}={v}" for k, v in others.items() if _negative(v)]
  if wrong or not 0 < layer_decay <= 1:
    raise InputError(
      f"optimizer: {', '.join(wrong) or 'all else'} must not be negative (0 switches off), layer_decay={layer_decay} "
      "must be above 0 and at most 1 (off)."
    )


def _rates(lr_rules: trees.Rules, layer_decay: float, shapes: Tree, axes: Tree) -> dict[str, Any]:
  """Returns {path: what the learning rate is times}."""
  times = trees.flatten(trees.by_rules(lr_rules, shapes, axes, name="optimizer.lr_rules", all_used=True))
  if layer_decay == 1:
    return times
  sizes, flat = trees.flatten(shapes), trees.flatten(axes)
  return {p: x * by_depth(p, sizes[p].shape, flat[p], layer_decay, sizes) for p, x in times.items()}


def _where(moves: Any, u: jax.Array) -> jax.Array:
  """Returns the update where the parameter `moves`, else -0.0: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0,
  which would flip a sign bit in a frozen layer.
  """
  return jnp.where(moves, u, jnp.float32(-0.0))


def by_depth(path: str, shape: tuple, axes: tuple, decay: float, shapes: dict) -> Any:
  """Returns `decay` to the power of how far a parameter is from the head of its model: a number, or [L, 1, ...].

  With L layers in its stack, the head and the final norm have 0, layer i has L - i, what stands before has L + 1.
  """
  if trees.is_stacked(axes):
    distance = shape[0] - np.arange(shape[0])
    return (decay**distance).reshape(-1, *[1] * (len(shape) - 1))
  side, *rest = path.split("/")
  if side not in ("embed", "encoder", "decoder") or (rest and rest[0] in ("final_norm", "project_back")):
    return 1.0
  depths = [x.shape[0] for p, x in shapes.items() if "/layers/" in p and p.startswith(side if rest[1:] else "")]
  return decay ** (max(depths) + 1)


def _starts(unfreeze: trees.Rules, steps: int, shapes: Tree, axes: Tree) -> dict[str, Any]:
  """Returns {path: first step in which it moves (a number, or a vector for stacked layers)}, {} without rules."""
  if not unfreeze:
    return {}
  wrong = [pair for pair in unfreeze if not isinstance(pair[-1], (int, float)) or pair[-1] < 0 or pair[-1] >= steps]
  if wrong:
    raise InputError(
      f"unfreeze: {wrong[0]!r} is not a pair of a pattern and a step of the {steps}, or below 1 a share of them."
    )
  found = trees.by_rules((*unfreeze, (".*", 0)), shapes, axes, name="unfreeze")
  step = lambda x: np.where(x < 1, np.round(np.asarray(x) * steps), x).astype(np.int32)
  return {path: step(x) for path, x in trees.flatten(found).items()}


def _toward_init(share: float) -> optax.GradientTransformationExtraArgs:
  def update(updates, state, params=None, **_):
    return jax.tree.map(lambda u, p, first: u + np.float32(share) * (p - first), updates, params, state), state

  copy = lambda params: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
  return optax.GradientTransformationExtraArgs(copy, update)


def _algorithm(name: str, leaves: dict, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Returns what turns gradients into updates.

  adamw (arXiv 1711.05101); adamw_8bit: the same with moments of a byte, `eightbit.scale_by_adam_8bit`; lion (arXiv
  2302.06675); adafactor (arXiv 1804.04235) as T5X has it: no momentum, decay exponent 0.8, updates clipped to an RMS of
  1 and scaled by the RMS of their parameter; it reads no b1, b2, eps. muon: matrices of the layers (kernels with an
  "embed" axis, heads joined, and adapters) by Newton-Schulz with momentum b1, scaled by 0.2 sqrt(max(fan in, fan out))
  so that AdamW's learning rates fit (arXiv 2502.16982 section 2.2); embeddings, heads of the vocabulary, norms and
  biases by AdamW.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if name == "lion":
    return optax.scale_by_lion(b1=b1, b2=b2)
  if name == "adamw_8bit":
    return eightbit.scale_by_adam_8bit(b1, b2, eps, {path: leaf.depth for path, leaf in leaves.items()})
  return dict(adamw=lambda: adam, adafactor=lambda: _adafactor(leaves), muon=lambda: _muon(leaves, b1, adam))[name]()


class _Leaf(NamedTuple):
  depth: int  # stacked layers; 0: not stacked
  rows: int  # axes of the input side of a matrix, after the stacked one; 0: not a matrix
  matrix: bool  # a matrix of a layer: what Muon orthogonalises


def _leaf(shape: tuple, axes: tuple) -> _Leaf:
  stacked = trees.is_stacked(axes)
  own = tuple(axes[1:] if stacked else axes)
  rows = 0 if len(own) < 2 else (1 if len(own) == 2 or own[0] in ("embed", "rank") else len(own) - 1)
  inner = bool({"embed", "rank"} & set(own)) and not {"vocab", "positions", "labels"} & set(own)
  return _Leaf(shape[0] if stacked else 0, rows, bool(rows) and inner)


def _f32(x: Any) -> Any:
  return np.float32(x) if np.ndim(x) == 0 else np.asarray(x, np.float32)


def _traced(x: Any) -> bool:
  return isinstance(x, jax.Array)


def _negative(x: Any) -> bool:
  """Says whether `x` is known to be negative, which nothing traced is."""
  return not _traced(x) and x < 0


def _times(x: Any, factor: Any) -> Any:
  return x * _f32(factor) if _traced(x) else _f32(x * factor)


def _stateless(fn: Callable) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation u -> fn(u, parameter, step, path), leaf by leaf."""

  def update(updates, state, params=None, *, step, **_):
    return trees.map_with_path(lambda path, u, p: fn(u, p, step, path), updates, params), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _in_float32(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  return optax.GradientTransformationExtraArgs(
    lambda params: tx.init(cast(params)),
    lambda u, state, params, **extra: tx.update(cast(u), state, cast(params), **extra),
  )


def _grouped(members: dict[str, optax.GradientTransformation], group: dict[str, str]) -> optax.GradientTransformation:
  """Returns the transformation that gives each leaf to the member that `group` names for its path.

  As optax.partition, but members see a tree with their own leaves and nothing else, so their state has no masked nodes.
  """

  def cut(tree):
    flat = trees.flatten(tree)
    return {g: trees.unflatten({p: x for p, x in flat.items() if group[p] == g}) for g in members}

  def update(updates, state, params):
    u, p, out, new = cut(updates), cut(params), {}, {}
    for g, tx in members.items():
      done, new[g] = tx.update(u[g], state[g], p[g])
      out.update(trees.flatten(done))
    return trees.unflatten(out), new

  return optax.GradientTransformation(
    lambda params: {g: tx.init(part) for (g, tx), part in zip(members.items(), cut(params).values())}, update
  )


def _muon(leaves: dict[str, _Leaf], b1: float, adam: optax.GradientTransformation) -> optax.GradientTransformation:
  def numbers(path):
    leaf = leaves[path]
    first, width = bool(leaf.depth), leaf.rows
    return lambda ndim: optax.contrib.MuonDimensionNumbers(
      tuple(range(first, first + width)), tuple(range(first + width, ndim))
    )

  dims = lambda tree: trees.map_with_path(lambda path, x: numbers(path)(x.ndim), tree)

  def scaled(path, u):
    axes = numbers(path)(u.ndim)
    sides = [math.prod(u.shape[a] for a in side) for side in axes]
    return u * np.float32(0.2 * math.sqrt(max(sides)))

  matrix = optax.chain(
    optax.contrib.scale_by_muon(beta=b1, weight_dimension_numbers=dims),
    optax.stateless(lambda updates, params: trees.map_with_path(scaled, updates)),
  )
  group = {path: "matrix" if leaf.matrix else "other" for path, leaf in leaves.items()}
  members = dict(matrix=matrix, other=adam)
  return _grouped({g: tx for g, tx in members.items() if g in group.values()}, group)


def _adafactor(leaves: dict[str, _Leaf]) -> optax.GradientTransformation:
  """Returns Adafactor on matrices as the original sees them: one a layer, heads joined with their width."""
  one = optax.chain(
    optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
  )
  layers = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
  # one vmap needs one depth: the encoder's and the decoder's may differ
  group = {path: f"depth{leaf.depth}" for path, leaf in leaves.items()}
  grouped = _grouped({g: one if g == "depth0" else layers for g in sorted(set(group.values()))}, group)

  def joined(path, x):
    first, width = bool(leaves[path].depth), leaves[path].rows
    own = x.shape[first:]
    return x.reshape(*x.shape[:first], math.prod(own[:width]), math.prod(own[width:])) if len(own) > 2 else x

  def update(updates, state, params):
    out, state = grouped.update(trees.map_with_path(joined, updates), state, trees.map_with_path(joined, params))
    return jax.tree.map(lambda u, x: u.reshape(x.shape), out, updates), state

  return optax.GradientTransformation(lambda params: grouped.init(trees.map_with_path(joined, params)), update)
