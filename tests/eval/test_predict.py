"""The evaluator that predicts: values that do not depend on packing, batch size or devices; files that show what
happened.

Catches: predictions put with another example of their row, a row or an entry of padding scored, unlabelled examples
scored, NaN passed on or padding's NaN refused, labels and predictions swapped in the confusion matrix, right rows
before wrong ones, a loss that is a mean of batch means, batches that pile up on the device.
"""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import sharding
from jaxft.errors import InputError, NumbersError, StorageError
from jaxft.eval import evaluators, graders, predict

N, V, LENGTH = 23, 31, 14
RULES = dict(batch=("data", "fsdp"))
CLASSES = ("no", "yes", "perhaps")
TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")
WAYS = ((1, False, 1), (3, False, 2), (8, True, 1), (4, True, 2))  # batch, packing, devices


class Store:
  """Examples of uneven lengths with whatever labels a task has."""

  meta = dict(labels=list(CLASSES))

  def __init__(self):
    rng = np.random.default_rng(4)
    self.rows = [rng.integers(1, V, n) for n in rng.integers(2, 9, N)]
    self.classes, self.values = rng.integers(0, 3, N), rng.standard_normal(N).astype(np.float32)
    self.several = rng.integers(0, 2, (N, 3)).astype(np.float32)
    self.tags = [rng.integers(0, len(TAGS), len(r)) for r in self.rows]
    self.places = [np.append(1, rng.integers(0, 2, len(r) - 1)) for r in self.rows]  # 1: the first token of a word
    self.weights = np.ones(N, np.float32)

  def __len__(self):
    return N

  def texts(self, i):
    return (" ".join(map(str, self.rows[i])), "")

  def where(self, i):
    return f"file.tsv line {i + 1}"


