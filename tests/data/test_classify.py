"""Texts with labels: ids, token types and truncation as transformers', labels as the data says, every odd one refused.

Catches: a pair cut at its end alone, types of the other text, labels numbered by appearance, a hole in ids passed over,
a validation label that gets a number of its own, one label for multi-label rows, a number that is read from text in
part, label weights on rows that are not there.
"""

import datasets
import numpy as np
import pytest

from jaxft.data import limits, report, tasks
from jaxft.errors import InputError

WORDS = "Two young men are outside a man in blue shirt cleans window".split()


def text(i, n):
  return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(n))


ROWS = [{"sentence": text(i, 1 + i % 9), "label": ["dog", "cat", "emu"][i * i % 3 if i else 2]} for i in range(40)]
PAIRS = [
  {"premise": text(i, 1 + i * 5 % 13), "hypothesis": text(i + 3, 1 + i * 3 % 11), "label": i % 2} for i in range(40)
]


def labels_of(s):
  return [s.labels[x] for x in s.scalar("labels", np.arange(len(s)))]


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel", "bosbpe", "unigram"])
def test_one_text(rows_store, request, name):
  t = request.getfixturevalue(name)
  s = rows_store(ROWS, t, "classify", length=200)
  assert [s.tokens("inputs", i).tolist() for i in range(40)] == t.hf([r["sentence"] for r in ROWS])["input_ids"]
  assert s.labels == ("cat", "dog", "emu") and labels_of(s) == [r["label"] for r in ROWS]
  assert s.class_counts.tolist() == [labels_of(s).count(x) for x in s.labels] and s.aligned == {}
  assert s.texts(3) == (ROWS[3]["sentence"], ROWS[3]["label"]) and s.supervised is None


@pytest.mark.parametrize("length", [200, 15, 8, 5])
def test_pairs_are_cut_as_transformers_does(rows_store, wordpiece, length):
  s = rows_store(PAIRS, wordpiece, "classify", length=length, too_long="truncate")
  cut = 0
  for i, row in enumerate(PAIRS):
    want = wordpiece.hf(row["premise"], row["hypothesis"], truncation=True, max_length=length)
    assert s.tokens("inputs", i).tolist() == want["input_ids"]
    assert s.gather("types", np.array([i])).tolist() == want["token_type_ids"]
    cut += len(want["input_ids"]) < len(wordpiece.hf(row["premise"], row["hypothesis"])["input_ids"])
  assert s.report["cut"]["inputs"]["count"] == cut and (cut > 0) == (length < 200)
  both = s.gather("inputs", np.array([5, 0, 11]))
  assert both.tolist() == [x for i in (5, 0, 11) for x in s.tokens("inputs", i)]


@pytest.mark.parametrize("name", ["bytelevel", "bosbpe", "byt5"])
def test_pairs_of_tokenizers_without_types(rows_store, request, name):
  t = request.getfixturevalue(name)
  s = rows_store(PAIRS, t, "classify", length=200)
  for i, row in enumerate(PAIRS):
    assert s.tokens("inputs", i).tolist() == t.hf(row["premise"], row["hypothesis"])["input_ids"]
  assert s.aligned == {} and "types" not in s.meta["fields"]


def test_longest_first():
  assert limits.longest_first(10, 4, 9) == (5, 4) and limits.longest_first(4, 10, 9) == (4, 5)
  assert limits.longest_first(3, 3, 6) == (3, 3)


def test_rows_of_one_and_of_two_texts(rows_store, wordpiece):
  rows = [{"text": "a man", "label": "x"}, {"premise": "a man", "hypothesis": "men", "label": "y"}] * 3
  s = rows_store(rows, wordpiece, "classify")
  assert s.tokens("inputs", 2).tolist() == wordpiece.hf("a man")["input_ids"]
  types = wordpiece.hf("a man", "men")["token_type_ids"]
  assert s.gather("types", np.array([2, 3])).tolist() == [0] * s.lengths["inputs"][2] + types and 1 in types


