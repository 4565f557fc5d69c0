"""Batch decode: each id exactly once whatever happens in between, in the order of the input, nothing overwritten.

Catches: a half line kept after kill -9, rows decoded twice or lost on restart, output in the order of decoding, an
output that exists replaced, a restart with other settings mixed in, duplicate ids found after the work instead of
before it.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from jaxft.data import clean
from jaxft.errors import InputError, StorageError
from jaxft.infer import batch_decode, options, parts
from jaxft.infer.generate import Answer, Generator


class Upper:
  """Stands in for infer.generate.Generator: answers with the text in capitals, longest first, two rows a batch."""

  def __init__(self, pause=0.0, **given):
    self.options = options.Options(**({"length": 9, "eos": (1,), "pad": 0, "start": 0} | given))
    self.tokenizer = types.SimpleNamespace(
      encode=lambda ts: [[ord(c) for c in t] + [1] if t else [] for t in ts], fingerprint="f"
    )
    self.pause, self.seen = pause, []

  encode = lambda self, texts: Generator.encode(self, texts)
  settings = lambda self, seed: Generator.settings(self, seed)

  def stream(self, params, rows, *, seed, ids):
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(rows), 2):
      time.sleep(self.pause)
      positions = order[begin : begin + 2]
      self.seen += [ids[p] for p in positions]
      R = self.options.samples
      yield (
        positions,
        [
          Answer(["".join(map(chr, rows[p][:-1])).upper()] * R, [-0.5] * R, [len(rows[p])] * R, [len(rows[p]) > 5] * R)
          for p in positions
        ],
      )


PARAMS = {"w": np.arange(6, dtype=np.float32)}
ROWS = [dict(id=f"r{i}", text="abcdefgh"[: 1 + i * 5 % 8] + " ü\u2028") for i in range(11)]


def run(out, rows=ROWS, generator=None, **given):
  given = dict(render=batch_decode.renderer(["{text}"], str.strip), about=dict(model="m")) | given
  return batch_decode.decode(generator or Upper(), PARAMS, rows, out, **given)


def read(path):
  assert path.read_bytes().endswith(b"\n")
  return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_output(tmp_path):
  out, calls = tmp_path / "out.jsonl", []
  report = run(out, progress=lambda done, total: calls.append((done, total)))
  assert read(out) == [dict(id=r["id"], output=r["text"].strip().upper()) for r in ROWS]
  assert (report.rows, report.resumed, report.errors, report.code) == (11, 0, 0, 0)
  assert report.cut == sum(len(r["text"].strip()) + 1 > 5 for r in ROWS)
  assert (
    calls[0] == (0, 11)
    and calls[-1] == (11, 11)
    and not list(tmp_path.glob("*.parts"))
    and not list(tmp_path.glob("*.draft"))
  )
  run(tmp_path / "two.jsonl", generator=Upper(samples=2, temperature=1.0), scores=True)
  assert read(tmp_path / "two.jsonl")[0] == dict(id="r0", output=["A Ü"] * 2, score=[-0.5] * 2, cut=[False] * 2)
  run(tmp_path / "lines.jsonl", rows=[dict(text="x"), dict(text="y")])
  assert [r["id"] for r in read(tmp_path / "lines.jsonl")] == [1, 2]


def test_output_that_exists_is_kept(tmp_path):
  out = tmp_path / "out.jsonl"
  out.write_text("precious\n")
  with pytest.raises(InputError, match="exists already"):
    run(out)
  assert out.read_text() == "precious\n"
  run(out, overwrite=True)
  assert len(read(out)) == 11


@pytest.mark.parametrize(
  "rows,message",
  [
    ([dict(id=1, text="a"), dict(id=2, text="b"), dict(id=1, text="c")], r"'1' in rows \[1, 3\]"),
    ([dict(id=1, text="a"), dict(id="1", text="b")], "more than once"),
    ([dict(id=1, text="a"), dict(text="b")], "row 2 has no id"),
    ([dict(text="a"), dict(id=1, text="b")], "row 2 has an id"),
    ([dict(id=1.5, text="a")], "1.5 is neither"),
    ([dict(id=1, txt="a")], "not one of 1 rows.*text.*did you mean 'txt'"),
    ([], "no rows"),
  ],
)
def test_bad_input_is_refused_before_decoding(tmp_path, rows, message):
  generator = Upper()
  with pytest.raises(InputError, match=message):
    run(tmp_path / "out.jsonl", rows=rows, generator=generator)
  assert not generator.seen and not list(tmp_path.iterdir())


def test_bad_rows_get_an_error_record(tmp_path):
  rows = [dict(id="a", text="fine"), dict(id="b", other="x"), dict(id="c", text="far too long"), dict(id="d", text="")]
  report = run(tmp_path / "out.jsonl", rows=rows, inputs_length=6)
  got = read(tmp_path / "out.jsonl")
  assert [g["id"] for g in got] == ["a", "b", "c", "d"] and got[0] == dict(id="a", output="FINE")
  assert (
    "which this row has not" in got[1]["error"]
    and "13 tokens, the limit is 6" in got[2]["error"]
    and "no tokens" in got[3]["error"]
  )
  assert (report.errors, report.code) == (3, 3)
  run(tmp_path / "cut.jsonl", rows=rows, inputs_length=6, too_long="truncate")
  assert read(tmp_path / "cut.jsonl")[2] == dict(id="c", output="FAR T")


SCRIPT = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import test_batch_decode as t
t.run(pathlib.Path({out!r}), generator=t.Upper(pause=0.15))
"""


