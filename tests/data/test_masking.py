"""Masked tokens, corrupted spans and pairs of sentences: shares, lengths, and what chance may depend on.

Catches: a hash that is not one, numbers used twice, an example that is masked otherwise in another row, batch or order,
the same masks in every epoch, special tokens masked or put in at random, a word that is masked in part, an example
without a mask; lengths that are off by one at some raw length, a token that is lost or doubled, sentinels in the wrong
order, divisions that are not equally likely, a random sentence of the same document.
"""

import collections
import itertools

import numpy as np
import pytest

from jaxft.data import masking
from jaxft.errors import InputError

MASK, VOCAB, PAD = 4, 1000, 0
SENTINELS = np.arange(32099, 31999, -1)
NAMES = set(SENTINELS.tolist())


def splitmix64(x):
  """One output of Vigna's splitmix64.c, from its text."""
  mask = 2**64 - 1
  z = (x + 0x9E3779B97F4A7C15) & mask
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
  return z ^ (z >> 31)


def test_mix():
  x = np.array([0, 1, 12345, 2**63, 2**64 - 1], np.uint64)
  expected = [splitmix64((int(v) - 0x9E3779B97F4A7C15) % 2**64) for v in x]
  assert masking.mix(x).tolist() == expected and x[1] == 1  # the input stays
  assert splitmix64(0) == 0xE220A8397B1DCDAF  # known from the literature


def test_draw():
  n = 50_000
  a = masking.draw(1, 0, 0, np.zeros(n, int), np.arange(n))
  others = [
    masking.draw(2, 0, 0, np.zeros(n, int), np.arange(n)),
    masking.draw(1, 1, 0, np.zeros(n, int), np.arange(n)),
    masking.draw(1, 0, 1, np.zeros(n, int), np.arange(n)),
    masking.draw(1, -1, 0, np.zeros(n, int), np.arange(n)),
    masking.draw(1, 0, 0, np.arange(n), np.zeros(n, int)),
    masking.draw(1, 0, 0, np.ones(n, int), np.arange(n)),
    masking.draw(1, 2**70 + 5, 0, np.zeros(n, np.int8), np.arange(n, dtype=np.int32)),
  ]
  for x in (a, *others):
    bits = (x[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.011 and len(np.unique(x)) == n
    unit = x.astype(float) / 2**64
    assert abs(np.corrcoef(unit[1:], unit[:-1])[0, 1]) < 0.02
  for x, y in itertools.combinations((a, *others), 2):
    assert abs(np.corrcoef(x.astype(float), y.astype(float))[0, 1]) < 0.022
    assert (x == y).sum() <= 1  # the two of (0, 0)
  assert masking.threshold(0) == 0 and masking.threshold(1) == 2**64 - 1
  counts = np.bincount(masking.below(a, 7), minlength=7)
  assert counts.min() > n / 7 * 0.95 and len(counts) == 7


def batch(lengths, width, order=None):
  """Returns (tokens, ids, places, predictable, words) of examples packed in `order`. What is in an example depends on
  its id alone: [CLS]-like 2 first, 3 last, words of one to three tokens between.
  """
  rows = [[]]
  for i in order if order is not None else range(len(lengths)):
    if len(rows[-1]) + lengths[i] > width:
      rows.append([])
    own = np.random.default_rng(i)
    words = np.repeat(np.arange(lengths[i]), own.integers(1, 4, lengths[i]))[: lengths[i] - 2]
    tokens = own.integers(5, VOCAB, lengths[i] - 2)
    for k, (t, w) in enumerate(zip([2, *tokens, 3], [-1, *words, -1])):
      rows[-1].append((t, i, k, 0 < k < lengths[i] - 1, w))
  full = [[*r, *[(PAD, -1, 0, False, -1)] * (width - len(r))] for r in rows]
  arrays = np.array(full, np.int64).transpose(2, 0, 1)
  return arrays[0].astype(np.int32), arrays[1], arrays[2], arrays[3].astype(bool), arrays[4]


def masked(tokens, ids, places, predictable, words, **given):
  given = dict(mask_id=MASK, vocab=VOCAB, seed=0, epoch=0, special=(0, 1, 2, 3)) | given
  return masking.mlm(tokens, ids, places, predictable, words, **given)


LENGTHS = np.random.default_rng(1).integers(3, 90, 2000)


@pytest.mark.parametrize("whole_word", [False, True])
def test_mlm_shares(whole_word):
  data = batch(LENGTHS, 128)
  tokens, ids, places, predictable, words = data
  before = tokens.copy()
  inputs, weights = masked(*data, whole_word=whole_word)
  assert (tokens == before).all() and inputs.dtype == tokens.dtype and weights.dtype == np.float32
  assert inputs.shape == weights.shape == tokens.shape
  chosen = weights == 1
  assert set(np.unique(weights)) == {0, 1} and not (chosen & ~predictable).any()
  assert (inputs[~chosen] == tokens[~chosen]).all()
  n = predictable.sum()
  units = (
    LENGTHS - 2 if not whole_word else np.array([len(np.unique(words[(ids == i) & predictable])) for i in range(2000)])
  )
  extra = (0.85**units / units * (LENGTHS - 2)).sum() / n  # of those that must have one
  assert abs(chosen.sum() / n - 0.15 - extra) < (0.004 if not whole_word else 0.008)
  masks, same = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
  assert abs(masks.mean() - 0.8) < 0.012 and abs(same.mean() - 0.1 - 0.1 / (VOCAB - 5)) < 0.009
  others = inputs[chosen][~masks & ~same]
  assert others.min() == 5 and others.max() > VOCAB - 10 and abs(others.mean() - (VOCAB + 4) / 2) < 35
  per_example = np.bincount(ids[chosen], minlength=2000)
  assert per_example.min() >= 1  # each has a token to predict
  if whole_word:
    for i in range(300):
      own = (ids == i) & predictable
      parts = collections.defaultdict(set)
      for w, c in zip(words[own], chosen[own]):
        parts[w].add(bool(c))
      assert all(len(x) == 1 for x in parts.values())


@pytest.mark.parametrize("whole_word", [False, True])
def test_mlm_does_not_depend_on_packing(whole_word):
  results = []
  for width, order in ((128, None), (300, np.random.default_rng(5).permutation(200)), (90, range(199, -1, -1))):
    data = batch(LENGTHS[:200], width, order)
    inputs, weights = masked(*data, whole_word=whole_word)
    ids, places = data[1], data[2]
    results.append(
      {(i, p): (x, w) for i, p, x, w in zip(*(a.ravel().tolist() for a in (ids, places, inputs, weights))) if i >= 0}
    )
  assert results[0] == results[1] == results[2] and len(results[0]) == LENGTHS[:200].sum()
  one = batch(LENGTHS[:200], 128, [7])
  alone = masked(*one, whole_word=whole_word)
  assert all(results[0][7, p] == (alone[0][0, p], alone[1][0, p]) for p in range(LENGTHS[7]))


def test_mlm_epochs_and_seeds_are_independent():
  data = batch(LENGTHS, 128)
  n = data[3].sum()
  runs = [masked(*data, epoch=e, seed=s)[1].ravel() == 1 for e, s in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))]
  shares = [r.sum() / n for r in runs]
  for (a, x), (b, y) in itertools.combinations(zip(runs, shares), 2):
    assert abs((a & b).sum() / n - x * y) < 0.006  # 0.0225 and a little
  assert (masked(*data)[1] == masked(*data)[1]).all()
  first, second = (masked(*data, epoch=e)[0] for e in (0, 1))
  both = (runs[0] & runs[1]).reshape(first.shape)
  kinds = np.stack([(x[both] == MASK) for x in (first, second)])
  assert abs((kinds[0] & kinds[1]).mean() - 0.64) < 0.04


