"""The data report: what was read, kept, cut and dropped and why, how long it is, how full the rows are, and one
example as the model sees it.
"""

import collections
import os
import textwrap

import numpy as np

from jaxft.data import notes
from jaxft.data.files import compact

LOOKED_AT = 4_000_000  # tokens a side that are searched for unknown ones
UNKNOWN_SHARE = 1e-4
ROWS_NAMED = 3  # in the text; the dict has up to ten
BEGIN, END = "\x01", "\x02"  # stand for brackets or colours while lines are cut
LABELS_SHOWN, BAR = 12, 30  # rows of the table of labels, characters of the longest bar
GREEN, YELLOW, DIM, OFF = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


def make(store, batches, tokenizer) -> dict:
  """Returns the report of a `store.Store`, its `pipeline.Batches` and its `tokens.Tokenizer` as plain values:
  `store.report` with `batches`, `example`, `unknown` and `warnings`.
  """
  out = dict(store.report, batches=batches.summary(), tokenizer=dict(name=tokenizer.name, size=tokenizer.size))
  out["prefixed"] = "scheme" in store.objective.options and getattr(tokenizer.encoder, "prefixed", False)
  out["anew"] = list(batches.dynamic.says)
  out["unknown"] = {s: store.share(s, tokenizer.unk, LOOKED_AT) for s in store.sides}
  ids = {s: store.tokens(s, 0).tolist() for s in store.sides}
  supervised = store.sides[-1]
  out["example"] = dict(
    id=0,
    where=store.where(0),
    input=tokenizer.decode([ids["inputs"]], special=True)[0],
    target=store.texts(0)[1],
    **ids,
    target_pieces=tokenizer.pieces(ids[supervised]),
    learnt=_learnt(store, len(ids[supervised])),
  )
  out["example"] = notes.example(store, batches, tokenizer) or out["example"]
  out["unknown_characters"] = (
    _unknown_characters(store, tokenizer) if max(out["unknown"].values()) > UNKNOWN_SHARE else []
  )
  out["warnings"] = _warnings(out)
  return out


def _learnt(store, length: int) -> list[bool]:
  """Returns which tokens of the first example are predicted."""
  if "weights" in store.aligned:
    return (store.gather("weights", np.array([0])) > 0).tolist()
  skipped = 0 if "targets" in store.sides else int(store.context[0])
  return [store.objective.weighted and i >= skipped for i in range(length)]


def _unknown_characters(store, tokenizer) -> list[str]:
  """Returns the commonest characters without a token, among the first examples that hold an unknown one."""
  counts: collections.Counter = collections.Counter()
  for i in range(min(len(store), 3000)):
    texts = store.texts(i) if len(store.sides) == 2 else ["".join(store.texts(i))]
    for side, words in zip(store.sides, texts):
      if (store.tokens(side, i) == tokenizer.unk).any():
        counts.update(words)
  characters = [c for c, _ in counts.most_common(1000)]
  return [c for c, ids in zip(characters, tokenizer.encode(characters)) if tokenizer.unk in ids][:8]


def _warnings(r: dict) -> list[str]:
  out = []
  if r["ends"] and r["eos"] is None:
    out.append("The tokenizer has no end-of-text token: the model cannot learn to stop.")
  elif r["ends"] and r["eos_last"] < 1:
    what = "targets" if "targets" in r["lengths"] else "examples"
    out.append(
      f"Only {r['eos_last']:.1%} of the {what} end with the end-of-text token (id {r['eos']}): the model learns to "
      "stop from those alone."
    )
  if r["pad"] is None:
    out.append("The tokenizer has no padding token; rows are filled with id 0, which is masked by the segment ids.")
  elif r["pad"] == r["eos"]:
    out.append(
      f"Padding and end-of-text are the same token (id {r['pad']}). Here padding is masked by position, so EOS is "
      "still learnt."
    )
  for s in r["lengths"]:
    if r["unknown"][s] > UNKNOWN_SHARE:
      which = f", such as {' '.join(map(repr, r['unknown_characters']))}" if r["unknown_characters"] else ""
      out.append(
        f"{r['unknown'][s]:.2%} of the {s[:-1]} tokens are unknown to the tokenizer: characters of the text that it "
        f"cannot represent{which}."
      )
  if r["nulls"]:
    out.append(f"{r['nulls']:,} fields were null and were read as empty text.")
  out += _headers(r) + _lopsided(r) + _boundaries(r) + _odd_labels(r)
  if r["batches"]["steps"] < 10:
    out.append(f"An epoch is only {r['batches']['steps']} steps; a smaller batch gives more updates.")
  return out


