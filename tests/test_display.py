"""What people see while they wait.

Catches: a bar that never says it is done, a line for work that takes a blink, a flood of lines.
"""

import pytest

from jaxft import display


@pytest.mark.parametrize(
  "quiet, seconds, lines",
  [
    (0.0, 1.0, ["work 0/3  compiling", "work 3/3  3.0 rows/s, 0s left"]),
    (3.0, 1.0, []),
    (3.0, 4.0, ["work 3/3  0.8 rows/s, 0s left"]),
    (3.0, 30.0, ["work 2/3  0.1 rows/s, 10s left", "work 3/3  0.1 rows/s, 0s left"]),
  ],
)
def test_lines_where_there_is_no_terminal(monkeypatch, caplog, quiet, seconds, lines):
  caplog.set_level("INFO")
  now = [100.0]
  monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
  bar = display.Bar("work", quiet=quiet)
  for done, at in ((0, 0.0), (1, 0.3), (2, 2 / 3), (3, 1.0)):
    now[0] = 100 + at * seconds
    bar(done, 3)
  assert [r.message for r in caplog.records] == lines
