"""What the data report says of single kinds of task: windows of questions, and what changes with each epoch."""

from typing import Any


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


def example(store: Any, batches: Any, tokenizer: Any) -> dict | None:
  """Returns an example as the model sees it, for the fields of report.make, where batches hide a part of it; else None.

  It is the first one of the first batch.
  """
  if batches.dynamic.batch is None and batches.dynamic.corrupt is None:
    return None
  batch, row = batches.host_batch(0, 0, 1), next(r for r, ids in enumerate(batches.row_examples(0)) if ids)
  of = lambda name, side: batch[name][row][batch[f"{side}_segments"][row] == 1]
  number, inputs = batches.row_examples(0)[row][0], of("inputs", "input")
  out = dict(id=number, where=store.where(number), input=tokenizer.decode([inputs], special=True)[0], target="")
  pieces = tokenizer.pieces(inputs)
  if batches.dynamic.corrupt:
    targets = of("targets", "target").tolist()
    return dict(
      out,
      inputs=inputs.tolist(),
      targets=targets,
      target_pieces=tokenizer.pieces(targets),
      learnt=[True] * len(targets),
    )
  learnt = (of("weights", "input") > 0).tolist()
  said = [f"{p}={t}" if on else p for p, t, on in zip(pieces, tokenizer.pieces(of("targets", "input")), learnt)]
  return dict(out, target=store.texts(number)[1], inputs=inputs.tolist(), target_pieces=said, learnt=learnt)