def _headers(r: dict) -> list[str]:
  return [
    f"The first line of {_names(file)} was taken as column names and not as a row: "
    f"{', '.join(repr(_middle(c, 60)) for c in cells)}. If that is a row, write a line of names above it."
    for file, cells in r["headers"].items()
  ]


def _lopsided(r: dict) -> list[str]:
  """Returns what length would fill a side of packed rows as well as the other."""
  fill = r["batches"]["fill"]
  if len(r["lengths"]) < 2:
    return []
  low, high = sorted(fill, key=fill.get)
  longest = min(r["percentiles"][low]["100"], r["lengths"][low])
  better = max(-(-longest // 8), round(r["lengths"][low] * fill[low] / fill[high] / 8)) * 8
  if not r["batches"]["pack"] or fill[low] > 0.6 * fill[high] or better > 0.8 * r["lengths"][low]:
    return []
  return [
    f"The {low} of packed rows are mostly padding ({fill[low]:.0%} full, {high} {fill[high]:.0%}): "
    f"--config.data.lengths.{low}={better} holds the same examples in less."
  ]


def _boundaries(r: dict) -> list[str]:
  """Returns what tokens did not fall where the texts meet."""
  counts, out = r["counts"], []
  if counts.get("straddling"):
    out.append(
      f"In {counts['straddling']:,} examples ({counts['straddling'] / counts['examples']:.1%}) one token holds the end "
      "of the prompt and the beginning of the answer. It is learnt with the answer; generation from the prompt alone "
      "begins otherwise. A space at the end of a prompt does that: move it to the beginning of the answer."
    )
  if counts.get("lost"):
    out.append(
      f"{counts['lost']:,} of {counts['words']:,} words give no token (invisible characters?); their tags are lost."
    )
  if r["prefixed"]:
    out.append(
      "Each word is tokenised as after a space, without which this tokenizer would glue words together; do the same "
      "where the model is used (add_prefix_space=True in transformers)."
    )
  return out


def _odd_labels(r: dict) -> list[str]:
  counts, out = r["label_counts"] or {}, []
  absent = [name for name, n in counts.items() if not n]
  if absent:
    shown = ", ".join(absent[:LABELS_SHOWN]) + (
      f" and {len(absent) - LABELS_SHOWN} more" if absent[LABELS_SHOWN:] else ""
    )
    out.append(f"{len(absent)} of {len(counts)} labels do not occur in this data: {shown}.")
  if 2 * len(counts) > max(20, r["examples"]):
    out.append(
      f"There are {len(counts):,} labels for {r['examples']:,} examples. Is task.label the right column? For "
      "quantities set task.kind=regress."
    )
  return out


def notice(report: dict) -> str:
  """Returns in one line what of a `store.report` was dropped, cut or perhaps lost to a header, or "" for nothing."""
  r = report
  parts = [f"dropped {d['count']:,} ({reason}; {_rows(d)})" for reason, d in r["dropped"].items()]
  parts += [
    f"cut {cut['count']:,} {side} ({r['tokens_lost'][side]:.2%} of all {side[:-1]} tokens; {_rows(cut)})"
    for side, cut in r["cut"].items()
    if cut["count"]
  ]
  said = ". ".join(filter(None, ["; ".join(parts), *_headers(r)]))
  return f"{r['source']}: {r['rows_read']:,} rows read, {r['rows_kept'] - _late(r):,} kept; {said}" if said else ""


def text(report: dict, *, width: int = 100, color: bool = False) -> str:
  """Returns the report for a terminal of `width` columns; `color` marks the supervised part instead of brackets."""
  r, lines = report, []
  lines += _wrap(f"Data report: {r['source']}", width)
  read = f"{r['rows_read']:,} rows read, {r['rows_kept'] - _late(r):,} kept"
  lines.append(
    f"  rows      {read}"
    + (f", {r['examples']:,} examples an epoch" if r["examples"] != r["rows_kept"] - _late(r) else "")
    + (f", each by one of {r['variants']} pairs of templates" if r["variants"] > 1 else "")
  )
  lines += _origins(r, width)
  for reason, drop in r["dropped"].items():
    lines += _wrap(
      f"  dropped   {drop['count']:,} ({drop['count'] / r['rows_read']:.2%}): {reason}; {_rows(drop)}", width
    )
  for task in r["tasks"]:
    named = "   ".join(f"{k} {_template(v)}" for k, v in task.items() if k not in ("first", "chat") and v)
    named = "of chats, the tokenizer's own" if task["chat"] else named
    lines += _wrap(f"  template  {named}", width)
  lines += _labels(r, width) + _table(r) + _cuts(r, width)
  lines += [part for line in notes.lines(r) for part in _wrap(line, width)] + _batches(r, width)
  lines += _example(r["example"], width, color)
  for warning in r["warnings"]:
    mark = f"{YELLOW}  warning {OFF}" if color else "  warning "
    first, *rest = _wrap(f"  warning   {warning}", width)
    lines += [mark + first[10:], *rest]
  return "\n".join(lines)


def _labels(r: dict, width: int) -> list[str]:
  """Returns a table of the labels with their shares, or what the numbers are like."""
  if r.get("numbers"):
    of = lambda key: ", ".join(f"{x:.4g}" for x in np.atleast_1d(r["numbers"][key]))
    return _wrap(
      f"  numbers   mean {of('mean')}, standard deviation {of('std')}, from {of('min')} to {of('max')}", width
    )
  if not r["label_counts"]:
    return []
  counts = r["label_counts"]
  total, most = max(1, sum(counts.values())), max(1, *counts.values())
  what = f" by {r['scheme']}" if r["scheme"] not in ("", "none") else ""
  lines = [f"  labels    {len(counts):,}{what}"]
  name_width = min(28, max(map(len, counts)))
  rows = list(counts.items()) if len(counts) <= LABELS_SHOWN else sorted(counts.items(), key=lambda x: -x[1])
  for name, n in rows[:LABELS_SHOWN]:
    bar = "#" * round(BAR * n / most)
    lines.append(f"    {_short(name, name_width):<{name_width}}{n:>10,}{n / total:>8.1%}  {bar}".rstrip())
  rest = len(rows) - LABELS_SHOWN
  return lines + (_wrap(f"    and {rest:,} more, down to {rows[-1][0]} ({rows[-1][1]:,})", width) if rest > 0 else [])


def _cuts(r: dict, width: int) -> list[str]:
  lines = []
  if "split" in r:
    documents, pieces = r["split"]["documents"], r["split"]["pieces"]
    what = f"{documents:,} documents longer than {r['lengths']['inputs']} into {pieces:,} pieces"
    end = "; what a piece begins with is context, from which nothing of it is predicted" if documents else ""
    return _wrap(f"  cut up    {what if documents else 'nothing'}{end}", width)
  for s, cut in r["cut"].items():
    if cut["count"]:
      share = f"{r['tokens_lost'][s]:.2%} of all {s[:-1]} tokens"
      lines += _wrap(f"  cut       {cut['count']:,} {s} ({cut['share']:.2%}), {share}; {_rows(cut)}", width)
  return lines or ([] if r["too_long"] == "drop" else ["  cut       nothing"])


def _batches(r: dict, width: int) -> list[str]:
  b, sides = r["batches"], list(r["batches"]["fill"])
  shapes = ", ".join("/".join(map(str, x)) for x in b["shapes"])
  how = f"packed {b['examples_a_row']:.1f} examples a row" if b["pack"] else "one example a row"
  even = ", each class drawn as often" if b["balance"] == "sampling" else ""
  lines = _wrap(
    f"  batches   {b['steps']:,} steps an epoch of {b['batch']} rows, {how}, {'/'.join(sides)} {shapes}{even}", width
  )
  fill = " and ".join(f"{b['fill'][s]:.1%} of the {s[:-1]}" for s in sides)
  lines += _wrap(f"  fill      {fill} positions hold real tokens", width)
  tokens = " and ".join(f"{n:,} {s[:-1]}" for s, n in r["tokens"].items())
  learnt = r["supervised"] if len(sides) == 1 else None
  part = f", {learnt:,} of them to be predicted" if learnt is not None else ""
  lines += _wrap(f"  tokens    {tokens} tokens an epoch{part}; tokenizer {r['tokenizer']['size']:,} ids", width)
  if r["ends"] == "inputs":
    bos = f"BOS (id {r['bos']}) once" if r["counts"].get("bos") else "no BOS"
    eos = f"EOS (id {r['eos']}) supervised in {r['eos_last']:.1%}" if r["eos"] is not None else "no EOS"
    pad = f"pad {r['pad']}" if r["pad"] is not None else "no pad (0 is filled in)"
    lines += _wrap(f"  special   {bos}, {eos}, {pad}; what is learnt follows from weights, never from ids", width)
  return lines


def _late(r: dict) -> int:
  """Returns the rows that were dropped for their length after the cache was built."""
  return sum(d["count"] for d in r["dropped"].values() if d.get("late"))


def _template(template) -> str:
  return repr(template if isinstance(template, str) else " + blank line + ".join(template))


def _rows(entry: dict) -> str:
  """Returns the first places of `entry`, with short names of files."""
  places = [p.rpartition(", ") for p in entry["rows"][:ROWS_NAMED]]
  return compact([f"{_names(file)}, {line}" for file, _, line in places]) + (
    "; ..." if entry["count"] > ROWS_NAMED else ""
  )


def _names(origin: str) -> str:
  return " + ".join(os.path.basename(p) if "/" in p and ":" not in p else p for p in origin.split(" + "))


def _origins(r: dict, width: int) -> list[str]:
  if len(r["origins"]) < 2:
    return []
  shown = r["origins"][:8]
  lines = [
    _short(
      f"    {_names(o['name'])}: {o['read']:,} read, {o['kept']:,} kept, "
      f"{o['examples'] / max(1, sum(x['examples'] for x in r['origins'])):.1%}"
      " of the examples",
      width,
    )
    for o in shown
  ]
  return lines + ([f"    and {len(r['origins']) - 8} more"] if len(r["origins"]) > 8 else [])


def _table(r: dict) -> list[str]:
  names = ["longest" if p == "100" else f"{p}%" for p in next(iter(r["percentiles"].values()))]
  head = "  lengths   " + "".join(f"{name:>9}" for name in (*names, "limit"))
  rows = [
    f"    {s:<8}" + "".join(f"{x:>9,}" for x in r["percentiles"][s].values()) + f"{limit:>9,}"
    for s, limit in r["lengths"].items()
  ]
  return [head, *rows]


def _example(e: dict, width: int, color: bool) -> list[str]:
  two = "targets" in e
  counts = f"{len(e['inputs'])} {'input tokens' if two else 'tokens'}" + (
    f", {len(e['targets'])} target tokens" if two else ""
  )
  lines = _wrap(f"  example   {_names(e['where'])}: {counts}", width)
  if two or not any(e["learnt"]):
    lines += _wrap("    input   " + _middle(e["input"], 5 * width), width)
  if not any(e["learnt"]):
    return [*lines, *_wrap("    label   " + _middle(e["target"], 2 * width), width)]
  shown = _wrap(f"    {'target' if two else 'tokens':<8}" + _marked(e["target_pieces"], e["learnt"]), width - 2)
  begin, end = (GREEN, OFF) if color else "[]"
  lines += [line.replace(BEGIN, begin).replace(END, end) for line in shown]
  what = "supervised, every token of the target" if two else "supervised"
  return [*lines, f"            {DIM}(green: {what}){OFF}" if color else f"            (in brackets: {what})"]


def _marked(pieces: list[str], learnt: list[bool]) -> str:
  """Returns the tokens with marks around each run that is learnt; of many, those around the first such run."""
  out = []
  for piece, here, before, after in zip(pieces, learnt, [False, *learnt], [*learnt[1:], False]):
    out.append((BEGIN if here and not before else "") + piece + (END if here and not after else ""))
  if len(out) > 60:
    start = max(0, min(learnt.index(True) - 20, len(out) - 60))
    head = [f"... {start} tokens ..."] if start else []
    rest = len(out) - start - 50
    within = END if learnt[start + 39] and learnt[start + 40] else ""  # a run goes on where it is not shown
    again = BEGIN if learnt[-11] and learnt[-10] else ""
    middle = [f"{within}... {rest} tokens ...{again}"]
    out = [*head, *out[start : start + 40], *middle, *out[-10:]]
  return " ".join(out)


def _wrap(line: str, width: int) -> list[str]:
  line = line.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
  return textwrap.wrap(line, width, subsequent_indent=" " * 12, drop_whitespace=True, break_on_hyphens=False) or [""]


def _middle(value: str, most: int) -> str:
  return value if len(value) <= most else f"{value[: most * 2 // 3]} ... {value[-most // 3 :]}"


def _short(value: str, most: int) -> str:
  return value if len(value) <= most else "..." + value[-(most - 3) :]
