"""Greedy search, sampling and beam search on the cache protocol, and the engine that runs them over many rows.

A model has `start(inputs_BT, segments_BT, beams, length) -> (cache, first tokens [B])`, `step(tokens_BK, cache) -> (f32
logits [B,K,V], cache)` and `reorder(cache, parents_BK) -> cache`. Each (rows, input length) is compiled once: the whole
generation is one program.

Shapes: B rows, T input length, K sequences a row that run, R sequences a row that are returned, V vocabulary, L most
new tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import InputError, NumbersError
from jaxft.infer import beam, engine, sampling
from jaxft.infer.options import Options


class Generated(NamedTuple):
  tokens_BRL: jax.Array  # i32, best first; the end token is included, `pad` follows it
  scores_BR: jax.Array  # f32, sum of log-probabilities / length ** length_penalty
  lengths_BR: jax.Array  # i32, tokens with the end token
  cut_BR: jax.Array  # bool, stopped by the length limit and not by an end token


def generate(model, inputs_BT: jax.Array, segments_BT: jax.Array, keys_B2: jax.Array, o: Options) -> Generated:
  """Generates from i32 inputs and segments (0 is padding); traceable, static in `o`; u32 keys from `sampling.row_keys`.

  Rows whose segments are all 0 fill the batch: they are never waited for and hold nothing. Scores of greedy search and
  sampling are those of the model itself, before temperature, top-k, top-p and constraints; those of beams are after the
  constraints, as in transformers. Where transformers pads ended beams with the end token (its `pad_token_id or
  eos_token_id` takes a pad id of 0 for "none"), this pads with `pad`.
  """
  valid_B = jnp.any(segments_BT > 0, axis=1)
  cache, first_B = model.start(inputs_BT, segments_BT, beams=o.width, length=o.length)
  if o.start is None:
    before_BT = _to_the_right(inputs_BT, segments_BT)
  else:  # an encoder-decoder; its generation_config.json may name another first token than its config.json
    before_BT = jnp.full_like(first_B, o.start)[:, None]
  if o.beams > 1:
    tokens_BKL, scores_BK = beam.search(model, cache, before_BT, valid_B, o)
    tokens_BRL, scores_BR = tokens_BKL[:, : o.samples], scores_BK[:, : o.samples]
  else:
    tokens_BRL, scores_BR = _one_by_one(model, cache, before_BT, valid_B, keys_B2, o)
  ends_BRL = jnp.isin(tokens_BRL, np.asarray(o.eos, np.int32))
  ended_BR = jnp.any(ends_BRL, axis=-1)
  lengths_BR = jnp.where(ended_BR, jnp.argmax(ends_BRL, axis=-1) + 1, o.length).astype(jnp.int32)
  tokens_BRL = jnp.where(jnp.arange(o.length) < lengths_BR[..., None], tokens_BRL, o.pad)
  cut_BR = (lengths_BR == o.length) if o.forced_eos else ~ended_BR
  return Generated(tokens_BRL, scores_BR, lengths_BR, cut_BR)


def _to_the_right(inputs_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Returns the prompts aligned to the right, with -1 before them; the last column of an empty row is 0."""
  T = inputs_BT.shape[1]
  place_BT = jnp.arange(T) - (T - jnp.sum(segments_BT > 0, 1, keepdims=True))
  out_BT = jnp.where(place_BT >= 0, jnp.take_along_axis(inputs_BT, jnp.maximum(place_BT, 0), 1), -1)
  return out_BT.at[:, -1].set(jnp.maximum(out_BT[:, -1], 0))


class _State(NamedTuple):
  n: jax.Array  # i32[] tokens generated
  last_BK: jax.Array
  tokens_BKL: jax.Array
  scores_BK: jax.Array  # f32 sums of log-probabilities
  done_BK: jax.Array
  cache: Any


