r"""BERT on STS-B: how much do two sentences mean the same, from 0 to 5? Regression by squared error.

python -m jaxft.main --config=configs/bert_stsb.py --workdir=runs/stsb        (bert-base-uncased and GLUE, from the Hub)
python -m jaxft.main --config=configs/bert_stsb.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: Pearson 0.07: not learnt in so few steps from fresh weights. 1,000 STS-B
pairs, MiniLM, 3 epochs: Pearson 0.67 (Trainer 0.64; 0.6 to 0.74 over three seeds), means of three seeds:
docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-uncased"
  column = "{score}" if arg == "tiny" else "{label}"
  c.task.update(kind="regress", input="{sentence1}", pair="{sentence2}", label=column)
  c.data.update(train="hub:nyu-mll/glue/stsb:train", validation="hub:nyu-mll/glue/stsb:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128), 3.0, 12
  c.optimizer.update(lr=5e-5, warmup=0.1, decay=0.01)
  c.evals = dict(regress=dict(config.EVAL["regress"], every=100))
  c.save.update(best="eval/regress/pearson", mode="max")
  return standin.apply(c, "bert", "similarity") if arg == "tiny" else c
