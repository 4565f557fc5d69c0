"""How texts become ids, without transformers: what worker processes are given instead of a whole tokenizer.

All agree with transformers' own call, special tokens included, and none pads or truncates.
"""

import copy
import functools
import json
import pickle
import re
from collections.abc import Sequence

import numpy as np
import tokenizers

from jaxft.errors import InputError

BYTE_OFFSET = 3  # ByT5: 0 pad, 1 end of text, 2 unknown, then the 256 bytes


class Fast:
  """A tokenizer of the `tokenizers` library; 19,000 German sentences/s on one core. `types`: whether transformers gives
  its token types to the model.
  """

  def __init__(self, backend: tokenizers.Tokenizer, types: bool):
    self.backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy: its settings are ours alone
    self.backend.no_padding()
    self.backend.no_truncation()
    self.types = types

  def encode(self, texts):
    return [e.ids for e in self.backend.encode_batch_fast(texts)]

  def encode_pairs(self, first: Sequence[str], second: Sequence[str]) -> tuple[list, list, list]:
    """Returns the ids of each pair, their token types, and (begin, end, begin, end) of the two texts among them.

    The types are empty lists where the model takes none.
    """
    made = self.backend.encode_batch(list(zip(first, second)))
    places = [[x for n in (0, 1) for x in _run(e.sequence_ids, n)] for e in made]
    return [e.ids for e in made], [e.type_ids if self.types else [] for e in made], places

  def encode_offsets(self, texts: Sequence[str], special: bool) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Returns (ids, characters i32[n, 2] that each stands for, bool[n] added by the tokenizer) a text.

    `special`: whether the tokenizer adds its special tokens; those that the text spells are there anyway.
    """
    made = self.backend.encode_batch(list(texts), add_special_tokens=special)
    return [(e.ids, np.array(e.offsets, np.int32).reshape(-1, 2), np.array(e.special_tokens_mask, bool)) for e in made]

  def encode_words(self, words: Sequence[Sequence[str]]) -> list[tuple[list[int], np.ndarray]]:
    """Returns (ids, i32[n] number of the word each belongs to, -1 for special tokens) a list of words.

    As transformers does for `is_split_into_words`; each word begins as after a space (`prefixed`).
    """
    made = self._for_words.encode_batch(list(words), is_pretokenized=True)
    return [(e.ids, np.array([-1 if w is None else w for w in e.word_ids], np.int32)) for e in made]

  @functools.cached_property
  def prefixed(self) -> bool:
    """Says whether `encode_words` sets add_prefix_space, without which byte-level BPE would glue words together."""
    return _prefixed(json.loads(self.backend.to_str()))[1]

  @functools.cached_property
  def _for_words(self) -> tokenizers.Tokenizer:
    made, changed = _prefixed(json.loads(self.backend.to_str()))
    return tokenizers.Tokenizer.from_str(json.dumps(made)) if changed else self.backend

  def serialised(self) -> str:
    return self.backend.to_str() + str(self.types)


def _run(numbers: Sequence[int | None], wanted: int) -> tuple[int, int]:
  """Returns (begin, end) of `wanted` in numbers; an empty run lies before the last entry that is special."""
  if wanted not in numbers:
    where = numbers.index(1) if wanted == 0 and 1 in numbers else len(numbers)
    while where and numbers[where - 1] is None:
      where -= 1
    return where, where
  begin = numbers.index(wanted)
  return begin, len(numbers) - numbers[::-1].index(wanted)


def _prefixed(tokenizer: dict) -> tuple[dict, bool]:
  """Returns the JSON of a tokenizer whose byte-level steps put a space before each word, and whether one did not."""
  tokenizer, changed = copy.deepcopy(tokenizer), False
  step = tokenizer.get("pre_tokenizer") or {}
  for one in step.get("pretokenizers", [step]):
    if one.get("type") == "ByteLevel" and not one["add_prefix_space"]:
      one["add_prefix_space"] = changed = True
  return tokenizer, changed


class Slow:
  """transformers itself; pickled as bytes, so that a process that never calls it never imports it."""

  def __init__(self, hf):
    self._hf, self._pickled = hf, b""
    self.types = "token_type_ids" in hf.model_input_names

  @property
  def hf(self):
    if self._hf is None:
      self._hf = pickle.loads(self._pickled)
    return self._hf

  def __getstate__(self):
    return self.__dict__ | {"_hf": None, "_pickled": self._pickled or pickle.dumps(self._hf)}

  def encode(self, texts):
    return self.hf(list(texts), truncation=False, padding=False)["input_ids"] if texts else []

  def encode_pairs(self, first, second):
    """As `Fast.encode_pairs`."""
    if not first:
      return [], [], []
    made = self.hf(list(first), list(second), truncation=False, padding=False)
    bare = [
      self.hf(list(x), truncation=False, padding=False, add_special_tokens=False)["input_ids"] for x in (first, second)
    ]
    places = [_places(*x) for x in zip(made["input_ids"], *bare)]
    return made["input_ids"], made.get("token_type_ids", [[] for _ in places]), places

  def encode_offsets(self, texts, special):
    raise _needs_fast("the places of tokens in their text")

  def encode_words(self, words):
    raise _needs_fast("the words that tokens belong to")

  def serialised(self) -> str:
    return json.dumps(
      [sorted(self.hf.get_vocab().items(), key=str), repr(sorted(self.hf.init_kwargs.items(), key=str))]
    )


def _places(ids: list[int], a: list[int], b: list[int]) -> list[int]:
  first = next((i for i in range(len(ids)) if ids[i : i + len(a)] == a), 0)
  last = next((i for i in range(len(ids) - len(b), -1, -1) if ids[i : i + len(b)] == b), len(ids))
  return [first, first + len(a), last, last + len(b)]


def _needs_fast(what: str) -> InputError:
  return InputError(
    f"tokenizer: this task needs {what}, which only tokenizers of the `tokenizers` library give (tokenizer.json). Set "
    "model.tokenizer to one of those; byte tokenizers (ByT5) do for seq2seq and classify."
  )


class Targets(Slow):
  """The texts to be written of a tokenizer that encodes them otherwise than those to be read (Marian)."""

  def encode(self, texts):
    return self.hf(text_target=list(texts), truncation=False, padding=False)["input_ids"] if texts else []


class Bytes(Slow):
  """ByT5: id = byte + 3, then EOS. A text that spells a special token (`</s>`, `<extra_id_0>`) goes to transformers,
  and so do pairs.
  """

  def __init__(self, hf):
    super().__init__(hf)
    self.eos = hf.eos_token_id
    self.special = re.compile("|".join(re.escape(t) for t in hf.added_tokens_encoder) or r"(?!)")
    self.table = bytes((b + BYTE_OFFSET) % 256 for b in range(256))  # UTF-8 ends at byte 244: nothing wraps

  def encode(self, texts):
    return [self._one(t) for t in texts]

  def _one(self, text):
    if self.special.search(text):
      return super().encode([text])[0]
    return [*text.encode("utf-8").translate(self.table), self.eos]
