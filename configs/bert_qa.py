r"""BERT on SQuAD: which words of the text are the answer? Long texts are read in overlapping windows.

python -m jaxft.main --config=configs/bert_qa.py --workdir=runs/qa         (bert-base-uncased and SQuAD, from the Hub)
python -m jaxft.main --config=configs/bert_qa.py --workdir=runs/qa2 --config.data.train=train-v2.0.json \
  --config.data.validation=dev-v2.0.json                                      (questions may have no answer)
python -m jaxft.main --config=configs/bert_qa.py:tiny --workdir=runs/tiny     (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: exact match 20, F1 24 of 100. 306 XQuAD questions, MiniLM, 3 epochs: F1
11.1 (Trainer 11.2; far too few to learn it), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-uncased"
  c.task.update(kind="qa")  # columns question, context, answers; windows overlap by task.stride=128 tokens
  c.data.update(train="hub:rajpurkar/squad:train", validation="hub:rajpurkar/squad:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=384), 2.0, 12
  c.optimizer.update(lr=3e-5, warmup=0.1, decay=0.01)
  c.evals = dict(qa=dict(config.EVAL["qa"], every=500))
  c.save.update(best="eval/qa/f1", mode="max")
  return standin.apply(c, "bert", "questions") if arg == "tiny" else c
