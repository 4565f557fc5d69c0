"""The lengths of examples against those of a row: what is cut of two texts, and what is said of too long ones."""

from collections.abc import Mapping

import numpy as np

from jaxft.data.files import compact

PERCENTILES = (50, 90, 99, 100)


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
  """Returns how many tokens of two texts stay where `room` do: the longer is cut until both are the same, as
  transformers does.
  """
  short, long = sorted((a, b))
  if short + long <= room:
    return a, b
  long = max(short, room - short)
  if short + long > room:
    short = room // 2
    long = short + room % 2
  return (long, short) if a > b else (short, long)


def percentiles(raw: Mapping[str, np.ndarray]) -> dict:
  return {s: {str(p): int(np.percentile(x, p, method="higher")) for p in PERCENTILES} for s, x in raw.items()}


def said(percentiles: dict) -> str:
  names = "/".join(f"{p}" for p in PERCENTILES)
  return f"Tokens at the {names}th percentile: " + ", ".join(
    f"{s} {'/'.join(f'{v:,}' for v in p.values())}" for s, p in percentiles.items()
  )


def refusal(
  caps: Mapping[str, int], described: str, count: int, total: int, share: float, raw: Mapping[str, np.ndarray],
  lost: Mapping[str, float], first: list[str],
) -> str:  # fmt: skip
  """Returns what is said of `count` examples of `total` that are longer than `caps`, above the `share` that may be."""
  spread = percentiles(raw)
  flags = " ".join(
    f"--config.data.lengths.{s}={max(2, -(-spread[s]['100'] // 8) * 8)}" for s in caps if spread[s]["100"] > caps[s]
  )
  cuts = " and ".join(f"{lost[s]:.1%} of the {s[:-1]} tokens" for s in reversed(list(caps)))
  return (
    f"data: {count:,} of {total:,} examples ({count / total:.1%}) of {described} are longer than "
    "data.lengths "
    f"({', '.join(f'{s} {caps[s]}' for s in caps)}), above data.too_long_share={share:g}. "
    f"{said(spread)}. Truncation would cut {cuts}. "
    f"First: {compact(first)}. "
    f"Set {flags} to hold them all, or --config.data.too_long=truncate to cut them, or --config.data.too_long=drop "
    "to leave them out."
  )
