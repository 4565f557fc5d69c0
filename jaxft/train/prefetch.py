"""Batches made ahead and put on the devices in a thread, so that the loop finds them there."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxft import observe

AHEAD = 2  # batches that wait on the devices


class Prefetch:
  """Takes (step, numpy batch) from `batches` and puts them on the devices, `AHEAD` of them, in a thread; use inside
  `with`."""

  def __init__(
    self, batches: Iterable[tuple[int, Mapping[str, np.ndarray]]], put: Callable[[Mapping], Mapping[str, jax.Array]]
  ):
    self._queue: queue.Queue = queue.Queue(AHEAD)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, args=(batches, put), name="jaxft-prefetch", daemon=True)

  def __enter__(self) -> Iterator[tuple[int, Mapping[str, jax.Array], float, int]]:
    self._thread.start()
    return iter(self._queue.get, None)

  def __exit__(self, *_) -> None:
    self._stop.set()
    until = time.monotonic() + 10
    while self._thread.is_alive() and time.monotonic() < until:  # it may be waiting for room in the queue
      try:
        self._queue.get(timeout=0.05)
      except queue.Empty:
        continue

  def _work(self, batches, put) -> None:
    try:
      for step, rows in batches:
        real, size = observe.count_tokens(rows)
        batch = put(rows)
        padded = observe.count_tokens({k: np.empty(x.shape, np.bool_) for k, x in batch.items()})[1]
        self._queue.put((step, batch, real * padded / max(size, 1), padded))
        if self._stop.is_set():
          return
      self._queue.put(None)
    except BaseException as e:  # of any kind: it is raised again where the loop takes the batch
      self._queue.put(e)


def checked(item: Any, step: int) -> tuple:
  """Returns what `Prefetch` yielded for `step`; raises the error of the thread, where there was one."""
  if isinstance(item, BaseException):
    raise item
  assert item is not None and item[0] == step, f"the batches ended or jumped at step {step}: {item and item[0]}"
  return item
