"""What a run tells. Catches: a token in any sink; a metrics file with lines twice, lost or half; wrong rates; a report
that shows nothing, breaks on odd text or needs another file."""

import json
import logging
import re
import subprocess
import sys
import time

import pytest

from jaxft import observe, report
from jaxft.errors import StorageError

CANARY = "hf_CanaryCanaryCanaryCanary1234"


@pytest.fixture
def handlers():
  root = logging.getLogger()
  before, level, hook = list(root.handlers), root.level, sys.unraisablehook
  yield
  sys.unraisablehook = hook
  root.handlers[:] = before
  root.setLevel(level)


def test_secrets_reach_no_sink(tmp_path, monkeypatch, capsys, handlers):
  monkeypatch.setenv("MY_API_KEY", "quite-unlike-a-token-77")
  observe.setup_logging(tmp_path)
  observe.log.info("with %s and quite-unlike-a-token-77", CANARY)
  try:
    raise ValueError(f"https://user:pass123@host/x {CANARY}")
  except ValueError:
    observe.log.exception("failed")
  report.write(
    tmp_path, title="t", command=f"HF_TOKEN={CANARY} python", facts=dict(a=dict(key="quite-unlike-a-token-77"))
  )
  text = capsys.readouterr().err + "".join(
    p.read_text() for p in tmp_path.iterdir() if p.suffix in (".txt", ".html", ".md")
  )
  assert "Canary" not in text and "quite-unlike" not in text and "pass123" not in text
  assert "[MY_API_KEY]" in text and "Traceback" in (tmp_path / "log.txt").read_text()


def test_console_is_short_and_the_file_is_full(tmp_path, capsys, handlers):
  observe.setup_logging(tmp_path)
  observe.setup_logging(tmp_path)
  observe.log.debug("detail")
  observe.log.info("news")
  logging.getLogger("noise").warning("of a library")
  logging.getLogger("asyncio").error("never retrieved")
  assert capsys.readouterr().err == "news\n"
  assert [w in (tmp_path / "log.txt").read_text() for w in ("detail", "news", "of a library")] == [True] * 3
  assert (tmp_path / "log.txt").read_text().count("news") == 1


def test_what_cannot_be_raised_goes_to_the_log(tmp_path, capsys, handlers):
  class Bad:
    def __del__(self):
      raise RuntimeError("in a destructor")

  observe.setup_logging(tmp_path)
  Bad()
  assert capsys.readouterr().err == "" and "in a destructor" in (tmp_path / "log.txt").read_text()


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
  with_ = lambda start: observe.MetricsWriter(tmp_path, start=start, tensorboard=True)
  w = with_(0)
  for s in (5, 10, 15):
    w.write(s, dict(loss=float(s), bad=float("nan")))
  w.close()
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 20, "lo')
  w = with_(10)
  w.write(15, dict(loss=1.5))
  w.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  assert [json.loads(line) for line in text.splitlines()] == [
    {"step": 5, "loss": 5.0, "bad": None},
    {"step": 10, "loss": 10.0, "bad": None},
    {"step": 15, "loss": 1.5},
  ]
  assert len(list((tmp_path / "tensorboard").iterdir())) >= 1
  with_(0).close()
  assert observe.read_metrics(tmp_path) == [], "a fresh run starts a fresh file"


def test_only_the_main_process_writes(tmp_path):
  o = observe.Observer(tmp_path / "x", steps=3, start=0, tensorboard=True, main=False)
  o.log(1, dict(loss=1.0))
  o.close()
  assert not (tmp_path / "x").exists()


