"""Tags against seqeval's documented values and its table of pairs, answers against SQuAD's rules by hand.

Catches: I after O or after another type read otherwise than conlleval does, spans that run over the end of a row,
strict and lenient swapped, macro means over types that do not occur, articles removed inside words, punctuation turned
into blanks, the mean over references in place of the best one, no-answer questions met by any answer.
"""

import itertools
import re

import numpy as np
import pytest

from jaxft.errors import InputError
from jaxft.eval import scores, spans

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
TRUTH = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]  # of seqeval's README
FOUND = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_the_values_that_seqeval_documents():
  values, notes = spans.tag(("f1", "precision", "recall", "f1_macro", "token_accuracy"), FOUND, TRUTH, LABELS)
  assert values == pytest.approx(dict(f1=0.5, precision=0.5, recall=0.5, f1_macro=0.5, token_accuracy=0.8))
  by_type, _ = spans.tag(("f1_MISC", "f1_PER"), FOUND, TRUTH, LABELS)
  assert by_type == dict(f1_MISC=0, f1_PER=1)
  assert "1 of 3 types have no span in the data (LOC)" in notes[0]
  assert spans.tag(("f1", "strict_f1", "token_accuracy"), FOUND, TRUTH, LABELS)[1] == ()


@pytest.mark.parametrize(
  "tags,lenient,strict",
  [
    ("", [], []),
    ("B-PER", ["PER 0 1"], ["PER 0 1"]),
    ("I-PER", ["PER 0 1"], []),
    ("O I-PER I-PER", ["PER 1 3"], []),
    ("I-PER I-ORG", ["PER 0 1", "ORG 1 2"], []),
    ("I-PER B-PER", ["PER 0 1", "PER 1 2"], ["PER 1 2"]),
    ("B-PER I-ORG I-ORG", ["PER 0 1", "ORG 1 3"], ["PER 0 1"]),
    ("B-PER B-PER I-PER O I-PER", ["PER 0 1", "PER 1 3", "PER 4 5"], ["PER 0 1", "PER 1 3"]),
    ("B-PER I-LOC I-PER", ["PER 0 1", "LOC 1 2", "PER 2 3"], ["PER 0 1"]),
    ("B I O I", ["_ 0 2", "_ 3 4"], ["_ 0 2"]),
    ("B-ORG-CO I-ORG-CO", ["ORG-CO 0 2"], ["ORG-CO 0 2"]),
  ],
)
def test_spans_of_iob(tags, lenient, strict):
  said = lambda some: [f"{t} {a} {b}" for t, a, b in some]
  assert said(spans.find(tags.split())) == lenient and said(spans.find(tags.split(), strict=True)) == strict


def test_spans_of_iobes():
  found = spans.find("S-X B-X E-X B-X I-X E-X I-X E-X E-X S-X O E-X".split())
  assert found == [("X", 0, 1), ("X", 1, 3), ("X", 3, 6), ("X", 6, 8), ("X", 8, 9), ("X", 9, 10), ("X", 11, 12)]
  found = spans.find("B-X S-X I-X E-X I-X S-X E-X B-X".split())
  assert found == [("X", 0, 1), ("X", 1, 2), ("X", 2, 4), ("X", 4, 5), ("X", 5, 6), ("X", 6, 7), ("X", 7, 8)]


def test_every_row_of_five_tags_by_regular_expressions():
  """Another road: a row is a text of letters; lenient spans of one type are [bi]i*, strict ones bi*."""
  letters = {"O": "o", "B-X": "b", "I-X": "i", "B-Y": "B", "I-Y": "I"}
  for tags in itertools.product(letters, repeat=5):
    text = "".join(letters[t] for t in tags)
    for strict, pattern in ((False, "[bi]i*|[BI]I*"), (True, "bi*|BI*")):
      want = [("xy"[m[0][0].isupper()].upper(), m.start(), m.end()) for m in re.finditer(pattern, text)]
      assert spans.find(tags, strict) == want, (tags, strict)


