"""Templates of strangers: jinja2's sandbox, set up for chats as transformers does, and made to end.

jinja2 keeps a template from Python's inside, but not from running for ever or from filling the memory, and a thread or
a worker process cannot be interrupted from outside without harm. So the template counts for itself: its loops, calls,
filters and operators on texts go through here, where a budget of time and of characters is kept for each call. What a
single operation will make is estimated before it is done.

Other than in transformers there is no `random`, with which data would differ from run to run, no `lipsum`, and none of
a few filters and methods that no chat needs and whose results are hard to foresee.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor

SECONDS = 2.0  # of wall-clock time; but a thread that did not compute for CPU_SECONDS of them is not to blame
CPU_SECONDS = 0.5
LIMIT = 50_000_000  # characters of the output, or of a text on the way; an entry of a list counts 8, a list 64 more
TOTAL = 10 * LIMIT  # of all texts on the way
SMALL = 1000  # a sum of texts that is not counted
WIDTH = 100  # the widest indent, the most digits
SOURCE = 1_000_000  # characters of a template

CONTAINERS = (list, tuple, dict, set)
PRINTF = re.compile(r"%(\(\w*\))?[^a-zA-Z%]*(\d{4}|\*)")  # a width that is long, or not written out
BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")
GONE = ("filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr")
HIDDEN = ("encode", "expandtabs", "maketrans", "to_bytes", "translate")
SIZED = ("batch", "center", "indent", "round", "slice", "tojson")  # filters that are told a size
COLLECT = frozenset(
  "attr batch count d default dictsort first groupby items last length list map max min reject rejectattr reverse "
  "select selectattr slice sort sum tojson unique".split()
)  # filters that do not simply make text of their value


class TooMuch(Exception):
  """A template was stopped; says why."""


class Limits:
  """What a template may use within `with Limits():`. It belongs to the thread, whichever that is."""

  def __enter__(self):
    self.due = self.weight = 0
    self.wall, self.cpu = time.monotonic(), time.thread_time()
    _here.limits = self

  def __exit__(self, *_):
    _here.limits = None

  def spend(self, weight: int) -> None:
    self.due -= 1
    if weight > 0:
      self.weight += weight
      self.due -= weight >> 14  # 16,000 characters take about as long as a step
      if weight > LIMIT or self.weight > TOTAL:
        raise TooMuch(f"it makes texts of more than {LIMIT:,} characters")
    if self.due < 0:
      self.due = 64
      if time.monotonic() - self.wall > SECONDS and time.thread_time() - self.cpu > CPU_SECONDS:
        raise TooMuch(f"it is not done after {SECONDS:g} seconds")


_here = threading.local()


def render(source: str, variables: dict[str, Any]) -> str:
  """Returns what the template makes of the variables, which should be plain data; call within `Limits`.

  Raises TooMuch, or whatever jinja2 or the template raises.
  """
  template = _compile(source)
  context = template.new_context({**_environment().globals, **variables}, shared=True)  # quicker than its own merging
  return _concat(template.root_render_func(context))


def check(source: str) -> None:
  """Raises what jinja2 raises where the template cannot be read; call within `Limits`."""
  _compile(source)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
  if len(source) > SOURCE:
    raise TooMuch(f"it is {len(source):,} characters long, more than {SOURCE:,}")
  env = _environment()
  return env.from_string(_Guards().visit(env.parse(source)).set_environment(env))


@functools.cache
def _environment() -> sandbox.SandboxedEnvironment:
  env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=_printable)
  env.filters = {k: _filter(k, f) for k, f in {**env.filters, "tojson": _tojson}.items() if k not in GONE}
  env.filters |= {" loop": _loop, " glue": _glue}  # no template can write these names
  del env.globals["lipsum"]
  env.globals |= dict(raise_exception=_refuse, namespace=_namespace, dict=lambda *args, **kwargs: dict(*args, **kwargs))
  return env


# ---- what templates may call


def _refuse(message: Any) -> None:
  raise jinja2.exceptions.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  _spend(_weight(value) * (1 + (indent if isinstance(indent, int) else _size(indent))))
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
  """A template's own variables, without names to which Python gives a meaning."""

  def __setitem__(self, name, value):
    if str(name).startswith("_"):
      raise jinja2.exceptions.SecurityError(f"a variable is named {name!r}")
    super().__setitem__(name, value)


def _namespace(*args, **kwargs):
  made = _Namespace()
  for name, value in dict(*args, **kwargs).items():
    made[name] = value
  return made


