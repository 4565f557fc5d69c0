"""Batch prediction of labels, values and tags, from a file to a file. Catches: a label beside the wrong row, a batch or
padding that changes it, pairs as one text, tags beside the wrong words, settings of generation taken in silence."""

import json
import math

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from jaxft import decode, hub, trees
from jaxft.data import tokens
from jaxft.errors import InputError, NumbersError
from jaxft.families import registry
from jaxft.infer import labelling

WORDS = "a man reads two old books in the garden while rain falls".split()
HOW = dict(dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)
BERT = dict(
  model_type="bert", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
  max_position_embeddings=24)  # fmt: skip
NAMES = ("bad", "fair", "good")
TEXTS = [" ".join(WORDS[(5 * i + j) % len(WORDS)] for j in range(1 + i % 7)) for i in range(11)]


T5 = dict(
  model_type="t5", vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
  eos_token_id=3, decoder_start_token_id=0)  # fmt: skip
BART = dict(
  model_type="bart", vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
  decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, pad_token_id=0,
  bos_token_id=2, eos_token_id=3, decoder_start_token_id=3)  # fmt: skip


def model(folder, kind, labels, problem=None, given=BERT):
  vocab = {x: i for i, x in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s"])}
  t = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  t.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
  inputs = ["input_ids", *(["token_type_ids"] if given is BERT else []), "attention_mask"]
  transformers.PreTrainedTokenizerFast(tokenizer_object=t, model_input_names=inputs, **names).save_pretrained(folder)
  s = registry.skeleton(given, want=registry.Wanted(kind, labels, problem), **HOW)
  rng = np.random.default_rng(3)
  draw = lambda path, x: (rng.standard_normal(x.shape) * (not path.endswith("bias"))).astype(np.float32)
  params = trees.map_with_path(draw, s.shapes)
  more = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(folder, s.rules, params, s.json, **more)
  return s, params


def run(folder, rows, **given):
  (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  given = dict(template="{text}", batch=4, scores=True, overwrite=True) | given
  report = decode.decode(str(folder), str(folder / "in.jsonl"), str(folder / "out.jsonl"), **given)
  return [json.loads(x) for x in (folder / "out.jsonl").read_text().splitlines()], report


def alone(s, params, text, other=None):
  """Returns the head's outputs f32[M or T, C] of one text by itself, without padding."""
  words = lambda x: [4 + WORDS.index(w) for w in x.split()]
  ids = [2, *words(text), 3] + ([*words(other), 3] if other is not None else [])
  first = len(text.split()) + 2
  batch = dict(inputs=np.array([ids]), input_segments=np.ones((1, len(ids)), int), label_weights=np.ones((1, 1)))
  if s.json["model_type"] == "bert":
    batch["input_types"] = (np.arange(len(ids)) >= first).astype(int)[None]
  m = s.bind(params)
  return np.asarray(m.classify(batch, None) if s.kind == "classify" else m.tag(batch, None))[0]


@pytest.mark.parametrize("paired", [False, True])
def test_labels(tmp_path, paired):
  s, params = model(tmp_path, "classify", NAMES)
  others = [TEXTS[(3 * i + 1) % len(TEXTS)] for i in range(len(TEXTS))]
  rows = [dict(id=f"r{i}", text=a, b=b) for i, (a, b) in enumerate(zip(TEXTS, others))]
  got, report = run(tmp_path, rows, **(dict(pair="{b}") if paired else {}))
  assert report.code == 0 and [x["id"] for x in got] == [r["id"] for r in rows]
  for x, a, b in list(zip(got, TEXTS, others))[:4]:
    logits = alone(s, params, a, b if paired else None)[0]
    want = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert x["output"] == NAMES[logits.argmax()] and list(x["scores"]) == list(NAMES)
    np.testing.assert_allclose(list(x["scores"].values()), want, rtol=2e-5)
  assert len({x["output"] for x in got}) > 1, "else this shows nothing"
  assert all(set(x) == {"id", "output"} for x in run(tmp_path, rows, scores=False)[0])


@pytest.mark.parametrize("given", [T5, BART], ids=["t5", "bart"])
def test_labels_of_encoder_decoders(tmp_path, given):
  """As transformers: T5 and BART read the text on both sides and take the decoder's state at the end token."""
  torch = pytest.importorskip("torch", reason="no torch: labels of T5 and BART for new rows are not compared")
  model(tmp_path, "classify", NAMES, given=given)
  got, report = run(tmp_path, [dict(text=x) for x in TEXTS])
  name = dict(t5="T5ForSequenceClassification", bart="BartForSequenceClassification")[given["model_type"]]
  theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
  assert report.code == 0 and len({x["output"] for x in got}) > 1
  for x, text in zip(got, TEXTS):
    ids = [[2, *(4 + WORDS.index(w) for w in text.split()), 3]]
    with torch.no_grad():
      want = theirs(torch.tensor(ids)).logits.softmax(-1)[0].numpy()
    assert x["output"] == NAMES[want.argmax()]
    np.testing.assert_allclose(list(x["scores"].values()), want, rtol=2e-4)  # sums of several log-probabilities


def test_broken_numbers_are_named(tmp_path):
  """A number that is none in any of the logits, not in the first alone."""
  s, params = model(tmp_path, "classify", NAMES)
  worker = labelling.Labeller(s, tokens.load(str(tmp_path)), batch=4)
  broken = trees.map_with_path(lambda path, x: np.float32([0, 0, np.nan]) if x.shape == (3,) else x, params)
  with pytest.raises(NumbersError, match="not numbers for 2 of 2 inputs, among them .'r8', 'r7'"):
    list(worker.stream(broken, worker.encode(TEXTS[:2]), ids=["r7", "r8"]))


def test_several_labels_and_values(tmp_path):
  s, params = model(tmp_path, "classify", NAMES, "multi_label_classification")
  got, _ = run(tmp_path, [dict(text=x) for x in TEXTS])
  for x, text in list(zip(got, TEXTS))[3:6]:
    logits = alone(s, params, text)[0]
    assert x["output"] == [n for n, z in zip(NAMES, logits) if z > 0]
    np.testing.assert_allclose(list(x["scores"].values()), 1 / (1 + np.exp(-logits)), rtol=2e-5)
  s, params = model(tmp_path, "classify", ("LABEL_0",), "regression")
  got, _ = run(tmp_path, [dict(text=x) for x in TEXTS])
  assert all(math.isclose(x["output"], alone(s, params, t)[0, 0], rel_tol=2e-5) for x, t in list(zip(got, TEXTS))[5:8])
  assert "scores" not in got[0]


def test_tags_of_words(tmp_path):
  """Each word has a tag, that of its first piece; a word that was cut off has none."""
  s, params = model(tmp_path, "tag", ("O", "B-X", "I-X"))
  rows = [dict(text=x.split()) for x in TEXTS] + [dict(text=["books", "mans", "rain"]), dict(text=WORDS * 3)]
  got, report = run(tmp_path, rows, too_long="truncate")
  for x, text in list(zip(got, TEXTS))[3:6]:
    logits = alone(s, params, text)[1:-1]
    assert x["output"] == [s.labels[i] for i in logits.argmax(-1)] and len(x["scores"]) == len(text.split())
  assert len(got[-2]["output"]) == 3 and None not in got[-2]["output"]  # four pieces
  assert len(got[-1]["output"]) == 36 and got[-1]["output"].index(None) == 22  # 24 positions
  assert report.code == 0


def test_rows_that_do_not_fit(tmp_path):
  model(tmp_path, "classify", NAMES)
  got, report = run(tmp_path, [dict(text=TEXTS[1]), dict(other="x"), dict(text=" ".join(WORDS * 3))])
  assert report.code == 3 and got[0]["output"] in NAMES
  assert "text" in got[1]["error"] and got[2]["error"] == "the input has 38 tokens, the limit is 24"
  with pytest.raises(InputError, match="beams: settings of models that write text"):
    run(tmp_path, [dict(text="a")], beams=4)
  with pytest.raises(InputError, match="--template, too"):
    run(tmp_path, [dict(text="a")], template="", pair="{b}")
