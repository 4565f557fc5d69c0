"""The reader process itself: python -m jaxft.data.feeder FD, started by `feeding.start`, with its end of the socket."""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from jaxft.data import pipeline
from jaxft.data.feeding import BATCH, END, FAILED, STOP


def main(link: Connection) -> None:
  """Makes the streams that are asked for, one after the other, until the other end closes."""
  for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to both; training, which still reads, decides
    signal.signal(number, signal.SIG_IGN)
  asked: queue.SimpleQueue = queue.SimpleQueue()
  threading.Thread(target=_listen, args=(link, asked), daemon=True).start()
  with contextlib.suppress(ImportError):  # the first stream, if there ever is one, meets it again and sends it
    pipeline.tensorflow()  # takes seconds: before it is wanted
  try:
    while True:
      request = asked.get()
      if request != STOP:  # of a stream that had just ended
        link.send(_stream(link, asked, request))
  except ConnectionError:
    os._exit(0)


def _listen(link: Connection, asked: queue.SimpleQueue) -> None:
  try:
    while True:
      asked.put(link.recv_bytes())
  except (EOFError, OSError):
    os._exit(0)  # the process that trains has gone; there is nothing to be saved here


def _stream(link: Connection, asked: queue.SimpleQueue, request: bytes) -> tuple[int, Any]:
  """Sends the batches of a stream; returns how it ended."""
  try:
    batches, *where = pickle.loads(request)
    for item in batches.local(*where):
      if not asked.empty():
        break
      link.send((BATCH, item))
    return END, None
  except ConnectionError:
    raise
  except Exception as e:
    e.add_note("In the process that reads the data:\n" + traceback.format_exc())
    return FAILED, e


if __name__ == "__main__":
  main(Connection(int(sys.argv[1])))
