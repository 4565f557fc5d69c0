"""One layer of any stack: self-attention, perhaps cross-attention, and an MLP, each around a residual sum.

x + f(x) with a norm in up to three places: before f ("pre": T5, GPT-2, Llama), after it ("post": OLMo 2; Gemma 2 has
both), after the sum ("out": BERT, BART). GPT-NeoX adds attention and MLP of the same x in parallel. Letters as in
attention.py.
"""

import dataclasses

import jax
from flax import nnx

from jaxft import sharding
from jaxft.models import attention, layers

WIDTH = ("batch", "length", None)  # how activations [B, T, D] are split
PLACES = dict(pre="norm", post="post_norm", out="out_norm")  # place of a norm -> its name after that of the sublayer


@dataclasses.dataclass(frozen=True)
class Spec:
  """A layer in numbers."""

  attention: attention.AttentionSpec
  mlp: int
  act: str  # key of layers.ACTIVATIONS
  gated: bool
  mlp_bias: bool
  mlp_stds: tuple[float, float]  # of fresh inner and outer weights
  mlp_dropout: float  # of what goes into the outer weights
  norm: layers.NormSpec
  places: tuple[str, ...]  # of PLACES
  dropout: float  # of what is added to the residual
  attention_out_dropout: float | None = None  # of what attention adds, where it is another than `dropout`
  parallel: bool = False
  bare_first: bool = False  # the first layer of the stack has no norm before its attention (ModernBERT)


class Block(nnx.Module):
  def __init__(self, spec: Spec, build: layers.Build, cross: bool):
    a = spec.attention
    for name in ("self", "cross") if cross else ("self",):
      setattr(self, f"{name}_attn", attention.Attention(a, build))
    self.mlp = layers.Mlp(
      a.width, spec.mlp, spec.act, spec.gated, spec.mlp_bias, spec.mlp_stds, spec.mlp_dropout, **build.dtypes
    )
    for name in ("self", "cross", "mlp") if cross else ("self", "mlp"):
      for place in spec.places:
        setattr(self, f"{name}_{PLACES[place]}", layers.Norm((a.width,), spec.norm, **build.dtypes))
    self.spec, self.cross = spec, cross

  def _norm(self, name: str, place: str, x: jax.Array) -> jax.Array:
    return getattr(self, f"{name}_{PLACES[place]}")(x) if place in self.spec.places else x

  def _add(self, name: str, x: jax.Array, y: jax.Array, key) -> jax.Array:
    s = self.spec
    rate = s.dropout if name == "mlp" or s.attention_out_dropout is None else s.attention_out_dropout
    return self._norm(name, "out", x + layers.dropout(self._norm(name, "post", y), rate, key))

  def __call__(self, x_BTD, bias, mask, cos_sin, context, cross_mask, key, bare=None) -> jax.Array:
    """Returns [B, T, D]; `context` [B, S, D] is the encoder's output. `bare`: a traced bool, no first norm."""
    k1, k2, k3, k4, k5, k6 = layers.keys(key, 6)
    h = self._norm("self", "pre", x_BTD)
    h = h if bare is None else jax.numpy.where(bare, x_BTD, h)
    y = self.self_attn(h, h, bias, mask, cos_sin, k1)
    if self.spec.parallel:
      more = self.mlp(self._norm("mlp", "pre", x_BTD), k5)
      return sharding.pin(self._add("mlp", self._add("self", x_BTD, y, k2), more, k6), WIDTH)
    x_BTD = self._add("self", x_BTD, y, k2)
    if self.cross:
      y = self.cross_attn(self._norm("cross", "pre", x_BTD), context, None, cross_mask, None, k3)
      x_BTD = self._add("cross", x_BTD, y, k4)
    y = self.mlp(self._norm("mlp", "pre", x_BTD), k5)
    return sharding.pin(self._add("mlp", x_BTD, y, k6), WIDTH)

  def prefill(self, x_BTD, mask, cos_sin) -> tuple[jax.Array, tuple]:
    """Returns the layer's output and the keys and values of its self-attention, each [B, T, G, H]."""
    pair = self.self_attn.keys_values(self._norm("self", "pre", x_BTD), cos_sin)
    return self(x_BTD, None, mask, cos_sin, None, None, None), pair

  def step(self, x_BKD, cache, layer, index, bias, prompt, masks, cos_sin, cross) -> tuple[jax.Array, tuple]:
    """As `Attention.step`; `cross` is (keys and values of the encoder, mask) or None."""
    h = self._norm("self", "pre", x_BKD)
    y, cache = self.self_attn.step(h, cache, layer, index, bias, prompt, masks, cos_sin)
    if self.spec.parallel:
      more = self.mlp(self._norm("mlp", "pre", x_BKD), None)
      return self._add("mlp", self._add("self", x_BKD, y, None), more, None), cache
    x_BKD = self._add("self", x_BKD, y, None)
    if self.cross:
      y = self.cross_attn(self._norm("cross", "pre", x_BKD), cross[0], None, cross[1], None)
      x_BKD = self._add("cross", x_BKD, y, None)
    return self._add("mlp", x_BKD, self.mlp(self._norm("mlp", "pre", x_BKD), None), None), cache