def test_metrics_that_cannot_be_written(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(StorageError, match="metrics.jsonl"):
    observe.MetricsWriter(tmp_path, start=0, tensorboard=False)


def test_tensorboard_does_not_load_torch(tmp_path):
  code = (
    f"import sys; from jaxft import observe; w = observe.MetricsWriter({str(tmp_path)!r}, start=0, tensorboard=True);"
    "w.write(1, dict(loss=2.0)); w.close(); assert 'torch' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_meter_by_hand(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  m = observe.Meter(peak=20.0)
  m.batch(1, 30, 40, 0.5)
  m.batch(2, 50, 60, 0.5)
  m.batch(3, 999, 999, 0.0)
  m.done(1, 7, 6.0)
  m.done(2, 9, 6.0)
  m.exclude(6.0)
  now[0] = 110.0
  assert m.read(10) == dict(
    tokens_per_second=20.0,
    padded_tokens_per_second=25.0,
    target_tokens_per_second=4.0,
    step_time=2.0,
    data_wait=0.25,
    mfu=0.15,
    eta=20.0,
  )
  m.done(3, 1, 0.0)
  now[0] = 111.0
  rates = m.read(0)
  assert rates["tokens_per_second"] == 999.0 and rates["mfu"] is None, "no FLOPs, no MFU"


def test_progress_without_a_terminal(monkeypatch, caplog):
  caplog.set_level("INFO")
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  p = observe.Progress(100, 0)
  for step in range(1, 41):
    now[0] += 1
    p.update(step, dict(loss=1 / step, tokens_per_second=12345.6, eta=3700.0, mfu=None))
  p.close()
  told = [int(m) for m in re.findall(r"step (\d+)/100", caplog.text)]
  assert told == [1, 11, 21, 31, 40]
  assert "loss 0.025" in caplog.text and "12,346 tok/s" in caplog.text and "eta 1h01m" in caplog.text


def test_durations():
  assert [observe.duration(s) for s in (0.4, 59, 190, 7500, 273600)] == ["0s", "59s", "3m10s", "2h05m", "3d04h"]


# -- the report


def filled(folder, shift=0.0):
  folder.mkdir(exist_ok=True)
  with open(folder / "metrics.jsonl", "w") as f:
    for s in range(0, 90):
      f.write(
        json.dumps(dict(step=s, loss=9.0 / (s + 1) + shift, learning_rate=1e-3, tokens_per_second=100.0 + s, mfu=None))
        + "\n"
      )
      if s % 30 == 0:
        f.write(
          json.dumps(
            {
              "step": s,
              "eval/bleu/sacrebleu": s / 3,
              "eval/bleu/seconds": 2.0,
              "eval/val/loss": None if s == 30 else 1.0,
            }
          )
          + "\n"
        )
  return folder


def test_report_is_one_file_with_everything(tmp_path):
  filled(tmp_path)
  (tmp_path / "samples").mkdir()
  for step, text in ((0, "nothing"), (30, "skipped"), (60, "d\u00e9j\u00e0 <vu> | x")):
    (tmp_path / "samples" / f"bleu-{step}.jsonl").write_text(json.dumps(dict(input="a & b", output=text)) + "\n")
  report.write(
    tmp_path,
    title="A <run>",
    command="python -m jaxft.main",
    facts={"Data": dict(rows=7, cut=dict(share=0.25)), "Note": "text"},
  )
  page, card = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
  assert page.count("data:image/png;base64,") == 1 and 'src="http' not in page and "A &lt;run&gt;" in page
  assert "d\u00e9j\u00e0 &lt;vu&gt; | x" in page and "nothing" in page and "skipped" not in page
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
  for part in ("| eval/bleu/sacrebleu | 0 | 20 | 60 |", "| cut.share | 0.25 |", "versions.jax", "python -m jaxft.main"):
    assert part in card, part
  assert "seconds" not in card


def test_panels(tmp_path):
  rows = {"a": observe.read_metrics(filled(tmp_path / "a")), "b": observe.read_metrics(filled(tmp_path / "b", 1.0))}
  assert [name for name, _ in report._panels(rows)] == [
    "loss",
    "sacrebleu (bleu)",
    "learning rate",
    "tokens per second",
  ]
  size = len(report.curves({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "two.png", title="both"))
  assert size == (tmp_path / "two.png").stat().st_size
  assert len(report.curves({"a": tmp_path / "a"}, only=("eval/bleu/sacrebleu",))) < size
  assert report.curves({"none": tmp_path / "none"}).startswith(b"\x89PNG")