def test_mlm_edges():
  tokens = np.array([[2, 9, 3, 2, 3, 0]], np.int32)
  ids, places = np.array([[5, 5, 5, 6, 6, -1]]), np.array([[0, 1, 2, 0, 1, 0]])
  predictable = np.array([[0, 1, 0, 0, 0, 0]])
  for epoch in range(20):
    inputs, weights = masked(tokens, ids, places, predictable, None, epoch=epoch, share=0.0)
    assert weights.tolist() == [[0, 1, 0, 0, 0, 0]]  # the only one there is
  inputs, weights = masked(tokens, ids, places, predictable, None, replace=(0.0, 0.0, 1.0))
  assert (inputs == tokens).all() and weights.sum() == 1
  every = masked(*batch(LENGTHS[:50], 128), share=1.0, replace=(1.0, 0.0, 0.0))
  assert (every[1] == batch(LENGTHS[:50], 128)[3]).all() and (every[0][every[1] == 1] == MASK).all()
  empty = masked(*(np.zeros((0, 8), int) for _ in range(4)), None)
  assert empty[0].shape == empty[1].shape == (0, 8)
  twice = [np.concatenate([x, x], 1) for x in (tokens[:, :3], ids[:, :3], places[:, :3], predictable[:, :3])]
  assert masked(*twice, None, share=0.0)[1].tolist() == [[0, 1, 0, 0, 1, 0]]  # one example twice in a row
  long = batch([60], 60)
  twice = [np.concatenate([x, x], 1) for x in long]
  for epoch in range(9):
    both = masked(*twice, whole_word=True, epoch=epoch)[1]
    assert (both[:, :60] == both[:, 60:]).all()
  words = np.array([[-1, 0, 0, 1, -1, 0, 1, 1, -1]])  # a pair of texts: numbers begin anew
  args = np.arange(9)[None] + 10, np.zeros((1, 9), int), np.arange(9)[None], words >= 0, words
  made = {
    tuple(masked(*args, whole_word=True, epoch=e, share=0.3)[1][0, [1, 2, 3, 5, 6, 7]].tolist()) for e in range(300)
  }
  assert all(a == b and e == f for a, b, _, _, e, f in made) and len({(a, d) for a, _, _, d, _, _ in made}) == 4
  for given in (dict(replace=(0.8, 0.1, 0.2)), dict(share=1.5), dict(replace=(1.2, -0.2, 0.0))):
    with pytest.raises(InputError, match="masking: share is"):
      masked(tokens, ids, places, predictable, None, **given)
  with pytest.raises(ValueError, match="needs words"):
    masked(tokens, ids, places, predictable, None, whole_word=True)


