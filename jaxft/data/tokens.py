"""Tokenizers: the only door to `transformers` in this package, with the work itself done by faster means that agree
with it.

A tokenizer of the `tokenizers` library (nearly all) encodes through that library, without transformers' wrapper and, in
worker processes, without importing transformers (4 s where torch is installed). ByT5's bytes are made here: its Python
implementation does 4,500 sentences/s, this one 300,000. Anything else goes through transformers itself.
"""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxft import hub
from jaxft.data import encoders
from jaxft.errors import InputError, did_you_mean

log = logging.getLogger("jaxft")


class Tokenizer:
  """Texts to ids with the special tokens that its transformers tokenizer adds (EOS for T5), and back without them.

  `size` is the largest id + 1; `pad`, `bos`, `eos`, `sep`, `unk` are ids or None; `fingerprint` changes with
  anything that changes ids. `encoder` does the encoding and pickles without transformers; `target_encoder` is another
  one where texts to be written are encoded otherwise than texts to be read (Marian, mBART). `target_start` is
  (number, id) of the special token, the first (0) or the last (-1) of a target, that names its language, or None.
  """

  def __init__(self, hf: Any, name: str):
    self.hf, self.name = hf, name
    self.encoder, self.target_encoder = _encoder(hf), _target_encoder(hf)
    self.target_start = None
    if self.target_encoder is None:
      self.target_encoder = self.encoder
    elif getattr(hf, "tgt_lang", None):
      code, empty = hf.convert_tokens_to_ids(hf.tgt_lang), self.target_encoder.encode([""])[0]
      self.target_start = next(((i, code) for i in (0, -1) if empty and empty[i] == code), None)
    vocab = hf.get_vocab()
    self.size = max(vocab.values()) + 1
    self.bos, self.eos, self.sep, self.pad = hf.bos_token_id, hf.eos_token_id, hf.sep_token_id, hf.pad_token_id
    self.unk = None if hf.unk_token_id in (self.bos, self.eos) else hf.unk_token_id  # GPT-2 names its end of text so
    self.last = {self.eos, self.sep} - {None}  # what marks the end of a text, mBART's languages among it
    for encoder in (self.encoder, self.target_encoder) if hasattr(hf, "lang_code_to_id") else ():
      self.last.update(encoder.encode([""])[0][-1:])
    self.fingerprint = _fingerprint(self)

  def encode(self, texts: list[str]) -> list[list[int]]:
    return self.encoder.encode(texts)

  def encode_whole(self, texts: list[str]) -> list[list[int]]:
    """Returns the ids of texts that spell all their special tokens: none are added."""
    return [ids for ids, _, _ in self.encoder.encode_offsets(texts, special=False)]

  def decode(self, ids: list[list[int]], special: bool = False) -> list[str]:
    """Returns the texts; special tokens (padding, EOS) are left out unless `special`."""
    return self.hf.batch_decode([list(map(int, x)) for x in ids], skip_special_tokens=not special)

  def pieces(self, ids: list[int]) -> list[str]:
    """Returns the text of each id by itself, for display."""
    return [str(x) for x in self.hf.convert_ids_to_tokens([int(i) for i in ids])]

  def save(self, folder) -> None:
    """Writes the tokenizer's files as transformers does."""
    self.hf.save_pretrained(str(folder))


def _encoder(hf):
  if type(hf).__name__ == "ByT5Tokenizer":
    return encoders.Bytes(hf)
  if not getattr(hf, "is_fast", False):
    return encoders.Slow(hf)
  return encoders.Fast(hf.backend_tokenizer, types="token_type_ids" in hf.model_input_names)


def _target_encoder(hf):
  """Returns the encoder of targets, or None where it is that of inputs."""
  if not hasattr(hf, "_switch_to_target_mode"):
    return None
  if not getattr(hf, "is_fast", False):
    return encoders.Targets(hf)
  hf._switch_to_target_mode()
  made = _encoder(hf)
  hf._switch_to_input_mode()
  return made


def _fingerprint(tokenizer: Tokenizer) -> str:
  special = [tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.sep]
  both = [tokenizer.encoder, tokenizer.target_encoder][: 1 + (tokenizer.target_encoder is not tokenizer.encoder)]
  text = json.dumps([x for e in both for x in (type(e).__name__, e.serialised())] + special)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load(path_or_id: str, languages: Sequence[str] = ()) -> Tokenizer:
  """Returns the tokenizer of a local folder or a Hub id; never runs code that comes with it.

  `languages` are the codes of the language that is read and of that which is written, for a tokenizer that has such;
  empty: those of its files.
  """
  folder = pathlib.Path(hub.resolve(path_or_id))
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is meant
  from transformers import AutoTokenizer
  from transformers.utils import logging

  logging.set_verbosity_error()  # transformers' hints concern its own models
  try:
    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
  except (OSError, ValueError, ImportError, KeyError) as e:
    has = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "nothing"
    raise InputError(
      f"tokenizer: {path_or_id} has none that transformers can load ({str(e).strip()[:300]}); the folder holds {has}. "
      "tokenizer.json with tokenizer_config.json, or spiece.model, is needed; set model.tokenizer to where they are."
    ) from e
  if languages:
    _set_languages(hf, str(path_or_id), languages)
  elif hasattr(hf, "lang_code_to_id"):
    log.info(
      "The tokenizer of %s marks languages: %s is read, %s written (model.languages).", path_or_id, hf.src_lang,
      hf.tgt_lang or hf.src_lang)  # fmt: skip
  return Tokenizer(hf, str(path_or_id))


def _set_languages(hf: Any, name: str, languages: Sequence[str]) -> None:
  known = getattr(hf, "lang_code_to_id", None)
  if known is None:
    raise InputError(f"config: model.languages is {tuple(languages)}, but the tokenizer of {name} marks no languages.")
  for code in languages:
    if code not in known:
      raise InputError(
        f"config: model.languages has {code!r}{did_you_mean(code, known)}; the tokenizer of {name} has "
        f"{', '.join(sorted(known))}."
      )
  if len(languages) != 2:
    raise InputError(
      f"config: model.languages is {tuple(languages)}; it is (read, written), such as ('en_XX', 'ro_RO')."
    )
  hf.src_lang, hf.tgt_lang = languages
  hf.init_kwargs.update(src_lang=languages[0], tgt_lang=languages[1])  # these are what is saved


def check_vocab(tokenizer: Tokenizer, vocab: int) -> None:
  """Raises InputError where the tokenizer has ids that a model with `vocab` embeddings does not know."""
  if tokenizer.size > vocab:
    raise InputError(
      f"tokenizer: {tokenizer.name} has ids up to {tokenizer.size - 1:,}, but the model's vocabulary has {vocab:,} "
      "entries "
      f"({tokenizer.size - vocab:,} too few). It is the tokenizer of another model; set model.tokenizer to the right "
      "one, or "
      "--config.model.resize=True if you added tokens on purpose."
    )
