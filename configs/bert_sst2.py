r"""BERT on SST-2: is a sentence of a film review positive?

python -m jaxft.main --config=configs/bert_sst2.py --workdir=runs/sst2        (bert-base-uncased and GLUE, from the Hub)
python -m jaxft.main --config=configs/bert_sst2.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.78, MCC 0.56. 1,000 SST-2 phrases, MiniLM, 2 epochs: accuracy
0.791 (Trainer 0.786), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-uncased"
  c.task.update(kind="classify", input="{sentence}")
  c.data.update(train="hub:nyu-mll/glue/sst2:train", validation="hub:nyu-mll/glue/sst2:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 3.0, 8  # a packed row holds about 8 of its phrases
  c.optimizer.update(lr=3e-5, warmup=0.1, decay=0.01)
  c.evals = dict(classify=dict(config.EVAL["classify"], every=500, metrics=("accuracy", "f1", "mcc")))
  c.save.update(best="eval/classify/accuracy", mode="max")
  c.stop.update(metric="eval/classify/accuracy", mode="max", patience=5)
  return standin.apply(c, "bert", "sentiment") if arg == "tiny" else c
