"""The formats of local files: JSON lines and lists, CSV, TSV, Parquet, CoNLL, plain and parallel text, each also
gzipped.

Every reader yields `Row`s that know their file and line; what cannot be read is an InputError with that place.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator

from jaxft.data.chat import CHATS
from jaxft.errors import InputError, did_you_mean


class Row(dict):
  """The columns of one example, with `origin` (file or data set, unit), `line` (1 is the first) and `repeat` (times
  an epoch).
  """

  __slots__ = ("origin", "line", "repeat")

  def __init__(self, columns: dict, origin: tuple[str, str], line: int):
    super().__init__(columns)
    self.origin, self.line, self.repeat = origin, line, 1

  @property
  def where(self) -> str:
    return place(self.origin, self.line)


class Meter:
  """Bytes of local files read so far, of `total` (0: not known)."""

  def __init__(self, paths: Iterable[str]):
    self.done, self.base = 0, 0
    self.total = sum(os.path.getsize(p) for p in paths)


def place(origin: tuple[str, str], line: int) -> str:
  """Returns "FILE, line 7" (or row, item: what the file is made of)."""
  return f"{origin[0]}, {origin[1]} {line}"


def compact(places: list[str]) -> str:
  """Returns "x.jsonl, line 3; line 9; y.jsonl, line 1": a file is named where it changes."""
  out, last = [], None
  for text in places:
    file, _, line = text.rpartition(", ")
    out.append(line if file == last else text)
    last = file
  return "; ".join(out)


def like_a_sentence(column: str) -> bool:
  """Says whether the name of a column looks like text of a row: long, or words with the marks of a sentence."""
  return len(column) > 60 or bool(re.search(r"\S\s.*[.!?…]$|[.!?,;] \S.* \S", column.strip()))


def expand(pattern: str | os.PathLike) -> list[str]:
  """Returns the files that a path or glob names, sorted; raises InputError with what lies nearby when there is none."""
  if not isinstance(pattern, (str, os.PathLike)):
    raise InputError(f"data: {pattern!r} is not a file; a path or glob is (docs/data.md).")
  pattern = os.fspath(pattern)
  if re.match(r"[a-z0-9]+://", pattern):
    raise InputError(
      f"data: {pattern} is a remote address; copy it to this machine first (gcloud storage cp, aws s3 cp, curl -O)."
    )
  path = os.path.expanduser(pattern)
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    here = "" if pattern.startswith(("/", ".", "~")) else "./"  # else hub: takes it for a name on the Hub
    raise InputError(
      f"data: {pattern} is a folder; it{_listing(path)}. Name a file or a glob in it, such as "
      f"{pattern.rstrip('/')}/*.jsonl, or write hub:{here}{pattern} for a data set of the `datasets` library."
    )
  found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
  if found:
    return found
  folder = pathlib.Path(path).parent
  while not folder.is_dir():
    folder = folder.parent
  near = did_you_mean(os.path.basename(path), os.listdir(folder))
  raise InputError(f"data: there is no file {pattern}{near}; the folder {folder}{_listing(folder)}.")


def _listing(folder) -> str:
  names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
  return (
    f" has {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else " is empty"
  )


def read_file(path: str, meter) -> Iterator[Row]:
  kind = path.removesuffix(".gz").rsplit(".", 1)[-1].lower()
  if kind not in READERS:
    raise InputError(
      f"data: the ending of {path} is not known; {', '.join(READERS)} are (each may be followed by "
      f".gz){did_you_mean(kind, READERS)}. "
      "Parallel text files of any ending go into a dict: dict(en='train.en', de='train.de')."
    )
  yield from READERS[kind](path, meter)


def _lines(path: str, meter=None) -> Iterator[str]:
  """Yields the decoded lines without their ends; only \\n ends a line (not the separators that `str.splitlines`
  knows).
  """
  with open(path, "rb") as raw:
    stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
    number = 0
    try:
      for number, line in enumerate(stream, 1):
        if number == 1:
          line = line.removeprefix(b"\xef\xbb\xbf")
        if meter and not number % 4096:
          meter.done = meter.base + raw.tell()
        yield line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
      code = "utf-16" if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
      raise InputError(
        f"{path}, line {number}: byte {e.start + 1} of the line is not UTF-8 ({e.reason}). Convert the file, for "
        f"example with: iconv -f {code} -t utf-8 {path} > new."
      ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
      raise InputError(f"{path}: broken gzip after line {number} ({e}). Copy or download the file again.") from None
    if meter:
      meter.base = meter.done = meter.base + os.path.getsize(path)


def _read_json(path: str, meter) -> Iterator[Row]:
  lines = _lines(path, meter)
  first, second = (next((x for x in lines if x.strip()), "").lstrip() for _ in range(2))
  lines.close()
  one = re.search(r"\.json(\.gz)?$", path, re.I) and first and _is_whole(first, last=not second)
  if first.startswith("[") or one:
    yield from _read_json_list(path, meter)
    return
  origin = (path, "line")
  for number, line in enumerate(_lines(path, meter), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as e:
      raise InputError(
        f"{path}, line {number}: not JSON: {e}. The line begins {line[:60]!r}. Mend or remove it."
      ) from None
    yield _object(row, origin, number)


def _is_whole(line: str, last: bool) -> bool:
  """Says whether a first line belongs to one value for the whole file: it goes on, or is a lone object with a list of
  rows.
  """
  try:
    value = json.loads(line)
  except ValueError:
    return True
  lists = _lists(value) if last and isinstance(value, dict) else []
  return len(lists) == 1 and all(isinstance(x, dict) for x in value[lists[0]])


def _lists(value: dict) -> list[str]:
  """Returns the fields that hold a list that may be one of rows."""
  return [k for k, v in value.items() if isinstance(v, list) and k not in CHATS]


def _read_json_list(path: str, meter) -> Iterator[Row]:
  """Reads a file that is one JSON list, or one object that holds one list (`{"data": [...]}`), as a whole."""
  try:
    rows = json.loads("\n".join(_lines(path, meter)))
  except ValueError as e:
    raise InputError(f"{path}: not JSON: {e}. The file should be one list of objects, or one object a line.") from None
  if isinstance(rows, dict):
    lists = _lists(rows)
    if len(lists) != 1:
      raise InputError(
        f"{path}: one JSON object whose fields {', '.join(rows)} hold {len(lists)} lists; a list of rows, or one row "
        "a line, is needed."
      )
    rows = rows[lists[0]]
  for number, row in enumerate(rows, 1):
    yield _object(row, (path, "item"), number)


def _object(row, origin, number) -> Row:
  if not isinstance(row, dict):
    raise InputError(
      f"{place(origin, number)}: a row must be a JSON object with named fields; this is {str(row)[:60]!r}."
    )
  return Row(row, origin, number)


def _read_csv(path: str, meter, **dialect) -> Iterator[Row]:
  csv.field_size_limit(sys.maxsize)
  reader = csv.reader((x + "\n" for x in _lines(path, meter)), strict=True, **dialect)
  origin, header, start = (path, "line"), None, 1
  try:
    for fields in reader:
      if fields and header is None:
        header = fields
        twice = sorted({x for x in header if header.count(x) > 1})
        if twice:
          raise InputError(
            f"{path}, line {start}: the header names {', '.join(map(repr, twice))} twice. Is there a header line at "
            "all?"
          )
      elif fields:
        if len(fields) != len(header):
          raise InputError(
            f"{path}, line {start}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}). "
            + (
              "Quote the fields that hold commas."
              if not dialect
              else "A tab inside a field? Quotes do not protect it in a tsv file."
            )
          )
        yield Row(zip(header, fields), origin, start)
      start = reader.line_num + 1
  except csv.Error as e:
    if "new-line" in str(e):
      why = "a carriage return stands inside it, and a line ends with \\n or \\r\\n. Replace it"
      why += ", for example by a space." if dialect else ", or put the field in quotes."
    else:
      why = f"{e}. A quote inside a quoted field must be doubled; check where the quotes of this row end."
    raise InputError(f"{path}, line {start}: {why}") from None


def _read_tsv(path: str, meter) -> Iterator[Row]:
  return _read_csv(path, meter, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_txt(path: str, meter) -> Iterator[Row]:
  for number, line in enumerate(_lines(path, meter), 1):
    yield Row({"text": line}, (path, "line"), number)


def _read_parquet(path: str, meter) -> Iterator[Row]:
  import pyarrow.parquet as pq

  try:
    source = gzip.open(path).read() if path.endswith(".gz") else None
    file = pq.ParquetFile(io.BytesIO(source) if source is not None else path)
    number = 0
    for batch in file.iter_batches(4096):
      for row in batch.to_pylist():
        number += 1
        yield Row(row, (path, "row"), number)
  except (ValueError, OSError, EOFError) as e:  # ArrowInvalid is a ValueError
    raise InputError(f"{path}: not a readable parquet file: {e}. Copy or download the file again.") from None


def _read_conll(path: str, meter) -> Iterator[Row]:
  """Reads a word a line, its tag in the last column (tabs, or spaces where the file has none), a blank line after each
  sentence.

  Rows have `tokens`, `tags`, and `column_2` and so on for what stands between. Lines of -DOCSTART- are left out.
  """
  words, begin, gap = [], 0, None
  for number, line in enumerate(itertools.chain(_lines(path, meter), [""]), 1):
    if not line.strip():
      if words:
        yield _sentence(words, (path, "line"), begin)
      words = []
      continue
    gap = gap or ("\t" if "\t" in line else " ")
    columns = line.split("\t") if gap == "\t" else line.split()
    if columns[0] == "-DOCSTART-":
      continue
    expected = len(words[0]) if words else max(2, len(columns))
    if len(columns) != expected:
      raise InputError(
        f"{path}, line {number}: {len(columns)} columns ({line[:60]!r}), where {expected} "
        f"{'belong to this sentence' if words else 'are the least'}: the word first, its tag last, with "
        f"{'tabs' if gap == chr(9) else 'spaces'} between. A blank line ends a sentence."
      )
    begin = begin if words else number
    words.append(columns)


def _sentence(words: list[list[str]], origin: tuple[str, str], line: int) -> Row:
  tokens, *between, tags = map(list, zip(*words))
  return Row({"tokens": tokens, "tags": tags, **{f"column_{n}": x for n, x in enumerate(between, 2)}}, origin, line)


READERS = dict(
  jsonl=_read_json,
  ndjson=_read_json,
  json=_read_json,
  csv=_read_csv,
  tsv=_read_tsv,
  parquet=_read_parquet,
  txt=_read_txt,
  conll=_read_conll,
  iob=_read_conll,
  bio=_read_conll,
)


def read_parallel(files: dict[str, str], meter) -> Iterator[Row]:
  """Zips text files line by line; files of different lengths are an error that says how long each is."""
  paths = {}
  for name, pattern in files.items():
    found = expand(pattern)
    if len(found) > 1:
      raise InputError(f"data: {pattern} names {len(found)} files; a column of parallel text ({name!r}) is one file.")
    paths[name] = found[0]
  counts, missing = dict.fromkeys(paths, 0), object()
  origin = (" + ".join(paths.values()), "line")
  for number, texts in enumerate(
    itertools.zip_longest(*(_lines(p, meter) for p in paths.values()), fillvalue=missing), 1
  ):
    for name, text in zip(paths, texts):
      counts[name] += text is not missing
    if missing not in texts:
      yield Row(zip(paths, texts), origin, number)
  if len(set(counts.values())) > 1:
    raise InputError(
      "data: the parallel files differ in length, so their lines do not belong together: "
      + ", ".join(f"{paths[n]} has {c:,} lines" for n, c in counts.items())
      + ". Nothing was trained on them."
    )


def fingerprint_files(paths: Iterable[str], memory: pathlib.Path | None) -> list[str]:
  """Returns the BLAKE2 hash of each file's content."""
  known = _load_memory(memory)
  out, fresh = [], {}
  for path in paths:
    stat = os.stat(path)
    key = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    if key not in known:
      with open(path, "rb") as f:
        known[key] = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
      # a younger file may change again within one tick of its mtime
      if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
        fresh[key] = known[key]
    out.append(known[key])
  if memory and fresh:
    memory.parent.mkdir(parents=True, exist_ok=True)
    with open(memory, "a") as f:
      f.writelines(json.dumps([k, v]) + "\n" for k, v in fresh.items())
  return out


def _load_memory(memory: pathlib.Path | None) -> dict[str, str]:
  if memory is None or not memory.exists():
    return {}
  known = {}
  for line in memory.read_text(errors="replace").splitlines():
    with contextlib.suppress(ValueError, TypeError):  # torn by a kill, or by two writers: that file is hashed again
      key, known_hash = json.loads(line)
      known[key] = known_hash
  return known
