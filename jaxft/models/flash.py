"""Flash attention of our own, in Pallas: what JAX's kernels refuse, on TPUs (Mosaic) and NVIDIA GPUs (Triton).

A bias with its gradient, dropout by hash, segments, causal and prefix masks, windows that differ by layer, a cap, heads
that share keys. A program takes a tile of queries past the tiles of keys that any of them may see, and keeps sums in
place of scores (Dao et al. 2022; Dao 2023, whose backward pass in two kernels this is). Dropout takes the same entries
as `scores.attend` does.

Letters as in scores.py, T and S filled up to whole tiles; t, s: queries and keys of a tile; R = N / G.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from jaxft.models import flash_tiles, layers
from jaxft.models.flash_tiles import WINDOW, Form
from jaxft.models.scores import Mask, attend

TILES = dict(tpu=(256, 128), gpu=(64,))  # queries, and keys, of a tile: the largest that divides the length
WIDTHS = dict(tpu=1, gpu=16)  # least width of a head that a product takes; on a GPU it is a power of two


def attention(
  q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask: Mask, rate: float, key: jax.Array | None, softcap: float, platform: str, *,
  heads: int = 0, start: tuple[Any, Any] = (0, 0), interpret: bool = False,
) -> jax.Array:  # fmt: skip
  """Returns softmax(q k + bias) v, [B, T, N, H], of what one device has; see `scores.attend`.

  `bias_NTS` is [1, N, T, S] or None. Rows and heads are those from `start` on of all, `heads` in number, which decides
  on what dropout takes. A query without any key gets any number, and should be given no gradient.
  """
  T, N, H, S = *q_BTNH.shape[1:], k_BSGH.shape[1]
  t, s = (_tile(n, platform) for n in (T, S))
  form = Form(
    platform, t, s, (heads or N, T, S), mask.causal, mask.window is not None, softcap, rate if key is not None else 0.0,
    interpret)  # fmt: skip
  fill = lambda x, axes: jnp.pad(x, [(0, -x.shape[a] % axes[a] if a in axes else 0) for a in range(x.ndim)])
  width = max(WIDTHS[platform], pl.next_power_of_2(H)) if platform == "gpu" else H
  q, k, v = (fill(x.swapaxes(1, 2), {2: n, 3: width}) for x, n in ((q_BTNH, t), (k_BSGH, s), (v_BSGH, s)))
  bias = None if bias_NTS is None else fill(bias_NTS, {2: t, 3: s})
  words = jnp.zeros(2, jnp.uint32) if key is None else key
  window = jnp.asarray(0 if mask.window is None else mask.window, jnp.int32)
  place = [jnp.asarray(x, jnp.int32)[None] for x in (window, *start)]
  about = dict(
    numbers=jnp.concatenate([place[0], lax.bitcast_convert_type(words, jnp.int32), *place[1:]]),
    query=fill(mask.query, {1: t})[:, :, None],
    key=fill(mask.key, {1: s})[:, None],
    prefix=None if mask.prefix is None else fill(mask.prefix, {1: s})[:, None],
  )
  about |= _ranges(form, about)
  return _flash(form, q, k, v, bias, about)[:, :, :T, :H].swapaxes(1, 2)


def _tile(length: int, platform: str) -> int:
  sizes = TILES[platform]
  whole = -(-length // sizes[-1]) * sizes[-1]
  return next(n for n in sizes if whole % n == 0)


def _ranges(form: Form, about: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns i32[2, B, T / t] and i32[2, B, S / s]: the tiles of keys [first, end) that a tile of queries may see any
  of, and those of queries that may see any of a tile of keys."""
  t, s = form.t, form.s
  query, key = about["query"][:, :, 0], about["key"][:, 0]
  tiles = lambda x, n: x.reshape(x.shape[0], -1, n)
  least = lambda x: jnp.min(jnp.where(x > 0, x, np.iinfo(np.int32).max), -1)
  most = lambda x: jnp.max(x, -1)
  q, k = tiles(query, t), tiles(key, s)
  meet = (least(q)[:, :, None] <= most(k)[:, None]) & (least(k)[:, None] <= most(q)[:, :, None])
  q_first, k_first = (np.arange(x.shape[1]) * n for x, n in ((q, t), (k, s)))
  nearest = q_first[:, None] - (k_first + s - 1)[None]  # the least distance of a query after a key
  farthest = (q_first + t - 1)[:, None] - k_first[None]
  window = about["numbers"][WINDOW]
  if form.causal and about["prefix"] is None:
    meet &= farthest >= 0
  if form.windowed:
    meet &= nearest < window if form.causal else (nearest <= window) & (farthest >= -window)

  def span(x):
    some = jnp.any(x, -1)
    end = x.shape[-1] - jnp.argmax(x[..., ::-1], -1)
    return jnp.stack([jnp.where(some, jnp.argmax(x, -1), 0), jnp.where(some, end, 0)]).astype(jnp.int32)

  return dict(keys=span(meet), queries=span(meet.swapaxes(1, 2)))


