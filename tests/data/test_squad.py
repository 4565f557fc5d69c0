"""Question answering: SQuAD's files, windows against transformers' own, answers against a plain reading of the rules.

Catches: an answer that does not stand where it says, offsets in bytes, windows or offsets that differ from
transformers', a label in a window that holds only part of the answer, a character of several tokens that is cut, an
answer lost without a trace, `tokenizers` panicking where a question fills the window; candidates out of the context,
out of order or too long, a null score that is the greatest instead of the least, a threshold that is off by its sign.
"""

import math
import pickle

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxft.data import squad
from jaxft.errors import InputError

CONTEXT = (
  "Denver's defense gave up 296 points, fourth in the league. Über 1,000 fans 🙂 saw Von Miller force the fumble; he "
  "had five tackles.   Café owners – some 30 of them – cheered. 東京でも人々は喜んだ。 The end came at 22:30 that "
  "night."
)
ANSWERS = [
  "Denver",
  "296",
  "Über",
  "🙂",
  "five tackles",
  "Café owners",
  "東京",
  "人",
  "22:30",
  "night.",
  "some 30 of them –",
]
W = "dev.json, line 7"


def row(answer=None, context=CONTEXT, question=" Who or what?", **more):
  answers = dict(text=[answer], answer_start=[context.index(answer)]) if answer else dict(text=[], answer_start=[])
  return dict(id="x", question=question, context=context, answers=answers, **more)


def wordpiece():
  t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  t.normalizer = normalizers.BertNormalizer(lowercase=True)
  t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  t.train_from_iterator([CONTEXT, "Who or what?"], trainers.WordPieceTrainer(vocab_size=140, special_tokens=special))
  ends = [(s, t.token_to_id(s)) for s in special[2:]]
  pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
  t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=t, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    model_input_names=["input_ids", "token_type_ids"],
  )  # fmt: skip


def bytelevel(space=False, trim=True):
  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  t.decoder = decoders.ByteLevel()
  special = ["<s>", "<pad>", "</s>"]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
  t.train_from_iterator([CONTEXT[:100], "Who or what?"], trainer)
  t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=space)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=t, pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_input_names=["input_ids"]
  )


TOKENIZERS = dict(wordpiece=wordpiece(), bytes=bytelevel(), spaced=bytelevel(True), untrimmed=bytelevel(trim=False))


def windows(name, max_length=40, stride=8):
  return squad.Windows(TOKENIZERS[name].backend_tokenizer, max_length, stride)


def test_flatten():
  qas = [
    dict(id="1", question="q", answers=[dict(text="a", answer_start=0), dict(text="b", answer_start=2)]),
    dict(id="2", question="r", answers=[], is_impossible=True, plausible_answers=[dict(text="b", answer_start=2)]),
  ]
  paragraph = dict(context="a b", qas=qas)
  file = dict(
    version="v2.0",
    data=[dict(title="T", paragraphs=[paragraph, dict(context="c", qas=[])]), dict(paragraphs=[paragraph])],
  )
  flat = list(squad.flatten(file, "f.json"))
  assert [r["id"] for r, _ in flat] == ["1", "2", "1", "2"]
  assert flat[1][1] == "f.json, data 1, paragraphs 1, qas 2"
  first, second = flat[0][0], flat[1][0]
  assert (first["title"], first["context"], first["question"]) == ("T", "a b", "q") and "title" not in flat[2][0]
  assert first["answers"] == dict(text=["a", "b"], answer_start=[0, 2]) and second["answers"]["text"] == []
  assert squad.read(*flat[0]).answers == (("a", 0), ("b", 2)) and squad.read(*flat[1]).answers == ()
  assert [r for r, _ in squad.flatten(paragraph, "")] == [
    {k: v for k, v in r.items() if k != "title"} for r, _ in flat[:2]
  ]
  assert list(squad.flatten(row("296", data=3), W)) == [(row("296", data=3), W)]
  for bad, says in (
    (dict(data=3), "'data' is 3"),
    (dict(data=["x"]), "data 1 is 'x'"),
    (dict(qas=[dict(question="q", answers=["a"])]), "qas 1: answer 1 is 'a'"),
  ):
    with pytest.raises(InputError, match=f"f.json.*{says}"):
      list(squad.flatten(bad, "f.json"))


def test_answers_may_be_written_in_several_ways():
  for answers in (
    dict(text="296", answer_start=25),
    dict(text=["296"], answer_start=np.array([25])),
    [dict(text=b"296", answer_start=25)],
    dict(text=np.array(["296"], object), answer_start=(25,)),
  ):
    assert squad.read({**row(), "answers": answers}, W).answers == (("296", 25),)
  assert squad.read({**row(), "answers": None}, W).answers == ()
  q = squad.read(dict(question=b"q", context=CONTEXT.encode(), answers=None, id=3), W)
  assert (q.id, q.question, q.context, q.where) == ("3", "q", CONTEXT, W)


