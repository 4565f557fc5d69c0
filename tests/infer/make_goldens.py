"""Writes goldens/generate.json from transformers and torch: PYTHONPATH=. python tests/infer/make_goldens.py"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import numpy as np
import tiny
import transformers

FILE = pathlib.Path(__file__).parent.parent / "goldens" / "generate.json"


def main():
  model = tiny.torch_model(tiny.params(tiny.skeleton().shapes))
  out = {"transformers": transformers.__version__}
  for name, way in tiny.WAYS.items():
    tokens, scores = tiny.reference(model, way)
    eos = way.get("eos", (1,))
    out[name] = dict(
      tokens=[tiny.cut_at_end(t, eos) for t in tokens],
      scores=None if scores is None else [float(f"{s:.7g}") for s in np.asarray(scores, float)],
    )
  lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in out.items()]
  FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
