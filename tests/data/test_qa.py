"""Question answering from rows to batches and from logits to answers.

Catches: windows that are not those of transformers, an answer off by a token, a packed row that mixes up windows,
answers that depend on packing, an answer that is not where the row says, v2's questions without one, contexts lost
between windows.
"""

import json

import numpy as np
import pytest

from jaxft.data import qa, report
from jaxft.errors import InputError

CONTEXT = "Two young men are outside. A man in a blue shirt cleans a window. Ein Mann putzt ein Fenster."


def row(answer, i=0, question="Who?", **more):
  texts = [answer] if answer else []
  return dict(
    id=f"q{i}",
    question=question,
    context=CONTEXT,
    answers=dict(text=texts, answer_start=[CONTEXT.index(t) for t in texts]),
    **more,
  )


ROWS = [
  row(a, i, q) for i, (a, q) in enumerate([("men", "Who?"), ("a window", "A man cleans what?"), ("Mann", "Who putzt?")])
]


def perfect(s):
  """Logits that say starts and ends of each window."""
  out = []
  for i in range(len(s)):
    x = np.full((s.lengths["inputs"][i], 2), -9.0, np.float32)
    x[s.scalar("starts", np.array([i]))[0], 0] = x[s.scalar("ends", np.array([i]))[0], 1] = 9 - i / 100
    out.append(x)
  return out


@pytest.mark.parametrize("length,stride", [(200, -1), (30, 5), (24, -1), (40, 0)])
def test_windows_are_those_of_transformers(rows_store, wordpiece, length, stride):
  s = rows_store(ROWS, wordpiece, "qa", length=length, stride=stride)
  want = wordpiece.hf(
    [r["question"] for r in ROWS],
    [r["context"] for r in ROWS],
    truncation="only_second",
    max_length=length,
    stride=qa.overlap(stride, length),
    return_overflowing_tokens=True,
    return_offsets_mapping=True,
  )
  assert [s.tokens("inputs", i).tolist() for i in range(len(s))] == want["input_ids"]
  assert s.row_of(np.arange(len(s))).tolist() == want["overflow_to_sample_mapping"]
  for i, offsets in enumerate(want["offset_mapping"]):
    assert s.gather("firsts", np.array([i])).tolist() == [a for a, _ in offsets]
    start, end = (int(s.scalar(n, np.array([i]))[0]) for n in ("starts", "ends"))
    if start:
      answer = ROWS[want["overflow_to_sample_mapping"][i]]["answers"]["text"][0]
      assert CONTEXT[offsets[start][0] : offsets[end][1]] == answer
  assert s.meta["counts"]["windows"] == len(s) and s.meta["counts"]["questions"] == 3
  found = qa.answers(s, perfect(s))
  assert [f["answer"] for f in found] == ["men", "a window", "Mann"] and [f["id"] for f in found] == ["q0", "q1", "q2"]
  assert found[1]["question"] == "A man cleans what?" and found[1]["references"] == ["a window"]


def test_packing_and_hosts(rows_store, wordpiece, batches):
  s = rows_store(ROWS * 4, wordpiece, "qa", length=60, stride=8, name="many.jsonl")
  alone = batches(s, batch=4, lengths=dict(inputs=60), pack=False, shuffle=False)
  packed = batches(s, batch=4, lengths=dict(inputs=200), pack=True)
  seen = []
  for step in range(packed.steps(1)):
    b = packed.host_batch(step, 0, 1)
    halves = [packed.host_batch(step, h, 2) for h in range(2)]
    assert all(np.array_equal(b[k], np.concatenate([h[k] for h in halves])) for k in b)
    assert {*b} == {"inputs", "input_segments", "input_types", "starts", "ends", "label_weights"}
    for r, ids in enumerate(packed.row_examples(step)):
      for m, i in enumerate(ids):
        one, at = alone.host_batch(i // 4, 0, 1), b["input_segments"][r] == m + 1
        n = int(s.lengths["inputs"][i])
        for k in ("inputs", "input_types"):
          assert np.array_equal(b[k][r][at], one[k][i % 4][:n])
        assert [b[k][r, m] for k in ("starts", "ends")] == [one[k][i % 4, 0] for k in ("starts", "ends")]
        assert b["label_weights"][r, m] == 1
        seen.append(i)
  assert sorted(seen) == list(range(len(s)))


def test_nested_files_and_questions_without_answers(rows_store, wordpiece, batches):
  flat = {k: v for k, v in ROWS[0].items() if k not in ("context", "answers")}
  answer = dict(text="men", answer_start=CONTEXT.index("men"))
  qas = [flat | dict(answers=[answer], is_impossible=False), dict(id="none", question="A blue?", answers=[])]
  article = dict(title="t", paragraphs=[dict(context=CONTEXT, qas=qas)])
  s = rows_store([dict(version="2", data=[article, article])], wordpiece, "qa", length=40, stride=8, name="s.json")
  found = qa.answers(s, perfect(s))
  assert [(f["id"], f["answer"], f["references"]) for f in found] == [("q0", "men", ["men"]), ("none", "", [])] * 2
  assert s.meta["counts"]["unanswerable"] == 2
  r = report.make(s, batches(s, lengths=dict(inputs=40)), wordpiece)
  assert "4 questions (2 without an answer)" in " ".join(report.text(r).split())


@pytest.mark.parametrize(
  "bad,message",
  [
    (dict(answers=dict(text=["women"], answer_start=[4])), r"line 2 \(question q0\): the answer 'women' should begin"),
    (dict(answers=dict(text=["men"], answer_start=[900])), "line 2.*outside the context"),
    (dict(context=None), "line 2.*'context' is None, not text"),
    (dict(question="A man in a blue shirt cleans a window. " * 3), "line 2.*the question has"),
  ],
)
def test_bad_rows(rows_store, wordpiece, bad, message):
  with pytest.raises(InputError, match=message):
    rows_store([ROWS[0], ROWS[0] | bad], wordpiece, "qa", length=30, stride=8)


def test_other_columns_and_tokenizers(rows_store, wordpiece, byt5):
  rows = [dict(q=r["question"], passage=r["context"], found=r["answers"]) for r in ROWS]
  s = rows_store(rows, wordpiece, "qa", input="{q}", pair="{passage}", label="{found}", length=200)
  assert [f["answer"] for f in qa.answers(s, perfect(s))] == ["men", "a window", "Mann"]
  with pytest.raises(InputError, match="places of tokens"):
    rows_store(ROWS, byt5, "qa", name="b.jsonl")
  assert json.loads(bytes(s.kept("asked", np.array([0]))[0]))[0] is None
