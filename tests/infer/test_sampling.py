"""Sampling: the filters against numpy, the distribution of the draw, and that a row's draw depends on itself alone.

Catches: top-k or top-p off by one token, filters before the temperature, noise shared between rows, samples or
positions, noise that depends on the place in the batch, scores of the warped in place of the model's distribution.
"""

import jax
import numpy as np
import pytest
import tiny

from jaxft.errors import InputError
from jaxft.infer import generate, options, sampling

BASE = dict(length=4, eos=(1,), pad=0, start=0)


def by_hand(row, temperature, k, p):
  """The same filters in a loop: temperature, then the k largest, then the fewest largest that reach p."""
  x = row.astype(np.float64) / temperature
  order = sorted(range(len(x)), key=lambda i: -x[i])[: k or len(x)]
  probs = np.exp(x[order] - x[order[0]])
  probs /= probs.sum()
  kept, mass = [], 0.0
  for i, q in zip(order, probs):
    if mass < p:
      kept.append(i)
    mass += q
  return set(kept)


@pytest.mark.parametrize(
  "temperature,k,p",
  [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.3, 0, 0.83), (0.6, 6, 0.9), (1.0, 1, 1.0), (1.0, 0, 1e-6), (1.0, 99, 0.999)],
)
def test_filters(temperature, k, p):
  logits = np.random.default_rng(3).standard_normal((4, 3, 23)).astype(np.float32) * 2
  out = np.asarray(sampling.warp(logits, options.Options(**BASE, temperature=temperature, top_k=k, top_p=p)))
  for b in range(4):
    for j in range(3):
      kept = by_hand(logits[b, j], temperature, k, p)
      assert set(np.flatnonzero(np.isfinite(out[b, j]))) == kept
      np.testing.assert_allclose(out[b, j][sorted(kept)], logits[b, j][sorted(kept)] / temperature, rtol=1e-6)


def test_distribution():
  """Chi-square over rows and over samples: 8 categories, so above 24.3 one time in 1000."""
  logits = np.log(np.array([0.05, 0.3, 0.1, 0.02, 0.08, 0.25, 0.15, 0.05], np.float32))
  n = 4000
  over_rows = sampling.draw(np.tile(logits, (n, 1, 1)), sampling.row_keys(7, range(n)), 3)
  over_samples = sampling.draw(np.tile(logits, (1, n, 1)), sampling.row_keys(7, ["x"]), 3)
  over_places = jax.vmap(lambda i: sampling.draw(logits[None, None], sampling.row_keys(7, ["x"]), i))(np.arange(n))
  for drawn in (over_rows, over_samples, over_places):
    found = np.bincount(np.asarray(drawn).reshape(-1), minlength=8)
    assert ((found - n * np.exp(logits)) ** 2 / (n * np.exp(logits))).sum() < 24.3


def test_keys():
  keys = sampling.row_keys(5, [1, "1", 2, "a b"])
  assert len({tuple(k) for k in keys.tolist()}) == 4
  np.testing.assert_array_equal(keys[2:3], sampling.row_keys(5, [2]))
  assert (sampling.row_keys(6, [2]) != keys[2:3]).any()


def test_a_draw_depends_on_its_own_row_alone():
  sk = tiny.skeleton()
  params = tiny.params(sk.shapes)
  ids, segments = tiny.inputs()
  o = options.Options(length=tiny.LENGTH, eos=(1,), pad=0, start=0, temperature=0.9, top_k=9, top_p=0.95, samples=3)
  run = jax.jit(lambda p, i, s, k: generate.generate(sk.bind(p), i, s, k, o), compiler_options=tiny.FAST)
  names = [f"row {i}" for i in range(tiny.ROWS)]
  all_ = jax.device_get(run(params, ids, segments, sampling.row_keys(3, names)))
  order = [7, 2, 16]
  some = jax.device_get(run(params, ids[order], segments[order], sampling.row_keys(3, [names[i] for i in order])))
  np.testing.assert_array_equal(some.tokens_BRL, all_.tokens_BRL[order])
  other = jax.device_get(run(params, ids[order], segments[order], sampling.row_keys(4, [names[i] for i in order])))
  assert (other.tokens_BRL != some.tokens_BRL).any(axis=-1).mean() > 0.6
  assert (all_.tokens_BRL[:, 0] != all_.tokens_BRL[:, 1]).any(axis=-1).mean() > 0.6
  again = model_scores(sk, params, ids, segments, all_)
  np.testing.assert_allclose(all_.scores_BR, again, rtol=1e-4, atol=1e-5)


def model_scores(sk, params, ids, segments, out):
  """Mean log-probability of the drawn tokens under the model itself, by the teacher-forced pass."""
  forward = jax.jit(
    lambda p, b: (lambda m: jax.nn.log_softmax(m.logits(m.hidden(b, None))))(sk.bind(p)), compiler_options=tiny.FAST
  )
  scores = []
  for r in range(out.tokens_BRL.shape[1]):
    tokens, inside = out.tokens_BRL[:, r], np.arange(tiny.LENGTH) < out.lengths_BR[:, r, None]
    batch = dict(inputs=ids, input_segments=segments, targets=tokens, target_segments=inside.astype(np.int32))
    logp = np.asarray(forward(params, batch))
    picked = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    scores.append((picked * inside).sum(1) / inside.sum(1))
  return np.stack(scores, 1)


