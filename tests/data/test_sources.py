"""Every kind of source gives the same rows, and every way in which one can be broken is named with its place.

Catches: a reader that swallows a bad line, counts lines from 0, loses the last line or a BOM, splits at U+2028;
parallel files cut to the shorter; weights taken as probabilities; fingerprints by name or time instead of content, or
without the order of the columns; a split that is not looked at; another library's error that ends in a traceback.
"""

import gzip
import json
import os
import pathlib
import time

import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data import sources
from jaxft.errors import InputError

ROWS = [{"a": "eins\u2028eins", "b": "one"}, {"a": "zwei", "b": 'two, "2"'}, {"a": "drei", "b": "three"}]


def write(folder, name, data):
  path = folder / name
  data = data.encode() if isinstance(data, str) else data
  path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  return str(path)


def rows(source, limit=0):
  return [dict(r) for r in sources.read(source, limit)]


LINES = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)
CSV = 'a,b\neins\u2028eins,one\nzwei,"two, ""2"""\ndrei,three\n'


@pytest.mark.parametrize(
  "name,data",
  [
    ("x.jsonl", LINES),
    ("x.jsonl", "\ufeff" + LINES + "\n\n"),
    ("x.json", json.dumps(ROWS, indent=2)),
    ("x.json", LINES),
    ("x.json", json.dumps({"data": ROWS, "version": 1}, indent=1)),
    ("x.json", json.dumps({"data": ROWS, "version": 1}) + "\n\n"),
    ("x.csv", CSV),
    ("x.csv", CSV.replace("\n", "\r\n")),
    ("x.tsv", 'a\tb\neins\u2028eins\tone\nzwei\ttwo, "2"\ndrei\tthree\n'),
  ],
)
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_text_formats(tmp_path, name, data, gz):
  assert rows(write(tmp_path, name + gz, data)) == ROWS


