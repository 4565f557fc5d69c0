"""Documents, prompts with completions, chats: every token there once, and exactly the right ones to be learnt.

Catches: an EOS missing or doubled, two BOS, a piece that loses or repeats a token, a boundary that is off by one, a
padding id that hides an EOS, a cut answer that is taught to end, examples without anything to learn in silence.
"""

import json

import numpy as np
import pytest

from jaxft.data import build, chat_template, lm, report, tasks
from jaxft.errors import InputError

WORDS = "Zwei junge Männer stehen im Freien . Two young men are outside .".split()


def text(i, n):
  return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(n))


DOCUMENTS = [{"text": text(i, 1 + i * i % 37)} for i in range(30)]


def test_one_end_and_one_beginning():
  assert lm.ended([1, 7], 1, 2) == [1, 7, 2] == lm.ended([1, 7, 2], 1, 2) == lm.ended([1, 1, 7], 1, 2)
  assert lm.ended([7], None, None) == [7] and lm.ended([3, 3], 3, 3) == [3, 3] and lm.ended([], 1, 2) == [2]


@pytest.mark.parametrize("name,begin", [("bytelevel", []), ("bosbpe", [1]), ("unigram", []), ("wordpiece", [2])])
def test_documents(rows_store, request, name, begin):
  t = request.getfixturevalue(name)
  s = rows_store(DOCUMENTS, t, "causal", length=500)
  for i, row in enumerate(DOCUMENTS):
    ids = s.tokens("inputs", i).tolist()
    want = t.hf(row["text"])["input_ids"]
    assert ids == (want if t.eos is None or want[-1] == t.eos else [*want, t.eos]) and ids[: len(begin)] == begin
    assert s.texts(i) == (row["text"], "") and s.supervised[i] == len(ids) - 1
  assert s.report["split"] == dict(documents=0, pieces=0) and s.report["eos_last"] == (t.eos is not None)


@pytest.mark.parametrize("stride", [0, 1, 5])
@pytest.mark.parametrize("length", [7, 16, 40])
def test_long_documents_are_cut_into_pieces(rows_store, bosbpe, batches, length, stride):
  whole = rows_store(DOCUMENTS, bosbpe, "causal", length=900)
  if stride >= length - 1:
    with pytest.raises(InputError, match="task.stride is 5"):
      rows_store(DOCUMENTS, bosbpe, "causal", length=5, stride=stride)
    return
  s = rows_store(DOCUMENTS, bosbpe, "causal", length=length, stride=stride)
  assert s.folder == whole.folder and s.lengths["inputs"].max() <= length and s.lengths["inputs"].min() > 1
  rows = s.row_of(np.arange(len(s)))
  for row in range(30):
    want, at, learnt = whole.tokens("inputs", row).tolist(), 0, []
    for i in np.flatnonzero(rows == row):
      piece, context = s.tokens("inputs", int(i)).tolist(), int(s.context[i])
      overlap = 0 if at == 0 else 1 if stride == 0 and at == len(want) - 1 else stride
      start = at - overlap
      assert piece == want[start : start + len(piece)] and context == max(1, overlap)
      learnt += range(start + context, start + len(piece))
      at = start + len(piece)
    assert at == len(want) and len(set(learnt)) == len(learnt)
    if stride:
      assert learnt == list(range(1, len(want)))  # each token once but the first
  assert s.report["tokens_lost"] == {"inputs": 0.0} and s.report["split"]["documents"] > 0
  b = batches(s, batch=4)
  for step in range(b.steps(1)):
    batch = b.host_batch(step, 0, 1)
    for r, ids in enumerate(b.row_examples(step)):
      want = [float(p >= s.context[i]) for i in ids for p in range(s.lengths["inputs"][i])]
      assert batch["weights"][r, : len(want)].tolist() == want and not batch["weights"][r, len(want) :].any()


