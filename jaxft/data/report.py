"""The data report: what was read, kept, cut and dropped and why, how long it is, how full the rows are, and one
example as the model sees it.
"""

import collections
import os
import textwrap

from jaxft.data.files import compact
from jaxft.data.tasks import SIDES

LOOKED_AT = 4_000_000  # tokens a side that are searched for unknown ones
UNKNOWN_SHARE = 1e-4
ROWS_NAMED = 3  # in the text; the dict has up to ten
GREEN, YELLOW, DIM, OFF = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


def make(store, batches, tokenizer) -> dict:
  """Returns the report of a `cache.Store`, its `pipeline.Batches` and its `tokens.Tokenizer` as plain values:
  `store.report` with `batches`, `example`, `unknown` and `warnings`.
  """
  out = dict(store.report, batches=batches.summary(), tokenizer=dict(name=tokenizer.name, size=tokenizer.size))
  out["unknown"] = {s: store.share(s, tokenizer.unk, LOOKED_AT) for s in SIDES}
  ids = {s: store.tokens(s, 0).tolist() for s in SIDES}
  out["example"] = dict(
    id=0,
    where=store.where(0),
    input=tokenizer.decode([ids["inputs"]], special=True)[0],
    target=store.texts(0)[1],
    inputs=ids["inputs"],
    targets=ids["targets"],
    target_pieces=tokenizer.pieces(ids["targets"]),
  )
  out["unknown_characters"] = (
    _unknown_characters(store, tokenizer) if max(out["unknown"].values()) > UNKNOWN_SHARE else []
  )
  out["warnings"] = _warnings(out)
  return out


def _unknown_characters(store, tokenizer) -> list[str]:
  """Returns the commonest characters without a token, among the first examples that hold an unknown one."""
  counts: collections.Counter = collections.Counter()
  for i in range(min(len(store), 3000)):
    for side, words in zip(SIDES, store.texts(i)):
      if (store.tokens(side, i) == tokenizer.unk).any():
        counts.update(words)
  characters = [c for c, _ in counts.most_common(1000)]
  return [c for c, ids in zip(characters, tokenizer.encode(characters)) if tokenizer.unk in ids][:8]


