"""Training texts that change with each epoch: the same change in any row, batch or host, and none in evaluation.

Catches: special tokens that move or go, token types that no longer fit their tokens, a label or target that changes,
words cut apart, rows that overflow, the same text in each epoch.
"""

import functools

import numpy as np
import pytest

from jaxft import kinds
from jaxft.config import Reader, base, check
from jaxft.data import augment, fields, report
from jaxft.errors import InputError

TEXTS = ["Two young men are outside.", "A man in a blue shirt cleans a window.", "Ein Mann putzt ein Fenster."]
ROWS = [dict(sentence1=TEXTS[i % 3], sentence2=TEXTS[i // 3 % 3], label=i % 2) for i in range(20)]


def changing(dropout=0.3, swap=0.3):
  return fields.Dynamic(
    augment=functools.partial(augment.both, word_dropout=dropout, word_swap=swap), says=("changed",)
  )


def seen(b, epochs=2):
  out, start = {}, 0
  for epoch in range(epochs):
    for step in range(start, start + b._count(epoch)):
      batch, halves = b.host_batch(step, 0, 1), [b.host_batch(step, h, 2) for h in range(2)]
      assert all(np.array_equal(batch[k], np.concatenate([h[k] for h in halves])) for k in batch)
      for r, ids in enumerate(b.row_examples(step)):
        for m, i in enumerate(ids):
          at = batch["input_segments"][r] == m + 1
          part = {k: x[r][at] for k, x in batch.items() if k.startswith("input")}
          out[epoch, i] = part | {k: x[r, m] for k, x in batch.items() if k.startswith("label")}
          if "targets" in batch:
            out[epoch, i]["targets"] = batch["targets"][r][batch["target_segments"][r] == m + 1]
    start += b._count(epoch)
  return out


def test_pairs_with_labels(rows_store, wordpiece, batches):
  s = rows_store(ROWS, wordpiece, "classify", length=60, words=True)
  packed = seen(batches(s, batch=2, dynamic=changing()))
  alone = seen(batches(s, batch=2, pack=False, shuffle=False, dynamic=changing()))
  plain = seen(batches(s, batch=2, dynamic=fields.Dynamic()))
  assert packed.keys() == alone.keys() == plain.keys()
  changed = 0
  for (epoch, i), x in packed.items():
    assert {*x} == {"inputs", "input_segments", "input_types", "labels", "label_weights"}
    assert all(np.array_equal(x[k], alone[epoch, i][k]) for k in x if k != "input_segments")
    before = plain[epoch, i]
    assert x["labels"] == ROWS[i]["label"] and len(x["inputs"]) <= len(before["inputs"])
    changed += not np.array_equal(x["inputs"], before["inputs"])
    for side in (0, 1):  # the words that are left lie in their own text, whole
      text = wordpiece.hf.decode(x["inputs"][x["input_types"] == side], skip_special_tokens=True)
      assert set(text.split()) <= set(wordpiece.hf.decode(before["inputs"], skip_special_tokens=True).split())
    assert x["inputs"][0] == 2 and x["inputs"][-1] == 3 and (x["inputs"] == 3).sum() == 2
    assert np.array_equal(np.diff(x["input_types"]) >= 0, np.ones(len(x["inputs"]) - 1, bool))
  assert changed > 30 and any(not np.array_equal(packed[0, i]["inputs"], packed[1, i]["inputs"]) for i in range(20))
  assert "anew      changed" in report.text(report.make(s, batches(s, dynamic=changing()), wordpiece))


def test_inputs_of_pairs_of_texts(rows_store, unigram, batches):
  rows = [dict(input=TEXTS[i % 3], target=TEXTS[(i + 1) % 3]) for i in range(12)]
  s = rows_store(rows, unigram, "seq2seq", target="{target}", length=90, words=True)
  packed, alone = (seen(batches(s, batch=2, pack=p, dynamic=changing())) for p in (True, False))
  plain = seen(batches(s, batch=2))
  for (epoch, i), x in packed.items():
    assert np.array_equal(x["inputs"], alone[epoch, i]["inputs"]) and x["inputs"][-1] == unigram.eos
    assert np.array_equal(x["targets"], plain[epoch, i]["targets"])
  assert any(not np.array_equal(packed[k]["inputs"], plain[k]["inputs"]) for k in packed)


def reader(kind, **rates):
  c = base()
  c.task.kind = kind
  c.data.augment.update(rates)
  return Reader(check(c))


def test_only_in_training_and_only_where_it_makes_sense(wordpiece, byt5, rows_store):
  c = reader("classify", word_dropout=0.1)
  made = kinds.dynamic(c, wordpiece)
  assert made.augment and "10% of the words are left out" in made.says[0] and kinds.words(c)
  assert kinds.dynamic(c, wordpiece, training=False) == fields.Dynamic()
  assert kinds.dynamic(reader("classify"), wordpiece) == fields.Dynamic() and not kinds.words(reader("classify"))
  for kind in ("tag", "causal", "qa", "sft"):
    with pytest.raises(
      InputError, match=f"data.augment .*for tasks of kind classify, regress, seq2seq; in one of kind {kind}"
    ):
      kinds.dynamic(reader(kind, word_swap=0.1), wordpiece)
  with pytest.raises(InputError, match="probabilities"):
    kinds.words(reader("classify", word_dropout=1.5))
  with pytest.raises(InputError, match="words need the words that tokens belong to"):
    rows_store([dict(text="a", label=0), dict(text="b", label=1)], byt5, "classify", words=True)
