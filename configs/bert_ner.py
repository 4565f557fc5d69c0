r"""BERT for named entities: words with tags in IOB2, scored by spans.

python -m jaxft.main --config=configs/bert_ner.py --workdir=runs/ner --config.data.train=train.conll \
  --config.data.validation=dev.conll                                         (word TAB tag, blank line after a sentence)
python -m jaxft.main --config=configs/bert_ner.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: span F1 0.99. 1,000 WNUT-17 sentences, MiniLM, 5 epochs: span F1 0.410
(Trainer 0.413), means of three seeds: docs/results_tasks.md.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "google-bert/bert-base-cased"
  c.task.update(kind="tag")  # columns tokens and tags (or ner_tags); task.scheme="iob1" reads the older scheme
  c.data.update(train="hub:tner/wnut2017:train", validation="hub:tner/wnut2017:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=256), 5.0, 8
  c.optimizer.update(lr=5e-5, warmup=0.1, decay=0.01)
  c.evals = dict(tag=dict(config.EVAL["tag"], every=100))
  c.save.update(best="eval/tag/f1", mode="max")
  return standin.apply(c, "bert", "entities") if arg == "tiny" else c