@pytest.mark.parametrize(
  "change,says",
  [
    (dict(answers=dict(text=["297"], answer_start=[25])), "answer '297' should begin at character 25.*'296' stands"),
    (dict(answers=dict(text=["296"], answer_start=[24])), "where ' 29' stands"),
    (dict(answers=dict(text=["296"], answer_start=[999])), "outside the context of 2"),
    (dict(answers=dict(text=["Denver"], answer_start=[-1])), "should begin at character -1"),
    (dict(answers=dict(text=["296", "x"], answer_start=[25])), "2 answer texts, but 1"),
    (dict(answers=dict(text=["  "], answer_start=[0])), "the text '  '"),
    (dict(answers=dict(text=["296"], answer_start=["25"])), "answer_start '25'"),
    (dict(answers=dict(text=["296"], answer_start=[True])), "answer_start True"),
    (dict(answers=dict(text=["296"])), "'answers' is .*text and answer_start"),
    (dict(answers="296"), "'answers' is '296'"),
    (dict(question=None), "'question' is None, not text.*id, question, context, answers"),
    (dict(context=3), "'context' is 3"),
    (dict(context=" \n"), "the context is empty"),
    (dict(context=b"\xff"), "not UTF-8"),
    (dict(is_impossible=True), "is_impossible is true, but there is an answer, '296'"),
  ],
)
def test_wrong_rows(change, says):
  with pytest.raises(InputError, match=f"dev.json, line 7.*{says}") as e:
    squad.read({**row("296"), **change}, W)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("max_length,stride", [(40, 8), (30, 0), (61, 30), (500, 128)])
