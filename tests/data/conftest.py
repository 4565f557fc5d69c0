"""Tokenizers made on the spot: ByT5's bytes, and a small Unigram with `</s>` at the end as T5's."""

import pytest
import tokenizers
import transformers

from jaxft.data import cache, clean, tasks, tokens

TEXT = [
  "Zwei junge Männer stehen im Freien.",
  "Two young men are outside.",
  "A man in a blue shirt cleans a window.",
  "Ein Mann putzt ein Fenster.",
]


@pytest.fixture(scope="session")
def byt5(tmp_path_factory):
  folder = tmp_path_factory.mktemp("byt5")
  transformers.ByT5Tokenizer(extra_ids=7).save_pretrained(folder)
  return tokens.load(str(folder))


@pytest.fixture(scope="session")
def unigram(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unigram")
  t = tokenizers.Tokenizer(tokenizers.models.Unigram())
  t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  t.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=61, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
  )
  t.train_from_iterator(TEXT * 5, trainer)
  t.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
  )
  fast.save_pretrained(folder)
  return tokens.load(str(folder))


@pytest.fixture
def make_store(byt5, tmp_path):
  """Returns a function that opens a store of pairs of (input, target), with any argument of `open_or_build`
  replaced.
  """

  def make(pairs=None, **given):
    source = given.pop("source", None)
    if source is None:
      (tmp_path / "in.txt").write_text("".join(a + "\n" for a, _ in pairs))
      (tmp_path / "out.txt").write_text("".join(b + "\n" for _, b in pairs))
      source = dict(a=str(tmp_path / "in.txt"), b=str(tmp_path / "out.txt"))
    arguments = dict(
      tokenizer=byt5,
      task=tasks.Task("seq2seq", "{input}", "{target}"),
      clean=clean.NOTHING,
      lengths=dict(inputs=41, targets=29),
      too_long="error",
      too_long_share=0.0,
      limit=0,
      root=str(tmp_path / "cache"),
      workers=1,
    )
    return cache.open_or_build(source, **{**arguments, **given})

  return make
