"""Pegasus (Zhang et al. 2020): config.json and names on the Hub.

Positions are sines, computed here; of files that hold them as a table, the table is compared with those and left out.
"""

import pathlib

import numpy as np

from jaxft import hub, safetensors
from jaxft.errors import InputError
from jaxft.families import bart
from jaxft.families.family import Family, Json
from jaxft.models import stack


def settle(json: Json, folder: pathlib.Path) -> Json:
  """Returns `json`; raises InputError where the folder has a table of positions that are not the sines used here."""
  for name in (n for n in hub.tensor_names(folder) if n.endswith("embed_positions.weight")):
    tensor = safetensors.read_folder(folder)[name]
    table = tensor.view().astype(np.float32)
    if table.ndim != 2 or np.abs(table - stack.sines(*table.shape)).max() > 0.01:  # half precision: 0.004
      raise InputError(
        f"{folder}: {name} is not the table of sines that a {json['model_type']} has. jaxft cannot use other positions."
      )
  return json


SHAPE = dict(pre=True, norm=False, sinusoidal=True)

FAMILY = Family(
  bart.given(0, 0, None, 1, **SHAPE),
  lambda c: bart.build(c, **SHAPE),
  bart.rules,
  bart.language("PegasusForConditionalGeneration"),
  default="lm",
  settle=settle,
)
