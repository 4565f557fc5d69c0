"""The token cache: same content whoever builds it, built again exactly when something changed, lengths applied on top.

Catches: chunks out of order, counts lost between processes, a fingerprint without one of its parts, truncation that
cuts EOS or counts wrongly, examples counted as rows, half-written caches that are taken for whole ones.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data import build, cache, clean, crew, report, tasks
from jaxft.errors import InputError, StorageError

PAIRS = [(f"in {i}", f"out {'x' * (i % 5)}{i}") for i in range(17)]
DEDUP = clean.Options(strip=True, unicode="NFC", min_chars=0, max_chars=0, max_ratio=0.0, dedup=True)


def test_contents(make_store, byt5):
  s = make_store(PAIRS)
  assert len(s) == 17 and s.lengths["inputs"].dtype == np.int32
  for i, (a, b) in enumerate(PAIRS):
    assert s.texts(i) == (a, b) and s.where(i).endswith(
      f"in.txt + {s.where(i).split(' + ')[1].split(',')[0]}, line {i + 1}"
    )
    for name, text in zip(("inputs", "targets"), (a, b)):
      assert s.tokens(name, i).tolist() == byt5.encode([text])[0] and s.lengths[name][i] == len(text.encode()) + 1
  assert (
    s.gather("targets", np.array([3, 1])).tolist() == s.tokens("targets", 3).tolist() + s.tokens("targets", 1).tolist()
  )
  assert (
    s.report["rows_read"] == s.report["rows_kept"] == 17 and s.report["eos_last"] == 1 and s.report["dropped"] == {}
  )
  assert s.meta["dtype"] == "uint16" and s.report["largest"] == ord("x") + 3


def test_the_order_of_parallel_files_is_the_direction(make_store, tmp_path):
  (tmp_path / "x.en").write_text("one\n")
  (tmp_path / "x.de").write_text("eins\n")
  en, de = str(tmp_path / "x.en"), str(tmp_path / "x.de")
  assert make_store(source=dict(en=en, de=de)).texts(0) == ("one", "eins")
  assert make_store(source=dict(de=de, en=en)).texts(0) == ("eins", "one")


def test_rows_of_other_columns_keep_their_fields(make_store, tmp_path):
  rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "input": "x", "output": "o"}] * 2
  (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  s = make_store(source=str(tmp_path / "x.jsonl"))
  assert [s.texts(i)[0] for i in range(4)] == ["i", "i\n\nx"] * 2
  assert [t["input"] for t in s.report["tasks"]] == ["{instruction}", ["{instruction}", "{input}"]]


def test_binary_columns_are_text_or_an_error(make_store, tmp_path):
  path = str(tmp_path / "x.parquet")
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": "ä".encode(), "b": [b"x", b"y"]}]), path)
  assert make_store(source=path, task=tasks.Task("seq2seq", "{a}", "{b.*}")).texts(0) == ("ä", "x y")
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": b"x", "b": b"y"}, {"a": b"\xe9", "b": b"y"}]), path)
  with pytest.raises(InputError, match="x.parquet, row 2: task.input names the field {a}.*not UTF-8"):
    make_store(source=path)


def test_half_a_character_is_dropped_with_its_row(make_store, tmp_path):
  lines = [
    '{"input": "a", "target": "b"}',
    r'{"input": "\ud83d", "target": "b"}',
    r'{"input": "c", "target": "\udead"}',
    r'{"input": "\ud83d\ude00", "target": "d", "other": "\ud83d"}',
  ]
  (tmp_path / "x.jsonl").write_text("\n".join(lines))
  s = make_store(source=str(tmp_path / "x.jsonl"))
  assert [s.texts(i)[0] for i in range(len(s))] == ["a", "\U0001f600"]
  drop = s.report["dropped"][clean.SURROGATE]
  assert drop["count"] == 2 and [r.rsplit(" ", 1)[1] for r in drop["rows"]] == ["2", "3"]


@pytest.mark.parametrize("given", [dict(limit=-1), dict(workers=-1)])
def test_counts_below_zero(make_store, given):
  with pytest.raises(InputError, match=f"config: data.{next(iter(given))}.* is -1"):
    make_store(PAIRS, **given)


def test_machines_without_affinity(make_store, monkeypatch):
  monkeypatch.delattr(os, "sched_getaffinity")  # macOS
  assert len(make_store(PAIRS, workers=0)) == 17
  monkeypatch.setattr(os, "cpu_count", lambda: None)
  assert crew.cores() == 1


def test_paths_and_other_things_as_sources(make_store, tmp_path):
  (tmp_path / "x.csv").write_text("input,target\n1,2\n")
  assert len(make_store(source=tmp_path / "x.csv")) == 1
  with pytest.raises(InputError, match="7 is not a source"):
    make_store(source=7)


def test_large_vocabulary_is_int32(make_store, byt5, monkeypatch):
  monkeypatch.setattr(byt5, "size", 65537)
  assert make_store(PAIRS).meta["dtype"] == "int32"


def test_second_opening_reads_the_cache(make_store, monkeypatch):
  first = make_store(PAIRS)
  monkeypatch.setattr(cache, "build", None)
  assert make_store(PAIRS).folder == first.folder
  assert make_store(PAIRS, lengths=dict(inputs=33, targets=22), too_long="truncate").folder == first.folder


def test_every_part_of_the_fingerprint_counts(make_store, unigram, monkeypatch):
  other = PAIRS[:-1] + [("in 16", "changed")]
  folders = [
    make_store(PAIRS),
    make_store(other),
    make_store(PAIRS, tokenizer=unigram, too_long="truncate"),
    make_store(PAIRS, task=tasks.Task("seq2seq", "x {a}", "{b}")),
    make_store(PAIRS, task=tasks.Task("seq2seq", "{a}", "x {b}")),
    make_store(PAIRS, clean=DEDUP),
    make_store(PAIRS, limit=5),
  ]
  monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
  folders.append(make_store(PAIRS))
  assert len({s.folder for s in folders}) == len(folders)


def test_processes_build_the_same(make_store, tmp_path, monkeypatch):
  monkeypatch.setattr(build, "CHUNK_ROWS", 7)
  monkeypatch.setattr(build, "SMALL", 10)
  pairs = [(f"in {i % 90}", f"out {i % 90}" if i % 11 else "") for i in range(200)]
  stores = [make_store(pairs, clean=DEDUP, root=str(tmp_path / str(n)), workers=n) for n in (1, 3)]
  one, three = ({f.name: f.read_bytes() for f in s.folder.iterdir() if f.name != "meta.json"} for s in stores)
  assert one == three
  metas = [{**s.meta, "seconds": 0} for s in stores]
  assert metas[0] == metas[1] and metas[0]["kept"] == 90 and metas[0]["drops"]["empty target"]["count"] == 19
  assert metas[0]["drops"][clean.DUPLICATE]["count"] == 200 - 19 - 90


def test_error_in_a_worker_process_arrives(make_store, tmp_path, monkeypatch):
  monkeypatch.setattr(build, "CHUNK_ROWS", 5)
  monkeypatch.setattr(build, "SMALL", 10)
  path = tmp_path / "x.jsonl"
  path.write_text("".join(json.dumps({"a": "1", "b" if i != 33 else "c": "2"}) + "\n" for i in range(60)))
  with pytest.raises(InputError, match="x.jsonl, line 34.*{b}"):
    make_store(source=str(path), task=tasks.Task("seq2seq", "{a}", "{b}"), workers=2)
  assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_drops_are_counted_with_their_rows(make_store):
  s = make_store([("a", "b"), ("", "x"), ("c", " "), ("a", "b"), ("c", "d"), (" a", "b")], clean=DEDUP)
  assert [s.texts(i) for i in range(len(s))] == [("a", "b"), ("c", "d")]
  lines = {k: [r.rsplit(" ", 1)[1] for r in v["rows"]] for k, v in s.report["dropped"].items()}
  assert lines == {"empty input": ["2"], "empty target": ["3"], clean.DUPLICATE: ["4", "6"]}
  with pytest.raises(InputError, match="all 2 rows.*empty target: 2"):
    make_store([("a", ""), ("b", "")])


def test_repeats_of_a_mixture(make_store, tmp_path):
  for name, n in (("a", 4), ("b", 2)):
    (tmp_path / f"{name}.jsonl").write_text(
      "".join(json.dumps({"input": f"{name}{i}", "target": "t"}) + "\n" for i in range(n))
    )
  s = make_store(source=[(str(tmp_path / "a.jsonl"), 0.5), (str(tmp_path / "b.jsonl"), 2)], clean=DEDUP)
  assert [s.texts(i)[0] for i in range(len(s))] == ["a1", "a3", "b0", "b0", "b1", "b1"] and s.where(5).endswith(
    "b.jsonl, line 2"
  )
  assert s.report["examples"] == 6 and [o["examples"] for o in s.report["origins"]] == [2, 4]


def test_a_dropped_duplicate_takes_its_own_repeat_along(make_store, tmp_path):
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input": x, "target": "t"}) + "\n" for x in "xxyz"))
  s = make_store(source=[(str(tmp_path / "a.jsonl"), 1.5)], clean=DEDUP)  # repeats 1, 2, 1, 2
  assert [s.texts(i)[0] for i in range(len(s))] == ["x", "y", "z", "z"]


LONG = [("short", "t")] * 8 + [("i" * 60, "short"), ("short", "t" * 99 + "é")]


def test_too_long_error(make_store):
  with pytest.raises(InputError) as e:
    make_store(LONG, too_long_share=0.19)
  says = (
    "2 of 10 examples (20.0%)",
    "inputs 41, targets 29",
    "too_long_share=0.19",
    "out.txt, line 9; line 10.",
    "50/90/99/100th percentile: inputs 6/61/61/61",
    "lengths.inputs=64",
    "lengths.targets=104",
    "too_long=truncate",
    "too_long=drop",
  )
  assert all(x in str(e.value) for x in says), str(e.value)
  assert f"{73 / (8 * 2 + 6 + 102):.1%} of the target tokens" in str(e.value)
  assert len(make_store(LONG, too_long_share=0.2)) == 10


def test_too_long_truncate_keeps_eos(make_store):
  s = make_store(LONG, too_long="truncate")
  assert s.lengths["inputs"].max() == 41 and s.lengths["targets"].max() == 29
  assert s.tokens("targets", 9).tolist() == [ord("t") + 3] * 28 + [1] and s.tokens("inputs", 8).tolist() == [
    ord("i") + 3
  ] * 40 + [1]
  both = s.gather("targets", np.array([9, 8, 9]))
  assert both[28] == 1 and both[29:35].tolist() == s.tokens("targets", 8).tolist() and both[-1] == 1 and both[-2] != 1
  assert (
    s.report["cut"]["targets"] == dict(count=1, share=0.1, rows=[s.where(9)])
    and s.report["tokens_lost"]["targets"] == 73 / 124
  )
  assert s.texts(9)[1] == "t" * 99 + "é"


def test_too_long_drop(make_store):
  s = make_store(LONG, too_long="drop")
  assert len(s) == 8 and s.report["dropped"]["longer than data.lengths (inputs 41, targets 29)"]["count"] == 2
  with pytest.raises(InputError, match="all 1 examples"):
    make_store(LONG[8:9], too_long="drop")


def test_too_long_counts_rows_and_not_their_repeats(make_store, tmp_path):
  rows = [{"input": x, "target": "t"} for x in ("i" * 60, "a", "b")]
  (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  source = [(str(tmp_path / "x.jsonl"), 3)]
  s = make_store(source=source, too_long="drop")
  drop = s.report["dropped"]["longer than data.lengths (inputs 41, targets 29)"]
  assert drop["count"] == len(drop["rows"]) == 1 and s.report["examples"] == 6
  assert "3 rows read, 2 kept" in report.notice(s.report)
  cut = make_store(source=source, too_long="truncate").report["cut"]["inputs"]
  assert cut["count"] == 3 and len(cut["rows"]) == 1


@pytest.mark.parametrize(
  "given", [dict(too_long="cut"), dict(lengths=dict(inputs=8)), dict(lengths=dict(inputs=1, targets=9))]
)
def test_bad_policies(make_store, given):
  with pytest.raises(InputError, match="config: data"):
    make_store(PAIRS, **given)


def test_damaged_cache_is_built_again(make_store, caplog):
  folder = make_store(PAIRS).folder
  with open(folder / "targets.values", "r+b") as f:
    f.truncate(10)
  s = make_store(PAIRS)
  assert s.texts(16) == PAIRS[16] and len(s.tokens("targets", 16)) == len(PAIRS[16][1]) + 1 and "damaged" in caplog.text
  (folder / "meta.json").write_text("{")
  assert len(make_store(PAIRS)) == 17


def test_left_overs_of_killed_builders_go(make_store):
  folder = make_store(PAIRS).folder
  for name, age in (("old", 7200), ("young", 60)):
    left = folder.parent / f".{folder.name}-1-{name}"
    left.mkdir()
    (left / "lines").write_bytes(b"1")
    for path in (left / "lines", left):
      os.utime(path, (path.stat().st_mtime - age,) * 2)
  (folder / "meta.json").unlink()
  make_store(PAIRS)
  assert sorted(p.name[-5:] for p in folder.parent.glob(".*")) == ["young"]


RACE = """
import sys, time
from jaxft.data import cache, clean, tasks, encoders
class Bytes:
  name, size, pad, bos, eos, sep, fingerprint = "b", 256, 0, None, 1, None, "f"
  encoder = type("E", (), dict(encode=staticmethod(lambda texts: (time.sleep(0.01), [[*t.encode(), 1] for t in
  texts])[1])))()
  target_encoder, last = encoder, {1}
