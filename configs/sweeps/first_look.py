r"""A first look at a new task: the learning rate by TPE, with what matters next; worse trials end early.

python -m jaxft.sweep --config=configs/t5.py --workdir=runs/sweep --sweep=configs/sweeps/first_look.py
"""


def get_sweep():
  return {
    "optimizer.lr": "log(1e-3, 3e-2)",  # a number: every value uses the same compiled step
    "optimizer.decay": [0.0, 0.01, 0.1],  # so is this
    "optimizer.warmup": [0.05, 0.1],  # part of the program: two values, two steps to compile
    "method": "tpe",
    "trials": 16,
    "metric": "eval/loss/loss",
    "mode": "min",
    "prune": "median",
  }
