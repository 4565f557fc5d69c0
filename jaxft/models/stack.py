"""A stack of layers with what stands before and after them: position tables, norms, relative bias, rope, windows.

Letters as in attention.py, E width of the token embedding where it is another than D.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxft import sharding
from jaxft.models import attention, block, layers, rope


@dataclasses.dataclass(frozen=True)
class Spec:
  """A stack in numbers; what is 0, "", () or None is not there."""

  depth: int
  layer: block.Spec
  causal: bool
  dropout: float  # before the first layer
  final_norm: bool = True
  final_dropout: float = 0.0
  # ---- what is added to the token embeddings
  width: int = 0  # E
  project: str = ""  # from E to D: "before" anything is added (OPT), or "after" norm and dropout (ELECTRA)
  project_bias: bool = False
  project_back: bool = False  # from D to E at the end
  positions: int = 0  # rows of a table of positions
  offset: int = 0  # row of the first position
  sinusoidal: bool = False  # that table is no parameter but that of `sines`
  types: int = 0  # rows of a table of token types
  norm: bool = False  # of the sum
  std: float = 0.0  # of fresh tables
  # ---- relative positions
  buckets: int = 0  # of distances; where attention is disentangled, on either side
  max_distance: int = 0
  distance_norm: bool = False  # of the vectors of distances, where attention is disentangled
  ropes: tuple[rope.Rope, ...] = ()
  kinds: tuple[int, ...] = ()  # of each layer, which of the ropes; () where there is at most one
  windows: tuple[int, ...] = ()  # of each layer, how far attention reaches (scores.Mask); 0: everywhere

  @property
  def embedded(self) -> int:
    return self.width or self.layer.attention.width


class Stack(nnx.Module):
  def __init__(self, spec: Spec, build: layers.Build, cross: bool = False):
    a, s = spec.layer.attention, spec
    if s.buckets and a.disentangled:
      norm = s.layer.norm if s.distance_norm else None
      self.relative_bias = attention.RelativeVectors(s.buckets, s.max_distance, norm, a.width, s.std, **build.dtypes)
    elif s.buckets:
      self.relative_bias = attention.RelativeBias(
        s.buckets, a.heads, s.max_distance, not s.causal, s.std, params_dtype=build.params_dtype
      )
    inner = a.width if s.project == "before" else s.embedded
    for name, rows in (("positions", 0 if s.sinusoidal else s.positions), ("types", s.types)):
      if rows:
        setattr(self, name, layers.Embedding(rows, inner, s.std, axes=("positions", "embed"), **build.dtypes))
    if s.norm:
      self.norm = layers.Norm((inner,), s.layer.norm, **build.dtypes)
    if s.project:
      self.project = layers.dense(s.embedded, a.width, (None, "embed"), s.std, s.project_bias, **build.dtypes)
    if s.project_back:
      self.project_back = layers.dense(a.width, s.embedded, ("embed", None), s.std, s.project_bias, **build.dtypes)
    self.layers = layers.stack(block.Block(spec.layer, build, cross), spec.depth)
    if s.final_norm:
      self.final_norm = layers.Norm((a.width,), s.layer.norm, **build.dtypes)
    self.spec, self.remat, self.unroll, self.dtype = spec, build.remat, build.unroll, build.dtype

  def enter(self, x: jax.Array, positions: jax.Array, types: jax.Array | None, key) -> jax.Array:
    """Returns [..., D] for embedded tokens [..., E], their positions within the example and their types i32[...]."""
    s = self.spec
    if s.project == "before":
      x = self.project(x)
    if s.sinusoidal:
      x += jnp.take(sines(s.positions, x.shape[-1]), positions, axis=0, mode="fill", fill_value=jnp.nan).astype(x.dtype)
    elif s.positions:
      x += self.positions(positions + s.offset)
    if s.types:
      x += self.types(jnp.zeros_like(positions) if types is None else types)
    x = self.norm(x) if s.norm else x
    x = layers.dropout(sharding.pin(x, block.WIDTH) if x.ndim == 3 else x, s.dropout, key)
    return self.project(x) if s.project == "after" else x

  def leave(self, x: jax.Array, key) -> jax.Array:
    x = self.final_norm(x) if self.spec.final_norm else x
    x = layers.dropout(x, self.spec.final_dropout, key)
    return self.project_back(x) if self.spec.project_back else x

  def _places(self, positions: jax.Array):
    """Returns (what each layer gets to scan over, angles or None)."""
    s = self.spec
    cos_sin = rope.angles(s.ropes, positions) if s.ropes else None
    windows = np.array(s.windows or (0,) * s.depth, np.int32)
    xs = dict(
      layer=jnp.arange(s.depth),
      kind=jnp.array(s.kinds or (0,) * s.depth, jnp.int32),
      window=jnp.array(np.where(windows > 0, windows, np.iinfo(np.int32).max // 2), jnp.int32),
    )
    return xs, cos_sin

  def _angles(self, cos_sin, kind):
    if cos_sin is None or len(self.spec.ropes) == 1:
      return None if cos_sin is None else cos_sin[0]
    return lax.dynamic_index_in_dim(cos_sin, kind, keepdims=False)

  def _mask(self, mask, x):
    """Returns the mask narrowed to the layer's window."""
    places = mask.key.shape[1]
    windows = {w if 0 < w < places else 0 for w in self.spec.windows or (0,)}  # a wider one hides nothing
    if windows == {0}:
      return mask
    return mask.replace(window=next(iter(windows)) if len(windows) == 1 else x["window"])

  def __call__(self, x_BTE, segments, mask, key, types=None, context=None, cross_mask=None) -> jax.Array:
    """Returns [B, T, D] (or E) for embedded tokens; masks are `scores.Mask`, `context` what the encoder gave."""
    first, inner, last = layers.keys(key, 3)
    places = attention.positions(segments)
    x_BTD = self.enter(x_BTE, places, types, first)
    bias = self.relative_bias(x_BTE.shape[1], x_BTE.shape[1]) if self.spec.buckets else None
    xs, cos_sin = self._places(places)
    bare_first = self.spec.layer.bare_first

    def body(block, h, x):
      one = None if key is None else layers.fold(inner, x["layer"])
      bare = x["layer"] == 0 if bare_first else None
      return block(h, bias, self._mask(mask, x), self._angles(cos_sin, x["kind"]), context, cross_mask, one, bare), None

    x_BTD, _ = layers.scan(body, self.layers, x_BTD, xs, remat=self.remat, unroll=self.unroll)
    return self.leave(x_BTD, last)

  # ---- one token after the other

  def cross_keys_values(self, context_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values that every layer takes from the encoder, each [L, B, T, G, H]."""
    body = lambda block, carry, _: (carry, block.cross_attn.keys_values(context_BTD, None))
    return layers.scan(body, self.layers, None, None, remat="none", unroll=self.unroll)[1]

  def prefill(self, x_BTE, segments, mask) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of all layers for a prompt, each [L, B, T, G, H]."""
    places = attention.positions(segments)
    xs, cos_sin = self._places(places)

    def body(block, h, x):
      return block.prefill(h, self._mask(mask, x), self._angles(cos_sin, x["kind"]))

    x_BTD = self.enter(x_BTE, places, None, None)
    return layers.scan(body, self.layers, x_BTD, xs, remat="none", unroll=self.unroll)[1]

  def empty(self, rows: int, beams: int, length: int) -> dict:
    """Returns the cache of `length` tokens: self_k, self_v [L, B, K, M, G, H] and index i32[]."""
    a = self.spec.layer.attention
    new = jnp.zeros((self.spec.depth, rows, beams, length, a.kv_heads, a.head_dim), self.dtype)
    return dict(self_k=new, self_v=new, index=jnp.int32(0))

  def step(self, x_BKE, cache: dict) -> tuple[jax.Array, dict]:
    """Returns [B, K, D] for one new token of every beam, and the new cache.

    The cache is that of `empty` with either cross_k, cross_v [L, B, T, G, H] and cross_mask bool [B, 1, 1, T], or
    prompt_k, prompt_v [L, B, T, G, H] and prompt_length i32[B], of which all beams of a row make use.
    """
    index, length, rows = cache["index"], cache["self_k"].shape[3], x_BKE.shape[0]
    before = cache.get("prompt_length", jnp.zeros(rows, jnp.int32))
    place_B1 = (before + index)[:, None]
    xs, cos_sin = self._places(place_B1)
    names = "cross" if "cross_k" in cache else "prompt" if "prompt_k" in cache else ""
    xs = dict(xs, pair=(cache[f"{names}_k"], cache[f"{names}_v"])) if names else xs
    bias = self._bias_step(index, length) if self.spec.buckets else None

    def body(block, carry, x):
      masks = self._step_masks(cache, x, index, length)
      cross = (x["pair"], cache["cross_mask"]) if names == "cross" else None
      prompt = x["pair"] if names == "prompt" else None
      angles = self._angles(cos_sin, x["kind"])
      h, pair = block.step(*carry, x["layer"], index, bias, prompt, masks, angles, cross)
      return (h, pair), None

    x_BKD = self.enter(x_BKE, jnp.broadcast_to(place_B1, x_BKE.shape[:2]), None, None)
    carry = (x_BKD, (cache["self_k"], cache["self_v"]))
    (x_BKD, (k, v)), _ = layers.scan(body, self.layers, carry, xs, remat="none", unroll=self.unroll)
    return self.leave(x_BKD, None), {**cache, "self_k": k, "self_v": v, "index": index + 1}

  def _step_masks(self, cache: dict, x: dict, index, length: int) -> tuple:
    """Returns what counts among the tokens made so far, bool [M], and in the prompt, bool [B, T] or None."""
    place, windowed = jnp.arange(length), any(self.spec.windows)
    own = place <= index
    if windowed:
      own &= index - place < x["window"]
    if "prompt_k" not in cache:
      return own, None
    there, at = cache["prompt_length"][:, None], jnp.arange(cache["prompt_k"].shape[2])
    prompt = at < there
    return own, prompt & (there + index - at < x["window"]) if windowed else prompt

  def _bias_step(self, index, length: int) -> jax.Array:
    line = self.relative_bias.of(np.arange(1 - length, length))  # entry e is distance e - (length - 1)
    return lax.dynamic_slice_in_dim(line, length - 1 - index, length, 0).T[None, :, None]  # place m: m - index


def sines(rows: int, width: int) -> np.ndarray:
  """Returns float32 [rows, width]: sines of position / 10000^(2 i / width), then their cosines.

  Vaswani et al. 2017, section 3.5, where the two alternate. Computed in float64: in float32, the angle at position 1000
  is off by 6e-5.
  """
  half = -(-width // 2)
  angle = np.arange(rows)[:, None] * 10000.0 ** (-2 * np.arange(half) / width)
  return np.concatenate([np.sin(angle), np.cos(angle)[:, : width - half]], -1).astype(np.float32)


def reorder(cache: dict, parents_BK: jax.Array) -> dict:
  """Returns the cache in which beam k of a row goes on from beam `parents_BK[b, k]`."""
  index = parents_BK[None, :, :, None, None, None]
  return {**cache, **{n: jnp.take_along_axis(cache[n], index, axis=2) for n in ("self_k", "self_v")}}
