"""Parameters with named axes, and the layers every stack is made of.

Letters: B batch rows, T length, D width, F mlp, V vocabulary, L layers. `axes` of a parameter are its logical axis
names, one for each dimension (None: never split); modules know no mesh. A module is built without values, by its shapes
alone: `fresh` draws them, a Hub folder or a checkpoint gives them, and `merge` binds them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxft import sharding

Tree = Any


def _gelu(x: jax.Array) -> jax.Array:
  """x Phi(x): in float32 by erf, as torch has it and as a CPU is faster at; else by erfc, since 1 + erf would round
  away what is small in bfloat16."""
  if x.dtype != jnp.float32:
    return jax.nn.gelu(x, approximate=False)
  return x * (0.5 * (1 + lax.erf(x * math.sqrt(0.5))))


ACTIVATIONS = {  # by the name that config.json files use
  "relu": jax.nn.relu,
  "gelu": _gelu,
  "gelu_python": _gelu,
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "tanh": jnp.tanh,
}

REMAT = ("none", "dots", "attention", "block", "offload")
KEPT, AWAY = "attention", "layer_input"  # names of values that remat keeps on the device, and in the host's memory
MASKED = -1e30  # for scores that must not count: exp() of it is exactly 0 in float32, and no sum with it overflows


@dataclasses.dataclass(frozen=True)
class Build:
  """How a model is built and run, apart from what it computes."""

  dtype: Any  # of activations
  params_dtype: Any
  remat: str  # of REMAT
  unroll: int  # layers a turn of the scan
  neftune: float = 0.0  # noise on token embeddings in training
  attention: str = "auto"  # of kernels.CHOICES
  prefix: bool = False  # a decoder's prompt sees itself in both directions when it generates (task prefix_lm)

  @property
  def dtypes(self) -> dict:
    return dict(dtype=self.dtype, params_dtype=self.params_dtype)


@dataclasses.dataclass(frozen=True)
class NormSpec:
  """Numbers of a normalisation; `offset` is added to the scale (Gemma stores scale - 1), `init` is its fresh value.

  Without `scaled` there is no scale (Galactica, OLMo 1).
  """

  kind: str  # "rms": x / rms(x), "layer": (x - mean(x)) / std(x)
  eps: float
  bias: bool
  init: float = 1.0
  offset: float = 0.0
  scaled: bool = True


def param(shape: tuple[int, ...], axes: tuple, dtype, *, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
  """Returns a parameter without a value: shape, dtype, axis names and the distribution that `fresh` draws from."""
  assert len(axes) == len(shape), (axes, shape)
  return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)), axes=tuple(axes), std=std, mean=mean)


def stack(module: nnx.Module, size: int) -> nnx.Module:
  """Returns one module whose parameters are those of `size` modules on a leading axis named "layers"."""
  graphdef, state = nnx.split(module)
  for _, leaf in state.flat_state():
    one = leaf.get_value()
    leaf.set_value(jax.ShapeDtypeStruct((size, *one.shape), one.dtype))
    leaf.set_metadata(axes=("layers", *leaf.axes))
  return nnx.merge(graphdef, state)


def split(module: nnx.Module) -> tuple[Any, Tree, Tree]:
  """Returns (graphdef, params, axes): nested dicts, of one structure, of arrays and of tuples of logical axis names."""
  graphdef, state = nnx.split(module)
  params, axes = {}, {}
  for path, leaf in state.flat_state():
    _put(params, path, leaf.get_value())
    _put(axes, path, leaf.axes)
  return graphdef, params, axes


def fresh(module: nnx.Module, key: jax.Array) -> Tree:
  """Returns new parameters for a module: each normal with its own mean and deviation, drawn in float32. Pure.

  The bits come from `hash_bits` and not from jax.random: with 24 parameters, compiling that many threefry generators
  took 122 s on a busy 2-core machine, and this takes 9 s; and the numbers are the same on any mesh.
  """
  params: Tree = {}
  for i, (path, leaf) in enumerate(sorted(nnx.split(module)[1].flat_state(), key=lambda item: item[0])):
    want = leaf.get_value()
    uniform = ((hash_bits(fold(key, i), want.shape) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-22) - 1
    value = leaf.mean + leaf.std * math.sqrt(2) * lax.erf_inv(uniform) if leaf.std else jnp.full(want.shape, leaf.mean)
    _put(params, path, value.astype(want.dtype))
  return params


def merge(graphdef: Any, params: Tree) -> nnx.Module:
  """Returns the module with these parameters (arrays or tracers); it copies nothing."""
  return nnx.merge(graphdef, params)


def _put(tree: dict, path: tuple, leaf: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def scan(body: Callable, module: nnx.Module, carry: Tree, xs: Tree, *, remat: str, unroll: int) -> tuple[Tree, Tree]:
  """Runs `body(layer, carry, x) -> (carry, y)` over the layers of a `stack`; returns (carry, stacked y).

  `xs` is scanned along with the layers. `remat` says what the backward pass computes again: nothing ("none"),
  everything in a layer ("block"), all but the results of the matrix products with weights ("dots") or of attention
  ("attention"), or everything, while what goes into a layer waits in the memory of the host ("offload").
  """
  graphdef, params, _ = split(module)
  beside = unroll > 1  # side by side, what is computed again would be found to be there already, and kept after all

  def one(carry, x):
    layer, rest = x
    carry = jax.tree.map(lambda h: checkpoint_name(h, AWAY), carry) if remat == "offload" else carry
    return body(merge(graphdef, layer), carry, rest)

  assert remat in REMAT, f"remat is one of {REMAT}, not {remat!r}"
  if remat != "none":
    one = jax.checkpoint(one, prevent_cse=beside, policy=_policy(remat))
  return lax.scan(one, carry, (params, xs), unroll=unroll)


def _policy(remat: str) -> Callable | None:
  """Returns what of a layer is kept for the backward pass."""
  policies = jax.checkpoint_policies
  if remat == "offload":
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[AWAY], offload_src="device", offload_dst="pinned_host"
    )
  kept = dict(dots=policies.dots_with_no_batch_dims_saveable, attention=policies.save_only_these_names(KEPT))
  return kept.get(remat)


def fold(key: jax.Array, i: int | jax.Array) -> jax.Array:
  """Returns the 32-bit words [2] of the `i`-th key derived from `key` (of jax.random, or such words); no threefry."""
  words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
  a, b = words.astype(jnp.uint32).reshape(-1)[:2]
  i = jnp.asarray(i, jnp.uint32)
  a = _mix(a + _mix(i + jnp.uint32(0x9E3779B9)))
  return jnp.stack([a, _mix(b ^ _mix(i + jnp.uint32(0x3C6EF372))) + a])


def keys(key: jax.Array | None, n: int) -> tuple:
  """Returns `n` keys derived from `key`, or n times None."""
  return (None,) * n if key is None else tuple(fold(key, i) for i in range(n))


def adapter_keys(key: jax.Array | None, n: int) -> tuple:
  """Returns `n` keys for adapters beside what a module takes from `key` itself, or n times None."""
  return keys(None if key is None else fold(key, 2**31), n)


def hash_bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns uint32 of `shape`: two rounds of a mixer over the position, keyed with the two `words` of `fold`.

  It is element-wise in the position: it fuses with its use, and a mesh only splits it. Beyond 2**32 entries it repeats.
  """
  place = jnp.zeros(shape, jnp.uint32)
  for i, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
    place += lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride % 2**32)
  return hash_at(place, words[0], words[1])