def test_parquet_txt_and_glob(tmp_path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
  assert rows(str(tmp_path / "x.parquet")) == ROWS
  write(tmp_path, "2.txt", "c")
  write(tmp_path, "1.txt", "a\n\nb\n")
  got = list(sources.read(str(tmp_path / "*.txt")))
  assert [(r["text"], r.line) for r in got] == [("a", 1), ("", 2), ("b", 3), ("c", 1)]
  assert got[3].where == f"{tmp_path}/2.txt, line 1"
  assert len(rows(str(tmp_path / "*.txt"), limit=2)) == 2


def test_csv_line_numbers_count_newlines_in_quotes(tmp_path):
  path = write(tmp_path, "x.csv", 'a,b\n"1\n1",2\n3,4\n')
  assert [(dict(r), r.line) for r in sources.read(path)] == [({"a": "1\n1", "b": "2"}, 2), ({"a": "3", "b": "4"}, 4)]


@pytest.mark.parametrize(
  "name,data,says",
  [
    ("x.jsonl", '{"a": 1}\n{"a": \n', ("x.jsonl, line 2", "not JSON")),
    ("x.jsonl", "[1]\n", ("x.jsonl, item 1", "object")),
    ("x.jsonl", '{"a": 1}\n3\n', ("line 2", "object")),
    ("x.json", '[{"a": 1},\n {"a" 2}]', ("x.json", "line 2")),
    ("x.json", '{\n"a": [], "b": []}', ("2 lists",)),
    ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', ("line 2", "not UTF-8", "iconv")),
    ("x.csv", "a,b\n1,2\n3\n", ("line 3", "1 fields where the header has 2")),
    ("x.csv", 'a,b\n1,"2\n3,4\n', ("line 2", "quote")),
    ("x.csv", "a,a\n1,2\n", ("line 1", "twice")),
    ("x.tsv", "a\tb\n1\t2\t3\n", ("line 2", "3 fields")),
    ("x.tsv", "a\tb\n1\r2\t3\n", ("line 2", "carriage return", "by a space")),
    ("x.csv", "a,b\n1\r2,3\n", ("line 2", "carriage return", "in quotes")),
    ("x.txt", "\ufeffä\n".encode("utf-16-le"), ("line 1", "iconv -f utf-16")),
    ("x.json", '{"data": []}', ("no rows",)),
    ("x.json", '{"a": [{}], "messages": []}\n3\n', ("line 2", "object")),
    ("x.parquet", b"no parquet", ("x.parquet", "not a readable")),
    ("x.jsonl", "", ("no rows",)),
    ("x.csv", "a,b\n", ("no rows",)),
    ("x.jsnl", "", ("ending", "did you mean 'jsonl'")),
  ],
)
def test_broken_files(tmp_path, name, data, says):
  path = write(tmp_path, name, data)
  with pytest.raises(InputError) as e:
    rows(path)
  assert all(s in str(e.value) for s in says), str(e.value)


@pytest.mark.parametrize("row", [{"messages": [{"role": "user"}]}, {"q": "?", "a": ["x"]}, {"a": [{}], "b": [{}]}])
def test_one_line_of_json_that_is_a_row(tmp_path, row):
  assert rows(write(tmp_path, "x.json", json.dumps(row))) == [row]
  assert rows(write(tmp_path, "x.jsonl", json.dumps({"data": [row]}))) == [{"data": [row]}]


def test_paths_are_sources(tmp_path):
  path = pathlib.Path(write(tmp_path, "x.txt", "a\nb\n"))
  assert rows(path) == rows(str(path)) and sources.fingerprint(path) == sources.fingerprint(str(path))
  assert sources.local_files(path) == [str(path)] and sources.describe(path) == str(path)
  assert len(rows(dict(en=path, de=path))) == 2 and len(rows([(path, 2), path])) == 4
  for wrong in (7, dict(en=7), [(7, 2)]):
    for use in (rows, sources.fingerprint, sources.local_files):
      with pytest.raises(InputError, match="7 is not a"):
        use(wrong)


def test_broken_gzip(tmp_path):
  path = write(tmp_path, "x.txt.gz", "a\nb\n" * 5000)
  data = open(path, "rb").read()
  for bad in (data[:-20], b"plain text"):
    open(path, "wb").write(bad)
    with pytest.raises(InputError, match="broken gzip"):
      rows(path)


def test_missing_file_says_what_is_there(tmp_path, monkeypatch):
  write(tmp_path, "train.jsonl", LINES)
  with pytest.raises(InputError, match=r"did you mean 'train.jsonl'"):
    rows(str(tmp_path / "trian.jsonl"))
  with pytest.raises(InputError, match=r"the folder .* has train.jsonl"):
    rows(str(tmp_path / "gone" / "further" / "x.jsonl"))
  with pytest.raises(InputError, match="is a folder; it has train.jsonl"):
    rows(str(tmp_path))
  with pytest.raises(InputError, match=f"write hub:{tmp_path} for"):
    rows(str(tmp_path))
  monkeypatch.chdir(tmp_path.parent)
  with pytest.raises(InputError, match=f"write hub:./{tmp_path.name} for"):
    rows(tmp_path.name)
  with pytest.raises(InputError, match="remote"):
    rows("gs://bucket/x.jsonl")
  for nothing in ("", [], 7):
    with pytest.raises(InputError):
      rows(nothing)


def test_parallel_files(tmp_path):
  a, b = write(tmp_path, "t.en.gz", "1\n\n3"), write(tmp_path, "t.de", "eins\nzwei\ndrei\n")
  assert rows(dict(en=a, de=b)) == [{"en": "1", "de": "eins"}, {"en": "", "de": "zwei"}, {"en": "3", "de": "drei"}]
  write(tmp_path, "t.de", "eins\nzwei\ndrei\nvier\nfünf")
  with pytest.raises(InputError, match=r"t.en.gz has 3 lines.*t.de has 5 lines"):
    rows(dict(en=a, de=b))
  assert len(rows(dict(en=a, de=b), limit=3)) == 3  # the docs: the ends are not reached, and not compared


def test_parallel_columns_in_another_order_are_other_data(tmp_path):
  a, b = write(tmp_path, "t.en", "1\n"), write(tmp_path, "t.de", "eins\n")
  one, two = dict(en=a, de=b), dict(de=b, en=a)
  assert json.dumps(sources.fingerprint(one), sort_keys=True) != json.dumps(sources.fingerprint(two), sort_keys=True)


def test_mixture_weights_count_rows(tmp_path):
  a, b = write(tmp_path, "a.txt", "".join(f"a{i}\n" for i in range(10))), write(tmp_path, "b.txt", "b0\nb1\nb2\nb3")
  got = [(r["text"], r.repeat) for r in sources.read([(a, 0.3), (b, 2.5)])]
  assert got == [("a3", 1), ("a6", 1), ("a9", 1), ("b0", 2), ("b1", 3), ("b2", 2), ("b3", 3)]
  nested = [(r["text"], r.repeat) for r in sources.read([([(b, 2), a], 3)])]
  assert nested[0] == ("b0", 6) and nested[-1] == ("a9", 3)
  with pytest.raises(InputError, match="weight"):
    rows([(a, 0)])
  c = write(tmp_path, "c.txt", "c\n" * 7)
  with pytest.raises(InputError, match=r"the weight 0.1 takes none of the 7 rows of .*c.txt; 0.142858 is the least"):
    rows([(a, 1), (c, 0.1)])
  with pytest.raises(InputError, match="0.142858"):
    rows([(c, 1e-9)])
  assert len(rows([(c, 0.142858)])) == 1


def test_hub_folder(tmp_path):
  datasets = pytest.importorskip("datasets")
  d = datasets.Dataset.from_list(ROWS)
  d.save_to_disk(str(tmp_path / "one"))
  datasets.DatasetDict(train=d, validation=d.select([1])).save_to_disk(str(tmp_path / "two"))
  assert rows(f"hub:{tmp_path}/one") == ROWS and rows(f"hub:{tmp_path}/two:validation") == ROWS[1:2]
  with pytest.raises(InputError, match=r"no split 'valid'.*train, validation.*did you mean 'validation'"):
    rows(f"hub:{tmp_path}/two:valid")
  write(tmp_path, "plain.jsonl", LINES)
  (tmp_path / "three").mkdir()
  os.rename(tmp_path / "plain.jsonl", tmp_path / "three" / "train.jsonl")
  assert rows(f"hub:{tmp_path}/three:train[:2]") == ROWS[:2]
  assert sources.fingerprint(f"hub:{tmp_path}/two:train") != sources.fingerprint(f"hub:{tmp_path}/two:validation")
  with pytest.raises(InputError, match="no folder"):
    rows(f"hub:{tmp_path}/four")


def test_splits_of_saved_hub_folders(tmp_path):
  datasets = pytest.importorskip("datasets")
  d = datasets.Dataset.from_list(ROWS)
  d.save_to_disk(str(tmp_path / "nameless"))
  datasets.Dataset.from_list(ROWS, split="test").save_to_disk(str(tmp_path / "test"))
  datasets.DatasetDict(train=d, validation=d.select([1])).save_to_disk(str(tmp_path / "both"))
  for name, expected in {
    "nameless": ROWS,
    "nameless:train": ROWS,
    "nameless:train[1:]": ROWS[1:],
    "test": ROWS,
    "test:test[:34%]": ROWS[:1],
    "both": ROWS,
    "both:train[-1:]": ROWS[2:],
    "both:validation+train[:2]": [ROWS[1], *ROWS[:2]],
  }.items():
    assert rows(f"hub:{tmp_path}/{name}") == expected, name
  for name, says in {
    "nameless:test": "no split 'test'; it has train",
    "test:train[:1]": "no split 'train'; it has test",
    "both:train+valid": "no split 'valid'.*did you mean 'validation'",
    "both:train[:x]": "could not be loaded.*train\\[:x\\]",
    "both:train[1:1]": "no rows",
  }.items():
    with pytest.raises(InputError, match=says):
      rows(f"hub:{tmp_path}/{name}")
  fingerprints = [sources.fingerprint(f"hub:{tmp_path}/both:{s}") for s in ("train", "train[:1]", "train[:2]", "train")]
  assert fingerprints[0] == fingerprints[3] and len(set(map(str, fingerprints))) == 3


def test_errors_of_datasets_are_input_errors(tmp_path):
  pytest.importorskip("datasets")
  (tmp_path / "bad").mkdir()
  write(tmp_path / "bad", "train.jsonl", '{"a": 1}\n{"a":\n')
  with pytest.raises(InputError, match="could not be loaded: DatasetGenerationError.*JSON parse error"):
    rows(f"hub:{tmp_path}/bad")
  (tmp_path / "script").mkdir()
  write(tmp_path / "script", "script.py", "raise SystemExit")
  with pytest.raises(InputError, match="RuntimeError: Dataset scripts are no longer supported"):
    rows(f"hub:{tmp_path}/script")


def test_tfds(tmp_path, monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

  class JaxftTinyPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path, code_path = tfds.core.Path(tmp_path), None  # else it looks for the package of this file

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {"a": tfds.features.Text(), "n": tfds.features.Sequence(tfds.features.Text())}
        )
      )

    def _split_generators(self, manager):
      pairs = [(i, {"a": r["a"], "n": [r["b"], "ü"]}) for i, r in enumerate(ROWS)]
      return {"train": iter(pairs), "dev": iter([(0, {"a": b"\xff", "n": []})])}

    def _generate_examples(self):
      return iter(())

  got = rows("tfds:jaxft_tiny_pairs:train")
  assert sorted(r["a"] for r in got) == sorted(r["a"] for r in ROWS) and got[0]["n"][1] == "ü"
  assert len(rows("tfds:jaxft_tiny_pairs:1.0.0")) == 3
  assert len(rows("tfds:jaxft_tiny_pairs:train[:2]+dev")) == 3
  assert rows("tfds:jaxft_tiny_pairs:dev") == [{"a": b"\xff", "n": []}]  # no U+FFFD: an error where it is rendered
  for split in ("test", "train[", "train[:x]", "train+test", "train[:900]"):
    with pytest.raises(InputError) as e:
      rows(f"tfds:jaxft_tiny_pairs:{split}")
    assert f"no split {split!r}: " in str(e.value) and "It has train, dev" in str(e.value)
  with pytest.raises(InputError, match="could not be found"):
    rows("tfds:jaxft_no_such_thing")


