"""The train step: the same numbers however the batch is cut, and nothing moves that should not.

Catches: a mean per micro-batch, a sum over devices that counts padding, dropout that depends on the devices, a frozen
leaf or layer that decays or gets state, an update applied from a NaN gradient, a learning rate that follows the
optimizer's own count, a state that is not born with its shardings, a step that is compiled again in silence.
"""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import sharding, trees
from jaxft.errors import InputError
from jaxft.families import registry
from jaxft.models import layers
from jaxft.train import losses, optimizer, step
from tests.train import toy

RULES = dict(batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
NUMBERS = dict(
  name="adamw",
  lr=3e-2,
  schedule="linear",
  warmup=3,
  cooldown=0.2,
  end=0.1,
  clip=0.7,
  b1=0.8,
  b2=0.95,
  eps=1e-7,
  decay=0.03,
  decay_rules=((r".*(norm|bias|scale).*", 0.0), (r".*", 1.0)),
  lr_rules=((r".*", 1.0),),
  layer_decay=1.0,
  toward_init=0.0,
  unfreeze=(),
  steps=17,
)
ALL = ((r".*", True),)
FAST = {"xla_backend_optimization_level": 0}  # compiles in a third of the time


class Run:
  """A state and a compiled step on a mesh; unless `numbers` ask for an optimizer, its state is the last gradient."""

  def __init__(
    self, mesh=(1, 1, 1), micro=1, rate=0.0, trainable=ALL, loss=None, numbers=None, dtype=np.float32, extra=()
  ):
    self.mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), mesh)), jax.devices()[: int(np.prod(mesh))])
    self.start = toy.init(dtype)
    places = sharding.leaf_shardings(self.mesh, RULES, toy.AXES, self.start)
    flags = trees.trainable(trainable, self.start, toy.AXES)
    tx, self.lr = optax.trace(0.0), lambda t: 1.0
    if numbers is not None:
      tx, self.lr = optimizer.make(**{**NUMBERS, **numbers}, shapes=self.start, axes=toy.AXES, trainable=flags)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.start)
    self.abstract = step.abstract_state(shapes, places, tx, flags)
    self.params = jax.device_put(self.start, places)
    self.state = step.init_state(self.params, 5, tx, self.abstract)
    fn = step.make_train_step(
      loss or toy.loss(rate), tx, self.lr, micro, trainable=flags, pins=step.shardings_of(self.abstract.params)
    )
    self.place = sharding.batch_sharding(self.mesh, RULES)
    rows = {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype)
      for k, v in {**toy.batch(), **dict.fromkeys(extra, toy.batch()["weights"])}.items()
    }
    self.step = step.jit_train_step(fn, self.mesh, RULES, self.abstract).lower(self.abstract, rows).compile(FAST)

  def go(self, *batches):
    """Runs the batches; returns the metrics of each, and the parameters at the end."""
    metrics = []
    for rows in batches:
      self.state, m = self.step(self.state, sharding.put_batch(rows, self.place, toy.B))
      metrics.append(jax.device_get(m))
    return metrics, jax.device_get(step.whole(self.state))


@functools.lru_cache
def gradient(mesh=(1, 1, 1), micro=1, rate=0.0):
  """(metrics, gradient) of one batch."""
  run = Run(mesh, micro, rate)
  (metrics,), _ = run.go(toy.batch())
  return metrics, jax.device_get(run.state.opt.trace)


def same_gradient(a, b, limit=1e-6):
  """Relative to the norm of the leaf; 1e-6 is some ten roundings of float32."""
  for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values()):
    assert np.linalg.norm(x - y) <= limit * np.linalg.norm(y) and np.linalg.norm(y) > 0, (
      path,
      np.linalg.norm(x - y) / np.linalg.norm(y),
    )


def same_metrics(a, b, limit=1e-6):
  for name in ("loss", "nll", "accuracy", "weight", "grad_norm", "param_norm", "learning_rate"):
    np.testing.assert_allclose(a[name], b[name], rtol=limit, err_msg=name)


