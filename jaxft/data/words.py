"""Which word each token of a text belongs to: what whole-word masking and augmentation go by."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxft.data.fields import Columns, Example
from jaxft.errors import InputError


def copy(encoder: Any, what: str) -> tokenizers.Tokenizer:
  """Returns a copy of the encoder's tokenizer, which neither pads nor cuts; `what` needs it."""
  if not hasattr(encoder, "backend"):
    raise InputError(
      f"tokenizer: {what} need the words that tokens belong to, which only tokenizers of the `tokenizers` library give "
      "(tokenizer.json). Set model.tokenizer to one of those."
    )
  return tokenizers.Tokenizer.from_str(encoder.backend.to_str())


@functools.lru_cache(maxsize=4)
def specials(encoder: Any) -> frozenset[int]:
  """Returns the ids of the special tokens, the unknown one among them."""
  added = encoder.backend.get_added_tokens_decoder() if hasattr(encoder, "backend") else {}
  return frozenset(i for i, token in added.items() if token.special)


@functools.lru_cache(maxsize=4)
def _splits(encoder: Any) -> bool:
  """Says whether the tokenizer itself divides texts into words; some byte-level ones take a text as one."""
  return len(set(encoder.backend.encode("a b", add_special_tokens=False).word_ids)) > 1


def numbers(encoder: Any, e: tokenizers.Encoding, texts: Sequence[str]) -> np.ndarray:
  """Returns i32[n], the number of the word in its text, from 0, for each token; -1 for special tokens.

  Words are the tokenizer's own; where it divides nothing, what white space divides.
  """
  special = specials(encoder)
  if _splits(encoder):
    return np.array([-1 if w is None or i in special else w for w, i in zip(e.word_ids, e.ids)], np.int32)
  counts = []
  for text in texts:
    space = np.array([c.isspace() for c in text + " "])
    begins = ~space & np.concatenate([[True], space[:-1]])
    counts.append(np.cumsum(begins) - 1 + space)  # white space belongs to the word that follows it
  out = np.full(len(e.ids), -1, np.int32)
  for i, (which, (begin, end)) in enumerate(zip(e.sequence_ids, e.offsets)):
    if which is not None and e.ids[i] not in special:
      out[i] = counts[which][max(end - 1, begin)]
  return out


def of(encoder: Any, texts: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
  """Returns the numbers of single texts and pairs, as the encoder's own encode and encode_pairs have them."""
  backend = copy(encoder, "words") if not hasattr(encoder, "backend") else encoder.backend
  made = backend.encode_batch([t[0] if len(t) == 1 else t for t in texts]) if texts else []
  return [numbers(encoder, e, t) for e, t in zip(made, texts)]


def numbered(encode: Callable[[Sequence[Example], Any], Columns], texts: Callable[[Example], tuple[str, ...]]):
  """Returns `encode` with the field `words` of the inputs, where the task wants it; texts(example) are its inputs."""

  def both(examples: Sequence[Example], job: Any) -> Columns:
    out = encode(examples, job)
    if not job.task.words:
      return out
    return out._replace(aligned={**out.aligned, "words": of(job.encoder, [texts(e) for e in examples])})

  return both
