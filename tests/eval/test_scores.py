"""Scores of numbers against counts made by hand and other roads to the same value.

Catches: labels and predictions swapped, a class without examples left out of a macro mean, means over the wrong axis,
a standard deviation with n where the other has n - 1, logarithms of the wrong base, a silent 0 or NaN.
"""

import math
import re

import numpy as np
import pytest

from jaxft.errors import InputError
from jaxft.eval import scores

ABC = ("a", "b", "c")
#                 a  a  a  a  b  b  c
TRUTH = np.array([0, 0, 0, 0, 1, 1, 2])
FOUND = np.array([0, 0, 0, 1, 1, 0, 1])  # right: a 3 of 4, b 1 of 2, c 0 of 1; found: a 4, b 3, c 0


def test_classes_by_hand():
  names = [n for n in scores.NAMES["classify"] if n not in scores.PARTS]
  values, notes = scores.classify(names, FOUND, TRUTH, ABC)
  p, r = (3 / 4, 1 / 3, 0), (3 / 4, 1 / 2, 0)
  f = [2 * x * y / (x + y) if x + y else 0 for x, y in zip(p, r)]
  weighted = lambda x: (4 * x[0] + 2 * x[1] + 1 * x[2]) / 7
  want = dict(accuracy=4 / 7, balanced_accuracy=sum(r) / 3)
  for part, x in zip(scores.PARTS, (p, r, f)):
    want |= {f"{part}_macro": sum(x) / 3, f"{part}_micro": 4 / 7, f"{part}_weighted": weighted(x)}
  # Gorodkin's R_K: covariance of the one-hot matrices over the root of the product of their variances
  one = lambda x: np.eye(3)[x] - np.eye(3)[x].mean(axis=0)
  cov = lambda x, y: (one(x) * one(y)).sum()
  want["mcc"] = cov(TRUTH, FOUND) / math.sqrt(cov(TRUTH, TRUTH) * cov(FOUND, FOUND))
  assert values == pytest.approx(want) and list(values) == names
  assert notes == ()
  np.testing.assert_array_equal(scores.confusion(FOUND, TRUTH, 3), [[3, 1, 0], [1, 1, 0], [0, 1, 0]])


def test_a_class_without_examples_counts_and_is_said():
  values, notes = scores.classify(("f1_macro", "balanced_accuracy"), FOUND, TRUTH, (*ABC, "rare", "none"))
  assert values["f1_macro"] == pytest.approx((3 / 4 + 2 / 5) / 5)
  assert values["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 3)  # of the classes that have examples
  assert len(notes) == 1 and "2 of 5 classes have no example (rare, none)" in notes[0]
  values, notes = scores.classify(("f1_macro", "balanced_accuracy"), np.array([2, 0]), np.array([0, 0]), ABC)
  assert values == pytest.approx(dict(f1_macro=(2 / 3) / 3, balanced_accuracy=0.5)) and "(b, c)" in notes[0]


@pytest.mark.filterwarnings("error")
def test_two_classes_as_glue():
  truth, found = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 1, 1, 0, 0, 0, 0])  # tp 2, fp 1, fn 2, tn 3
  values, _ = scores.classify(("f1", "precision", "recall", "mcc", "accuracy"), found, truth, ("no", "yes"))
  mcc = (2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5)
  assert values == pytest.approx(dict(f1=4 / 7, precision=2 / 3, recall=1 / 2, mcc=mcc, accuracy=5 / 8))
  nothing, _ = scores.classify(("f1", "mcc"), np.zeros(8, int), truth, ("no", "yes"))
  assert nothing == dict(f1=0, mcc=0)
  assert scores.classify(("f1",), np.zeros(2, int), np.zeros(2, int), ("no", "yes"))[0] == dict(f1=0)
  with pytest.raises(InputError, match="f1 alone is that of class 1 of two; with 3 classes ask for f1_macro"):
    scores.classify(("f1",), FOUND, TRUTH, ABC)


def test_several_labels_by_hand():
  truth = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
  chances = np.array([[0.9, 0.2, 0.6], [0.7, 0.8, 0.1], [0.1, 0.5, 0.3], [0.4, 0.6, 0.5]])  # 0.5 is not chosen
  # chosen: 101, 110, 000, 010; a: tp 1 fp 1 fn 1, b: tp 2 fp 0 fn 0, c: tp 1 fp 0 fn 0
  values, notes = scores.multilabel(scores.NAMES["multilabel"], chances, truth, ABC)
  want = dict(
    accuracy=2 / 4,
    f1_micro=8 / 10,
    f1_macro=(1 / 2 + 1 + 1) / 3,
    f1_weighted=(2 / 2 + 2 + 1) / 5,
    f1_samples=(1 + 2 / 3 + 0 + 2 / 3) / 4,
    precision_micro=4 / 5,
    precision_macro=2.5 / 3,
    precision_weighted=4 / 5,
    precision_samples=(1 + 1 / 2 + 0 + 1) / 4,
    recall_micro=4 / 5,
    recall_macro=2.5 / 3,
    recall_weighted=4 / 5,
    recall_samples=(1 + 1 + 0 + 1 / 2) / 4,
  )
  assert values == pytest.approx(want)
  assert notes == ("1 of 4 rows have neither labels nor predictions; they count as 0 in means over samples",)
  one, notes = scores.multilabel(("f1_macro", "f1_samples"), chances[:, :1], truth[:, :1], ("a",))
  assert one == pytest.approx(dict(f1_macro=1 / 2, f1_samples=1 / 4))
  _, notes = scores.multilabel(("f1_macro",), chances[:2], np.array([[1, 0, 0], [1, 0, 0]]), ABC)
  assert "2 of 3 classes have no example (b, c)" in notes[0] and len(notes) == 1


