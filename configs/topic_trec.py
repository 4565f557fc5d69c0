r"""DistilBERT on TREC: what kind of answer does a question want (6 classes)?

python -m jaxft.main --config=configs/topic_trec.py --workdir=runs/trec        (distilbert-base-uncased, from the Hub)
python -m jaxft.main --config=configs/topic_trec.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.99. 1,000 TREC questions, MiniLM, 4 epochs: accuracy 0.935
(Trainer 0.943), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "distilbert/distilbert-base-uncased"
  label = "{label}" if arg == "tiny" else "{coarse_label}"
  c.task.update(kind="classify", input="{text}", label=label)
  c.data.update(train="hub:CogComp/trec:train", validation="hub:CogComp/trec:test")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 4.0, 4
  c.data.balance = "sampling"  # ABBR has 86 of 5,452 questions
  c.optimizer.update(lr=5e-5, warmup=0.1, decay=0.01, layer_decay=0.9)
  c.evals = dict(classify=dict(config.EVAL["classify"], every=200))
  c.save.update(best="eval/classify/accuracy", mode="max")
  return standin.apply(c, "bert", "topics") if arg == "tiny" else c
