"""Attention as a module, T5's relative position bias, and the key-value cache of decoding.

Letters: B batch rows, T query length, S key length, D width, N heads, G heads of keys and values, R = N / G, H head
dimension, K beams, L layers, M cache length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxft import sharding
from jaxft.models import kernels, layers, rope
from jaxft.models.layers import MASKED, cap


def positions(segments_BT: jax.Array) -> jax.Array:
  """Returns i32 [B, T], the place of each token within its segment, counted from 0; padding (segment 0) has 0.

  (The run of padding in a long row may be longer than a table of positions.)
  """
  place = jnp.arange(segments_BT.shape[1])
  first = segments_BT != jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return jnp.where(segments_BT > 0, place - jax.lax.cummax(jnp.where(first, place, 0), axis=1), 0)


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
    rows = jnp.broadcast_to(line[:, None], (line.shape[0], t, line.shape[1]))
    return sharding.pin(skew(rows)[None], (None, "heads", None, None))


def skew(rows: jax.Array) -> jax.Array:
  """Returns [..., T, S], whose entry (i, j) is entry (i, j - i + T - 1) of `rows` [..., T, T + S - 1]; no gather."""
  *batch, t, width = rows.shape
  flat = jnp.pad(rows, [(0, 0)] * (len(batch) + 1) + [(0, 1)]).reshape(*batch, t * (width + 1))
  # row i starts i places earlier
  return flat[..., : t * width].reshape(*batch, t, width)[..., t - 1 :]


def log_buckets(distance: np.ndarray, half: int, max_distance: int) -> np.ndarray:
  """Returns for each `distance` (query position minus key position) its row in a table of 2 * `half`, int32.

  Row `half` is distance 0; up to half / 2 they are single distances, then they grow as logarithms (He et al. 2021,
  DeBERTa v2; transformers' order of float32 operations, on which the borders depend).
  """
  middle = half // 2
  size = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(np.float32)
  ratio = np.log(size / np.float32(middle)) / np.log(np.float32((max_distance - 1) / middle))
  far = np.sign(distance) * (np.ceil(ratio * np.float32(middle - 1)) + middle)
  return np.clip(np.where(size <= middle, distance, far) + half, 0, 2 * half - 1).astype(np.int32)


class RelativeVectors(nnx.Module):
  """A vector for each bucket of distance, shared by the layers, which project it as they do tokens: `disentangled`."""

  def __init__(self, half: int, max_distance: int, norm: layers.NormSpec | None, width: int, std: float, **dtypes):
    self.embedding = layers.param((2 * half, width), (None, "embed"), dtypes["params_dtype"], std=std)
    if norm:
      self.norm = layers.Norm((width,), norm, **dtypes)
    self.half, self.max_distance, self.normed, self.dtype = half, max_distance, norm is not None, dtypes["dtype"]

  def __call__(self, t: int, s: int) -> tuple[jax.Array, jax.Array]:
    """Returns the vectors [X, D] and one-hot rows [2 t - 1, X]: entry e is of the query e - (t - 1) after the key."""
    assert t == s, (t, s)
    rows = log_buckets(np.arange(-(t - 1), t), self.half, self.max_distance)
    one_hot = jnp.asarray(rows[:, None] == np.arange(2 * self.half), self.dtype)
    table = self.embedding[...].astype(self.dtype)
    return self.norm(table) if self.normed else table, one_hot


def disentangled(q_BTNH, k_BTNH, q_XNH, k_XNH, one_hot_EX) -> jax.Array:
  """Returns float32 [B, N, T, T]: the scores of queries with the vectors of distances, and of these with keys.

  He et al. 2020 (DeBERTa), section 3.1, without position to position. As in `RelativeBias`, no gather: its gradient
  would be a scatter-add.
  """
  lines = (jnp.einsum("ex,xnh->enh", one_hot_EX, x, precision=lax.Precision.HIGHEST) for x in (k_XNH, q_XNH))
  dot = lambda x, line: jnp.einsum("btnh,enh->bnte", x, line, preferred_element_type=jnp.float32)
  content, position = (dot(x, line) for x, line in zip((q_BTNH, k_BTNH), lines))
  scores = skew(content[..., ::-1]) + skew(position).swapaxes(-1, -2)
  return sharding.pin(scores, ("batch", "heads", None, None))


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Numbers of an attention."""

  width: int
  heads: int
  kv_heads: int  # G: heads of keys and values
  head_dim: int
  scale: float  # of the scores
  stds: tuple[float, float, float, float]  # of fresh q, k, v, o
  bias: str = ""  # which of q, k, v, o have one
  qk_norm: layers.NormSpec | None = None
  qk_norm_whole: bool = False  # over all heads at once (OLMo 2), not over each
  softcap: float = 0.0  # 0: none
  disentangled: bool = False  # with scores between tokens and distances (DeBERTa), whose vectors come as the bias
  distance_dropout: float = 0.0  # of these vectors
  dropout: float = 0.0  # of the probabilities


class Attention(nnx.Module):
  """Multi-head attention, with as many heads of keys and values or fewer."""

  def __init__(self, spec: AttentionSpec, build: layers.Build):
    s, n, g, h = spec, spec.heads, spec.kv_heads, spec.head_dim
    for name, heads, std in zip("qkv", (n, g, g), s.stds):
      shape, axes, bias = (s.width, heads, h), ("embed", "heads", "head_dim"), (1, 2) if name in s.bias else ()
      setattr(self, name, layers.Einsum("...d,dnh->...nh", shape, axes, std, bias, **build.dtypes))
    shape, axes, bias = (n, h, s.width), ("heads", "head_dim", "embed"), (2,) if "o" in s.bias else ()
    self.o = layers.Einsum("...nh,nhd->...d", shape, axes, s.stds[3], bias, **build.dtypes)
    if s.qk_norm:
      for name, heads in (("q_norm", n), ("k_norm", g)):
        setattr(self, name, layers.Norm((heads, h) if s.qk_norm_whole else (h,), s.qk_norm, **build.dtypes))
    self.spec, self.how = spec, build.attention

  def queries(self, x: jax.Array, cos_sin: jax.Array | None, key=None) -> jax.Array:
    """Returns the scaled queries [..., N, H] of `x` [..., D], turned by `cos_sin` (an entry of `rope.angles`)."""
    q = self._placed(self.q(x, key), "q_norm", cos_sin)
    return q if self.spec.scale == 1 else q * jnp.asarray(self.spec.scale, q.dtype)

  def keys_values(self, x: jax.Array, cos_sin: jax.Array | None, keys=(None, None)) -> tuple[jax.Array, jax.Array]:
    """Returns k and v, each [..., G, H]."""
    return self._placed(self.k(x, keys[0]), "k_norm", cos_sin), self.v(x, keys[1])

  def _placed(self, x: jax.Array, norm: str, cos_sin: jax.Array | None) -> jax.Array:
    if self.spec.qk_norm:
      x = getattr(self, norm)(x)
    return x if cos_sin is None else rope.rotate(x, cos_sin)

  def __call__(self, x_BTD, context_BSD, bias, mask, cos_sin, key=None) -> jax.Array:
    """Returns [B, T, D]; keys and values come from `context_BSD`, or are it where it is a pair."""
    axes, (k1, k2, k3, k4) = ("batch", "length", "heads", None), layers.adapter_keys(key, 4)
    pair = context_BSD if isinstance(context_BSD, tuple) else self.keys_values(context_BSD, cos_sin, (k2, k3))
    k, v = (sharding.pin(x, axes) for x in pair)
    q = sharding.pin(self.queries(x_BTD, cos_sin, k1), axes)
    if self.spec.disentangled:
      key, drop = layers.keys(key, 2)
      table_XD, one_hot_EX = layers.dropout(bias[0], self.spec.distance_dropout, drop), bias[1]
      bias = disentangled(q, k, self.queries(table_XD, None), self.k(table_XD), one_hot_EX)
    out = kernels.attention(q, k, v, bias, mask, self.spec.dropout, key, self.spec.softcap, self.how)
    return self.o(out, k4)

  def step(self, x_BKD, cache, layer, index, bias, prompt, masks, cos_sin) -> tuple[jax.Array, tuple]:
    """Returns [B, K, D] for one new token of every beam, and the cache with its key and value written at `index`.

    `cache` holds k and v of all layers, [L, B, K, M, G, H]: it stays whole in the loop's carry, so that XLA updates it
    in place. `bias` is [1, N, 1, M] or None. `prompt`, k and v [B, T, G, H] that all beams see before, or None.
    `masks` say which places count: bool [M] (or [B, M]) of the cache, and [B, T] of the prompt.
    """
    pair = self.keys_values(x_BKD, cos_sin)
    new = [x[None, :, :, None] for x in pair]  # [1, B, K, 1, G, H]
    place = (layer, 0, 0, index, 0, 0)
    cache = tuple(lax.dynamic_update_slice(c, n.astype(c.dtype), place) for c, n in zip(cache, new))
    k, v = (lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
    B, K, M, G, H = k.shape
    q = self.queries(x_BKD, cos_sin).reshape(B, K, G, -1, H)
    dot = lambda form, x: cap(jnp.einsum(form, q, x, preferred_element_type=jnp.float32), self.spec.softcap)
    scores = dot("bkgrh,bkmgh->bgrkm", k)
    if bias is not None:
      scores += bias.reshape(1, G, -1, 1, M)
    scores = jnp.where(masks[0].reshape(-1, 1, 1, 1, M), scores, MASKED)
    if prompt is not None:
      before = jnp.where(masks[1][:, None, None, None], dot("bkgrh,btgh->bgrkt", prompt[0]), MASKED)
      scores = jnp.concatenate([before, scores], -1)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrkm,bkmgh->bkgrh", probs[..., -M:], v)
    if prompt is not None:
      out += jnp.einsum("bgrkt,btgh->bkgrh", probs[..., :-M], prompt[1])
    return self.o(out.reshape(B, K, -1, H)), cache
