"""The scores of attention: which keys a query sees, and softmax(q k + bias) v, whole or in blocks of queries.

Letters: B batch rows, T query length, S key length, N heads, G heads of keys and values, H head dimension, t queries of
a block.
"""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax import lax

from jaxft.models import layers

MASKED = -1e30  # added to scores that must not count: exp() of it is exactly 0 in float32, and no sum with it overflows


@flax.struct.dataclass
class Mask:
  """Which keys a query sees, as numbers from which each way to attend makes what it needs.

  Those of its own segment (0, padding, sees nothing and is seen by nothing), with `causal` none after it save where
  `prefix` is not 0, with `window` only near ones, see `window_mask`.
  """

  query: jax.Array  # i32[B, T], segments
  key: jax.Array  # i32[B, S]
  prefix: jax.Array | None = None  # i32[B, S]
  window: Any = None  # int, or i32[] where it differs by layer
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def dense(self, start: int | jax.Array = 0, size: int = 0) -> jax.Array:
    """Returns bool [B, 1, t, S] for the queries [start, start + size), by default all."""
    size = size or self.query.shape[1]
    query = lax.dynamic_slice_in_dim(self.query, start, size, 1)
    mask = (query[:, :, None] == self.key[:, None, :]) & (self.key[:, None, :] > 0)
    distance = (jnp.arange(size) + start)[:, None] - jnp.arange(self.key.shape[1])[None, :]
    if self.causal:
      seen = distance >= 0
      mask &= seen if self.prefix is None else seen | (self.prefix[:, None, :] != 0)
    if self.window is not None:
      mask &= distance < self.window if self.causal else jnp.abs(distance) <= self.window
    return mask[:, None]

  def sees(self) -> jax.Array:
    """Returns bool [B, T]: whether a query sees any key at all."""
    if self.query is self.key:  # itself, then
      return self.query > 0
    return jnp.any(self.dense(), -1)[:, 0]


def attend(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask_BTS, rate: float, key: jax.Array | None, softcap: float = 0.0):
  """Returns softmax(q k + bias) v as [B, T, N, H]; scores are not scaled, softmax is in float32.

  `bias_NTS` is [1, N, T, S] or None, `mask_BTS` bool [B, 1, T, S]; N / G heads of q share one of k and v (Ainslie et
  al. 2023). `softcap` c > 0 puts c tanh(score / c) for the score. A query without any key gets 0 and passes no
  gradient.
  """
  B, T, N, H = q_BTNH.shape
  G, S = k_BSGH.shape[2], k_BSGH.shape[1]
  if G == N:
    scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSGH, preferred_element_type=jnp.float32)
  else:
    q_BTGRH = q_BTNH.reshape(B, T, G, N // G, H)
    scores = jnp.einsum("btgrh,bsgh->bgrts", q_BTGRH, k_BSGH, preferred_element_type=jnp.float32).reshape(B, N, T, S)
  scores = cap(scores, softcap)
  if bias_NTS is not None:
    scores += bias_NTS
  probs = jax.nn.softmax(jnp.where(mask_BTS, scores, MASKED), axis=-1)
  probs = layers.dropout(probs.astype(v_BSGH.dtype), rate, key)
  if G == N:
    out_BTNH = jnp.einsum("bnts,bsnh->btnh", probs, v_BSGH)
  else:
    out_BTNH = jnp.einsum("bgrts,bsgh->btgrh", probs.reshape(B, G, N // G, T, S), v_BSGH).reshape(B, T, N, H)
  return jnp.where(jnp.any(mask_BTS, -1)[:, 0, :, None, None], out_BTNH, 0)


def cap(x: jax.Array, softcap: float) -> jax.Array:
  """Returns c tanh(x / c) for c = `softcap` (Gemma 2, section 2), `x` itself where it is 0."""
  return softcap * jnp.tanh(x / softcap) if softcap else x


def in_blocks(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask: Mask, rate: float, key, softcap: float, t: int) -> jax.Array:
  """Returns `attend` with the scores of `t` queries at a time, which the backward pass computes again: memory grows
  with T and not with T S. Dropout draws other entries than `attend` does.
  """
  B, T, N, H = q_BTNH.shape
  n = math.ceil(T / t)
  pad = n * t - T
  q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
  whole = mask.replace(query=jnp.pad(mask.query, ((0, 0), (0, pad))))
  bias = None if bias_NTS is None else jnp.pad(bias_NTS, ((0, 0), (0, 0), (0, pad), (0, 0)))

  @jax.checkpoint
  def block(i, q, k, v, bias):
    q = lax.dynamic_slice_in_dim(q, i * t, t, 1)
    part = None if bias is None else lax.dynamic_slice_in_dim(bias, i * t, t, 2)
    one = None if key is None else layers.fold(key, i)
    return attend(q, k, v, part, whole.dense(i * t, t), rate, one, softcap)

  out = lax.map(lambda i: block(i, q, k_BSGH, v_BSGH, bias), jnp.arange(n))
  return out.swapaxes(0, 1).reshape(B, n * t, N, H)[:, :T]
