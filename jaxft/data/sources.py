"""Where rows come from: files, the Hub's data sets, TFDS, what is built in, and mixtures of these.

`read` gives rows one by one, in a fixed order, each knowing the file and the line it came from, so that every later
error and every dropped row can be looked up. `fingerprint` names the same content whatever folder it lies in.
"""

import importlib.metadata
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from jaxft.data import builtin
from jaxft.data.files import Meter, Row, expand, fingerprint_files, read_file, read_parallel
from jaxft.errors import InputError, did_you_mean

NAMED = ("hub", "tfds", "builtin")


def read(source, limit: int = 0, meter: Meter | None = None) -> Iterator[Row]:
  """Yields the rows of `source` (the first `limit` of each in a list, 0: all) in their order; raises InputError
  when there is none.

  A list of (source, weight) is read one after the other: a row of a source with weight 1 comes once an epoch, with
  weight 3 three times, and with weight 0.25 every fourth row of it comes at all (the 4th, 8th, ...); 2.5 is twice, and
  every second row a third time.
  """
  source = checked(source)
  if is_mixture(source):
    yield from _read_mixture(source, limit, meter)
    return
  rows, count = _read(source, meter), 0
  for row in itertools.islice(rows, limit) if limit else rows:
    count += 1
    yield row
  if not count:
    raise InputError(f"data: {describe(source)} has no rows. Is it the right file, or the right split of the data set?")


def unfold(rows: Iterator[Row], expand: Callable[[dict, str], Iterator[tuple[dict, str]]] | None) -> Iterator[Row]:
  """Yields the rows that `expand(row, where)` makes of each, as fields.Objective has it; None: the rows themselves."""
  if expand is None:
    yield from rows
    return
  for row in rows:
    for columns, _ in expand(row, row.where):
      one = Row(columns, row.origin, row.line)
      one.repeat = row.repeat
      yield one


def checked(source) -> Any:
  """Returns the source, a `pathlib.Path` as text; raises InputError for what is none."""
  if not isinstance(source, os.PathLike) and not source:
    raise InputError(
      "data: no source is given; set data.train to a file, hub:..., tfds:..., builtin:... (docs/data.md)."
    )
  if not (isinstance(source, (str, os.PathLike)) or is_mixture(source) or hasattr(source, "items")):
    raise InputError(
      f"data: {source!r} is not a source; a path, a name such as hub:NAME, a dict of files or a list is (docs/data.md)."
    )
  return os.fspath(source) if isinstance(source, os.PathLike) else source


def describe(source) -> str:
  """Returns the source in the words of the config."""
  if is_mixture(source):
    return "[" + ", ".join(f"({describe(s)}, {float(w):g})" for s, w in parts(source)) + "]"
  return ", ".join(f"{k}={v}" for k, v in source.items()) if hasattr(source, "items") else str(source)


def is_mixture(source) -> bool:
  return isinstance(source, (list, tuple))


def parts(mixture) -> list[tuple[Any, Fraction]]:
  """Returns [(source, weight)] of a weighted list; an entry without a weight has weight 1."""
  out = []
  for entry in mixture:
    pair = isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], (int, float))
    source, weight = entry if pair else (entry, 1)
    if isinstance(weight, bool) or not weight > 0:
      raise InputError(
        f"data: the weight of {describe(source)} is {weight!r}; it must be above 0 (1: each row once an epoch)."
      )
    out.append((source, Fraction(weight).limit_denominator(10**6)))
  return out


def _read(source, meter) -> Iterator[Row]:
  if hasattr(source, "items"):
    yield from read_parallel(dict(source.items()), meter)
  elif source.split(":", 1)[0] in NAMED:
    kind, name, config, split = parse_name(source)
    yield from {"hub": _read_hub, "tfds": _read_tfds, "builtin": _read_builtin}[kind](source, name, config, split)
  else:
    for path in expand(source):
      yield from read_file(path, meter)


