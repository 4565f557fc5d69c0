r"""GPT-2 for sentiment: a label from the hidden state of the last token, or (:words) the word of the label as text.

python -m jaxft.main --config=configs/gpt2_sentiment.py --workdir=runs/gpt2         (gpt2 and IMDB, from the Hub)
python -m jaxft.main --config=configs/gpt2_sentiment.py:words --workdir=runs/words  (the model answers "positive")
python -m jaxft.main --config=configs/gpt2_sentiment.py:tiny --workdir=runs/tiny    (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: accuracy 0.96. The real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "openai-community/gpt2"
  text = "sentence" if arg.startswith("tiny") else "text"
  c.data.update(train="hub:stanfordnlp/imdb:train", validation="hub:stanfordnlp/imdb:test", too_long="truncate")
  c.data.lengths, c.epochs, c.batch = dict(inputs=512), 2.0, 8
  c.optimizer.update(lr=5e-5, warmup=0.06, decay=0.01)
  if arg in ("words", "tiny-words"):
    c.task.update(kind="sft", input=f"{{{text}}}\nsentiment:", target=" {label}")
    words = ("negative", "positive")  # IMDB has 0 and 1
    c.task.verbalizer = (*enumerate(words), *zip(words, words))
    c.evals = dict(words=dict(config.EVAL["rank"], every=500, limit=2000))
    c.save.update(best="eval/words/accuracy", mode="max")
  else:
    c.task.update(kind="classify", input=f"{{{text}}}")
    c.evals = dict(classify=dict(config.EVAL["classify"], every=500, limit=2000))
    c.save.update(best="eval/classify/accuracy", mode="max")
  return standin.apply(c, "gpt2", "sentiment") if arg.startswith("tiny") else c
