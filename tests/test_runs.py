"""What marks a run as ended, for those who follow it.

Catches: a run that died for good and is waited for, a finished run that a refused command makes look unfinished, a run
that a newer version cannot read.
"""

import json
import shutil

import pytest

from jaxft import config, modeling, runs
from jaxft.errors import InputError, NumbersError, Preempted, StorageError


@pytest.mark.parametrize(
  "error, says",
  [(NumbersError, "exit code 43"), (StorageError, "exit code 44"), (InputError, "done"), (Preempted, None)],
)
def test_done_after_each_ending(tmp_path, error, says):
  with runs.ending(tmp_path, True) as mark:
    mark("done", 7)
  with pytest.raises(error), runs.ending(tmp_path, True):
    assert not (tmp_path / "done.json").exists(), "a run that goes on has not ended"
    raise error("x")
  assert (json.loads((tmp_path / "done.json").read_text())["ended"] if says else None) == says
  assert says or not (tmp_path / "done.json").exists()


def test_only_the_main_process_marks(tmp_path):
  with runs.ending(tmp_path, False) as mark:
    mark("done", 7)
  assert list(tmp_path.iterdir()) == []


def test_a_run_of_an_older_jaxft_is_read(tmp_path):
  c = config.base()
  c.model.init = "builtin:starter"
  old = json.loads(config.to_json(c))
  del old["lora"], old["model"]["frozen_dtype"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  shutil.copytree(modeling.locate("builtin:starter"), tmp_path / modeling.FOLDER)
  given, m, _ = runs.run(str(tmp_path))
  assert given.lora.rank == 0 and m.skeleton.lora is None
