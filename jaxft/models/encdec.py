"""Encoder-decoder models: T5, BART and what resembles them.

Letters: B batch rows, T encoder length, S decoder length, D width, G heads of keys and values, H head dimension, V
vocabulary, L layers, K beams, M cache length. The dictionaries `batch` and `cache` are described at `EncDec`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models import heads, layers, scores, stack


@dataclasses.dataclass(frozen=True)
class Spec:
  """An encoder-decoder in numbers; each is read in one place."""

  vocab: int
  embed_scale: float  # of token embeddings
  std: float  # of the fresh token table
  encoder: stack.Spec
  decoder: stack.Spec
  heads: tuple[tuple[str, heads.Spec], ...]  # by name, see heads.Headed
  decoder_start: int
  ends: tuple[int, ...] = ()  # classification takes the state of the last of these tokens, or else of the last token
  start_is_last: bool = False  # in training the decoder starts with the last target (mBART: a language, or the end)
  still: int | None = None  # token whose embedding gets no gradient from being read (torch's padding_idx)


class EncDec(heads.Headed):
  """An encoder and a decoder that share their token embeddings.

  batch: inputs, input_segments i32[B, T]; targets (the labels), target_segments i32[B, S]. Segment 0 is padding;
  examples that share a row have the segments 1, 2, ..., each in one run of neighbouring places.
  cache: cross_k, cross_v [L, B, T, G, H]; cross_mask bool [B, 1, 1, T]; self_k, self_v [L, B, K, M, G, H]; index i32[].
  A key means dropout, None means none.
  """

  def __init__(self, spec: Spec, build: layers.Build):
    width = spec.decoder.layer.attention.width
    self.embed = layers.Embedding(spec.vocab, width, spec.std, still=spec.still, **build.dtypes)
    self.encoder = stack.Stack(spec.encoder, build)
    self.decoder = stack.Stack(spec.decoder, build, cross=True)
    self.add_heads(dict(spec.heads), width, build)
    self.decoder_start, self.start_is_last, self.ends = spec.decoder_start, spec.start_is_last, spec.ends
    self.scale, self.neftune = spec.embed_scale, build.neftune

  def encode(self, inputs_BT: jax.Array, segments_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns the encoder's output [B, T, D]."""
    noise, body = layers.keys(key, 2)
    mask = scores.Mask(segments_BT, segments_BT)
    return self.encoder(self.embedded(inputs_BT, segments_BT, noise), segments_BT, mask, body)

  def hidden(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns the decoder's output [B, S, D], from which `logits` predicts `targets` at the same place."""
    enc_key, dec_key, noise = layers.keys(key, 3)
    context_BTD = self.encode(batch["inputs"], batch["input_segments"], enc_key)
    segments = batch["target_segments"]
    start = last_of(batch["targets"], segments) if self.start_is_last else self.decoder_start
    x_BSD = self.embedded(shift_right(batch["targets"], segments, start), segments, noise)
    mask, cross_mask = scores.Mask(segments, segments, causal=True), scores.Mask(segments, batch["input_segments"])
    return self.decoder(x_BSD, segments, mask, dec_key, context=context_BTD, cross_mask=cross_mask)

  def classify(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns float32 [B, M, C]: as in BART (Lewis et al. 2019, section 3.1), both sides get the inputs."""
    body, head = layers.keys(key, 2)
    x_BTD = self.hidden(_both_sides(batch), body)
    ends = jnp.isin(batch["inputs"], np.array(self.ends, np.int32))
    return self.classified(x_BTD, batch["input_segments"], batch["label_weights"].shape[1], head, among_BT=ends)

  def tag(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns float32 [B, T, C]; both sides get the inputs."""
    body, head = layers.keys(key, 2)
    return self.logits(self.hidden(_both_sides(batch), body), head)

  # ---- one token after the other

  def start(self, inputs_BT: jax.Array, segments_BT: jax.Array, beams: int, length: int) -> tuple[dict, jax.Array]:
    """Encodes (one example a row, padding in segment 0); returns the cache for `length` steps of `beams` beams and the
    tokens [B] to begin with.
    """
    k, v = self.decoder.cross_keys_values(self.encode(inputs_BT, segments_BT))
    rows = inputs_BT.shape[0]
    mask = (segments_BT > 0)[:, None, None]
    cache = dict(self.decoder.empty(rows, beams, length), cross_k=k, cross_v=v, cross_mask=mask)
    return cache, jnp.full(rows, self.decoder_start, jnp.int32)

  def step(self, tokens_BK: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
    """Returns float32 logits [B, K, V] of the next token, and the new cache.

    The beams are query positions of cross-attention, so its keys and values are never repeated.
    """
    x_BKD, cache = self.decoder.step(self.embedded(tokens_BK), cache)
    return self.logits(x_BKD), cache

  reorder = staticmethod(stack.reorder)


def _both_sides(batch: dict) -> dict:
  inputs, segments = batch["inputs"], batch["input_segments"]
  return dict(inputs=inputs, input_segments=segments, targets=inputs, target_segments=segments)


def last_of(tokens_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
  """Returns i32 [B, S]: at each place, the last token of its segment."""
  S = segments_BS.shape[1]
  last = segments_BS != jnp.pad(segments_BS[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  place = jax.lax.cummin(jnp.where(last, jnp.arange(S), S - 1), axis=1, reverse=True)
  return jnp.take_along_axis(tokens_BS, place, axis=1)


def shift_right(targets_BS: jax.Array, segments_BS: jax.Array, start: int | jax.Array) -> jax.Array:
  """Returns the decoder's input: targets one place later, and `start` (of each place) at the first of every segment."""
  before = jnp.pad(targets_BS[:, :-1], ((0, 0), (1, 0)))
  first = segments_BS != jnp.pad(segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return jnp.where(first, start, before)
