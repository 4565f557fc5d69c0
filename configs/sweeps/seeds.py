r"""How much of a difference is luck: the same config with five seeds, all of them trained to the end.

python -m jaxft.sweep --config=configs/t5.py --workdir=runs/seeds --sweep=configs/sweeps/seeds.py
"""


def get_sweep():
  return "seed=range(5) metric=eval/loss/loss mode=min"
