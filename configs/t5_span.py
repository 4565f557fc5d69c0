r"""T5's own training, continued on your texts: spans are hidden behind sentinels and written out again.

python -m jaxft.main --config=configs/t5_span.py --workdir=runs/span --config.data.train='texts/*.txt.gz' \
  --config.data.validation=dev.txt
python -m jaxft.main --config=configs/t5_span.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: loss 2.54 nats a token of the hidden spans. The real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google/t5-v1_1-base"
  c.task.update(kind="span_corruption")  # 15% of the tokens in spans of 3: pieces of 568 tokens become 512 and 114
  data = "hub:Salesforce/wikitext/wikitext-103-raw-v1"
  c.data.update(train=f"{data}:train", validation=f"{data}:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=512, targets=114), 1.0, 64
  c.optimizer.update(name="adafactor", lr=1e-3, schedule="constant")
  c.evals = dict(loss=dict(config.EVAL["loss"], every=500))
  c.save.update(best="eval/loss/loss")
  return standin.apply(c, "t5", "stories", inputs=192, targets=64) if arg == "tiny" else c
