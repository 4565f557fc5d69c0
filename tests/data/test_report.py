"""The report fits its terminal and says what happened.

Catches: a count without its rows, a supervised part that is not marked, lines over the width, warnings that never come.
"""

import dataclasses

import pytest

from jaxft.data import clean, pipeline, report

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
