"""Metrics against the libraries' own calls and against values known beforehand.

Catches: references and outputs swapped, sentence means in place of corpus scores, precision in place of f-measure, a
missing stemmer.
"""

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from jaxft.errors import InputError
from jaxft.eval import metrics

OUTPUTS = ["the cat sat on the mat .", "He reads books\nand runs .", "", " same "]
REFERENCES = ["the cat is sitting on the mat .", "he read a book\nand ran .", "nothing came", "same"]


def test_equal_the_libraries():
  names = ("sacrebleu", "sacrebleu_char", "chrf", "chrf_word", "ter", "rouge", "rouge_stem", "exact_match")
  values, signatures = metrics.compute(names, OUTPUTS, REFERENCES)
  assert values["sacrebleu"] == sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score
  assert values["chrf"] == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score
  assert values["chrf_word"] == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES], word_order=2).score
  assert values["ter"] == sacrebleu.corpus_ter(OUTPUTS, [REFERENCES]).score
  for stem in (False, True):
    scorer = rouge_scorer.RougeScorer(list(metrics.ROUGE), use_stemmer=stem)
    for kind in metrics.ROUGE:
      mean = sum(scorer.score(r, o)[kind].fmeasure for r, o in zip(REFERENCES, OUTPUTS)) / 4
      assert values[kind + "_stem" * stem] == pytest.approx(mean, rel=1e-12)
  assert values["rouge1_stem"] > values["rouge1"]
  assert values["exact_match"] == 0.25
  assert signatures["sacrebleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
  assert (
    "stemmer:yes" in signatures["rougeLsum_stem"]
    and "stemmer:no" in signatures["rouge1"]
    and set(signatures) == set(values)
  )


def test_known_values():
  values, _ = metrics.compute(
    ("sacrebleu", "chrf", "rouge1", "rouge2", "rougeL"), ["a b c d", "e f g h"], ["a b c d", "e f g h"]
  )
  assert values == pytest.approx(dict(sacrebleu=100, chrf=100, rouge1=1, rouge2=1, rougeL=1))
  values, _ = metrics.compute(
    ("rouge1", "rouge2", "rougeL"), ["b a c"], ["a b c d"]
  )  # precision 1 and 2/3, recall 3/4 and 1/2
  assert values == pytest.approx(dict(rouge1=6 / 7, rouge2=0, rougeL=4 / 7))


def test_several_references():
  outputs, references = (
    ["the cat sat on a mat", "yes it is so"],
    [["a dog ran by", "the cat sat on a mat"], "yes it is so"],
  )
  values, signatures = metrics.compute(("sacrebleu", "rouge1", "exact_match"), outputs, references)
  assert values == pytest.approx(dict(sacrebleu=100, rouge1=1, exact_match=1))
  assert signatures["sacrebleu"].startswith("nrefs:var")


@pytest.mark.parametrize(
  "outputs,references,names,message",
  [
    ([], [], ("chrf",), "no rows"),
    (["a"], ["a", "b"], ("chrf",), "1 outputs but 2"),
    (["a"], [" "], ("chrf",), "blank"),
    (["a", "b"], [["x"], []], ("chrf",), "1 of 2 rows have no reference, the first is row 2"),
    (["a"], ["a"], ("blue",), "there is no 'blue'"),
  ],
)
def test_impossible_input_is_refused(outputs, references, names, message):
  with pytest.raises(InputError, match=message):
    metrics.compute(names, outputs, references)


def test_perplexity():
  assert metrics.perplexity(2.0) == pytest.approx(7.38905609893065) and metrics.perplexity(1e5) == float("inf")
  assert metrics.perplexity(float("nan")) != metrics.perplexity(float("nan"))
