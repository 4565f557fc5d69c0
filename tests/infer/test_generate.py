"""Greedy and beam search against transformers' `generate`, and what must not depend on the company a row keeps.

Catches: K instead of M * K candidates; ended beams entering from the whole M * K; scores divided by a length without
the end token or by that of the running beams; a stop rule with the wrong length; the heuristic not remembered;
penalties and masks in another order; positions or cache one step off; the cache not reordered; padding attended to.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxft import sharding
from jaxft.errors import InputError, NumbersError
from jaxft.infer import engine, generate, options

GOLDENS = json.loads((pathlib.Path(__file__).parent.parent / "goldens" / "generate.json").read_text())


@pytest.fixture(scope="module")
def model():
  sk = tiny.skeleton()
  return sk, tiny.params(sk.shapes)


@pytest.fixture(scope="module")
def torch_model(model):
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: outputs are compared with the golden file only, not with transformers itself")
  return tiny.torch_model(model[1])


@pytest.fixture(scope="module")
def outputs(model):
  """Runs each way once; the golden and the live test share it."""
  done = {}
  return lambda name: done[name] if name in done else done.setdefault(name, tiny.ours(*model, tiny.WAYS[name]))


def compare(name, o, out, tokens, scores):
  R = out.tokens_BRL.shape[1]
  got = [out.tokens_BRL[b, r, : out.lengths_BR[b, r]].tolist() for b in range(tiny.ROWS) for r in range(R)]
  want = [tiny.cut_at_end(t, o.eos) for t in tokens]
  assert got == [w[: len(g)] if not set(w[len(g) :]) - {o.pad} else w for g, w in zip(got, want)]
  if scores is not None:
    np.testing.assert_allclose(out.scores_BR.reshape(-1), scores, rtol=1e-5, atol=1e-5, err_msg=name)
  assert out.cut_BR.reshape(-1).tolist() == [len(g) == o.length if o.forced_eos else g[-1] not in o.eos for g in got]


@pytest.mark.parametrize("name", tiny.WAYS)
def test_equals_goldens(outputs, name):
  o, out = outputs(name)
  compare(name, o, out, GOLDENS[name]["tokens"], GOLDENS[name]["scores"])


@pytest.mark.parametrize("name", tiny.WAYS)
def test_equals_transformers(outputs, torch_model, name):
  o, out = outputs(name)
  compare(name, o, out, *tiny.reference(torch_model, tiny.WAYS[name]))


def test_goldens_say_something():
  """Outputs differ from row to row, some end and some are cut, and the ways differ from one another."""
  best = {}
  for name, way in tiny.WAYS.items():
    tokens = GOLDENS[name]["tokens"][:: way.get("samples", 1)]
    assert len({tuple(t) for t in tokens}) > tiny.ROWS / 2, name
    best[name] = json.dumps(GOLDENS[name]["tokens"])
  assert len(set(best.values())) >= len(best) - 1
  ends = [t[-1] == 1 for n in best for t in GOLDENS[n]["tokens"]]
  assert 0.2 < np.mean(ends) < 0.9


def test_rows_do_not_depend_on_their_company(model, outputs):
  """Alone, padded further or beside rows of padding: the same tokens; rows of padding are not waited for."""
  sk, params = model
  ids, segments = tiny.inputs()
  for name in ("greedy", next(n for n, way in tiny.WAYS.items() if way.get("early_stopping") is True)):
    o, all_ = outputs(name)
    run = jax.jit(
      lambda p, i, s, o=o: generate.generate(sk.bind(p), i, s, jnp.zeros((3, 2), jnp.uint32), o),
      compiler_options=tiny.FAST,
    )
    rows, pad = [4, 11], ((0, 1), (0, 5))
    some = jax.device_get(run(params, np.pad(ids[rows], pad), np.pad(segments[rows], pad)))
    np.testing.assert_array_equal(some.tokens_BRL[:2], all_.tokens_BRL[rows])
    np.testing.assert_allclose(some.scores_BR[:2], all_.scores_BR[rows], rtol=1e-5)


class Table:
  """A model whose next token depends on the last one alone; counts its steps."""

  def __init__(self, logits_VV):
    self.logits = jnp.asarray(logits_VV, jnp.float32)

  def start(self, inputs_BT, segments_BT, beams, length):
    return dict(index=jnp.int32(0)), jnp.zeros(inputs_BT.shape[0], jnp.int32)

  def step(self, tokens_BK, cache):
    return self.logits[tokens_BK], dict(index=cache["index"] + 1)

  def reorder(self, cache, parents_BK):
    return cache


def test_beams_find_what_greedy_misses():
  """Token 2 is likelier than 3 at first, but only 3 leads to a sure end; worked out by hand."""
  p = np.full((6, 6), 1e-9)
  p[0, 2], p[0, 3], p[2, 4], p[2, 5], p[2, 1], p[3, 1], p[4, 1], p[5, 1] = 0.6, 0.4, 0.4, 0.35, 0.25, 1.0, 1.0, 1.0
  args = (Table(np.log(p)), np.ones((1, 2), np.int32), np.ones((1, 2), np.int32), np.zeros((1, 2), np.uint32))
  base = dict(length=4, eos=(1,), pad=0, start=0, length_penalty=0.0)
  greedy = generate.generate(*args, options.Options(**base))
  beams = generate.generate(*args, options.Options(**base, beams=2, samples=2))
  assert greedy.tokens_BRL[0, 0].tolist() == [2, 4, 1, 0]
  assert beams.tokens_BRL[0].tolist() == [[3, 1, 0, 0], [2, 4, 1, 0]]
  np.testing.assert_allclose(np.exp(beams.scores_BR[0]), [0.4, 0.24], rtol=1e-4)
  np.testing.assert_allclose(np.exp(greedy.scores_BR[0]), [0.24], rtol=1e-4)


def test_greedy_stops_when_all_rows_are_done():
  """The loop's own step count, not the result, shows it."""
  p = np.full((4, 4), 1e-9)
  p[0, 2], p[2, 1], p[1, 3] = 1, 1, 1
  steps = []

  class Counted(Table):
    def step(self, tokens_BK, cache):
      jax.debug.callback(lambda i: steps.append(int(i)), cache["index"])
      return super().step(tokens_BK, cache)

  out = generate.generate(
    Counted(np.log(p)),
    np.ones((3, 2), np.int32),
    np.array([[1, 1], [1, 0], [0, 0]], np.int32),
    np.zeros((3, 2), np.uint32),
    options.Options(length=50, eos=(1,), pad=0, start=0),
  )
  jax.effects_barrier()
  assert len(steps) == 2 and out.lengths_BR[:2].tolist() == [[2], [2]]


