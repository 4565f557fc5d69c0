"""The encoder-decoder stack: T5 and what shares its order of statements (norm, sublayer, dropout, sum).

Letters: B batch rows, T encoder length, S decoder length, D width, N heads, H head dimension, V vocabulary, L layers, K
beams, M cache length. The dictionaries `batch` and `cache` are described at `EncDec`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxft import sharding
from jaxft.models import attention, layers

WIDTH = ("batch", "length", None)  # how activations [B, T, D] are split


@dataclasses.dataclass(frozen=True)
class Spec:
  """An encoder-decoder in numbers; each is read in one place."""

  vocab: int
  width: int
  heads: int
  head_dim: int
  mlp: int
  encoder_layers: int
  decoder_layers: int
  buckets: int  # relative attention
  max_distance: int
  norm_eps: float
  act: str  # key of layers.ACTIVATIONS
  gated: bool
  tied: bool  # the head is the embedding table
  scaled: bool  # the decoder's output is multiplied with width**-0.5 before the head
  dropout: float
  init_factor: float
  decoder_start: int


@dataclasses.dataclass(frozen=True)
class Build:
  """How a stack is built and run, apart from what it computes."""

  dtype: Any  # of activations
  params_dtype: Any
  remat: str
  unroll: int

  @property
  def dtypes(self) -> dict:
    return dict(dtype=self.dtype, params_dtype=self.params_dtype)


class Block(nnx.Module):
  """One layer: self-attention, in a decoder cross-attention, and the MLP, each as x + dropout(f(norm(x)))."""

  def __init__(self, spec: Spec, build: Build, cross: bool):
    d, inner, f = spec.width, spec.heads * spec.head_dim, spec.init_factor
    stds = (f * (d * spec.head_dim) ** -0.5, f * d**-0.5, f * d**-0.5, f * inner**-0.5)
    for name in ("self", "cross") if cross else ("self",):
      setattr(self, f"{name}_norm", layers.RMSNorm(d, spec.norm_eps, f, **build.dtypes))
      attend = attention.Attention(d, spec.heads, spec.head_dim, stds, spec.dropout, **build.dtypes)
      setattr(self, f"{name}_attn", attend)
    self.mlp_norm = layers.RMSNorm(d, spec.norm_eps, f, **build.dtypes)
    stds = (f * d**-0.5, f * spec.mlp**-0.5)
    self.mlp = layers.Mlp(d, spec.mlp, spec.act, spec.gated, stds, spec.dropout, **build.dtypes)
    self.cross, self.rate = cross, spec.dropout

  def __call__(self, x_BTD, bias, mask, context, cross_mask, key) -> jax.Array:
    k1, k2, k3, k4, k5, k6 = layers.keys(key, 6)
    h = self.self_norm(x_BTD)
    x_BTD += layers.dropout(self.self_attn(h, self.self_attn.keys_values(h), bias, mask, k1), self.rate, k2)
    if self.cross:
      pair = self.cross_attn.keys_values(context)
      x_BTD += layers.dropout(self.cross_attn(self.cross_norm(x_BTD), pair, None, cross_mask, k3), self.rate, k4)
    x_BTD += layers.dropout(self.mlp(self.mlp_norm(x_BTD), k5), self.rate, k6)
    return sharding.pin(x_BTD, WIDTH)

  def step(self, x_BKD, cache, layer, index, bias, cross_pair, cross_mask) -> tuple[jax.Array, tuple]:
    y, cache = self.self_attn.step(self.self_norm(x_BKD), cache, layer, index, bias)
    x_BKD += y
    x_BKD += self.cross_attn(self.cross_norm(x_BKD), cross_pair, None, cross_mask)
    return x_BKD + self.mlp(self.mlp_norm(x_BKD), None), cache


class Stack(nnx.Module):
  """Stacked layers with one relative bias, a final norm, and dropout before and after."""

  def __init__(self, spec: Spec, build: Build, depth: int, decoder: bool):
    std = spec.init_factor * spec.width**-0.5
    self.relative_bias = attention.RelativeBias(
      spec.buckets, spec.heads, spec.max_distance, not decoder, std, params_dtype=build.params_dtype
    )
    self.layers = layers.stack(Block(spec, build, decoder), depth)
    self.final_norm = layers.RMSNorm(spec.width, spec.norm_eps, spec.init_factor, **build.dtypes)
    self.rate, self.depth, self.remat, self.unroll = spec.dropout, depth, build.remat, build.unroll

  def __call__(self, x_BTD, mask, context, cross_mask, key) -> jax.Array:
    first, inner, last = layers.keys(key, 3)
    length = x_BTD.shape[1]
    bias = self.relative_bias(length, length)

    def body(block, x, i):
      return block(x, bias, mask, context, cross_mask, None if key is None else layers.fold(inner, i)), None

    x_BTD = layers.dropout(sharding.pin(x_BTD, WIDTH), self.rate, first)
    x_BTD, _ = layers.scan(body, self.layers, x_BTD, jnp.arange(self.depth), remat=self.remat, unroll=self.unroll)
    return layers.dropout(self.final_norm(x_BTD), self.rate, last)

  def cross_keys_values(self, context_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values that every layer takes from the encoder, each [L, B, T, N, H]."""
    body = lambda block, carry, _: (carry, block.cross_attn.keys_values(context_BTD))
    return layers.scan(body, self.layers, None, None, remat="none", unroll=self.unroll)[1]

  def step(self, x_BKD, cache: dict) -> tuple[jax.Array, dict]:
    index, length = cache["index"], cache["self_k"].shape[3]
    line = self.relative_bias.of(np.arange(1 - length, length))  # entry e is distance e - (length - 1)
    # place m has the distance m - index
    bias = lax.dynamic_slice_in_dim(line, length - 1 - index, length, 0).T[None, :, None]
    mask = cache["cross_mask"]

    def body(block, carry, xs):
      layer, k, v = xs
      x, pair = block.step(carry[0], carry[1], layer, index, bias, (k, v), mask)
      return (x, pair), None

    xs = (jnp.arange(self.depth), cache["cross_k"], cache["cross_v"])
    carry = (x_BKD, (cache["self_k"], cache["self_v"]))
    (x_BKD, (k, v)), _ = layers.scan(body, self.layers, carry, xs, remat="none", unroll=self.unroll)
    return self.final_norm(x_BKD), {**cache, "self_k": k, "self_v": v, "index": index + 1}


