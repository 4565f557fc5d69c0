"""Evaluators: what the loop and the evaluation binary run on weights. Each has `name`, `every`, run(params, step).

The values do not depend on the batch size, on padding or on the number of hosts: sums over all tokens, one division.
"""

import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import sharding
from jaxft.errors import InputError, StorageError
from jaxft.eval import metrics, scores
from jaxft.infer.generate import Answer, Generator

log = logging.getLogger("jaxft")
Progress = Callable[[int, int], None]  # called with (done, of how many)


def whole_batch(batch: int, mesh: jax.sharding.Mesh, rules: Mapping[str, Any]) -> int:
  """Returns `batch` rounded up to rows that divide over the mesh; the rows too many are empty and weigh nothing."""
  ways = math.prod(mesh.shape[a] for a in sharding.mesh_axes(mesh, rules, "batch"))
  return -(-batch // ways) * ways


class LossEvaluator:
  """Cross-entropy of the targets: loss (nats a token), perplexity, accuracy, tokens; see `scores.perplexities` for
  those of words and bytes."""

  start = False  # whether the loop also runs it before the first step

  def __init__(
    self,
    name: str,
    every: int,
    *,
    skeleton,
    batches,
    loss_fn: Callable,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, Any],
    progress: Callable[[], Progress],
    counts: Callable[[], Mapping[str, int]] | None = None,
  ):
    """`batches` is one pass without shuffling, of `whole_batch` rows; loss_fn(model, batch, key) -> loss, weight, sums.

    The sums have "nll" (plain cross-entropy) and "correct", as those of train.losses, and with a second task beside it
    "nsp", "nsp_correct" and "nsp_weight", which become nsp_loss and nsp_accuracy. `progress` gives what is told how
    far a run is. `counts` gives the words and bytes, {"words": n, "bytes": n}, of the text whose tokens the loss
    predicts (see `count_text`); it is called once, when they are needed.
    """
    self.name, self.every = name, every
    self._skeleton, self._batches, self._loss_fn, self._mesh, self._rules = skeleton, batches, loss_fn, mesh, rules
    self._progress, self._counts = progress, functools.cache(counts) if counts else lambda: None
    example = dict(words=1, bytes=1) if counts else None
    self.gives = (*scores.perplexities(0.0, 1.0, example), "accuracy", "tokens")
    self._rows = sharding.batch_sharding(mesh, rules)
    self._step = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

  def _sums(self, params, batch):
    _, weight, sums = self._loss_fn(self._skeleton.bind(params), batch, None)
    return dict(sums, weight=weight)

  def run(self, params, step: int) -> dict[str, float]:
    """Returns the values for `params`; `step` only names them. Raises InputError where no token is supervised."""
    del step
    host, hosts = sharding.feed(self._rows, self._batches.batch)
    sums, progress, steps = [], self._progress(), self._batches.steps(1)
    with sharding.use(self._mesh, self._rules):
      for i in range(steps):
        rows = self._batches.host_batch(i, host, hosts)
        sums.append(self._step(params, sharding.put_batch(rows, self._rows, self._batches.batch)))
        if i >= 2:  # at most three batches wait on the devices
          sums[i - 2] = jax.device_get(sums[i - 2])
        progress(i + 1, steps)
    # float64 on the host from here: a float32 running sum stops counting single tokens at 2**24.
    sums = jax.device_get(sums)
    total = {k: math.fsum(float(s[k]) for s in sums) for k in sums[0]}
    if not total["weight"] > 0:
      raise InputError(
        f"eval/{self.name}: not one supervised token in {self._batches.steps(1)} batches; is the evaluation data empty?"
      )
    out = scores.perplexities(total["nll"], total["weight"], self._counts())
    out |= dict(accuracy=total["correct"] / total["weight"], tokens=total["weight"])
    if "nsp_weight" in total:
      out |= {f"nsp_{n}": total[k] / total["nsp_weight"] for n, k in (("loss", "nsp"), ("accuracy", "nsp_correct"))}
    return out


def count_text(store, decode: Callable[[list], list[str]]) -> dict[str, int]:
  """Returns words and bytes of the text that the model is to write: targets, answers, or documents, as cut.

  `decode` turns lists of ids into texts without special tokens. Of a document's piece what is given (`store.context`)
  is taken off, so that the space before the first predicted word counts.
  """
  total = dict.fromkeys(("words", "bytes"), 0)

  def add(ids: list, sign: int) -> None:
    for text in decode(ids):
      for name, n in scores.count_text(text).items():
        total[name] += sign * n

  for begin in range(0, len(store), 4096):
    ids = range(begin, min(begin + 4096, len(store)))
    if "weights" in store.aligned:
      weights = [store.gather("weights", np.array([i])) for i in ids]
      add([store.tokens("inputs", i)[w > 0] for i, w in zip(ids, weights)], 1)
    elif "targets" in store.sides:
      add([store.tokens("targets", i) for i in ids], 1)
    else:
      add([store.tokens("inputs", i) for i in ids], 1)
      add([store.tokens("inputs", i)[: store.context[i]] for i in ids], -1)
  return {k: max(1, n) for k, n in total.items()}


