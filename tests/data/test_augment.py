"""Words left out and swapped.

Catches: a word cut in two, a special token that is lost or moves, a text that is emptied, lengths that do not fit, a
text that comes out otherwise in another batch, the same change in every epoch, words that pass a special token or move
twice, `source` that does not say where tokens come from, a pair of texts whose word numbers begin anew.
"""

import numpy as np
import pytest

from jaxft.data import augment
from jaxft.errors import InputError

MAKERS = (augment.word_dropout, augment.word_swap)


def texts(many, seed=0):
  """Returns (tokens, lengths, words, ids): a special token, words of one to three tokens, special, words, special."""
  rng = np.random.default_rng(seed)
  words = []
  for _ in range(many):
    a, b = (np.repeat(np.arange(n), rng.integers(1, 4, n)) for n in rng.integers(1, 20, 2))
    words.append([-1, *a, -1, *b, -1])
  lengths = np.array([len(w) for w in words])
  flat = np.concatenate(words)
  return np.arange(len(flat)).astype(np.int32), lengths, flat, np.arange(many) * 3


def split(tokens, lengths):
  return [x.tolist() for x in np.split(tokens, np.cumsum(lengths)[:-1])]


def units(tokens, words):
  """Returns the tokens of each word or special token, [(is special, [tokens])]."""
  out, before = [], None
  for t, w in zip(tokens, words):
    if w < 0 or w != before:
      out.append((w < 0, []))
    out[-1][1].append(t)
    before = w
  return out


@pytest.fixture(scope="module")
def data():
  return texts(2000)


def test_dropout(data):
  tokens, lengths, words, ids = data
  made, left, source = augment.word_dropout(*data, rate=0.2, seed=1, epoch=2)
  assert made.dtype == tokens.dtype and left.sum() == len(made) and (made == tokens[source]).all()
  assert (np.diff(source) > 0).all()
  kept = total = 0
  for before, own, after in zip(split(tokens, lengths), split(words, lengths), split(made, left)):
    have = units(before, own)
    there = [bool(set(u) & set(after)) for _, u in have]
    assert after == [t for (_, u), k in zip(have, there) if k for t in u]  # words whole, in order
    assert all(k for (special, _), k in zip(have, there) if special)
    assert any(k for (special, _), k in zip(have, there) if not special)
    kept += sum(k for (special, _), k in zip(have, there) if not special)
    total += sum(not special for special, _ in have)
  assert abs(1 - kept / total - 0.2) < 0.01
  second = np.split(words, np.cumsum(lengths)[:-1])  # the first words of both halves fall independently
  starts = np.cumsum(lengths) - lengths
  firsts = np.stack([starts + 1, starts + [np.flatnonzero(w == -1)[1] + 1 for w in second]])
  fell = ~np.isin(firsts, source)
  assert abs((fell[0] & fell[1]).mean() - 0.04) < 0.02


def test_dropout_never_empties():
  words = np.array([-1, 0, 0, -1, -1, -1, 0, 1, 2, -1])
  lengths = np.array([4, 0, 2, 4])
  for rate in (0.9, 1.0):
    seen = set()
    for epoch in range(50):
      made, left, _ = augment.word_dropout(np.arange(10), lengths, words, np.arange(4), rate=rate, seed=0, epoch=epoch)
      assert left[:3].tolist() == [4, 0, 2] and made[:6].tolist() == [0, 1, 2, 3, 4, 5] and left[3] >= 2
      assert made[-1] == 9
      seen.add(made[6])
    assert seen == {6, 7, 8}
  made, left, source = augment.word_dropout(np.arange(10), lengths, words, np.arange(4), rate=0.0, seed=0, epoch=0)
  assert made.tolist() == source.tolist() == list(range(10)) and left.tolist() == [4, 0, 2, 4]