def test_a_length_without_room_for_two_texts(rows_store, wordpiece):
  with pytest.raises(InputError, match="two texts come with 3 special tokens; at least 5 are needed"):
    rows_store(PAIRS, wordpiece, "classify", length=4, too_long="truncate")


@pytest.mark.parametrize(
  "columns,expected",
  [
    (("text", "label"), ("{text}", "", "{label}")),
    (("Review", "Sentiment"), ("{Review}", "", "{Sentiment}")),
    (("id", "content", "category"), ("{content}", "", "{category}")),
    (("sentence1", "sentence2", "label", "idx"), ("{sentence1}", "{sentence2}", "{label}")),
    (("question", "sentence", "label"), ("{question}", "{sentence}", "{label}")),
    (("question", "intent"), ("{question}", "", "{intent}")),
    (("text_a", "text_b", "class"), ("{text_a}", "{text_b}", "{class}")),
    (("letter", "label"), ("{letter}", "", "{label}")),
    (("text", "kind"), ("{text}", "", "{kind}")),
  ],
)
def test_columns_that_people_have(rows_store, byt5, columns, expected):
  rows = [{c: f"{c}{i}" for c in columns} for i in range(3)]
  (one,) = rows_store(rows, byt5, "classify").report["tasks"]
  assert (one["input"], one["pair"], one["label"]) == expected


def test_templates_that_are_given_stay(rows_store, byt5):
  rows = [{"q": "a", "x": "b", "label": "n"}, {"q": "c", "x": "d", "label": "p"}]
  s = rows_store(rows, byt5, "classify", input="say {q}", pair="{x}!")
  assert s.texts(1) == ("say c\nd!", "p")
  s = rows_store(rows, byt5, "classify", input="{q}", label="{x}-{label}")
  assert s.labels == ("b-n", "d-p")


