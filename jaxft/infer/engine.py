"""Engines: what runs a model over many rows that are there already, for files and for evaluation."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import sharding
from jaxft.errors import InputError, NumbersError


def bucket(n: int) -> int:
  """Returns the smallest of 16, 24, 32, 48, 64, 96, ... that is at least n: above 16, at most a third is padding."""
  size = 16
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


class Engine:
  """Runs over lists of rows: sorted by length, in batches of one compiled shape a length bucket.

  One batch computes while the one before it is turned into answers. With several hosts every host makes the same calls
  with the same rows, computes its share of each batch (rows lie along the mesh's batch axes), and gets all answers.

  A kind of engine has encode(texts) -> rows (or an InputError in place of one), settings(seed), `_traced(params, *
  arrays)`, which is compiled, `_dispatch`, which makes the arrays and calls `_run`, `_collect`, which makes answers of
  what comes back, and perhaps `_check`. An answer has `cut`, a list of bool, and record(scores).
  """

  def __init__(
    self,
    skeleton,
    tokenizer,
    *,
    batch: int,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, Any] | None = None,
  ):
    """`batch` counts rows over all devices, rounded up to what the mesh's batch axes need; no `mesh`: one device."""
    self.skeleton, self.tokenizer = skeleton, tokenizer
    self._mesh, self._rules = mesh, rules
    self._rows = sharding.batch_sharding(mesh, rules) if mesh is not None else None
    self._shards = math.prod(mesh.shape[a] for a in sharding.mesh_axes(mesh, rules, "batch")) if mesh is not None else 1
    self._batch = -(-batch // self._shards) * self._shards
    self.jitted = jax.jit(self._traced, out_shardings=sharding.replicated(mesh) if mesh is not None else None)

  def stream(
    self, params, rows: Sequence[Sequence], *, seed: int = 0, ids: Sequence[object] | None = None
  ) -> Iterator[tuple[list[int], list]]:
    """Yields (positions in `rows`, their answers) a batch, longest rows first: a lack of memory shows at once."""
    ids = range(len(rows)) if ids is None else ids
    lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
    if len(rows) and lengths.min() == 0:
      raise InputError(f"generation: input {ids[int(lengths.argmin())]!r} has no tokens at all; leave it out.")
    self._check(rows, lengths, ids)
    order = np.argsort(-lengths, kind="stable")
    size = min(self._batch, -(-max(len(rows), 1) // self._shards) * self._shards)
    waiting: collections.deque = collections.deque()
    for begin in range(0, len(rows), size):
      positions = order[begin : begin + size].tolist()
      waiting.append(
        (positions, self._dispatch(params, [rows[p] for p in positions], [ids[p] for p in positions], seed, size))
      )
      if len(waiting) > 1:
        yield self._collect(*waiting.popleft(), ids)
    while waiting:
      yield self._collect(*waiting.popleft(), ids)

  def _check(self, rows, lengths, ids) -> None:
    """Raises InputError where `rows`, of so many tokens, are not what the engine takes."""

  def _padded(self, rows: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (i32[size, T, n], segments i32[size, T]) of rows i32[length, n], whose first column is token ids."""
    T = bucket(max(map(len, rows)))
    T = min(T, self.skeleton.positions or T)
    tokens, segments = np.zeros((size, T, rows[0].shape[1]), np.int32), np.zeros((size, T), np.int32)
    tokens[..., 0] = self.tokenizer.pad or 0
    for i, row in enumerate(rows):
      tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments

  def _finite(self, outputs: Sequence[np.ndarray], ids: Sequence[object]) -> None:
    """Raises NumbersError where the outputs of a row are not all numbers; `ids` are those of the rows."""
    broken = [name for name, x in zip(ids, outputs) if not np.isfinite(x).all()]
    if broken:
      raise NumbersError(
        f"decode: the model's outputs are not numbers for {len(broken)} of {len(ids)} inputs, among them "
        f"{broken[:3]}. Try --dtype=float32; if that does not help, the weights themselves are broken."
      )

  def _run(self, params, *arrays: np.ndarray) -> Any:
    if self._mesh is None:
      return self.jitted(params, *arrays)
    place = lambda x: jax.make_array_from_callback(x.shape, self._rows, lambda index: x[index])
    with sharding.use(self._mesh, self._rules):
      return self.jitted(params, *map(place, arrays))