def identical(a, b):
  a, b = np.asarray(a), np.asarray(b)
  return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_gradient_is_that_of_the_mean_over_all_tokens():
  metrics, grads = gradient()
  rows = {k: jnp.asarray(v) for k, v in toy.batch().items()}

  def mean(p):
    total, weight, _ = toy.loss()(p, rows, None)
    return total / weight

  want, want_grads = jax.jit(jax.value_and_grad(mean)).lower(toy.init()).compile(FAST)(toy.init())
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(want_grads), rtol=1e-6)
  assert metrics["weight"] == rows["weights"].sum()
  same_gradient(grads, jax.device_get(want_grads))


@pytest.mark.parametrize("micro", [2, 16])
def test_micro_batches_do_not_change_the_numbers(micro):
  same_metrics(gradient(micro=micro)[0], gradient()[0])
  same_gradient(gradient(micro=micro)[1], gradient()[1])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_devices_do_not_change_the_numbers_with_dropout_and_micro_batches(mesh):
  want, got = gradient((1, 1, 1), 2, 0.3), gradient(mesh, 2, 0.3)
  same_metrics(got[0], want[0])
  same_gradient(got[1], want[1])
  assert abs(want[0]["loss"] - gradient()[0]["loss"]) > 1e-4  # the dropout is real


def test_each_step_and_micro_batch_has_its_own_key():
  def loss(p, rows, key):  # the sums over the micro-batches give away what their keys were
    return p["head"]["kernel"][0, 0], jnp.float32(1), {"bits": jax.random.bits(key, (), jnp.uint16).astype(jnp.float32)}

  key = lambda t, i: jax.random.fold_in(jax.random.fold_in(jax.random.key(5), t), i)
  bits = lambda t: [float(jax.random.bits(key(t, i), (), jnp.uint16)) for i in range(4)]
  (first, second), _ = Run(micro=4, loss=loss).go(toy.batch(), toy.batch())
  assert first["bits"] == sum(bits(0)) / 4 and second["bits"] == sum(bits(1)) / 4 and len({*bits(0), *bits(1)}) == 8


