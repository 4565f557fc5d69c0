"""The evaluator of models that predict something for each example in one pass: classes, values, tags, answers.

The values do not depend on packing, the batch size, padding or the number of hosts: predictions are put in the order of
the examples before anything is computed from them.
"""

import collections
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxft import sharding
from jaxft.errors import InputError, NumbersError, StorageError
from jaxft.eval import evaluators, graders, pictures

log = logging.getLogger("jaxft")
WAITING = 3  # batches on the devices at a time


class PredictEvaluator:
  """Predicts for every example and scores it: the loss if there is one, what the grader gives, and the examples scored.

  With a folder it writes folder/NAME-STEP.jsonl (rows to look at, the wrong ones first) and, of classes,
  folder/NAME-STEP-confusion.json and the picture folder/NAME-confusion.png of the last run.
  """

  start = False  # whether the loop also runs it before the first step

  def __init__(
    self,
    name: str,
    every: int,
    *,
    predict: Callable[[Any, Mapping[str, jax.Array]], jax.Array],
    grader: Any,
    loss: Callable[[jax.Array, Mapping[str, jax.Array]], tuple] | None,
    batches,
    store,
    samples: int,
    folder: pathlib.Path | None,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, Any],
    progress: Callable[[], evaluators.Progress],
  ):
    """predict(params, batch) -> outputs as the grader (see `graders`) takes them; loss(outputs, batch) -> (loss sum,
    weight sum, ...) of the same outputs.

    `batches` is one pass without shuffling over `store`, of `whole_batch` rows, with row_examples(step). The store has
    texts(i) -> (input, ...) and where(i). `samples` rows are written; `progress` gives what is told how far a run is.
    """
    self.name, self.every = name, every
    self._predict, self._grader, self._loss = predict, grader, loss
    self._batches, self._store, self._mesh, self._rules = batches, store, mesh, rules
    self._samples, self.folder, self._progress = samples, folder, progress
    self.gives = (*(("loss",) if loss else ()), *grader.gives, "examples")
    self.notes: tuple[str, ...] = ()  # of the last run
    self._rows = sharding.batch_sharding(mesh, rules)
    self._step = jax.jit(self._on_device, out_shardings=sharding.replicated(mesh))
    if len(store) == 0:
      raise InputError(f"eval/{name}: the evaluation data has no rows.")

  def _on_device(self, params, batch):
    output = self._predict(params, batch)
    sums = self._loss(output, batch)[:2] if self._loss else ()
    return self._grader.device(output, batch), sums

  def run(self, params, step: int) -> dict[str, float]:
    """Returns the values for `params`; writes the files, named after `step`.

    Raises NumbersError where a prediction is not a number, InputError where no example has a label.
    """
    found, sums = self._pass(params)
    ids = [i for i, f in enumerate(found) if f.truth is not None]
    if not ids:
      raise InputError(f"eval/{self.name}: not one of {len(found)} examples has a label; is it the test set?")
    graded = self._grader.grade([found[i] for i in ids], ids, self._store)
    self._tell(graded, len(found) - len(ids))
    values = dict(graded.values, examples=float(len(graded.error)))
    if self._loss:
      loss, weight = (math.fsum(x) for x in zip(*sums))  # float64, see LossEvaluator
      values = dict(loss=loss / weight, **values)
    if self.folder is not None and jax.process_index() == 0:
      self._write(step, graded)
    return values

  def _pass(self, params) -> tuple[list[graders.Found], list[tuple[float, ...]]]:
    """Returns what was found for each example, in the order of the store, and the sums of each batch."""
    host, hosts = sharding.feed(self._rows, self._batches.batch)
    progress, steps = self._progress(), self._batches.steps(1)
    found: list[graders.Found | None] = [None] * len(self._store)
    sums, waiting = [], collections.deque()
    with sharding.use(self._mesh, self._rules):
      for i in range(steps + WAITING - 1):
        if i < steps:
          rows = self._batches.host_batch(i, host, hosts)
          waiting.append(self._step(params, sharding.put_batch(rows, self._rows, self._batches.batch)))
        if i >= WAITING - 1:
          sent, sum_ = jax.device_get(waiting.popleft())
          sums.append(tuple(map(float, sum_)))
          self._take(i - WAITING + 1, sent, found)
          progress(i - WAITING + 2, steps)
    missing = [i for i, f in enumerate(found) if f is None]
    assert not missing, f"{len(missing)} examples are in no batch, such as {missing[:3]}"
    return found, sums

  def _take(self, step: int, sent: Mapping[str, np.ndarray], found: list) -> None:
    """Puts what was sent for the batch of `step` where its examples are."""
    broken = []
    for row, ids in enumerate(self._batches.row_examples(step)):
      for i, one in zip(ids, self._grader.examples(sent, row, ids)):
        assert found[i] is None, f"example {i} is in two batches"
        found[i] = one
        broken += [i] * self._grader.broken(one.output)
    if broken:
      places = ", ".join(self._store.where(i) for i in broken[:3])
      raise NumbersError(
        f"eval/{self.name}: the model's outputs are not numbers for {len(broken)} examples of a batch: {places}"
        f"{', ...' if len(broken) > 3 else ''}. Try model.dtype=float32; if that does not help, the weights themselves "
        "are broken."
      )

  def _tell(self, graded: graders.Graded, unlabelled: int) -> None:
    notes = graded.notes
    if unlabelled:
      notes = (*notes, f"{unlabelled} of {unlabelled + len(graded.error)} examples have no label and are not scored")
    for note in notes if notes != self.notes else ():
      log.warning("eval/%s: %s", self.name, note)
    self.notes = notes

  def _write(self, step: int, graded: graders.Graded) -> None:
    if self._samples > 0:
      rows = [graded.row(i) for i in chosen(graded.error, self._samples)]
      lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
      self._save(f"{self.name}-{step}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
    if graded.confusion is not None:
      labels = self._grader.labels
      table = pictures.per_class(graded.confusion, labels)
      facts = dict(step=step, labels=labels, rows="label", columns="predicted", matrix=graded.confusion.tolist())
      text = json.dumps(dict(facts, classes=table), ensure_ascii=False)
      self._save(f"{self.name}-{step}-confusion.json", text.encode("utf-8", "backslashreplace"))
      title = f"{self.name}, step {step}"
      self._save(f"{self.name}-confusion.png", pictures.confusion(graded.confusion, labels, title=title))

  def _save(self, name: str, data: bytes) -> None:
    path = self.folder / name
    fresh = path.with_name(f".{name}.tmp")
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      fresh.write_bytes(data)
      os.replace(fresh, path)
    except OSError as e:
      raise StorageError(f"eval/{self.name}: {path} cannot be written: {e}. Make room or check who may write.") from e


def chosen(error: np.ndarray, most: int) -> list[int]:
  """Returns at most `most` rows to look at: wrong ones spread from the worst to the least wrong, then right ones.

  `error` is f[N], 0 where a row is right. Where fewer are wrong than asked for, right ones spread over the data follow.
  """
  wrong = np.flatnonzero(error > 0)
  wrong = wrong[np.argsort(-error[wrong], kind="stable")]
  first = _spread(wrong, most)
  return [*first, *_spread(np.flatnonzero(error == 0), most - len(first))]


def _spread(rows: np.ndarray, most: int) -> list[int]:
  return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))].tolist()