def test_builtin():
  name = "builtin:cldr-en-fr"
  assert len(rows(name, limit=5)) == 5 and rows(name + ":test", limit=3) == rows(name + "/test", limit=3)
  assert sources.fingerprint(name + ":test") != sources.fingerprint(name)


@pytest.mark.parametrize(
  "text,parsed",
  [
    ("hub:squad", ("hub", "squad", "", "train")),
    ("hub:a/b/c:test[:5%]", ("hub", "a/b", "c", "test[:5%]")),
    ("hub:./x/y:dev", ("hub", "./x/y", "", "dev")),
    ("tfds:wmt16_translate/de-en:1.0.0:test", ("tfds", "wmt16_translate/de-en:1.0.0", "", "test")),
    ("tfds:x/y", ("tfds", "x/y", "", "train")),
    ("builtin:n:test", ("builtin", "n", "", "test")),
  ],
)
def test_names(text, parsed):
  assert sources.parse_name(text) == parsed


def test_torn_lines_of_the_hash_memory_are_skipped(tmp_path):
  path, memory = write(tmp_path, "x.jsonl", "abc"), tmp_path / "hashes.jsonl"
  os.utime(path, (time.time() - 100,) * 2)
  first = sources.fingerprint(path, memory)
  whole = memory.read_bytes()
  for torn in (whole[:20] + whole, b'["a", "h["b", "h2"]\n[1]\n[[], 2]\n"x"\n\xff\n' + whole):
    memory.write_bytes(torn)
    assert sources.fingerprint(path, memory) == first


def test_fingerprint_follows_content(tmp_path):
  path, memory = write(tmp_path, "x.jsonl", "abc"), tmp_path / "m" / "hashes.jsonl"
  first = sources.fingerprint(path, memory)
  write(tmp_path, "x.jsonl", "abd")  # the same size, perhaps within one tick of the clock
  assert sources.fingerprint(path, memory) != first and not memory.exists()
  write(tmp_path, "x.jsonl", "abc")
  os.utime(path, (time.time() - 100,) * 2)
  assert sources.fingerprint(path, memory) == first and memory.exists()
  os.utime(path, (time.time() - 50,) * 2)
  assert sources.fingerprint(path, memory) == first == sources.fingerprint(path)
  (tmp_path / "other").mkdir()
  assert sources.fingerprint(write(tmp_path / "other", "x.jsonl", "abc"), memory) == first
