"""What a program of flash attention does, tile by tile: see flash.py. Letters as there.

The same code is lowered by Mosaic for TPUs and by Triton for GPUs, so it keeps to what both have.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxft.models import layers
from jaxft.models.layers import MASKED, cap

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


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
  # said here and not left to jax_default_matmul_precision, which float32 models raise: Mosaic has no exact product of
  # bfloat16 ("Bad lhs type")
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  how = dict(precision=exact, preferred_element_type=jnp.float32)
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), **how)


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


def forward(form: Form, r: types.SimpleNamespace, row, head, i):
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


def of_queries(form: Form, r: types.SimpleNamespace, row, head, i):
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


def of_keys(form: Form, r: types.SimpleNamespace, row, head, j):
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


def of_bias(form: Form, r: types.SimpleNamespace, head, i, j, row=None, *, rows: int):
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
