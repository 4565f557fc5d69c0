"""Masked tokens, pairs of sentences and spans, from rows to batches.

Catches: a special token or padding that is masked, an example that packing, hosts or the batch mask otherwise, the same
masks in two epochs, a text that gets lost, a target that is not what stood there, spans that do not restore the text, a
random sentence called the next, too few sentinels.
"""

import functools

import numpy as np
import pytest

from jaxft import kinds
from jaxft.config import Reader, base, check
from jaxft.data import fields, hidden, masking, report
from jaxft.errors import InputError

TEXTS = ["Two young men are outside.", "A man in a blue shirt cleans a window.", "Ein Mann putzt ein Fenster."]
ROWS = [dict(text=" ".join(TEXTS[(i + j) % 3] for j in range(1 + i % 4))) for i in range(24)]


def mlm(t, share=0.15, whole_word=False):
  hide = functools.partial(
    hidden.hide,
    special=tuple(t.hf.all_special_ids),
    mask_id=t.hf.mask_token_id,
    vocab=t.size,
    share=share,
    whole_word=whole_word,
  )
  return fields.Dynamic(batch=hide, says=("masked",))


def examples(b, epochs=1):
  """Yields (epoch, example, its part of each field) of all batches; hosts together give the batch."""
  start = 0
  for epoch in range(epochs):
    for step in range(start, start + b._count(epoch)):
      batch, halves = b.host_batch(step, 0, 1), [b.host_batch(step, h, 2) for h in range(2)]
      assert all(np.array_equal(batch[k], np.concatenate([h[k] for h in halves])) for k in batch)
      for r, ids in enumerate(b.row_examples(step)):
        for m, i in enumerate(ids):
          part = {}
          for k, x in batch.items():
            two = "target_segments" in batch
            side = "target" if two and k in ("targets", "weights", "target_segments") else "input"
            whole = k in ("labels", "label_weights")
            part[k] = x[r, m] if whole else x[r][batch[f"{side}_segments"][r] == m + 1]
          yield epoch, i, part
    start += b._count(epoch)


@pytest.mark.parametrize("length,stride", [(200, -1), (12, 3)])
def test_windows_of_texts(rows_store, wordpiece, length, stride):
  s = rows_store(ROWS, wordpiece, "mlm", length=length, stride=stride)
  want = wordpiece.hf(
    [r["text"] for r in ROWS], truncation=True, max_length=length, stride=max(stride, 0), return_overflowing_tokens=True
  )
  assert [s.tokens("inputs", i).tolist() for i in range(len(s))] == want["input_ids"]
  assert s.row_of(np.arange(len(s))).tolist() == want["overflow_to_sample_mapping"]


@pytest.mark.parametrize("share,whole", [(0.15, False), (1.0, False), (0.3, True)])
def test_masks(rows_store, wordpiece, batches, share, whole):
  s = rows_store(ROWS, wordpiece, "mlm", length=60, words=whole)
  how = dict(batch=4, dynamic=mlm(wordpiece, share, whole))
  packed = {(e, i): x for e, i, x in examples(batches(s, pack=True, **how), 2)}
  alone = {(e, i): x for e, i, x in examples(batches(s, pack=False, shuffle=False, **how), 2)}
  assert packed.keys() == alone.keys() and len(packed) == 2 * len(s)
  count = 0
  for key, x in packed.items():
    assert {*x} == {"inputs", "input_segments", "targets", "weights"}
    assert all(np.array_equal(x[k], alone[key][k]) for k in ("inputs", "targets", "weights"))
    tokens = s.tokens("inputs", key[1])
    special = np.isin(tokens, wordpiece.hf.all_special_ids)
    assert np.array_equal(x["targets"], tokens) and x["weights"].sum() >= 1 and not x["weights"][special].any()
    assert np.array_equal(x["inputs"][x["weights"] == 0], tokens[x["weights"] == 0])
    count += x["weights"].sum()
    if share == 1:
      assert x["weights"][~special].all()
    if whole:
      w = wordpiece.hf(s.texts(key[1])[0]).word_ids()
      chosen = {n for n, on in zip(w, x["weights"]) if on}
      assert all(on == (n in chosen) for n, on in zip(w, x["weights"]) if n is not None)
  assert any(not np.array_equal(packed[0, i]["weights"], packed[1, i]["weights"]) for i in range(len(s))) or share == 1
  b = batches(s, **how)
  shapes = b.spec()
  assert shapes["targets"] == shapes["inputs"] and shapes["weights"][1] == np.float32
  text = report.text(report.make(s, b, wordpiece))
  assert "anew      masked" in text and ("[MASK]=" in text or share < 1)


DOCUMENTS = [
  dict(text=" ".join([TEXTS[(i + j) % 3] for j in range(2 + i % 3)] + ["A man."] * (i % 2))) for i in range(30)
]