GENERATION = dict(decoder_start=0, eos=(1,), pad=0, vocab=41)


def test_options_are_read():
  theirs = dict(
    max_length=21,
    min_length=5,
    num_beams=4,
    length_penalty=2.0,
    early_stopping=True,
    eos_token_id=[1, 7],
    forced_bos_token_id=3,
    suppress_tokens=[9],
    no_repeat_ngram_size=3,
    temperature=0.5,
    transformers_version="5.23.0",
  )
  o = options.read(GENERATION, theirs)
  assert (o.length, o.min_length, o.beams, o.length_penalty, o.early_stopping, o.eos) == (20, 4, 4, 2.0, True, (1, 7))
  assert (o.forced_bos, o.suppress, o.no_repeat_ngram, o.temperature) == (3, (9,), 3, 0.0)
  assert options.read(GENERATION, theirs, length=9, beams=1).beams == 1
  sampled = options.read(GENERATION, dict(do_sample=True, temperature=0.6, top_p=0.9), length=8)
  assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.9, 0)
  assert options.read(GENERATION, dict(do_sample=True, temperature=0.6), length=8, temperature=0.0).temperature == 0


def test_new_tokens_go_before_lengths():
  """min_new_tokens before min_length and max_new_tokens before max_length, as in transformers, also where smaller."""
  both = dict(min_new_tokens=2, min_length=9, max_new_tokens=5, max_length=30)
  o = options.read(GENERATION, both)
  assert (o.min_length, o.length) == (2, 5)
  assert options.read(GENERATION, dict(both, min_new_tokens=0)).min_length == 0


def test_what_is_off_or_harmless_passes_without_a_word(caplog):
  theirs = dict(
    bad_words_ids=[],
    sequence_bias={},
    stop_strings=[],
    force_words_ids=[],
    suppress_tokens=[],
    low_memory=True,
    speculation_type="dflash",
    continuous_batching_config={"block_size": 16},
    assistant_ensemble_weight=0.5,
  )
  assert options.read(GENERATION, theirs, length=4) == options.Options(**BASE)
  assert not caplog.records


def test_bad_words_of_one_token_are_suppressed():
  """Save the end token, which transformers never bars so."""
  theirs = dict(bad_words_ids=[[40], [1], [7]], suppress_tokens=[9])
  assert options.read(GENERATION, theirs, length=4).suppress == (9, 40, 7)


def test_ids_outside_the_vocabulary_bar_nothing():
  """Old files say suppress_tokens [-1] for "none"; the last entry is not meant."""
  o = options.Options(**BASE, suppress=(-1, 5, 99), begin_suppress=(-2,))
  nothing = (np.zeros((1, 1, 4), np.int32), np.int32(0), np.zeros((1, 1), np.int32))
  out = sampling.constrain(np.zeros((1, 1, 8), np.float32), *nothing, o)
  assert np.flatnonzero(np.isneginf(out)).tolist() == [5]


@pytest.mark.parametrize(
  "config,given,message",
  [
    (None, {}, "set max_new_tokens"),
    (dict(bad_words_ids=[[3], [5, 6]]), dict(length=5), r"bad_words_ids .*one token .\[5, 6\].*not implemented"),
    (dict(bad_words_ids=[3]), dict(length=5), r"bad_words_ids=\[3\] .it is a list of lists"),
    (dict(do_sample=True, typical_p=0.9), dict(length=5), "typical_p=0.9"),
    (None, dict(length=5, beams=2, temperature=1.0), "beam sampling"),
    (None, dict(length=5, top_k=3), "temperature above 0"),
    (None, dict(length=5, beams=2, samples=3), "more than the 2 beams"),
    (None, dict(length=5, temperature=-1.0), "temperature is -1"),
    (None, dict(length=0), "max_new_tokens is 0"),
    (dict(decoder_start_token_id=[0, 1]), dict(length=5), r"decoder_start_token_id=\[0, 1\] .it is a whole number"),
    (dict(num_beams="4", top_p="1", suppress_tokens=[[3]]), dict(length=5), "num_beams='4'.*top_p='1'.*suppress"),
    (dict(suppress_tokens=[3, 1, 7], forced_eos_token_id=[1, 3]), dict(length=5), "forced_eos_token_id .1, 3. is"),
    (dict(suppress_tokens=[3], forced_bos_token_id=3), dict(length=5), "forced_bos_token_id 3 is among"),
  ],
)
def test_options_are_refused(config, given, message):
  with pytest.raises(InputError, match=message):
    options.read(GENERATION, config, **given)


def test_no_end_token_is_refused():
  with pytest.raises(InputError, match="no end token"):
    options.read(dict(GENERATION, eos=()), None, length=5)


def test_forcing_what_is_partly_suppressed_is_allowed():
  assert options.read(GENERATION, dict(suppress_tokens=[3], forced_eos_token_id=[1, 3]), length=5).forced_eos == (1, 3)
