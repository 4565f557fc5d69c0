r"""GPT-2, trained on: language modelling on raw text, documents packed into rows of 1,024 tokens.

python -m jaxft.main --config=configs/gpt2_lm.py --workdir=runs/lm --config.data.train='texts/*.txt.gz'
python -m jaxft.main --config=configs/gpt2_lm.py --workdir=runs/lm          (WikiText-2, from the Hub)
python -m jaxft.main --config=configs/gpt2_lm.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: 1.52 nats a byte token, 2.21 bits a byte. The real size was not run.
"""

from jaxft import config, standin


def get_config(arg: str = ""):
  c = config.base()
  c.model.init = "openai-community/gpt2"
  c.task.update(kind="causal", input="{text}")
  data = "hub:Salesforce/wikitext/wikitext-2-raw-v1"
  c.data.update(train=f"{data}:train", validation=f"{data}:validation")
  c.data.lengths, c.epochs, c.batch = dict(inputs=1024), 3.0, 8
  c.optimizer.update(lr=5e-5, schedule="cosine", warmup=0.02, decay=0.1, b2=0.95)
  c.evals = dict(loss=dict(config.EVAL["loss"], every=100, batch=8))
  c.save.update(best="eval/loss/loss")
  return standin.apply(c, "gpt2", "stories") if arg == "tiny" else c