def _read_mixture(mixture, limit, meter) -> Iterator[Row]:
  for source, weight in parts(mixture):
    i = 0
    for i, row in enumerate(read(source, limit, meter)):
      times = int((i + 1) * weight) - int(i * weight)
      if times:
        row.repeat *= times
        yield row
    if int((i + 1) * weight) == 0:
      raise InputError(
        f"data: the weight {float(weight):g} takes none of the {i + 1:,} rows of {describe(source)}; "
        f"{math.ceil(10**6 / (i + 1)) / 10**6:g} is the least that takes one. Raise it, or remove the source."
      )


def local_files(source) -> list[str]:
  """Returns the local files that a source reads; those of named data sets are not among them."""
  source = checked(source)
  if is_mixture(source):
    return [p for s, _ in parts(source) for p in local_files(s)]
  if hasattr(source, "items"):
    return [p for v in dict(source.items()).values() for p in expand(v)]
  return expand(source) if source.split(":", 1)[0] not in NAMED else []


# ---- named data sets


def parse_name(source: str) -> tuple[str, str, str, str]:
  """Returns (kind, name, config, split) of `hub:OWNER/NAME[/CONFIG][:SPLIT]`,
  `tfds:NAME[/CONFIG[:VERSION]][:SPLIT]`, `builtin:NAME[:SPLIT]`.
  """
  kind, rest = source.split(":", 1)
  if kind == "tfds":
    m = re.fullmatch(r"([^:]+(?::\d+\.\d+\.\d+)?)(?::(.+))?", rest)
    name, split = m.groups() if m else (rest, "")
    return kind, name, "", split or "train"
  name, _, split = rest.partition(":")
  if kind == "builtin":
    name, slash, after = name.partition("/")
    return kind, name, "", split or (after if slash else "train")
  if name.startswith(("/", ".", "~")):
    return kind, os.path.expanduser(name), "", split or "train"
  pieces = name.split("/")
  return kind, "/".join(pieces[:2]), "/".join(pieces[2:]), split or "train"


def label_names(source, resolve: Callable[[dict], str]) -> tuple[str, ...]:
  """Returns the names that a data set of the Hub or of TFDS has for the ids of a label, or () where it has none.

  `resolve` tells of a row the column of its label. Of a mixture the names count if all parts have the same.
  """
  source = checked(source)
  if is_mixture(source):
    found = {label_names(s, resolve) for s, _ in parts(source)}
    return found.pop() if len(found) == 1 else ()
  if hasattr(source, "items") or source.split(":", 1)[0] not in ("hub", "tfds"):
    return ()
  column = resolve(next(read(source, 1)))
  kind, name, config, split = parse_name(source)
  of = _load_hub(source, name, config, split) if kind == "hub" else _tfds_builder(source, name).info
  feature = of.features.get(column)
  feature = getattr(feature, "feature", feature)  # that of a list
  return tuple(getattr(feature, "names", None) or ())


def _load_hub(source: str, name: str, config: str, split: str):
  """Returns the `datasets.Dataset`; the door of the `datasets` library."""
  import datasets

  if name.startswith(("/", ".")) and not os.path.isdir(name):
    raise InputError(f"data: there is no folder {name} (from {source}).")
  try:
    if os.path.isfile(os.path.join(name, "state.json")):
      data = datasets.load_from_disk(name)
      own = str(data.split or "train").split("[")[0]
      return _cut({own: data}, split, source) if source.count(":") > 1 else data
    if os.path.isfile(os.path.join(name, "dataset_dict.json")):
      return _cut(datasets.load_from_disk(name), split, source)
    return datasets.load_dataset(name, config or None, split=split)
  except (ValueError, OSError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as e:
    cause = f" ({str(e.__cause__).strip()[:300]})" if e.__cause__ else ""  # of a DatasetGenerationError: all it knows
    raise InputError(
      f"data: the data set {source} could not be loaded: {type(e).__name__}: {str(e).strip()[:500]}{cause}. The form "
      "is hub:OWNER/NAME[/CONFIG][:SPLIT], or hub:/folder[:SPLIT]."
    ) from e


def _cut(saved: dict, split: str, source: str):
  """Returns the part of saved data sets, by the names of their splits, that `split` names as for `load_dataset`."""
  import datasets

  wrong = [n for n in (part.split("[")[0].strip() for part in split.split("+")) if n not in saved]
  if wrong:
    raise InputError(
      f"data: {source} has no split {wrong[0]!r}; it has {', '.join(saved)}{did_you_mean(wrong[0], saved)}."
    )
  spans = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(data) for name, data in saved.items()})
  return datasets.concatenate_datasets([saved[x.splitname].select(range(x.from_, x.to)) for x in spans])