class Words:
  """A tokenizer of one number a word; id 1 ends."""

  fingerprint = "words"

  def encode(self, texts):
    return [[int(w) for w in t.split()] + [1] for t in texts]

  def decode(self, rows):
    return [" ".join(map(str, r)) for r in rows]


def texts():
  ids, segments = tiny.inputs()
  return [" ".join(str(t) for t in row[: n - 1]) for row, n in zip(ids, segments.sum(1))]


def test_generator_batches_and_meshes(model):
  """Any batch size, one device or eight: the same texts, in the order asked; hit-limit flags follow the end token."""
  sk, params = model
  mesh, rules = (
    sharding.make_mesh(dict(data=4, fsdp=1, tensor=2)),
    dict(batch=("data", "fsdp"), vocab=None, heads=None, mlp=None),
  )
  o = options.Options(length=7, eos=(1,), pad=0, start=0)
  one = generate.Generator(sk, Words(), o, batch=64).texts(params, texts())
  assert len(one) == tiny.ROWS and len({a.texts[0] for a in one}) > 5
  assert [a.cut[0] for a in one] == [a.lengths[0] == 7 and len(a.texts[0].split()) == 7 for a in one]
  assert 0 < sum(a.cut[0] for a in one) < len(one)
  small = generate.Generator(sk, Words(), o, batch=3).texts(params, texts())
  split = generate.Generator(sk, Words(), o, batch=5, mesh=mesh, rules=rules).texts(params, texts())
  for other in (small, split):
    assert [(a.texts, a.cut) for a in other] == [(a.texts, a.cut) for a in one]


class Bare:
  """A skeleton over a Table."""

  generation, positions = dict(vocab=6), 0

  def bind(self, params):
    return Table(params)


def test_generator_refuses():
  base, params = dict(length=3, eos=(1,), pad=0, start=0), np.eye(6, dtype=np.float32)
  g = generate.Generator(Bare(), Words(), options.Options(**base), batch=4)
  beams = generate.Generator(Bare(), Words(), options.Options(**base, beams=2), batch=4)
  with pytest.raises(InputError, match="no tokens"):
    g.tokens(params, [[3, 1], []])
  short = Bare()
  short.positions = 4
  for start, fits in ((0, 4), (None, 1)):  # a decoder goes on from its prompt
    one = generate.Generator(short, Words(), options.Options(**{**base, "start": start}), batch=4)
    with pytest.raises(InputError, match=f"has {fits + 1} tokens and an answer may have 3, but the model has 4"):
      one._check_positions(np.array([fits, fits + 1]), range(2))
    one._check_positions(np.array([fits]), range(1))
  with pytest.raises(InputError, match="'b'.*6 entries"):
    g.tokens(params, [[3, 1], [6, 1]], ids=["a", "b"])
  assert g.tokens(params, []) == []
  for search in (g, beams):
    assert len(search.tokens(params, [[3, 1], [4, 1]])) == 2
    with pytest.raises(NumbersError, match="not numbers for 2 of 2 inputs"):
      search.tokens(params * np.nan, [[3, 1], [4, 1]])


def test_buckets_waste_little():
  sizes = sorted({engine.bucket(n) for n in range(1, 4097)})
  assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
  assert all(n <= engine.bucket(n) < max(17, 1.5 * n) for n in range(1, 4097))
