"""Work on chunks in several processes, with the results in order."""

import collections
import concurrent.futures
import itertools
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxft.data.files import place
from jaxft.errors import StorageError

SERVE = "from jaxft.data import crew; crew.serve()"


def cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def serve() -> None:
  """Answers chunks on standard input with results on standard output, both pickled; the life of a worker process."""
  answers, sys.stdout = sys.stdout.buffer, sys.stderr
  job = pickle.load(sys.stdin.buffer)
  while True:
    try:
      chunk = pickle.load(sys.stdin.buffer)
    except (EOFError, KeyboardInterrupt):
      return
    try:
      result = job(chunk)
    except KeyboardInterrupt:
      return  # the program that called says what there is to say
    except Exception as e:
      result = e
    pickle.dump(result, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


class Worker:
  """A process of its own interpreter: it imports neither JAX nor the program that called (multiprocessing's spawn
  does both).
  """

  def __init__(self, job: Callable):
    env = dict(
      os.environ, TOKENIZERS_PARALLELISM="false", PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path)
    )
    self.process = subprocess.Popen(
      [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    self._send(job)

  def _send(self, value) -> None:
    pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
    self.process.stdin.flush()

  def __call__(self, chunk: Any) -> Any:
    try:
      self._send(chunk)
      result = pickle.load(self.process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as e:
      raise StorageError(
        f"a tokenising process ended with code {self.process.wait()} at {place(chunk.origin, chunk.lines[0])} and "
        "after (out of memory?). "
        "Set --config.data.workers=1 to tokenise in one process."
      ) from e
    if isinstance(result, Exception):
      raise result
    return result

  def stop(self) -> None:
    self.process.kill()
    self.process.wait()
    self.process.stdin.close()
    self.process.stdout.close()


def work(job: Callable, stream: Iterator[Any], workers: int, small: int) -> Iterator[Any]:
  """Yields `job(chunk)` in order: in this process for at most `small` rows, else in `workers` others."""
  head, rows = [], 0
  for chunk in stream:
    head.append(chunk)
    rows += len(chunk.rows)
    if rows > small:
      break
  stream = itertools.chain(head, stream)
  if workers == 1 or rows <= small:
    yield from map(job, stream)
    return
  idle: queue.SimpleQueue = queue.SimpleQueue()
  crew, window = [], collections.deque()
  threads = concurrent.futures.ThreadPoolExecutor(workers)

  def run(chunk):
    worker = idle.get()
    try:
      return worker(chunk)
    finally:
      idle.put(worker)

  try:
    for _ in range(workers):
      crew.append(Worker(job))
      idle.put(crew[-1])
    for chunk in stream:
      window.append(threads.submit(run, chunk))
      if len(window) > 2 * workers:
        yield window.popleft().result()
    while window:
      yield window.popleft().result()
  finally:
    for worker in crew:
      worker.stop()
    threads.shutdown(wait=True, cancel_futures=True)
