"""Batch answers to questions, from a file to a file. Catches: windows of one question in two places, an answer that
depends on the batch, padding or other questions, windows other than those of training, texts stripped or normalised so
that places shift, a question too long for its windows that stops the others.
"""

import json

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from jaxft import decode, decoding, hub, trees
from jaxft.data import squad, tokens
from jaxft.errors import InputError, NumbersError
from jaxft.families import registry
from jaxft.infer import answering

WORDS = "a man reads two old books in the garden while rain falls".split()
HOW = dict(dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)
BERT = dict(
  model_type="bert", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
  max_position_embeddings=26)  # fmt: skip
SPAN = 6  # a third of the windows of 20 tokens, as of training by default


def context(i, n):
  return "  ".join(WORDS[(7 * i + 5 * j + j * j // 3) % len(WORDS)] for j in range(n)) + " "


ROWS = [dict(id=f"q{i}", question=WORDS[i % 9], context=context(i, n)) for i, n in enumerate((3, 40, 9, 23, 5, 61, 14))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns (folder, skeleton, weights, what cuts windows of 20 tokens)."""
  folder = tmp_path_factory.mktemp("qa")
  vocab = {x: i for i, x in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
  t = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  t.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
  inputs = ["input_ids", "token_type_ids", "attention_mask"]
  transformers.PreTrainedTokenizerFast(tokenizer_object=t, model_input_names=inputs, **names).save_pretrained(folder)
  s = registry.skeleton(BERT, want=registry.Wanted("qa"), **HOW)
  rng = np.random.default_rng(3)
  draw = lambda path, x: (rng.standard_normal(x.shape) * (not path.endswith("bias"))).astype(np.float32)
  params = trees.map_with_path(draw, s.shapes)
  more = dict(dtype="float32", shard_gb=1, generation_config=None, tokenizer_from=None)
  hub.save(folder, s.rules, params, s.json, **more)
  return folder, s, params, squad.windows(tokens.load(str(folder)).encoder, 20, SPAN)


def run(folder, rows, out, **given):
  (out / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  given = dict(batch=4, scores=True, overwrite=True, inputs_length=20) | given
  report = decode.decode(str(folder), str(out / "in.jsonl"), str(out / "out.jsonl"), **given)
  return [json.loads(x) for x in (out / "out.jsonl").read_text().splitlines()], report


def alone(model, row, null=None):
  """Returns the best answers of a question, from each of its windows by itself, without padding."""
  _, s, params, windows = model
  features = windows.features([squad.Question(None, row["question"], row["context"], (), "")])[0]
  batch = lambda f: dict(inputs=f.ids[None], input_types=f.types[None], input_segments=np.ones((1, len(f.ids)), int))
  logits = [np.asarray(s.bind(params).tag(batch(f), None))[0] for f in features]
  starts, ends = ([x[:, k] for x in logits] for k in (0, 1))
  return squad.decode(starts, ends, features, row["context"], null_threshold=null), len(features)


def test_answers(model, tmp_path, monkeypatch):
  monkeypatch.setattr(answering, "GROUP", 1)  # of four questions
  got, report = run(model[0], ROWS, tmp_path)
  assert report.code == 0 and [x["id"] for x in got] == [r["id"] for r in ROWS]
  counts = []
  for x, row in zip(got, ROWS):
    want, n = alone(model, row)
    counts.append(n)
    assert x["output"] == want[0][0] and x["output"] in row["context"]
    assert [b["output"] for b in x["scores"]][:3] == [text for text, _, _ in want][:3]
    np.testing.assert_allclose([b["probability"] for b in x["scores"]], [p for *_, p in want], rtol=1e-4, atol=1e-6)
  assert min(counts) == 1 and max(counts) > 4 and len({x["output"] for x in got}) > 3, "else this shows little"
  plain, _ = run(model[0], ROWS, tmp_path, scores=False, batch=1)
  assert plain == [dict(id=x["id"], output=x["output"]) for x in got]


def test_names_of_columns_and_rows_that_do_not_fit(model, tmp_path):
  rows = [dict(q=r["question"], c=r["context"]) for r in ROWS[:2]]
  rows += [dict(q=" ".join(WORDS * 2), c="a man"), dict(q="a", c=" "), dict(q="a")]
  got, report = run(model[0], rows, tmp_path, template="{q}", pair="{c}")
  assert [x["output"] for x in got[:2]] == [alone(model, r)[0][0][0] for r in ROWS[:2]]
  assert report.code == 3 and "24 tokens" in got[2]["error"]
  assert "context is empty" in got[3]["error"] and "c" in got[4]["error"]
  with pytest.raises(InputError, match="--pair that of the text with the answer"):
    run(model[0], rows, tmp_path, template="{q}")
  with pytest.raises(InputError, match="top_p: settings of models that write text"):
    run(model[0], rows, tmp_path, top_p=0.5)


def test_the_nested_json_of_squad(model, tmp_path):
  qas = [dict(id=f"n{i}", question=q, answers=[]) for i, q in enumerate(("two", "rain"))]
  nested = dict(version="1.1", data=[dict(title="t", paragraphs=[dict(context=ROWS[1]["context"], qas=qas)])])
  got, _ = run(model[0], [nested], tmp_path)
  asked = [dict(question=q["question"], context=ROWS[1]["context"]) for q in qas]
  assert [(x["id"], x["output"]) for x in got] == [(f"n{i}", alone(model, r)[0][0][0]) for i, r in enumerate(asked)]


def test_no_answer_where_training_had_such(model, tmp_path, monkeypatch):
  load = decoding.load
  monkeypatch.setattr(decoding, "load", lambda *a: load(*a)._replace(windows=dict(length=20, stride=SPAN, empty=True)))
  got, _ = run(model[0], ROWS, tmp_path, inputs_length=None)
  want = [alone(model, r, null=0.0)[0] for r in ROWS]
  assert [x["output"] for x in got] == [w[0][0] for w in want]
  assert "" in {x["output"] for x in got}, "else this shows nothing"
  assert all(any(b["output"] == "" for b in x["scores"]) for x in got)


def test_broken_numbers_are_named(model, tmp_path):
  folder, s, params, _ = model
  worker = answering.Answerer(s, tokens.load(str(folder)), answering.Options(20, SPAN), batch=4)
  broken = trees.map_with_path(lambda path, x: np.full_like(x, np.nan) if path == "head/bias" else x, params)
  asked = worker.encode([(ROWS[0]["question"], ROWS[0]["context"])])
  with pytest.raises(NumbersError, match="not numbers for 1 of 1 inputs, among them .'r7'"):
    list(worker.stream(broken, asked, ids=["r7"]))
