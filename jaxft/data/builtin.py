"""Built-in data, generated: what CLDR and num2words say in English and in other languages, and the sets of samples.py.

`cldr-en-fr` is English to French. `cldr-pretrain` is for starter weights: English to German, Spanish, Italian and
Dutch behind a prefix ("German: ..."), and span corruption (Raffel et al. 2020, section 3.1.4) of single sentences,
French among them; no row of it has English and French together. A sentence belongs to the split that the hash of its
English says (of the first habit, where English has several: "5 March" and "March 5" stay together), in both sets and
every language, so that a test sentence is in no training row, not even translated into German. Names and numbers do
recur: what is held out is their combination.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator

from jaxft.data import phrases, samples, sentences
from jaxft.errors import InputError, did_you_mean

FILES = (__file__, phrases.__file__, samples.__file__, sentences.__file__)  # and babel, num2words
SIZES = {
  "cldr-en-fr": dict(train=20_000, validation=500, test=500),
  "cldr-pretrain": dict(train=150_000, validation=500, test=500),
  **dict.fromkeys(samples.ROWS, samples.SIZES),
}
SHARES = dict(validation=range(0, 10), test=range(10, 20), train=range(20, 100))  # of the hash modulo 100
PAIRS = ("de", "es", "it", "nl")
ALONE = ("fr", "fr", "fr", "en", "de", "es", "it", "nl")  # of span corruption


def read(name: str, split: str = "train") -> Iterator[dict]:
  """Yields the rows of one split, always the same ({"input", "target", "kind"} of cldr-*); raises InputError on an
  unknown name.

  Row i follows from (name, split, i) alone. A row of cldr-en-fr takes about 0.2 ms, with those of the other splits that
  are drawn on the way.
  """
  if name not in SIZES:
    raise InputError(
      f"builtin:{name} does not exist; there is builtin:{', builtin:'.join(SIZES)}{did_you_mean(name, SIZES)}."
    )
  if split not in SIZES[name]:
    raise InputError(
      f"builtin:{name}:{split}: the splits are {', '.join(SIZES[name])}{did_you_mean(split, SIZES[name])}."
    )
  if name in samples.ROWS:
    rows = _samples(name, split)
  else:
    rows = _translations(name, split) if name == "cldr-en-fr" else _pretraining(name, split)
  return itertools.islice(rows, SIZES[name][split])


def split_of(english: str) -> str:
  """Returns the split that an English sentence belongs to."""
  share = int.from_bytes(hashlib.blake2b(english.encode(), digest_size=4).digest(), "big") % 100
  return next(split for split, shares in SHARES.items() if share in shares)


def _samples(name: str, split: str) -> Iterator[dict]:
  """The two smaller splits have no row twice where there are enough; in that of training rows recur."""
  seen, last = set(), 0
  for i, row in enumerate(samples.rows(name)):
    text = json.dumps(row, sort_keys=True)
    if split_of(text) == split and (split == "train" or text not in seen or i - last > 2000):
      seen.add(text)
      last = i
      yield row


def _translations(name: str, split: str) -> Iterator[dict]:
  seen = set()
  for i in itertools.count():
    kind, place, english, say = _sentence(random.Random(f"{name}/{i}"))
    if place == split and english not in seen:
      seen.add(english)
      yield dict(input=english, target=say("fr"), kind=kind)


def _pretraining(name: str, split: str) -> Iterator[dict]:
  seen = set()
  for i in itertools.count():
    r = random.Random(f"{name}/{i}")
    kind, place, english, say = _sentence(r)
    if place != split:
      continue
    if r.random() < 0.6:
      lang = r.choice(PAIRS)
      source, target = f"{phrases.LANGUAGES[lang]}: {english}", say(lang)
    else:
      lang = r.choice(ALONE)
      text = say(lang)
      source, target = corrupt(text, r) if text else ("", None)
    if target and source not in seen:
      seen.add(source)
      yield dict(input=source, target=target, kind=kind)


def _sentence(r: random.Random):
  """Returns (kind, split, English, say): `say(lang)` is the sentence in a language, None where that has no template."""
  kind, slots, templates = r.choices(sentences.SENTENCES, _WEIGHTS)[0]
  values = {slot: phrases.KINDS[slot.split("_")[0]].draw(r) for slot in slots}
  habits = templates["en"] if isinstance(templates["en"], list) else [templates["en"]]
  texts = [phrases.fill(habit, values, "en") for habit in habits]
  english = r.choice(texts)

  def say(lang: str) -> str | None:
    if lang == "en":
      return english
    return phrases.fill(templates[lang], values, lang) if lang in templates else None

  return kind, split_of(texts[0]), english, say


_WEIGHTS = [len(slots) ** 0.5 for _, slots, _ in sentences.SENTENCES]  # more slots, more to say


def corrupt(text: str, r: random.Random) -> tuple[str, str]:
  """Returns (input, target) of span corruption: about a fifth of the characters in one to three spans become sentinels.

  corrupt("le 5 mars 2024 à 15:07") may be ("le 5 m<extra_id_0>2024 à 15:07", "<extra_id_0>ars "). Characters and not
  tokens, because the text is cut before the tokenizer; spans are 2 to 6 long and never touch.
  """
  count = min(3, 1 + len(text) // 25)
  sections = [(len(text) * k // count, len(text) * (k + 1) // count) for k in range(count)]
  source, target, done = "", "", 0
  for k, (low, high) in enumerate(sections):
    length = min(r.randint(2, 6), high - low - 2)
    if length < 1:
      continue
    start = r.randint(low + 1, high - length)
    source += text[done:start] + f"<extra_id_{k}>"
    target += f"<extra_id_{k}>" + text[start : start + length]
    done = start + length
  return source + text[done:], target
