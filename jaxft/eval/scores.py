"""Scores of predictions that are numbers: classes, several labels at once, real values; and perplexities.

Pure functions over numpy arrays. Each returns ({name: value}, notes): a note is a sentence about what a value leaves
out or could not be computed from. Scales are those of the sources, 0 to 1 unless said otherwise. `spans` scores tags
and extracted answers.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from jaxft.errors import InputError, did_you_mean
from jaxft.eval import metrics

Scores = tuple[dict[str, float], tuple[str, ...]]

PARTS = ("precision", "recall", "f1")
NAMES = dict(  # kind of task -> names; those of one tag type are added by `expand`
  classify=(
    "accuracy",
    "balanced_accuracy",
    "mcc",
    *PARTS,  # of class 1, where there are two
    *(f"{p}_{a}" for a in ("macro", "micro", "weighted") for p in PARTS),
  ),
  multilabel=("accuracy", *(f"{p}_{a}" for a in ("macro", "micro", "weighted", "samples") for p in PARTS)),
  regress=("mse", "rmse", "mae", "pearson", "spearman"),
  tag=(*PARTS, *(f"{p}_macro" for p in PARTS), *(f"strict_{p}" for p in PARTS), "token_accuracy"),
  qa=("exact_match", "f1", *(f"{w}_{m}" for w in ("has_answer", "no_answer") for m in ("exact_match", "f1"))),
)
GROUPS = dict(tag=dict(strict=tuple(f"strict_{p}" for p in PARTS), per_type=()))


def expand(kind: str, names: Sequence[str], labels: Sequence[str] = ()) -> tuple[str, ...]:
  """Returns `names`, metrics of the task `kind` whose label names are `labels`, with groups written out.

  Groups of tag: "strict", and "per_type", which is precision_TYPE, recall_TYPE and f1_TYPE of every type. Raises
  InputError for a name that is not known or that these labels do not have.
  """
  names = [names] if isinstance(names, str) else names
  groups = dict(GROUPS.get(kind, {}))
  known = [*NAMES[kind]]
  if kind == "tag":
    types = sorted({tag[2:] or "_" for tag in labels if tag != "O"})
    groups["per_type"] = tuple(f"{p}_{t}" for t in types for p in PARTS)
    if "per_type" in names and set(groups["per_type"]) & set(known):
      raise InputError(f"metrics: per_type cannot be given for types named {', '.join(types)}: f1_macro has a meaning.")
    known += groups["per_type"]
  out: dict[str, None] = {}
  for name in names:
    if name not in known and name not in groups:
      all_ = (*NAMES[kind], *groups)
      raise InputError(
        f"metrics: there is no {name!r} for {kind}{did_you_mean(name, (*known, *groups))}; there are {', '.join(all_)}."
      )
    if kind == "classify" and name in PARTS and len(labels) != 2:
      raise InputError(
        f"metrics: {name} alone is that of class 1 of two; with {len(labels)} classes ask for {name}_macro, "
        f"{name}_micro or {name}_weighted."
      )
    out |= dict.fromkeys(groups.get(name, (name,)))
  return tuple(out)


def classify(names: Sequence[str], predictions: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Scores:
  """Returns the scores of predicted classes i[N] against the true ones i[N], both in [0, C), C = len(labels).

  By scikit-learn with labels=range(C) and zero_division=0: a class without examples or predictions counts as 0 in macro
  means (and is named in a note). precision, recall, f1 alone are those of class 1 of two, as GLUE reports MRPC and QQP.
  balanced_accuracy is the mean recall of the classes that have examples. mcc is Matthews' correlation (GLUE: CoLA), 0
  where predictions or labels are of one class alone.
  """
  from sklearn import metrics as sk  # 2 s that a run without classes need not wait

  names = expand("classify", names, labels)
  predictions, truth = _rows(predictions, truth)
  _in_range(predictions, truth, len(labels))
  values = dict(accuracy=float(np.mean(predictions == truth)))
  with warnings.catch_warnings():  # both are said above
    warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true|A single label was found")
    values["balanced_accuracy"] = float(sk.balanced_accuracy_score(truth, predictions))
    values["mcc"] = float(sk.matthews_corrcoef(truth, predictions))
  for average in _averages(names):
    how = dict(average="binary", pos_label=1) if average == "" else dict(average=average, labels=range(len(labels)))
    found = sk.precision_recall_fscore_support(truth, predictions, zero_division=0, **how)
    values |= {p + ("_" + average if average else ""): float(x) for p, x in zip(PARTS, found)}
  empty = np.flatnonzero(np.bincount(truth, minlength=len(labels)) == 0)
  return _finite({n: values[n] for n in names}, len(truth)), _without_examples(labels, empty)


def confusion(predictions: np.ndarray, truth: np.ndarray, count: int) -> np.ndarray:
  """Returns i64[count, count]: entry [i, j] is how many examples of class i were predicted as class j."""
  predictions, truth = _rows(predictions, truth)
  _in_range(predictions, truth, count)
  return np.bincount(truth * count + predictions, minlength=count * count).reshape(count, count)


def multilabel(
  names: Sequence[str], probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], threshold: float = 0.5
) -> Scores:
  """Returns the scores of f[N, C] probabilities against truth [N, C] of 0 and 1; predicted is what exceeds `threshold`.

  By scikit-learn with zero_division=0. accuracy is that of whole rows (subset accuracy). `samples` means take the mean
  over rows; a row with neither labels nor predictions has 0 there, and a note counts such rows.
  """
  from sklearn import metrics as sk

  names = expand("multilabel", names, labels)
  probabilities, truth = _rows(probabilities, truth)
  if probabilities.shape != truth.shape or truth.shape[1:] != (len(labels),):
    raise ValueError(f"shapes {probabilities.shape} and {truth.shape} for {len(labels)} labels")
  chosen, truth = (probabilities > threshold).astype(int), (truth > 0.5).astype(int)
  values = dict(accuracy=float(np.mean((chosen == truth).all(axis=1))))
  for average in _averages(names):
    # one column is a binary target for scikit-learn, which has no means over samples or labels: name the label
    found = sk.precision_recall_fscore_support(
      *(np.pad(x, ((0, 0), (0, 1))) for x in (truth, chosen)),
      average=average,
      labels=range(len(labels)),
      zero_division=0,
    )
    values |= {f"{p}_{average}": float(x) for p, x in zip(PARTS, found)}
  notes = _without_examples(labels, np.flatnonzero(truth.sum(axis=0) == 0))
  bare = int(((truth + chosen).sum(axis=1) == 0).sum())
  if bare and any(n.endswith("_samples") for n in names):
    notes += (
      f"{bare} of {len(truth)} rows have neither labels nor predictions; they count as 0 in means over samples",
    )
  return _finite({n: values[n] for n in names}, len(truth)), notes


def regress(names: Sequence[str], predictions: np.ndarray, truth: np.ndarray) -> Scores:
  """Returns the scores of predicted values f[N] against the true ones f[N], computed in float64.

  mse, rmse and mae are in the unit of the labels (squared for mse); pearson and spearman, -1 to 1, are scipy's (GLUE:
  STS-B). A correlation of constant values does not exist: it is given as 0, with a note.
  """
  from scipy import stats

  names = expand("regress", names)
  predictions, truth = (x.astype(np.float64) for x in _rows(predictions, truth))
  error = predictions - truth
  mse = float(np.mean(np.square(error)))
  values, notes = dict(mse=mse, rmse=math.sqrt(mse), mae=float(np.mean(np.abs(error)))), ()
  flat = [what for what, x in (("predictions", predictions), ("labels", truth)) if np.all(x == x[0])]
  asked = [n for n in ("pearson", "spearman") if n in names]
  for name in asked:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="An input array is nearly constant")  # true of any untrained model
      values[name] = 0.0 if flat else float(dict(pearson=stats.pearsonr, spearman=stats.spearmanr)[name](
        predictions, truth).statistic)  # fmt: skip
  if flat and asked:
    notes = (f"the {' and '.join(flat)} of all {len(truth)} rows are equal, so {' and '.join(asked)} is given as 0",)
  return _finite({n: values[n] for n in names}, len(truth)), notes


def perplexities(nll: float, tokens: float, counts: Mapping[str, int] | None = None) -> dict[str, float]:
  """Returns loss and perplexity for the sum `nll` in nats over `tokens`, and those of words and bytes in `counts`.

  counts: {"words": n, "bytes": n}, one or both, of the text whose tokens `nll` sums. word_perplexity is exp(nll /
  words), byte_perplexity exp(nll / bytes), bits_per_byte nll / (bytes ln 2), as in EleutherAI's lm-evaluation-harness:
  the ones that compare between tokenizers.
  """
  out = dict(loss=nll / tokens, perplexity=metrics.perplexity(nll / tokens))
  for name, per in (counts or {}).items():
    if name not in ("words", "bytes") or not per > 0:
      raise ValueError(f"counts are numbers above 0 of words and bytes, not {name!r}: {per!r}")
    out[f"{name.removesuffix('s')}_perplexity"] = metrics.perplexity(nll / per)
    if name == "bytes":
      out["bits_per_byte"] = nll / (per * math.log(2))
  return out


def count_text(text: str) -> dict[str, int]:
  """Returns the `counts` of a text for `perplexities`: words between blanks, and bytes of UTF-8."""
  return dict(words=len(re.findall(r"\S+", text)), bytes=len(text.encode("utf-8", "surrogatepass")))


def _averages(names: Sequence[str]) -> list[str]:
  """Returns the averages that `names` ask for, "" for a bare precision, recall or f1."""
  split = [n.partition("_") for n in names]
  return list(dict.fromkeys(average for part, _, average in split if part in PARTS))


def _rows(predictions: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  predictions, truth = np.asarray(predictions), np.asarray(truth)
  if len(predictions) != len(truth):
    raise ValueError(f"{len(predictions)} predictions for {len(truth)} labels")
  if not len(truth):
    raise InputError("metrics: there are no rows to score; is the evaluation data empty?")
  return predictions, truth


def _in_range(predictions: np.ndarray, truth: np.ndarray, count: int) -> None:
  for what, x in (("label", truth), ("prediction", predictions)):
    bad = np.flatnonzero((x < 0) | (x >= count))
    if len(bad):
      raise InputError(
        f"metrics: {len(bad)} of {len(x)} rows have a {what} outside of 0 to {count - 1}, the first is {x[bad[0]]} in "
        f"row {bad[0] + 1}; there are {count} classes."
      )


def _without_examples(labels: Sequence[str], empty: np.ndarray) -> tuple[str, ...]:
  if not len(empty):
    return ()
  shown = ", ".join(str(labels[i]) for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
  return (f"{len(empty)} of {len(labels)} classes have no example ({shown}); they count as 0 in macro means",)


def _finite(values: dict[str, float], rows: int) -> dict[str, float]:
  bad = [n for n, v in values.items() if not math.isfinite(v)]
  if bad:
    raise InputError(
      f"metrics: {', '.join(bad)} of {rows} rows is not a finite number; look at the predictions and labels."
    )
  return values