def _warnings(r: dict) -> list[str]:
  out = []
  if r["eos"] is None:
    out.append("The tokenizer has no end-of-text token: the model cannot learn to stop.")
  elif r["eos_last"] < 1:
    out.append(
      f"Only {r['eos_last']:.1%} of the targets end with the end-of-text token (id {r['eos']}): the model learns to "
      "stop from those alone."
    )
  if r["pad"] is None:
    out.append("The tokenizer has no padding token; rows are filled with id 0, which is masked by the segment ids.")
  elif r["pad"] == r["eos"]:
    out.append(
      f"Padding and end-of-text are the same token (id {r['pad']}). Here padding is masked by position, so EOS is "
      "still learnt."
    )
  for s in SIDES:
    if r["unknown"][s] > UNKNOWN_SHARE:
      which = f", such as {' '.join(map(repr, r['unknown_characters']))}" if r["unknown_characters"] else ""
      out.append(
        f"{r['unknown'][s]:.2%} of the {s[:-1]} tokens are unknown to the tokenizer: characters of the text that it "
        f"cannot represent{which}."
      )
  if r["nulls"]:
    out.append(f"{r['nulls']:,} fields were null and were read as empty text.")
  out += _headers(r) + _lopsided(r)
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
  low, high = sorted(SIDES, key=fill.get)
  longest = min(r["percentiles"][low]["100"], r["lengths"][low])
  better = max(-(-longest // 8), round(r["lengths"][low] * fill[low] / fill[high] / 8)) * 8
  if not r["batches"]["pack"] or fill[low] > 0.6 * fill[high] or better > 0.8 * r["lengths"][low]:
    return []
  return [
    f"The {low} of packed rows are mostly padding ({fill[low]:.0%} full, {high} {fill[high]:.0%}): "
    f"--config.data.lengths.{low}={better} holds the same examples in less."
  ]


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
  )
  lines += _origins(r, width)
  for reason, drop in r["dropped"].items():
    lines += _wrap(
      f"  dropped   {drop['count']:,} ({drop['count'] / r['rows_read']:.2%}): {reason}; {_rows(drop)}", width
    )
  for task in r["tasks"]:
    lines += _wrap(f"  template  input {_template(task['input'])}   target {_template(task['target'])}", width)
  lines += _table(r)
  for s in SIDES:
    cut = r["cut"][s]
    if cut["count"]:
      share = f"{r['tokens_lost'][s]:.2%} of all {s[:-1]} tokens"
      lines += _wrap(f"  cut       {cut['count']:,} {s} ({cut['share']:.2%}), {share}; {_rows(cut)}", width)
  if r["too_long"] != "drop" and not any(r["cut"][s]["count"] for s in SIDES):
    lines.append("  cut       nothing")
  b = r["batches"]
  shapes = ", ".join("/".join(map(str, x)) for x in b["shapes"])
  how = f"packed {b['examples_a_row']:.1f} examples a row" if b["pack"] else "one example a row"
  lines += _wrap(
    f"  batches   {b['steps']:,} steps an epoch of {b['batch']} rows, {how}, inputs/targets {shapes}", width
  )
  lines += _wrap(
    f"  fill      {b['fill']['inputs']:.1%} of the input and {b['fill']['targets']:.1%} of the target positions hold "
    "real tokens",
    width,
  )
  lines += _wrap(
    f"  tokens    {r['tokens']['inputs']:,} input and {r['tokens']['targets']:,} target tokens an epoch; tokenizer "
    f"{r['tokenizer']['size']:,} ids",
    width,
  )
  lines += _example(r["example"], width, color)
  for warning in r["warnings"]:
    mark = f"{YELLOW}  warning {OFF}" if color else "  warning "
    first, *rest = _wrap(f"  warning   {warning}", width)
    lines += [mark + first[10:], *rest]
  return "\n".join(lines)


def _late(r: dict) -> int:
  """Returns the rows that were dropped for their length after the cache was built."""
  return sum(d["count"] for reason, d in r["dropped"].items() if reason.startswith("longer than data.lengths"))


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
  names = ["longest" if p == "100" else f"{p}%" for p in r["percentiles"][SIDES[0]]]
  head = "  lengths   " + "".join(f"{name:>9}" for name in (*names, "limit"))
  rows = [
    f"    {s:<8}" + "".join(f"{x:>9,}" for x in r["percentiles"][s].values()) + f"{r['lengths'][s]:>9,}" for s in SIDES
  ]
  return [head, *rows]


def _example(e: dict, width: int, color: bool) -> list[str]:
  pieces = e["target_pieces"]
  shown = pieces if len(pieces) <= 60 else [*pieces[:40], f"... {len(pieces) - 50} tokens ...", *pieces[-10:]]
  lines = _wrap(
    f"  example   {_names(e['where'])}: {len(e['inputs'])} input tokens, {len(e['targets'])} target tokens", width
  )
  lines += _wrap("    input   " + _middle(e["input"], 5 * width), width)
  target = _wrap("    target  " + " ".join(shown), width - 2)
  if color:
    target = [line[:12] + GREEN + line[12:] + OFF for line in target]
    return [*lines, *target, f"            {DIM}(green: supervised, every token of the target){OFF}"]
  target[0] = target[0][:12] + "[" + target[0][12:]
  target[-1] += "]"
  return [*lines, *target, "            (in brackets: supervised, every token of the target)"]


def _wrap(line: str, width: int) -> list[str]:
  line = line.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
  return textwrap.wrap(line, width, subsequent_indent=" " * 12, drop_whitespace=True, break_on_hyphens=False) or [""]


def _middle(value: str, most: int) -> str:
  return value if len(value) <= most else f"{value[: most * 2 // 3]} ... {value[-most // 3 :]}"


def _short(value: str, most: int) -> str:
  return value if len(value) <= most else "..." + value[-(most - 3) :]