class Batches:
  """One pass in the layout of single-sided batches; packed rows hold the examples in an order that is not theirs."""

  def __init__(self, store, kind, batch, pack):
    self.store, self.kind, self.batch = store, kind, batch
    self.rows, room = [], []
    for i in sorted(range(N), key=lambda i: (-len(store.rows[i]), i)) if pack else range(N):
      fits = [r for r, left in enumerate(room) if left >= len(store.rows[i])] if pack else []
      if not fits:
        self.rows.append([])
        room.append(LENGTH)
      at = fits[0] if fits else -1
      self.rows[at].append(i)
      room[at] -= len(store.rows[i])
    self.most = max(map(len, self.rows))

  def steps(self, epochs):
    assert epochs == 1
    return -(-len(self.rows) // self.batch)

  def row_examples(self, step):
    rows = self.rows[step * self.batch : (step + 1) * self.batch]
    return rows + [[]] * (self.batch - len(rows))

  def host_batch(self, step, host, hosts):
    B, M, s = self.batch, self.most, self.store
    out = dict(inputs=np.zeros((B, LENGTH), np.int32), input_segments=np.zeros((B, LENGTH), np.int32))
    if self.kind == "tag":
      out |= dict(targets=np.zeros((B, LENGTH), np.int32), weights=np.zeros((B, LENGTH), np.float32))
    else:
      like = dict(classify=s.classes, regress=s.values, several=s.several, qa=s.classes)[self.kind]
      out["labels"] = np.zeros((B, M, *like.shape[1:]), np.int32 if like.dtype == np.int64 else np.float32)
      out["label_weights"] = np.zeros((B, M), np.float32)
    for r, ids in enumerate(self.row_examples(step)):
      at = 0
      for m, i in enumerate(ids):
        here = slice(at, at + len(s.rows[i]))
        at = here.stop
        out["inputs"][r, here], out["input_segments"][r, here] = s.rows[i], m + 1
        if self.kind == "tag":
          out["targets"][r, here], out["weights"][r, here] = s.tags[i], s.places[i] * s.weights[i]
        else:
          out["labels"][r, m], out["label_weights"][r, m] = like[i], s.weights[i]
    share = B // hosts
    return {k: x[host * share : (host + 1) * share] for k, x in out.items()}


def table(outputs, seed=7):
  return np.random.default_rng(seed).standard_normal((V, outputs)).astype(np.float32)


def entries(params, batch):
  """Mean over the tokens of an example of a table's rows [B, M, C]; what is no example is 0 / 0."""
  M = batch["labels"].shape[1]
  member = (batch["input_segments"][:, None] == 1 + jnp.arange(M)[:, None]).astype(jnp.float32)
  return jnp.einsum("bmt,btc->bmc", member, params[batch["inputs"]]) / member.sum(-1, keepdims=True)


def tokens(params, batch):
  return jnp.where(batch["input_segments"][..., None] > 0, params[batch["inputs"]], jnp.nan)


def cross_entropy(output, batch):
  logp = jax.nn.log_softmax(jnp.where(batch["label_weights"][..., None] > 0, output, 0))
  nll = -jnp.take_along_axis(logp, batch["labels"][..., None], -1)[..., 0]
  return jnp.sum(nll * batch["label_weights"]), jnp.sum(batch["label_weights"]), {}


def make(grader, kind="classify", *, store=None, way=WAYS[2], tmp=None, fn=entries, loss=None, told=None, samples=6):
  batch, pack, devices = way
  store = store or Store()
  mesh = sharding.make_mesh(dict(data=devices, fsdp=1), jax.devices()[:devices])
  rows = evaluators.whole_batch(batch, mesh, RULES)
  return predict.PredictEvaluator(
    "task", 5, predict=fn, grader=grader, loss=loss, batches=Batches(store, kind, rows, pack), store=store,
    samples=samples, folder=tmp, mesh=mesh, rules=RULES,
    progress=lambda: (lambda *a: told.append(a)) if told is not None else (lambda *a: None),
  )  # fmt: skip


def by_hand(store, params):
  return np.stack([params[r].astype(np.float64).mean(axis=0) for r in store.rows])


@pytest.mark.parametrize("way", WAYS)
def test_classes_in_any_batch(way, tmp_path):
  store, params, told = Store(), table(3), []
  e = make(
    graders.Classes(("accuracy", "f1_macro", "mcc"), CLASSES), way=way, loss=cross_entropy, told=told, tmp=tmp_path
  )
  assert (e.name, e.every, e.start) == ("task", 5, False)
  values = e.run(params, 40)
  logits = by_hand(store, params)
  found = logits.argmax(axis=1)
  nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(N), store.classes]
  tp = lambda c: 2 * ((found == c) & (store.classes == c)).sum() / ((found == c).sum() + (store.classes == c).sum())
  want = dict(loss=nll.mean(), accuracy=(found == store.classes).mean(), f1_macro=np.mean([tp(c) for c in range(3)]))
  assert {k: values[k] for k in want} == pytest.approx(want, rel=1e-6) and 0 < want["accuracy"] < 1
  assert tuple(values) == e.gives == ("loss", "accuracy", "f1_macro", "mcc", "examples") and values["examples"] == N
  assert told == [(i + 1, len(told)) for i in range(len(told))] and len(told) == e._batches.steps(1)
  facts = json.loads((tmp_path / "task-40-confusion.json").read_text())
  for label in range(3):
    for other in range(3):
      assert facts["matrix"][label][other] == ((store.classes == label) & (found == other)).sum()
  one = facts["classes"][1]
  assert facts["labels"] == list(CLASSES) and facts["step"] == 40 and one["label"] == "yes"
  assert one["examples"] == (store.classes == 1).sum() and one["predicted"] == (found == 1).sum()
  assert one["f1"] == pytest.approx(tp(1)) and one["recall"] == pytest.approx((found[store.classes == 1] == 1).mean())
  assert (tmp_path / "task-confusion.png").read_bytes().startswith(b"\x89PNG")
  rows = [json.loads(line) for line in (tmp_path / "task-40.jsonl").read_text().splitlines()]
  assert len(rows) == 6 and all(r["label"] != r["predicted"] for r in rows), "the wrong ones first"
  for r in rows:
    i = r["id"]
    chance = np.exp(logits[i]) / np.exp(logits[i]).sum()
    assert (r["input"], r["label"]) == (store.texts(i)[0], CLASSES[store.classes[i]])
    assert r["predicted"] == CLASSES[found[i]] and r["score"] == pytest.approx(chance.max(), rel=1e-5)
  scores = [r["score"] for r in rows]
  assert scores == sorted(scores, reverse=True), "the surest mistakes first"