def test_a_document_of_one_token_is_left_out(rows_store, wordpiece, bytelevel):
  rows = [{"text": "a man"}, {"text": "a"}]
  bare = bytelevel.hf("a")["input_ids"]
  assert len(rows_store(rows, bytelevel, "causal")) == 2 and len(bare) == 1
  bytelevel.eos, keep = None, bytelevel.eos
  try:
    s = rows_store(rows, bytelevel, "causal", name="y.jsonl")
  finally:
    bytelevel.eos = keep
  assert len(s) == 1 and s.report["dropped"]["one token, which predicts nothing"]["rows"][0].endswith("line 2")


PROMPTS = [{"prompt": f"Q {text(i, 1 + i % 5)}:", "completion": f" {text(i + 2, 1 + i % 4)}"} for i in range(25)]


@pytest.mark.parametrize("name", ["bytelevel", "bosbpe", "unigram"])
@pytest.mark.parametrize("kind", ["sft", "prefix_lm"])
def test_prompts_and_completions(rows_store, request, batches, name, kind):
  t = request.getfixturevalue(name)
  s = rows_store(PROMPTS, t, kind, length=300)
  for i, row in enumerate(PROMPTS):
    whole = t.hf(row["prompt"] + row["completion"])["input_ids"]
    ids, weights = s.tokens("inputs", i).tolist(), s.gather("weights", np.array([i])).tolist()
    assert ids == (whole if whole[-1] == t.eos else [*whole, t.eos]) and ids.count(t.eos) == 1 == weights[-1]
    learnt = t.hf.decode([x for x, w in zip(ids, weights) if w], skip_special_tokens=True)
    assert learnt.strip() == row["completion"].strip() and weights == sorted(weights)
    assert s.prompt(i).tolist() == [x for x, w in zip(ids, weights) if not w] and s.texts(i) == tuple(row.values())
    assert s.answer(i).tolist() == [x for x, w in zip(ids, weights) if w] and s.supervised[i] == sum(weights)
  b = batches(s, batch=4).host_batch(0, 0, 1)
  assert {*b} == {"inputs", "input_segments", "weights", *(["input_prefix"] if kind == "prefix_lm" else [])}
  if kind == "prefix_lm":
    assert np.array_equal(b["input_prefix"], ((b["input_segments"] > 0) & (b["weights"] == 0)).astype(np.int32))


def test_a_token_that_straddles_belongs_to_the_completion(rows_store, bytelevel, batches):
  rows = [{"a": f"a man{space}", "b": f"{'' if space else ' '}in"} for space in (" ", "", " ")]
  s = rows_store(rows, bytelevel, "sft", input="{a}", target="{b}")
  assert s.tokens("inputs", 0).tolist() == s.tokens("inputs", 1).tolist()
  assert s.gather("weights", np.array([0])).tolist() == s.gather("weights", np.array([1])).tolist()
  assert s.gather("weights", np.array([0])).sum() == 2 and s.meta["counts"]["straddling"] == 2
  r = report.make(s, batches(s), bytelevel)
  assert any("In 2 examples (66.7%) one token holds the end of the prompt" in w for w in r["warnings"])


def test_nothing_predicts_a_first_token(rows_store, bytelevel, bosbpe):
  for t, first in ((bytelevel, 0), (bosbpe, 0)):
    s = rows_store([{"text": "two men"}] * 2, t, "sft", input="", target="{text}")
    weights = s.gather("weights", np.array([1]))
    assert weights[0] == first and weights[1:].all() and s.supervised[1] == len(weights) - 1


def test_texts_that_spell_special_tokens(rows_store, bosbpe):
  s = rows_store([{"prompt": "<s>Q:", "completion": " man</s>"}] * 2, bosbpe, "sft")
  ids = s.tokens("inputs", 0).tolist()
  assert ids[0] == bosbpe.bos and ids.count(bosbpe.bos) == 1 and ids[-1] == bosbpe.eos and ids.count(bosbpe.eos) == 1
  assert ids[1:] == bosbpe.hf("<s>Q: man</s>")["input_ids"][2:]
  weights = s.gather("weights", np.array([0]))
  assert weights[-1] == 1 and weights[:2].sum() == 0 and len(weights) == len(ids)


