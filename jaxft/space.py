"""What a sweep tries: from a file or from a line on the command line to checked values of the config.

    optimizer.lr=log(1e-5,1e-3) optimizer.decay=[0,0.01] batch=[16,32] seed=range(3) method=tpe trials=20

Names that the config has are tried: each takes a list of values (or range(...)), or uniform(a,b), log(a,b), int(a,b)
between two ends, both of them included. The other names are those of OPTIONS.
"""

import ast
import copy
import dataclasses
import itertools
import math
import pathlib
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft import config
from jaxft.errors import InputError, did_you_mean

OPTIONS = dict(  # every option and its default
  method="",  # grid (all combinations, the last name changes fastest), random or tpe; "": grid, with a range random
  trials=20,  # of random and tpe
  metric="",  # what counts, such as eval/classify/accuracy; "": save.best of the config
  mode="",  # max or min: where it is best; "": save.mode of the config, where the metric is its save.best
  prune="none",  # median: ends a trial whose best value so far is worse than the median of the others at that step
  startup=5,  # trials that end before one is pruned, and that tpe draws at random
  keep="best",  # checkpoints of which trials stay: best or all
  sampler_seed=0,  # of what random and tpe draw
)
CHOICES = dict(
  method=("", "grid", "random", "tpe"), mode=("", "max", "min"), prune=("none", "median"), keep=("best", "all")
)
FORMS = ("uniform", "log", "int", "range")
MOST = 10_000  # trials of a grid


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both included: uniform, log (uniform in the logarithm) or int."""

  kind: str
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.kind}({self.low},{self.high})"


Axis = tuple | Range  # the values of a path


@dataclasses.dataclass(frozen=True)
class Space:
  axes: dict[str, Axis]
  method: str
  trials: int
  metric: str
  mode: str
  prune: str
  startup: int
  keep: str
  sampler_seed: int

  def grid(self) -> list[dict[str, Any]]:
    """Returns the values of each trial of a grid."""
    return [dict(zip(self.axes, x)) for x in itertools.product(*map(_all, self.axes.values()))]

  def json(self) -> dict[str, Any]:
    """Returns what tells two spaces apart, as JSON."""
    axes = {k: str(a) if isinstance(a, Range) else list(a) for k, a in self.axes.items()}
    return axes | {k: getattr(self, k) for k in OPTIONS}


def _all(axis: Axis) -> tuple:
  return tuple(range(axis.low, axis.high + 1)) if isinstance(axis, Range) else axis


def read(given: str, c: ConfigDict) -> Space:
  """Returns the space of `given`, a file with get_sweep() or a line, for the checked config `c`; raises InputError."""
  if not given.strip():
    raise InputError("--sweep=FILE.py or --sweep='optimizer.lr=log(1e-5,1e-3) ...' is missing; see docs/sweep.md.")
  raw = _file(pathlib.Path(given)) if given.strip().endswith(".py") else given
  return make(_line(raw) if isinstance(raw, str) else dict(raw), c)


def _file(path: pathlib.Path) -> Any:
  try:
    names: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    made = names["get_sweep"]()
  except OSError as e:
    raise InputError(f"--sweep={path}: {e.strerror or e}.") from e
  except Exception as e:  # a program of somebody else
    own = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    where = f"line {own[-1] if own else getattr(e, 'lineno', 1)}"
    said = "it has no get_sweep()" if isinstance(e, KeyError) and not own else f"{type(e).__name__}: {e}"
    raise InputError(f"--sweep={path}: {where}: {said}.") from e
  if not isinstance(made, (Mapping, str)):
    raise InputError(f"--sweep={path}: get_sweep() returns {type(made).__name__}; it must be a dict or a line.")
  return made


def _line(text: str) -> dict[str, str]:
  """Returns {name: what stands behind the =} of a line; blanks inside of brackets do not part it."""
  words, depth = [""], 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    words = [*words, ""] if char.isspace() and not depth else [*words[:-1], words[-1] + char]
  out: dict[str, str] = {}
  for word in filter(None, words):
    name, equals, value = word.partition("=")
    if not equals or not name or not value:
      raise InputError(f"sweep: {word!r} is not NAME=VALUES, such as optimizer.lr=log(1e-5,1e-3).")
    if name in out:
      raise InputError(f"sweep: {name} is there twice; put its values into one list.")
    out[name] = value
  return out


def make(raw: Mapping[str, Any], c: ConfigDict) -> Space:
  """Returns the checked space of {name: values} over the checked config `c`; values in text are parsed."""
  options, axes = dict(OPTIONS), {}
  for name, value in raw.items():
    if name in OPTIONS:
      options[name] = _option(name, value)
    else:
      axes[name] = _axis(name, value, c)
  if not axes:
    raise InputError("sweep: it names nothing to try; add for example optimizer.lr=log(1e-5,1e-3).")
  options |= _counted(c, options["metric"], options["mode"])
  smooth = [k for k, a in axes.items() if isinstance(a, Range) and a.kind != "int"]
  options["method"] = options["method"] or ("random" if any(isinstance(a, Range) for a in axes.values()) else "grid")
  if options["method"] == "grid" and smooth:
    raise InputError(
      f"sweep: method=grid tries every value, and {smooth[0]}={axes[smooth[0]]} has no end of them. Give a list of "
      "values, or method=random or method=tpe."
    )
  space = Space(axes, **options)
  if space.method == "grid":
    size = math.prod(a.high + 1 - a.low if isinstance(a, Range) else len(a) for a in axes.values())
    if size > MOST or raw.get("trials") is not None:
      why = f"has {size:,} trials" + (f", more than {MOST:,}" if size > MOST else "; `trials` is for the others")
      raise InputError(f"sweep: method=grid {why}. Leave `trials` out, or give method=random or method=tpe.")
    space = dataclasses.replace(space, trials=size)
  _prunable(space, c)
  return space


def _option(name: str, value: Any) -> Any:
  default = OPTIONS[name]
  if isinstance(default, int) and isinstance(value, str):
    value = _literal(name, value)
  if type(value) is not type(default):
    raise InputError(f"sweep: {name} is {value!r}; it takes a {type(default).__name__}.")
  if name in CHOICES and value not in CHOICES[name]:
    known = [x for x in CHOICES[name] if x]
    raise InputError(f"sweep: {name} is {value!r}{did_you_mean(value, known)}; it is one of {', '.join(known)}.")
  if isinstance(default, int) and value < (name == "trials"):
    raise InputError(f"sweep: {name} is {value}; it must be {int(name == 'trials')} or more.")
  return value


def _literal(name: str, text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError) as e:
    raise InputError(f"sweep: {name}={text} cannot be read.") from e


def _axis(path: str, value: Any, c: ConfigDict) -> Axis:
  """Returns the values of a path of the config, each of which the config takes."""
  known = [p for p, _ in config.flatten(c)]
  if path not in known:
    options = did_you_mean(path, OPTIONS) if "." not in path else ""
    raise InputError(f"sweep: the config has no {path}{options or config.suggest(path, known)}.")
  axis = _parse(path, value) if isinstance(value, str) else value
  if not isinstance(axis, (list, tuple, range, Range)):
    raise InputError(
      f"sweep: {path} is {value!r}; it takes a list of values, range(n), uniform(a,b), log(a,b) or int(a,b). What all "
      f"trials share stands in the config, or in --config.{path}={value}."
    )
  if isinstance(axis, Range):
    for end in (axis.low, axis.high):
      put(copy.deepcopy(c), {path: end})
    return axis
  if not axis:
    raise InputError(f"sweep: {path} has no values.")
  return tuple(_at(put(copy.deepcopy(c), {path: x}), path) for x in axis)


def _parse(path: str, text: str) -> Any:
  """Returns the list, range or Range that `text` says; bare words in a list are strings."""
  try:
    node = ast.parse(text.strip(), mode="eval").body
  except SyntaxError as e:
    raise InputError(f"sweep: {path}={text} cannot be read; it is a list or a form such as log(1e-5,1e-3).") from e
  if isinstance(node, (ast.List, ast.Tuple)):
    try:
      return [_WORDS.get(x.id, x.id) if isinstance(x, ast.Name) else ast.literal_eval(x) for x in node.elts]
    except ValueError as e:
      raise InputError(f"sweep: {path}={text}: a list holds numbers and words, with quotes where need be.") from e
  if not isinstance(node, ast.Call):
    return text
  name = getattr(node.func, "id", ast.unparse(node.func))
  if name not in FORMS:
    raise InputError(f"sweep: {path}={text}: there is no {name}{did_you_mean(name, FORMS)}; {', '.join(FORMS)}.")
  try:
    args = [ast.literal_eval(a) for a in node.args]
    assert not node.keywords and all(type(a) in (int, float) for a in args)
  except (ValueError, AssertionError) as e:
    raise InputError(f"sweep: {path}={text}: {name} takes numbers.") from e
  return _form(path, text, name, args)


_WORDS = dict(true=True, false=False, none=None)


def _form(path: str, text: str, name: str, args: list) -> Any:
  whole = all(type(a) is int for a in args)
  if name == "range":
    if not whole or not 1 <= len(args) <= 3 or (len(args) == 3 and not args[2]):
      raise InputError(f"sweep: {path}={text}: range takes 1 to 3 whole numbers, as in Python.")
    return range(*args)
  if len(args) != 2 or args[0] >= args[1] or (name == "int" and not whole) or (name == "log" and args[0] <= 0):
    kind = {"int": "two whole numbers", "log": "two numbers above 0"}.get(name, "two numbers")
    raise InputError(f"sweep: {path}={text}: {name} takes {kind}, the smaller one first.")
  return Range(name, *(args if name == "int" else map(float, args)))


def put(c: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """Returns `c`, changed, with these values, checked; raises InputError."""
  for path, value in values.items():
    *groups, leaf = path.split(".")
    node = c
    for g in groups:
      node = node[g]
    try:
      node[leaf] = tuple(value) if isinstance(value, list) and isinstance(node[leaf], tuple) else value
    except TypeError as e:
      kind = type(node[leaf]).__name__
      raise InputError(f"sweep: {path}={value!r} is of type {type(value).__name__}; the config takes {kind}.") from e
  return config.check(c)


def _at(c: ConfigDict, path: str) -> Any:
  for key in path.split("."):
    c = c[key]
  return c.to_dict() if isinstance(c, ConfigDict) else c


def _counted(c: ConfigDict, metric: str, mode: str) -> dict[str, str]:
  """Returns the metric that counts and its mode, from the config where the sweep does not say."""
  found = metric or c.save.best
  if not found:
    raise InputError(
      "sweep: nothing says which metric counts; add metric=eval/NAME/METRIC, with NAME one of the config's evals "
      f"({', '.join(c.evals) or 'which are empty'}), and mode=max or mode=min."
    )
  if not mode and found != c.save.best:
    raise InputError(f"sweep: add mode=max or mode=min, which says where {found} is best.")
  return dict(metric=found, mode=mode or c.save.mode)


def _prunable(space: Space, c: ConfigDict) -> None:
  for path in ("save.best", "save.mode"):
    if path in space.axes:
      raise InputError(f"sweep: {path} cannot be tried; it follows from the metric of the sweep.")
  name = space.metric.split("/")[1] if space.metric.count("/") >= 2 else ""
  if space.prune != "none" and name in c.evals and not c.evals[name].every and f"evals.{name}.every" not in space.axes:
    raise InputError(
      f"sweep: prune={space.prune} looks at {space.metric} on the way, and evals.{name}.every is 0: only at the end. "
      f"Set --config.evals.{name}.every to a number of steps."
    )
