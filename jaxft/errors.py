"""How jaxft ends: one exception a kind of ending, each with the exit code that launchers act on.

0 done; 2 bad config or input, never retry; 41 cluster; 42 preempted, saved, run me again; 43 numbers; 44 storage or
data; 45 watchdog. A message is one paragraph: what, where (file, line, example id, key), and what to do next.
"""

import difflib
import logging
import sys
from collections.abc import Callable


class Stop(Exception):
  """Ends the process with `code`; the message goes to stderr as one paragraph, the traceback to the log."""

  code = 1


class InputError(Stop):
  """The config, the data or the command line is wrong: running again will not help."""

  code = 2


class ClusterError(Stop):
  code = 41


class Preempted(Stop):
  """Asked to stop from outside; the state is saved and the same command goes on from there."""

  code = 42


class NumbersError(Stop):
  """Loss, gradient or weights are not finite."""

  code = 43


class StorageError(Stop):
  """A disk, a bucket or a checkpoint failed."""

  code = 44


def did_you_mean(name: str, known) -> str:
  """Returns " (did you mean 'x'?)" for the nearest of `known`, or an empty string."""
  near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
  return f" (did you mean {near[0]!r}?)" if near else ""


def run(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
  """Runs `main(argv)` and exits: a `Stop` becomes its paragraph and its code; anything else keeps its traceback."""
  try:
    code = main(argv) or 0
  except Stop as e:
    logging.getLogger("jaxft").debug("stopped", exc_info=True)
    print(f"\njaxft: {e}", file=sys.stderr, flush=True)
    code = e.code
  except OSError as e:
    logging.getLogger("jaxft").exception("storage")
    print(f"\njaxft: {type(e).__name__}: {e}. Check that the path exists, is writable and has space.", file=sys.stderr)
    code = StorageError.code
  sys.exit(code)
