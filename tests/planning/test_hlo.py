"""Reading compiled modules. Catches: a loop counted once; a whole stacked array counted where a slice of it is read; a
collective missed, or its size taken from the wrong side; a loop of unknown length that goes unnoticed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import sharding
from jaxft.planning import hlo

TPU = """HloModule jit_run

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-reduce.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %fusion.3 = f32[8,128]{1,0:T(8,128)} fusion(%all-reduce.2), kind=kLoop, calls=%fused, x={"estimated_cycles":"1000"}
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy(%fusion.3)
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %fusion.3)
}

%fused (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%q)
}

%cond.1 (p.1: (s32[], f32[8,128])) -> pred[] {
  %c = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %c), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %ag = (f32[8,128]{1,0}, f32[64,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}, {op_name="embed"}
  %agd = f32[64,128]{1,0} all-gather-done(%ag)
  %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%cond.1, body=%body.1
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
ROW = 8 * 128 * 4  # bytes of f32[8,128]


def test_text_of_a_tpu():
  m = hlo.read(TPU, devices=8)
  assert m.cycles == 7000 and m.unknown_loops == 0
  gather, reduce = sorted(m.collectives, key=lambda x: x.kind)
  assert (gather.bytes, gather.group, gather.times, gather.waits) == (8 * ROW, 8, 1, False) and gather.where == "embed"
  assert (reduce.bytes, reduce.group, reduce.times, reduce.waits) == (ROW, 4, 7, True)
  # each turn: all-reduce and fusion read and write a row, the copy into the chip reads one; then the gather
  assert m.bytes == 7 * 5 * ROW + 9 * ROW / 2


def test_a_loop_of_unknown_length_is_counted_and_said():
  text = TPU.replace("%c = s32[]{:T(128)} constant(7)", "%c = s32[]{:T(128)} get-tuple-element(%p.1), index=0")
  m = hlo.read(text, devices=8, loops=3)
  assert m.unknown_loops == 1 and m.cycles == 3000


@pytest.mark.parametrize("turns", [3, 11])
def test_loops_of_a_real_module(turns):
  w = jax.ShapeDtypeStruct((turns, 256, 256), jnp.float32)
  run = jax.jit(lambda x, w: jax.lax.scan(lambda c, a: (jnp.tanh(c @ a), None), x, w)[0])
  m = hlo.read(run.lower(jax.ShapeDtypeStruct((64, 256), jnp.float32), w).compile().as_text())
  slices = turns * 256 * 256 * 4
  assert slices <= m.bytes < 6 * slices + turns * 20 * 64 * 256 * 4, m.bytes  # and not turns * the whole stack
  assert not m.collectives and not m.unknown_loops


def test_collectives_of_a_real_module():
  mesh = sharding.make_mesh(dict(data=8))
  place = lambda *parts: NamedSharding(mesh, PartitionSpec(*parts))

  @functools.partial(jax.jit, in_shardings=(place("data"), place()), out_shardings=place())
  def gradient(x, w):
    return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

  shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
  m = hlo.read(gradient.lower(*shapes).compile().as_text(), devices=8)
  (one,) = m.collectives
  assert (one.kind, one.bytes, one.group, one.times) == ("all-reduce", 32 * 16 * 4, 8, 1)


def test_sizes():
  assert hlo.size("(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], pred[5]{0})") == 12 + 4 + 5
  assert hlo.size("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0})", near=False) == 16
  assert np.isclose(hlo.size("s4[8]"), 4)


@pytest.mark.parametrize(
  "groups, size",
  [
    ("{{0,1},{2,3}}", 2),
    ("[2,4]<=[8]", 4),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("", 8),
  ],
)
def test_groups(groups, size):
  assert hlo._group(f", replica_groups={groups}, use_global_device_ids=true", 8) == size
