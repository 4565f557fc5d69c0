"""Words and bytes of what a model is to write. Catches: bits a byte of a text that is longer or shorter than what the
loss sums: prompts counted, context counted twice, what was cut off counted."""

import pytest

from jaxft.eval import evaluators

DOCUMENTS = ["Zwei junge Männer stehen im Freien.", "Two young men are outside. " * 4, "ab"]


def count(store, tokenizer):
  found = evaluators.count_text(store, tokenizer.decode)
  return found["words"], found["bytes"]


@pytest.mark.parametrize("length", [16, 200])
@pytest.mark.parametrize("stride", [0, 5])
def test_documents_without_their_first_token(rows_store, byt5, length, stride):
  """Of each piece, but for the overlap: every byte but the first of each piece (or of the document, with overlap)."""
  store = rows_store([dict(text=x) for x in DOCUMENTS], byt5, "causal", input="{text}", length=length, stride=stride)
  first = len(DOCUMENTS) if stride else len(store)
  assert count(store, byt5)[1] == sum(len(x.encode()) for x in DOCUMENTS) - first
  assert count(store, byt5)[1] == int(store.supervised.sum()) - len(DOCUMENTS)  # each document has an end


def test_bos_is_no_text(rows_store, bosbpe):
  rows = [dict(text=x) for x in DOCUMENTS[1:2]]
  store = rows_store(rows, bosbpe, "causal", input="{text}", length=200)
  assert count(store, bosbpe) == (20, len(DOCUMENTS[1]))


def test_answers_and_targets_alone(rows_store, bytelevel, byt5, make_store):
  rows = [dict(prompt="Translate this:", completion="Ein Mann putzt."), dict(prompt="And", completion=" zwei Männer")]
  store = rows_store(rows, bytelevel, "sft", input="{prompt}", target="{completion}", length=200)
  assert count(store, bytelevel)[0] == 5 and count(store, bytelevel)[1] in (27, 28)  # with the space or without
  pairs = make_store([("a b c", "Männer da"), ("x", "y" * 40)], too_long="truncate", too_long_share=1.0)
  assert count(pairs, byt5) == (3, 10 + 28)  # 29 tokens of the long one, the last of them its end
