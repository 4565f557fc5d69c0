r"""A frozen BERT with a new dense head: only `head` is trained, W2 tanh(W1 h + b1) + b2 on the first token.

python -m jaxft.main --config=configs/bert_frozen_head.py --workdir=runs/frozen      (bert-base-uncased, from the Hub)
python -m jaxft.main --config=configs/bert_frozen_head.py:tiny --workdir=runs/tiny   (a small stand-in, offline)
python -m jaxft.main --config=configs/bert_frozen_head.py:top2 ...                   (the top two layers learn too)

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.54 of a body of fresh weights, which is chance: the head needs
a trained body. The real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-uncased"
  c.model.head.update(width=256, act="tanh")
  c.task.update(kind="classify", input="{sentence}")
  c.data.update(train="hub:nyu-mll/glue/sst2:train", validation="hub:nyu-mll/glue/sst2:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 3.0, 8
  top = ((r"encoder/layers/(10|11)/.*", True),) if arg == "top2" else ()
  c.trainable = (*top, (r"head/.*", True), (r".*", False))
  c.optimizer.update(lr=1e-3, warmup=0.1)  # a head alone bears more than the 3e-5 of a whole model
  c.evals = dict(classify=dict(config.EVAL["classify"], every=500))
  c.save.update(best="eval/classify/accuracy", mode="max")
  return standin.apply(c, "bert", "sentiment", lr=1e-2) if arg == "tiny" else c
