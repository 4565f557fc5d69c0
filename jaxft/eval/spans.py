"""Scores of tags (spans, as seqeval) and of extracted answers (as SQuAD's official script).

Pure functions that return ({name: value}, notes) as those of `scores` do.
"""

import collections
import re
import string
from collections.abc import Sequence

from jaxft.errors import InputError
from jaxft.eval import scores

Span = tuple[str, int, int]  # type, first place, place after the last

TAG = re.compile(r"O|[BIES](-.*)?", re.DOTALL)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def check_tags(labels: Sequence[str]) -> None:
  """Raises InputError where `labels` are not tags of spans."""
  other = [t for t in labels if not TAG.fullmatch(t)]
  if other:
    raise InputError(
      f"metrics: spans need tags O, B-TYPE, I-TYPE (and E-TYPE, S-TYPE), but there are others such as {other[0]!r}. "
      "For tags that are no spans ask for token_accuracy; otherwise rename them."
    )


def find(tags: Sequence[str], strict: bool = False) -> list[Span]:
  """Returns the spans of a row of tags.

  Not strict, which is seqeval's default and that of the CoNLL script conlleval: a span begins at B and S, at I or E
  where none is open, and where the type changes; it ends after E and S, before B, S and O, and where the type changes.
  strict, which is seqeval's mode="strict" with scheme=IOB2: a span is B and the I of the same type that follow it;
  other I belong to none. A tag without a type has the type "_".
  """
  out: list[Span] = []
  if strict:
    at = 0
    while at < len(tags):
      end = at + 1
      if tags[at][0] == "B":
        while end < len(tags) and tags[end] == "I" + tags[at][1:]:
          end += 1
        out.append((tags[at][2:] or "_", at, end))
      at = end
    return out
  was, kind, begin = "O", "", 0
  for i, tag in enumerate([*tags, "O"]):
    now, new = tag[0], tag[2:] or "_"
    if was != "O" and (was in "ES" or now in "BSO" or new != kind):
      out.append((kind, begin, i))
    if now in "BS" or now != "O" and (was in "OES" or new != kind):
      begin = i
    was, kind = now, new
  return out


def tag(
  names: Sequence[str], predictions: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], labels: Sequence[str]
) -> scores.Scores:
  """Returns the scores of rows of tags out of `labels`; predictions and truth have the same lengths.

  A predicted span counts where type, begin and end are right. precision, recall and f1 are over all spans (micro), with
  `strict_` in the strict reading; `_macro` are means over the types that occur in labels or predictions; `_TYPE` those
  of one type; token_accuracy is the share of tags that are right. All are seqeval's numbers (1.2.2); its package is not
  used because its source distribution, the only one there is, does not install with today's setuptools.
  """
  names = scores.expand("tag", names, labels)
  if len(predictions) != len(truth) or any(len(p) != len(t) for p, t in zip(predictions, truth)):
    raise ValueError("predictions and labels differ in length")
  if not sum(map(len, truth)):
    raise InputError("metrics: there is not one tag to score; is the evaluation data empty?")
  right = sum(p == t for ps, ts in zip(predictions, truth) for p, t in zip(ps, ts))
  values, notes = dict(token_accuracy=right / sum(map(len, truth))), ()
  if set(names) - {"token_accuracy"}:
    check_tags(labels)
    counts = _count(predictions, truth, strict=False)
    values |= _parts("{}", sum(counts.values(), collections.Counter()))
    types = sorted({t[2:] or "_" for t in labels if t != "O"})
    by_type = {t: _parts("{}", counts[t]) for t in types}
    values |= {f"{p}_{t}": by_type[t][p] for t in types for p in scores.PARTS}
    met = [t for t in types if counts[t]]
    for p in scores.PARTS:
      values[f"{p}_macro"] = sum(by_type[t][p] for t in met) / len(met) if met else 0.0
    bare = [t for t in types if not counts[t]["true"]]
    if bare and any("_" in n and not n.startswith(("strict_", "token_")) for n in names):
      notes = (
        f"{len(bare)} of {len(types)} types have no span in the data ({', '.join(bare[:5])}"
        f"{', ...' if len(bare) > 5 else ''}); they are given as 0, and are in macro means only where predicted",
      )
  if any(n.startswith("strict_") for n in names):
    if any(t[0] in "ES" for t in labels):
      raise InputError(
        "metrics: strict_precision, strict_recall and strict_f1 are of IOB2 tags, but there are E and S."
      )
    values |= _parts("strict_{}", sum(_count(predictions, truth, strict=True).values(), collections.Counter()))
  return {n: values[n] for n in names}, notes


