"""Tries values of a config: python -m jaxft.sweep --config=configs/t5.py --workdir=runs/sweep
    --sweep="optimizer.lr=log(1e-4,1e-2) batch=[8,16] method=tpe trials=20 metric=eval/loss/loss mode=min prune=median"

One process trains all trials, each in a run folder of its own, and compiles again only where more changes than numbers.
The same command goes on where an earlier one stopped. --sweep takes a file too: configs/sweeps/*.py, docs/sweep.md.
"""

import types

from absl import flags

from jaxft import cli
from jaxft.data import feeding


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    sweep=flags.DEFINE_string("sweep", "", "File with get_sweep(), or NAME=VALUES ... as in docs/sweep.md."),
    workdir=flags.DEFINE_string("workdir", "", "Folder of the runs; empty: runs/sweep-CONFIG-TIME. Again: go on."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds
  feeding.start()

import pathlib
import time

from jaxft import main, tuning


def sweep(f: types.SimpleNamespace) -> int:
  c = cli.checked(f.config)
  name = pathlib.Path(str(flags.FLAGS["config"].config_filename).split(":")[0]).stem
  folder = f.workdir.value or f"runs/sweep-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  tuning.run(main.train, c, f.sweep.value, folder)
  return 0


if __name__ == "__main__":
  cli.run(sweep, FLAGS)
