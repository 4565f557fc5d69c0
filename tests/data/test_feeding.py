"""Batches of the reader process are those of this one, its errors arrive, and it ends with the process it reads for.

Catches: a store or a change of batches that does not pickle, a stream that goes on after it was given up or leaves
frames to the next one, a reader that dies of the signals that training survives, or that outlives it.
"""

import functools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import pytest

from jaxft.data import feeding, fields, hidden
from jaxft.errors import InputError, StorageError
from tests.data.conftest import TEXT
from tests.data.test_pipeline import LENGTHS, MODES, PAIRS, batches, same


@pytest.fixture(scope="module")
def reader():
  """The one reader of these tests: it takes seconds to start, and each of them leaves it free."""
  feeding.start()
  yield feeding.running()
  feeding.stop()


@pytest.fixture
def store(make_store):
  return make_store(PAIRS)


def lasts(process):
  """Says whether a process is still there after 10 seconds of waiting for its end."""
  until = time.monotonic() + 10
  while time.monotonic() < until:
    try:
      if pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        return False
    except FileNotFoundError:
      return False
    time.sleep(0.05)
  return True


@pytest.mark.parametrize("mode", MODES[:3])
def test_the_same_batches(reader, store, mode):
  b = batches(store, **mode)
  where = (b.steps(1) - 2, b.steps(2) + 3, 1, 2)
  got, want = list(b.stream(*where)), list(b.local(*where))
  assert [s for s, _ in got] == [s for s, _ in want] == list(range(*where[:2]))
  assert all(same(x, y) for (_, x), (_, y) in zip(got, want))
  assert list(b.stream(3, 3, 0, 1)) == []


def test_what_is_done_to_batches_goes_along(reader, rows_store, wordpiece):
  hide = functools.partial(hidden.hide, special=(0, 2, 3), mask_id=4, vocab=wordpiece.size, share=0.3, whole_word=False)
  store = rows_store([dict(text=TEXT[i % 4]) for i in range(40)], wordpiece, "mlm", length=41)
  b = batches(store, dynamic=fields.Dynamic(batch=hide), lengths=dict(inputs=41))
  got = list(b.stream(0, 3, 0, 1))
  assert len(got) == 3 and all(same(x, b.host_batch(s, 0, 1)) for s, x in got)
  assert any((x["inputs"] == 4).any() for _, x in got)


def test_a_stream_given_up_leaves_nothing_behind(reader, store):
  b = batches(store)
  for many in (1, 5, 40):
    stream = b.stream(0, 1000, 0, 1)
    assert [next(stream)[0] for _ in range(many)] == list(range(many))
    assert feeding.running() is None  # at work
    stream.close()
    assert feeding.running() is reader
    assert [s for s, _ in b.stream(7, 9, 0, 1)] == [7, 8]


def test_errors_arrive_as_they_were(reader, store):
  with pytest.raises(InputError, match="batch=6 does not divide over 4 hosts") as e:
    list(batches(store).stream(0, 5, 0, 4))
  assert "host_batch" in e.value.__notes__[0]
  assert len(list(batches(store).stream(0, 5, 0, 1))) == 5


def test_signals_of_the_terminal_do_not_end_it(reader, store):
  stream = batches(store).stream(0, 300, 0, 1)
  next(stream)
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(reader.process.pid, number)
  assert [s for s, _ in stream] == list(range(1, 300))


def test_its_death_is_said(store, monkeypatch):
  monkeypatch.setattr(feeding, "_reader", None)
  feeding.start()
  reader = feeding.running()
  stream = batches(store).stream(0, 10**6, 0, 1)
  next(stream)
  reader.process.kill()
  with pytest.raises(StorageError, match="reads the data has ended, with exit code -9 .*memory.* Run the same command"):
    list(stream)
  feeding.stop()


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_the_process_that_trains(store, busy, tmp_path):
  """Even with one that is killed: while it imports TensorFlow, and while it waits for room in the socket."""
  code = "import sys, time, pickle; from jaxft.data import feeding as f; f.start(); print(f.running().process.pid)"
  if busy:
    code += "; s = pickle.load(open(sys.argv[1], 'rb')).stream(0, 10**6, 0, 1); print(next(s)[0])"
  (tmp_path / "batches").write_bytes(pickle.dumps(batches(store)))
  trains = subprocess.Popen(
    [sys.executable, "-c", code + "; sys.stdout.flush(); time.sleep(60)", str(tmp_path / "batches")],
    stdout=subprocess.PIPE, text=True)  # fmt: skip
  child = int(trains.stdout.readline())
  if busy:
    assert trains.stdout.readline() == "0\n"
  trains.kill()
  trains.wait()
  assert not lasts(child)


def test_rows_of_the_reader_are_the_length_of_the_run(store):
  """A store is opened again with the lengths that it had."""
  again = pickle.loads(pickle.dumps(batches(store)))
  assert again.store.caps == LENGTHS and len(again.store) == len(store) and again.steps(2) == batches(store).steps(2)
