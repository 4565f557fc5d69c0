"""Texts of which a part is hidden and is to be restored: masked tokens (mlm, mlm_nsp), spans behind sentinels.

A store has the whole texts; what is hidden is chosen batch by batch (`fields.Dynamic`), anew in each epoch, by
`masking`, so that an example is hidden in the same way in whatever row or batch it stands.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data import masking, words
from jaxft.data.clean import utf8
from jaxft.data.fields import Columns, Example
from jaxft.data.templates import value
from jaxft.errors import InputError

SENTENCE = re.compile(r"(?<=[.!?])\s+")
ALONE = "fewer than two sentences"
PAIR_SPECIALS = 3  # [CLS] a [SEP] b [SEP]

# ---- masked tokens


def encode_masked(examples: Sequence[Example], job: Any) -> Columns:
  """Texts with the tokenizer's special tokens; a longer text gives several examples, which each have them."""
  backend, special = _cutting(job), words.specials(job.encoder)
  ids, types, numbers, rows = [], [], [], []
  for i, (text, first) in enumerate(zip([e.parts for e in examples], _batch(backend, [e.parts for e in examples]))):
    for e in (first, *first.overflowing):
      if not special.issuperset(e.ids):
        ids.append(e.ids)
        types.append(e.type_ids if job.encoder.types else [0] * len(e.ids))
        rows.append(i)
        if job.task.words:
          numbers.append(words.numbers(job.encoder, e, (text,)))
  aligned = dict(types=types) | (dict(words=numbers) if job.task.words else {})
  return Columns(dict(inputs=ids), aligned, rows=rows, texts=[(examples[i].input, "") for i in rows])


def _batch(backend: Any, texts: list[str]) -> list:
  return backend.encode_batch(texts) if texts else []


def _cutting(job: Any) -> Any:
  """Returns the tokenizer that cuts texts at job.lengths, made once a process."""
  if not hasattr(job, "cutting"):
    job.cutting = words.copy(job.encoder, "masked tokens")
    length, stride = job.lengths["inputs"], max(job.task.stride, 0)
    room = length - job.cutting.num_special_tokens_to_add(False)
    if stride >= room:
      raise InputError(
        f"config: task.stride is {stride}, but a piece has room for only {max(room, 0)} tokens of text "
        "(data.lengths.inputs); each must bring some that are new."
      )
    job.cutting.enable_truncation(length, stride=stride)
  return job.cutting


def hide(
  batch: dict[str, np.ndarray],
  ids: np.ndarray,
  places: np.ndarray,
  seed: int,
  epoch: int,
  *,
  special: tuple[int, ...],
  mask_id: int,
  vocab: int,
  share: float,
  whole_word: bool,
) -> dict[str, np.ndarray]:
  """Returns the batch with masked `inputs`, the tokens that stood there as `targets` i32[B, T] and their `weights`
  f32[B, T]; a `Dynamic.batch`.
  """
  batch = dict(batch)
  tokens, numbers = batch["inputs"], batch.pop("words", None)
  ordinary = np.ones(vocab, bool)
  ordinary[[x for x in special if x < vocab]] = False
  batch["inputs"], batch["weights"] = masking.mlm(
    tokens, ids, places, (ids >= 0) & ordinary[tokens], numbers if whole_word else None, mask_id=mask_id, vocab=vocab,
    seed=seed, epoch=epoch, share=share, whole_word=whole_word, special=special,
  )  # fmt: skip
  return dict(batch, targets=tokens)


def mean_hidden(lengths: np.ndarray, share: float) -> float:
  """Returns how many tokens of a pair of texts are masked on average, from i32[N] their lengths."""
  n = np.maximum(lengths.astype(np.float64) - PAIR_SPECIALS, 1)
  return float(np.mean(share * n + (1 - share) ** n))


# ---- pairs of sentences


def render_sentences(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  """`parts` is the list of sentences: that of the row, else the lines of the text, else what full stops divide."""
  found = value(task.input, "input", row, fix, where)
  if isinstance(found, bytes):
    found = utf8(found, f"{where}: task.input")
  if isinstance(found, str):
    lines = found.splitlines()
    found = lines if sum(bool(x.strip()) for x in lines) > 1 else SENTENCE.split(found)
  if not isinstance(found, (list, tuple, type(None))) or not all(isinstance(x, str) for x in found or ()):
    raise InputError(f"{where}: task.input gives {found!r:.60}; it should be a text, or a list of sentences.")
  sentences = [x for x in (fix(s).strip() for s in found or ()) if x]
  drop = ALONE if len(sentences) < 2 else ""
  return Example("\n".join(sentences), "", sum(map(len, sentences)), None, int(found is None), sentences, drop)


def encode_pairs(examples: Sequence[Example], job: Any) -> Columns:
  """Pairs of neighbouring sentences, half of them with a random second one; drawn once, from the documents of a chunk
  of rows (about 1,000), so in the same way for any number of processes."""
  documents = [e.parts for e in examples]
  rows = [i for i, d in enumerate(documents) for _ in d[1:]]
  digest = hashlib.blake2b("\n".join(documents[0]).encode() if documents else b"", digest_size=8).digest()
  pairs = list(masking.nsp(documents, int.from_bytes(digest, "little") >> 1))
  if not pairs:
    return Columns(dict(inputs=[]), rows=[], scalars=dict(labels=np.zeros(0, np.int32)), texts=[])
  both = [(p.a, p.b) for p in pairs]
  ids, types, places = job.encoder.encode_pairs(*zip(*both))
  aligned = dict(types=[t or [0] * len(x) for t, x in zip(types, ids)])
  if job.task.words:
    aligned["words"] = words.of(job.encoder, both)
  labels = np.array([not p.is_next for p in pairs], np.int32)  # as transformers: 0 is next
  return Columns(
    dict(inputs=ids), aligned, dict(labels=labels, places=np.array(places, np.int32)), rows=rows,
    texts=[(f"{p.a}\n{p.b}", "next" if p.is_next else "random") for p in pairs],
    counts=dict(pairs=len(pairs), next=sum(p.is_next for p in pairs)),
  )  # fmt: skip


# ---- spans


def encode_raw(examples: Sequence[Example], job: Any) -> Columns:
  """Texts without an end-of-text token, which `spans` puts at the ends of both sides."""
  made = job.encoder.encode([e.parts for e in examples])
  return Columns(dict(inputs=[x[:-1] if len(x) and x[-1] == job.eos else x for x in made]))


def span_lengths(lengths: np.ndarray, *, density: float, span: float) -> Mapping[str, np.ndarray]:
  """Returns i32[N] tokens a side of texts of i32[N] tokens; a `Dynamic.lengths_of`."""
  return dict(
    zip(("inputs", "targets"), (x.astype(np.int32) for x in masking.corrupted_lengths(lengths, density, span)))
  )


def spans(
  tokens: np.ndarray, lengths: np.ndarray, ids: np.ndarray, seed: int, epoch: int, *, density: float, span: float,
  sentinels: np.ndarray, eos: int,
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
  """Returns the corrupted sides of several texts; a `Dynamic.corrupt`."""
  made = masking.corrupt_batch(
    tokens, lengths, ids, seed=seed, epoch=epoch, sentinels=sentinels, eos=eos, density=density, mean=span, roll=True
  )
  return dict(zip(("inputs", "targets"), made))
