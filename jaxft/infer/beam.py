"""Beam search in one `lax.while_loop`, with the semantics of transformers 5 (generation/utils.py, `_beam_search`).

Two sets of K sequences a row: those that run, and the best that ended. Each step takes the M * K best continuations
(M = 1 + the number of end tokens, at least 2, so that K of them do not end); of those that end only the first K may
enter the second set. Ended sequences compete by summed log-probability / length ** penalty; the length counts the end
token.

Shapes: B rows, K beams, C = M * K candidates, V vocabulary, L most new tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.infer import sampling
from jaxft.infer.options import Options

BARRED = -1e9  # added to a score that must lose; finite, so that a row with nothing else still has an order


class State(NamedTuple):
  n: jax.Array  # i32[] tokens generated
  last_BK: jax.Array  # i32, the tokens to feed next
  tokens_BKL: jax.Array  # i32, running
  scores_BK: jax.Array  # f32, running: sums of log-probabilities
  ended_BKL: jax.Array  # i32
  ended_scores_BK: jax.Array  # f32, length-normalised
  ended_BK: jax.Array  # bool: this place holds an ended sequence
  open_B: jax.Array  # bool: a running sequence may still beat an ended one
  stuck: jax.Array  # bool[]: no candidate of any row can go on
  cache: Any
  before_BT: jax.Array  # i32, what stood before (see sampling.constrain); its last column is fed first


def search(model, cache: Any, before_BT: jax.Array, valid_B: jax.Array, o: Options) -> tuple[jax.Array, jax.Array]:
  """Returns (i32 [B,K,L] tokens, best first, padded with `o.pad` after the end token; f32 [B,K] normalised scores).

  `model` has step and reorder of the cache protocol; `before_BT` is what stood before, see sampling.constrain;
  `valid_B` is False for rows that only fill the batch.
  """
  powers_L = jnp.asarray(np.arange(1, o.length + 1, dtype=np.float64) ** o.length_penalty, jnp.float32)
  final = jax.lax.while_loop(
    lambda s: _goes_on(s, valid_B, o),
    lambda s: _step(model, s, valid_B, powers_L, o),
    _initial(cache, before_BT, valid_B, o),
  )
  return final.ended_BKL, final.ended_scores_BK


def _initial(cache: Any, before_BT: jax.Array, valid_B: jax.Array, o: Options) -> State:
  B, K, L = valid_B.shape[0], o.beams, o.length
  empty = jnp.full((B, K, L), o.pad, jnp.int32)
  first = jnp.where(jnp.arange(K) == 0, 0.0, BARRED)  # all beams are alike at the start: only the first may branch
  return State(
    n=jnp.int32(0),
    last_BK=jnp.broadcast_to(before_BT[:, -1:], (B, K)),
    tokens_BKL=empty,
    scores_BK=jnp.broadcast_to(first.astype(jnp.float32), (B, K)),
    ended_BKL=empty,
    ended_scores_BK=jnp.full((B, K), BARRED, jnp.float32),
    ended_BK=jnp.zeros((B, K), bool),
    open_B=valid_B,
    stuck=jnp.bool_(False),
    cache=cache,
    before_BT=before_BT,
  )


def _goes_on(s: State, valid_B: jax.Array, o: Options) -> jax.Array:
  go = (s.n < o.length) & jnp.any(s.open_B) & ~s.stuck
  if o.early_stopping is True:
    go &= ~jnp.all(s.ended_BK | ~valid_B[:, None])
  return go


def _step(model, s: State, valid_B: jax.Array, powers_L: jax.Array, o: Options) -> State:
  logits_BKV, cache = model.step(s.last_BK, s.cache)
  logp_BKV = sampling.constrain(jax.nn.log_softmax(logits_BKV, axis=-1), s.tokens_BKL, s.n, s.before_BT, o)
  B, K, V = logp_BKV.shape
  C = max(2, 1 + len(o.eos)) * K
  total_BC, index_BC = jax.lax.top_k((logp_BKV + s.scores_BK[..., None]).reshape(B, K * V), C)
  parent_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
  tokens_BCL = _take(s.tokens_BKL, parent_BC)
  tokens_BCL = jnp.where(jnp.arange(o.length) == s.n, token_BC[..., None], tokens_BCL)
  ends_BC = jnp.isin(token_BC, np.asarray(o.eos, np.int32)) | (s.n + 1 >= o.length)

  running_BC = total_BC + jnp.where(ends_BC, BARRED, 0.0)
  scores_BK, pick_BK = jax.lax.top_k(running_BC, K)
  cache = model.reorder(cache, _take(parent_BC, pick_BK))
  ended_BKL, ended_scores_BK, ended_BK = _merge(s, total_BC, tokens_BCL, ends_BC, powers_L, o)
  return State(
    n=s.n + 1,
    last_BK=_take(token_BC, pick_BK),
    tokens_BKL=_take(tokens_BCL, pick_BK),
    scores_BK=scores_BK,
    ended_BKL=ended_BKL,
    ended_scores_BK=ended_scores_BK,
    ended_BK=ended_BK,
    open_B=s.open_B & _may_improve(s.n + 1, scores_BK, ended_scores_BK, ended_BK, powers_L, o),
    stuck=jnp.all(ends_BC | ~valid_B[:, None]),
    cache=cache,
    before_BT=s.before_BT,
  )


def _merge(s: State, total_BC: jax.Array, tokens_BCL: jax.Array, ends_BC: jax.Array, powers_L: jax.Array, o: Options):
  """Returns the K best of the ended sequences and the candidates that end now."""
  enters_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < o.beams)
  scores_BC = total_BC / powers_L[s.n]
  closed_B = ~s.open_B
  if o.early_stopping is True:
    scores_BC += jnp.where(jnp.all(s.ended_BK, axis=1), BARRED, 0.0)[:, None]
  scores_BC += jnp.where(closed_B, BARRED, 0.0)[:, None]
  scores_BC += jnp.where(enters_BC, 0.0, BARRED)
  scores_BK, pick_BK = jax.lax.top_k(jnp.concatenate([s.ended_scores_BK, scores_BC], axis=1), o.beams)
  tokens_BKL = _take(jnp.concatenate([s.ended_BKL, tokens_BCL], axis=1), pick_BK)
  return tokens_BKL, scores_BK, _take(jnp.concatenate([s.ended_BK, enters_BC], axis=1), pick_BK)


def _may_improve(n, scores_BK, ended_scores_BK, ended_BK, powers_L, o: Options) -> jax.Array:
  """Returns bool [B]: the best running score, normalised by its most favourable length, beats the worst ended one.

  That length is the present one (a heuristic, the default) or, with early_stopping "never" and a penalty above 0, L.
  """
  longest = o.early_stopping == "never" and o.length_penalty > 0
  best_B1 = scores_BK[:, :1] / (powers_L[-1] if longest else powers_L[n - 1])
  worst_BK = jnp.where(ended_BK, jnp.min(ended_scores_BK, axis=1, keepdims=True), BARRED)
  return jnp.any(best_B1 > worst_BK, axis=1)


def _take(x: jax.Array, index_BK: jax.Array) -> jax.Array:
  """Returns x[b, index[b, k]] for x of [B, C, ...]."""
  return jnp.take_along_axis(x, index_BK.reshape(*index_BK.shape, *[1] * (x.ndim - 2)), axis=1)
