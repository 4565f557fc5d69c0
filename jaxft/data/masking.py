"""What is hidden from a model that learns to restore it: BERT's masked tokens, T5's spans, BERT's pairs of sentences.

Chance here is a hash of (seed, epoch, example id, place in the example), so an example is masked in the same way in
whatever batch, row, order or process it stands, and anew in each epoch. numpy alone, by array operations; one core
does 25 million tokens/s of mlm and 7 million of corrupt_batch, in batches of 32,768 tokens; one text of 512 at a time
corrupt does 0.8 million (AMD EPYC).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.errors import InputError

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
WORD = 2**64 - 1
MOST = np.uint64(WORD)
# what a number is drawn for; one number is never used twice
CHOOSE, REPLACE, NOISE, KEPT, ROLL, NEXT, DROP, SWAP = range(1, 9)


# ---- chance


def mix(x: np.ndarray) -> np.ndarray:
  """Returns u64[...], the splitmix64 finaliser of u64[...]: a bijection in which each input bit flips half the output.

  Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), with the constants of Stafford's
  "mix13", as in Vigna's splitmix64.c.
  """
  x = x ^ (x >> np.uint64(30))
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(27)
  x *= np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return x


def draw(purpose: int, seed: int, epoch: int, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Returns u64[...], uniform and a pure function of the arguments; ids and places are integers of one shape."""
  key = np.array([purpose], np.uint64)
  for number in (seed, epoch):
    key = mix(key * np.uint64(GOLDEN) + np.uint64(number & WORD))
  x = np.asarray(ids).astype(np.uint64)  # a copy
  for number in (None, places):
    if number is not None:
      x += np.asarray(number).astype(np.uint64)
    x *= np.uint64(GOLDEN)
    x += key
    x = mix(x)
  return x


def threshold(share: float) -> np.uint64:
  """Returns the u64 below which a drawn number falls with probability `share`."""
  return np.uint64(min(int(share * 2**64), WORD))


