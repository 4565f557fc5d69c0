r"""BERT on MRPC: do two sentences say the same? Fine-tuning of everything with AdamW and a linear warm-up.

python -m jaxft.main --config=configs/bert_mrpc.py --workdir=runs/mrpc        (bert-base-uncased and GLUE, from the Hub)
python -m jaxft.main --config=configs/bert_mrpc.py:tiny --workdir=runs/tiny   (a small stand-in, offline)
python -m jaxft.main --config=configs/bert_mrpc.py --config.model.init=FOLDER --config.data.train=train.jsonl ...

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.41 to 0.83, F1 0.87. All of MRPC, MiniLM, 3 epochs, batch=14:
accuracy 0.784, F1 0.856 after 355 steps, 23 to 25 examples/s. 1,000 pairs: accuracy 0.717, F1 0.820 (Trainer 0.705,
0.816), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-uncased"
  c.task.update(kind="classify", input="{sentence1}", pair="{sentence2}")
  c.data.update(train="hub:nyu-mll/glue/mrpc:train", validation="hub:nyu-mll/glue/mrpc:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 3.0, 16  # a packed row holds 2.2 pairs: 35 of them a step
  c.optimizer.update(lr=5e-5, warmup=0.1, decay=0.01)
  c.evals = dict(classify=dict(config.EVAL["classify"], every=50, metrics=("accuracy", "f1")))
  c.save.update(best="eval/classify/f1", mode="max")
  return standin.apply(c, "bert", "pairs") if arg == "tiny" else c
