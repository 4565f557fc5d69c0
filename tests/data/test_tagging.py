"""Tags of words: on the first token of each word, by their scheme, and files of one word a line.

Catches: a tag on the second token of a word, words glued together, a word without a token that shifts the tags after
it, an entity that begins with I- passed over, iob1 turned wrongly, two sentences joned at the end of a file.
"""

import numpy as np
import pytest
import transformers

from jaxft.data import files, labels, report, tasks
from jaxft.errors import InputError

SENTENCES = [
  (["Two", "young", "men", "are", "outside"], ["B-X", "I-X", "O", "O", "B-Y"]),
  (["Männer"], ["O"]),
  (["window", "\u200b", "blue-shirt", "."], ["B-Y", "O", "B-X", "O"]),
] * 4
ROWS = [{"tokens": w, "ner_tags": t} for w, t in SENTENCES]


def aligned(store, i):
  """Returns the tags of the tokens of an example, None where they weigh nothing."""
  targets, weights = (store.gather(n, np.array([i])) for n in ("targets", "weights"))
  assert not targets[weights == 0].any()
  return [store.labels[x] if w else None for x, w in zip(targets, weights)]


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel", "bosbpe", "unigram"])
def test_first_tokens_carry_the_tags(rows_store, request, name):
  t = request.getfixturevalue(name)
  hf = t.hf
  if name == "bytelevel":  # as whoever uses the model must make it
    backend = t.hf.backend_tokenizer.__class__.from_str(t.hf.backend_tokenizer.to_str())
    backend.pre_tokenizer.add_prefix_space = True
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  s = rows_store(ROWS, t, "tag", length=100)
  assert s.labels == ("B-X", "B-Y", "I-X", "O") and s.report["scheme"] == "iob2"
  lost = 0
  for i, (words, tags) in enumerate(SENTENCES):
    encoding = hf(words, is_split_into_words=True)
    assert s.tokens("inputs", i).tolist() == encoding["input_ids"]
    of, want = encoding.word_ids(), []
    for place, word in enumerate(of):
      first = word is not None and (place == 0 or of[place - 1] != word)
      want.append(tags[word] if first else None)
    assert aligned(s, i) == want
    lost += len(words) - sum(x is not None for x in want)
    assert s.supervised[i] == sum(x is not None for x in want) and s.texts(i)[1] == " ".join(tags)
  assert s.meta["counts"] == dict(lost=lost, words=40) and (lost == 4) == (name == "wordpiece")
  counts = {x: sum(aligned(s, i).count(x) for i in range(12)) for x in s.labels}
  assert s.report["label_counts"] == counts


def test_batches_and_truncation(rows_store, wordpiece, batches):
  s = rows_store(ROWS, wordpiece, "tag", length=8, too_long="truncate")
  assert s.tokens("inputs", 0)[-1] == wordpiece.sep and s.gather("weights", np.array([0]))[-1] == 0
  b = batches(s, batch=4)
  for step in range(b.steps(1)):
    batch = b.host_batch(step, 0, 1)
    assert {k: v.dtype.name for k, v in batch.items()} == dict(
      inputs="int32", input_segments="int32", targets="int32", weights="float32"
    )
    for r, ids in enumerate(b.row_examples(step)):
      want = [x for i in ids for x in aligned(s, i)]
      got = [s.labels[x] if w else None for x, w in zip(batch["targets"][r], batch["weights"][r])]
      assert got == want + [None] * (8 - len(want)) and not batch["targets"][r, len(want) :].any()


def test_what_the_report_says(rows_store, wordpiece, bytelevel, batches):
  s = rows_store(ROWS, wordpiece, "tag", length=100)
  r = report.make(s, batches(s), wordpiece)
  text = " ".join(report.text(r).split())
  assert "labels 4 by iob2 B-X" in text and "4 of 40 words give no token" in text and "[CLS] [" in text
  s = rows_store(ROWS, bytelevel, "tag", length=100)
  assert any("add_prefix_space=True" in w for w in report.make(s, batches(s), bytelevel)["warnings"])


def test_ids_and_texts(rows_store, wordpiece):
  names = ("O", "B-X", "I-X")
  rows = [{"words": "a man", "tags": [1, 2]}, {"words": "men", "tags": [0]}]
  s = rows_store(rows, wordpiece, "tag", labels=names)
  assert s.texts(0) == ("a man", "B-X I-X")
  assert [x for x in aligned(s, 0) if x] == ["B-X", "I-X"] and s.labels == names
  s = rows_store(rows, wordpiece, "tag")
  assert s.labels == ("0", "1", "2") and s.report["scheme"] == "none"
  s = rows_store([{"tokens": "a man", "tags": "O B-X"}], wordpiece, "tag")
  assert [x for x in aligned(s, 0) if x] == ["O", "B-X"]
  rows = [
    {"tokens": ["a"], "pos_tags": ["DT"], "ner_tags": ["O"]},
    {"tokens": ["b"], "pos_tags": ["NN"], "ner_tags": ["B-X"]},
  ]
  assert rows_store(rows, wordpiece, "tag").labels == ("B-X", "O")
  assert rows_store(rows, wordpiece, "tag", label="{pos_tags}").labels == ("DT", "NN")


