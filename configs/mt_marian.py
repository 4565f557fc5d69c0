r"""Marian (OPUS-MT), fine-tuned for translation in one field: English to German, scored by BLEU and chrF.

python -m jaxft.main --config=configs/mt_marian.py --workdir=runs/mt --config.data.train=mine.jsonl \
  --config.task.input='{en}' --config.task.target='{de}'
python -m jaxft.main --config=configs/mt_marian.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: loss 1.78, chrF 5, which is no translation yet. The
real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "Helsinki-NLP/opus-mt-en-de"
  data = "hub:bentrevett/multi30k"
  c.data.update(train=f"{data}:train", validation=f"{data}:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=128, targets=128), 5.0, 32
  c.loss.label_smoothing = 0.1
  c.optimizer.update(lr=2e-5, warmup=200)
  if arg == "tiny":
    c.task.update(kind="seq2seq", input="{prompt}", target="{completion}")
  else:
    c.task.update(kind="seq2seq", input="{en}", target="{de}")
  c.evals = dict(
    loss=dict(config.EVAL["loss"], every=200),
    generate=dict(config.EVAL["generate"], every=1000, beams=4, metrics=("sacrebleu", "chrf")),
  )
  c.save.update(best="eval/generate/sacrebleu", mode="max")
  return standin.apply(c, "marian", "instructions", inputs=64, targets=32) if arg == "tiny" else c
