"""FLOPs against sums by hand.

Catches: a scan body counted once, derivatives of custom rules counted beside their function, recomputation forgotten, a
branch lost, contracted axes counted twice.
"""

import jax
import jax.numpy as jnp

from jaxft import flops
from jaxft.models import scores

A, B, C = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 5), (5, 7), (7, 7)))


def test_products_and_convolutions():
  assert flops.count(lambda a, b: a @ b, A, B) == 2 * 3 * 5 * 7
  assert flops.count(lambda a, b: jnp.einsum("ij,ij->j", a, b), A, A) == 2 * 3 * 5
  x, k = jax.ShapeDtypeStruct((2, 11, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
  assert flops.count(conv, x, k) == 2 * (2 * 9 * 6) * (3 * 4)


def test_scan_times_its_length_and_nested_jit():
  body = jax.jit(lambda c, _: (c @ c, None))
  assert flops.count(lambda c: jax.lax.scan(body, c, None, length=13)[0], C) == 13 * 2 * 7**3
  twice = lambda c: jax.lax.scan(lambda c, _: (jax.lax.scan(body, c, None, length=3)[0], None), c, None, length=5)[0]
  assert flops.count(twice, C) == 15 * 2 * 7**3


def test_gradient_and_recomputation():
  one = 2 * 3 * 5 * 7
  loss = lambda a, b: jnp.sum(jnp.sin(a @ b) ** 2)
  assert flops.count(jax.grad(loss, (0, 1)), A, B) == 3 * one
  assert flops.count(jax.grad(jax.checkpoint(loss), (0, 1)), A, B) == 4 * one


def test_custom_rules_and_branches():
  @jax.custom_vjp
  def f(a, b):
    return a @ b

  f.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
  assert flops.count(f, A, B) == 2 * 3 * 5 * 7
  assert flops.count(jax.grad(lambda a, b: jnp.sum(f(a, b)), (0, 1)), A, B) == 3 * 2 * 3 * 5 * 7
  branch = lambda p, c: jax.lax.cond(p, lambda c: c @ c @ c, lambda c: c @ c, c)
  assert flops.count(branch, jax.ShapeDtypeStruct((), bool), C) == 2 * 2 * 7**3


def test_peaks():
  fake = lambda platform, kind: type("Device", (), dict(platform=platform, device_kind=kind))()
  for kind, want in (
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v4", 275e12),
  ):
    assert flops.peak(fake("tpu", kind), jnp.bfloat16)[0] == want, kind
  for kind, want in (
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A10G", 70e12),
  ):
    assert flops.peak(fake("gpu", kind), jnp.bfloat16)[0] == want, kind
  assert flops.peak(fake("gpu", "Abacus"), jnp.bfloat16)[0] == 0
  speed, source = flops.peak(jax.devices()[0], jnp.float32)
  assert speed > 1e7 and "measured" in source


def test_what_a_backward_pass_makes_again_is_no_work_of_the_model():
  """Attention: two products forward and four backward, and one that is made again; the same in blocks of queries."""
  q = jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.float32)
  mask = scores.Mask(*(jnp.ones((2, 256), jnp.int32),) * 2, causal=True)
  one = 2.0 * 2 * 4 * 256 * 256 * 16
  for run in (
    lambda q, k, v: scores.attend(q, k, v, None, mask, 0.0, None),
    lambda q, k, v: scores.in_blocks(q, k, v, None, mask, 0.0, None, 0.0, 64),
  ):
    grad = jax.grad(lambda *a, run=run: run(*a).sum(), (0, 1, 2))
    assert flops.count(grad, q, q, q) == 7 * one
    assert flops.count(grad, q, q, q, again=False) == 6 * one


def test_the_products_of_attention_alone():
  q = jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32)
  w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  mask = scores.Mask(*(jnp.ones((2, 32), jnp.int32),) * 2)
  run = lambda q, w: scores.attend(q @ w, q, q, None, mask, 0.0, None).sum()
  one = 2.0 * 2 * 4 * 32 * 32 * 16
  assert flops.count(run, q, w, only=flops.ATTENTION) == 2 * one
  grad = jax.jit(jax.grad(jax.checkpoint(run)))
  # forward 2, the scores again where rematerialised and once more in the backward pass, which has 4 others
  assert flops.count(grad, q, w, only=flops.ATTENTION) == 8 * one
