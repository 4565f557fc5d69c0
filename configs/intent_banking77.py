r"""RoBERTa on banking77: which of 77 things does a customer of a bank want?

python -m jaxft.main --config=configs/intent_banking77.py --workdir=runs/bank        (roberta-base, from the Hub)
python -m jaxft.main --config=configs/intent_banking77.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.92. 1,000 banking77 queries, MiniLM, 5 epochs: accuracy 0.466
(Trainer 0.443), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "FacebookAI/roberta-base"
  label = "{category}" if arg == "tiny" else "{label}"
  c.task.update(kind="classify", input="{text}", label=label)
  c.data.update(train="hub:PolyAI/banking77:train", validation="hub:PolyAI/banking77:test")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 10.0, 8
  c.loss.update(label_smoothing=0.1, class_weights="balanced")
  c.optimizer.update(lr=4e-5, warmup=0.1, decay=0.01)
  c.evals = dict(classify=dict(config.EVAL["classify"], every=200))
  c.save.update(best="eval/classify/accuracy", mode="max")
  return standin.apply(c, "bert", "intents") if arg == "tiny" else c