def below(x: np.ndarray, n) -> np.ndarray:
  """Returns i64[...] in 0..n-1 from the low 32 bits of u64[...]; n is at most 2^31 (bias below n / 2^32)."""
  return (((x & np.uint64(0xFFFFFFFF)) * np.asarray(n).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def ordinals(words: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Returns i64[N], the number of each token's run of equal `words` within its example.

  words i[N]; first bool[N] says where an example begins. Word numbers that begin anew within an example, as those of a
  pair of texts do, so stay apart.
  """
  begins = first.copy()
  begins[1:] |= words[1:] != words[:-1]
  count = np.cumsum(begins)
  starts = np.flatnonzero(first)
  return count - np.repeat(count[starts], np.diff(starts, append=len(words)))


# ---- masked tokens


@functools.lru_cache(maxsize=8)
def _ordinary(vocab: int, special: tuple[int, ...]) -> np.ndarray:
  return np.setdiff1d(np.arange(vocab), special)


def mlm(
  tokens: np.ndarray,
  ids: np.ndarray,
  places: np.ndarray,
  predictable: np.ndarray,
  words: np.ndarray | None = None,
  *,
  mask_id: int,
  vocab: int,
  seed: int,
  epoch: int,
  share: float = 0.15,
  replace: tuple[float, float, float] = (0.8, 0.1, 0.1),
  whole_word: bool = False,
  special: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (inputs i[B,T], weights f32[B,T]): the masked tokens, and 1 where the token is to be predicted, else 0.

  tokens i[B,T]; ids i[B,T] the example of each token, an example being one run of places of a row; places i[B,T] the
  token's index within its example; predictable bool[B,T], False for special tokens and padding, which are never chosen.

  Each predictable token is chosen with probability `share`; of the chosen, the shares `replace` become `mask_id`, a
  random token, and stay (Devlin et al. 2019, "BERT", section 3.1 and appendix A.1). `whole_word` chooses words, runs of
  equal `words` i[B,T], with all their predictable tokens (BERT's whole word masking, 2019); what a chosen token becomes
  is drawn for each token, as there. Random tokens are any of 0..vocab-1 but `mask_id` and `special`.

  Every example with a predictable token has at least one chosen (that with the lowest number drawn), which the collator
  of transformers does not promise; so n tokens have share + (1 - share)^n / n chosen on average: 17% of 10, 15% of 50.
  """
  if abs(sum(replace) - 1) > 1e-6 or min(replace) < 0 or not 0 <= share <= 1:
    raise InputError(
      f"masking: share is {share} and replace {replace}; share is a probability, and replace three (mask, random, "
      "same) that add up to 1."
    )
  if whole_word and words is None:
    raise ValueError("whole_word needs words")
  shape, tokens, ids = np.shape(tokens), np.ravel(tokens), np.ravel(ids)
  places, predictable = np.ravel(places), np.ravel(predictable).astype(bool)
  weights = np.zeros(len(tokens), np.float32)
  if not len(tokens):
    return tokens.reshape(shape).copy(), weights.reshape(shape)
  first = np.ones(len(tokens), bool)
  first[1:] = (ids[1:] != ids[:-1]) | (places[1:] <= places[:-1])
  first[:: shape[-1]] = True
  number = draw(CHOOSE, seed, epoch, ids, ordinals(np.ravel(words), first) if whole_word else places)
  number[~predictable] = MOST
  starts = np.flatnonzero(first)
  least = np.repeat(np.minimum.reduceat(number, starts), np.diff(starts, append=len(tokens)))
  chosen = np.flatnonzero(((number < threshold(share)) | (number == least)) & predictable)
  weights[chosen] = 1
  inputs = tokens.copy()
  inputs[chosen] = _replaced(tokens, ids, places, chosen, mask_id, vocab, replace, special, seed, epoch)
  return inputs.reshape(shape), weights.reshape(shape)


def _replaced(tokens, ids, places, chosen, mask_id, vocab, replace, special, seed, epoch) -> np.ndarray:
  number = draw(REPLACE, seed, epoch, ids[chosen], places[chosen])
  others = _ordinary(vocab, (*map(int, special), int(mask_id)))
  kind = number >> np.uint64(32)
  masks, randoms = (np.uint64(x * 2**32) for x in (replace[0], replace[0] + replace[1]))
  random = others[below(number, len(others))] if replace[1] else tokens[chosen]
  return np.where(kind < masks, mask_id, np.where(kind < randoms, random, tokens[chosen]))


# ---- spans


def _spans(raw: np.ndarray, density: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns (noise tokens, spans), i64[E] each, of texts of `raw` tokens; in float32 as T5's code, which tells where a
  half comes out (190 tokens lose 29).
  """
  raw = np.asarray(raw, np.int64)
  if raw.size and raw.min() < 2:
    raise InputError(
      f"masking: a text has {raw.min()} tokens; span corruption needs at least 2, one to hide and one to keep. Leave "
      "out shorter texts."
    )
  noise = np.clip(np.rint(raw.astype(np.float32) * np.float32(density)).astype(np.int64), 1, raw - 1)
  spans = np.clip(np.rint(noise.astype(np.float32) / np.float32(mean)).astype(np.int64), 1, raw - noise)
  return noise, spans


def corrupted_lengths(raw: np.ndarray, density: float = 0.15, mean: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
  """Returns (inputs, targets) i64[E], the lengths that `corrupt` makes of `raw` i[E] tokens, the final EOS counted."""
  noise, spans = _spans(raw, density, mean)
  return np.asarray(raw, np.int64) - noise + spans + 1, noise + spans + 1


def longest_raw(inputs: int, targets: int, density: float = 0.15, mean: float = 3.0) -> int:
  """Returns the most raw tokens whose corruption fits in `inputs` and `targets` places: 568 for 512 and 114."""
  raw = np.arange(2, max(3, int(inputs / (1 - density)) + 3 if density < 1 else targets))
  made = corrupted_lengths(raw, density, mean)
  fits = raw[(made[0] <= inputs) & (made[1] <= targets)]
  if not len(fits):
    raise InputError(
      f"masking: no text fits in {inputs} inputs and {targets} targets after span corruption; the least is 3 and 3."
    )
  return int(fits[-1])


def corrupt(tokens, id: int, **given) -> tuple[np.ndarray, np.ndarray]:
  """Returns (inputs, targets) i[...] of one text, tokens i[N]; the rest is as in `corrupt_batch`."""
  tokens = np.asarray(tokens)
  (inputs, _), (targets, _) = corrupt_batch(tokens, np.array([len(tokens)]), np.array([id]), **given)
  return inputs, targets


def corrupt_batch(
  tokens: np.ndarray,
  lengths: np.ndarray,
  ids: np.ndarray,
  *,
  seed: int,
  epoch: int,
  sentinels: np.ndarray,
  eos: int,
  density: float = 0.15,
  mean: float = 3.0,
  roll: bool = False,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """Returns ((inputs i[M], lengths i64[E]), (targets i[K], lengths i64[E])), texts one after the other.

  tokens i[N] are the texts without EOS one after the other, lengths i[E], ids i[E] their examples; sentinels i[S] the
  ids of <extra_id_0>, <extra_id_1>, ... (in T5's vocabulary they descend).

  Raffel et al. 2020, "T5", section 3.1.4, as in `random_spans_noise_mask` of its code: a text of n tokens loses
  round(0.15 n) tokens in round(that / 3) spans, kept and lost spans in turn with kept first, all such divisions equally
  likely. Inputs: the text with a sentinel for each span, EOS; targets: each sentinel with its span, EOS. Lengths are
  those of `corrupted_lengths`. So the last span always ends the text, and below 30 tokens, where there is only one, it
  is always the end that is hidden: `roll` moves a random part of the first kept span to the end, which leaves lengths
  as they are (T5's random_roll does not: there a span may be cut in two).
  """
  tokens, lengths, ids = np.asarray(tokens), np.asarray(lengths, np.int64), np.asarray(ids, np.int64)
  noise, spans = _spans(lengths, density, mean)
  sentinels = np.asarray(sentinels, tokens.dtype)
  if len(spans) and spans.max() > len(sentinels):
    raise InputError(
      f"masking: a text of {lengths[spans.argmax()]:,} tokens needs {spans.max()} sentinels (<extra_id_0> and so on), "
      f"but the tokenizer has {len(sentinels)}. Cut texts to fewer tokens, or raise the mean length of spans."
    )
  kept = _divide(KEPT, lengths - noise, spans, ids, seed, epoch)
  lost = _divide(NOISE, noise, spans, ids, seed, epoch)
  runs, hidden = np.stack([kept, lost], 1).reshape(-1), np.tile([False, True], len(kept))
  if roll:
    ends = 2 * np.cumsum(spans)
    starts = ends - 2 * spans
    moved = below(draw(ROLL, seed, epoch, ids, np.zeros_like(ids)), runs[starts] + 1)
    runs[starts] -= moved
    runs, hidden = np.insert(runs, ends, moved), np.insert(hidden, ends, False)
  mask = np.repeat(hidden, runs)
  begins = np.repeat(hidden, np.minimum(runs, 1))  # of runs that are not empty
  heads = (np.cumsum(runs) - runs)[runs > 0][begins]  # the first token of each span, i64[spans]
  own = np.arange(len(kept)) - np.repeat(np.cumsum(spans) - spans, spans)  # a span's number within its text
  text = tokens.copy()
  text[heads] = sentinels[own]
  seen = ~mask
  seen[heads] = True
  named = np.insert(tokens[mask], np.cumsum(lost) - lost, sentinels[own])
  sizes = lengths - noise + spans + 1, noise + spans + 1
  return (_ended(text[seen], sizes[0], eos), sizes[0]), (_ended(named, sizes[1], eos), sizes[1])


def _divide(purpose: int, items: np.ndarray, parts: np.ndarray, ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
  """Returns i64[sum(parts)]: for each text its `items` cut into `parts` runs of at least 1, all ways equally likely."""
  starts = np.cumsum(items) - items
  first = np.zeros(items.sum(), bool)
  first[starts] = True
  cut = np.flatnonzero(np.repeat(parts > 1, items) & ~first)  # may begin a run
  text = np.repeat(np.arange(len(items)), np.where(parts > 1, items - 1, 0))
  number = draw(purpose, seed, epoch, ids[text], cut - starts[text])
  number >>= np.uint64(24)
  number |= text.astype(np.uint64) << np.uint64(40)
  order = np.argsort(number, kind="stable")  # texts stay together, so `text` is that of the sorted ones too
  rank = np.arange(len(cut)) - np.searchsorted(text, text)
  first[cut[order[rank < (parts - 1)[text]]]] = True
  return np.diff(np.flatnonzero(first), append=len(first))


def _ended(tokens: np.ndarray, lengths: np.ndarray, eos: int) -> np.ndarray:
  """Returns the texts one after the other, each with EOS at its end; `lengths` counts it."""
  out = np.full(lengths.sum(), eos, tokens.dtype)
  inner = np.ones(len(out), bool)
  inner[np.cumsum(lengths) - 1] = False
  out[inner] = tokens
  return out


# ---- pairs of sentences


class Pair(NamedTuple):
  a: str
  b: str
  is_next: bool  # transformers' label is 0 for True


def nsp(documents: Sequence[Sequence[str]], seed: int) -> Iterator[Pair]:
  """Yields a pair for each sentence that another one follows: with that one, or as often with a random one.

  Devlin et al. 2019, "BERT", section 3.1, with single sentences. A random sentence is that of a random other document
  that has any; where there is none, another one of the same document that is neither of the two, and where that is
  none, the next. A pair depends on `documents`, the seed, and the places of document and sentence.
  """
  full = [i for i, d in enumerate(documents) if len(d)]
  rank = {d: i for i, d in enumerate(full)}
  for d in full:
    own = documents[d]
    places = np.arange(len(own) - 1)
    number = draw(NEXT, seed, 0, np.full(len(places), d), places)
    coin = (number >> np.uint64(63)).astype(bool)
    which = below(mix(number), max(len(full) - 1, 1))
    for i in places.tolist():
      if coin[i] or (len(full) == 1 and len(own) < 3):
        yield Pair(own[i], own[i + 1], True)
      elif len(full) > 1:
        other = documents[full[which[i] + (which[i] >= rank[d])]]
        yield Pair(own[i], other[below(number[i : i + 1], len(other))[0]], False)
      else:
        j = int(below(number[i : i + 1], len(own) - 2)[0])
        yield Pair(own[i], own[j + 2 * (j >= i)], False)
