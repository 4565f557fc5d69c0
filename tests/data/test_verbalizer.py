"""Labels as words of a text. Catches: an id learnt in place of its word, a label outside the set in silence, a ranking
whose truth or candidates slip by one."""

import numpy as np
import pytest

from jaxft.data import tasks
from jaxft.errors import InputError

ROWS = [dict(text=f"film {i}", label=i % 3 // 2) for i in range(7)]
WORDS = ((0, "bad"), (1, "good"))


def test_words_in_place_of_values(rows_store, byt5, bytelevel):
  given = dict(input="{text}", target=" {label}", verbalizer=WORDS)
  for kind, tokenizer in (("seq2seq", byt5), ("sft", bytelevel)):
    store = rows_store(ROWS, tokenizer, kind, **given)
    assert [store.texts(i)[1] for i in range(7)] == [" " + WORDS[r["label"]][1] for r in ROWS]
    assert tokenizer.decode([store.answer(0)]) == [" bad"]


def test_a_value_outside_is_refused_with_its_row(rows_store, byt5):
  with pytest.raises(InputError, match=r"x.jsonl, line 8: '2' is not among the values of task.verbalizer \(0, 1\)"):
    rows_store([*ROWS, dict(text="x", label=2)], byt5, "seq2seq", input="{text}", target="{label}", verbalizer=WORDS)


def test_each_row_with_all_words(rows_store, byt5):
  given = dict(input="{text}", target="{label}", verbalizer=(*WORDS, ("fine", "good")), ranked=True)
  store = rows_store([*ROWS, dict(text="x", label="fine")], byt5, "seq2seq", **given)
  assert len(store) == 16 and [store.texts(i)[1] for i in range(4)] == ["bad", "good"] * 2
  assert [store.where(i) for i in (0, 1, 2)] == [store.where(0)] * 2 + [store.where(3)]
  assert np.array_equal(store.tokens("inputs", 14), store.tokens("inputs", 15))


@pytest.mark.parametrize("given, message", [(((0,),), "pairs"), (((0, "a"), ("0", "b")), "twice")])
def test_bad_verbalizers(given, message):
  with pytest.raises(InputError, match=message):
    tasks.Task("seq2seq", "{a}", "{b}", verbalizer=given)
  with pytest.raises(InputError, match="classify does not read"):
    tasks.Task("classify", "{a}", verbalizer=WORDS)
