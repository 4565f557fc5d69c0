"""Models of one stack: encoders (BERT) and decoders (GPT-2, Llama), which differ in whether attention is causal.

batch: inputs, input_segments i32[B, T]; perhaps input_types i32[B, T] (token types) and input_prefix i32[B, T] (places
that the whole example sees although the model is causal). Segment 0 is padding; examples that share a row have the
segments 1, 2, ..., each in one run of neighbouring places. A key means dropout, None means none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxft.models import heads, layers, scores, stack


@dataclasses.dataclass(frozen=True)
class Spec:
  """A model of one stack in numbers."""

  vocab: int
  embed_scale: float  # of token embeddings
  std: float  # of the fresh token table
  stack: stack.Spec
  heads: tuple[tuple[str, heads.Spec], ...]  # by name, see heads.Headed


class Single(heads.Headed):
  """The stack is `encoder` or `decoder`, after which its parameters are named."""

  def __init__(self, spec: Spec, build: layers.Build):
    s = spec.stack
    self.embed = layers.Embedding(spec.vocab, s.embedded, spec.std, **build.dtypes)
    self.side = "decoder" if s.causal else "encoder"
    setattr(self, self.side, stack.Stack(s, build))
    self.add_heads(dict(spec.heads), s.embedded if s.project_back else s.layer.attention.width, build)
    self.scale, self.causal, self.neftune, self.prefix = spec.embed_scale, s.causal, build.neftune, build.prefix

  @property
  def body(self) -> stack.Stack:
    return getattr(self, self.side)

  def hidden(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns the last hidden states [B, T, D]."""
    noise, body = layers.keys(key, 2)
    segments = batch["input_segments"]
    mask = scores.Mask(segments, segments, batch.get("input_prefix") if self.causal else None, causal=self.causal)
    return self.body(self.embedded(batch["inputs"], segments, noise), segments, mask, body, batch.get("input_types"))

  def classify(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns float32 [B, M, C], with M that of batch["label_weights"]."""
    body, head = layers.keys(key, 2)
    return self.classified(self.hidden(batch, body), batch["input_segments"], batch["label_weights"].shape[1], head)

  def tag(self, batch: dict, key: jax.Array | None) -> jax.Array:
    """Returns float32 [B, T, C]."""
    body, head = layers.keys(key, 2)
    return self.logits(self.hidden(batch, body), head)

  # ---- one token after the other (decoders)

  def start(self, inputs_BT: jax.Array, segments_BT: jax.Array, beams: int, length: int) -> tuple[dict, jax.Array]:
    """Returns the cache for `length` steps of `beams` beams and the tokens [B] to begin with, the last of the prompt.

    One prompt a row, in segment 1 from the left; a row without one begins with token 0.
    """
    count = jnp.sum(segments_BT > 0, 1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)
    mask = scores.Mask(segments_BT, segments_BT, causal=self.causal and not self.prefix)
    k, v = self.body.prefill(self.embedded(inputs_BT), segments_BT, mask)
    cache = dict(self.body.empty(inputs_BT.shape[0], beams, length), prompt_k=k, prompt_v=v, prompt_length=last)
    return cache, jnp.take_along_axis(inputs_BT, last[:, None], 1)[:, 0]

  def step(self, tokens_BK: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
    """Returns float32 logits [B, K, V] of the next token, and the new cache."""
    x_BKD, cache = self.body.step(self.embedded(tokens_BK), cache)
    return self.logits(x_BKD), cache

  reorder = staticmethod(stack.reorder)
