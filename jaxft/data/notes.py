"""What the data report says of single kinds of task: windows of questions, and what changes with each epoch."""


def lines(r: dict) -> list[str]:
  """Returns lines for a report `r` (see report.make), not yet wrapped."""
  return _windows(r) + [f"  anew      {text}" for text in r["anew"]]


def _windows(r: dict) -> list[str]:
  c = r["counts"]
  if "questions" not in c:
    return []
  without = f" ({c['unanswerable']:,} without an answer)" if c["unanswerable"] else ""
  out = [
    f"  windows   {c['questions']:,} questions{without} in {c['windows']:,} windows, {c['holding']:,} of which hold "
    "the answer; the others learn that it is not there ([CLS])"
  ]
  if c["unheld"]:
    out.append(
      f"            {c['unheld']:,} answers are in no window as a whole: they are cut apart; raise task.stride or "
      "data.lengths.inputs"
    )
  return out
