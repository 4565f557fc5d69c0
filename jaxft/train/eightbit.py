"""Adam's moments in a byte each: codes on a logarithmic scale below a bound of their row, rounded stochastically.

As the 8-bit optimizers of Dettmers et al. 2021, but simpler, for logarithms allow it: code c of n levels, k an octave,
stands for top 2^((c - n) / k), and 0 for 0, where the top is one float32 of all entries along the last axis. What a
step does is computed from the moments before they are coded, so that one rounding lies between two steps.

The top is a moment of its own, of the row's largest |g| or g^2, which is never below the largest moment. On such a
scale a bound that is high, or that of a long row, costs range (there are 15.9 and 31.9 octaves of it) and no precision.
The largest moment itself would have to be known before one is coded: both of a [8, 4096, 14336] matrix were then
written out in float32, 3.5 GiB on an H100 by its compiler; so were they with blocks of 128 on a TPU, whose tiles do not
fit them. As it is, the update is one pass without temporaries, and moves 0.71 of the bytes of AdamW's.

Rounding is between the two levels beside a value, by chance and right in the mean. To the nearest would not do: with
b2 = 0.999 a second moment moves by at most a thousandth of itself as it falls, levels are 9 % apart, and it would stand
still for ever. The chance comes from a hash of the place and the step: the same on any mesh and after a restart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import trees
from jaxft.models import layers

Tree = Any

FEWEST = 4096  # entries of a leaf below which a moment stays float32, as in bitsandbytes
LEVELS = dict(mu=127, nu=255)
OCTAVE = 8  # levels of one
WORDS = np.array([0x6A09E667, 0xBB67AE85], np.uint32)  # of the hash


class State(NamedTuple):
  count: jax.Array  # i32[]
  mu: Tree  # int8, the shape of the parameter: sign and level
  nu: Tree  # uint8
  mu_top: Tree  # float32, that shape without the last axis
  nu_top: Tree


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Returns Adam (arXiv 1412.6980) with coded moments, for float32 gradients; `b1`, `b2`, `eps` may be traced."""

  def init(params: Tree) -> State:
    new = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
    top = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape[:-1]), params)
    return State(jnp.zeros([], jnp.int32), new(jnp.int8), new(jnp.uint8), top(), top())

  def update(grads: Tree, state: State, params: Tree | None = None) -> tuple[Tree, State]:
    count = optax.safe_increment(state.count)
    words = layers.fold(jnp.asarray(WORDS), count)
    right1, right2 = (1 - jnp.asarray(b, jnp.float32) ** count for b in (b1, b2))
    flat = [trees.flatten(x) for x in (grads, *state[1:])]
    out: list[dict] = [{} for _ in range(5)]
    for i, (path, g) in enumerate(flat[0].items()):
      mu, nu, mu_top, nu_top = (x[path] for x in flat[1:])
      largest = jnp.max(jnp.abs(g), -1)
      mu_next, nu_next = b1 * mu_top + (1 - b1) * largest, b2 * nu_top + (1 - b2) * jnp.square(largest)
      m = b1 * decode(mu, mu_top, "mu") + (1 - b1) * g
      v = b2 * decode(nu, nu_top, "nu") + (1 - b2) * jnp.square(g)
      chance = layers.hash_bits(layers.fold(words, i), g.shape)
      step = (m / right1) / (jnp.sqrt(v / right2) + eps)
      codes = encode(m, mu_next, chance & 0xFFFF, "mu"), encode(v, nu_next, chance >> 16, "nu")
      for o, x in zip(out, (step, *codes, mu_next, nu_next)):
        o[path] = x
    step, *moments = (trees.unflatten(o) for o in out)
    return step, State(count, *moments)

  return optax.GradientTransformation(init, update)


def decode(codes: jax.Array, top: jax.Array, kind: str) -> jax.Array:
  """Returns float32 [..., n] of codes [..., n] and tops [...] of the moment `kind` of LEVELS."""
  level = jnp.abs(codes.astype(jnp.float32))
  return jnp.sign(codes.astype(jnp.float32)) * top[..., None] * _share(level, LEVELS[kind])


def _share(level: jax.Array, levels: int) -> jax.Array:
  """Returns what a level is of its top."""
  return jnp.where(level > 0, jnp.exp2((level - levels) * (1 / OCTAVE)), 0.0)


def encode(x: jax.Array, top: jax.Array, chance: jax.Array, kind: str) -> jax.Array:
  """Returns the codes of a moment, float32 [..., n], none of which is above its `top` [...]; `chance` is uniform in
  [0, 65536), uint32 [..., n].

  A second moment above 0 never becomes 0, for it is divided by: below the lowest level it is put on that.
  """
  levels = LEVELS[kind]
  share = jnp.abs(x) / jnp.where(top > 0, top, 1)[..., None]
  low = jnp.clip(jnp.floor(levels + OCTAVE * jnp.log2(jnp.maximum(share, jnp.float32(2**-60)))), 0, levels - 1)
  under, over = _share(low, levels), _share(low + 1, levels)
  level = low + (chance.astype(jnp.float32) * jnp.float32(2**-16) < (share - under) / (over - under))
  if kind == "nu":
    return jnp.where(share > 0, jnp.maximum(level, 1), 0).astype(jnp.uint8)
  return (jnp.sign(x) * level).astype(jnp.int8)
