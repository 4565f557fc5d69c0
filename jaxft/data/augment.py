"""Texts made a little different in each epoch: words left out, neighbouring words swapped.

Both work on texts that lie one after the other, by array operations, and draw by hashing (seed, epoch, example id,
word) as `masking` does: a text changes in the same way in whatever batch or row it stands. One core does 17 million
tokens/s of word_dropout and 13 million of word_swap, in batches of 32,768 tokens (AMD EPYC).

A word is a run of equal word numbers: those of the tokenizer, or the places for single tokens. Tokens whose number is
negative are special, each by itself; they are never left out or moved, and no word passes them.
"""

from typing import NamedTuple

import numpy as np

from jaxft.data import masking
from jaxft.errors import InputError

Made = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Units(NamedTuple):
  """Words and special tokens in order, i64[U] each."""

  first: np.ndarray  # index of the first token
  sizes: np.ndarray
  text: np.ndarray  # number of the text
  own: np.ndarray  # number within the text


def word_dropout(
  tokens: np.ndarray, lengths: np.ndarray, words: np.ndarray, ids: np.ndarray, *, rate: float, seed: int, epoch: int
) -> Made:
  """Returns (tokens i[M], lengths i64[E], source i64[M]) without the words that chance leaves out.

  tokens i[N] of E texts one after the other, lengths i[E], words i[N], ids i[E] the examples. Each word is left out
  with probability `rate`, all its tokens with it, as in the noise of Lample et al. 2018, "Unsupervised Machine
  Translation Using Monolingual Corpora Only", section 2.3; but a text that has words keeps at least one (that with the
  highest number drawn). Output token k was input token source[k], so that `words[source]`, or labels, can follow.
  """
  units, special, number = _draw(masking.DROP, tokens, lengths, words, ids, rate, seed, epoch)
  number[special] = 0
  highest = np.zeros(len(lengths), np.uint64)
  np.maximum.at(highest, units.text, number)
  kept = special | (number >= masking.threshold(rate)) | (number == highest[units.text])
  source = np.flatnonzero(np.repeat(kept, units.sizes))
  left = np.bincount(units.text[kept], units.sizes[kept], len(lengths)).astype(np.int64)
  return tokens[source], left, source


def word_swap(
  tokens: np.ndarray, lengths: np.ndarray, words: np.ndarray, ids: np.ndarray, *, rate: float, seed: int, epoch: int
) -> Made:
  """Returns (tokens i[N], lengths i64[E], source i64[N]) with some words swapped with the next; arguments and source
  are as in `word_dropout`.

  From left to right each word that is not swapped yet is swapped with the next, if there is one, with probability
  `rate`; so no word moves more than one word away, and of many words a share of 2 rate / (1 + rate) moves.
  """
  units, special, number = _draw(masking.SWAP, tokens, lengths, words, ids, rate, seed, epoch)
  at = np.arange(len(number))
  falls = (number < masking.threshold(rate)) & ~special
  falls[-1:] = False
  falls[:-1] &= ~special[1:] & (units.text[1:] == units.text[:-1])
  before = np.maximum.accumulate(np.where(falls, -1, at))  # of a run of words that all fall, every other one is moved
  moved = np.flatnonzero(falls & ((at - before) % 2 == 1))
  at[moved], at[moved + 1] = moved + 1, moved
  sizes = units.sizes[at]
  source = np.arange(len(tokens)) + np.repeat(units.first[at] - (np.cumsum(sizes) - sizes), sizes)
  return tokens[source], np.asarray(lengths, np.int64), source


def both(
  tokens: np.ndarray, lengths: np.ndarray, words: np.ndarray, ids: np.ndarray, seed: int, epoch: int, *,
  word_dropout: float, word_swap: float,
) -> Made:  # fmt: skip
  """Returns as `word_dropout` the texts after both, dropout first; a `fields.Dynamic.augment`."""
  how = dict(seed=seed, epoch=epoch)
  tokens, lengths, first = _dropped(tokens, lengths, words, ids, rate=word_dropout, **how)
  tokens, lengths, second = _swapped(tokens, lengths, words[first], ids, rate=word_swap, **how)
  return tokens, lengths, first[second]


_dropped, _swapped = word_dropout, word_swap


def _draw(purpose, tokens, lengths, words, ids, rate, seed, epoch) -> tuple[_Units, np.ndarray, np.ndarray]:
  """Returns the units, which of them are special, bool[U], and a number drawn for each, u64[U]."""
  if not 0 <= rate <= 1:
    raise InputError(f"augment: the rate is {rate}; it is a probability, from 0 to 1.")
  lengths, words = np.asarray(lengths, np.int64), np.asarray(words)
  if not len(tokens) == len(words) == lengths.sum() or len(lengths) != len(ids):
    raise ValueError(f"{len(tokens)} tokens, {len(words)} words, {lengths.sum()} in {len(lengths)} of {len(ids)} texts")
  text = np.repeat(np.arange(len(lengths)), lengths)
  begins = words < 0
  begins[:1] = True
  begins[1:] |= (words[1:] != words[:-1]) | (text[1:] != text[:-1])
  first = np.flatnonzero(begins)
  owner = text[first]
  units = _Units(first, np.diff(first, append=len(words)), owner, np.arange(len(owner)) - np.searchsorted(owner, owner))
  return units, words[first] < 0, masking.draw(purpose, seed, epoch, np.asarray(ids)[owner], units.own)
