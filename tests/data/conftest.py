"""Tokenizers made on the spot: ByT5's bytes, a small Unigram with `</s>` at the end as T5's, and the like of BERT's,
GPT-2's and Llama's.
"""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxft.data import cache, clean, pipeline, tasks, tokens

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


def saved(folder, tokenizer, **given):
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given).save_pretrained(folder)
  return tokens.load(str(folder))


@pytest.fixture(scope="session")
def unigram(tmp_path_factory):
  t = tokenizers.Tokenizer(models.Unigram())
  t.pre_tokenizer = pre_tokenizers.Metaspace()
  t.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(vocab_size=61, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
  t.train_from_iterator(TEXT * 5, trainer)
  t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  folder = tmp_path_factory.mktemp("unigram")
  return saved(folder, t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory):
  """As BERT's: [CLS] A [SEP] B [SEP] with token types, no BOS and no EOS."""
  t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  t.train_from_iterator(TEXT * 5, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
  t.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
  return saved(
    tmp_path_factory.mktemp("wordpiece"),
    t,
    model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    **names,
  )


@pytest.fixture(scope="session")
def bytelevel(tmp_path_factory):
  """As GPT-2's: nothing is added, one special token for all, no padding token, no space before the first word."""
  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  t.train_from_iterator(
    TEXT * 5, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
  )
  folder = tmp_path_factory.mktemp("bytelevel")
  return saved(folder, t, eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>")


@pytest.fixture(scope="session")
def bosbpe(tmp_path_factory):
  """As Llama's: <s> before every text, bytes for what it does not know, `</s>` never added."""
  t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
  t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  t.decoder = decoders.Metaspace(prepend_scheme="first")
  special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  t.train_from_iterator(TEXT * 5, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
  t = tokenizers.Tokenizer.from_str(json.dumps(_without_bytes(json.loads(t.to_str()))))
  t.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
  )
  return saved(tmp_path_factory.mktemp("bosbpe"), t, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def _without_bytes(tokenizer):
  """Bytes are entries of the vocabulary, not special tokens that a text may spell."""
  tokenizer["added_tokens"] = [x for x in tokenizer["added_tokens"] if not x["content"].startswith("<0x")]
  return tokenizer


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


@pytest.fixture
def rows_store(make_store, tmp_path):
  """Returns a function that opens a store of rows (dicts) for a task: kind, and whatever else `tasks.Task` takes."""

  def make(rows, tokenizer, kind, *, length=41, name="x.jsonl", **given):
    given = dict(lengths=dict(inputs=length, targets=length)) | given
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = {k: given.pop(k) for k in tasks.Task.__dataclass_fields__ if k in given}
    task = tasks.Task(kind, **{"input": "{input}", **own})
    return make_store(source=str(path), tokenizer=tokenizer, task=task, **given)

  return make


@pytest.fixture
def batches():
  """Returns a function that makes the batches of a store, with any argument of `pipeline.Batches` replaced."""

  def make(store, **given):
    arguments = dict(seed=5, batch=6, lengths=store.caps, pack=True, buckets=(), shuffle=True)
    return pipeline.Batches(store, **{**arguments, **given})

  return make