def rounded(x: jax.Array, words: jax.Array) -> jax.Array:
  """Returns float32 `x` in bfloat16: one of the two values beside it, the nearer the likelier, so that it is right in
  the mean (Gupta et al. 2015, section 3). What bfloat16 has stays what it is, as do infinities and NaN.
  """
  bits = lax.bitcast_convert_type(x, jnp.uint32) + (hash_bits(words, x.shape) >> 16)
  cut = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def hash_at(place: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns what `hash_bits` with the words a and b has at each `place` of a flat array, uint32."""
  return _mix(_mix(place ^ a) + b)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which every bit changes every other (C. Wellons 2018, "lowbias32")."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Returns `x` with a share `rate` of its entries set to 0, the others divided by 1 - rate; `x` itself without a key.

  `key` are the words of `fold`. The mask is computed again in the backward pass instead of stored. Measured on 2 CPU
  cores for 3.1M entries: 2.4 ms, where jax.random.bernoulli takes 60 ms (threefry) or 70 ms (rbg), the product alone
  2.1 ms.
  """
  return x if key is None or rate == 0.0 else _dropped(x, key, rate)


def _masked(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  keep = hash_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
  return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


# under autodiff alone, the mask of every layer of a scan would be kept for the backward pass
_dropped = jax.custom_vjp(_masked, nondiff_argnums=(2,))
_dropped.defvjp(lambda x, key, rate: (_masked(x, key, rate), key), lambda rate, key, g: (_masked(g, key, rate), None))


def noise(x_BTD: jax.Array, segments_BT: jax.Array, alpha: float, key: jax.Array | None) -> jax.Array:
  """Returns embeddings with NEFTune's noise (Jain et al. 2023, section 2): uniform in +-alpha / sqrt(L D), L the tokens
  of the example; `x_BTD` itself without a key.
  """
  if key is None or not alpha:
    return x_BTD
  length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], -1)
  size = alpha * lax.rsqrt(length_BT[..., None].astype(jnp.float32) * x_BTD.shape[-1])
  uniform = (hash_bits(key, x_BTD.shape) >> 8).astype(jnp.float32) * jnp.float32(2**-23) - 1
  return x_BTD + (uniform * size).astype(x_BTD.dtype)


