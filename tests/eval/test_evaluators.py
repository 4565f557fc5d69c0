"""Evaluators: values that do not depend on batch size, padding or devices, and samples that show what happened.

Catches: a mean of batch means, the padded rows of the last batch counted, padding tokens counted, smoothing in the
reported loss, outputs and references paired in another order, a length limit that cuts in silence.
"""

import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "infer"))

import tiny

from jaxft import sharding
from jaxft.data import objectives, pipeline
from jaxft.errors import InputError
from jaxft.eval import evaluators
from jaxft.infer import generate, options
from jaxft.train import losses

N, CAPS = 13, dict(inputs=12, targets=9)


class Store:
  """What a data cache offers, in memory: uneven examples."""

  pad, eos, caps, sides = 0, 1, CAPS, tuple(CAPS)
  objective, variants, aligned = objectives.of("seq2seq", False), 1, {}

  def __init__(self):
    rng = np.random.default_rng(8)
    self.lengths = {s: rng.integers(2, CAPS[s] + 1, N).astype(np.int32) for s in CAPS}
    self.rows = {s: [np.append(rng.integers(2, 41, n - 1), 1).astype(np.int32) for n in self.lengths[s]] for s in CAPS}

  def __len__(self):
    return N

  def prompt(self, i):
    return self.tokens("inputs", i)

  def tokens(self, name, i):
    return self.rows[name][i]

  @property
  def context(self):
    return np.zeros(N, np.int32)

  def index(self, side, ids):
    starts = np.cumsum([0, *self.lengths[side]])
    return np.concatenate([np.zeros(0, int), *(np.arange(starts[i], starts[i + 1]) for i in ids)])

  def values(self, side, index):
    return np.concatenate(self.rows[side])[index]

  def texts(self, i):
    return tuple(" ".join(map(str, self.rows[s][i][:-1])) for s in CAPS)


class Words:
  fingerprint = "words"

  def encode(self, texts):
    return [[int(w) for w in t.split()] + [1] for t in texts]

  def decode(self, rows):
    return [" ".join(map(str, r)) for r in rows]


RULES = dict(batch=("data", "fsdp"))


@pytest.fixture(scope="module")
def model():
  sk = tiny.skeleton()
  return sk, tiny.params(sk.shapes)


def loss_fn(model, batch, key):
  return losses.seq2seq(model, batch, key, losses.Options(0.2, 0.1))  # must not show in the reported loss


def run(model, batch, pack, devices, **more):
  mesh = sharding.make_mesh(dict(data=devices, fsdp=1), jax.devices()[:devices])
  rows = evaluators.whole_batch(batch, mesh, RULES)
  batches = pipeline.Batches(Store(), seed=0, batch=rows, lengths=CAPS, pack=pack, buckets=(), shuffle=False)
  told = []
  e = evaluators.LossEvaluator(
    "valid", 5, skeleton=model[0], batches=batches, loss_fn=loss_fn, mesh=mesh, rules=RULES,
    progress=lambda: lambda *a: told.append(a), **more)  # fmt: skip
  assert (e.name, e.every) == ("valid", 5)
  values = e.run(model[1], 0)
  assert set(values) == set(e.gives) and told == [(i + 1, len(told)) for i in range(len(told))]
  return values


def test_loss_by_hand_and_in_any_batch(model):
  sk, params = model
  store, nll, correct = Store(), 0.0, 0
  forward = jax.jit(lambda p, b: (lambda m: jax.nn.log_softmax(m.logits(m.hidden(b, None))))(sk.bind(p)))
  for i in range(N):
    one = lambda x: np.pad(x, (0, 12 - len(x)))[None]
    x, y = store.tokens("inputs", i), store.tokens("targets", i)
    batch = dict(
      inputs=one(x), input_segments=one(np.ones_like(x)), targets=one(y), target_segments=one(np.ones_like(y))
    )
    logp = np.asarray(forward(params, batch), np.float64)[0, : len(y)]
    nll -= logp[np.arange(len(y)), y].sum()
    correct += (logp.argmax(-1) == y).sum()
  tokens = int(store.lengths["targets"].sum())
  want = dict(loss=nll / tokens, perplexity=math.exp(nll / tokens), accuracy=correct / tokens, tokens=tokens)
  for batch, pack, devices in ((1, False, 1), (3, False, 2), (8, True, 1)):
    assert run(model, batch, pack, devices) == pytest.approx(want, rel=1e-6)


def test_loss_of_words_and_bytes(model):
  plain, values = run(model, 8, True, 1), run(model, 8, True, 1, counts=lambda: dict(words=30, bytes=170))
  nll = plain["loss"] * plain["tokens"]
  want = dict(plain, word_perplexity=math.exp(nll / 30), byte_perplexity=math.exp(nll / 170))
  assert values == pytest.approx(dict(want, bits_per_byte=math.log2(want["byte_perplexity"])))
  assert set(plain) == {"loss", "perplexity", "accuracy", "tokens"}


def test_no_targets_is_refused(model):
  with pytest.raises(InputError, match="not one supervised token"):
    mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
    empty = type(
      "Empty",
      (),
      dict(
        batch=1,
        steps=lambda self, n: 1,
        host_batch=lambda self, *a: {
          k: np.zeros((1, 4), np.float32 if k == "weights" else np.int32)
          for k in ("inputs", "input_segments", "targets", "target_segments", "weights")
        },
      ),
    )()
    evaluators.LossEvaluator(
      "v",
      0,
      skeleton=model[0],
      batches=empty,
      loss_fn=loss_fn,
      mesh=mesh,
      rules=dict(batch="data"),
      progress=lambda: lambda *a: None,
    ).run(model[1], 0)


def test_generate(model, tmp_path):
  sk, params = model
  g = generate.Generator(sk, Words(), options.Options(length=5, eos=(1,), pad=0, start=0), batch=4)
  store = Store()
  answers = g.tokens(params, [store.tokens("inputs", i) for i in range(N)])
  store.rows["targets"][4] = np.array(
    [int(t) for t in answers[4].texts[0].split()] + [1], np.int32
  )  # one row that is right
  told = []
  e = evaluators.GenerateEvaluator(
    "gen",
    0,
    generator=g,
    store=store,
    names=("chrf", "exact_match"),
    samples=4,
    folder=tmp_path / "samples",
    progress=lambda: lambda *a: told.append(a),
  )
  values = e.run(params, 70)
  assert told[-1] == (N, N)
  cut = np.mean([a.cut[0] for a in answers])
  assert set(values) == set(e.gives), "what save.best may name is known before the first evaluation"
  assert 0 < cut < 1 and values["limit_share"] == pytest.approx(cut)
  assert values["exact_match"] == pytest.approx(1 / N) and 0 < values["chrf"] < 100
  assert values["output_tokens"] == pytest.approx(np.mean([a.lengths[0] for a in answers]))
  assert "nrefs:1" in e.signatures["chrf"]
  samples = [json.loads(line) for line in (tmp_path / "samples" / "gen-70.jsonl").read_text().splitlines()]
  assert [s["id"] for s in samples] == [0, 4, 8, 12]
  assert all(
    (s["input"], s["reference"]) == store.texts(s["id"]) and s["output"] == answers[s["id"]].texts[0] for s in samples
  )
  assert samples[1]["output"] == samples[1]["reference"]


def test_answer_length():
  store = Store()
  assert evaluators.answer_length(store) == 24  # 9 tokens at most, 8 more, whole eights
  store.lengths["targets"][3] = 400
  assert evaluators.answer_length(store) == 504