def test_swap(data):
  tokens, lengths, words, ids = data
  made, same, source = augment.word_swap(*data, rate=0.3, seed=1, epoch=2)
  assert (
    (same == lengths).all() and (made == tokens[source]).all() and (np.sort(source) == np.arange(len(tokens))).all()
  )
  starts = wanted = 0
  for before, own, after in zip(split(tokens, lengths), split(words, lengths), split(made, lengths)):
    have = units(before, own)
    assert all(after[i] == t for i, (t, w) in enumerate(zip(before, own)) if w < 0)  # special tokens keep their place
    at, k, out = 0, 0, []
    while k < len(have):
      special, unit = have[k]
      if after[at : at + len(unit)] == unit:
        wanted += not special and k + 1 < len(have) and not have[k + 1][0]
        out, k = out + unit, k + 1
      else:  # else this word and the next, both words, have changed places
        assert not special and not have[k + 1][0]
        out, k = out + have[k + 1][1] + unit, k + 2
        starts, wanted = starts + 1, wanted + 1
      at = len(out)
      assert after[:at] == out
  assert abs(starts / wanted - 0.3) < 0.01
  every, _, _ = augment.word_swap(
    np.arange(7), np.array([7]), np.array([-1, 0, 1, 1, 2, 3, 4]), np.array([0]), rate=1.0, seed=0, epoch=0
  )
  assert every.tolist() == [0, 2, 3, 1, 5, 4, 6]


@pytest.mark.parametrize("make", MAKERS)
def test_independent_of_the_batch(make, data):
  tokens, lengths, words, ids = data
  given = dict(rate=0.3, seed=5, epoch=1)
  made, left, source = make(*data, **given)
  whole = dict(zip(ids.tolist(), split(made, left)))
  order = np.random.default_rng(0).permutation(len(ids))[:200]
  pieces = [np.split(x, np.cumsum(lengths)[:-1]) for x in (tokens, words)]
  parts = [np.concatenate([x[i] for i in order]) for x in pieces]
  again, few, _ = make(parts[0], lengths[order], parts[1], ids[order], **given)
  assert [whole[i] for i in ids[order].tolist()] == split(again, few)
  assert np.array_equal(make(*data, **given)[0], made)
  others = [make(*data, **given | change)[2] for change in (dict(epoch=2), dict(seed=6))]
  assert all(len(o) != len(source) or (o != source).mean() > 0.2 for o in others)
  chained = make(made, left, words[source], ids, **given | dict(epoch=9))
  assert len(chained[0]) == chained[1].sum() and (words[source][chained[2]] == words[chained[0]]).all()


@pytest.mark.parametrize("make", MAKERS)
def test_texts_without_special_tokens(make):
  lengths, words = np.full(300, 3), np.tile([0, 1, 2], 300)
  made, left, source = make(np.arange(900), lengths, words, np.arange(300), rate=0.6, seed=0, epoch=0)
  owner = np.repeat(np.arange(300), left)
  assert (made // 3 == owner).all() and not (made == np.arange(len(made))).all()


@pytest.mark.parametrize("make", MAKERS)
def test_edges(make):
  none = make(np.zeros(0, np.int32), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), rate=0.5, seed=0, epoch=0)
  assert [len(x) for x in none] == [0, 0, 0]
  for rate in (-0.1, 1.1, float("nan")):
    with pytest.raises(InputError, match="augment: the rate is"):
      make(np.zeros(1, int), np.ones(1, int), np.zeros(1, int), np.zeros(1, int), rate=rate, seed=0, epoch=0)
  for sizes in ((2, [1], 1, 1), (1, [1], 2, 1), (1, [2], 1, 1), (1, [1], 1, 2)):
    tokens, lengths, words, ids = sizes
    with pytest.raises(ValueError, match="tokens"):
      make(
        np.zeros(tokens, int), np.array(lengths), np.zeros(words, int), np.zeros(ids, int), rate=0.1, seed=0, epoch=0
      )
