"""How texts become ids, without transformers: what worker processes are given instead of a whole tokenizer.

All agree with transformers' own call, special tokens included, and none pads or truncates.
"""

import json
import pickle
import re

import tokenizers

BYTE_OFFSET = 3  # ByT5: 0 pad, 1 end of text, 2 unknown, then the 256 bytes


class Fast:
  """A tokenizer of the `tokenizers` library; 19,000 German sentences/s on one core."""

  def __init__(self, backend: tokenizers.Tokenizer):
    self.backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy: its settings are ours alone
    self.backend.no_padding()
    self.backend.no_truncation()

  def encode(self, texts):
    return [e.ids for e in self.backend.encode_batch_fast(texts)]

  def serialised(self) -> str:
    return self.backend.to_str()


class Bytes:
  """ByT5: id = byte + 3, then EOS. A text that spells a special token (`</s>`, `<extra_id_0>`) goes to transformers."""

  def __init__(self, hf):
    self.slow = Slow(hf)
    self.eos = hf.eos_token_id
    self.special = re.compile("|".join(re.escape(t) for t in hf.added_tokens_encoder) or r"(?!)")
    self.table = bytes((b + BYTE_OFFSET) % 256 for b in range(256))  # UTF-8 ends at byte 244: nothing wraps

  def encode(self, texts):
    return [self._one(t) for t in texts]

  def _one(self, text):
    if self.special.search(text):
      return self.slow.encode([text])[0]
    return [*text.encode("utf-8").translate(self.table), self.eos]

  def serialised(self) -> str:
    return self.slow.serialised()


class Slow:
  """transformers itself; pickled as bytes, so that a process that never calls it never imports it."""

  def __init__(self, hf):
    self._hf, self._pickled = hf, b""

  @property
  def hf(self):
    if self._hf is None:
      self._hf = pickle.loads(self._pickled)
    return self._hf

  def __getstate__(self):
    return {"_hf": None, "_pickled": self._pickled or pickle.dumps(self._hf)}

  def encode(self, texts):
    return self.hf(list(texts), truncation=False, padding=False)["input_ids"] if texts else []

  def serialised(self) -> str:
    return json.dumps(
      [sorted(self.hf.get_vocab().items(), key=str), repr(sorted(self.hf.init_kwargs.items(), key=str))]
    )
