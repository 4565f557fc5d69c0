"""The scores of attention: which keys a query sees, and softmax(q k + bias) v, whole or in blocks of queries.

Letters: B batch rows, T query length, S key length, N heads, G heads of keys and values, H head dimension, t queries of
a block.
"""

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxft import flops
from jaxft.models import layers
from jaxft.models.layers import MASKED, cap


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
    query = self.query if size == self.query.shape[1] else lax.dynamic_slice_in_dim(self.query, start, size, 1)
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


def attend(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask, rate: float, key: jax.Array | None, softcap: float = 0.0, start=0):
  """Returns softmax(q k + bias) v as [B, T, N, H]; scores are not scaled, softmax is in float32.

  `bias_NTS` is [1 or B, N, T, S] or None, `mask` a `Mask`, of whose queries these are those from `start` on, or bool
  [B, 1, T, S]; N / G heads of q share one of k and v (Ainslie et al. 2023). `softcap` c > 0 puts c tanh(score / c) for
  the score. A query without any key gets 0 and passes no gradient.

  The gradient is written by hand (Dao et al. 2022, appendix B.2): for it, one number a query is kept, the logarithm of
  the sum of its exponentials, and the scores are computed again. Autodiff would keep float32 [B, N, T, S] three times
  for each layer, and the masks.
  """
  how = rate if key is not None else 0.0, softcap
  out_BTNH = _attend(how, q_BTNH, k_BSGH, v_BSGH, bias_NTS, (mask, start), key)
  return jnp.where(jnp.any(_dense(mask, start, q_BTNH.shape[1]), -1)[:, 0, :, None, None], out_BTNH, 0)


def _dense(mask: Any, start: Any, size: int) -> jax.Array:
  return mask.dense(start, size) if isinstance(mask, Mask) else mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope(flops.ATTENTION)
def _attend(how, q, k, v, bias, mask, key):
  return _attend_forward(how, q, k, v, bias, mask, key)[0]


@jax.named_scope(flops.ATTENTION)
def _attend_forward(how, q, k, v, bias, mask, key):
  scores = _scores(q, k, bias, mask, how[1])[0]
  most = jnp.max(scores, -1, keepdims=True)
  e = jnp.exp(scores - most)
  total = jnp.sum(e, -1, keepdims=True)
  probs = layers.dropout((e / total).astype(v.dtype), how[0], key)
  out, log_total = (checkpoint_name(x, layers.KEPT) for x in (_to_queries(probs, v), most + jnp.log(total)))
  return out, (q, k, v, bias, mask, key, log_total)


@jax.named_scope(flops.ATTENTION)
def _attend_backward(how, kept, g):
  q, k, v, bias, mask, key, log_total = kept
  rate, softcap = how
  with jax.named_scope(flops.AGAIN):
    scores, raw = _scores(q, k, bias, mask, softcap)
  probs = jnp.exp(scores - log_total)
  of_v = _to_keys(layers.dropout(probs.astype(v.dtype), rate, key), g, v.shape)
  of_probs = layers.dropout(_product(g, v), rate, key)
  of_scores = probs * (of_probs - jnp.sum(probs * of_probs, -1, keepdims=True))
  of_bias = None
  if bias is not None:
    of_bias = jnp.sum(of_scores, 0, keepdims=True) if bias.shape[0] == 1 else of_scores
    of_bias = of_bias.astype(bias.dtype)
  if softcap:
    of_scores *= 1 - jnp.square(jnp.tanh(raw / softcap))
  of_scores = of_scores.astype(q.dtype)
  return _to_queries(of_scores, k), _to_keys(of_scores, q, k.shape), of_v, of_bias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q, k, bias, mask, softcap: float) -> tuple[jax.Array, jax.Array]:
  """Returns float32 [B, N, T, S]: the scores, MASKED where they do not count, and those before cap, bias and mask."""
  raw = _product(q, k)
  scores, mask = cap(raw, softcap), _dense(*mask, q.shape[1])
  return jnp.where(mask, scores if bias is None else scores + bias, MASKED), raw


def _product(q_BTNH: jax.Array, k_BSGH: jax.Array) -> jax.Array:
  """Returns float32 [B, N, T, S]: each query with each key of its group of heads."""
  B, T, N, H = q_BTNH.shape
  S, G = k_BSGH.shape[1:3]
  if G == N:
    return jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSGH, preferred_element_type=jnp.float32)
  q_BTGRH = q_BTNH.reshape(B, T, G, N // G, H)
  return jnp.einsum("btgrh,bsgh->bgrts", q_BTGRH, k_BSGH, preferred_element_type=jnp.float32).reshape(B, N, T, S)


def _to_queries(p_BNTS: jax.Array, x_BSGH: jax.Array) -> jax.Array:
  """Returns [B, T, N, H]: for each query, the sum of `x` over the keys, weighted with `p`."""
  B, N, T, S = p_BNTS.shape
  G, H = x_BSGH.shape[2:]
  if G == N:
    return jnp.einsum("bnts,bsnh->btnh", p_BNTS, x_BSGH)
  return jnp.einsum("bgrts,bsgh->btgrh", p_BNTS.reshape(B, G, N // G, T, S), x_BSGH).reshape(B, T, N, H)


def _to_keys(p_BNTS: jax.Array, x_BTNH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns [B, S, G, H] = `shape`: for each key, the sum of `x` over the queries of its heads, weighted with `p`."""
  B, N, T, S = p_BNTS.shape
  G, H = shape[2:]
  if G == N:
    return jnp.einsum("bnts,btnh->bsnh", p_BNTS, x_BTNH)
  p, x = p_BNTS.reshape(B, G, N // G, T, S), x_BTNH.reshape(B, T, G, N // G, H)
  return jnp.einsum("bgrts,btgrh->bsgh", p, x)


def in_blocks(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask: Mask, rate: float, key, softcap: float, t: int) -> jax.Array:
  """Returns `attend` with the scores of `t` queries at a time: memory grows with T and not with T S.

  Dropout draws other entries than `attend` does.
  """
  B, T, N, H = q_BTNH.shape
  n = math.ceil(T / t)
  pad = n * t - T
  q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
  whole = mask.replace(query=jnp.pad(mask.query, ((0, 0), (0, pad))))
  bias = None if bias_NTS is None else jnp.pad(bias_NTS, ((0, 0), (0, 0), (0, pad), (0, 0)))

  def block(i, q, k, v, bias):
    q = lax.dynamic_slice_in_dim(q, i * t, t, 1)
    part = None if bias is None else lax.dynamic_slice_in_dim(bias, i * t, t, 2)
    one = None if key is None else layers.fold(key, i)
    return attend(q, k, v, part, whole, rate, one, softcap, i * t)

  out = lax.map(lambda i: block(i, q, k_BSGH, v_BSGH, bias), jnp.arange(n))
  return out.swapaxes(0, 1).reshape(B, n * t, N, H)[:, :T]
