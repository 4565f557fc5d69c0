"""Cross-entropy over a vocabulary in tiles of tokens: the logits of all tokens are never there at once.

The gradient is made together with the loss, tile by tile, so no logit is computed twice; the backward pass only scales
it. Rows are compacted first: tokens without weight go to the end, and a tile without any weight is skipped, so that
padding, prompts and unmasked tokens cost nothing. Letters as in models/heads.py; t tokens of a row in a tile, n tiles.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import sharding
from jaxft.models import layers

Tree = Any
Sums = tuple[jax.Array, jax.Array, jax.Array]  # f32[]: loss, nll, correct, each times its weight
LANES = 128  # tiles are multiples of it where rows are long enough: matrix units like that


def tile(rows: int, length: int, vocab: int, axis: str | None, most: float) -> int:
  """Returns the tokens t of a row in a tile whose logits, f32[rows, t, vocab], take about `most` bytes of a device.

  0: those of all tokens fit. `rows` are those of all devices, `axis` the logical axis of the vocabulary.
  """
  token = 4.0 * rows / sharding.ways("batch") * vocab / sharding.ways(axis)
  if not most or token * length <= most:
    return 0
  t = max(int(most / token), 8)
  t = t // LANES * LANES if t >= LANES else t // 8 * 8
  return min(t, -(-length // 8) * 8)


def sums(model: Any, x_BTD: jax.Array, labels_BT, weights_BT, forward, backward, numbers: tuple, t: int) -> Sums:
  """Returns the sums of the head's cross-entropy with `t` tokens of each row at a time.

  `forward(logits, labels, *numbers)` gives ((loss, nll, correct), kept) a token, `backward(kept, (weights,))` the
  gradient of the logits; see losses.
  """
  axis = model.head.spec.axis
  names = ("head", "embed") if model.head.spec.tied else ("head",)
  parts = {n: layers.split(getattr(model, n)) for n in names}
  graphs, params = {n: p[0] for n, p in parts.items()}, {n: p[1] for n, p in parts.items()}

  def project(params: Tree, x_BtD: jax.Array) -> jax.Array:
    made = {n: layers.merge(graphs[n], params[n]) for n in names}
    return sharding.pin(made["head"](x_BtD, made.get("embed"), None), ("batch", "length", axis))

  ways = (project, forward, backward, t)
  return _sums(ways, params, x_BTD, labels_BT, weights_BT.astype(jnp.float32), numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(ways, params, x_BTD, labels_BT, weights_BT, numbers) -> Sums:
  return _run(ways, params, x_BTD, labels_BT, weights_BT, numbers, None)[0]


def _forward(ways, *given):
  """Gradients are made of what is differentiated and of nothing else: not of a frozen head, a third of its work."""
  moves = jax.tree.map(lambda x: x.perturbed, given[:2])
  return _run(ways, *jax.tree.map(lambda x: x.value, given), moves)


def _backward(ways, kept, cotangents):
  scale = lambda d: (d * cotangents[0]).astype(d.dtype)
  return *jax.tree.map(scale, kept), None, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(ways, params, x_BTD, labels_BT, weights_BT, numbers, moves):
  """Returns (sums, gradients of the loss by `params` and `x_BTD`): None where a flag in `moves`, (for params, for x),
  is False, and nothing without `moves`."""
  project, forward, backward, t = ways
  B, T, D = x_BTD.shape
  n = math.ceil(T / t)
  hidden_last = jnp.argsort(weights_BT == 0, axis=1, stable=True)
  fields = [_cut(_moved(x, hidden_last), n, t) for x in (x_BTD, labels_BT, weights_BT)]
  slopes = moves is not None
  flags, tree = jax.tree.flatten(moves[0] if slopes else jax.tree.map(lambda _: False, params))
  leaves = jax.tree.leaves(params)
  pick = lambda values, flag: [x for x, f in zip(values, flags) if f == flag]
  still = pick(leaves, False)

  def spread(trained: list, others: list) -> Tree:
    sides = {True: iter(trained), False: iter(others)}
    return jax.tree.unflatten(tree, [next(sides[f]) for f in flags])

  def tokens(x, labels, weights):
    given = lambda trained, x: project(spread(trained, still), x)
    if slopes and moves[1]:
      logits, pull = jax.vjp(given, pick(leaves, True), x)
    elif slopes:
      logits, pull = jax.vjp(lambda trained: given(trained, x), pick(leaves, True))
    else:
      logits, pull = given([], x), None
    values, kept = forward(logits, labels, *numbers)
    total = tuple(jnp.sum(jnp.where(weights != 0, v * weights, 0)) for v in values)
    if not slopes:
      return total, [], ()
    of_params, *of_x = pull(backward(kept, (weights,))[0])
    return total, [d.astype(jnp.float32) for d in of_params], tuple(of_x)

  def body(carry, fields):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tokens, *fields))
    total, of_params, of_x = jax.lax.cond(jnp.any(fields[2] != 0), tokens, lambda *_: zeros, *fields)
    return jax.tree.map(jnp.add, carry, (total, of_params)), of_x

  first = (jnp.zeros(()),) * 3, [jnp.zeros(p.shape, jnp.float32) for p in pick(leaves, True)]
  (total, of_params), of_x = jax.lax.scan(body, first, fields)
  if not slopes:
    return total, ()
  back = lambda d: _moved(d.swapaxes(0, 1).reshape(B, n * t, D)[:, :T], jnp.argsort(hidden_last, axis=1))
  of_params = [d.astype(p.dtype) for d, p in zip(of_params, pick(leaves, True))]
  return total, (spread(of_params, [None] * len(still)), back(*of_x) if of_x else None)


def _moved(x: jax.Array, order_BT: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x, order_BT.reshape(*order_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def _cut(x: jax.Array, n: int, t: int) -> jax.Array:
  """Returns [n, B, t, ...] of [B, T, ...], filled up with zeros."""
  x = jnp.pad(x, [(0, 0), (0, n * t - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], n, t, *x.shape[2:]).swapaxes(0, 1)
