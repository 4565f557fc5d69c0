"""docs/models.md names every family, head and task that there is, with tests that passed."""

from jaxft import modeling
from tests import make_tables


def test_models_page_is_up_to_date():
  lines = make_tables.FILE.read_text().splitlines()
  for name, kind in make_tables.families():
    row = next((line for line in lines if line.startswith(f"| {name} | {kind} |")), None)
    assert row, f"docs/models.md has no row for {name}, {kind}: run python -m tests.make_tables"
    assert row.split("|")[3].strip().isdigit() and row.split("|")[4].strip().isdigit(), row
  tasks = make_tables.tasks()
  assert len(tasks) == len(modeling.HEADS) + 2
  for row in tasks:
    assert row in lines, f"docs/models.md lacks the row {row}: run python -m tests.make_tables"