def check(platform: str, *, interpret: bool = False) -> float:
  """Returns the largest difference between this and `scores.attend`, of the output and of all gradients, on a case with
  everything in it: packed rows, heads that share keys, causal, a bias, dropout. bfloat16 alone makes it about 0.01."""
  rng = np.random.default_rng(0)
  shapes = (2, 150, 4, 64), (2, 150, 2, 64), (2, 150, 2, 64), (1, 4, 150, 150), (2, 150, 4, 64)
  q, k, v, bias, g = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
  segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 2]], [40, 50, 45, 15], 1), jnp.int32)
  mask, words = Mask(segments, segments, causal=True), jnp.array([3, 5], jnp.uint32)
  told = (mask, 0.1, words, 0.0)
  ways = (
    lambda *x: jnp.where(mask.sees()[..., None, None], attention(*x, *told, platform, interpret=interpret), 0),
    lambda *x: attend(*(y.astype(jnp.float32) for y in x), *told),
  )

  def both(way, g, *x):
    out, pull = jax.vjp(way, *x)
    return [out, *pull(g.astype(out.dtype))]

  found, want = (jax.jit(functools.partial(both, way))(g, q / 8, k, v, bias) for way in ways)
  off = lambda a, b: jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))
  return float(jnp.max(jnp.stack([off(a, b.astype(jnp.float32)) for a, b in zip(found, want)])))


# ---- the two passes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(form, q_BNTH, k_BGSH, v_BGSH, bias_NTS, about):
  return _forward(form, q_BNTH, k_BGSH, v_BGSH, bias_NTS, about)[0]


