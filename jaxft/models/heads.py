"""What turns hidden states into predictions: vocabulary logits, one prediction an example, one a token.

Letters: B rows, T length, D width, M examples a row, C labels, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import sharding
from jaxft.models import layers

POOLS = ("first", "last", "mean")


@dataclasses.dataclass(frozen=True)
class Spec:
  """A head in numbers: dropout, dense, act, norm, dropout, out; what is 0, "" or None is not there."""

  out: int  # V or C; 0: the output of what stands before it
  bias: bool  # of the output
  std: float  # of fresh weights
  dense: int = 0  # width of a layer between
  dense_bias: bool = True
  dense_std: float | None = None  # of its fresh weights, where that is another than `std`
  act: str = ""  # after the dense layer, key of layers.ACTIVATIONS
  norm: layers.NormSpec | None = None
  tied: bool = False  # the output's weights are the embedding table
  axis: str = "labels"  # logical axis of the output: "vocab" is split over the mesh
  pool: str = ""  # of POOLS: which hidden state of an example is taken; "": those of all tokens
  scale: float = 1.0  # of what goes into the output
  softcap: float = 0.0  # of the output
  fixed_bias: bool = False  # the bias is not trained (the buffer final_logits_bias of BART and Marian)
  dropout_in: float = 0.0
  dropout: float = 0.0

  def undropped(self) -> "Spec":
    return dataclasses.replace(self, dropout_in=0.0, dropout=0.0)


class Head(nnx.Module):
  def __init__(self, spec: Spec, width: int, build: layers.Build):
    inner = spec.dense or width
    if spec.dense:
      std = spec.std if spec.dense_std is None else spec.dense_std
      self.dense = layers.dense(width, inner, ("embed", None), std, spec.dense_bias, **build.dtypes)
    if spec.norm:
      self.norm = layers.Norm((inner,), spec.norm, **build.dtypes)
    if spec.out and not spec.tied:
      self.kernel = layers.param((inner, spec.out), ("embed", spec.axis), build.params_dtype, std=spec.std)
    if spec.out and spec.bias:
      self.bias = layers.param((spec.out,), (spec.axis,), build.params_dtype)
    self.spec, self.dtype = spec, build.dtype

  def __call__(self, x: jax.Array, embed: layers.Embedding, key: jax.Array | None) -> jax.Array:
    """Returns float32 [..., V or C] for hidden states [..., D]."""
    s = self.spec
    first, last = layers.keys(key, 2)
    x = layers.dropout(x, s.dropout_in, first)
    if s.dense:
      x = self.dense(x)
    if s.act:
      x = layers.ACTIVATIONS[s.act](x)
    if s.norm:
      x = self.norm(x)
    x = layers.dropout(x, s.dropout, last)
    if not s.out:
      return x
    if s.scale != 1:
      x = x * jnp.asarray(s.scale, x.dtype)
    if s.tied:
      y = embed.attend(x)
    else:
      kernel = self.kernel[...].astype(self.dtype)
      y = layers.product("...d,dv->...v", x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
    if s.bias:
      bias = self.bias[...].astype(jnp.float32)
      y += jax.lax.stop_gradient(bias) if s.fixed_bias else bias
    return layers.cap(y, s.softcap)


def pool(x_BTD: jax.Array, segments_BT: jax.Array, examples: int, how: str, among_BT=None) -> jax.Array:
  """Returns [B, M, D]: entry m is the first, last or mean hidden state of segment m + 1; that of no segment is 0.

  Of a segment that has some places in bool `among_BT`, only those count.
  """
  inside_BMT = segments_BT[:, None, :] == jnp.arange(1, examples + 1)[:, None]
  if among_BT is not None:
    some_BMT = inside_BMT & among_BT[:, None]
    inside_BMT = jnp.where(some_BMT.any(-1, keepdims=True), some_BMT, inside_BMT)
  if how == "mean":
    share = inside_BMT / jnp.maximum(inside_BMT.sum(-1, keepdims=True), 1)
    return jnp.einsum("bmt,btd->bmd", share.astype(x_BTD.dtype), x_BTD)
  if how == "last":
    place_BM = inside_BMT.shape[-1] - 1 - jnp.argmax(inside_BMT[..., ::-1], -1)
  else:
    assert how == "first", how
    place_BM = jnp.argmax(inside_BMT, -1)
  taken = jnp.take_along_axis(x_BTD, place_BM[..., None], axis=1)
  return jnp.where(inside_BMT.any(-1)[..., None], taken, 0)


class Headed(nnx.Module):
  """The part that all models share: the heads by name, and what is asked of them.

  A model has `embed`, `scale`, `neftune` and `hidden(batch, key)`, and a head a name: "head" for the main task, "nsp"
  beside it.
  """

  def add_heads(self, specs: dict[str, Spec], width: int, build: layers.Build) -> None:
    self.head_specs = tuple(specs.items())
    for name, spec in specs.items():
      setattr(self, name, Head(spec, width, build))

  def embedded(self, ids: jax.Array, segments: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
    """Returns the scaled token embeddings [..., D], with noise where a key is given and the model is built for it."""
    x = layers.noise(self.embed(ids), segments, self.neftune, key)
    return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)

  def logits(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns float32 [B, T, V] (or [B, T, C] of a head for each token)."""
    return sharding.pin(self.head(x_BTD, self.embed, key), ("batch", "length", self.head.spec.axis))

  def classified(self, x_BTD, segments_BT, examples: int, key, name: str = "head", among_BT=None) -> jax.Array:
    """Returns float32 [B, M, C] for hidden states; `examples` is M, `among_BT` is for `pool`."""
    head = getattr(self, name)
    return head(pool(x_BTD, segments_BT, examples, head.spec.pool, among_BT), self.embed, key)
