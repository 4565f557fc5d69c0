r"""Makes the starter weights of configs/t5.py: other languages and span corruption, never English to French.

python -m jaxft.main --config=configs/starter.py --workdir=runs/starter
cp runs/starter/export/model.safetensors jaxft/assets/starter/
"""

import json
import pathlib

from jaxft import config

STARTER = pathlib.Path(config.__file__).parent / "assets" / "starter" / "config.json"


def get_config(arg: str = ""):
  c = config.base()
  c.steps, c.batch = 800, 16

  c.model.config = json.loads(STARTER.read_text())
  c.model.tokenizer = "builtin:starter"
  c.model.dtype = "float32"

  c.task = dict(kind="seq2seq", input="{input}", target="{target}")
  c.data.train, c.data.validation = "builtin:cldr-pretrain:train", "builtin:cldr-pretrain:validation"
  c.data.lengths = dict(inputs=256, targets=256)

  c.optimizer.update(name="muon", lr=2e-2, schedule="linear", warmup=0.02, b1=0.95, b2=0.98)
  c.evals = dict(loss=dict(config.EVAL["loss"], every=500, batch=16))
  c.save.update(every=500, minutes=5.0)
  c.export.dtype = "bfloat16"  # halves what is shipped
  return c