class _Generation(ext.Extension):
  """`{% generation %}`, with which a template marks answers for transformers: here the text inside, no more."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# ---- counting


def _spend(weight: int = 0) -> None:
  _here.limits.spend(weight)


def _size(value: Any) -> int:
  return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, CONTAINERS) else 0


def _weight(value: Any) -> int:
  """Returns about how long a value is as text, or somewhat more than LIMIT; lists can hold lists many times over."""
  todo, size = [value], 0
  while todo and size <= LIMIT:
    x = todo.pop()
    size += _size(x)
    if isinstance(x, CONTAINERS):
      size += 64
      todo.extend(x)
      todo.extend(x.values() if isinstance(x, dict) else ())
  return size


def _printable(value: Any) -> Any:
  if isinstance(value, CONTAINERS):
    _spend(_weight(value))
  return value


def _concat(pieces: Iterable[str]) -> str:
  out, size = [], 0
  for piece in pieces:
    out.append(piece)
    size += len(piece)
    if size > LIMIT:
      break
  _spend(size)
  return "".join(out)


def _glue(items: Iterable) -> str:
  return _concat([str(_printable(x)) for x in items])


def _loop(items: Iterable) -> Iterator:
  for item in items:
    _spend()
    yield item


class _Guards(visitor.NodeTransformer):
  """Puts the counting into a template's loops and `~`."""

  def visit_For(self, node):
    self.generic_visit(node)
    node.iter = nodes.Filter(node.iter, " loop", [], [], None, None, lineno=node.lineno)
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    return nodes.Filter(nodes.List(node.nodes), " glue", [], [], None, None, lineno=node.lineno)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(["+", "*", "**", "%"])
  concat = staticmethod(_concat)

  def call_binop(self, context, operator, left, right):
    if operator == "+" and type(left) is str and type(right) is str:  # nearly all of what chats do
      if len(left) + len(right) > SMALL:
        _spend(len(left) + len(right))
      return left + right
    if isinstance(left, int) and isinstance(right, int):
      bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
      if bits > 10_000:
        raise TooMuch("it computes huge numbers")
    elif operator == "*":
      _spend(_size(left) * right if isinstance(right, int) else _size(right) * left if isinstance(left, int) else 0)
    elif operator == "%" and isinstance(left, str):
      _formats(PRINTF, left, right)
    else:
      _spend(_size(left) + _size(right))
    return super().call_binop(context, operator, left, right)

  def call(self, context, obj, /, *args, **kwargs):
    owner = getattr(obj, "__self__", None)
    if isinstance(owner, str) and args:
      args = _method(owner, obj.__name__, *args)
    _spend()
    result = super().call(context, obj, *args, **kwargs)
    _spend(_size(result))
    return result

  def wrap_str_format(self, value):
    made = super().wrap_str_format(value)
    return made and (lambda *args, **kwargs: _formats(BRACES, value.__self__, args, kwargs) or made(*args, **kwargs))

  def unsafe_undefined(self, obj, attribute):
    raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

  def is_safe_attribute(self, obj, attr, value):
    return attr not in HIDDEN and super().is_safe_attribute(obj, attr, value)


def _formats(huge: re.Pattern, text: str, *given: Any) -> None:
  if huge.search(text):
    raise TooMuch("it formats with a huge width, or one that is not written out")
  _spend(_weight([text, *given]))


def _method(owner: str, name: str, *args: Any) -> tuple:
  """Returns the arguments for a method of a text, after counting what it will make."""
  if name in ("center", "ljust", "rjust", "zfill") and isinstance(args[0], int):
    _spend(args[0])
  elif name == "replace" and all(isinstance(a, str) for a in args[:2]):
    _spend(owner.count(args[0]) * sum(map(len, args[1:2])))
  elif name == "join":
    items = list(_loop(args[0]))
    _spend(sum(map(_size, items)) + len(owner) * len(items))
    return (items,)
  elif name.endswith(("split", "splitlines")):
    _spend(4 * len(owner))
  return args


def _filter(name: str, function: Callable) -> Callable:
  """Returns the filter with what it will make, and what it made, counted."""
  skip = hasattr(function, "jinja_pass_arg")  # then the first argument is the environment or the like

  @functools.wraps(function)
  def guarded(*args, **kwargs):
    value, *more = args[skip:]
    options = (*more, *kwargs.values())
    _spend()
    if name in SIZED and any((x if isinstance(x, int) else len(str(_printable(x)))) > WIDTH for x in options):
      raise TooMuch(f"it gives the filter {name} a size above {WIDTH}")
    if name == "sum" and any(isinstance(x, CONTAINERS) for x in options):
      raise TooMuch("it adds up lists")
    if name == "join":
      value = list(_loop(value))
      _spend(len(value) * sum(map(_size, options)))
    elif name == "replace" and len(more) > 1:
      _method(str(_printable(value)), name, *map(str, more[:2]))
    elif name == "indent":
      _spend(WIDTH * str(_printable(value)).count("\n"))
    elif name == "format":
      _formats(PRINTF, str(value), options)
    if name not in COLLECT:
      _printable(value)
    result = function(*args[:skip], value, *more, **kwargs)
    _spend(_size(result))
    return result

  return guarded