def test_killed_and_started_again(tmp_path):
  out = tmp_path / "out.jsonl"
  script = SCRIPT.format(tests=str(pathlib.Path(__file__).parent), out=str(out))
  env = os.environ | dict(PYTHONPATH=str(pathlib.Path(__file__).parents[2]))
  process = subprocess.Popen([sys.executable, "-c", script], env=env)
  part = parts.parts_folder(out) / "part.jsonl"
  limit = time.monotonic() + 120
  while not (part.exists() and part.read_bytes().count(b"\n") >= 4):
    assert process.poll() is None and time.monotonic() < limit
    time.sleep(0.02)
  with pytest.raises(InputError, match="another process is writing"):
    run(out)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  done = [json.loads(line)["id"] for line in part.read_bytes().split(b"\n")[:-1]]
  assert 4 <= len(done) < 11 and not out.exists()
  whole = part.read_bytes()
  for half in (
    b'{"id": "r1", "output": "A',
    b'{"id": "r1"}',
    b"\xff" * 70000,
  ):  # what a kill in the midst of a write may leave
    part.write_bytes(whole + half)
    writer = parts.Parts(out, [r["id"] for r in ROWS], json.loads((part.parent / "manifest.json").read_text()))
    writer._file.close()
    assert part.read_bytes() == whole
  part.write_bytes(whole + b'{"id": "r')
  generator = Upper()
  report = run(out, generator=generator)
  assert sorted(generator.seen) == sorted(r["id"] for r in ROWS if r["id"] not in done) and report.resumed == len(done)
  assert read(out) == [dict(id=r["id"], output=r["text"].strip().upper()) for r in ROWS]


def test_restart_with_other_settings_is_refused(tmp_path, monkeypatch):
  out = tmp_path / "out.jsonl"

  class Stops(Upper):
    def stream(self, *args, **kwargs):
      yield from [next(super().stream(*args, **kwargs))]
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(out, generator=Stops())
  before = (parts.parts_folder(out) / "part.jsonl").read_bytes()
  for message, given in {
    "options.length: 9 then, 8 now": dict(generator=Upper(length=8)),
    "model: 'm' then, 'n' now": dict(about=dict(model="n")),
    "rows: 11 then, 10 now": dict(rows=ROWS[:-1]),
    "input: ": dict(rows=[*ROWS[:-1], dict(id="r10", text="other")]),
    "inputs_length: 0 then, 99 now": dict(inputs_length=99),
  }.items():
    with pytest.raises(InputError, match=message):
      run(out, **given)
  monkeypatch.setitem(PARAMS, "w", PARAMS["w"] + np.eye(1, 6, 4, dtype=np.float32)[0] * 1e-6)
  with pytest.raises(InputError, match="weights: "):
    run(out)
  monkeypatch.undo()
  assert (parts.parts_folder(out) / "part.jsonl").read_bytes() == before
  assert run(out).resumed == 2 and len(read(out)) == 11


def test_full_disk(tmp_path, monkeypatch):
  out = tmp_path / "out.jsonl"

  def full(_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as m:
    m.setattr(batch_decode.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
      run(out)
  assert run(out).rows == 11 and len(read(out)) == 11


def test_checksum():
  """Sees a swap, a sign and a last bit; does not see the sharding."""
  x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
  base = batch_decode.checksum(dict(a=x))
  swapped, flipped, nudged = (
    x[:, ::-1],
    x * np.where(np.arange(6) == 2, -1, 1).astype(np.float32),
    np.nextafter(x, 9, where=x == x[3, 3], out=x.copy()),
  )
  assert (
    len(
      {base, *(batch_decode.checksum(dict(a=y)) for y in (swapped, flipped, nudged)), batch_decode.checksum(dict(b=x))}
    )
    == 5
  )
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
  assert batch_decode.checksum(dict(a=split)) == base


def test_inputs_are_rendered_as_in_training():
  """By the template that fits the row, chats without an answer among them, and with the same clean-up of fields."""
  fix = clean.Options(strip=True, unicode="NFC", min_chars=0, max_chars=0, max_ratio=0.0, dedup=False).text
  render = batch_decode.renderer([["{instruction}", "{input}"], "{question}", "{chat.prompt}"], fix)
  assert render(dict(instruction=" Cafe\u0301 ", input=None)) == "Caf\u00e9"
  assert render(dict(instruction="a", input="b")) == "a\n\nb"
  assert render(dict(question="q")) == "q"
  assert render(dict(messages=[dict(role="system", content="s"), dict(role="user", content="u")])) == "s\n\nu"
  assert render(dict(prompt=[dict(role="user", content="u")])) == "u"
  with pytest.raises(InputError, match="instruction"):
    render(dict(text="x"))
  with pytest.raises(InputError, match="takes one question"):
    batch_decode.renderer(["{chat.prompt}"], fix)(dict(messages=[dict(role="assistant", content="a")]))


def test_half_a_surrogate_pair_is_an_error_of_its_row(tmp_path):
  rows = [dict(id="a", text="x \ud83d y"), dict(id="b", text="fine")]
  report = run(tmp_path / "out.jsonl", rows)
  assert read(tmp_path / "out.jsonl") == [dict(id="a", error="broken UTF-16 surrogate"), dict(id="b", output="FINE")]
  assert report.code == 3