def product(equation: str, x: jax.Array, kernel: jax.Array, **how: Any) -> jax.Array:
  """Returns einsum(equation, x, kernel, **how), where "..." leads in `x` and in the result.

  On a CPU these axes are made one, so that the gradient of the kernel sums over one. Over two, rows and tokens, XLA:CPU
  writes both sides transposed first, logits included: a step of a small Llama takes 1.1 times as long. On a TPU it is
  the other way round (0.381 for 0.375 s of Llama 1B on v5p, by its compiler): a reshape may move what a tile holds.
  """
  if sharding.platform() != "cpu":
    return jnp.einsum(equation, x, kernel, **how)
  lead = x.ndim - len(equation.partition(",")[0].removeprefix("..."))
  y = jnp.einsum(equation, x.reshape(-1, *x.shape[lead:]), kernel, **how)
  return y.reshape(*x.shape[:lead], *y.shape[1:])


class Einsum(nnx.Module):
  """A weight applied by `equation`, and a bias where `bias` are its dimensions of the weight; `kernel` and `bias`.

  `adapter` is (scale, dropout) of `lora_a` and `lora_b`, which lora.py adds; () without.
  """

  def __init__(self, equation: str, shape: tuple, axes: tuple, std: float, bias: tuple = (), *, dtype, params_dtype):
    self.kernel = param(shape, axes, params_dtype, std=std)
    if bias:
      self.bias = param([shape[d] for d in bias], [axes[d] for d in bias], params_dtype)
    self.equation, self.dtype, self.biased, self.adapter = equation, dtype, bool(bias), ()

  def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """`key` is for the dropout of an adapter."""
    x = x.astype(self.dtype)
    y = product(self.equation, x, self.kernel[...].astype(self.dtype))
    y = y + self._adapted(x, key) if self.adapter else y
    return y + self.bias[...].astype(self.dtype) if self.biased else y

  def _adapted(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """(x A) B in place of x (A B): W has no gradient, and nothing of its size is made."""
    (scale, rate), (into, out) = self.adapter, self.equation[3:].split("->...")
    into = into.split(",")[0]
    a, b = (w[...].astype(self.dtype) for w in (self.lora_a, self.lora_b))
    low = product(f"...{into},{into}r->...r", dropout(x, rate, key), a)
    return product(f"...r,r{out}->...{out}", low * jnp.asarray(scale, low.dtype), b)


def dense(width: int, out: int, axes: tuple, std: float, bias: bool, **dtypes) -> Einsum:
  """Returns a linear layer [width] -> [out] over the last axis."""
  return Einsum("...d,df->...f", (width, out), axes, std, (1,) if bias else (), **dtypes)


class Norm(nnx.Module):
  """Layer or root-mean-square normalisation over the last axes, those of `shape`, computed in float32.

  Ba et al. 2016, section 3; Zhang and Sennrich 2019, eq. 4.
  """

  def __init__(self, shape: tuple[int, ...], spec: NormSpec, *, dtype, params_dtype):
    if spec.scaled:
      self.scale = param(shape, (None,) * len(shape), params_dtype, mean=spec.init)
    if spec.bias:
      self.bias = param(shape, (None,) * len(shape), params_dtype)
    self.over = tuple(range(-len(shape), 0))
    self.spec, self.dtype = spec, dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    if self.spec.kind == "layer":
      x -= jnp.mean(x, self.over, keepdims=True)
    x *= lax.rsqrt(jnp.mean(jnp.square(x), self.over, keepdims=True) + self.spec.eps)
    if self.spec.scaled:
      x *= self.scale[...].astype(jnp.float32) + self.spec.offset
    return (x + self.bias[...].astype(jnp.float32) if self.spec.bias else x).astype(self.dtype)


class Embedding(nnx.Module):
  """Rows of a table [V, D], and the product with it for a tied head; reading row `still` passes no gradient."""

  def __init__(self, vocab: int, width: int, std: float, axes=("vocab", "embed"), still=None, *, dtype, params_dtype):
    self.embedding = param((vocab, width), axes, params_dtype, std=std)
    self.axes, self.still, self.dtype = axes, still, dtype

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Returns [B, T, D]; an id outside the table gives NaN, which the training step stops at."""
    # unpinned, a lookup in a table split both ways replicates the activations: 4 involuntary rematerialisations on
    # a 2x2x2 mesh
    table = sharding.pin(self.embedding[...], (self.axes[0], None))
    x = jnp.take(table, ids_BT, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)
    return x if self.still is None else jnp.where((ids_BT == self.still)[..., None], lax.stop_gradient(x), x)

  def attend(self, x_BTD: jax.Array) -> jax.Array:
    """Returns logits [B, T, V] in float32."""
    table = self.embedding[...].astype(self.dtype)
    return product("...d,vd->...v", x_BTD.astype(self.dtype), table, preferred_element_type=jnp.float32)


def cap(x: jax.Array, softcap: float) -> jax.Array:
  """Returns c tanh(x / c) for c = `softcap` (Gemma 2, section 2), `x` itself where it is 0."""
  return softcap * jnp.tanh(x / softcap) if softcap else x


class Mlp(nnx.Module):
  """wo(act(wi x)), or gated wo(act(wi_0 x) * wi_1 x) (Shazeer 2020, section 2).

  `stds` are the deviations of the inner and of the outer weights.
  """

  def __init__(
    self, width: int, mlp: int, act: str, gated: bool, bias: bool, stds: tuple[float, float], rate: float, **dtypes
  ):
    for name in ("wi_0", "wi_1") if gated else ("wi",):
      setattr(self, name, dense(width, mlp, ("embed", "mlp"), stds[0], bias, **dtypes))
    self.wo = dense(mlp, width, ("mlp", "embed"), stds[1], bias, **dtypes)
    self.act, self.gated, self.rate = act, gated, rate

  def __call__(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
    act, (k1, k2, k3) = ACTIVATIONS[self.act], adapter_keys(key, 3)
    h_BTF = act(self.wi_0(x_BTD, k1)) * self.wi_1(x_BTD, k2) if self.gated else act(self.wi(x_BTD, k1))
    h_BTF = sharding.pin(h_BTF, ("batch", "length", "mlp")) if h_BTF.ndim == 3 else h_BTF
    return self.wo(dropout(h_BTF, self.rate, key), k3)
