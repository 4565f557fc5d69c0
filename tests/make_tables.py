"""Writes docs/models.md from a run of the parity tests, and from what the registry and the tasks say of themselves.

`python -m tests.make_tables` runs tests/families/test_parity.py (torch is needed; some minutes) and writes the file;
tests/test_tables.py says when it no longer names all families, heads and tasks.
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET

from jaxft import modeling
from jaxft.families import registry

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "docs" / "models.md"
CHECKS = dict(test_logits_loss_gradients="numbers", test_export="export", test_generation="generation")
HEAD = """# Models, heads and tasks

Made by `python -m tests.make_tables` out of a run of the tests; do not edit.

## Parity with transformers

Each cell counts the tests that passed: tiny models of odd sizes with large random weights, float32, tolerance 1e-5.
`numbers`: logits, loss and the gradient of every tensor. `export`: the folder that jaxft writes loads in transformers
with the same bits and means the same config. `generation`: greedy, beams, repetition penalty, n-grams and least length
equal transformers' `generate`, token by token.

"""


ALIASES = {"gemma3": "gemma3_text", "xlm-roberta": "roberta"}  # the same model under another name


def families() -> list[tuple[str, str]]:
  """Returns (model_type, kind of head) of all that there is."""
  types = {name: f for name, f in registry.FAMILIES.items() if name not in ALIASES}
  return [(name, kind) for name, f in types.items() for kind in f.heads if kind != "nsp"]


def run() -> dict[tuple[str, str], collections.Counter]:
  """Runs the parity tests; returns {(name of the tiny config, head): passed tests by check}."""
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / "report.xml"
    test = str(ROOT / "tests" / "families" / "test_parity.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test, f"--junitxml={report}"], cwd=ROOT, check=False)
    if done.returncode:
      sys.exit("the parity tests fail; docs/models.md stays as it is")
    found: dict = collections.defaultdict(collections.Counter)
    for case in ET.parse(report).getroot().iter("testcase"):
      name = re.fullmatch(r"(\w+)\[(.+)-(\w+)\]", case.get("name"))
      if name and name[1] in CHECKS and not list(case):
        kind = "lm" if name[1] == "test_generation" else name[3]
        found[name[2], kind][CHECKS[name[1]]] += 1
    return found


def table(found: dict[tuple[str, str], collections.Counter], types: dict[str, str]) -> list[str]:
  """Returns the rows of the parity table; `types` says which model_type a tiny config has."""
  rows = collections.defaultdict(collections.Counter)
  for (config, kind), counts in found.items():
    rows[types[config], kind].update(counts)
  lines = ["| model_type | head | numbers | export | generation |", "|---|---|---|---|---|"]
  for name, kind in families():
    counts = rows[name, kind]
    cells = [str(counts[c] or "-") for c in CHECKS.values()]
    lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
  return lines


def tasks() -> list[str]:
  """Returns the rows of the table of tasks and the families that can do them."""
  lines = ["| task | head | model | model types |", "|---|---|---|---|"]
  sorts = {name: _sort(name) for name in registry.FAMILIES}
  for task, (head, sort) in modeling.HEADS.items():
    able = [n for n, f in registry.FAMILIES.items() if head in f.heads and (not sort or sorts[n] in sort.split(" or "))]
    lines.append(f"| {task} | {head} | {sort or 'any'} | {', '.join(able)} |")
  return lines


def _sort(name: str) -> str:
  from tests.families import tiny

  return registry.sort(next(c for c in tiny.CONFIGS.values() if c["model_type"] == ALIASES.get(name, name)))


def main() -> None:
  from tests.families import tiny

  types = {name: c["model_type"] for name, c in tiny.CONFIGS.items()}
  parts = [*table(run(), types), "", "## Tasks and the families that support them", "", *tasks(), ""]
  FILE.write_text(HEAD + "\n".join(parts))
  print(FILE)


if __name__ == "__main__":
  main()