def test_pairs(rows_store, wordpiece, batches):
  s = rows_store([*DOCUMENTS, dict(text="Only one.")], wordpiece, "mlm_nsp", length=60)
  assert s.report["dropped"][hidden.ALONE]["rows"][0].endswith("line 31")
  how = dict(batch=4, dynamic=mlm(wordpiece))
  packed = {i: x for _, i, x in examples(batches(s, pack=True, lengths=dict(inputs=150), **how))}
  alone = {i: x for _, i, x in examples(batches(s, pack=False, **how))}
  labels = []
  for i in range(len(s)):
    x, (text, says) = packed[i], s.texts(i)
    assert all(np.array_equal(x[k], alone[i][k]) for k in x if k != "input_segments")
    a, b = text.split("\n")
    made = wordpiece.hf(a, b)
    assert x["targets"].tolist() == made["input_ids"] and x["input_types"].tolist() == made["token_type_ids"]
    assert x["label_weights"] == 1 and x["labels"] == (says == "random")
    row = DOCUMENTS[int(s.row_of(np.array([i]))[0])]["text"]
    assert a in row and (f"{a} {b}" in row or says == "random")
    labels.append(int(x["labels"]))
  assert 0.3 < np.mean(labels) < 0.7
  again = rows_store([*DOCUMENTS, dict(text="Only one.")], wordpiece, "mlm_nsp", length=60, workers=2, name="z.jsonl")
  assert [again.texts(i) for i in range(len(again))] == [s.texts(i) for i in range(len(s))]
  masked = [alone[i]["weights"].sum() for i in range(len(s))]
  assert abs(hidden.mean_hidden(s.lengths["inputs"], 0.15) / np.mean(masked) - 1) < 0.2
  short = rows_store(DOCUMENTS, wordpiece, "mlm_nsp", length=12, too_long="truncate", name="t.jsonl")
  assert short.lengths["inputs"].max() == 12 and (short.tokens("inputs", 3)[-1] == wordpiece.sep)


def config(kind, **task):
  c = base()
  c.task.update(kind=kind, **task)
  return Reader(check(c))


def test_spans(rows_store, byt5, batches):
  c = base()
  c.task.update(kind="span_corruption", corruption=dict(density=0.2, span=6.0))
  c.data.lengths = dict(inputs=40, targets=20)
  c = Reader(check(c))
  raw, dynamic = kinds.lengths(c), kinds.dynamic(c, byt5)
  s = rows_store(ROWS, byt5, "span_corruption", lengths=raw)
  assert s.caps == raw and raw["inputs"] > 40
  how = dict(batch=4, dynamic=dynamic, lengths=dict(inputs=80, targets=40))
  packed = {(e, i): x for e, i, x in examples(batches(s, pack=True, **how), 2)}
  alone = {(e, i): x for e, i, x in examples(batches(s, pack=False, shuffle=False, **how), 2)}
  sentinels = [byt5.hf.get_vocab()[f"<extra_id_{i}>"] for i in range(7)]
  assert packed.keys() == alone.keys() and len({i for _, i in packed}) == len(s)
  for key, x in packed.items():
    assert all(np.array_equal(x[k], alone[key][k]) for k in ("inputs", "targets", "weights")) and x["weights"].all()
    assert x["inputs"][-1] == x["targets"][-1] == byt5.eos
    parts, out = {}, []
    for t in x["targets"][:-1].tolist():
      if t in sentinels:
        last = parts.setdefault(t, [])
      else:
        last.append(t)
    for t in x["inputs"][:-1].tolist():
      out += parts.pop(t) if t in sentinels else [t]
    assert out == s.tokens("inputs", key[1]).tolist() and not parts
  whole = [bytearray() for _ in ROWS]  # a token that would be alone at the end takes the one before it along
  for i, row in enumerate(s.row_of(np.arange(len(s)))):
    whole[row][s._offset[i] :] = bytes(x - 3 for x in s.tokens("inputs", i).tolist())
  assert [x.decode() for x in whole] == [r["text"] for r in ROWS]
  assert any(not np.array_equal(packed[0, i]["inputs"], packed[1, i]["inputs"]) for i in range(len(s)))
  b = batches(s, **how)
  text = " ".join(report.text(report.make(s, b, byt5)).split())
  assert "20% of the tokens are hidden in spans of 6" in text and "<extra_id_0>" in text
  assert {k: v[0] for k, v in b.spec().items()} == {k: v.shape for k, v in b.host_batch(0, 0, 1).items()}
  assert masking.corrupted_lengths(np.array([raw["inputs"]]), 0.2, 6.0)[0][0] <= 40


def test_what_is_refused(wordpiece, byt5, bytelevel):
  with pytest.raises(InputError, match="no mask token"):
    kinds.dynamic(config("mlm"), bytelevel)
  with pytest.raises(InputError, match="has share=0"):
    kinds.dynamic(config("mlm", mask=dict(share=0.0, whole_word=False)), wordpiece)
  with pytest.raises(InputError, match="no end-of-text token"):
    kinds.dynamic(config("span_corruption"), wordpiece)
  with pytest.raises(InputError, match="0 sentinels"):
    kinds.dynamic(config("span_corruption"), bytelevel)
  with pytest.raises(InputError, match="7 sentinels"):
    kinds.dynamic(config("span_corruption"), byt5)
  with pytest.raises(InputError, match="task.mask is .* a task of kind causal does not read; it is for mlm, mlm_nsp"):
    kinds.lengths(config("causal", mask=dict(share=0.5, whole_word=False)))
  with pytest.raises(InputError, match="density=0"):
    kinds.lengths(config("span_corruption", corruption=dict(density=0.0, span=3.0)))


def test_a_text_without_a_token_to_hide(rows_store, wordpiece):
  s = rows_store([*ROWS, dict(text="木 木")], wordpiece, "mlm", length=60)
  assert s.report["dropped"]["no tokens"]["rows"][0].endswith("line 25")
