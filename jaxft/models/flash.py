"""Flash attention of our own, in Pallas: what JAX's kernels refuse, on TPUs (Mosaic) and NVIDIA GPUs (Triton).

A bias with its gradient, dropout by hash, segments, causal and prefix masks, windows that differ by layer, a cap, heads
that share keys. A program takes a tile of queries past the tiles of keys that any of them may see, and keeps sums in
place of scores (Dao et al. 2022; Dao 2023, whose backward pass in two kernels this is). Dropout takes the same entries
as `scores.attend` does.

Letters as in scores.py, T and S filled up to whole tiles; t, s: queries and keys of a tile; R = N / G.
"""

import dataclasses
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

from jaxft.models import layers
from jaxft.models.scores import MASKED, Mask, attend, cap

TILES = dict(tpu=(256, 128), gpu=(64,))  # queries, and keys, of a tile: the largest that divides the length
WIDTHS = dict(tpu=1, gpu=16)  # least width of a head that a product takes; on a GPU it is a power of two
WINDOW, WORDS, ROW, HEAD = 0, 1, 3, 4  # places in `numbers`


@dataclasses.dataclass(frozen=True)
class Form:
  """What a program is compiled for."""

  platform: str  # tpu or gpu
  t: int
  s: int
  shape: tuple[int, int, int]  # heads of all devices, queries and keys before they were filled up
  causal: bool
  windowed: bool
  softcap: float
  rate: float
  interpret: bool


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
  out, log_total = _call(form, _forward_kernel, (B, N, T // form.t), ins, outs)
  out, log_total = (checkpoint_name(x, layers.KEPT) for x in (out, log_total))
  return out, (q, k, v, bias, about, out, log_total)


def _backward(form, kept, g):
  q, k, v, bias, about, out, log_total = kept
  (B, N, T, H), (G, S) = q.shape, k.shape[1:3]
  delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1)[:, :, None]
  line = _line(form, B, N, T)[1]
  ins = _by_queries(form, q, k, v, bias, about)
  more = dict(g=(g, ins["q"][1]), log_total=(log_total, line), delta=(delta, line))
  of_q = _call(form, _query_kernel, (B, N, T // form.t), ins | more, dict(out=(q, ins["q"][1])))[0]
  ins = _by_keys(form, q, k, v, bias, about) | dict(zip(more, _whole((g, log_total, delta))))
  one = jax.ShapeDtypeStruct((B, N, S, H), k.dtype if N == G else jnp.float32)
  out = (one, _spec((None, None, form.s, H), lambda b, n, j: (b, n, j, 0)))
  of_kv = _call(form, _key_kernel, (B, N, S // form.s), ins, dict(of_k=out, of_v=out))
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
  spec = lambda shape, place: _spec((None if one else B, *shape), lambda n, i, j, b=0: (b, *place(n, i, j)))
  ins = dict(
    numbers=(about["numbers"], None),
    q=(q, spec((None, t, H), lambda n, i, j: (n, i, 0))),
    k=(k, spec((None, s, H), lambda n, i, j: (n // R, j, 0))),
    v=(v, spec((None, s, H), lambda n, i, j: (n // R, j, 0))),
    bias=(bias, _spec((None, None, t, s), lambda n, i, j, b=0: (0, n, i, j))),
    query=(about["query"], spec((t, 1), lambda n, i, j: (i, 0))),
    key=(about["key"], spec((1, s), lambda n, i, j: (0, j))),
    prefix=(about["prefix"], spec((1, s), lambda n, i, j: (0, j))),
    g=(g, spec((None, t, H), lambda n, i, j: (n, i, 0))),
    log_total=(log_total, spec((None, 1, t), lambda n, i, j: (n, 0, i))),
    delta=(delta, spec((None, 1, t), lambda n, i, j: (n, 0, i))),
  )
  out = _spec((None, None, t, s), lambda n, i, j, b=0: (0, n, i, j))
  grid = (N, T // t, bias.shape[3] // s, *((B,) if one else ()))
  kernel = functools.partial(_bias_kernel, rows=B)
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
  made = pl.pallas_call(
    run, grid=(grid[2], *grid[:2]) if turned else grid, in_specs=[spec(x) for _, x in ins.values()],
    out_specs=[spec(x) for _, x in outs.values()], out_shape=[_shape(x) for x, _ in outs.values()],
    interpret=form.interpret, compiler_params=params,
    name=f"flash{getattr(kernel, 'func', kernel).__name__}")  # fmt: skip
  return made(*(x for x, _ in ins.values()))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _spec(shape: tuple, place: Callable) -> tuple:
  return shape, place


def _whole(arrays: tuple) -> list[tuple]:
  """Gives each [B, N, ., .] with all there is of a row and head."""
  return [(x, _spec((None, None, *x.shape[2:]), lambda b, n, i: (b, n, 0, 0))) for x in arrays]


def _line(form: Form, B: int, N: int, T: int) -> tuple:
  """A number a query. It lies along the lanes of a TPU, where a column would take 128 times the memory."""
  one = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
  return one, _spec((None, None, 1, form.t), lambda b, n, i: (b, n, 0, i))


def _by_queries(form: Form, q, k, v, bias, about) -> dict:
  (_, N, _, H), (G, S) = q.shape, k.shape[1:3]
  keys = _spec((None, None, S, H), lambda b, n, i: (b, n // (N // G), 0, 0))
  row = _spec((None, 1, S), lambda b, n, i: (b, 0, 0))
  return dict(
    numbers=(about["numbers"], None),
    range=(about["keys"], None),
    q=(q, _spec((None, None, form.t, H), lambda b, n, i: (b, n, i, 0))),
    k=(k, keys),
    v=(v, keys),
    bias=(bias, _spec((None, None, form.t, S), lambda b, n, i: (0, n, i, 0))),
    query=(about["query"], _spec((None, form.t, 1), lambda b, n, i: (b, i, 0))),
    key=(about["key"], row),
    prefix=(about["prefix"], row),
  )


def _by_keys(form: Form, q, k, v, bias, about) -> dict:
  (_, N, T, H), G = q.shape, k.shape[1]
  keys = _spec((None, None, form.s, H), lambda b, n, j: (b, n // (N // G), j, 0))
  row = _spec((None, 1, form.s), lambda b, n, j: (b, 0, j))
  return dict(
    numbers=(about["numbers"], None),
    range=(about["queries"], None),
    q=_whole((q,))[0],
    k=(k, keys),
    v=(v, keys),
    bias=(bias, _spec((None, None, T, form.s), lambda b, n, j: (0, n, 0, j))),
    query=(about["query"], _spec((None, T, 1), lambda b, n, j: (b, 0, 0))),
    key=(about["key"], row),
    prefix=(about["prefix"], row),
  )


# ---- what a program does


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(form: Form, numbers, q, k, bias, query, key, prefix, row, head, i, j) -> tuple:
  """Returns float32 [t, s]: the scores of a tile, MASKED where they do not count; those before cap, bias and mask; and
  bool [t, s], what dropout leaves, or None."""
  raw = _dot(q, k, 1, 1)
  scores = cap(raw, form.softcap)
  if bias is not None:
    scores += bias.astype(jnp.float32)
  at = [first + lax.broadcasted_iota(jnp.int32, raw.shape, a) for a, first in enumerate((i * form.t, j * form.s))]
  distance = at[0] - at[1]
  seen = (query == key) & (key > 0)
  if form.causal:
    seen &= (distance >= 0) if prefix is None else (distance >= 0) | (prefix != 0)
  if form.windowed:
    seen &= distance < numbers[WINDOW] if form.causal else jnp.abs(distance) <= numbers[WINDOW]
  keep = None
  if form.rate:
    N, T, S = form.shape
    place = (((numbers[ROW] + row) * N + numbers[HEAD] + head) * T + at[0]) * S + at[1]
    words = [numbers[WORDS + n].astype(jnp.uint32) for n in range(2)]
    keep = layers.hash_at(place.astype(jnp.uint32), *words) >= jnp.uint32(round(form.rate * 2**32))
  return jnp.where(seen, scores, MASKED), raw, keep


def _forward_kernel(form: Form, r: types.SimpleNamespace, row, head, i):
  q, query, s = r.q[...], r.query[...], form.s

  def body(j, carry):
    out, most, total = carry
    at = pl.ds(pl.multiple_of(j * s, s), s)
    bias, prefix = (x if x is None else x[:, at] for x in (r.bias, r.prefix))
    scores, _, keep = _scores(form, r.numbers, q, r.k[at, :], bias, query, r.key[:, at], prefix, row, head, i, j)
    now = jnp.maximum(most, jnp.max(scores, 1, keepdims=True))
    shrink, e = jnp.exp(most - now), jnp.exp(scores - now)
    total = total * shrink + jnp.sum(e, 1, keepdims=True)
    e = e if keep is None else jnp.where(keep, e, 0.0)
    return out * shrink + _dot(e.astype(r.v.dtype), r.v[at, :], 1, 0), now, total

  column = jnp.zeros((form.t, 1), jnp.float32)
  start = jnp.zeros(q.shape, jnp.float32), column + MASKED, column
  out, most, total = lax.fori_loop(r.range[0, row, i], r.range[1, row, i], body, start)
  total = jnp.where(total == 0, 1.0, total)  # no key to see
  r.out[...] = (out / (total * (1 - form.rate))).astype(r.out.dtype)
  r.log_total[...] = _turned(most + jnp.log(total))


def _turned(x: jax.Array) -> jax.Array:
  """Returns [1, n] of [n, 1], or the other way round, by operations that both compilers have."""
  n, axis = x.size, int(x.shape[0] == 1)
  eye = lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)
  return jnp.sum(jnp.where(eye, x, 0.0), axis, keepdims=True)


def _of_scores(form: Form, scores, raw, keep, g, v, log_total, delta) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns float32 [t, s]: the gradient of the scores, that of the products, and what weighed the values."""
  probs = jnp.exp(scores - log_total)
  of_probs, used = _dot(g, v, 1, 1), probs
  if keep is not None:
    of_probs, used = (jnp.where(keep, x * (1 / (1 - form.rate)), 0.0) for x in (of_probs, probs))
  of_scores = probs * (of_probs - delta)
  slope = 1 - jnp.square(jnp.tanh(raw / form.softcap)) if form.softcap else 1
  return of_scores, of_scores * slope, used


def _query_kernel(form: Form, r: types.SimpleNamespace, row, head, i):
  q, query, g, s = r.q[...], r.query[...], r.g[...], form.s
  log_total, delta = _turned(r.log_total[...]), _turned(r.delta[...])

  def body(j, of_q):
    at = pl.ds(pl.multiple_of(j * s, s), s)
    k, v = r.k[at, :], r.v[at, :]
    bias, prefix = (x if x is None else x[:, at] for x in (r.bias, r.prefix))
    scores = _scores(form, r.numbers, q, k, bias, query, r.key[:, at], prefix, row, head, i, j)
    of_raw = _of_scores(form, *scores, g, v, log_total, delta)[1]
    return of_q + _dot(of_raw.astype(k.dtype), k, 1, 0)

  start = jnp.zeros(q.shape, jnp.float32)
  r.out[...] = lax.fori_loop(r.range[0, row, i], r.range[1, row, i], body, start).astype(r.out.dtype)


def _key_kernel(form: Form, r: types.SimpleNamespace, row, head, j):
  k, v, key, t = r.k[...], r.v[...], r.key[...], form.t
  prefix = None if r.prefix is None else r.prefix[...]

  def body(i, carry):
    of_k, of_v = carry
    at = pl.ds(pl.multiple_of(i * t, t), t)
    q, g, bias = r.q[at, :], r.g[at, :], None if r.bias is None else r.bias[at, :]
    scores = _scores(form, r.numbers, q, k, bias, r.query[at, :], key, prefix, row, head, i, j)
    log_total, delta = _turned(r.log_total[:, at]), _turned(r.delta[:, at])
    _, of_raw, used = _of_scores(form, *scores, g, v, log_total, delta)
    return of_k + _dot(of_raw.astype(q.dtype), q, 0, 0), of_v + _dot(used.astype(g.dtype), g, 0, 0)

  start = (jnp.zeros(k.shape, jnp.float32),) * 2
  of_k, of_v = lax.fori_loop(r.range[0, row, j], r.range[1, row, j], body, start)
  r.of_k[...], r.of_v[...] = of_k.astype(r.of_k.dtype), of_v.astype(r.of_v.dtype)


def _bias_kernel(form: Form, r: types.SimpleNamespace, head, i, j, row=None, *, rows: int):
  bias = r.bias[...]

  def one(b, of):
    x = types.SimpleNamespace(**{
      n: ref if ref is None else of(ref)
      for n, ref in vars(r).items() if n not in ("numbers", "bias", "out")})  # fmt: skip
    scores = _scores(form, r.numbers, x.q, x.k, bias, x.query, x.key, x.prefix, b, head, i, j)
    return _of_scores(form, *scores, x.g, x.v, _turned(x.log_total), _turned(x.delta))[0]

  if row is None:
    start = jnp.zeros(bias.shape, jnp.float32)
    r.out[...] = lax.fori_loop(0, rows, lambda b, sum_: sum_ + one(b, lambda ref: ref[b]), start)
    return
  found = one(row, lambda ref: ref[...])
  first = row == 0

  @pl.when(first)
  def _():
    r.out[...] = found

  @pl.when(~first)
  def _():
    r.out[...] += found
