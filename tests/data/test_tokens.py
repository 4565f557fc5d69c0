"""Our encoders give exactly what transformers gives.

Catches: a missing or doubled EOS, bytes shifted by another offset, special tokens spelled in a text, a fingerprint that
ignores the vocabulary or the post-processor, a padding or truncation setting that came with the file.
"""

import pickle

import pytest
import tokenizers
import transformers

from jaxft.data import encoders, tokens
from jaxft.errors import InputError

TEXTS = [
  "",
  " ",
  "a",
  " Zwei junge  Männer \n",
  "日本語 🎉 \x00\x7f",
  "a</s>b",
  "a </s> b",
  "<pad>x",
  "x<unk>",
  "<extra_id_0> und <extra_id_1>",
  "<extra_id_99>",
  "</s>",
  "tab\tü\r\n" * 30,
]


def test_bytes_equal_transformers(byt5):
  assert isinstance(byt5.encoder, encoders.Bytes)
  assert byt5.encode(TEXTS) == [byt5.hf(t)["input_ids"] for t in TEXTS]
  assert byt5.encode(["ab"]) == [[100, 101, 1]] and (byt5.pad, byt5.eos, byt5.size) == (0, 1, 3 + 256 + 7)
  assert byt5.decode(byt5.encode(["Männer 🎉"]) + [[0, 0, 100, 1, 0]]) == ["Männer 🎉", "a"]


def test_fast_equals_transformers(unigram):
  assert isinstance(unigram.encoder, encoders.Fast)
  assert unigram.encode(TEXTS) == unigram.hf(TEXTS)["input_ids"]
  assert all(ids[-1] == unigram.eos == 1 for ids in unigram.encode(TEXTS[2:]))
  assert unigram.decode(unigram.encode(["Two young men"])) == ["Two young men"]


def test_slow_tokenizers_go_through_transformers(byt5):
  slow = encoders.Slow(byt5.hf)
  again = pickle.loads(pickle.dumps(slow))
  assert again._hf is None and again.encode(TEXTS) == byt5.encode(TEXTS) and slow.encode([]) == []


@pytest.mark.parametrize("name", ["byt5", "unigram"])
def test_encoder_pickles(name, request):
  t = request.getfixturevalue(name)
  assert pickle.loads(pickle.dumps(t.encoder)).encode(TEXTS) == t.encode(TEXTS)


def test_save_and_fingerprint(unigram, byt5, tmp_path):
  unigram.save(tmp_path / "same")
  same = tokens.load(str(tmp_path / "same"))
  assert same.fingerprint == unigram.fingerprint != byt5.fingerprint
  backend = tokenizers.Tokenizer.from_str(unigram.hf.backend_tokenizer.to_str())
  backend.enable_truncation(2)
  backend.enable_padding(length=9)
  cut = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
  )
  cut.save_pretrained(tmp_path / "cut")
  assert tokens.load(str(tmp_path / "cut")).encode(TEXTS) == unigram.encode(TEXTS)
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(
    tmp_path / "bare"
  )
  assert tokens.load(str(tmp_path / "bare")).fingerprint != unigram.fingerprint


def test_check_vocab(byt5):
  tokens.check_vocab(byt5, byt5.size)
  with pytest.raises(InputError, match=r"ids up to 265.*has 265 entries.*resize"):
    tokens.check_vocab(byt5, byt5.size - 1)


def test_folder_without_tokenizer(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(InputError, match="config.json"):
    tokens.load(str(tmp_path))
