"""The reader process: tf.data, and TensorFlow with it, beside the process that trains and not in it.

`start` begins it, so that it imports TensorFlow while the other imports JAX; `Batches.stream` then takes its batches
from there. Without it, they are made in this process. The two talk over a socket: pickled (batches, start, stop, host,
hosts) asks for a stream, STOP ends it early, and (BATCH, item), (END, None) or (FAILED, exception) comes back.
"""

import atexit
import contextlib
import dataclasses
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from jaxft.errors import StorageError

MODULE = "jaxft.data.feeder"
STOP = b""
BATCH, END, FAILED = range(3)


@dataclasses.dataclass
class Reader:
  process: subprocess.Popen
  link: Any  # multiprocessing.connection.Connection
  busy: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def stream(self, *asked: Any) -> Iterator[Any]:
    """Yields what the reader makes of `asked`; its errors are raised here."""
    kind = BATCH
    self.busy.acquire()
    try:
      self.link.send_bytes(pickle.dumps(asked))
      while kind == BATCH:
        kind, value = self.link.recv()
        if kind == BATCH:
          yield value
      if kind == FAILED:
        raise value
    except (EOFError, ConnectionError) as e:
      kind = END
      code = self.process.wait()
      raise StorageError(
        f"The process that reads the data has ended, with exit code {code}"
        f"{' (killed; was memory short?)' if code == -9 else ''}. Run the same command again: it goes on from the last "
        "checkpoint."
      ) from e
    finally:
      if kind == BATCH:  # given up before its end
        self._stop()
      self.busy.release()

  def _stop(self) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # it has ended by itself: the next stream raises that
      self.link.send_bytes(STOP)
      while self.link.recv()[0] == BATCH:
        continue

  def close(self) -> None:
    """Ends the process, which sees that nobody is there."""
    self.link.close()
    self.process.wait()


_reader: Reader | None = None


def start() -> None:
  """Starts the reader process of this one, once; it ends with it."""
  global _reader
  if _reader is None:
    here, there = multiprocessing.Pipe()
    command = [sys.executable, "-m", MODULE, str(there.fileno())]
    _reader = Reader(subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL), here)
    there.close()
    atexit.register(stop)


def stop() -> None:
  """Ends the reader process, if there is one."""
  global _reader
  if _reader is not None:
    _reader.close()
    _reader = None


def running() -> Reader | None:
  """Returns the reader process, where there is one that is free."""
  return _reader if _reader is not None and not _reader.busy.locked() else None
