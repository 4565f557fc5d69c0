"""What an evaluation of classes leaves in the report of a run, and the picture of the confusion matrix.

Catches: rows of labels that the report takes for generated texts, a picture that is left out, class names read as
formulas, a figure that grows with the number of classes, a row without examples that divides by zero.
"""

import base64
import re

import numpy as np
import pytest
import test_predict as p
from matplotlib.image import imread

from jaxft import display, observe, report
from jaxft.eval import graders, pictures


def test_a_run_with_classes(tmp_path):
  e = p.make(graders.Classes(("accuracy", "f1_macro"), p.CLASSES), tmp=tmp_path / "samples", loss=p.cross_entropy)
  w = observe.MetricsWriter(tmp_path, start=0, tensorboard=False)
  for step in (0, 20, 40):
    w.write(step, {"loss": 1.0, **{f"eval/task/{k}": v for k, v in e.run(p.table(3, seed=step), step).items()}})
  w.close()
  values = e.run(p.table(3, seed=40), 40)
  panels = [name for name, _ in report._panels({"run": observe.read_metrics(tmp_path)})]
  assert panels == ["loss", "accuracy (task)", "f1_macro (task)"], "no curve of how many examples there are"
  report.write(tmp_path, title="t", command="c", facts={})
  page, card = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
  found = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", page)]
  assert found[1:] == [(tmp_path / "samples" / "task-confusion.png").read_bytes()] and 'alt="task-confusion"' in page
  assert "(<samples/task-confusion.png>)" in card and f"| eval/task/f1_macro | {0:.0f}" in card
  assert f"{values['f1_macro']:.5g} | 40 |" in card and "| eval/task/examples | 23 | 23 | 40 |" in card
  assert "Samples: task-0<" in page and "Samples: task-40<" in page and "Samples: task-20<" not in page
  shown = report.before_and_after(tmp_path, 3)["task"]
  assert len(shown) == 3 and list(shown[0]) == ["input", "label", "predicted", "score"]
  assert shown[0]["label"] != shown[0]["predicted"] and "predicted" in display.examples("Examples of task", shown)


@pytest.mark.parametrize("count", [2, 20, 77, 300])
@pytest.mark.filterwarnings("error")
def test_picture(count, tmp_path):
  matrix = np.diag(np.arange(count)) + (np.arange(count * count) % 7 == 3).reshape(count, count)
  matrix[1] = 0
  names = ["\u4eba $x^_{$ " + "long " * (i % 9) for i in range(count)]
  (tmp_path / "x.png").write_bytes(pictures.confusion(matrix, names, title="a $x^_{$"))
  height, width, _ = imread(tmp_path / "x.png").shape
  assert 300 < height < 1800 and 300 < width < 1900
  if count == 77:
    dark = imread(tmp_path / "x.png")[..., :3].sum(axis=2) < 1.2
    assert 0.005 < dark.mean() < 0.3, "the diagonal and the names"


def test_per_class():
  first, second, third = pictures.per_class(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ("a", "b", "c"))
  assert first == pytest.approx(dict(label="a", precision=3 / 5, recall=3 / 4, f1=2 / 3, examples=4, predicted=5))
  assert second["f1"] == pytest.approx(8 / 11)
  assert third == dict(label="c", precision=0, recall=0, f1=0, examples=0, predicted=0)