class EncDec(nnx.Module):
  """An encoder-decoder language model.

  batch: inputs, input_segments i32[B, T]; targets (the labels), target_segments i32[B, S]. Segment 0 is padding;
  examples that share a row have the segments 1, 2, ..., each in one run of neighbouring places.
  cache: cross_k, cross_v [L, B, T, N, H]; cross_mask bool [B, 1, 1, T]; self_k, self_v [L, B, K, M, N, H]; index i32[].
  A key means dropout, None means none.
  """

  def __init__(self, spec: Spec, build: Build):
    self.embed = layers.Embedding(spec.vocab, spec.width, spec.init_factor, **build.dtypes)
    self.encoder = Stack(spec, build, spec.encoder_layers, decoder=False)
    self.decoder = Stack(spec, build, spec.decoder_layers, decoder=True)
    if not spec.tied:
      self.head = layers.Head(spec.width, spec.vocab, spec.init_factor, **build.dtypes)
    self.tied, self.decoder_start = spec.tied, spec.decoder_start
    self.scale = spec.width**-0.5 if spec.scaled else None

  def encode(self, inputs_BT: jax.Array, segments_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns the encoder's output [B, T, D]."""
    mask = attention.segment_mask(segments_BT, segments_BT, causal=False)
    return self.encoder(self.embed(inputs_BT), mask, None, None, key)

  def hidden(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns the decoder's output [B, S, D], from which `logits` predicts `targets` at the same place."""
    enc_key, dec_key = layers.keys(key, 2)
    context_BTD = self.encode(batch["inputs"], batch["input_segments"], enc_key)
    segments = batch["target_segments"]
    x_BSD = self.embed(shift_right(batch["targets"], segments, self.decoder_start))
    mask = attention.segment_mask(segments, segments, causal=True)
    cross_mask = attention.segment_mask(segments, batch["input_segments"], causal=False)
    return self.decoder(x_BSD, mask, context_BTD, cross_mask, dec_key)

  def logits(self, x_BSD: jax.Array) -> jax.Array:
    """Returns float32 [B, S, V]."""
    if self.scale is not None:
      x_BSD = x_BSD * jnp.asarray(self.scale, x_BSD.dtype)
    logits = self.embed.attend(x_BSD) if self.tied else self.head(x_BSD)
    return sharding.pin(logits, ("batch", "length", "vocab"))

  def start(self, inputs_BT: jax.Array, segments_BT: jax.Array, beams: int, length: int) -> dict:
    """Encodes (one example a row, padding in segment 0) and returns the cache for `length` steps of `beams` beams."""
    k, v = self.decoder.cross_keys_values(self.encode(inputs_BT, segments_BT))
    layers_, rows, _, heads, head_dim = k.shape
    empty = jnp.zeros((layers_, rows, beams, length, heads, head_dim), k.dtype)
    empty = sharding.pin(empty, (None, "batch", None, None, "heads", None))
    return dict(
      cross_k=k,
      cross_v=v,
      cross_mask=(segments_BT > 0)[:, None, None],
      self_k=empty,
      self_v=empty,
      index=jnp.zeros((), jnp.int32),
    )

  def step(self, tokens_BK: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
    """Returns float32 logits [B, K, V] after one more token of every beam, and the new cache.

    The beams are query positions of cross-attention, so its keys and values are never repeated.
    """
    x_BKD, cache = self.decoder.step(self.embed(tokens_BK), cache)
    return self.logits(x_BKD), cache

  def reorder(self, cache: dict, parents_BK: jax.Array) -> dict:
    """Returns the cache in which beam k of a row goes on from beam `parents_BK[b, k]`."""
    index = parents_BK[None, :, :, None, None, None]
    return {**cache, **{n: jnp.take_along_axis(cache[n], index, axis=2) for n in ("self_k", "self_v")}}


def shift_right(targets_BS: jax.Array, segments_BS: jax.Array, start: int) -> jax.Array:
  """Returns the decoder's input: targets one place later, and `start` at the first place of every segment."""
  before = jnp.pad(targets_BS[:, :-1], ((0, 0), (1, 0)))
  first = segments_BS != jnp.pad(segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return jnp.where(first, start, before)