def test_windows_are_those_of_transformers(name, max_length, stride):
  hf = TOKENIZERS[name]
  rows = [row(), row(question="q", context="short"), row(question="Who saw 30 🙂?", context=CONTEXT * 2)]
  made = windows(name, max_length, stride).features([squad.read(r, W) for r in rows])
  for r, features in zip(rows, made):
    expected = hf(
      r["question"].lstrip(), r["context"], truncation="only_second", max_length=max_length, stride=stride,
      return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    assert [f.ids.tolist() for f in features] == expected["input_ids"]
    assert [f.types.tolist() for f in features] == expected["token_type_ids"]
    assert [[tuple(o) for o in f.offsets.tolist()] for f in features] == expected["offset_mapping"]
    for i, f in enumerate(features):
      own = [k for k, s in enumerate(expected.sequence_ids(i)) if s == 1]
      assert f.context == (own[0], own[-1] + 1) and (f.start, f.end, f.held) == (0, 0, False)
      assert f.ids.dtype == f.types.dtype == f.offsets.dtype == np.int32
  assert len(made[2]) > len(made[1]) == 1 or max_length == 500


def run_qa(feature, start, end):
  """The labels of run_qa.py, in words: walk inwards from both ends of the window's context."""
  first, after = feature.context
  offsets, last = feature.offsets.tolist(), after - 1
  if not (offsets[first][0] <= start and offsets[last][1] >= end):
    return 0, 0
  while first < len(offsets) and offsets[first][0] <= start and first < after:
    first += 1
  while offsets[last][1] >= end:
    last -= 1
  return first - 1, last + 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_labels(name, answer):
  [features] = windows(name).features([squad.read(row(answer), W)])
  start = CONTEXT.index(answer)
  end, held = start + len(answer), 0
  for f in features:
    first, after = f.context
    whole = f.offsets[first, 0] <= start and f.offsets[after - 1, 1] >= end
    assert f.held == whole
    held += whole
    if not whole:
      assert (f.start, f.end) == (0, 0)
      continue
    assert first <= f.start <= f.end < after
    a, b = f.offsets[f.start, 0], f.offsets[f.end, 1]
    assert (
      a <= start and b >= end and CONTEXT[a:b].strip(" ,.;:–") in (answer, answer.strip(" –.")) or name == "untrimmed"
    )
    outside = [f.offsets[k] for k in range(first, after) if not f.start <= k <= f.end]
    assert not any(x < end and start < y for x, y in outside)  # every token of the answer is in
    split = (f.offsets[first + 1 : after] == f.offsets[first : after - 1]).all(1).any()
    if not split:
      assert (f.start, f.end) == run_qa(f, start, end)
  assert held


def test_first_answer_is_the_label():
  r = row("296")
  r["answers"]["text"].append("Denver")
  r["answers"]["answer_start"].append(0)
  [features] = windows("wordpiece", 500).features([squad.read(r, W)])
  assert CONTEXT[features[0].offsets[features[0].start, 0] :].startswith("296")


def test_an_answer_that_no_window_holds_shows():
  [features] = windows("wordpiece", 24, 4).features([squad.read(row(CONTEXT[10:150]), W)])
  assert len(features) > 3 and not any(f.held for f in features)


def test_questions_that_fill_the_window():
  long = "a " * 20
  [features] = windows("wordpiece", 500).features([squad.read(row(question=long), W)])
  assert len(features) == 1
  few = windows("wordpiece", 30, 8)
  with pytest.raises(InputError, match=r"line 7: the question has 20 tokens, which leaves 7 of 30"):
    few.features([squad.read(row(question=long), W)])
  with pytest.raises(InputError, match=r"the question has 40 tokens, which leaves 0 of 30"):
    few.features([squad.read(row(question=long * 2), W)])
  short = squad.read(row(question=long, context="end came"), W)  # fits, though less than an overlap is left
  expected = TOKENIZERS["wordpiece"](long.lstrip(), "end came")["input_ids"]
  assert [f.ids.tolist() for f in windows("wordpiece", len(expected), 8).features([short])[0]] == [expected]
  mixed = few.features([squad.read(row("296"), W), squad.read(row(question="a " * 19, context="end"), W)])
  assert len(mixed[0]) > 1 and len(mixed[1]) == 1
  for stride in (27, -1):
    with pytest.raises(InputError, match=f"windows of 30 tokens, 3 of them special, cannot overlap by {stride}"):
      windows("wordpiece", 30, stride)


def test_windows_leave_the_tokenizer_alone_and_pickle():
  backend = TOKENIZERS["wordpiece"].backend_tokenizer
  backend.enable_truncation(9)
  backend.enable_padding(length=50)
  made = squad.Windows(backend, 40, 8)
  assert backend.truncation["max_length"] == 9 and backend.padding["length"] == 50
  backend.no_truncation()
  backend.no_padding()
  q = squad.read(row("Denver"), W)
  again = pickle.loads(pickle.dumps(made)).features([q])
  for a, b in zip(again[0], windows("wordpiece").features([q])[0], strict=True):
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
  assert made.features([]) == []


def test_nothing_before_the_context():
  bare = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
  bare.pre_tokenizer = pre_tokenizers.Whitespace()
  with pytest.raises(InputError, match="line 7: the tokenizer puts nothing before the context"):
    squad.Windows(bare, 10, 1).features([squad.read(row(question=" ", context="b"), W)])


# ---- answers


def brute(starts, ends, features, context, n_best, longest, threshold):
  """utils_qa.py's rules, one candidate after the other; returns (the answer, [(text, score, probability)])."""
  found = []
  for s, e, f in zip(starts, ends, features):
    best = [sorted(range(len(x)), key=lambda k: -x[k])[:n_best] for x in (s, e)]
    for i in best[0]:
      for j in best[1]:
        if f.context[0] <= i <= j < f.context[1] and j - i + 1 <= longest:
          found.append((context[f.offsets[i, 0] : f.offsets[j, 1]], s[i] + e[j]))
  null = min(s[0] + e[0] for s, e in zip(starts, ends))
  if threshold is not None:
    found.append((None, null))
  found = sorted(found, key=lambda x: -x[1])[:n_best]
  if threshold is not None and not any(t is None for t, _ in found):
    found.append((None, null))
  total = sum(math.exp(v - found[0][1]) for _, v in found)
  listed = [(t or "", v, math.exp(v - found[0][1]) / total) for t, v in found]
  if threshold is None:
    return listed[0][0], listed
  text, score = next((t, v) for t, v, _ in listed if t)
  return "" if null - score > threshold else text, listed


@pytest.mark.parametrize("threshold", [None, 0.0, -3.0, 3.0])
def test_decode(threshold):
  rng = np.random.default_rng(0)
  [features] = windows("bytes", 60, 16).features([squad.read(row(), W)])
  assert len(features) > 2
  answers = set()
  for trial in range(200):
    starts, ends = ([rng.normal(size=len(f.ids) + 5) * 3 for f in features] for _ in range(2))
    if trial % 2:
      for x in (*starts, *ends):
        x[0] += rng.normal() * 5 + 8
    n_best, longest = int(rng.integers(1, 25)), int(rng.integers(1, 40))
    try:
      answer, listed = brute(starts, ends, features, CONTEXT, n_best, longest, threshold)
    except (IndexError, StopIteration):  # not one pair
      made = squad.decode(starts, ends, features, CONTEXT, n_best, longest, threshold)
      assert made[0][0] == "" and len(made) == 1
      continue
    made = squad.decode(starts, ends, features, CONTEXT, n_best, longest, threshold)
    answers.add(answer == "")
    assert made[0][0] == answer
    key = lambda x: (-x[1], x[0])
    assert [t for t, _, _ in sorted(made, key=key)] == [t for t, _, _ in sorted(listed, key=key)]
    np.testing.assert_allclose(sorted(x[1:] for x in made), sorted(x[1:] for x in listed), rtol=1e-9)
    assert [x[1] for x in made[1:]] == sorted((x[1] for x in made[1:]), reverse=True)
  assert threshold is None or answers == {True, False}


def test_the_right_answer_comes_out():
  for name in TOKENIZERS:
    for answer in ("five tackles", "東京", "22:30"):
      [features] = windows(name).features([squad.read(row(answer), W)])
      starts, ends = ([np.full(len(f.ids), -9, np.float32) for f in features] for _ in range(2))
      for s, e, f in zip(starts, ends, features):
        s[f.start], e[f.end] = (9, 9) if f.held else (5, 5)
      made = squad.decode(starts, ends, features, CONTEXT, null_threshold=0.0)
      assert made[0][0].strip() == answer and made[0][1] == 18 and 0.4 < made[0][2] <= 1