def test_counts_by_hand():
  truth = [["B-PER", "I-PER", "O", "B-LOC"], ["I-LOC", "O", "B-PER"]]
  found = [["B-PER", "I-PER", "B-LOC", "I-LOC"], ["B-LOC", "I-MISC", "B-PER"]]
  # lenient: true PER 2 LOC 2; found PER 2 LOC 2 MISC 1; right PER 2, LOC 1 (row 2, place 0)
  names = (*scores.PARTS, *(f"{p}_macro" for p in scores.PARTS), "per_type", "strict")
  values, notes = spans.tag(names, found, truth, LABELS)
  want = dict(precision=3 / 5, recall=3 / 4, f1=6 / 9, precision_macro=(1 + 1 / 2 + 0) / 3, recall_macro=1.5 / 3)
  want |= dict(f1_macro=(1 + 1 / 2 + 0) / 3, precision_PER=1, recall_PER=1, f1_PER=1, precision_LOC=1 / 2)
  want |= dict(recall_LOC=1 / 2, f1_LOC=1 / 2, precision_MISC=0, recall_MISC=0, f1_MISC=0)
  # strict: I-LOC and I-MISC alone are no spans: true PER 2 LOC 1; found PER 2 LOC 2; right PER 2
  want |= dict(strict_precision=2 / 4, strict_recall=2 / 3, strict_f1=4 / 7)
  assert values == pytest.approx(want) and "(MISC)" in notes[0]
  nothing, _ = spans.tag(("f1", "f1_macro", "token_accuracy"), [["O", "O"]], [["O", "O"]], LABELS)
  assert nothing == dict(f1=0, f1_macro=0, token_accuracy=1)


def test_tags_that_are_refused():
  words = ("NN", "VB", "IN")
  assert spans.tag(("token_accuracy",), [["NN", "VB"]], [["NN", "IN"]], words)[0] == dict(token_accuracy=0.5)
  with pytest.raises(InputError, match="others such as 'NN'.*token_accuracy"):
    spans.tag(("f1",), [["NN"]], [["NN"]], words)
  with pytest.raises(InputError, match="IOB2 tags, but there are E and S"):
    spans.tag(("strict_f1",), [["S-X"]], [["S-X"]], ("O", "S-X"))
  with pytest.raises(InputError, match="not one tag"):
    spans.tag(("f1",), [[]], [[]], LABELS)
  with pytest.raises(ValueError, match="differ in length"):
    spans.tag(("f1",), [["O"]], [["O", "O"]], LABELS)


@pytest.mark.parametrize(
  "text,want",
  [
    ("The  Denver Broncos.", "denver broncos"),
    ("an apple, a day; THE theatre", "apple day theatre"),
    ("U.S.A", "usa"),
    ("a-b", "ab"),  # punctuation goes first, so this a is no article
    ("It's \u201cthe\u201d\tend\u3002", "its \u201c \u201d end\u3002"),  # ASCII punctuation alone
    ("the", ""),
  ],
)
def test_normalize(text, want):
  assert spans.normalize(text) == want


@pytest.mark.parametrize(
  "prediction,references,exact,f1",
  [
    ("Denver Broncos", ["the Denver Broncos"], 1, 1),
    ("Denver", ["Carolina Panthers", "Denver Broncos"], 0, 2 / 3),
    ("the big big dog", ["big dog dog"], 0, 2 * 2 / 6),
    ("cat", ["dog"], 0, 0),
    ("", ["dog"], 0, 0),
    ("", [], 1, 1),
    ("dog", [], 0, 0),
    ("dog", ["the", "dog"], 1, 1),
    ("", ["the", "dog"], 0, 0),  # a reference of nothing but an article is left out
    ("", ["..."], 1, 1),  # none left: no answer
    ("dog", [""], 0, 0),
  ],
)
def test_one_answer(prediction, references, exact, f1):
  assert spans.answer(prediction, references) == pytest.approx((exact, f1))


def test_squad():
  predictions = ["Denver Broncos", "in 1999", "", "dog", ""]
  references = [["the Denver Broncos!"], ["1999", "the year 1999"], [], [], ["dog"]]
  values, notes = spans.squad(scores.NAMES["qa"], predictions, references)
  want = dict(exact_match=100 * 2 / 5, f1=100 * (1 + 2 / 3 + 1) / 5)
  want |= dict(has_answer_exact_match=100 / 3, has_answer_f1=100 * (5 / 3) / 3)
  want |= dict(no_answer_exact_match=50, no_answer_f1=50)
  assert values == pytest.approx(want) and notes == ()
  values, notes = spans.squad(("f1", "no_answer_f1"), ["x"], [["x"]])
  assert values == dict(f1=100, no_answer_f1=0) and "no question is of the kind of no_answer_f1" in notes[0]
  assert spans.squad(("f1",), ["x"], [["x"]])[1] == ()
  with pytest.raises(InputError, match="no questions"):
    spans.squad(("f1",), [], [])


def test_f1_is_that_of_bags_of_words():
  """Another road: the overlap of two bags is the sum of the smaller counts."""
  rng = np.random.default_rng(3)
  for _ in range(200):
    p, r = (rng.integers(0, 6, rng.integers(1, 9)) for _ in range(2))
    same = sum(min((p == w).sum(), (r == w).sum()) for w in range(6))
    precision, recall = same / len(p), same / len(r)
    want = 2 * precision * recall / (precision + recall) if same else 0
    text = lambda x: " ".join(f"w{i}" for i in x)
    assert spans.answer(text(p), [text(r)])[1] == pytest.approx(want)
