r"""Llama 3.1 8B (or 1b, 3b, 70b) by adapters: LoRA of rank 16 on all linear layers, the base in bfloat16 and frozen.

python -m jaxft.main --config=configs/llama_lora.py --workdir=runs/lora --config.data.train=chats.jsonl \
  --config.data.validation=dev.jsonl                                     (messages, or prompt and completion)
python -m jaxft.plan --config=configs/llama_lora.py --target=h100           (what it needs, without the device)
python -m jaxft.main --config=configs/llama_lora.py:tiny --workdir=runs/tiny  (a small stand-in, offline)

The run leaves a whole model in export/ and the adapters for PEFT in export/adapter (docs/adapters.md). Measured on 2
CPU cores: `:tiny`, 150 steps: loss 4.73 to 4.67 on unseen chats: little, since its base is of fresh weights and stands
still. The real size was planned (32.6 of the 72.7 GiB of an H100) and not run.
"""

from jaxft import config, standin
from jaxft.errors import InputError, did_you_mean

SIZES = {"": "3.1-8B", "1b": "3.2-1B", "3b": "3.2-3B", "8b": "3.1-8B", "70b": "3.1-70B", "tiny": ""}


def get_config(arg: str = ""):
  if arg not in SIZES:
    raise InputError(f"llama_lora.py:{arg} is no choice{did_you_mean(arg, SIZES)}; there is {', '.join(SIZES)}.")
  c = config.base()
  c.model.update(init=f"meta-llama/Llama-{SIZES[arg]}-Instruct", remat="block", frozen_dtype="bfloat16")
  c.lora.update(rank=16, alpha=32.0, dropout=0.05)
  c.task.update(kind="sft")
  data = "hub:HuggingFaceH4/no_robots"
  c.data.update(train=f"{data}:train", validation=f"{data}:test", too_long="drop", too_long_share=0.1)
  c.data.lengths, c.epochs, c.batch = dict(inputs=4096), 2.0, 8
  c.optimizer.update(lr=2e-4, schedule="cosine", warmup=0.03, b2=0.95)
  c.evals = dict(loss=dict(config.EVAL["loss"], every=100, batch=8))
  c.save.update(best="eval/loss/loss")
  return standin.apply(c, "llama", "chats") if arg == "tiny" else c