# ---- spans


def by_t5(raw, density=0.15, mean=3.0):
  """The counts of T5's random_spans_noise_mask, in float32 as there."""
  noise = int(np.rint(np.float32(raw) * np.float32(density)))
  noise = min(max(noise, 1), raw - 1)
  spans = max(int(np.rint(np.float32(noise) / np.float32(mean))), 1)
  return raw - noise + spans + 1, noise + spans + 1


def corrupted(tokens, lengths, ids=None, **given):
  given = dict(seed=0, epoch=0, sentinels=SENTINELS, eos=1) | given
  ids = np.arange(len(lengths)) if ids is None else ids
  (a, na), (b, nb) = masking.corrupt_batch(tokens, lengths, ids, **given)
  return np.split(a, np.cumsum(na)[:-1]), np.split(b, np.cumsum(nb)[:-1]), na, nb


def restored(inputs, targets):
  """The text that inputs and targets tell together."""
  spans, out = {}, []
  for t in targets[:-1].tolist():
    if t in NAMES:
      spans[t] = []
      last = t
    else:
      spans[last].append(t)
  for t in inputs[:-1].tolist():
    out.extend(spans.pop(t) if t in NAMES else [t])
  assert not spans and inputs[-1] == targets[-1] == 1
  return out


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("density,mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.9, 1.0)])
def test_corruption_of_every_length(roll, density, mean):
  lengths = np.arange(2, 601) if density < 0.5 else np.arange(2, 90)
  tokens = np.concatenate([np.arange(n) + 5 for n in lengths]).astype(np.int32)
  made = corrupted(tokens, lengths, density=density, mean=mean, roll=roll)
  expected = masking.corrupted_lengths(lengths, density, mean)
  assert (made[2] == expected[0]).all() and (made[3] == expected[1]).all()
  for n, inputs, targets in zip(lengths, *made[:2]):
    assert inputs.dtype == targets.dtype == np.int32
    assert restored(inputs, targets) == list(range(5, n + 5))
    used = [t for t in inputs.tolist() if t in NAMES]
    assert used == [t for t in targets.tolist() if t in NAMES] == SENTINELS[: len(used)].tolist()
    assert targets[0] == SENTINELS[0]
    if not roll:
      assert inputs[0] == 5 and inputs[-2] == used[-1]  # kept first, lost last
    pairs = list(zip(inputs[:-1].tolist(), inputs[1:].tolist()))
    assert not any(a in NAMES and b in NAMES for a, b in pairs)  # spans are apart
    if density == 0.15 and mean == 3.0:
      assert (len(inputs), len(targets)) == by_t5(n)


def test_t5s_own_lengths():
  assert [x.tolist() for x in masking.corrupted_lengths(np.array([568]))] == [[512], [114]]
  assert masking.longest_raw(512, 114) == 568
  assert [int(x[0]) for x in masking.corrupted_lengths(np.array([190]))] == [172, 40]
  for caps in ((512, 113), (40, 512)):
    raw = np.arange(2, 1000)
    fits = [bool(x) for x in (np.stack(masking.corrupted_lengths(raw)) <= np.array(caps)[:, None]).all(0)]
    assert masking.longest_raw(*caps) == raw[np.flatnonzero(fits)[-1]]
  for cap in range(3, 700):
    raw = masking.longest_raw(cap, cap)
    assert masking.corrupted_lengths(np.array([raw]))[0] <= cap < masking.corrupted_lengths(np.array([raw + 1]))[0]
  assert masking.longest_raw(10**6, 40) < 200
  for caps in ((2, 9), (9, 2)):
    with pytest.raises(InputError, match="no text fits"):
      masking.longest_raw(*caps)


def test_corruption_does_not_depend_on_the_batch():
  lengths = np.random.default_rng(0).integers(2, 200, 300)
  tokens = np.concatenate([np.random.default_rng(i).integers(5, 900, n) for i, n in enumerate(lengths)])
  starts = np.cumsum(lengths) - lengths
  inputs, targets, _, _ = corrupted(tokens, lengths, roll=True, epoch=3)
  order = np.random.default_rng(1).permutation(300)[:100]
  again = corrupted(
    np.concatenate([tokens[starts[i] : starts[i] + lengths[i]] for i in order]),
    lengths[order],
    order,
    roll=True,
    epoch=3,
  )
  for k, i in enumerate(order):
    assert np.array_equal(inputs[i], again[0][k]) and np.array_equal(targets[i], again[1][k])
    one = masking.corrupt(
      tokens[starts[i] : starts[i] + lengths[i]], i, seed=0, epoch=3, sentinels=SENTINELS, eos=1, roll=True
    )
    assert np.array_equal(one[0], inputs[i]) and np.array_equal(one[1], targets[i])
  other = corrupted(tokens, lengths, roll=True, epoch=4)[0]
  assert sum(np.array_equal(a, b) for a, b in zip(inputs, other)) < 40  # short ones have few ways
  none = corrupted(np.zeros(0, np.int32), np.zeros(0, int))
  assert len(none[2]) == len(none[3]) == 0


def test_all_divisions_are_equally_likely():
  n, many = 12, 20_000  # density 0.5, mean 3: 6 lost in 2 spans, 6 kept in 2: 5 x 5 ways
  made = corrupted(np.tile(np.arange(5, 5 + n), many), np.full(many, n), density=0.5, mean=3.0)
  counts = collections.Counter(tuple(x.tolist()) for x in made[0])
  assert len(counts) == 25
  chi = sum((c - many / 25) ** 2 / (many / 25) for c in counts.values())
  assert chi < 52  # 24 degrees of freedom, one in a thousand
  rolled = corrupted(np.tile(np.arange(5, 25), many), np.full(many, 20), roll=True)  # 3 lost in one span
  where = np.array([x.tolist().index(SENTINELS[0]) for x in rolled[0]])
  assert np.bincount(where).min() > many / 18 * 0.8 and where.max() == 17  # anywhere
  fixed = corrupted(np.tile(np.arange(5, 25), 50), np.full(50, 20))
  assert {x.tolist().index(SENTINELS[0]) for x in fixed[0]} == {17}


def test_corruption_errors():
  with pytest.raises(InputError, match="a text has 1 tokens"):
    masking.corrupted_lengths(np.array([5, 1]))
  with pytest.raises(InputError, match="a text of 700 tokens needs 35 sentinels.*the tokenizer has 30"):
    corrupted(np.zeros(710, np.int32), np.array([10, 700]), sentinels=SENTINELS[:30])


# ---- pairs


def test_nsp():
  documents = [[f"{d}.{i}" for i in range(n)] for d, n in enumerate([40, 0, 1, 60, 30, 2] * 40)]
  pairs = list(masking.nsp(documents, 3))
  assert len(pairs) == sum(max(len(d) - 1, 0) for d in documents)
  assert [p.a for p in pairs] == [s for d in documents for s in d[:-1]]
  split = lambda s: tuple(map(int, s.split(".")))
  share = np.mean([p.is_next for p in pairs])
  assert abs(share - 0.5) < 0.025
  others = collections.Counter()
  for p in pairs:
    (d, i), (e, j) = split(p.a), split(p.b)
    assert (e, j) == (d, i + 1) if p.is_next else e != d
    if not p.is_next:
      others[e % 6] += 1
  assert set(others) == {0, 2, 3, 4, 5} and max(others.values()) < 1.2 * min(others.values())  # documents alike
  assert list(masking.nsp(documents, 3)) == pairs != list(masking.nsp(documents, 4))
  changed = [list(d) for d in documents]
  changed[-1][0] = "new"
  assert sum(p != q for p, q in zip(pairs, masking.nsp(changed, 3))) < 20


def test_nsp_of_one_document():
  own = [str(i) for i in range(500)]
  pairs = list(masking.nsp([[], own], 0))
  assert abs(np.mean([p.is_next for p in pairs]) - 0.5) < 0.08
  for p in pairs:
    gap = int(p.b) - int(p.a)
    assert gap == 1 if p.is_next else gap not in (0, 1)
  assert {p.is_next for s in range(20) for p in masking.nsp([["a", "b"]], s)} == {True}
  assert {p.b for s in range(20) for p in masking.nsp([["a", "b", "c"]], s)} == {"a", "b", "c"}
  assert list(masking.nsp([], 0)) == list(masking.nsp([["a"]], 0)) == []