def _count(predictions, truth, strict: bool) -> dict[str, collections.Counter]:
  """Returns {type: how many spans are true, found, and both}; another type counts as none."""
  counts = collections.defaultdict(collections.Counter)
  for ps, ts in zip(predictions, truth):
    found, true = set(find(ps, strict)), set(find(ts, strict))
    for what, some in (("true", true), ("found", found), ("right", true & found)):
      for kind, _, _ in some:
        counts[kind][what] += 1
  return counts


def _parts(name: str, n: collections.Counter) -> dict[str, float]:
  precision = n["right"] / n["found"] if n["found"] else 0.0
  recall = n["right"] / n["true"] if n["true"] else 0.0
  f1 = 2 * n["right"] / (n["found"] + n["true"]) if n["found"] + n["true"] else 0.0
  return {name.format(p): v for p, v in zip(scores.PARTS, (precision, recall, f1))}


def normalize(text: str) -> str:
  """Returns `text` as SQuAD compares answers: lower case, no ASCII punctuation, no articles, single blanks."""
  return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer(prediction: str, references: Sequence[str]) -> tuple[float, float]:
  """Returns (exact match, F1), 0 to 1 each, of one answer: the best over the references.

  The rules of SQuAD 2.0's evaluate-v2.0.py: F1 is that of the bags of words of the normalised texts; references that
  normalise to nothing are left out; none left means that there is no answer, which only an empty prediction meets.
  """
  references = [r for r in references if normalize(r)] or [""]
  return max(_exact(prediction, r) for r in references), max(_f1(prediction, r) for r in references)


def squad(names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> scores.Scores:
  """Returns exact_match and f1 of answers, means over questions, 0 to 100 as SQuAD's scripts print them.

  has_answer_ and no_answer_ are the means over questions with and without an answer. The scripts of SQuAD 1.1 and 2.0
  agree on answers that are not articles or punctuation alone.
  """
  names = scores.expand("qa", names)
  if len(predictions) != len(references):
    raise ValueError(f"{len(predictions)} predictions for {len(references)} questions")
  if not len(references):
    raise InputError("metrics: there are no questions to score; is the evaluation data empty?")
  found = [answer(p, r) for p, r in zip(predictions, references)]
  answered = [any(map(normalize, r)) for r in references]
  values, notes = {}, ()
  for prefix, keep in (
    ("", [True] * len(found)), ("has_answer_", answered), ("no_answer_", [not a for a in answered])
  ):  # fmt: skip
    some = [f for f, k in zip(found, keep) if k]
    for i, name in enumerate(("exact_match", "f1")):
      values[prefix + name] = 100 * sum(f[i] for f in some) / len(some) if some else 0.0
    asked = [n for n in names if prefix and n.startswith(prefix)]
    if asked and not some:
      notes += (f"no question is of the kind of {' and '.join(asked)}, given as 0",)
  return {n: values[n] for n in names}, notes


def _exact(prediction: str, reference: str) -> float:
  return float(normalize(prediction) == normalize(reference))


def _f1(prediction: str, reference: str) -> float:
  ours, theirs = normalize(prediction).split(), normalize(reference).split()
  if not ours or not theirs:
    return float(ours == theirs)
  same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
  return 2 * same / (len(ours) + len(theirs))