@pytest.mark.parametrize("way", WAYS)
def test_the_other_kinds_in_any_batch(way, tmp_path):
  store = Store()
  e = make(graders.Values(("mae", "rmse")), "regress", way=way, tmp=tmp_path)
  params = table(1)
  error = np.abs(by_hand(store, params)[:, 0] - store.values)
  want = dict(mae=error.mean(), rmse=np.sqrt(np.square(error).mean()), examples=N)
  assert e.run(params, 1) == pytest.approx(want, rel=1e-6)
  rows = [json.loads(line) for line in (tmp_path / "task-1.jsonl").read_text().splitlines()]
  assert rows[0]["id"] == error.argmax() and rows[-1]["id"] == error.argmin() and len(rows) == 6
  assert rows[0]["error"] == pytest.approx(error.max(), rel=1e-5) and not list(tmp_path.glob("*confusion*"))
  e = make(graders.MultiLabel(("accuracy", "f1_micro"), CLASSES), "several", way=way, tmp=tmp_path)
  params = table(3)
  chosen, truth = by_hand(store, params) > 0, store.several > 0
  f1 = 2 * (chosen & truth).sum() / (chosen.sum() + truth.sum())
  want = dict(accuracy=(chosen == truth).all(axis=1).mean(), f1_micro=f1, examples=N)
  assert e.run(params, 2) == pytest.approx(want) and 0 < f1 < 1
  row = json.loads((tmp_path / "task-2.jsonl").read_text().splitlines()[0])
  names = lambda on: ", ".join(c for c, o in zip(CLASSES, on) if o)
  assert (row["label"], row["predicted"]) == (names(truth[row["id"]]), names(chosen[row["id"]]))
  assert row["wrong_labels"] == (chosen != truth).sum(axis=1).max() == (chosen != truth)[row["id"]].sum()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_tags_at_supervised_places(way, on_device, tmp_path):
  store, params = Store(), table(len(TAGS))
  fn = (lambda p, b: jnp.argmax(tokens(p, b), -1)) if on_device else tokens
  e = make(graders.Tags(("f1", "token_accuracy", "per_type"), TAGS), "tag", way=way, fn=fn, tmp=tmp_path)
  values = e.run(params, 3)
  at = [p > 0 for p in store.places]
  found = [params[r].argmax(axis=1)[a] for r, a in zip(store.rows, at)]
  truth = [t[a] for t, a in zip(store.tags, at)]
  right = sum((f == t).sum() for f, t in zip(found, truth))
  assert values["token_accuracy"] == pytest.approx(right / sum(map(len, truth))) and values["examples"] == N
  assert set(values) == set(e.gives) and {"f1_X", "recall_Y"} < set(values)
  row = json.loads((tmp_path / "task-3.jsonl").read_text().splitlines()[0])
  assert row["label"] == " ".join(TAGS[t] for t in truth[row["id"]])
  assert row["predicted"] == " ".join(TAGS[t] for t in found[row["id"]])
  assert row["wrong_tags"] == max((f != t).sum() for f, t in zip(found, truth))


@pytest.mark.parametrize("way", WAYS)
def test_answers_from_all_tokens_of_each_example(way, tmp_path):
  store, params, seen = Store(), table(2), []

  def decode(given, logits):
    assert given is store
    seen.extend(logits)
    said = lambda i: str(store.rows[i][logits[i][:, 0].argmax()])
    return [  # a question for every second example; every other of these has no answer
      dict(id=f"q{i}", question="which?", references=[said(i)] if i % 4 else [], answer=said(i), score=1.0 * i)
      for i in range(0, N - 1, 2)
    ]

  grader = graders.make("qa", ("exact_match", "f1"), decode=decode)
  e = make(grader, "qa", store=store, way=way, fn=tokens, tmp=tmp_path)
  values = e.run(params, 9)
  assert values == pytest.approx(dict(exact_match=100 * 5 / 11, f1=100 * 5 / 11, examples=11))
  assert all(np.array_equal(x, params[r]) for x, r in zip(seen, store.rows, strict=True))
  rows = [json.loads(line) for line in (tmp_path / "task-9.jsonl").read_text().splitlines()]
  assert [r["id"] for r in rows] == ["q0", "q4", "q8", "q12", "q16", "q20"] and rows[0]["label"] == ""


