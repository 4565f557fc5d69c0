"""Exports a run as a Hugging Face folder: python -m jaxft.export --workdir=runs/t5 --output=t5-finetuned
[--checkpoint=best]

The folder loads with transformers' from_pretrained; adapters alone, for PEFT, are in its folder adapter. What was
written is read again, and the largest difference is printed.
"""

import types

from absl import flags

from jaxft import cli


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    workdir=flags.DEFINE_string("workdir", None, "Folder of the run."),
    output=flags.DEFINE_string("output", None, "Folder to write; must not exist yet, or be empty."),
    checkpoint=flags.DEFINE_string("checkpoint", "best", "best, latest or a step."),
    dtype=flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16; empty: as the run's config says."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds

import pathlib
from typing import Any

import jax
import numpy as np

from jaxft import hub, kinds, modeling, observe, runs, setup
from jaxft.errors import InputError, NumbersError
from jaxft.families import peft

ADAPTER = "adapter"  # in an exported folder


def write(
  m: modeling.Model, params: Any, folder: pathlib.Path, *, dtype: str, shard_gb: float, chat: str = ""
) -> float:
  """Writes `params` as a model folder, reads it again and returns the largest absolute difference.

  Adapters are part of the weights there; by themselves they go to folder/adapter, for PEFT. `chat` is a chat template
  in place of the tokenizer's own.
  """
  if m.skeleton.lora is not None:
    why = modeling.unshared(m)
    if why:
      observe.log.info("No PEFT folder is written: %s. The export holds the adapters as part of the weights.", why)
    else:
      peft.write(folder / ADAPTER, m.skeleton, params, m.trainable, m.base, m.mesh)
    m, params = modeling.whole(m, params)
  hub.save(
    folder,
    m.skeleton.rules,
    params,
    m.skeleton.json,
    dtype=dtype,
    shard_gb=shard_gb,
    generation_config=modeling.generation_config(m) or None,
    tokenizer_from=m.tokens_folder,
  )
  if chat and jax.process_index() == 0:
    (folder / kinds.CHAT).write_text(chat, encoding="utf-8")
  difference = hub.verify(folder, m.skeleton.rules, params)
  same = all(dtype == np.dtype(x.dtype).name for x in jax.tree.leaves(params))
  if not np.isfinite(difference) or (same and difference > 0):
    raise NumbersError(
      f"export: {folder} read again differs from the weights in memory by {difference}; it must not be used."
    )
  observe.log.info("Exported to %s as %s; read again, the largest difference is %g.", folder, dtype, difference)
  return difference


def export(folder: str, output: str, which: str, dtype: str) -> float:
  """Writes checkpoint `which` of the run in `folder` to `output`; returns the largest difference read back."""
  c, m, checkpointer = runs.run(folder)
  target = pathlib.Path(output)
  if target.exists() and any(target.iterdir()):
    raise InputError(f"--output={output} exists and is not empty; give another folder or remove it.")
  step = runs.pick(checkpointer, which)
  how = setup.export_options(c)
  observe.log.info("Exporting step %d of %s.", step, folder)
  return write(m, runs.weights(m, checkpointer, step), target, **{**how, "dtype": dtype or how["dtype"]})


def main(f: types.SimpleNamespace) -> int:
  if not f.workdir.value or not f.output.value:
    raise InputError("--workdir=RUN and --output=FOLDER are needed.")
  observe.setup_logging(None)
  export(f.workdir.value, f.output.value, f.checkpoint.value, f.dtype.value)
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
