"""Every step of the ladder of attention against float64, forward and all gradients: packed and padded rows, fewer heads
of keys, odd lengths, windows, prefixes, caps, a bias with its gradient, queries without keys.

Catches: a segment, a window or a prefix that a kernel does not know of; a query without keys that gives anything but
0; padding that passes a gradient; keys of the wrong head; a bias cut at the wrong row; a kernel taken although dropout,
bias or hardware forbid it, or refused in silence. Kernels of TPUs run in the interpreter here, cuDNN's by XLA with the
very arguments that cuDNN gets; tests/test_tpu.py compiles the real ones.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import sharding
from jaxft.errors import InputError
from jaxft.models import flash, kernels, layers
from jaxft.models.scores import Mask, attend, in_blocks

H = 16


def case(T, S, N, G, *, causal=False, window=None, prefix=False, packed=True, bias=False, B=3, seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, n, heads, H)).astype(np.float32) for n, heads in ((T, N), (S, G), (S, G)))
  q *= H**-0.5

  def segments(n):
    out = np.zeros((B, n), np.int32)
    cuts = [0, n // 3, n // 3 + n // 4, n - 3]  # three examples and padding
    for i in range(3) if packed else (0,):
      out[0, cuts[i] : cuts[i + 1] if packed else n - 5] = i + 1
    out[1] = 1  # a full row; row 2 is empty
    return out

  query = segments(T)
  key = query if T == S else segments(S)
  if T != S:
    key[0][key[0] == 2] = 0  # queries of segment 2 have no key
  before = (rng.random((B, S)) < 0.3).astype(np.int32) if prefix else None
  mask = Mask(jnp.asarray(query), jnp.asarray(key), None if before is None else jnp.asarray(before), window, causal)
  mask = mask.replace(key=mask.query) if T == S else mask
  b = rng.normal(size=(1, N, T, S)).astype(np.float32) if bias else None
  return (q, k, v, b), mask, rng.normal(size=(B, T, N, H)).astype(np.float32)


def reference(args, mask, cotangent, softcap=0.0):
  """Returns output and gradients in float64, from the definition alone."""
  q, k, v, bias = (None if x is None else np.asarray(x, np.float64) for x in args)
  query, key = np.asarray(mask.query), np.asarray(mask.key)
  T, S, R = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
  near = np.arange(T)[:, None] - np.arange(S)[None]
  seen = (query[:, :, None] == key[:, None]) & (key[:, None] > 0)
  if mask.causal:
    seen &= (near >= 0) if mask.prefix is None else (near >= 0) | (np.asarray(mask.prefix)[:, None] > 0)
  if mask.window is not None:
    seen &= near < mask.window if mask.causal else np.abs(near) <= mask.window
  with jax.enable_x64(True):

    def run(q, k, v, bias):
      scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, R, 2))
      scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
      scores = scores if bias is None else scores + bias
      e = jnp.where(seen[:, None], jnp.exp(scores), 0)
      p = e / jnp.maximum(e.sum(-1, keepdims=True), 1e-300)
      return jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, R, 2))

    out, pull = jax.vjp(run, q, k, v, bias)
    return np.asarray(out), [None if g is None else np.asarray(g) for g in pull(np.asarray(cotangent, np.float64))]


def steps(name, softcap):
  if name == "dense":
    return lambda q, k, v, b, m: attend(q, k, v, b, m.dense(), 0.0, None, softcap)
  if name == "blocks":
    return lambda q, k, v, b, m: in_blocks(q, k, v, b, m, 0.0, None, softcap, 8)
  if name.startswith("flash"):
    platform = name.removeprefix("flash-")
    return lambda q, k, v, b, m: kernels._flash(q, k, v, b, m, 0.0, None, softcap, platform, interpret=True)
  if name == "splash":
    return lambda q, k, v, b, m: kernels._splash(q, k, v, m, softcap, interpret=True)
  return lambda q, k, v, b, m: kernels._cudnn(q, k, v, b, m)


CASES = {
  "packed": dict(T=40, S=40, N=4, G=4),
  "padded": dict(T=40, S=40, N=4, G=4, packed=False),
  "causal": dict(T=37, S=37, N=4, G=2, causal=True),
  "one-head-of-keys": dict(T=40, S=40, N=4, G=1, causal=True),
  "window": dict(T=40, S=40, N=2, G=2, causal=True, window=5),
  "window-both-sides": dict(T=40, S=40, N=2, G=2, window=4),
  "cross": dict(T=21, S=45, N=4, G=4),
  "long": dict(T=200, S=200, N=2, G=1, causal=True),
  "prefix": dict(T=40, S=40, N=2, G=2, causal=True, prefix=True),
  "bias": dict(T=37, S=37, N=4, G=4, bias=True),
  "causal-bias": dict(T=40, S=40, N=4, G=4, causal=True, bias=True),
  "cap": dict(T=40, S=40, N=2, G=1, causal=True, softcap=2.0),
}
CANNOT = dict(  # what a step refuses: test_what_refuses_a_kernel
  splash=("prefix", "bias", "causal-bias"), cudnn=("cap",), blocks=(), dense=(), **{"flash-tpu": (), "flash-gpu": ()}
)


@pytest.mark.parametrize("step, name", [(s, n) for s, cannot in CANNOT.items() for n in CASES if n not in cannot])
def test_against_float64(step, name, monkeypatch):
  monkeypatch.setattr(flash, "TILES", dict(tpu=(16, 8), gpu=(8,)))  # so that there are several, of both kinds
  real = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: real(*a, **{**k, "implementation": "xla"}))
  given = dict(CASES[name])
  softcap = given.pop("softcap", 0.0)
  args, mask, cotangent = case(**given)
  want, want_grads = reference(args, mask, cotangent, softcap)
  run = steps(step, softcap)

  @jax.jit
  def both(args):
    out, pull = jax.vjp(lambda q, k, v, b: run(q, k, v, b, mask), *args)
    return out, pull(jnp.asarray(cotangent))

  out, grads = both(args)
  np.testing.assert_allclose(out, want, atol=2e-5)
  for g, w, what in zip(grads, want_grads, "qkvb"):
    if w is not None:
      np.testing.assert_allclose(g, w, atol=4e-5, err_msg=what)
  nothing = ~np.asarray(mask.sees())
  assert nothing.any() and (np.asarray(out)[nothing] == 0).all() and (np.asarray(grads[0])[nothing] == 0).all()
  padding = np.asarray(mask.key) == 0
  assert (np.asarray(grads[1])[padding] == 0).all() and (np.asarray(grads[2])[padding] == 0).all()


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=1)])
def test_splash_on_a_mesh(axes):
  (q, k, v, _), mask, _ = case(40, 40, 4, 2, causal=True, B=8)
  mesh = sharding.make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
  rules = dict(batch=("data", "fsdp"), heads="tensor")

  def run(q, k, v):
    with sharding.use(mesh, rules):
      return kernels._splash(q, k, v, mask, 0.0, interpret=True)

  np.testing.assert_allclose(jax.jit(run)(q, k, v), attend(q, k, v, None, mask.dense(), 0.0, None), atol=2e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("axes", [None, dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=4, tensor=1)])
def test_flash_drops_what_dense_drops_on_any_mesh(platform, axes, monkeypatch):
  """With everything in it: a bias, dropout, heads that share keys, a window that is traced; all gradients."""
  monkeypatch.setattr(flash, "TILES", dict(tpu=(16, 8), gpu=(8,)))
  (q, k, v, b), mask, g = case(38, 38, 4, 2, causal=True, bias=True, B=8)
  mask = mask.replace(query=mask.query[::-1], key=mask.key[::-1])  # the rows that are not empty are on the last device
  words, rules = jnp.array([3, 5], jnp.uint32), dict(batch=("data", "fsdp"), heads="tensor")
  if axes and axes["tensor"] == 1:  # heads that nothing splits; a split of length, where a kernel needs whole rows
    rules = dict(batch=("fsdp",), length="data")
  mesh = axes and sharding.make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])

  def both(way, window):
    def run(*x):
      return way(*x, mask.replace(window=window))

    out, pull = jax.vjp(run, q, k, v, b)
    return out, *pull(g)

  def flashed(*x):
    with sharding.use(mesh, rules) if axes else contextlib.nullcontext():
      return kernels._flash(*x, 0.3, words, 0.0, platform, interpret=True)

  found = jax.jit(functools.partial(both, flashed))(jnp.int32(20))
  want = jax.jit(functools.partial(both, lambda *x: attend(*x, 0.3, words)))(jnp.int32(20))
  for a, b, what in zip(found, want, ("out", *"qkvb")):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=what)


def test_flash_skips_tiles_that_no_query_sees(monkeypatch):
  """What it says it will look at is what the mask leaves, tile by tile, and no more for packed rows and windows."""
  monkeypatch.setattr(flash, "TILES", dict(gpu=(8,)))
  seen = []
  monkeypatch.setattr(flash, "_flash", lambda form, q, k, v, bias, about: seen.append(about) or q)
  for given in (dict(causal=True), dict(causal=True, window=5), dict(window=4), dict(causal=True, prefix=True)):
    (q, k, v, _), mask, _ = case(64, 64, 2, 2, **given)
    flash.attention(q, k, v, None, mask, 0.0, None, 0.0, "gpu")
    tiles = np.asarray(mask.dense())[:, 0].reshape(3, 8, 8, 8, 8).any((2, 4))
    for name, some in (("keys", tiles), ("queries", tiles.swapaxes(1, 2))):
      first, end = np.asarray(seen[-1][name])
      place = np.arange(8)
      inside = (place >= first[..., None]) & (place < end[..., None])
      assert (some <= inside).all(), f"{given}: a tile that is seen is left out"
      if not given.get("prefix"):
        assert (inside.sum() <= some.sum() + 2) and not inside[2].any(), f"{given}: {inside.sum()} for {some.sum()}"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_flash_is_checked_on_the_device_before_it_is_taken(platform, monkeypatch):
  assert flash.check(platform, interpret=True) < 0.01
  monkeypatch.setattr(flash.flash_tiles, "MASKED", -1.0)  # what is not to be seen is
  assert flash.check(platform, interpret=True) > 0.02
  monkeypatch.undo()
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  real = functools.partial(flash.check, interpret=True)
  for check, name, why in (
    (lambda p: 0.5, "dense", "0.5 off what XLA gives"),
    (lambda p: float("nan"), "dense", "nan off"),
    (lambda p: 1 / 0, "dense", "it fails (ZeroDivisionError"),
    (real, "flash", ""),
  ):
    kernels._wrong.cache_clear()
    monkeypatch.setattr(flash, "check", check)
    chosen = []  # as in a model: while a step is traced
    jax.jit(lambda x: chosen.append(choose(platform, monkeypatch, rate=0.1)) or x).lower(1.0)  # noqa: B023
    assert chosen[0][0] == name and why in chosen[0][1].get("flash", "")
  kernels._wrong.cache_clear()


def choose(
  platform, monkeypatch, name="causal", how="auto", dtype=jnp.bfloat16, rate=0.0, head=H, traced=False, rows=False, T=0
):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  given = dict(CASES[name])
  softcap = given.pop("softcap", 0.0)
  (q, k, _, bias), mask, _ = case(**given)
  q, k = (jax.ShapeDtypeStruct((x.shape[0], T or x.shape[1], x.shape[2], head), dtype) for x in (q, k))
  bias = np.zeros((3, 1, 1, 1)) if rows else bias
  mask = mask.replace(window=jnp.int32(3)) if traced else mask
  return kernels.choose(q, k, bias, mask, rate, softcap, how)


@pytest.mark.parametrize(
  "platform, given, step, why",
  [
    ("tpu", {}, "splash", ""),
    ("tpu", dict(name="window"), "splash", ""),
    ("tpu", dict(name="cap"), "splash", ""),
    ("tpu", dict(name="bias"), "flash", "a bias is added"),
    ("tpu", dict(name="prefix"), "flash", "both directions"),
    ("tpu", dict(rate=0.1), "flash", "dropout of 0.1 (model.attention_dropout=0"),
    ("tpu", dict(traced=True), "flash", "windows differ"),
    ("gpu", dict(name="packed"), "cudnn", ""),
    ("gpu", dict(name="causal"), "flash", "these are 37 and 37"),
    ("gpu", dict(name="causal-bias"), "cudnn", ""),
    ("gpu", dict(name="prefix"), "cudnn", ""),
    ("cuda", dict(name="cap"), "flash", "a cap of 2"),
    ("gpu", dict(head=12), "flash", "heads of 12"),
    ("gpu", dict(rate=0.1), "flash", "dropout"),
    ("cpu", {}, "dense", ""),
  ],
)
def test_what_refuses_a_kernel(platform, given, step, why, monkeypatch):
  name, reasons = choose(platform, monkeypatch, **given)
  own = kernels.KERNEL.get(platform)
  assert name == step and why in reasons.get(own, "") and bool(why) == (own in reasons) and "flash" not in reasons
  assert choose(platform, monkeypatch, how="strict", **given)[0] == step


@pytest.mark.parametrize(
  "platform, given, own, why",
  [
    ("gpu", dict(dtype=jnp.float32), "activations are float32", "activations are float32"),
    ("tpu", dict(dtype=jnp.float32, rate=0.1), "dropout", "activations are float32"),
    ("gpu", dict(head=264), "heads of 264", "wider than 256"),
    ("gpu", dict(rows=True), "a bias of its own", "a bias of its own"),
    ("tpu", dict(name="bias", head=128, T=6000), "a bias is added", "6000 tokens do not fit"),
  ],
)
def test_what_refuses_all_kernels(platform, given, own, why, monkeypatch):
  name, reasons = choose(platform, monkeypatch, **given)
  assert name in ("dense", "blocks") and own in reasons[kernels.KERNEL[platform]] and why in reasons["flash"]
  with pytest.raises(InputError, match="'strict'.*refused: .*; flash, as"):
    choose(platform, monkeypatch, how="strict", **given)


def test_one_step_may_be_asked_for(monkeypatch):
  assert choose("gpu", monkeypatch, how="dense")[0] == "dense"
  assert choose("cpu", monkeypatch, how="blocks")[0] == "blocks"
  with pytest.raises(InputError, match="'splash', but it is for TPUs"):
    choose("gpu", monkeypatch, how="splash")
  with pytest.raises(InputError, match="did you mean 'dense'"):
    kernels.check("dence")


def test_many_scores_are_made_in_blocks(monkeypatch, caplog):
  monkeypatch.setattr(kernels, "SCORES", 4.0 * 3 * 4 * 300 * 299)
  kernels._said.clear()
  (q, k, v, _), mask, _ = case(300, 300, 4, 2, causal=True)
  caplog.set_level("INFO", logger="jaxft")
  run = lambda how: jax.jit(lambda q, k, v: kernels.attention(q, k, v, None, mask, 0.0, None, 0.0, how))(q, k, v)
  np.testing.assert_allclose(run("auto"), run("dense"), atol=1e-5)
  text = "attention of 300 queries to 300 keys, 4 heads of 16, 2 of keys, causal"
  assert f"{text}: blocks." in caplog.text and "dense" not in caplog.text
  before = caplog.text.count("attention of")
  run("auto")
  assert caplog.text.count("attention of") == before, "a site is said once"


def test_blocks_keep_their_own_dropout():
  """Each block draws anew; what is kept is scaled, so the mean stays."""
  (q, k, v, _), mask, _ = case(64, 64, 2, 2)
  words = jnp.array([3, 5], jnp.uint32)
  draw = jax.jit(lambda key: in_blocks(q, k, v, None, mask, 0.5, key, 0.0, 8))
  mean = np.mean([draw(jnp.array([i, 7], jnp.uint32)) for i in range(300)], 0)
  want = attend(q, k, v, None, mask.dense(), 0.0, None)
  assert np.abs(mean - want)[1].mean() < 0.1 * np.abs(draw(words) - want)[1].mean()


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_kept_for_the_gradient(blocks):
  """Neither scores nor masks nor dropout's bits: what grows with T S is made again."""
  (q, k, v, _), mask, _ = case(120, 120, 4, 2, causal=True, window=50)
  words = jnp.array([3, 5], jnp.uint32)
  run = lambda q, k, v: (
    in_blocks(q, k, v, None, mask, 0.3, words, 0.0, 24) if blocks else attend(q, k, v, None, mask, 0.3, words)
  )
  kept = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], q, k, v)
  sizes = [int(np.prod(x.shape)) for x in jax.tree.leaves(kept)]
  assert max(sizes) <= q.size and sum(sizes) <= 5 * q.size, [x.shape for x in jax.tree.leaves(kept)]