s = cache.open_or_build(sys.argv[1], tokenizer=Bytes(), task=tasks.Task("seq2seq", "{a}", "{b}"),
clean=clean.NOTHING, lengths=dict(inputs=9, targets=9), too_long="error",
                        too_long_share=0.0, limit=0, root=sys.argv[2], workers=1)
print(len(s), s.texts(2999))
"""


def test_two_processes_build_at_once(tmp_path):
  (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{i},{i}\n" for i in range(3000)))
  command = [sys.executable, "-c", RACE, str(tmp_path / "x.csv"), str(tmp_path / "cache")]
  env = dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).parents[2]), JAX_PLATFORMS="cpu")
  both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) for _ in range(2)]
  assert [p.communicate()[0].strip() for p in both] == ["3000 ('2999', '2999')"] * 2
  assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_storage_errors(make_store, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match="data.cache"):
    make_store(PAIRS, root=str(tmp_path / "file" / "cache"))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  pairs = [("a" * 3000, f"{i}") for i in range(900)]
  make_store(PAIRS)  # the files of the source are written before the limit holds
  source = [tmp_path / "in.txt", tmp_path / "out.txt"]
  for path, side in zip(source, zip(*pairs)):
    path.write_text("".join(x + "\n" for x in side))
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(StorageError, match="cannot be written.*data.cache"):
      make_store(source=dict(a=str(source[0]), b=str(source[1])), root=str(tmp_path / "full"), too_long="truncate")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p for p in (tmp_path / "full").iterdir() if p.is_dir()] == []


def test_cache_root(monkeypatch):
  monkeypatch.setenv("JAXFT_CACHE", "/x")
  assert str(cache.cache_root("")) == "/x" and str(cache.cache_root("/y")) == "/y"
  monkeypatch.delenv("JAXFT_CACHE")
  assert str(cache.cache_root("")).endswith(".cache/jaxft")
