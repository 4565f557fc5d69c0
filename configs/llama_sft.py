r"""Llama 3.2 1B (or 3b, 8b, 70b), taught to answer: chats in the model's own template, loss on the answers alone.

python -m jaxft.main --config=configs/llama_sft.py --workdir=runs/sft --config.data.train=chats.jsonl \
  --config.data.validation=dev.jsonl                                     (messages, or prompt and completion)
python -m jaxft.plan --config=configs/llama_sft.py:8b --target=v5p:2x2x2    (what it needs, without the device)
python -m jaxft.main --config=configs/llama_sft.py:tiny --workdir=runs/tiny   (a small stand-in, offline)

Measured on 2 CPU cores: `:tiny`, 150 steps: loss 0.69 to 0.59 on unseen chats. The real size was not run.
"""

from jaxft import config, standin
from jaxft.errors import InputError, did_you_mean

SIZES = {"": "3.2-1B", "1b": "3.2-1B", "3b": "3.2-3B", "8b": "3.1-8B", "70b": "3.1-70B", "tiny": ""}


def get_config(arg: str = ""):
  if arg not in SIZES:
    raise InputError(f"configs/llama_sft.py:{arg} is no choice{did_you_mean(arg, SIZES)}; there is {', '.join(SIZES)}.")
  c = config.base()
  c.model.update(init=f"meta-llama/Llama-{SIZES[arg]}-Instruct", remat="block")
  c.task.update(kind="sft")
  data = "hub:HuggingFaceH4/no_robots"
  c.data.update(train=f"{data}:train", validation=f"{data}:test", too_long="drop", too_long_share=0.1)
  c.data.lengths, c.epochs, c.batch = dict(inputs=2048), 2.0, 16
  c.optimizer.update(lr=1e-5, schedule="cosine", warmup=0.03, b2=0.95)
  c.evals = dict(loss=dict(config.EVAL["loss"], every=100, batch=8))
  c.save.update(best="eval/loss/loss")
  return standin.apply(c, "llama", "chats") if arg == "tiny" else c