def test_gradient_with_dropout():
  """By differences in float64: the same entries are dropped forward and backward, in blocks too."""
  with jax.enable_x64(True):
    (q, k, v, b), mask, g = case(24, 24, 2, 1, causal=True, bias=True)
    args = [np.asarray(x, np.float64) for x in (q, k, v, b)]
    words = jnp.array([3, 5], jnp.uint32)
    for run in (
      lambda *a: attend(*a, mask, 0.4, words, 1.5),
      lambda *a: in_blocks(*a, mask, 0.4, words, 1.5, 8),
    ):
      total = jax.jit(lambda *a, run=run: jnp.sum(run(*a) * g))
      grads = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*args)
      rng = np.random.default_rng(0)
      for i, grad in enumerate(grads):
        way = rng.normal(size=args[i].shape)
        move = lambda e, i=i, way=way: [x + e * way if j == i else x for j, x in enumerate(args)]
        slope = (total(*move(1e-3)) - total(*move(-1e-3))) / 2e-3
        np.testing.assert_allclose(jnp.sum(grad * way), slope, rtol=2e-3)


def test_gradient_of_dropout_passes_where_its_value_does():
  words, x = jnp.array([3, 5], jnp.uint32), jnp.arange(1.0, 1001)
  out, pull = jax.vjp(lambda x: layers.dropout(x, 0.3, words), x)
  (grad,) = pull(jnp.ones_like(x))
  np.testing.assert_allclose(grad, out / x)
  assert 0.2 < np.mean(out == 0) < 0.4