def test_values_by_hand():
  truth, found = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32), np.array([1.5, 1.0, 3.0, 9.0, 4.0], np.float32)
  values, notes = scores.regress(scores.NAMES["regress"], found, truth)
  square = (0.25 + 1 + 0 + 25 + 1) / 5
  x, y = found - 3.7, truth - 3.0
  pearson = (x @ y) / math.sqrt((x @ x) * (y @ y))
  spearman = 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)  # ranks of found: 2 1 3 5 4
  want = dict(mse=square, rmse=math.sqrt(square), mae=(0.5 + 1 + 0 + 5 + 1) / 5, pearson=pearson, spearman=spearman)
  assert values == pytest.approx(want, rel=1e-6) and notes == ()
  ties, _ = scores.regress(("spearman",), np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
  assert ties["spearman"] == pytest.approx(1.5 / math.sqrt(1.5 * 2))  # Pearson's of the mean ranks 1.5 1.5 3
  assert scores.regress(("mse",), np.float32([4097]), np.float32([0]))[0] == dict(mse=4097**2)  # over 2**24
  # a correlation of large values is not lost in float32
  large, _ = scores.regress(("pearson",), (found + 1e5).astype(np.float32), truth)
  assert large["pearson"] == pytest.approx(pearson, rel=1e-3)


@pytest.mark.parametrize(
  "found,truth,said",
  [([2, 2, 2], [1, 2, 3], "predictions"), ([1, 2, 3], [4, 4, 4], "labels"), ([1], [2], "and labels")],
)
def test_a_correlation_that_does_not_exist(found, truth, said, recwarn):
  values, notes = scores.regress(("pearson", "spearman"), np.array(found, float), np.array(truth, float))
  assert values == dict(pearson=0, spearman=0) and len(notes) == 1 and said in notes[0] and "as 0" in notes[0]
  assert scores.regress(("mse",), np.array(found, float), np.array(truth, float))[1] == () and not recwarn.list


def test_perplexities():
  text = "to be  or\nnot \u00fc"
  counts = scores.count_text(text)
  assert counts == dict(words=5, bytes=16)
  values = scores.perplexities(20.0, 8, counts)
  want = dict(loss=2.5, perplexity=math.e**2.5, word_perplexity=math.e**4, byte_perplexity=math.e**1.25)
  want["bits_per_byte"] = 1.25 / 0.693147180
  assert values == pytest.approx(want)
  assert 2 ** values["bits_per_byte"] == pytest.approx(values["byte_perplexity"])
  assert set(scores.perplexities(20.0, 8)) == {"loss", "perplexity"}
  assert scores.perplexities(1e5, 1, dict(words=1))["word_perplexity"] == math.inf
  for bad in (dict(words=0), dict(letters=3)):
    with pytest.raises(ValueError, match="above 0 of words and bytes"):
      scores.perplexities(1.0, 1, bad)


def test_names():
  assert scores.expand("classify", ("mcc", "mcc", "f1"), ("n", "y")) == ("mcc", "f1")
  assert scores.expand("tag", ("f1", "strict"), ("O", "B-X")) == (
    "f1",
    "strict_precision",
    "strict_recall",
    "strict_f1",
  )
  tags = ("O", "B-X", "I-X", "I-Y")
  types = ("precision_X", "recall_X", "f1_X", "precision_Y", "recall_Y", "f1_Y")
  assert scores.expand("tag", ("per_type",), tags) == types and scores.expand("tag", ("f1_Y",), tags) == ("f1_Y",)
  for kind, name, near in (
    ("classify", "f1_makro", "f1_macro"), ("multilabel", "f1_sample", "f1_samples"), ("regress", "person", "pearson"),
    ("tag", "f1_Z", "f1_"), ("qa", "exact", "exact_match"), ("classify", "rougeL", ""),
  ):  # fmt: skip
    with pytest.raises(
      InputError, match=f"there is no '{name}' for {kind}" + (rf".*did you mean '{near}" if near else ";")
    ):
      scores.expand(kind, (name,), tags)
  with pytest.raises(InputError, match="types named macro"):
    scores.expand("tag", ("per_type",), ("O", "B-macro"))


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(InputError, match="no rows"):
    scores.classify(("mcc",), np.zeros(0, int), np.zeros(0, int), ABC)
  with pytest.raises(
    InputError, match=re.escape("1 of 2 rows have a label outside of 0 to 2, the first is 3 in row 2")
  ):
    scores.classify(("mcc",), np.array([0, 0]), np.array([0, 3]), ABC)
  with pytest.raises(InputError, match="a prediction outside of 0 to 2, the first is -1"):
    scores.confusion(np.array([-1, 0]), np.array([0, 2]), 3)
  with pytest.raises(InputError, match="mse, pearson of 2 rows is not a finite number"):
    scores.regress(("mse", "pearson"), np.array([np.nan, 1]), np.array([0.0, 2.0]))
  with pytest.raises(ValueError, match="3 predictions for 2 labels"):
    scores.regress(("mse",), np.zeros(3), np.zeros(2))
