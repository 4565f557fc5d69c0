r"""BART, taught to summarise: an article in, a few sentences out, scored by ROUGE.

python -m jaxft.main --config=configs/bart_summarize.py --workdir=runs/bart        (bart-base and XSum, from the Hub)
python -m jaxft.main --config=configs/bart_summarize.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: ROUGE-1 0.30, ROUGE-L 0.30. The real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "facebook/bart-base"
  c.task.update(kind="seq2seq", input="{document}", target="{summary}")
  data = "hub:EdinburghNLP/xsum"
  c.data.update(train=f"{data}:train", validation=f"{data}:validation", too_long="truncate")
  c.data.lengths, c.epochs, c.batch = dict(inputs=1024, targets=128), 3.0, 32
  c.loss.label_smoothing = 0.1
  c.optimizer.update(lr=3e-5, warmup=500, decay=0.01)
  c.evals = dict(
    loss=dict(config.EVAL["loss"], every=1000),
    generate=dict(config.EVAL["generate"], every=5000, limit=1000, beams=4, length=64, metrics=("rouge",)),
  )
  c.save.best = "eval/loss/loss"
  return standin.apply(c, "bart", "summaries", inputs=256, targets=64) if arg == "tiny" else c