def test_frozen_leaves_and_layers_do_not_move():
  rules = ((r"embed/.*", False), (r"encoder/bias/.*", False), (r"encoder/layers/[02]/.*", False), (r".*", True))
  run = Run(mesh=(2, 2, 2), trainable=rules, numbers=dict(decay=0.5))
  metrics, end = run.go(toy.batch(0), toy.batch(1))
  frozen = {"embed/embedding", "encoder/bias/embedding"}
  after = trees.flatten(end)
  for path, before in trees.flatten(run.start).items():
    if path.startswith("encoder/layers/"):
      assert [identical(a, b) for a, b in zip(before, after[path])] == [True, False, True], path
    else:
      assert identical(before, after[path]) == (path in frozen), path
  assert set(trees.flatten(run.state.frozen)) == frozen
  state = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(run.state.opt)[0]]
  assert any("wi" in k for k in state) and not any("embed" in k for k in state)
  grads = trees.flatten(gradient()[1])
  want = np.sqrt(sum(np.sum((g[1] if "encoder/layers" in p else g) ** 2) for p, g in grads.items() if p not in frozen))
  np.testing.assert_allclose(metrics[0]["grad_norm"], want, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
  def poisoned(params, rows, key):
    loss, weight, sums = toy.loss()(params, rows, key)
    return (
      loss + jnp.sqrt(jnp.abs(rows["poison"][0, 0] * params["head"]["kernel"][0, 0])) + rows["poison"][0, 1],
      weight,
      sums,
    )

  run = Run(loss=poisoned, numbers={}, extra=("poison",))

  def rows(steep, added):  # sqrt has an infinite slope at 0: finite loss, gradient not; `added` is the other way round
    poison = np.zeros((toy.B, toy.S), np.float32)
    poison[0, :2] = steep, added
    return dict(toy.batch(), poison=poison)

  _, before = run.go(rows(1, 0))
  opt = jax.device_get(run.state.opt)
  metrics, after = run.go(rows(0, 0), rows(1, np.nan), rows(1, np.inf))
  assert [bool(np.isfinite(m["loss"])) for m in metrics] == [True, False, False]
  assert [(m["non_finite"], m["bad"]) for m in metrics] == [(1, 1), (1, 2), (1, 3)]
  assert all(map(identical, jax.tree.leaves(before), jax.tree.leaves(after)))
  assert all(map(identical, jax.tree.leaves(opt), jax.tree.leaves(jax.device_get(run.state.opt))))
  (m,), end = run.go(rows(1, 0))
  assert (m["non_finite"], m["bad"], int(run.state.step), int(run.state.bad)) == (0, 0, 5, 0)
  np.testing.assert_allclose(
    m["learning_rate"], float(run.lr(4)), rtol=1e-6
  )  # the rate of step 4, not of the second update
  assert not identical(end["head"]["kernel"], after["head"]["kernel"])


def test_state_is_born_sharded_and_stays_so():
  run = Run(mesh=(2, 2, 2), numbers={})
  for _ in range(2):
    for x, want in zip(jax.tree.leaves(run.state), jax.tree.leaves(run.abstract)):
      assert x.sharding.is_equivalent_to(want.sharding, x.ndim) and (x.dtype, x.shape) == (want.dtype, want.shape)
    run.go(toy.batch())
  assert tuple(run.state.opt[1].mu["encoder"]["layers"]["q"]["kernel"].sharding.spec) == (None, "fsdp", "tensor", None)


def test_fresh_parameters_are_born_sharded_with_the_same_values():
  init = lambda key: {"a": jax.random.normal(key, (8, 6))}
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  places = sharding.leaf_shardings(
    mesh, RULES, dict(a=("embed", None)), dict(a=jax.ShapeDtypeStruct((8, 6), jnp.float32))
  )
  one = jax.tree.map(lambda _: sharding.replicated(sharding.make_mesh(dict(data=1), jax.devices()[:1])), places)
  got, want = step.init_params(init, 3, places)["a"], step.init_params(init, 3, one)["a"]
  assert (
    got.sharding == places["a"] and identical(got, want) and not identical(got, step.init_params(init, 4, places)["a"])
  )


def test_bfloat16_parameters_have_float32_state_and_learn():
  run = Run(dtype=jnp.bfloat16, numbers={})
  metrics, end = run.go(*[toy.batch()] * 8)
  assert end["head"]["kernel"].dtype == jnp.bfloat16 and run.state.opt[1].nu["head"]["kernel"].dtype == jnp.float32
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.3


def test_rounding_to_bfloat16_is_right_in_the_mean():
  words = layers.fold(jax.random.key(3), 1)
  x = np.float32([1.0009765625, -3.0001, 1e-30, 7e4])[:, None] * np.ones((4, 40_000), np.float32)
  found = np.asarray(jax.jit(layers.rounded)(x, words).astype(jnp.float32), np.float64)
  for row, values in zip(found, x):
    levels = np.unique(row)
    assert len(levels) == 2 and levels[0] < values[0] < levels[1] and np.diff(levels) <= abs(values[0]) / 64
    assert row.mean() == pytest.approx(values[0], abs=float(4 * row.std() / 200))
  odd = np.float32([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 0.0])
  odd[-1:].view(np.uint32)[:] = 0x7F800001  # a NaN whose first half is that of infinity
  kept = np.asarray(jax.jit(layers.rounded)(odd, words).astype(jnp.float32))
  np.testing.assert_array_equal(kept, odd)
  assert np.signbit(kept[1])


def test_updates_below_the_steps_of_bfloat16_add_up():
  """With lr 1e-5 no update of 0.2 reaches half a step of bfloat16, so that to the nearest nothing would ever move."""
  how = dict(lr=1e-5, schedule="constant", warmup=0, decay=0.0, b1=0.0, b2=0.0, clip=0.0)
  half, whole = (Run(numbers=how, dtype=d) for d in (jnp.bfloat16, np.float32))
  moved = {}
  for name, r in (("half", half), ("whole", whole)):
    before = np.asarray(r.state.params["head"]["kernel"], np.float32)
    r.go(*[toy.batch(0)] * 20)
    moved[name] = np.asarray(r.state.params["head"]["kernel"], np.float32) - before
  there = np.abs(moved["whole"]) > 1.9e-4  # twenty times the same sign
  share = (moved["half"] * np.sign(moved["whole"]))[there]
  assert there.sum() > 500 and share.mean() == pytest.approx(2e-4, rel=0.25)
  assert 0 < (share != 0).mean() < 0.9, "some have moved by a whole step of bfloat16 and some not at all"


def test_rounding_does_not_depend_on_the_mesh_and_differs_from_step_to_step():
  frozen = ((r"encoder/layers/[02]/.*", False), (r".*", True))
  r = Run((2, 2, 2), numbers={}, dtype=jnp.bfloat16, trainable=frozen)
  updates = jax.tree.map(lambda p: np.full(p.shape, 1e-4, np.float32), r.start)
  move = lambda state, u: step._moved(state, u)
  one = jax.device_get(jax.jit(move)(jax.device_get(r.state), updates))
  many = jax.device_get(jax.jit(move)(r.state, jax.device_put(updates, step.shardings_of(r.state.params))))
  later = jax.device_get(jax.jit(move)(r.state.replace(step=r.state.step + 1), updates))
  for path, x in trees.flatten(one).items():
    assert identical(x, trees.flatten(many)[path]), path
    assert not identical(x, trees.flatten(later)[path]), path
  _, end = r.go(toy.batch(0))
  for path, before in trees.flatten(r.start).items():
    if path.startswith("encoder/layers/"):
      assert [identical(a, b) for a, b in zip(before, trees.flatten(end)[path])] == [True, False, True], path


def test_eval_step_gives_sums_that_do_not_depend_on_the_batch():
  run = Run(mesh=(2, 2, 2))
  fn = step.jit_eval_step(step.make_eval_step(toy.loss()), run.mesh, RULES, step.shardings_of(run.params))
  rows = toy.batch()
  whole = fn(run.params, sharding.put_batch(rows, run.place, toy.B))
  parts = [
    fn(run.params, sharding.put_batch({k: v[i : i + 4] for k, v in rows.items()}, run.place, 4))
    for i in range(0, toy.B, 4)
  ]
  for name in ("loss", "nll", "correct", "weight"):
    np.testing.assert_allclose(sum(p[name] for p in parts), whole[name], rtol=1e-6)


INVOLUNTARY = "Involuntary full rematerialization"
T5 = dict(
  model_type="t5",
  d_model=24,
  d_kv=6,
  num_heads=8,
  d_ff=40,
  num_layers=3,
  num_decoder_layers=2,
  vocab_size=56,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=20,
  dropout_rate=0.1,
  layer_norm_epsilon=3e-5,
  feed_forward_proj="gated-gelu",
  tie_word_embeddings=False,
  decoder_start_token_id=0,
  eos_token_id=1,
  pad_token_id=0,
)


def test_real_model_compiles_without_involuntary_rematerialization(capfd):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  s = registry.skeleton(T5, dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)
  places = sharding.leaf_shardings(mesh, RULES, s.axes, s.shapes)
  flags = trees.trainable(ALL, s.shapes, s.axes)
  tx, lr = optimizer.make(**NUMBERS, shapes=s.shapes, axes=s.axes, trainable=flags)
  abstract = step.abstract_state(s.shapes, places, tx, flags)
  loss = lambda p, rows, key: losses.seq2seq(s.bind(p), rows, key, losses.Options(0.1, 1e-3))
  fn = step.make_train_step(loss, tx, lr, 2, trainable=flags, pins=step.shardings_of(abstract.params))
  rows = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in toy.batch().items()}
  step.jit_train_step(fn, mesh, RULES, abstract).lower(abstract, rows).compile(FAST)
  assert INVOLUNTARY not in capfd.readouterr().err

  # the log does tell: a lookup in a table that is split both ways (JAX 0.12 partitions even that well)
  if jax.__version_info__ >= (0, 11):
    pytest.skip("nothing is known that this compiler has to rematerialise: whether its log would tell is not covered")
  with sharding.use(mesh, RULES):
    lookup = lambda t, ids: sharding.pin(t[ids], ("batch", None, None))
    table = jax.ShapeDtypeStruct((56, 24), jnp.float32, sharding=places["embed"]["embedding"])
    jax.jit(lookup, in_shardings=(table.sharding, sharding.batch_sharding(mesh, RULES))).lower(
      table, rows["inputs"]
    ).compile(FAST)
  assert INVOLUNTARY in capfd.readouterr().err


