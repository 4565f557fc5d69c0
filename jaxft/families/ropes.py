"""What of a config.json says where tokens are: the rotary embedding and the windows of a decoder's layers.

The rope is rope_theta with rope_scaling in older files, rope_parameters in those of transformers 5.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import InputError, did_you_mean
from jaxft.families import fields
from jaxft.models.rope import KINDS, Rope

FIELDS = dict(
  rope_theta=fields.maybe(fields.number()),
  rope_scaling=fields.maybe(fields.group()),
  rope_parameters=fields.maybe(fields.group()),
  partial_rotary_factor=fields.maybe(fields.number()),
  max_position_embeddings=fields.count(2048),
)
FULL, SLIDING = LAYERS = ("full_attention", "sliding_attention")  # entries of layer_types

NEEDED = dict(  # kind -> what its object must hold besides rope_type
  default=(),
  linear=("factor",),
  dynamic=("factor",),
  llama3=("factor", "low_freq_factor", "high_freq_factor"),
  yarn=("factor",),
)
OPTIONAL = dict(
  default=(),
  linear=(),
  dynamic=(),
  llama3=("original_max_position_embeddings",),
  yarn=(
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
  ),
)  # fmt: skip
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read(c: Mapping[str, Any], head_dim: int, theta: float, *, partial: bool = True) -> Rope:
  """Returns the rope of a config.json that has one for all layers; `theta` is the family's default. A family that
  always turns whole heads says so by `partial`.
  """
  return of(c.get("rope_scaling") or c.get("rope_parameters") or {}, c, head_dim, theta, partial=partial)


def of(given: Mapping[str, Any], c: Mapping[str, Any], head_dim: int, theta: float, *, partial: bool = True) -> Rope:
  """Returns the rope of one object of rope parameters; raises InputError on what it holds and jaxft does not know."""
  kind = given.get("rope_type", given.get("type", "default"))
  _check(given, kind)
  first = lambda *values: next(v for v in values if v is not None)
  share = first(given.get("partial_rotary_factor"), c.get("partial_rotary_factor"), 1.0)
  theta = float(first(given.get("rope_theta"), c.get("rope_theta"), theta))
  original = first(
    c.get("original_max_position_embeddings"),
    given.get("original_max_position_embeddings"),
    c["max_position_embeddings"],
  )
  dim = int(head_dim * share)
  if theta <= 0 or not 0 < share <= 1 or (dim == head_dim and dim % 2) or dim == 0:
    raise InputError(
      f"config.json: a rope needs rope_theta above 0 (it is {theta:g}), partial_rotary_factor above 0 and at most 1 "
      f"(it is {share:g}), and heads of an even dimension (it is {head_dim}, of which {dim} are turned)."
    )
  if share != 1 and not partial:
    raise InputError(
      f"config.json: partial_rotary_factor is {share:g}, but a {c['model_type']} turns whole heads: transformers "
      "ignores the field there, or fails. Remove it."
    )
  yarn = kind == "yarn"
  return Rope(
    dim=dim,
    theta=theta,
    kind=kind,
    factor=float(given.get("factor") or 1),
    original=original if kind in ("llama3", "yarn") else 0,
    low=float(given.get("low_freq_factor") or 0),
    high=float(given.get("high_freq_factor") or 0),
    fast=float(given.get("beta_fast") or 32) if yarn else 0.0,
    slow=float(given.get("beta_slow") or 1) if yarn else 0.0,
    truncate=first(given.get("truncate"), True),
    attention=_attention(given) if yarn else 1.0,
    limit=c["max_position_embeddings"] if kind == "dynamic" else 0,
  )


def _check(given: Mapping[str, Any], kind: Any) -> None:
  if kind not in KINDS:
    raise InputError(f"config.json: rope_type is {kind!r}{did_you_mean(kind, KINDS)}; jaxft knows {', '.join(KINDS)}.")
  known = (*ALWAYS, *NEEDED[kind], *OPTIONAL[kind])
  unknown = [f"{k}{did_you_mean(k, known)}" for k, v in given.items() if k not in known and v is not None]
  missing = [k for k in NEEDED[kind] if given.get(k) is None]
  if unknown or missing:
    parts = [f"{t} {', '.join(n)}" for t, n in (("unknown:", unknown), ("missing:", missing)) if n]
    raise InputError(f"config.json: the rope parameters of type {kind!r} are not understood; {'; '.join(parts)}.")
  numbers = {k: v for k, v in given.items() if k not in ("rope_type", "type", "truncate") and v is not None}
  wrong = [f"{k}={v!r}" for k, v in numbers.items() if type(v) not in (int, float) or v <= 0]
  if wrong:
    raise InputError(f"config.json: the rope parameters {', '.join(wrong)} are not numbers above 0.")
  if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
    raise InputError(
      f"config.json: low_freq_factor is {given['low_freq_factor']}, high_freq_factor {given['high_freq_factor']}; the "
      "first must be the smaller."
    )


def _attention(given: Mapping[str, Any]) -> float:
  """Returns yarn's factor on cos and sin (Peng et al. 2023, section 3.4, as transformers reads it)."""
  if given.get("attention_factor") is not None:
    return float(given["attention_factor"])
  scale = lambda m: 0.1 * m * math.log(given["factor"]) + 1 if given["factor"] > 1 else 1.0
  a, b = given.get("mscale"), given.get("mscale_all_dim")
  return scale(a) / scale(b) if a and b else scale(1)


def layers(c: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
  """Returns the type of each layer, of LAYERS: layer_types of the config.json, or `usual` where it has none."""
  found = list(usual if c["layer_types"] is None else c["layer_types"])
  if len(found) != c["num_hidden_layers"] or set(found) - set(LAYERS):
    raise InputError(
      f"config.json: layer_types has {len(found)} entries ({', '.join(sorted(set(found)))}); it needs "
      f"{c['num_hidden_layers']} (num_hidden_layers), each {' or '.join(LAYERS)}."
    )
  return found


def windows(kinds: Sequence[str], size: int | None) -> tuple[int, ...]:
  """Returns the window of each layer: `size` where its type is sliding, 0 (everything) elsewhere; () for none."""
  if SLIDING not in kinds:
    return ()
  if not size:
    raise InputError("config.json: there are layers of sliding attention, but sliding_window is not set.")
  return tuple(size if kind == SLIDING else 0 for kind in kinds)