LABELLED = [
  (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
  ([1, 0, 2], ("0", "1", "2"), [1, 0, 2]),
  ([1.0, 0.0, 1], ("0", "1"), [1, 0, 1]),
  (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
  ([True, False, True], ("False", "True"), [1, 0, 1]),
  ([" a", "b ", "a"], (" a", "a", "b "), [0, 2, 1]),
]


@pytest.mark.parametrize("values,names,numbers", LABELLED)
def test_numbers_of_labels(rows_store, byt5, values, names, numbers):
  s = rows_store([{"text": f"t{i}", "label": v} for i, v in enumerate(values)], byt5, "classify")
  assert s.labels == names and s.scalar("labels", np.arange(3)).tolist() == numbers


def test_labels_that_are_given(rows_store, byt5):
  rows = lambda values: [{"text": f"t{i}", "label": v} for i, v in enumerate(values)]
  names = ("positive", "negative", "neither")
  s = rows_store(rows([1, 0, 1]), byt5, "classify", labels=names)
  assert s.labels == names and s.scalar("labels", np.arange(3)).tolist() == [1, 0, 1] and s.texts(0)[1] == "negative"
  s = rows_store(rows(["negative", "positive"]), byt5, "classify", labels=names)
  assert s.scalar("labels", np.arange(2)).tolist() == [1, 0] and s.class_counts.tolist() == [1, 1, 0]
  assert rows_store(rows([2, 1]), byt5, "classify", labels=("2", "1")).scalar("labels", np.arange(2)).tolist() == [0, 1]
  with pytest.raises(InputError, match="names b twice"):
    rows_store(rows([0]), byt5, "classify", labels=("b", "a", "b"))


def test_validation_has_the_labels_of_training(rows_store, byt5, make_store):
  train = rows_store([{"text": "t", "label": x} for x in "abc"], byt5, "classify")
  path = train.folder.parent.parent / "v.csv"
  path.write_text("text,label\nt,c\nu,b\n")
  given = dict(source=str(path), task=tasks.Task("classify", "{input}"), lengths=dict(inputs=9))
  v = make_store(**given, labels=train.labels)
  assert v.labels == train.labels and v.scalar("labels", np.arange(2)).tolist() == [2, 1]
  assert make_store(**given).folder != v.folder
  path.write_text("text,label\nt,c\nu,bb\n")
  with pytest.raises(
    InputError, match=r"v.csv, line 3: the label 'bb' is not among the 3 of the training data: a, b, c"
  ):
    make_store(**given, labels=train.labels)
  path.write_text('text,label\nt,c\nu,""\n')
  assert make_store(**given, labels=train.labels).report["dropped"]["no label"]["rows"] == [f"{path}, line 3"]


BAD = [
  (["a", 3, "b"], "both names and numbers: 'a' in .*line 1, and 3 in .*line 2"),
  ([0, 2, 0], r"ids up to 2, but 2 of them occur; 1 does not.*task.labels"),
  ([1, 2, 3], r"ids up to 3, but 3 of them occur; 0 does not"),
  ([-1, 0, 1], r"-1 is below 0.*kept secret.*x.jsonl, line 1"),
  ([1.5, 0, 1], r"x.jsonl, line 1: the label is 1.5.*task.kind=regress"),
  ([["a", "b"], "c"], r"x.jsonl, line 1: the label is \['a', 'b'\].*task.multi=True"),
  (["a", "a"], "every label is 'a'"),
  ([None, None], "all 2 rows of .* were dropped: no label: 2"),
]


@pytest.mark.parametrize("values,says", BAD)
def test_labels_that_are_refused(rows_store, byt5, values, says):
  with pytest.raises(InputError, match=says):
    rows_store([{"text": f"t{i}", "label": v} for i, v in enumerate(values)], byt5, "classify")


@pytest.mark.parametrize(
  "row,kind,says",
  [
    ({"text": "a", "x": "b", "y": "c"}, "classify", "x.jsonl, line 1: none of the columns text, x, y is known to be "
     "the label.*task.label='{y}'"),
    ({"a": "a", "x": "b", "label": "c"}, "classify", "none of the columns a, x, label is known to be the text"),
    ({"tokens": ["a"], "x": ["b"]}, "tag", "none of the columns tokens, x is known to be the label"),
    ({"x": ["a"], "tags": ["b"]}, "tag", "known to be the list of words"),
    ({"x": "a", "y": "b"}, "causal", "known to be the text"),
  ],
)  # fmt: skip
def test_columns_that_are_not_known(rows_store, byt5, row, kind, says):
  with pytest.raises(InputError, match=says):
    rows_store([row], byt5, kind)


def test_a_label_column_that_is_not_there(rows_store, byt5):
  with pytest.raises(
    InputError, match=r"line 1: task.label names the field {lable}.*did you mean 'label'.*text, label"
  ):
    rows_store([{"text": "a", "label": "b"}], byt5, "classify", label="{lable}")


def test_null_labels_are_dropped_with_their_rows(rows_store, byt5):
  rows = [{"text": "a", "label": x} for x in ("p", None, "q", "")]
  s = rows_store(rows, byt5, "classify")
  assert len(s) == 2 and [r.rsplit(" ", 1)[1] for r in s.report["dropped"]["no label"]["rows"]] == ["2", "4"]


def test_several_labels_a_row(rows_store, byt5, batches):
  values = [["b", "a"], [], "c|a", "b, c", ["a", "a"], None, "a"]
  rows = [{"text": f"t{i}", "labels": v} for i, v in enumerate(values)]
  s = rows_store(rows, byt5, "classify", multi=True)
  assert s.labels == ("a", "b", "c") and len(s) == 6 and s.report["dropped"]["no label"]["count"] == 1
  want = [[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]]
  assert s.scalar("labels", np.arange(6)).tolist() == want and s.class_counts.tolist() == np.sum(want, 0).tolist()
  b = batches(s, batch=2, shuffle=False).host_batch(0, 0, 1)
  assert b["labels"].shape == (2, 24, 3) and b["labels"].dtype == b["label_weights"].dtype == np.float32
  assert b["labels"][0, :3].tolist() == want[:3] and b["label_weights"][0].sum() + b["label_weights"][1].sum() == 6


def test_numbers(rows_store, byt5, batches):
  rows = [{"sentence1": "a", "sentence2": "b", "score": x} for x in (1, "2.5", 0.0, None, "")]
  s = rows_store(rows, byt5, "regress")
  assert s.scalar("labels", np.arange(3)).tolist() == [1, 2.5, 0] and s.report["dropped"]["no label"]["count"] == 2
  assert s.labels is None and s.report["numbers"]["mean"] == pytest.approx(3.5 / 3) and s.class_counts is None
  b = batches(s, batch=2, pack=False, shuffle=False)
  assert b.segments == 1 and b.host_batch(1, 0, 1)["labels"].tolist() == [[0], [0]]
  assert b.host_batch(1, 0, 1)["label_weights"].tolist() == [[1], [0]]
  s = rows_store([{"text": "a", "label": [1, 2]}, {"text": "b", "label": [3, 4.5]}], byt5, "regress")
  assert s.scalar("labels", np.array([1, 0])).tolist() == [[3, 4.5], [1, 2]]
  assert batches(s).host_batch(0, 0, 1)["labels"].shape == (6, 32, 2)


@pytest.mark.parametrize(
  "values,says",
  [
    (["3,5"], r"x.jsonl, line 1: the label is '3,5', which is not a number"),
    ([1, True], "line 2: the label is True"),
    ([1, float("nan")], "line 2: the label is nan; only finite"),
    (["inf"], "finite"),
    ([1e39], "finite"),
    ([[1, 2], [1]], "line 2: 1 numbers, but 2 in .*line 1"),
    ([{"a": 1}], "not a number"),
  ],
)
def test_numbers_that_are_refused(rows_store, byt5, values, says):
  with pytest.raises(InputError, match=says):
    rows_store([{"text": f"t{i}", "label": v} for i, v in enumerate(values)], byt5, "regress")


def test_report(rows_store, wordpiece, batches):
  s = rows_store(PAIRS, wordpiece, "classify", length=200, labels=("same", "other", "third"))
  r = report.make(s, batches(s), wordpiece)
  text = " ".join(report.text(r).split())
  for part in (
    "labels 3 same 20 50.0% ####",
    "pair '{hypothesis}'",
    "[SEP]",
    "label same",
    "1 of 3 labels do not occur",
  ):
    assert part in text, (part, text)
  assert "end-of-text" not in text and "special" not in text


def test_names_that_a_data_set_has_for_its_ids(make_store, byt5, wordpiece, tmp_path):
  names = ["pos", "neg", "odd"]

  def saved(folder, names, labels):
    features = datasets.Features(dict(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=names)))
    data = dict(sentence=[f"t{i}" for i in labels], label=labels)
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / folder)
    return f"hub:{tmp_path / folder}"

  given = dict(tokenizer=byt5, task=tasks.Task("classify", "{input}"), lengths=dict(inputs=9))
  s = make_store(source=saved("a", names, [0, 1, 0]), **given)
  assert s.labels == ("pos", "neg", "odd") and s.class_counts.tolist() == [2, 1, 0] and s.texts(1) == ("t1", "neg")
  other = saved("b", ["neg", "pos"], [0, 1])  # the same names, otherwise numbered
  assert make_store(source=other, labels=s.labels, **given).scalar("labels", np.arange(2)).tolist() == [1, 0]
  assert make_store(source=[(other, 1), (saved("c", ["neg", "pos"], [1]), 1)], **given).labels == ("neg", "pos")
  features = dict(
    tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(names=["O", "B-X"]))
  )
  rows = dict(tokens=[["a", "man"]], ner_tags=[[1, 0]])
  datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "d")
  t = make_store(source=f"hub:{tmp_path / 'd'}", tokenizer=wordpiece, task=tasks.Task("tag", "{input}"))
  assert t.labels == ("O", "B-X") and t.texts(0) == ("a man", "B-X O") and t.report["scheme"] == "iob2"
