"""Metrics of generated text, by the libraries whose numbers people compare: sacrebleu and rouge-score.

Scales are the libraries' own: sacrebleu and chrf 0 to 100, ROUGE (f-measure) and exact match 0 to 1.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import sacrebleu

from jaxft.errors import InputError, did_you_mean

References = Sequence[str | Sequence[str]]  # one text or several a row

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CORPUS = dict(  # name -> how to make sacrebleu's metric
  sacrebleu=lambda: sacrebleu.BLEU(),
  sacrebleu_intl=lambda: sacrebleu.BLEU(tokenize="intl"),
  sacrebleu_zh=lambda: sacrebleu.BLEU(tokenize="zh"),
  sacrebleu_char=lambda: sacrebleu.BLEU(tokenize="char"),
  chrf=lambda: sacrebleu.CHRF(),
  chrf_word=lambda: sacrebleu.CHRF(word_order=2),
  ter=lambda: sacrebleu.TER(),
)
NAMES = (*CORPUS, *ROUGE, *(f"{r}_stem" for r in ROUGE), "exact_match")
GROUPS = dict(rouge=ROUGE, rouge_stem=tuple(f"{r}_stem" for r in ROUGE))


def expand(names: Sequence[str]) -> tuple[str, ...]:
  """Returns `names` with "rouge" and "rouge_stem" written out; raises InputError for one that is not known."""
  out: dict[str, None] = {}
  for name in names:
    if name not in NAMES and name not in GROUPS:
      known = (*NAMES, *GROUPS)
      raise InputError(f"metrics: there is no {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}.")
    out |= dict.fromkeys(GROUPS.get(name, (name,)))
  return tuple(out)


def compute(
  names: Sequence[str], outputs: Sequence[str], references: References
) -> tuple[dict[str, float], dict[str, str]]:
  """Returns ({name: value}, {name: signature}) for `outputs` against one or several references a row.

  Several references: sacrebleu's own rule; ROUGE and exact match take the best one a row. Raises InputError where there
  is nothing to compare (no rows, a row without references, all references blank) or a value is not finite.
  """
  many = [[r] if isinstance(r, str) else list(r) for r in references]
  _check(outputs, many)
  values, signatures = {}, {}
  names = expand(names)
  for name in names:
    if name in CORPUS:
      metric = CORPUS[name]()
      columns = [[r[i] if i < len(r) else None for r in many] for i in range(max(map(len, many)))]
      values[name] = float(metric.corpus_score(list(outputs), columns).score)
      signatures[name] = str(metric.get_signature())
  for stem in (False, True):
    kinds = tuple(n.removesuffix("_stem") for n in names if n.startswith("rouge") and n.endswith("_stem") == stem)
    for kind, value in _rouge(kinds, stem, outputs, many).items():
      name = kind + "_stem" * stem
      values[name] = value
      signatures[name] = f"rouge-score f-measure|stemmer:{'yes' if stem else 'no'}|tokens:a-z0-9" + (
        "|sentences:lines" if kind == "rougeLsum" else ""
      )
  if "exact_match" in names:
    values["exact_match"] = sum(exact(o, r) for o, r in zip(outputs, many)) / len(many)
    signatures["exact_match"] = "share of rows equal to a reference|outer blanks:ignored|case:mixed"
  bad = [n for n, v in values.items() if not math.isfinite(v)]
  if bad:
    raise InputError(
      f"metrics: {', '.join(bad)} of {len(many)} rows is not a finite number; look at the outputs and references."
    )
  return {n: values[n] for n in names}, {n: signatures[n] for n in names}


def exact(output: str, references: Sequence[str]) -> bool:
  """Returns whether `output` equals one of the references, blanks around them aside."""
  return output.strip() in {r.strip() for r in references}


def perplexity(loss: float) -> float:
  """Returns exp(loss) for a loss in nats a token, infinity where that exceeds a float."""
  return math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf


def _check(outputs, many) -> None:
  if len(outputs) != len(many):
    raise InputError(f"metrics: {len(outputs)} outputs but {len(many)} rows of references.")
  if not many:
    raise InputError("metrics: there are no rows to score; is the evaluation data empty?")
  bare = [i for i, r in enumerate(many) if not r]
  if bare:
    raise InputError(f"metrics: {len(bare)} of {len(many)} rows have no reference, the first is row {bare[0] + 1}.")
  if not any(text.strip() for r in many for text in r):
    raise InputError(
      f"metrics: all references of {len(many)} rows are blank; does the target template name the right field?"
    )


def _rouge(kinds: Sequence[str], stem: bool, outputs, many) -> dict[str, float]:
  if not kinds:
    return {}
  scorer = _scorer(tuple(kinds), stem)
  rows = [scorer.score_multi(r, o) for o, r in zip(outputs, many)]
  return {k: float(np.mean([row[k].fmeasure for row in rows])) for k in kinds}


@functools.cache
def _scorer(kinds: tuple[str, ...], stem: bool):
  from rouge_score import rouge_scorer  # brings nltk: 2 s that a run without ROUGE need not wait

  return rouge_scorer.RougeScorer(list(kinds), use_stemmer=stem)
