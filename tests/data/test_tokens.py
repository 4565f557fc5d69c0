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


@pytest.mark.parametrize("name", ["byt5", "unigram", "wordpiece", "bytelevel"])
def test_encoder_pickles(name, request):
  t = request.getfixturevalue(name)
  again = pickle.loads(pickle.dumps(t.encoder))
  assert again.encode(TEXTS) == t.encode(TEXTS) and again.types == t.encoder.types == (name == "wordpiece")
  assert again.encode_pairs(TEXTS, TEXTS[::-1]) == t.encoder.encode_pairs(TEXTS, TEXTS[::-1])


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel", "bosbpe", "unigram", "byt5"])
def test_pairs_equal_transformers(name, request):
  t = request.getfixturevalue(name)
  others = [*TEXTS[3:], *TEXTS[:3]]
  ids, types, places = t.encoder.encode_pairs(TEXTS, others)
  want = t.hf(TEXTS, others)
  assert ids == want["input_ids"] and types == want.get("token_type_ids", [[]] * len(TEXTS))
  for pair, (a, b, c, d), *both in zip(ids, places, TEXTS, others):
    alone = [t.hf(x, add_special_tokens=False)["input_ids"] for x in both]
    assert pair[a:b] == alone[0] and pair[c:d] == alone[1] and 0 <= a <= b <= c <= d <= len(pair)


def test_offsets_and_special_tokens(bosbpe):
  ((ids, offsets, added),) = bosbpe.encoder.encode_offsets(["a </s> man"], special=True)
  assert ids == bosbpe.hf("a </s> man")["input_ids"] and added.tolist() == [True] + [False] * (len(ids) - 1)
  at = ids.index(bosbpe.eos)
  assert offsets.dtype == "int32" and offsets[at].tolist() == [2, 6]
  ((bare, _, none),) = bosbpe.encoder.encode_offsets(["a </s> man"], special=False)
  assert bare == ids[1:] and not none.any()


def test_special_ids(wordpiece, bytelevel, unigram):
  assert (wordpiece.bos, wordpiece.eos, wordpiece.sep, wordpiece.pad, wordpiece.unk) == (None, None, 3, 0, 1)
  assert (bytelevel.bos, bytelevel.eos, bytelevel.pad, bytelevel.unk) == (
    0,
    0,
    None,
    None,
  )  # 0 says the end, not unknown
  assert (unigram.eos, unigram.unk) == (1, 2)


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