def test_a_new_shape_of_a_batch_is_said_once(caplog):
  """It compiles the step anew; what changed is named, and a shape that was there before is not."""
  bound = step.Bound(lambda state, batch, hyper: (state, {}), dict(lr=1.0), sharding.make_mesh(dict(data=8)))
  rows = lambda n, **more: dict(inputs=np.zeros((8, n), np.int32), weights=np.zeros((8, 4), np.float32), **more)
  for n in (16, 16):
    bound(None, rows(n))
  assert not caplog.text
  for n in (24, 16, 24):
    bound(None, rows(n))
  assert len(caplog.records) == 1
  assert "inputs was int32[8, 16], is int32[8, 24]" in caplog.text and "weights" not in caplog.text
  bound(None, rows(24, input_types=np.zeros((8, 24), np.int32)))
  assert "(the 3. shape of a batch): input_types was not there, is int32[8, 24]" in caplog.text


def test_a_step_compiled_early_is_the_one_that_is_called():
  """The first call waits for the thread and compiles nothing; what failed there is raised by the call."""
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  rows, one = sharding.batch_sharding(mesh, RULES), sharding.replicated(mesh)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))

  traced = []

  def run(state, batch, hyper):
    traced.append(time.sleep(0.3))  # a call that did not wait would trace it too
    if batch["x"].shape[0] == 16:
      raise InputError("refused while it was traced")
    return state + batch["x"].sum() * hyper["lr"], {}

  jitted = jax.jit(run, donate_argnums=0, in_shardings=(one, rows, one), out_shardings=(one, None))
  spec = lambda n: dict(x=jax.ShapeDtypeStruct((n, 2), np.float32, sharding=rows))
  batch = lambda n: dict(x=jax.device_put(np.ones((n, 2), np.float32), rows))
  state = lambda: jax.device_put(np.float32(0), one)
  bound, given, began = step.Bound(jitted, dict(lr=0.5), mesh), batch(8), state()
  bound.prepare(jax.ShapeDtypeStruct((), np.float32, sharding=one), spec(8))
  assert float(bound(began, given)[0]) == 8.0
  assert len(traced) == 1 and sum("backend_compile" in name for name in compiled) == 1
  bound.prepare(jax.ShapeDtypeStruct((), np.float32, sharding=one), spec(16))
  with pytest.raises(InputError, match="refused"):
    bound(state(), batch(16))


def test_the_update_writes_over_the_state():
  """On a CPU, too: neither parameters nor statistics are copied before."""
  text = Run(numbers={}).step.as_text()
  copied = re.findall(r" copy\(%(?:args_0|state)__?_?(params|opt)[\w.]*\)", text)
  assert "input_output_alias" in text and not copied, f"{len(copied)} copies"