@pytest.mark.parametrize(
  "words,tags,given,says",
  [
    (["a", "b"], ["O"], {}, "x.jsonl, line 2: 2 words but 1 tags"),
    (["a", "b"], ["O", "I-X"], {}, "line 2: tag 2 is 'I-X' after 'O'.*task.scheme=iob1"),
    (["a", "b"], ["B-X", "I-Y"], {}, "tag 2 is 'I-Y' after 'B-X'"),
    (["a", "b"], ["B-X", "NN"], dict(scheme="iob2"), "tag 2 is 'NN', which is none of iob2"),
    (["a", "b"], ["O", "X-X"], dict(scheme="iob1"), "tag 2 is 'X-X'"),
    (["a", "b"], ["B-X", "O"], dict(scheme="bilou"), "the entity of 'B-X' does not end"),
    (["a", "b"], ["O", "B-X"], dict(scheme="bilou"), "the entity of 'B-X' does not end"),
    (["a", "b"], ["O", "L-X"], dict(scheme="bilou"), "tag 2 is 'L-X' after 'O'"),
    (["a", "b"], ["O", None], {}, "tag 2 is null or empty"),
    (["a", "b"], [1, 0], dict(scheme="iob2"), "the tags are ids"),
    (7, ["O"], {}, "the words are 7"),
  ],
)
def test_tags_that_are_refused(rows_store, wordpiece, words, tags, given, says):
  rows = [{"tokens": ["a"], "tags": ["O"]}, {"tokens": words, "tags": tags}]
  with pytest.raises(InputError, match=says):
    rows_store(rows, wordpiece, "tag", **given)


def test_a_row_whose_words_have_no_token(rows_store, wordpiece):
  rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["\u200b"], "tags": ["O"]}]
  with pytest.raises(InputError, match="1 of 2 examples .*no word of theirs gives a token: .*line 2"):
    rows_store(rows, wordpiece, "tag")
  rows[1] = {"tokens": [], "tags": []}
  assert rows_store(rows, wordpiece, "tag").report["dropped"]["empty input"]["count"] == 1


@pytest.mark.parametrize(
  "given,expected",
  [("I-X I-X O I-X B-X I-X I-Y", "B-X I-X O B-X B-X I-X B-Y"), ("O I-X O", "O B-X O"), ("B-X I-X", "B-X I-X")],
)
def test_iob1(given, expected):
  assert labels.checked_tags(given.split(), "iob1", "") == expected.split()


def test_schemes():
  for tags, scheme in (("B-X I-X L-X U-Y O", "bilou"), ("B-X E-X S-Y O", "bilou"), ("I-X NN", "none"), ("NN DT", "")):
    assert labels.checked_tags(tags.split(), scheme, "") == tags.split()
  assert [labels.scheme_of(x, "") for x in (("O", "B-X"), ("O", "NN"), ("O",))] == ["iob2", "none", "none"]
  assert labels.scheme_of(("O",), "iob1") == "iob2"
  with pytest.raises(InputError, match="task.scheme is 'bio'"):
    tasks.Task("tag", "{input}", scheme="bio")


CONLL = "-DOCSTART- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n \nPeter NNP B-NP B-PER"


def read(path, text):
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  return list(files.read_file(str(path), None))


def test_conll(tmp_path, make_store, wordpiece):
  rows = read(tmp_path / "x.conll", CONLL)
  assert [dict(r) for r in rows] == [
    dict(tokens=["EU", "rejects"], column_2=["NNP", "VBZ"], column_3=["B-NP", "B-VP"], tags=["B-ORG", "O"]),
    dict(tokens=["Peter"], column_2=["NNP"], column_3=["B-NP"], tags=["B-PER"]),
  ]
  assert [r.where.rsplit(" ", 2)[1:] for r in rows] == [["line", "3"], ["line", "7"]]
  rows = read(tmp_path / "x.iob", "a b\tO\r\n#c\tB-X\r\n\r\n\r\nd\tO\r\n\r\n")
  assert [r["tokens"] for r in rows] == [["a b", "#c"], ["d"]] and rows[0]["tags"] == ["O", "B-X"]
  s = make_store(source=str(tmp_path / "x.conll"), tokenizer=wordpiece, task=tasks.Task("tag", "{input}"))
  assert s.labels == ("B-ORG", "B-PER", "O") and s.where(1).endswith("x.conll, line 7")


@pytest.mark.parametrize(
  "text,says",
  [
    ("a O\nb\n", "x.bio, line 2: 1 columns .'b'., where 2 belong to this sentence"),
    ("a\tO\nb\tO\tO\n", "line 2: 3 columns.*with tabs between"),
    ("word\n", "line 1: 1 columns.*2 are the least"),
    (b"a O\n\xe9 O\n", "line 2: byte 1 of the line is not UTF-8"),
  ],
)
def test_conll_that_is_refused(tmp_path, text, says):
  with pytest.raises(InputError, match=says):
    read(tmp_path / "x.bio", text)