def answer_length(store, margin: float = 0.25) -> int:
  """Returns a limit of new tokens from the references of `store`: the longest, a quarter more, at least 8 more.

  A fixed small limit makes metrics those of stubs (transformers' default is 20 tokens).
  """
  longest = int((store.lengths["targets"] if "targets" in store.lengths else store.supervised).max())
  length = -(-(longest + max(8, int(longest * margin))) // 8) * 8
  log.info("generation: at most %d new tokens, from the longest reference (%d tokens) and a margin", length, longest)
  return length


class GenerateEvaluator:
  """Generates for every example and scores the text: the asked metrics, and

  limit_share (share of outputs that were stopped by the length limit and not by the end token), output_tokens (mean
  length).
  """

  start = False  # whether the loop also runs it before the first step

  def __init__(
    self,
    name: str,
    every: int,
    *,
    generator: Generator,
    store,
    names: Sequence[str],
    samples: int,
    folder: pathlib.Path | None,
    progress: Callable[[], Progress],
  ):
    """`store` has prompt(i) (what the model is given, i32), texts(i) -> (input, reference); `samples` rows go to
    folder/NAME-STEP.jsonl.

    `progress` gives what is told how far a run is.
    """
    self.name, self.every = name, every
    self._generator, self._store, self._samples, self.folder = generator, store, samples, folder
    self._progress = progress
    self._names = metrics.expand(names)
    self.gives = (*self._names, "limit_share", "output_tokens")
    self.signatures: dict[str, str] = {}  # of the last run
    if len(store) == 0:
      raise InputError(f"eval/{name}: the evaluation data has no rows.")

  def run(self, params, step: int) -> dict[str, float]:
    """Returns the values for `params`; writes the samples, named after `step`."""
    rows = [self._store.prompt(i) for i in range(len(self._store))]
    answers, done, progress = [None] * len(rows), 0, self._progress()
    for positions, batch in self._generator.stream(params, rows):
      for p, answer in zip(positions, batch):
        answers[p] = answer
      done += len(positions)
      progress(done, len(rows))
    references = [self._reference(i) for i in range(len(self._store))]
    outputs = [a.texts[0] for a in answers]
    values, signatures = metrics.compute(self._names, outputs, references)
    if signatures != self.signatures:
      log.info("eval/%s: %s", self.name, "; ".join(f"{k} is {v}" for k, v in signatures.items()))
      self.signatures = signatures
    values["limit_share"] = sum(a.cut[0] for a in answers) / len(answers)
    values["output_tokens"] = float(np.mean([a.lengths[0] for a in answers]))
    if values["limit_share"] > 0.05:
      log.warning(
        "eval/%s: %.0f%% of the outputs were stopped by the limit of %d tokens",
        self.name,
        100 * values["limit_share"],
        self._generator.options.length,
      )
    if self.folder is not None and self._samples > 0 and jax.process_index() == 0:
      self._write(step, answers)
    return values

  def _reference(self, i: int) -> str:
    """Returns the text that should be generated; of a chat, the answer that follows the prompt without its end mark."""
    if not getattr(self._store, "chats", False):
      return self._store.texts(i)[1]
    return self._generator.tokenizer.decode([self._store.answer(i)])[0].strip()

  def _write(self, step: int, answers: list[Answer]) -> None:
    """Writes rows spread evenly over the data, the same ones each time."""
    chosen = np.unique(np.linspace(0, len(answers) - 1, min(self._samples, len(answers))).round().astype(int))
    lines = []
    for i in chosen.tolist():
      text, reference = self._store.texts(i)[0], self._reference(i)
      lines.append(
        json.dumps(
          dict(
            id=i,
            input=text,
            reference=reference,
            output=answers[i].texts[0],
            score=answers[i].scores[0],
            cut=answers[i].cut[0],
          ),
          ensure_ascii=False,
        )
      )
    path = self.folder / f"{self.name}-{step}.jsonl"
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as e:
      raise StorageError(
        f"eval/{self.name}: the samples {path} cannot be written: {e}. Make room or check who may write."
      ) from e