def test_padding_that_is_the_end_of_text_hides_nothing(rows_store, bytelevel, batches):
  assert bytelevel.pad is None
  bytelevel.pad = bytelevel.eos
  try:
    s = rows_store(PROMPTS, bytelevel, "sft", length=100)
    b = batches(s, batch=4)
    r = report.make(s, b, bytelevel)
  finally:
    bytelevel.pad = None
  batch = b.host_batch(0, 0, 1)
  ends = (batch["inputs"] == bytelevel.eos) & (batch["input_segments"] > 0)
  assert ends.sum() == len(b.example_ids(0)) and (batch["weights"][ends] == 1).all()
  assert batch["weights"][batch["input_segments"] == 0].sum() == 0
  text = " ".join(report.text(r).split())
  assert f"no BOS, EOS (id {bytelevel.eos}) supervised in 100.0%, pad {bytelevel.eos}" in text
  assert any("same token" in w for w in r["warnings"])


def test_a_blank_line_between_columns_that_are_recognised(rows_store, bytelevel):
  rows = [{"instruction": "do", "input": "", "output": "o"}, {"instruction": "do", "input": "it", "output": "o"}]
  s = rows_store(rows, bytelevel, "sft")
  assert [s.texts(i) for i in (0, 1)] == [("do\n\n", "o"), ("do\n\nit\n\n", "o")]
  s = rows_store([{"question": "q?", "answer": "a"}], bytelevel, "sft")
  assert s.texts(0) == ("q?\n\n", "a")
  assert rows_store(rows, bytelevel, "sft", input="{instruction}", target="{output}").texts(0) == ("do", "o")


LONG = [{"prompt": "a", "completion": " b"}] * 6 + [
  {"prompt": "a b" * 30, "completion": " c"},
  {"prompt": "a", "completion": " man" * 40},
]


def test_truncation(rows_store, bytelevel):
  s = rows_store(LONG, bytelevel, "sft", length=20, too_long="truncate")
  assert len(s) == 7 and s.report["dropped"]["nothing left to predict after truncation"]["count"] == 1
  assert s.report["dropped"]["nothing left to predict after truncation"]["rows"][0].endswith("line 7")
  last = s.tokens("inputs", 6).tolist()
  assert len(last) == 20 and bytelevel.eos not in last and s.supervised[6] == 19  # what is cut does not end
  assert s.report["eos_last"] == 0.75 and "7 kept" in report.notice(s.report)
  with pytest.raises(InputError, match=r"1 of 8 examples .*nothing left to predict after truncation.*line 7"):
    rows_store(LONG, bytelevel, "sft", length=20, too_long="error", too_long_share=0.5)
  assert len(rows_store(LONG, bytelevel, "sft", length=20, too_long="drop")) == 6


CHATML = (
  "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role, content):
  return {"role": role, "content": content}


CHATS = [
  {"messages": [turn("user", "a man"), turn("assistant", "men"), turn("user", "two"), turn("assistant", "young men")]},
  {"messages": [turn("system", "be"), turn("user", "a"), turn("assistant", "window")]},
  {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "man"}]},
]


def learnt(s, t, i):
  ids, weights = s.tokens("inputs", i), s.gather("weights", np.array([i]))
  runs, out = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(weights)) + 1), []
  for run in runs:
    if weights[run[0]]:
      out.append(t.hf.decode(ids[run]))
  return out


