"""The README's picture: the default run from the starter weights and from fresh ones, evaluated every 25 steps.

python benchmarks/default_curves.py --workdir=runs/curves [--picture=docs/pictures/default.png]

Goes on with the runs that are in the work directory, so a second call only draws.
"""

import pathlib
import runpy

from absl import app, flags

from jaxft import main, report

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKDIR = flags.DEFINE_string("workdir", "runs/curves", "Folder for the two runs.")
PICTURE = flags.DEFINE_string("picture", str(ROOT / "docs" / "pictures" / "default.png"), "PNG file to write.")
RUNS = {"starter weights": "", "fresh weights": "scratch"}
SHOWN = ("loss", "eval/generate/chrf", "eval/generate/exact_match")


def run(_) -> None:
  folders = {}
  for name, argument in RUNS.items():
    c = runpy.run_path(str(ROOT / "configs" / "t5.py"))["get_config"](argument)
    c.evals.loss.every = c.evals.generate.every = 25
    c.evals.generate.limit = 100
    folders[name] = pathlib.Path(WORKDIR.value) / name.split()[0]
    main.train(c, str(folders[name]))
  report.curves(folders, PICTURE.value, title="English to French, the default run", only=SHOWN)


if __name__ == "__main__":
  app.run(run)
