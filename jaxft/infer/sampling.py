"""From logits to the next token: constraints that hold for every strategy, then temperature, top-k, top-p and the draw.

Shapes: B batch rows, K sequences a row, V vocabulary, L most new tokens, n tokens generated so far (a traced scalar).
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.infer.options import Options


def constrain(
  scores_BKV: jax.Array, tokens_BKL: jax.Array, n: jax.Array, before_BT: jax.Array, o: Options
) -> jax.Array:
  """Returns f32 scores with barred tokens at -inf; the order is that of transformers' logits processors.

  `tokens_BKL` holds what was generated before position `n`, `before_BT` what stood before that (a decoder's prompt, or
  the first token of an encoder-decoder), aligned to the right and filled with -1. Scores may be logits or
  log-probabilities, as there: the repetition penalty (Keskar et al. 2019, section 4.1) depends on which.
  """
  V = scores_BKV.shape[-1]
  if o.repetition_penalty != 1.0:
    all_BKX = jnp.concatenate([_beams(before_BT, tokens_BKL), tokens_BKL], -1)
    seen_BKV = _mark(all_BKX, jnp.arange(all_BKX.shape[-1]) < n + before_BT.shape[1], V)
    p = o.repetition_penalty
    scores_BKV = jnp.where(seen_BKV, jnp.where(scores_BKV < 0, scores_BKV * p, scores_BKV / p), scores_BKV)
  if o.no_repeat_ngram:
    scores_BKV = jnp.where(_repeats(tokens_BKL, n, before_BT, V, o), -jnp.inf, scores_BKV)
  if o.min_length:
    scores_BKV = jnp.where(_only(o.eos, V) & (n < o.min_length), -jnp.inf, scores_BKV)
  if o.forced_bos is not None:
    scores_BKV = jnp.where(n == 0, jnp.where(_only((o.forced_bos,), V), 0.0, -jnp.inf), scores_BKV)
  if o.forced_eos:
    scores_BKV = jnp.where(n == o.length - 1, jnp.where(_only(o.forced_eos, V), 0.0, -jnp.inf), scores_BKV)
  if o.suppress:
    scores_BKV = jnp.where(_only(o.suppress, V), -jnp.inf, scores_BKV)
  if o.begin_suppress:
    first = 0 if o.forced_bos is None else 1
    scores_BKV = jnp.where(_only(o.begin_suppress, V) & (n == first), -jnp.inf, scores_BKV)
  return scores_BKV


def _only(ids: Sequence[int], V: int) -> np.ndarray:
  """Returns bool [V]; ids outside the vocabulary mark nothing (old files say [-1] for "none")."""
  return np.isin(np.arange(V), np.asarray(ids, int))


def _beams(before_BT: jax.Array, tokens_BKL: jax.Array) -> jax.Array:
  return jnp.broadcast_to(before_BT[:, None], (*tokens_BKL.shape[:2], before_BT.shape[1]))


def _mark(tokens_BKL: jax.Array, where_BKL: jax.Array, V: int) -> jax.Array:
  """Returns bool [B,K,V]: the tokens at the positions chosen by `where_BKL`, which broadcasts; -1 marks nothing."""
  mark = lambda tokens, where: jnp.zeros(V, bool).at[jnp.where(where & (tokens >= 0), tokens, V)].set(True, mode="drop")
  return jax.vmap(jax.vmap(mark))(tokens_BKL, jnp.broadcast_to(where_BKL, tokens_BKL.shape))


def _repeats(tokens_BKL: jax.Array, n: jax.Array, before_BT: jax.Array, V: int, o: Options) -> jax.Array:
  """Returns bool [B,K,V]: tokens that would repeat an n-gram (size o.no_repeat_ngram) of all that stands before."""
  size, T = o.no_repeat_ngram, before_BT.shape[1]
  all_ = jnp.concatenate([_beams(before_BT, tokens_BKL), tokens_BKL], -1)  # what transformers calls input_ids
  if all_.shape[-1] < size:
    return jnp.zeros((*tokens_BKL.shape[:2], V), bool)
  grams = all_.shape[-1] - size + 1
  same = jnp.arange(grams) + size <= n + T  # the whole n-gram lies in the past, whose length is n + T
  for i in range(size - 1):  # entry j of the last size - 1 tokens stands at n + T - (size - 1) + j
    last = jax.lax.dynamic_index_in_dim(all_, jnp.maximum(n + T + 1 - size + i, 0), axis=-1, keepdims=True)
    same = same & (all_[..., i : i + grams] == last)
  return _mark(all_[..., size - 1 :], same, V)


def warp(logits_BKV: jax.Array, o: Options) -> jax.Array:
  """Returns f32 logits after temperature, then top-k, then top-p (nucleus; Holtzman et al. 2020), dropped ones at -inf.

  Top-k keeps what ties with the k-th logit. Top-p keeps the fewest largest tokens whose probabilities reach p, at least
  one, and what ties with the last of them.
  """
  x = logits_BKV / o.temperature
  if 0 < o.top_k < x.shape[-1]:
    x = jnp.where(x < jax.lax.top_k(x, o.top_k)[0][..., -1:], -jnp.inf, x)
  if o.top_p < 1:
    falling = -jnp.sort(-x, axis=-1)
    probs = jax.nn.softmax(falling, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < o.top_p  # the mass before this token is still short of p
    x = jnp.where(x < jnp.min(falling, axis=-1, keepdims=True, where=kept, initial=jnp.inf), -jnp.inf, x)
  return x


def row_keys(seed: int, ids: Sequence[object]) -> np.ndarray:
  """Returns u32 [B, 2]: one key a row that depends on the seed and the row's id and on nothing else.

  An id is named by its `repr`, so that 1 and "1" differ; the hash is blake2b, the same on every machine and run.
  """
  digest = lambda i: hashlib.blake2b(f"{seed}\0{i!r}".encode(), digest_size=8).digest()
  return np.frombuffer(b"".join(digest(i) for i in ids), "<u4").reshape(len(ids), 2).astype(np.uint32)


def draw(logits_BKV: jax.Array, keys_B2: jax.Array, n: jax.Array) -> jax.Array:
  """Returns i32 [B,K] drawn from softmax(logits); the noise is a function of (row key, sample k, position n) alone."""
  K = logits_BKV.shape[1]

  def one(key_2, k, logits_V):
    key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
    return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, k), n), logits_V)

  row = jax.vmap(one, in_axes=(None, 0, 0))
  return jax.vmap(row, in_axes=(0, None, 0))(keys_B2, jnp.arange(K), logits_BKV).astype(jnp.int32)