@pytest.mark.parametrize(
  "turns,expected",
  [
    ("all", [["men<|end|>", "young men<|end|>"], ["window<|end|>"], ["man<|end|>"]]),
    ("last", [["young men<|end|>"], ["window<|end|>"], ["man<|end|>"]]),
    ("each", [["men<|end|>"], ["young men<|end|>"], ["window<|end|>"], ["man<|end|>"]]),
  ],
)
def test_chats(rows_store, bytelevel, turns, expected):
  template = chat_template.Template(CHATML, bytelevel.hf.bos_token, bytelevel.hf.eos_token)
  s = rows_store(CHATS, bytelevel, "sft", length=200, template=template, turns=turns)
  assert [learnt(s, bytelevel, i) for i in range(len(s))] == expected
  whole = "<|user|>a man<|end|>\n<|assistant|>men<|end|>\n<|user|>two<|end|>\n<|assistant|>young men<|end|>\n"
  i = 1 if turns == "each" else 0
  assert s.tokens("inputs", i).tolist() == bytelevel.hf(whole)["input_ids"]
  assert s.report["tasks"][0]["chat"]
  if turns == "each":
    assert s.texts(1) == (whole[:-17], "young men<|end|>") and s.row_of(np.arange(4)).tolist() == [0, 0, 1, 2]
    assert s.where(1).endswith("line 1") and s.report["rows_kept"] == 3 and s.report["examples"] == 4


def test_chats_without_a_template(rows_store, bytelevel):
  s = rows_store(CHATS[1:], bytelevel, "sft", length=100)
  assert s.texts(0) == ("be\n\na\n\n", "window")
  with pytest.raises(InputError, match="turns user, assistant, user, assistant"):
    rows_store(CHATS, bytelevel, "sft", length=100)


def test_a_template_is_part_of_the_cache(rows_store, bytelevel):
  made = [chat_template.Template(x, None, "<|end|>") for x in (CHATML, CHATML, CHATML.replace("\n", "\n\n"))]
  folders = [rows_store(CHATS, bytelevel, "sft", length=200, template=t).folder for t in made]
  assert folders[0] == folders[1] != folders[2]


def test_an_example_without_anything_to_learn(rows_store, bytelevel):
  class Silent:  # a template that marks nothing
    text, bos_token, eos_token, variables, closes = "x", "", "", {}, True

    def examples(self, messages, tools, where, turns, split):
      return [chat_template.Chat(messages[0]["content"], ())]

  with pytest.raises(
    InputError, match="2 of 2 examples of .* have no token to learn, since no part of them is an answer"
  ):
    rows_store([{"messages": [turn("user", "a man")]}] * 2, bytelevel, "sft", template=Silent())


def test_tokenizers_without_offsets(rows_store, byt5):
  with pytest.raises(InputError, match="places of tokens.*tokenizers"):
    rows_store(PROMPTS, byt5, "sft")


@pytest.mark.parametrize("given", [dict(pair="{a}"), dict(label="{a}"), dict(labels=("a",)), dict(multi=True)])
def test_fields_that_are_not_read(given):
  name = next(iter(given))
  with pytest.raises(InputError, match=f"task.{name} is .*a task of kind causal does not read"):
    tasks.Task("causal", "{text}", **given)


@pytest.mark.parametrize(
  "given,says",
  [
    (dict(turns="some"), "task.turns is 'some'"),
    (dict(mix=("a",)), "task.mix has 'a'"),
    (dict(mix=(("{a}", "b"),)), "task.mix is 'b', which has no field"),
    (dict(mix=(("{a}", "{b}"),), turns="each"), "set one of them"),
  ],
)
def test_options_that_are_refused(given, says):
  with pytest.raises(InputError, match=says):
    tasks.Task("sft", "{a}", "{b}", **given)


def test_workers_encode_the_same(rows_store, bosbpe, tmp_path, monkeypatch):
  monkeypatch.setattr(build, "CHUNK_ROWS", 4)
  monkeypatch.setattr(build, "SMALL", 5)
  template = chat_template.Template(CHATML, "<s>", "</s>")
  stores = [
    rows_store(CHATS * 4, bosbpe, "sft", length=300, template=template, root=str(tmp_path / str(n)), workers=n)
    for n in (1, 2)
  ]
  one, two = ({f.name: f.read_bytes() for f in s.folder.iterdir() if f.name != "meta.json"} for s in stores)
  assert one == two and {"weights", "inputs.values"} <= one.keys()
  assert json.dumps({**stores[0].meta, "seconds": 0}) == json.dumps({**stores[1].meta, "seconds": 0})
