"""Tokenizers that encode what is written otherwise than what is read. Catches: targets in the pieces of the source
language (Marian), under the mark of the source language (mBART), answers that start in the wrong language."""

import json

import pytest
import sentencepiece
import transformers

from jaxft import config, modeling
from jaxft.data import tokens
from jaxft.errors import InputError
from tests.data.conftest import TEXT

GERMAN, ENGLISH = [TEXT[0], TEXT[3]], [TEXT[1], TEXT[2]]


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
  folder, pieces = tmp_path_factory.mktemp("marian"), {}
  for name, texts in (("source", ENGLISH), ("target", GERMAN)):
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts * 9), model_prefix=str(folder / name), vocab_size=40, hard_vocab_limit=False,
      minloglevel=2)  # fmt: skip
    (folder / f"{name}.model").rename(folder / f"{name}.spm")
    model = sentencepiece.SentencePieceProcessor(str(folder / f"{name}.spm"))
    pieces |= dict.fromkeys(model.id_to_piece(i) for i in range(3, model.get_piece_size()))
  vocab = ["</s>", "<unk>", *pieces, ">>de<<", "<pad>"]
  (folder / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(vocab)}))
  made = transformers.MarianTokenizer(
    str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), source_lang="en",
    target_lang="de")  # fmt: skip
  made.save_pretrained(folder / "saved")
  return tokens.load(str(folder / "saved"))


def many(kind, folder, **given):
  words = [(x, -2.0) for text in TEXT for w in text.split() for x in ("▁" + w, *w)]
  special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  codes = [(x, 0.0) for x in ("en_XX", "de_DE")]
  kind(vocab=[*special, *dict(words).items(), *codes], **given).save_pretrained(folder)
  return folder


MANY = dict(mbart=transformers.MBartTokenizer, mbart50=transformers.MBart50Tokenizer)


def test_marian_writes_in_the_pieces_of_its_target(marian):
  want = marian.hf(text_target=GERMAN)["input_ids"]
  assert marian.target_encoder.encode(GERMAN) == want != marian.encode(GERMAN)
  assert marian.encode(ENGLISH) == marian.hf(ENGLISH)["input_ids"]  # and it reads as before
  assert marian.hf.unk_token_id not in sum(want, []) and marian.target_start is None
  assert marian.decode(want) == GERMAN


@pytest.mark.parametrize("name", MANY)
def test_many_languages(name, tmp_path):
  folder = many(MANY[name], tmp_path / "all")
  t = tokens.load(str(folder), ("en_XX", "de_DE"))
  en, de, eos = (t.hf.convert_tokens_to_ids(x) for x in ("en_XX", "de_DE", "</s>"))
  (read,), (written,) = t.encode(ENGLISH[:1]), t.target_encoder.encode(GERMAN[:1])
  assert written == t.hf(text_target=GERMAN[0])["input_ids"] and read == t.hf(ENGLISH[0])["input_ids"]
  if name == "mbart":
    assert read[-2:] == [eos, en] and written[-2:] == [eos, de] and t.target_start == (-1, de)
    assert t.last >= {eos, en, de}
  else:
    assert (read[0], written[0]) == (en, de) and read[-1] == written[-1] == eos and t.target_start == (0, de)
  other = tokens.load(str(folder), ("en_XX", "en_XX"))
  assert other.fingerprint != t.fingerprint  # else a cache of other targets would be taken
  t.save(tmp_path / "again")
  again = tokens.load(str(tmp_path / "again"))
  assert (again.fingerprint, again.target_start) == (t.fingerprint, t.target_start)


def test_wrong_languages(tmp_path, unigram):
  folder = str(many(MANY["mbart"], tmp_path))
  with pytest.raises(InputError, match=r"'de_De' \(did you mean .de_DE.\?\)"):
    tokens.load(folder, ("en_XX", "de_De"))
  with pytest.raises(InputError, match=r"\(read, written\)"):
    tokens.load(folder, ("en_XX",))
  with pytest.raises(InputError, match="marks no languages"):
    tokens.load(unigram.name, ("en_XX", "de_DE"))


@pytest.mark.parametrize("name", MANY)
def test_the_store_has_targets_of_their_own(name, tmp_path, marian, make_store):
  t = tokens.load(str(many(MANY[name], tmp_path / "all")), ("en_XX", "de_DE"))
  for tokenizer, most in ((t, 64), (t, 4), (marian, 64)):
    lengths = dict(inputs=most, targets=most)
    store = make_store(list(zip(ENGLISH, GERMAN)), tokenizer=tokenizer, lengths=lengths, too_long="truncate",
                       too_long_share=1.0)  # fmt: skip
    for i, want in enumerate(tokenizer.target_encoder.encode(GERMAN)):
      assert store.tokens("targets", i).tolist() == (want if most == 64 else [*want[:3], want[-1]])
    assert store.report["eos_last"] == 1


def test_answers_start_with_the_language(tmp_path):
  folder = many(MANY["mbart50"], tmp_path / "all")
  size = tokens.load(str(folder)).size
  c = config.base()
  c.model.config = dict(
    model_type="mbart", vocab_size=size, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32)  # fmt: skip
  c.model.tokenizer, c.model.languages = str(folder), ("en_XX", "de_DE")
  r = config.Reader(config.check(c))
  m = modeling.make(r, modeling.source(r), None)
  assert modeling.generation_config(m)["forced_bos_token_id"] == m.tokenizer.hf.convert_tokens_to_ids("de_DE")