def _forward(form, q, k, v, bias, about):
  B, N, T, H = q.shape
  ins = _by_queries(form, q, k, v, bias, about)
  outs = dict(out=(jax.ShapeDtypeStruct(q.shape, q.dtype), ins["q"][1]), log_total=_line(form, B, N, T))
  out, log_total = _call(form, flash_tiles.forward, (B, N, T // form.t), ins, outs)
  out, log_total = (checkpoint_name(x, layers.KEPT) for x in (out, log_total))
  return out, (q, k, v, bias, about, out, log_total)


def _backward(form, kept, g):
  q, k, v, bias, about, out, log_total = kept
  (B, N, T, H), (G, S) = q.shape, k.shape[1:3]
  delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1)[:, :, None]
  line = _line(form, B, N, T)[1]
  ins = _by_queries(form, q, k, v, bias, about)
  more = dict(g=(g, ins["q"][1]), log_total=(log_total, line), delta=(delta, line))
  of_q = _call(form, flash_tiles.of_queries, (B, N, T // form.t), ins | more, dict(out=(q, ins["q"][1])))[0]
  ins = _by_keys(form, q, k, v, bias, about) | dict(zip(more, _whole((g, log_total, delta))))
  one = jax.ShapeDtypeStruct((B, N, S, H), k.dtype if N == G else jnp.float32)
  out = (one, ((None, None, form.s, H), lambda b, n, j: (b, n, j, 0)))
  of_kv = _call(form, flash_tiles.of_keys, (B, N, S // form.s), ins, dict(of_k=out, of_v=out))
  of_k, of_v = (x.reshape(B, G, N // G, S, H).sum(2).astype(k.dtype) if N != G else x for x in of_kv)
  of_bias = None
  if bias is not None:
    of_bias = _of_bias(form, q, k, v, bias, about, g, log_total, delta).astype(bias.dtype)
  return of_q, of_k, of_v, of_bias, None


_flash.defvjp(_forward, _backward)


def _of_bias(form, q, k, v, bias, about, g, log_total, delta) -> jax.Array:
  """Returns float32 [1, N, T, S]: the gradient of the bias, the sum over all rows. On a TPU the rows are programs, one
  after the other, on a GPU a loop."""
  (B, N, T, H), R, (t, s) = q.shape, q.shape[1] // k.shape[1], (form.t, form.s)
  one = form.platform == "tpu"
  spec = lambda shape, place: ((None if one else B, *shape), lambda n, i, j, b=0: (b, *place(n, i, j)))
  ins = dict(
    numbers=(about["numbers"], None),
    q=(q, spec((None, t, H), lambda n, i, j: (n, i, 0))),
    k=(k, spec((None, s, H), lambda n, i, j: (n // R, j, 0))),
    v=(v, spec((None, s, H), lambda n, i, j: (n // R, j, 0))),
    bias=(bias, ((None, None, t, s), lambda n, i, j, b=0: (0, n, i, j))),
    query=(about["query"], spec((t, 1), lambda n, i, j: (i, 0))),
    key=(about["key"], spec((1, s), lambda n, i, j: (0, j))),
    prefix=(about["prefix"], spec((1, s), lambda n, i, j: (0, j))),
    g=(g, spec((None, t, H), lambda n, i, j: (n, i, 0))),
    log_total=(log_total, spec((None, 1, t), lambda n, i, j: (n, 0, i))),
    delta=(delta, spec((None, 1, t), lambda n, i, j: (n, 0, i))),
  )
  out = ((None, None, t, s), lambda n, i, j, b=0: (0, n, i, j))
  grid = (N, T // t, bias.shape[3] // s, *((B,) if one else ()))
  kernel = functools.partial(flash_tiles.of_bias, rows=B)
  return _call(form, kernel, grid, ins, dict(out=(jax.ShapeDtypeStruct(bias.shape, jnp.float32), out)), plain=True)[0]


# ---- programs


def _call(form: Form, kernel: Callable, grid: tuple, ins: Mapping, outs: Mapping, *, plain: bool = False) -> list:
  """Runs kernel(form, refs, row, head, tile) for each of `grid`, or kernel(form, refs, *grid) if `plain`.

  `ins` and `outs` are {name: (array or its shape, BlockSpec, or None for a small array that is read by numbers)}. On a
  GPU, the programs of one head and row are neighbours, then those of one head.
  """
  from jax.experimental.pallas import tpu, triton

  on_gpu = form.platform == "gpu"
  turned = on_gpu and not plain
  ins = {name: x for name, x in ins.items() if x[0] is not None}
  numbers = pl.BlockSpec() if on_gpu or form.interpret else pl.BlockSpec(memory_space=tpu.SMEM)
  turn = lambda f: (lambda i, b, n: f(b, n, i)) if turned else f
  spec = lambda x: numbers if x is None else pl.BlockSpec(x[0], turn(x[1]))

  def run(*refs):
    ids = [pl.program_id(a) for a in range(len(grid))]
    at = (*ids[1:], ids[0]) if turned else ids
    kernel(form, types.SimpleNamespace(**(dict.fromkeys(("bias", "prefix")) | dict(zip((*ins, *outs), refs)))), *at)

  if on_gpu:
    params = triton.CompilerParams(num_warps=4, num_stages=2)
  else:
    params = tpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3))
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs.values()]
  made = pl.pallas_call(
    run, grid=(grid[2], *grid[:2]) if turned else grid, in_specs=[spec(x) for _, x in ins.values()],
    out_specs=[spec(x) for _, x in outs.values()], out_shape=shapes, interpret=form.interpret, compiler_params=params,
    name=f"flash_{getattr(kernel, 'func', kernel).__name__}")  # fmt: skip
  return made(*(x for x, _ in ins.values()))


def _whole(arrays: tuple) -> list[tuple]:
  """Gives each [B, N, ., .] with all there is of a row and head."""
  return [(x, ((None, None, *x.shape[2:]), lambda b, n, i: (b, n, 0, 0))) for x in arrays]


def _line(form: Form, B: int, N: int, T: int) -> tuple:
  """A number a query. It lies along the lanes of a TPU, where a column would take 128 times the memory."""
  one = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
  return one, ((None, None, 1, form.t), lambda b, n, i: (b, n, 0, i))


def _by_queries(form: Form, q, k, v, bias, about) -> dict:
  (_, N, _, H), (G, S) = q.shape, k.shape[1:3]
  keys = ((None, None, S, H), lambda b, n, i: (b, n // (N // G), 0, 0))
  row = ((None, 1, S), lambda b, n, i: (b, 0, 0))
  return dict(
    numbers=(about["numbers"], None),
    range=(about["keys"], None),
    q=(q, ((None, None, form.t, H), lambda b, n, i: (b, n, i, 0))),
    k=(k, keys),
    v=(v, keys),
    bias=(bias, ((None, None, form.t, S), lambda b, n, i: (0, n, i, 0))),
    query=(about["query"], ((None, form.t, 1), lambda b, n, i: (b, i, 0))),
    key=(about["key"], row),
    prefix=(about["prefix"], row),
  )


def _by_keys(form: Form, q, k, v, bias, about) -> dict:
  (_, N, T, H), G = q.shape, k.shape[1]
  keys = ((None, None, form.s, H), lambda b, n, j: (b, n // (N // G), j, 0))
  row = ((None, 1, form.s), lambda b, n, j: (b, 0, j))
  return dict(
    numbers=(about["numbers"], None),
    range=(about["queries"], None),
    q=_whole((q,))[0],
    k=(k, keys),
    v=(v, keys),
    bias=(bias, ((None, None, T, form.s), lambda b, n, j: (0, n, 0, j))),
    query=(about["query"], ((None, T, 1), lambda b, n, j: (b, 0, 0))),
    key=(about["key"], row),
    prefix=(about["prefix"], row),
  )
