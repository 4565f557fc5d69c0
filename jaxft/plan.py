"""Says before you rent what a run needs: python -m jaxft.plan --config=configs/llama_sft.py:8b --target=v5p:2x2x2

Compiles the real train step (or, with --decode, the decoder) for devices that need not be here, without weights and
data: memory by kind, whether it fits, time, cost. Targets: v5e:4x4, v5p:2x2x2, v6e:4x4 (pip install
'jaxft[tpu]'), h100x8, h200x8, a100x8, l4, b200x8 ('jaxft[gpu]'), cpu, cpux8. Exit code 1: it does not fit.
"""

import types

from absl import flags

from jaxft import cli


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    config=cli.define_config(),
    target=flags.DEFINE_string("target", "", "Devices to plan for, such as v5p:2x2x2, h100x8, cpu."),
    sweep_targets=flags.DEFINE_string("sweep_targets", "", "Several, for a table: v5e:4x4,h100x8, or all."),
    trials=flags.DEFINE_integer("trials", 4, "Changes that are compiled at most where it does not fit; 0: none."),
    examples=flags.DEFINE_integer("examples", 0, "Training examples, for the steps of a config that has epochs."),
    example_tokens=flags.DEFINE_integer("example_tokens", 0, "Mean tokens of one, for packed rows; 0: a row each."),
    price=flags.DEFINE_float("price", 0.0, "Price of a device and hour."),
    disk=flags.DEFINE_float("disk", 0.5, "GB/s that a host writes checkpoints with."),
    picture=flags.DEFINE_string("picture", "", "PNG file for the memory by kind."),
    decode=flags.DEFINE_bool("decode", False, "Plan batch decode with the model of the config, not training."),
    batch=flags.DEFINE_integer("batch", 16, "Decode: rows at a time."),
    length=flags.DEFINE_integer("length", 512, "Decode: tokens of a prompt."),
    new_tokens=flags.DEFINE_integer("new_tokens", 128, "Decode: tokens of an answer."),
    beams=flags.DEFINE_integer("beams", 1, "Decode: beams."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds

import math
import pathlib

from ml_collections import ConfigDict

from jaxft import observe
from jaxft.errors import InputError
from jaxft.planning import build, plans, show, targets


def run_of(c: ConfigDict, f: types.SimpleNamespace) -> show.Run:
  """Returns what a run is beside its step, from the config and the flags."""
  steps = c.steps
  if not steps and f.examples.value:
    tokens = f.examples.value * f.example_tokens.value
    rows = math.ceil(tokens / c.data.lengths["inputs"]) if c.data.pack and f.example_tokens.value else f.examples.value
    steps = math.ceil(c.epochs * math.ceil(rows / c.batch))
  saves = steps / c.save.every if c.save.every else 0.0
  return show.Run(steps, f.price.value, saves, c.save.keep + bool(c.save.best), f.disk.value * 1e9, f.decode.value)


def main(f: types.SimpleNamespace) -> int:
  observe.setup_logging(None)
  c = cli.checked(f.config)
  names = [x for x in f.sweep_targets.value.split(",") if x]
  names = list(targets.SWEEP) if names == ["all"] else names
  if bool(f.target.value) == bool(names):
    raise InputError("--target=v5p:2x2x2 for one target, or --sweep_targets=v5e:4x4,h100x8 (or all) for a table.")
  wanted = [targets.parse(x) for x in names or [f.target.value]]
  for platform in {t.platform for t in wanted}:
    build.pick_platform(platform, max(t.devices for t in wanted if t.platform == platform))
  decode = None
  if f.decode.value:
    decode = plans.Decode(f.batch.value, f.length.value, f.new_tokens.value, f.beams.value)
  config_file, run = str(flags.FLAGS["config"].config_filename), run_of(c, f)
  found: dict[str, plans.Plan | str] = {}
  for t in wanted:
    try:
      found[t.name] = plans.plan(c, t, decode, f.trials.value)
    except InputError as e:
      if not names:
        raise
      found[t.name] = str(e)
  made = {k: p for k, p in found.items() if not isinstance(p, str)}
  print(show.table(found, run) if names else show.screen(config_file, made[f.target.value], run))
  if f.picture.value and made:
    pathlib.Path(f.picture.value).write_bytes(
      show.picture({k: p.after or p.estimate for k, p in made.items()}, f"{config_file}: memory of a device")
    )
    print(f"\n  picture          {f.picture.value}")
  return 0 if any(p.estimate.fits for p in made.values()) else 1


if __name__ == "__main__":
  cli.run(main, FLAGS)
