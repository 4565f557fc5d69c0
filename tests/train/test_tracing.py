"""Tracing of steps. Catches: a window one step off; times that are not of one step; operations without their place in
the source; a run that ends inside the window and leaves no trace; a container counted with what it holds.
"""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from jaxft.errors import InputError
from jaxft.train import tracing

HLO = """HloModule jit_run
FileNames
1 "/home/me/jaxft/models/layers.py"
2 "/site-packages/optax/transforms/clip.py"

FunctionNames
1 "dense"

FileLocations
1 {file_name_id=1 function_name_id=1 line=88 end_line=88 column=3 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=3 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

ENTRY %main (x: f32[2]) -> f32[2] {
  %dot.1 = f32[2]{0} dot(%x, %x), metadata={op_name="jit(run)/jvp()/mlp/dot_general" stack_frame_id=1}
  dot.2 = f32[2]{0} dot(x, x), metadata={op_name="jit(run)/transpose(jvp())/dot_general" stack_frame_id=1}, x={"a":1}
  ROOT %fusion.3 = f32[2]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(run)/mul" stack_frame_id=2}
  %while.4 = f32[2]{0} while(%x), body=%b, metadata={op_name="jit(run)/jvp()/scan" source_file="/a/b.py" source_line=5}
}
"""


def test_operations_of_a_program():
  found = tracing.operations(HLO)
  assert found["dot.1"] == ("forward", "dot_general", "models/layers.py:88")
  assert found["dot.2"] == ("backward", "dot_general", "models/layers.py:88")
  assert found["fusion.3"] == ("update", "mul", "optax/transforms/clip.py:7")
  assert found["while.4"] == ("forward", "while", "b.py:5")


def test_rows_are_of_one_step_and_leave_containers_out():
  events = [("while.4", 0, 1000), ("dot.1", 0, 300), ("dot.1", 300, 600), ("fusion.3", 600, 700)]
  events.append(("copy.17", 700, 1000))
  rows = tracing.rows(events, 2, tracing.operations(HLO))
  assert [(r.operation.kind, r.calls, round(r.share, 3)) for r in rows] == [
    ("dot_general", 1.0, 0.6), ("copy", 0.5, 0.3), ("mul", 0.5, 0.1)]  # fmt: skip
  assert rows[0].seconds == pytest.approx(300e-9)
  assert tracing._union([(0, 10), (5, 8), (7, 12), (20, 21)]) == 13


def step_of(calls):
  jitted = jax.jit(lambda state, batch: (state.update(batch), dict(loss=batch.sum())))

  def run(state, batch):
    calls.append(int(state.step))
    with jax.named_scope("inside"):
      return jitted(state, batch)

  run.lower = jitted.lower
  return run


@jax.tree_util.register_pytree_node_class
class State(types.SimpleNamespace):
  def update(self, batch):
    return State(step=self.step + 1, w=self.w @ batch)

  def tree_flatten(self):
    return (self.step, self.w), None

  @classmethod
  def tree_unflatten(cls, _, leaves):
    return cls(step=leaves[0], w=leaves[1])


def train(tmp_path, window, steps, start=0, last=100):
  state, calls, traced = State(step=jnp.int32(start), w=jnp.eye(64)), [], []
  with tracing.traced(step_of(calls), window, last, tmp_path) as one:
    for _ in range(steps):
      before = getattr(one, "_on", False)
      state, _ = one(state, jnp.eye(64))
      if getattr(one, "_on", False) or before:
        traced.append(calls[-1] + 1)
  return traced


def test_window_writes_trace_and_table(tmp_path):
  train(tmp_path, "2:3", 5, start=0)
  (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
  assert {"perfetto_trace.json.gz", tracing.TABLE} <= {f.name for f in folder.iterdir()}
  assert list(folder.glob("*.xplane.pb"))  # what TensorBoard reads
  text = (folder / tracing.TABLE).read_text()
  assert "2 steps of" in text and "dot_general" in text and "test_tracing.py:" in text
  assert max(map(len, text.splitlines())) <= 100


def test_window_of_a_resumed_run_and_one_that_is_not_reached(tmp_path, caplog):
  caplog.set_level(logging.INFO, logger="jaxft")
  assert train(tmp_path, "8:9", 1, start=7) == [8]  # the run ends inside
  assert "Traced steps 8 to 8" in caplog.text
  assert train(tmp_path / "b", "8:9", 2, start=0) == []
  assert "did not come to them" in caplog.text
  assert train(tmp_path / "c", "", 2) == []


@pytest.mark.parametrize("window, said", [("0:3", "count from 1"), ("4:2", "10:15"), ("x", "10:15"), ("8:9", "has 8")])
def test_bad_windows(tmp_path, window, said):
  with pytest.raises(InputError, match=said):
    train(tmp_path, window, 1, last=8)
