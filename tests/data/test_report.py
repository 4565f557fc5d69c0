"""The report fits its terminal and says what happened.

Catches: a count without its rows, a supervised part that is not marked, lines over the width, warnings that never come,
an evaluation whose data shrinks in silence, a row that was taken for a header.
"""

import dataclasses
import types

import pytest

from jaxft import evaluations
from jaxft.data import clean, pipeline, report, tasks

PAIRS = [("a b c" * 3, "Ein Mann"), ("q", ""), ("x\ty \u2028 z", "Fenster" * 9), ("q", "Frei")] + [
  (f"w{i}", "Two men are") for i in range(30)
]


def made(make_store, tokenizer, **given):
  lengths = dict(inputs=64, targets=40)
  s = make_store(PAIRS, lengths=lengths, too_long="truncate", tokenizer=tokenizer, **given)
  return report.make(
    s, pipeline.Batches(s, seed=1, batch=4, lengths=lengths, pack=True, buckets=(), shuffle=True), tokenizer
  )


@pytest.mark.parametrize("width", [100, 72])
def test_text(make_store, byt5, width):
  r = made(make_store, byt5, clean=dataclasses.replace(clean.NOTHING, strip=True))
  text = report.text(r, width=width, color=False)
  flat = " ".join(text.split())
  for part in (
    "34 rows read, 33 kept",
    "1 (2.94%): empty target; in.txt + out.txt, line 2",
    "1 targets",
    "line 3",
    "longest",
    "steps an epoch of 4 rows",
    "[E i n",
    "</s>]",
    "supervised",
    "template input '{a}' target '{b}'",
    "a b ca b ca b c</s>",
  ):
    assert part in flat, (part, text)
  assert "\x1b" not in text and all(len(line) <= width for line in text.splitlines() if "/tmp" not in line), text
  assert r["warnings"] and "steps" in r["warnings"][-1]
  colored = report.text(r, color=True)
  assert report.GREEN + "E i n" in colored and "[" not in colored.split("target ")[-1].replace("\x1b[", "")


def test_warnings(make_store, unigram):
  r = made(make_store, unigram)
  unknown = [w for w in r["warnings"] if "unknown to the tokenizer" in w]
  assert unknown and "'1'" in unknown[0], r["warnings"]
  bad = dict(r, eos_last=0.5, pad=1, eos=1, nulls=3)
  text = " ".join(report._warnings(bad))
  assert "50.0% of the targets" in text and "same token" in text and "3 fields were null" in text
  assert "cannot learn to stop" in " ".join(report._warnings(dict(r, eos=None)))


def test_lopsided_lengths_are_named(make_store, byt5):
  lengths = dict(inputs=256, targets=40)
  s = make_store([("ab", "c" * 30)] * 50, lengths=lengths)
  r = report.make(s, pipeline.Batches(s, seed=1, batch=4, lengths=lengths, pack=True, buckets=(), shuffle=True), byt5)
  assert any("--config.data.lengths.inputs=8 " in w for w in r["warnings"])


def test_notice_is_one_line_of_what_was_lost(make_store):
  pairs = [("a", "b"), ("q", ""), ("c", "d" * 50), ("a", "b")]
  tidy = dataclasses.replace(clean.NOTHING, dedup=True)
  line = report.notice(make_store(pairs, clean=tidy, too_long="truncate").report)
  for part in (
    "4 rows read, 2 kept",
    "dropped 1 (empty target; in.txt + out.txt, line 2)",
    f"dropped 1 ({clean.DUPLICATE}; in.txt + out.txt, line 4)",
    "cut 1 targets (41.51% of all target tokens; in.txt + out.txt, line 3)",
  ):
    assert part in line, line
  assert "\n" not in line and report.notice(make_store([("a", "b")]).report) == ""


def test_evaluators_say_what_their_data_lost(make_store, caplog, monkeypatch):
  class Enough(Exception):
    """Ends the making of an evaluator once it has its data."""

  def enough(*_):
    raise Enough

  store = make_store([("a", "b"), ("q", "")])
  task = tasks.Task("seq2seq", "{input}")
  for name, value in (("store", store), ("check_positions", None), ("task", task)):
    monkeypatch.setattr(evaluations.setup, name, lambda *_, value=value, **__: value)
  monkeypatch.setattr(evaluations.evaluators, "whole_batch", enough)
  config = types.SimpleNamespace(data=types.SimpleNamespace(validation=""))
  model = types.SimpleNamespace(tokenizer=None, mesh=None, rules=None, skeleton=types.SimpleNamespace(labels=()))
  with pytest.raises(Enough):
    evaluations._one(config, model, None, "dev", dict(kind="loss", data="x", limit=0, batch=4, every=0), None)
  assert "evals.dev" in caplog.text and "dropped 1 (empty target; in.txt + out.txt, line 2)" in caplog.text


@pytest.mark.parametrize(
  "header,odd",
  [
    ("Where is it?\tWo ist es?", True),
    ("Yes, we can do it\tJa", True),
    ("x" * 61 + "\ty", True),
    ("source text\ttarget (de)", False),
    ("price, USD\tNo.", False),
  ],
)
def test_a_row_that_was_taken_for_a_header(make_store, byt5, tmp_path, header, odd):
  (tmp_path / "x.tsv").write_text(header + "\na\tb\n")
  s = make_store(source=str(tmp_path / "x.tsv"))
  batches = pipeline.Batches(s, seed=1, batch=4, lengths=s.caps, pack=True, buckets=(), shuffle=True)
  found = [w for w in report.make(s, batches, byt5)["warnings"] if "column names" in w]
  assert bool(found) == odd == bool(report.notice(s.report))
  if odd:
    assert header[:20].split("\t")[0] in found[0] and "x.tsv" in found[0]