def _read_hub(source, name, config, split) -> Iterator[Row]:
  origin = (source, "row")
  for number, row in enumerate(_load_hub(source, name, config, split), 1):
    yield Row(row, origin, number)


def _tfds_builder(source: str, name: str):
  """Returns the TFDS builder; the door of tensorflow_datasets."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))  # read now: the library reads it when imported
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as e:
    raise InputError(
      f"data: the data set {source} could not be found by TFDS: {str(e).strip()[:500]}. The form is "
      "tfds:NAME[/CONFIG][:SPLIT]; "
      "TFDS_DATA_DIR says where prepared ones lie."
    ) from e


def _read_tfds(source, name, config, split) -> Iterator[Row]:
  del config  # part of the name in TFDS
  builder = _tfds_builder(source, name)
  builder.download_and_prepare()
  try:
    data = builder.as_dataset(split=split)
  except ValueError as e:
    raise InputError(
      f"data: {name} has no split {split!r}: {str(e).splitlines()[0]} It has "
      f"{', '.join(builder.info.splits)}{did_you_mean(split, builder.info.splits)}."
    ) from e
  origin = (source, "row")
  for number, row in enumerate(data.as_numpy_iterator(), 1):
    yield Row(_decoded(row), origin, number)


def _decoded(value):
  """Returns numpy values as Python's own, bytes as text where they are UTF-8 (an image is not)."""
  if isinstance(value, dict):
    return {k: _decoded(v) for k, v in value.items()}
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return value
  if hasattr(value, "tolist"):
    value = value.tolist()
    return [_decoded(v) for v in value] if isinstance(value, list) else _decoded(value)
  return value


def _read_builtin(source, name, config, split) -> Iterator[Row]:
  del config
  origin = (source, "row")
  for number, row in enumerate(builtin.read(name, split), 1):
    yield Row(row, origin, number)


# ---- fingerprints


def fingerprint(source, memory: pathlib.Path | None = None) -> Any:
  """Returns a JSON value that changes with the content of `source`.

  Files count by content, so a copy on another host or a `touch` is the same; `memory` is a file that keeps the hash of
  each (path, size, mtime), so that large files are hashed once (0.4 GB a second of processor time). Data sets of the
  Hub count by the fingerprint that `datasets` gives them, those of TFDS by name, version and split, built-in ones by
  the code that makes them.
  """
  source = checked(source)
  if is_mixture(source):
    return [[fingerprint(s, memory), str(w)] for s, w in parts(source)]
  if hasattr(source, "items"):  # a list, since the order of the columns is which language is the input
    return [[k, fingerprint_files(expand(v), memory)] for k, v in dict(source.items()).items()]
  if source.split(":", 1)[0] not in NAMED:
    return [[os.path.basename(p), h] for p, h in zip(expand(source), fingerprint_files(expand(source), memory))]
  kind, name, config, split = parse_name(source)
  if kind == "builtin":
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("babel", "num2words")]
    return [kind, name, split, fingerprint_files(builtin.FILES, memory), versions]
  if kind == "tfds":
    return [kind, _tfds_builder(source, name).info.full_name, split]
  return [kind, split, _load_hub(source, name, config, split)._fingerprint]
