"""The house: which floor may import which, how long a file and a function may be. Reads the source, runs nothing.

Catches: an upward or sideways import, an import of our own hidden in a function, a cycle, a heavy package outside its
door.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "jaxft"
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = dict(
  errors=0,
  config=0,
  trees=0,
  sharding=0,
  observe=0,
  report=0,
  hub=0,
  names=0,
  safetensors=0,
  flops=0,
  display=0,
  cluster=0,
  models=1,
  families=1,
  data=2,
  train=3,
  eval=3,
  infer=3,
)  # everything else is floor 4
SIDEWAYS = {("families", "models"), ("eval", "infer")}  # the only arrows between packages of one floor
DOORS = dict(
  transformers={"jaxft.data.tokens"},
  tensorflow={"jaxft.data.pipeline", "jaxft.data.sources"},
  torch=set(),
  datasets={"jaxft.data.sources"},
  tensorflow_datasets={"jaxft.data.sources"},
  optuna={"jaxft.tuning"},
  matplotlib={"jaxft.display"},
)
HEAVY = {"tensorflow", "datasets", "tensorflow_datasets", "torch", "wandb", "optuna", "matplotlib"}


def module(path):
  return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(tree):
  """Yields (module name, node, whether it stands in a function)."""
  inner = {
    id(n)
    for f in ast.walk(tree)
    if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    for n in ast.walk(f)
    if n is not f
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for a in node.names:
        yield a.name, node, id(node) in inner
    elif isinstance(node, ast.ImportFrom):
      for a in node.names:
        yield f"{node.module}.{a.name}", node, id(node) in inner


def place(name):
  part = name.split(".")[1] if "." in name else ""
  return part, FLOORS.get(part, 4)


def ours(name):
  """The module of ours that an imported name belongs to, or None."""
  while name.startswith("jaxft"):
    path = ROOT.parent / pathlib.Path(*name.split("."))
    if path.with_suffix(".py").exists() or path.is_dir():
      return name
    name = name.rpartition(".")[0]
  return None


@pytest.mark.parametrize("path", FILES, ids=module)
def test_size(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 400, f"{len(lines)} lines"
  long = [
    n.name
    for n in ast.walk(ast.parse(path.read_text()))
    if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.end_lineno - n.lineno + 1 > 60
  ]
  assert not long, f"functions over 60 lines: {long}"
  if place(module(path))[1] == 4:
    assert "absl" not in path.read_text() or len(lines) < 120, "a binary only wires"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_floors(path):
  here = module(path)
  part, floor = place(here)
  for name, node, hidden in imports(ast.parse(path.read_text())):
    target = ours(name)
    if target:
      other, below = place(target)
      assert not hidden, f"line {node.lineno}: {name} is imported in a function"
      assert below < floor or other == part or floor == 4 or (part, other) in SIDEWAYS or floor == below == 0, (
        f"line {node.lineno}: {here} (floor {floor}) imports {target} (floor {below})"
      )
    top = name.split(".")[0]
    if top in DOORS:
      door = here in DOORS[top] or (top == "transformers" and here == "jaxft.doctor")
      assert door, f"line {node.lineno}: {top} has another door"
    if top in HEAVY:
      assert hidden, f"line {node.lineno}: {top} is imported at start-up"


def test_no_cycles_and_depth():
  edges = {module(p): {ours(n) for n, _, _ in imports(ast.parse(p.read_text()))} - {None, module(p)} for p in FILES}
  path = []

  def walk(m, depth, near):
    assert m not in path, f"import cycle: {' -> '.join([*path, m])}"
    if m not in depth:
      path.append(m)
      depth[m] = 1 + max([walk(x, depth, near) for x in edges.get(m, ()) if x != "jaxft" and near(m, x)], default=0)
      path.pop()
    return depth[m]

  whole: dict[str, int] = {}
  for m in edges:
    walk(m, whole, lambda a, b: True)  # for its cycles
  inside: dict[str, int] = {}
  for m in edges:  # how many files of one package (or of floors 0 and 4) a reader has to open, one after the other
    walk(m, inside, lambda a, b: _group(a) == _group(b))
  deepest = max(inside, key=inside.get)
  assert inside[deepest] <= 8, f"{deepest}: {inside[deepest]} imports deep within {_group(deepest)}"


def _group(name):
  part, floor = place(name)
  return f"floor {floor}" if floor in (0, 4) else part


def test_training_floors_import_without_tensorflow():
  code = (
    "import sys; sys.modules.update(dict.fromkeys("
    "['tensorflow','datasets','tensorflow_datasets','torch','transformers']));"
    "import jaxft.hub, jaxft.families.registry, jaxft.train.loop, jaxft.train.step, jaxft.infer.generate"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_help_needs_nothing_that_is_slow():
  """Every binary reads its flags before it imports what takes seconds."""
  binaries = [module(p) for p in FILES if "cli.parse(" in p.read_text() and p.name != "cli.py"]
  assert len(binaries) == 8, binaries
  code = (
    "import runpy, sys; sys.argv = ['x', '--help']\n"
    "try: runpy.run_module(sys.stdin.read(), run_name='__main__')\n"
    "except SystemExit as e: assert not e.code\n"
    "assert not {'jax', 'flax', 'transformers'} & {*sys.modules}, 'imported for --help'"
  )
  for name in binaries:
    done = subprocess.run([sys.executable, "-c", code], input=name, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    assert done.stdout.count("\n") < 35, f"{name}: --help does not fit a screen"


def test_no_file_outside_the_package_is_too_long_either():
  folders = ("tests", "benchmarks", "configs", "launch")
  files = [f for name in folders for end in ("*.py", "*.sh") for f in (ROOT.parent / name).rglob(end)]
  long = [str(f) for f in files if len(f.read_text(encoding="utf-8").splitlines()) > 400]
  assert files and not long, f"over 400 lines: {long}"
