"""Writes tests/goldens/t5_*.npz: logits, loss and gradients of tiny T5s as transformers and torch compute them.

The weights are not in the files: tests/families/reference.py draws them.
Run where both are installed, and commit the files: `python -m tests.make_goldens`. The tests then need neither.
"""

import json
import pathlib

import numpy as np

from tests.families import reference

FOLDER = pathlib.Path(__file__).parent / "goldens"


def main() -> None:
  import torch
  import transformers

  for variant in reference.VARIANTS:
    model = reference.torch_model(variant)
    rows = reference.batch(reference.config(variant)["vocab_size"])
    out = reference.compute(model, rows)
    real = rows["target_segments"] > 0
    arrays = {f"grad:{n}": g for n, g in out["grads"].items()}
    about = dict(config=reference.config(variant), torch=torch.__version__, transformers=transformers.__version__)
    arrays |= dict(about=json.dumps(about), logits=out["logits"][real], loss=out["loss"])
    np.savez_compressed(FOLDER / f"t5_{variant}.npz", **arrays)


if __name__ == "__main__":
  main()
