"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.4) in the half-split layout of transformers.

The kinds are the `rope_type`s of transformers: default, linear (positions over a factor; Chen et al. 2023), dynamic
(the default up to the model's positions, which is as far as jaxft goes with it), llama3 (Llama 3.1) and yarn (Peng et
al. 2023, sections 3.2 to 3.4). Frequencies are computed on the host, with the roundings to float32 that the original
has: at position 2,000 another rounding is an angle of 1e-4.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Numbers of one rotary embedding; those after `theta` are 0 where the kind has no use for them."""

  dim: int  # leading dimensions of a head that are rotated
  theta: float
  kind: str = "default"
  factor: float = 1.0  # by which positions are stretched
  original: int = 0  # llama3, yarn: positions of the model before the stretching
  low: float = 0.0  # llama3: low_freq_factor
  high: float = 0.0  # llama3: high_freq_factor
  fast: float = 0.0  # yarn: beta_fast
  slow: float = 0.0  # yarn: beta_slow
  truncate: bool = True  # yarn: whole dimensions as borders of the ramp
  attention: float = 1.0  # yarn: factor on cos and sin
  limit: int = 0  # dynamic: positions up to which it is the default, and jaxft has it; 0: no bound

  def frequencies(self) -> np.ndarray:
    """Returns float32 [dim / 2], radians a position."""
    f32 = np.float32
    exponent = (np.arange(0, self.dim, 2, dtype=f32) / f32(self.dim)).astype(np.float64)
    turn = (self.theta**exponent).astype(f32)
    f = 1 / turn
    if self.kind == "linear":
      f = f / f32(self.factor)
    elif self.kind == "llama3":
      wave = 1 / f * f32(2 * math.pi)
      smooth = (1 / wave * f32(self.original) - f32(self.low)) / f32(self.high - self.low)
      mixed = (1 - smooth) * f / f32(self.factor) + smooth * f
      f = np.where(smooth < 0, f / f32(self.factor), np.where(smooth > 1, f, mixed))
    elif self.kind == "yarn":
      border = lambda turns: self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
      low, high = border(self.fast), border(self.slow)
      if self.truncate:
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, self.dim - 1)
      high += 1e-3 if low == high else 0
      ramp = 1 - np.clip((np.arange(self.dim // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
      f = 1 / (f32(self.factor) * turn) * (1 - ramp) + f * ramp
    else:
      assert self.kind in ("default", "dynamic"), self.kind
    return f.astype(f32)


def angles(ropes: tuple[Rope, ...], positions: jax.Array) -> jax.Array:
  """Returns cos and sin of each rope for i32 positions [...], as float32 [ropes, 2, ..., 1, dim / 2]."""
  assert len({r.dim for r in ropes}) == 1, "ropes of one stack rotate as many dimensions"
  out = []
  for r in ropes:
    angle = positions.astype(jnp.float32)[..., None, None] * r.frequencies()
    out.append(jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * r.attention)
  return jnp.stack(out)


def rotate(x: jax.Array, cos_sin: jax.Array) -> jax.Array:
  """Returns `x` [..., N, H] with its leading dimensions rotated by one entry of `angles`, in float32 inside."""
  half = cos_sin.shape[-1]
  cos, sin = cos_sin
  a, b, rest = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
  return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned
