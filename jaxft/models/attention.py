"""Attention with an additive bias and segment masks, T5's relative position bias, and the key-value cache of decoding.

Letters: B batch rows, T query length, S key length, D width, N heads, H head dimension, K beams, L layers, M cache
length.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxft import sharding
from jaxft.models import layers

MASKED = -1e30  # added to scores that must not count: exp() of it is exactly 0 in float32, and no sum with it overflows


def segment_mask(query_BT: jax.Array, key_BS: jax.Array, causal: bool) -> jax.Array:
  """Returns bool [B, 1, T, S]: same segment, not padding (segment 0), and with `causal` no key after the query."""
  mask = (query_BT[:, :, None] == key_BS[:, None, :]) & (key_BS[:, None, :] > 0)
  if causal:
    mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))
  return mask[:, None]


def attend(q_BTNH, k_BSNH, v_BSNH, bias_NTS, mask_BTS, rate: float, key: jax.Array | None) -> jax.Array:
  """Returns softmax(q k + bias) v as [B, T, N, H]; scores are not scaled, softmax is in float32.

  `bias_NTS` is [1, N, T, S] or None, `mask_BTS` bool [B, 1, T, S]. A query without any key gets 0 and passes no
  gradient.
  """
  scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
  if bias_NTS is not None:
    scores += bias_NTS
  probs = jax.nn.softmax(jnp.where(mask_BTS, scores, MASKED), axis=-1)
  probs = layers.dropout(probs.astype(v_BSNH.dtype), rate, key)
  out_BTNH = jnp.einsum("bnts,bsnh->btnh", probs, v_BSNH)
  return jnp.where(jnp.any(mask_BTS, -1)[:, 0, :, None, None], out_BTNH, 0)


def buckets(distance: np.ndarray, *, bidirectional: bool, number: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each `distance` (key position minus query position), int32 in [0, number).

  Half of the buckets (of a direction) are single distances, the others grow as logarithms up to `max_distance` (Raffel
  et al. 2020, section 2.1; Mesh TensorFlow's order of float32 operations, on which the borders between buckets depend).
  """
  out = np.zeros(distance.shape, np.int32)
  if bidirectional:
    number //= 2
    out += (distance > 0).astype(np.int32) * number
    distance = np.abs(distance)
  else:
    distance = -np.minimum(distance, 0)
  exact = number // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio /= np.float32(math.log(max_distance / exact))
  far = np.minimum(exact + (ratio * np.float32(number - exact)).astype(np.int32), number - 1)
  return out + np.where(distance < exact, distance, far).astype(np.int32)


class RelativeBias(nnx.Module):
  """A learned score for each (bucket of distance, head), shared by the layers of a stack."""

  def __init__(self, number: int, heads: int, max_distance: int, bidirectional: bool, std: float, *, params_dtype):
    self.embedding = layers.param((number, heads), (None, "heads"), params_dtype, std=std)
    self.number, self.max_distance, self.bidirectional = number, max_distance, bidirectional

  def of(self, distance: np.ndarray) -> jax.Array:
    """Returns float32 [len(distance), N]; the buckets are computed on the host, so every backend has the same."""
    index = buckets(distance, bidirectional=self.bidirectional, number=self.number, max_distance=self.max_distance)
    one_hot = jnp.asarray(index[:, None] == np.arange(self.number), jnp.float32)
    return jnp.einsum("xb,bn->xn", one_hot, self.embedding[...].astype(jnp.float32), precision=lax.Precision.HIGHEST)

  def __call__(self, t: int, s: int) -> jax.Array:
    """Returns float32 [1, N, T, S] for queries 0..t-1 and keys 0..s-1.

    Packed rows use the same numbers: inside a segment a difference of places is a difference of positions. The t + s -
    1 distances are laid out as a Toeplitz matrix by pad and reshape, because the gradient of a gather would be a
    scatter-add of t * s entries into a few buckets, slow everywhere and not reproducible on a GPU.
    """
    line = self.of(np.arange(-(t - 1), s)).T  # [N, t + s - 1]; entry x is distance x - (t - 1)
    n, width = line.shape
    rows = jnp.broadcast_to(jnp.pad(line, ((0, 0), (0, 1)))[:, None], (n, t, width + 1)).reshape(n, t * (width + 1))
    # row i starts i places earlier: its entry x is distance x - i - (t - 1)
    skewed = rows[:, : t * width].reshape(n, t, width)
    return sharding.pin(skewed[:, :, t - 1 :][None, :, :, :s], (None, "heads", None, None))


class Attention(nnx.Module):
  """Multi-head attention without biases on its projections; `stds` are those of q, k, v and o."""

  def __init__(self, width: int, heads: int, head_dim: int, stds: tuple, rate: float, *, dtype, params_dtype):
    dtypes = dict(dtype=dtype, params_dtype=params_dtype)
    for name, std in zip("qkv", stds):
      shape, axes = (width, heads, head_dim), ("embed", "heads", "head_dim")
      setattr(self, name, layers.Einsum("btd,dnh->btnh", shape, axes, std, **dtypes))
    self.o = layers.Einsum("btnh,nhd->btd", (heads, head_dim, width), ("heads", "head_dim", "embed"), stds[3], **dtypes)
    self.rate = rate

  def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns k and v, each [B, S, N, H]."""
    axes = ("batch", "length", "heads", None)
    return sharding.pin(self.k(x_BSD), axes), sharding.pin(self.v(x_BSD), axes)

  def __call__(self, x_BTD, keys_values, bias, mask, key=None) -> jax.Array:
    q_BTNH = sharding.pin(self.q(x_BTD), ("batch", "length", "heads", None))
    return self.o(attend(q_BTNH, *keys_values, bias, mask, self.rate, key))

  def step(self, x_BKD, cache: tuple[jax.Array, jax.Array], layer, index, bias_KM) -> tuple[jax.Array, tuple]:
    """Returns [B, K, D] for one new token of every beam, and the cache with its key and value written at `index`.

    `cache` holds k and v of all layers, [L, B, K, M, N, H]: it stays whole in the loop's carry, so that XLA updates it
    in place. `bias_KM` is [1, N, 1, M].
    """
    new = [x[None, :, :, None] for x in self.keys_values(x_BKD)]  # [1, B, K, 1, N, H]
    place = (layer, 0, 0, index, 0, 0)
    cache = tuple(lax.dynamic_update_slice(c, n.astype(c.dtype), place) for c, n in zip(cache, new))
    k, v = (lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
    scores = jnp.einsum("bknh,bkmnh->bnkm", self.q(x_BKD), k, preferred_element_type=jnp.float32) + bias_KM
    scores = jnp.where(jnp.arange(k.shape[2]) <= index, scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return self.o(jnp.einsum("bnkm,bkmnh->bknh", probs, v)), cache
