"""Pictures of an evaluation: the confusion matrix of 2 or of 100 classes."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft import display

COUNTED = 20  # classes up to which the counts are written into the cells
NAMED = 120  # classes up to which each has its name beside its row
LONGEST = 26  # characters of a name


def per_class(matrix: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
  """Returns for each class of the confusion matrix i[C, C] its name, precision, recall, f1, and how often it is the
  label and is predicted; 0 where there is nothing to divide by."""
  right, true, found = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
  share = lambda a, b: float(a / b) if b else 0.0
  return [
    dict(
      label=str(labels[c]),
      precision=share(right[c], found[c]),
      recall=share(right[c], true[c]),
      f1=share(2 * right[c], true[c] + found[c]),
      examples=int(true[c]),
      predicted=int(found[c]),
    )
    for c in range(len(labels))
  ]


def confusion(matrix: np.ndarray, labels: Sequence[str], *, title: str) -> bytes:
  """Returns a PNG of the confusion matrix i[C, C] (rows: label, columns: predicted), coloured by the share of its row.

  The colours rise with the square root of the share, so that rare confusions are seen. A row without examples is grey.
  """
  count = len(labels)
  rows = matrix.sum(axis=1, keepdims=True)
  shares = np.ma.masked_invalid(np.where(rows > 0, matrix / np.maximum(rows, 1), np.nan))
  side = min(3.4 + 0.42 * count, 6 + 0.045 * count, 12)  # inches; what a page of 1,100 pixels shows is still legible
  small = float(np.clip(72 * 0.62 * side / count, 4.5, 9))
  mpl = display.matplotlib()
  with mpl.rc_context({"font.size": 9}):
    figure = mpl.figure.Figure(figsize=(side + 1.2, side + 0.6), layout="constrained")
    axes = figure.add_subplot()
    colours = mpl.colormaps["Blues"].with_extremes(bad="#e4e4e4")
    image = axes.imshow(shares, cmap=colours, norm=mpl.colors.PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, shrink=0.7, ticks=(0, 0.01, 0.05, 0.2, 0.5, 1))
    bar.ax.set_yticklabels(("0", "1%", "5%", "20%", "50%", "100%"))
    bar.set_label("share of the examples of the label")
    if count <= NAMED:
      names = [_short(str(x)) for x in labels]
      axes.set_xticks(range(count), names, rotation=45 if count <= COUNTED else 90, fontsize=small, parse_math=False)
      axes.set_yticks(range(count), names, fontsize=small, parse_math=False)
      for tick in axes.get_xticklabels() if count <= COUNTED else ():
        tick.set(ha="right", rotation_mode="anchor")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if count <= COUNTED:
      for i, j in np.ndindex(count, count):
        dark = shares[i, j] is not np.ma.masked and shares[i, j] > 0.35
        axes.text(
          j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=small, color="white" if dark else "#222222"
        )
    else:
      axes.set_xticks(np.arange(-0.5, count), minor=True)
      axes.set_yticks(np.arange(-0.5, count), minor=True)
      axes.grid(which="minor", color="#e8e8e8", lw=0.4)
      axes.tick_params(which="minor", length=0)
    total = int(matrix.sum())
    accuracy = np.trace(matrix) / max(total, 1)
    figure.suptitle(
      f"{title}: accuracy {accuracy:.1%} of {total:,} examples", x=0.01, ha="left", fontsize=11, parse_math=False
    )
    out = io.BytesIO()
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in a script that the font lacks
      figure.savefig(out, format="png", dpi=130, bbox_inches="tight", pad_inches=0.1)
  return out.getvalue()


def _short(name: str) -> str:
  name = " ".join(name.split())
  return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\u2026"
