r"""T5: English to French on built-in data, from the starter weights or from a checkpoint of the Hub.

python -m jaxft.main --config=configs/t5.py --workdir=runs/t5              (starter weights in the package; no network)
python -m jaxft.main --config=configs/t5.py:scratch --workdir=runs/fresh   (the same model from fresh weights)
python -m jaxft.main --config=configs/t5.py:t5-base --workdir=runs/base --config.data.train=my.jsonl
"""

import json
import pathlib

from jaxft import config
from jaxft.errors import InputError, did_you_mean

STARTER = pathlib.Path(config.__file__).parent / "assets" / "starter" / "config.json"
HUB = {f"t5-{size}": f"google-t5/t5-{size}" for size in ("small", "base", "large", "3b", "11b")}
for kind, name in (("flan-t5", "flan-t5"), ("v1_1", "t5-v1_1"), ("mt5", "mt5"), ("byt5", "byt5")):
  HUB |= {f"{kind}-{size}": f"google/{name}-{size}" for size in ("small", "base", "large", "xl", "xxl")}


def get_config(arg: str = ""):
  c = config.base()
  c.data.update(train="builtin:cldr-en-fr:train", validation="builtin:cldr-en-fr:validation")
  c.data.lengths, c.save.best = dict(inputs=256, targets=256), "eval/loss/loss"
  c.evals = dict(
    loss=dict(config.EVAL["loss"], every=30, start=True, batch=16),
    generate=dict(config.EVAL["generate"], start=True, batch=100),
  )
  if arg in ("", "scratch"):
    fresh = dict(config=json.loads(STARTER.read_text()), tokenizer="builtin:starter")
    c.model.update(fresh if arg else dict(init="builtin:starter"))
    c.task, c.steps, c.batch = dict(kind="seq2seq", input="French: {input}", target="{target}"), 90, 8
    c.evals.loss.limit = c.evals.generate.limit = 200  # of 500 rows: the whole run takes two minutes on 2 cores
    c.optimizer.update(name="muon", lr=1e-2, schedule="linear", warmup=0.05, b1=0.95, b2=0.98)
  elif arg in HUB:  # dtype auto: bfloat16 on TPU and GPU; never float16, which T5's activations overflow
    c.model.update(init=HUB[arg], remat="block" if arg.endswith(("xl", "3b", "11b")) else "none")
    c.task, c.batch = dict(kind="seq2seq", input="translate English to French: {input}", target="{target}"), 32
    c.optimizer.update(name="adafactor", lr=1e-3, schedule="constant")  # as in arXiv 1910.10683, section 3.1.2
  else:
    raise InputError(f"configs/t5.py:{arg} is no choice{did_you_mean(arg, HUB)}; there is scratch, {', '.join(HUB)}.")
  return c