def test_unlabelled_examples_are_left_out_and_said(caplog):
  store, params = Store(), table(3)
  store.weights[[2, 5, 11]] = 0
  store.classes[[2, 5]] = -1
  e = make(graders.Classes(("accuracy",), (*CLASSES, "never")), store=store)
  with pytest.raises(InputError, match="3 outputs, but the data has 4 labels"):
    e.run(params, 0)
  e = make(graders.Classes(("accuracy",), CLASSES), store=store, loss=cross_entropy)
  with caplog.at_level(logging.WARNING, "jaxft"):
    values = [e.run(params, step) for step in (0, 1)][1]
  keep = store.weights > 0
  assert values["examples"] == 20 and np.isfinite(values["loss"])
  assert values["accuracy"] == pytest.approx((by_hand(store, params).argmax(1) == store.classes)[keep].mean())
  assert [r.message for r in caplog.records] == ["eval/task: 3 of 23 examples have no label and are not scored"]
  store.weights[:] = 0
  with pytest.raises(InputError, match="not one of 23 examples has a label"):
    make(graders.Classes(("accuracy",), CLASSES), store=store).run(params, 0)


@pytest.mark.parametrize(
  "kind,grader,fn,outputs",
  [
    ("classify", graders.Classes(("mcc",), CLASSES), entries, 3),
    ("regress", graders.Values(("mae",)), entries, 1),
    ("tag", graders.Tags(("f1",), TAGS), tokens, 5),
    ("qa", graders.Answers(("f1",), None), tokens, 2),
  ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_no_numbers(kind, grader, fn, outputs, bad):
  store, params = Store(), table(outputs)
  store.places = [np.ones(len(r), int) for r in store.rows]
  token = store.rows[13][1]
  params[token, 0] = bad
  with pytest.raises(NumbersError, match=r"not numbers for \d+ examples of a batch: (.*, )?file.tsv line"):
    make(grader, kind, store=store, fn=fn).run(params, 0)
  some = [i for i, r in enumerate(store.rows) if token in r]
  with pytest.raises(NumbersError, match=f"line {some[0] + 1}[,.]"):
    make(grader, kind, store=store, fn=fn, way=(1, False, 1)).run(params, 0)


def test_notes_are_said_once(caplog):
  store = Store()
  store.classes[:] = 1
  e = make(graders.Classes(("f1_macro",), CLASSES), store=store)
  with caplog.at_level(logging.WARNING, "jaxft"):
    e.run(table(3), 0)
    e.run(table(3), 1)
  assert len(caplog.records) == 1 and "2 of 3 classes have no example (no, perhaps)" in caplog.records[0].message


def test_at_most_three_batches_wait():
  e = make(graders.Classes(("mcc",), CLASSES), way=(2, False, 1))
  step, take, waiting, most = e._step, e._take, [], []

  def begin(*a):
    waiting.append(a)
    most.append(len(waiting))
    return step(*a)

  def end(*a):
    waiting.pop()
    take(*a)

  e._step, e._take = begin, end
  e.run(table(3), 0)
  assert len(most) == 12 and max(most) == 3 and not waiting


def test_chosen():
  assert predict.chosen(np.array([0, 0.2, 0, 0.9, 0.5, 0]), 2) == [3, 1]
  assert predict.chosen(np.array([0, 0.2, 0, 0.9, 0.5, 0]), 5) == [3, 4, 1, 0, 5]
  assert predict.chosen(np.zeros(9), 3) == [0, 4, 8] and predict.chosen(np.ones(2), 9) == [0, 1]


def test_what_cannot_be_is_refused(tmp_path):
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  with pytest.raises(InputError, match="eval/x: the evaluation data has no rows"):
    predict.PredictEvaluator(
      "x", 0, predict=None, grader=graders.Values(("mae",)), loss=None, batches=None, store=(), samples=0, folder=None,
      mesh=mesh, rules=dict(batch="data"), progress=None,
    )  # fmt: skip
  with pytest.raises(InputError, match="one output, this one gives 3"):
    make(graders.Values(("mae",)), "regress").run(table(3), 0)
  with pytest.raises(InputError, match="3 outputs, but the data has 5 labels"):
    make(graders.Tags(("f1",), TAGS), "tag", fn=tokens).run(table(3), 0)
  with pytest.raises(InputError, match="others such as 'NN'"):
    graders.make("tag", ("f1",), labels=("NN", "VB"))
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match="cannot be written"):
    make(graders.Classes(("mcc",), CLASSES), tmp=tmp_path / "file").run(table(3), 0)
  assert make(graders.make("classify", ("mcc",), labels=CLASSES), tmp=tmp_path, samples=0).run(table(3), 0)
  assert isinstance(graders.make("classify", ("f1_micro",), labels=CLASSES, multi=True), graders.MultiLabel)
  assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob(".*"))
