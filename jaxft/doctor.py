"""Says what is here: python -m jaxft.doctor

Versions against the tested ranges, devices, which model families and heads there are, what is missing and what for, and
what will be slow on this machine.
"""

import types

from jaxft import cli

if __name__ == "__main__":
  FLAGS = cli.parse(
    types.SimpleNamespace, __doc__
  )  # --help and wrong flags need none of the imports below, which take seconds

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil

import jax
from packaging import specifiers

from jaxft import display, flops, modeling, observe
from jaxft.families import registry

EXTRAS = dict(  # package -> what it is for
  tensorflow="the input pipeline (training needs it, decoding does not)",
  datasets="data sources hub:NAME",
  tensorflow_datasets="data sources tfds:NAME",
  optuna="jaxft.sweep",
  torch="the tests that compare with transformers; jaxft itself never imports it",
)
TASKS = {head: [k for k, (h, _) in modeling.HEADS.items() if h == head] for head in registry.KINDS}


def requirements() -> list[tuple[str, str, str, str]]:
  """Returns (package, installed version, what is asked for, "", "missing" or "untested") of all that jaxft requires."""
  out = []
  for line in importlib.metadata.requires("jaxft") or ():
    name, wanted = re.match(r"([\w.-]+)(.*)", line.split(";")[0]).groups()
    marker = line.partition(";")[2]
    if "extra" in marker or (name == "tensorflow" and importlib.util.find_spec("tensorflow")):
      continue
    try:
      version = importlib.metadata.version(name)
      inside = specifiers.SpecifierSet(wanted.strip()).contains(version, prereleases=True)
      out.append((name, version, wanted.strip(), "" if inside else "untested"))
    except importlib.metadata.PackageNotFoundError:
      out.append((name, "", wanted.strip(), "missing"))
  return out


def families() -> str:
  """Returns the table of model types and the heads they have."""
  kinds = list(registry.KINDS)
  rows = [
    (name, *("x" if kind in family.heads else "" for kind in kinds)) for name, family in registry.FAMILIES.items()
  ]
  legend = [f"  {k:<9} {registry.KINDS[k]}: task {', '.join(TASKS[k]) or '(none)'}" for k in kinds]
  return "\n".join([display.table("Model families and their heads", ("model_type", *kinds), rows), *legend])


def remarks() -> list[str]:
  """Returns what is missing or will be slow here, a line each."""
  out = [f"{name} is missing: {what}." for name, what in EXTRAS.items() if importlib.util.find_spec(name) is None]
  if jax.default_backend() == "cpu":
    out.append("No accelerator: training runs on the CPU, in float32, which suits small models and tests.")
    out += (
      ["An NVIDIA GPU is here, but JAX does not see it: pip install 'jaxft[gpu]'."]
      if shutil.which("nvidia-smi")
      else []
    )
  cache = pathlib.Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser()
  place = next(p for p in (cache, *cache.parents) if p.exists())
  free = shutil.disk_usage(place).free / 1e9
  out += [f"{cache} (token and compile caches) has {free:.1f} GB left; $JAXFT_CACHE moves it."] if free < 10 else []
  return out


def main(_: types.SimpleNamespace) -> int:
  facts, device = observe.environment(), jax.devices()[0]
  peak, source = flops.peak(device, modeling.activations("auto"))
  rows = [
    ("python", facts["python"]),
    ("platform", facts["platform"]),
    ("cores", facts["cores"]),
    ("devices", facts["devices"]),
    ("activations", modeling.activations("auto").name),
    ("peak of a device", f"{peak:.3g} FLOP/s ({source})"),
  ]
  print(display.table("This machine", ("", ""), rows))
  print(display.table("Packages", ("package", "installed", "tested range", ""), requirements()))
  print(families())
  print("\n".join(["", "Remarks", *(f"  {line}" for line in remarks() or ["  Nothing is missing."])]))
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS)