def _one_by_one(model, cache: Any, before_BT, valid_B, keys_B2, o: Options) -> tuple[jax.Array, jax.Array]:
  B, K, L = valid_B.shape[0], o.width, o.length
  ends = np.asarray(o.eos, np.int32)

  def step(s: _State) -> _State:
    raw_BKV, cache = model.step(s.last_BK, s.cache)
    logits_BKV = sampling.constrain(raw_BKV, s.tokens_BKL, s.n, before_BT, o)
    if o.temperature > 0:
      token_BK = sampling.draw(sampling.warp(logits_BKV, o), keys_B2, s.n)
    else:
      token_BK = jnp.argmax(logits_BKV, axis=-1).astype(jnp.int32)
    raw_BK = jnp.take_along_axis(raw_BKV, token_BK[..., None], axis=-1)[..., 0]
    logp_BK = raw_BK - jax.nn.logsumexp(raw_BKV, axis=-1)
    token_BK = jnp.where(s.done_BK, o.pad, token_BK)
    return _State(
      n=s.n + 1,
      last_BK=token_BK,
      tokens_BKL=jax.lax.dynamic_update_index_in_dim(s.tokens_BKL, token_BK, s.n, axis=2),
      scores_BK=s.scores_BK + jnp.where(s.done_BK, 0.0, logp_BK),
      done_BK=s.done_BK | jnp.isin(token_BK, ends),
      cache=cache,
    )

  first = _State(
    n=jnp.int32(0),
    last_BK=jnp.broadcast_to(before_BT[:, -1:], (B, K)),
    tokens_BKL=jnp.full((B, K, L), o.pad, jnp.int32),
    scores_BK=jnp.zeros((B, K), jnp.float32),
    done_BK=jnp.broadcast_to(~valid_B[:, None], (B, K)),
    cache=cache,
  )
  s = jax.lax.while_loop(lambda s: (s.n < L) & ~jnp.all(s.done_BK), step, first)
  ends_BKL = jnp.isin(s.tokens_BKL, ends)
  length_BK = jnp.where(jnp.any(ends_BKL, axis=-1), jnp.argmax(ends_BKL, axis=-1) + 1, L).astype(jnp.float32)
  return s.tokens_BKL, s.scores_BK / length_BK**o.length_penalty


class Answer(NamedTuple):
  """What was generated for one row: `samples` entries in each list, best first."""

  texts: list[str]
  scores: list[float]
  lengths: list[int]  # tokens, with the end token
  cut: list[bool]  # stopped by the length limit

  def record(self, scores: bool) -> dict[str, Any]:
    """Returns the fields of its line in the output of a batch decode."""
    one = (lambda x: x[0]) if len(self.texts) == 1 else list
    if not scores:
      return dict(output=one(self.texts))
    finite = [s if np.isfinite(s) else None for s in self.scores]
    return dict(output=one(self.texts), score=one(finite), cut=one(self.cut))


class Whole(str):
  """A text that has its special tokens already, as chat templates write them; none are added."""


