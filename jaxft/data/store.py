"""A token cache as a run sees it: examples under the lengths of the run.

Tokens are stored whole. The lengths are applied when a store is opened, in memory, from the stored lengths, so another
`data.lengths` or `data.too_long` costs nothing and a refusal for too long examples comes with the true lengths.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxft.data import limits
from jaxft.data.fields import Objective, Ragged, starts
from jaxft.data.files import compact, place
from jaxft.errors import InputError

POLICIES = ("error", "truncate", "drop")
NOTHING_LEFT = "nothing left to predict after truncation"
ONE_TOKEN = "one token, which predicts nothing"
BLOCK = 4096  # examples looked at together


class Store:
  """Tokenised examples, memory-mapped. Example ids run from 0 to len - 1 in the order of the source.

  A row that a mixture repeats has several ids; so has a row with several templates (`variants` ids in succession, of
  which an epoch takes one) and a document that is longer than `lengths` (its pieces in succession). `lengths[side]` is
  i32[N], after truncation; `supervised` i32[N] counts the tokens to be predicted, None where none are; `context` i32[N]
  the first tokens of an example that are no targets; `labels` are the names of labels or None, `class_counts` i64[C]
  how often each occurs; `report` is a dict for `report.text`; `pad`, `bos`, `eos` are the tokenizer's ids; `largest` is
  the largest id stored.
  """

  def __init__(
    self, folder, objective: Objective, lengths: Mapping[str, int], too_long: str, too_long_share: float, stride: int
  ):
    self.folder, self.objective, self.sides = pathlib.Path(folder), objective, objective.held
    self._how = dict(lengths), too_long, too_long_share, stride
    self.meta = m = json.loads((self.folder / "meta.json").read_text())
    self._check(lengths, too_long, stride)
    self.caps = {s: lengths[s] for s in self.sides}
    self.kind, self.pad, self.bos, self.eos, self.largest = (m[k] for k in ("kind", "pad", "bos", "eos", "largest"))
    self.labels, self.variants = (tuple(m["labels"]) if m["labels"] else None), m["variants"]
    self._open()
    slots = np.repeat(np.arange(m["stored"] // self.variants), np.array(self._repeats)[:: self.variants])
    self._stored = (slots[:, None] * self.variants + np.arange(self.variants)).reshape(-1)  # example id -> stored one
    self.report = self._cut_up(stride) if objective.split else self._apply(too_long, too_long_share)
    self.class_counts = self._class_counts()
    self.report |= self._facts()

  def __reduce__(self) -> tuple:
    """Another process opens the same files; what builds them, functions that do not pickle, stays behind."""
    plain = {k: None for k, v in self.objective._asdict().items() if callable(v)}
    return type(self), (self.folder, self.objective._replace(**plain), *self._how)

  @property
  def chats(self) -> bool:
    """Says whether a chat template made examples of this store, which then spell their end marks."""
    return any(t["chat"] for t in self.meta["tasks"])

  def _check(self, lengths: Mapping[str, int], too_long: str, stride: int) -> None:
    if not set(self.sides) <= set(lengths) <= {"inputs", "targets"} or min(lengths[s] for s in self.sides) < 2:
      raise InputError(
        f"config: data.lengths is {dict(lengths)}; a {self.meta['kind']} task has {' and '.join(self.sides)}, each at "
        "least 2 tokens."
      )
    if too_long not in POLICIES:
      raise InputError(f"config: data.too_long is {too_long!r}; it is one of {', '.join(POLICIES)}.")
    if self.objective.split and stride >= lengths[self.sides[0]] - 1:
      raise InputError(
        f"config: task.stride is {stride}, but a piece has only {lengths[self.sides[0]]} tokens (data.lengths.inputs); "
        "each must bring some that are new."
      )

  def _open(self) -> None:
    m, o = self.meta, self.objective
    here = set(m["fields"])
    self.aligned = {n: a for n, a in o.aligned.items() if n in here}
    self._values = {s: self._map(f"{s}.values", m["dtype"]) for s in self.sides}
    self._values |= {n: self._map(n, a.dtype) for n, a in self.aligned.items()}
    self._raw = {s: np.array(self._map(f"{s}.lengths", np.int32)) for s in self.sides}
    self._starts = {s: starts(self._raw[s]) for s in self.sides}
    self._text = {s: self._map(f"{s}.text.values", np.uint8) for s in ("input", "target")}
    self._text_starts = {s: starts(self._map(f"{s}.text.lengths", np.int32)) for s in self._text}
    self._lines, self._origins = self._map("lines", np.int64), self._map("origins", np.int32)
    self._rows, self._repeats = self._map("rows", np.int64), self._map("repeats", np.int32)
    self._scalars = {n: self._scalar(n, dtype) for n, dtype in o.scalars.items()}
    self._kept = {n: self._kept_field(n, dtype) for n, dtype in o.kept.items()}
    self._places = self._map("places", np.int32).reshape(-1, 4) if "places" in here else None
    self._counts = np.array(self._map("supervised", np.int32)) if "supervised" in here else None

  def _scalar(self, name: str, dtype: str) -> np.ndarray | Ragged:
    if name in self.meta["fields"]:
      return self._map(name, dtype)
    if f"{name}.lengths" in self.meta["fields"]:
      return Ragged(self._map(f"{name}.values", np.int32), np.array(self._map(f"{name}.lengths", np.int32)))
    values = self._map(f"{name}.values", dtype)
    return values.reshape(-1, self.meta["width"]) if self.meta["width"] > 1 else values

  def _kept_field(self, name: str, dtype: str) -> np.ndarray | Ragged:
    if name in self.meta["fields"]:
      return self._map(name, dtype)
    return Ragged(self._map(f"{name}.values", dtype), np.array(self._map(f"{name}.lengths", np.int32)))

  def _map(self, name: str, dtype) -> np.ndarray:
    path = self.folder / name
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

  def __len__(self) -> int:
    return len(self._stored)

  # ---- reading

  def tokens(self, name: str, i: int) -> np.ndarray:
    """Returns i32[length] of one example; a truncated one keeps its EOS or SEP by `objective.cut`."""
    return self.gather(name, np.array([i]))

  def gather(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Returns the tokens of a side (i32) or the values of an aligned field, of several examples in succession."""
    return self.values(name, self.index(self.aligned[name].side if name in self.aligned else name, ids))

  def values(self, name: str, index: np.ndarray) -> np.ndarray:
    """Returns the values of a side or field at places that `index` gave."""
    out = self._values[name][index]
    return out.astype(np.int32) if name in self.sides else out

  def index(self, side: str, ids: np.ndarray) -> np.ndarray:
    """Returns i64[sum of lengths]: where the tokens of several examples lie in the files of a side."""
    stored, lengths = self._stored[ids], self.lengths[side][ids]
    ends, begins = np.cumsum(lengths), self._starts[side][stored] + self._offset[ids]
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - lengths), lengths)
    raw = self._raw[side][stored]
    cut = raw > lengths
    if self.objective.cut == "end" and not self.objective.split and cut.any():
      last = self._starts[side][stored[cut]] + raw[cut] - 1
      kept = np.isin(self._values[side][last], self.meta["last"])
      at[ends[cut] - 1] = np.where(kept, last, at[ends[cut] - 1])
      if self._places is not None:
        self._close_up(at, stored, lengths, np.flatnonzero(cut & self._places[stored].any(axis=1)), raw)
    return at

  def _close_up(
    self, at: np.ndarray, stored: np.ndarray, lengths: np.ndarray, cut: np.ndarray, raw: np.ndarray
  ) -> None:
    """Takes out of pairs that are cut the ends of both texts, the longer one's first, in place of the end of all."""
    first = starts(lengths)
    for i in cut:
      a0, a1, b0, b1 = map(int, self._places[stored[i]])
      a, b = limits.longest_first(a1 - a0, b1 - b0, int(lengths[i]) - (int(raw[i]) - (a1 - a0) - (b1 - b0)))
      kept = [np.arange(0, a0 + a), np.arange(a1, b0 + b), np.arange(b1, raw[i])]
      at[first[i] : first[i + 1]] = self._starts["inputs"][stored[i]] + np.concatenate(kept)

  def scalar(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Returns [n] or [n, width] of several examples; of any number of labels f32[n, C], 1 for those that it has."""
    stored, values = self._stored[ids], self._scalars[name]
    if not isinstance(values, Ragged):
      return values[stored]
    out = np.zeros((len(stored), len(self.labels)), np.float32)
    lengths = values.lengths[stored]
    at = np.arange(lengths.sum()) + np.repeat(values.starts[stored] - starts(lengths)[:-1], lengths)
    out[np.repeat(np.arange(len(stored)), lengths), values.values[at]] = 1
    return out

  def kept(self, name: str, ids: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Returns a field of `objective.kept` of several examples: [n], or of any length a list of arrays."""
    stored, values = self._stored[ids], self._kept[name]
    if not isinstance(values, Ragged):
      return values[stored]
    first = values.starts
    return [values.values[first[i] : first[i + 1]] for i in stored]

  def stored_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns i64[n], the number of each example in the files, the same for repetitions of it."""
    return self._stored[ids]

  def prompt(self, i: int) -> np.ndarray:
    """Returns i32[n], what the model is given before it answers: the tokens before the first to be predicted."""
    tokens = self.tokens("inputs", i)
    if "weights" not in self.aligned:
      return tokens
    return tokens[: int(np.argmax(self.gather("weights", np.array([i])) > 0))]

  def answer(self, i: int) -> np.ndarray:
    """Returns i32[n], the first run of tokens to be predicted: what should follow `prompt`, its end mark included."""
    if "weights" not in self.aligned:
      return self.tokens(self.sides[-1], i)
    weights = np.append(self.gather("weights", np.array([i])) > 0, False)
    begin = int(np.argmax(weights))
    return self.tokens("inputs", i)[begin : begin + int(np.argmin(weights[begin:]))]

  def texts(self, i: int) -> tuple[str, str]:
    """Returns the rendered (input, target) of one example, whole."""
    row = self._stored[i]
    return tuple(
      bytes(self._text[s][self._text_starts[s][row] : self._text_starts[s][row + 1]]).decode("utf-8", "surrogatepass")
      for s in self._text
    )

  def share(self, name: str, token: int | None, most: int) -> float:
    """Returns the share of `token` among the first `most` tokens stored (0 where there is no such token)."""
    head = self._values[name][:most]
    return float(np.mean(head == token)) if token is not None and len(head) else 0.0

  def where(self, i: int) -> str:
    """Returns the file and line (or data set and row) of one example."""
    return self._place(self._stored[i])

  def row_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns i64[n], the number (of those kept) of the row that each example comes from."""
    return self._rows[self._stored[ids]]

  def _place(self, stored: int) -> str:
    origin = self.meta["origins"][self._origins[stored]]
    return place((origin["name"], origin["unit"]), int(self._lines[stored]))

  def _first(self, mask: np.ndarray) -> list[str]:
    """Returns the places of the first ten rows among the examples of `mask`; a row with several counts once."""
    one_a_row = np.unique(self._rows[self._stored[mask]], return_index=True)[1]
    return [self._place(stored) for stored in self._stored[mask][one_a_row[:10]]]

  def _count(self, mask: np.ndarray) -> int:
    """Returns how many rows the examples of `mask` come from."""
    return len(np.unique(self._rows[self._stored[mask]]))

  # ---- lengths

  def _cut_up(self, stride: int) -> dict:
    """Cuts what is longer than a row of the batch into pieces; returns the report."""
    side = self.sides[0]
    raw, cap = self._raw[side][self._stored].astype(np.int64), self.caps[side]
    report = self._report(raw={side: raw}, over={side: np.zeros(len(raw), bool)}, lost={side: 0.0}, too_long="split")
    pieces = 1 + np.maximum(0, -(-(raw - cap) // (cap - stride)))
    number = np.arange(pieces.sum()) - np.repeat(starts(pieces)[:-1], pieces)
    long = int((pieces > 1).sum())
    self._stored, raw = np.repeat(self._stored, pieces), np.repeat(raw, pieces)
    self._offset = number * (cap - stride)
    # a token that is alone at the end takes the one before it along, from which it is predicted
    self._offset -= (raw - self._offset == 1) & (number > 0)
    self.lengths = {side: np.minimum(raw - self._offset, cap).astype(np.int32)}
    self.context = np.where(number > 0, max(1, stride), 1).astype(np.int32)
    alone = self.lengths[side] < 2
    self._leave_out(report["dropped"], ONE_TOKEN, alone)
    self._finish(report)
    self.supervised = self.lengths[side] - self.context
    return report | dict(split=dict(documents=long, pieces=int(pieces[pieces > 1].sum())))

  def _apply(self, too_long: str, share: float) -> dict:
    """Decides on the examples over the lengths; returns the report."""
    self._offset = np.zeros(len(self._stored), np.int64)
    raw = {s: self._raw[s][self._stored] for s in self.sides}
    over = {s: raw[s] > self.caps[s] for s in self.sides}
    any_over = np.any(list(over.values()), axis=0)
    count, total = int(any_over.sum()), len(any_over)
    lost = {s: int(np.maximum(raw[s] - self.caps[s], 0).sum()) / max(1, int(raw[s].sum())) for s in self.sides}
    if too_long == "error" and count > share * total:
      raise InputError(
        limits.refusal(self.caps, self.meta["described"], count, total, share, raw, lost, self._first(any_over))
      )
    gone = np.repeat(any_over.reshape(-1, self.variants).any(axis=1), self.variants)
    if too_long == "drop":
      lost = {s: int(raw[s][gone].sum()) / int(raw[s].sum()) for s in self.sides}
    report = self._report(raw, over, lost, too_long)
    self.lengths = {s: np.minimum(raw[s], self.caps[s]) for s in self.sides}
    self.context = np.ones(total, np.int32)
    self._room_for_pairs(any_over)
    self.supervised = self._left(any_over)
    if too_long == "drop":
      most = ", ".join(f"{s} {self.caps[s]}" for s in self.sides)
      self._leave_out(report["dropped"], f"longer than data.lengths ({most})", gone)
    elif self.supervised is not None and count:
      nothing = self.supervised == 0
      if too_long == "error" and nothing.any():
        raise InputError(
          f"data: {int(nothing.sum()):,} of {total:,} examples of {self.meta['described']} have {NOTHING_LEFT} to "
          f"data.lengths ({self.caps}): {compact(self._first(nothing))}. Raise data.lengths.inputs (the longest has "
          f"{int(raw['inputs'].max()):,}), shorten these rows, or set --config.data.too_long=truncate or drop, which "
          "leave them out."
        )
      self._leave_out(
        report["dropped"], NOTHING_LEFT, np.repeat(nothing.reshape(-1, self.variants).any(axis=1), self.variants)
      )
    self._finish(report)
    return report

  def _left(self, over: np.ndarray) -> np.ndarray | None:
    """Returns i32[N], the tokens of each example to be predicted, after truncation of those in `over`."""
    if self._counts is None:
      return self.lengths["targets"] if "targets" in self.sides else None
    out = self._counts[self._stored]
    ids = np.flatnonzero(over)
    for some in (ids[i : i + BLOCK] for i in range(0, len(ids), BLOCK)):
      weights = self.gather("weights", some)
      out[some] = np.add.reduceat(weights > 0, starts(self.lengths["inputs"][some])[:-1], dtype=np.int32)
    return out

  def _room_for_pairs(self, over: np.ndarray) -> None:
    if self._places is None or not over.any():
      return
    a0, a1, b0, b1 = self._places[self._stored[over]].T
    added = int((self._raw["inputs"][self._stored[over]] - (a1 - a0) - (b1 - b0))[b1 > 0].max(initial=0))
    if self.caps["inputs"] < added + 2:
      raise InputError(
        f"config: data.lengths.inputs is {self.caps['inputs']}, but two texts come with {added} special tokens; at "
        f"least {added + 2} are needed."
      )

  def _leave_out(self, dropped: dict, reason: str, gone: np.ndarray) -> None:
    """Drops the examples of `gone`, and notes the rows of which none is left."""
    if not gone.any():
      return
    if gone.all():
      spread = limits.said(limits.percentiles({s: self._raw[s][self._stored] for s in self.sides}))
      raise InputError(f"data: all {len(gone):,} examples are left out: {reason}. {spread}.")
    dropped[reason] = dict(count=self._count(gone), rows=self._first(gone), late=True)
    self._stored, self._offset, self.context = self._stored[~gone], self._offset[~gone], self.context[~gone]
    self.lengths = {s: x[~gone] for s, x in self.lengths.items()}
    if not self.objective.split and self.supervised is not None:
      self.supervised = self.supervised[~gone]

  # ---- the report

  def _report(self, raw: dict, over: dict, lost: dict, too_long: str) -> dict:
    m, cut = self.meta, too_long != "drop"
    return dict(
      kind=self.kind, source=m["described"], origins=m["origins"], tasks=m["tasks"], rows_read=m["read"],
      rows_kept=m["kept"], dropped={k: dict(v) for k, v in m["drops"].items()}, nulls=m["nulls"], headers=m["headers"],
      lengths=self.caps, percentiles=limits.percentiles(raw), too_long=too_long,
      cut={
        s: dict(
          count=int(over[s].sum()) if cut else 0,
          share=float(over[s].mean()) if cut else 0.0,
          rows=self._first(over[s]) if cut else [],
        )
        for s in self.sides
      },
      tokens_lost=lost, eos_last=m["eos_share"] * (1 if self.objective.cut == "end" or not cut else float(
        np.mean(~np.any(list(over.values()), axis=0)))), pad=self.pad, bos=self.bos, eos=self.eos, largest=self.largest,
      folder=str(self.folder), seconds=m["seconds"], variants=self.variants, counts=m["counts"],
    )  # fmt: skip

  def _finish(self, report: dict) -> None:
    report |= dict(
      examples=len(self._stored) // self.variants,
      tokens={s: int(self.lengths[s].sum()) // self.variants for s in self.sides},
    )

  def _class_counts(self) -> np.ndarray | None:
    if not self.labels or self.objective.labelled not in self._scalars:
      return None
    values = self._scalars[self.objective.labelled]
    if isinstance(values, Ragged):
      times = np.bincount(self._stored, minlength=len(values.lengths))
      values = np.repeat(values.values, np.repeat(times, values.lengths))
    else:
      values = values[self._stored]
    return np.bincount(values, minlength=len(self.labels))

  def _facts(self) -> dict:
    out = dict(ends=self.objective.ends, labels=self.labels, scheme=self.meta.get("scheme", ""))
    counts = self.meta["label_counts"] if self.class_counts is None else self.class_counts.tolist()
    out["label_counts"] = dict(zip(self.labels, counts)) if self.labels else None
    out["supervised"] = None if self.supervised is None else int(self.supervised.sum()) // self.variants
    if not self.labels and self.objective.scalars.get("labels") == "float32":
      numbers = self.scalar("labels", np.arange(len(self))).astype(np.float64)
      stats = (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max))
      out["numbers"] = {k: f(numbers, axis=0).tolist() for k, f in stats}
    return out