class Generator(engine.Engine):
  """Generates for lists of rows, see `engine.Engine`."""

  def __init__(self, skeleton, tokenizer, options: Options, **where):
    """`where` are batch, mesh and rules of an `engine.Engine`."""
    super().__init__(skeleton, tokenizer, **where)
    self.options = options

  def _traced(self, params, inputs_BT, segments_BT, keys_B2) -> Generated:
    return generate(self.skeleton.bind(params), inputs_BT, segments_BT, keys_B2, self.options)

  def texts(self, params, texts: Sequence[str], *, seed: int = 0, ids: Sequence[object] | None = None) -> list[Answer]:
    """Returns one Answer a text, in order. `ids` (default: positions) and `seed` decide the noise of sampling."""
    return self.tokens(params, self.tokenizer.encode(list(texts)), seed=seed, ids=ids)

  def tokens(
    self, params, rows: Sequence[Sequence[int]], *, seed: int = 0, ids: Sequence[object] | None = None
  ) -> list[Answer]:
    """As `texts`, for rows that are token ids already."""
    answers: list = [None] * len(rows)
    for positions, batch in self.stream(params, rows, seed=seed, ids=ids):
      for p, answer in zip(positions, batch):
        answers[p] = answer
    return answers

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns i32[n] a text; one that is `Whole` gets no special tokens."""
    own = self.tokenizer.encode([t for t in texts if not isinstance(t, Whole)])
    whole = [t for t in texts if isinstance(t, Whole)]
    both = iter(own), iter(self.tokenizer.encode_whole(whole) if whole else ())
    return [np.asarray(next(both[isinstance(t, Whole)]), np.int32) for t in texts]

  def settings(self, seed: int) -> dict[str, Any]:
    """Returns what decides the answers besides weights, tokenizer and rows."""
    out = {f"options.{k}": v for k, v in dataclasses.asdict(self.options).items()}
    return out | (dict(seed=seed) if self.options.temperature > 0 else {})

  def _check(self, rows: Sequence[Sequence[int]], lengths: np.ndarray, ids) -> None:
    largest, vocab = np.fromiter((max(r) for r in rows), np.int64, len(rows)), self.skeleton.generation["vocab"]
    if (largest >= vocab).any():
      raise InputError(
        f"generation: input {ids[int(largest.argmax())]!r} has the token id {largest.max()}, but the model's "
        f"vocabulary has {vocab} entries: this is the tokenizer of another model."
      )
    self._check_positions(lengths, ids)

  def _check_positions(self, lengths: np.ndarray, ids) -> None:
    """Raises InputError where what is read, and by a decoder read and written, has more tokens than positions."""
    most, length = self.skeleton.positions, self.options.length
    if not most or not len(lengths):
      return
    longest = int(lengths.max())
    need = longest + length if self.options.start is None else max(longest, length)
    if need > most:
      raise InputError(
        f"generation: input {ids[int(lengths.argmax())]!r} has {longest} tokens and an answer may have {length}, but "
        f"the model has {most} positions. Shorten the inputs, or lower --max_new_tokens (evals.NAME.length)."
      )

  def _dispatch(self, params, rows, ids, seed: int, size: int) -> Generated:
    T = engine.bucket(max(map(len, rows)))
    inputs_BT, keys_B2 = np.full((size, T), self.options.pad, np.int32), np.zeros((size, 2), np.uint32)
    segments_BT = np.zeros((size, T), np.int32)
    for i, row in enumerate(rows):
      inputs_BT[i, : len(row)], segments_BT[i, : len(row)] = row, 1
    keys_B2[: len(rows)] = sampling.row_keys(seed, ids)
    return self._run(params, inputs_BT, segments_BT, keys_B2)

  def _collect(self, positions: list[int], out: Generated, ids) -> tuple[list[int], list[Answer]]:
    tokens_BRL, scores_BR, lengths_BR, cut_BR = (np.asarray(x)[: len(positions)] for x in out)
    broken = np.isnan(scores_BR).any(axis=1)
    if (
      self.options.beams > 1
    ):  # NaN loses every comparison, so that no sequence ends: the score of an empty place is left
      broken |= scores_BR[:, 0] <= beam.BARRED / 2
    if broken.any():
      bad = [ids[p] for p, b in zip(positions, broken) if b]
      raise NumbersError(
        f"generation: the model's logits are not numbers for {len(bad)} of {len(positions)} inputs, among them "
        f"{bad[:3]}. Try dtype float32; if that does not help, the weights themselves are broken."
      )
    ends = set(self.options.eos)
    flat = [
      [int(t) for t in row[:n] if t not in ends] for rows, ns in zip(tokens_BRL, lengths_BR) for row, n in zip(rows, ns)
    ]
    texts, R = self.tokenizer.decode(flat), scores_BR.shape[1]
    return positions, [
      Answer(texts[i * R : (i + 1) * R], scores_BR[i].tolist(), lengths_BR[i].tolist(), cut_BR[i].tolist())
      for i in range(len(positions))
    ]
