"""Batches of every kind: the same content packed or not, on any hosts, from any step; what is drawn anew each epoch.

Catches: labels of another segment, a row with more examples than a batch has labels for, a field beside the tokens that
is shifted, an epoch that differs between hosts, a balance that changes the number of examples, two variants of a row in
one epoch, tokens whose place or example id is wrong where masking asks for them.
"""

import numpy as np
import pytest

from jaxft.data import build, fields, pipeline, tasks
from jaxft.errors import InputError

WORDS = "Two young men are outside a man in blue shirt cleans window".split()


def text(i, n):
  return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(n))


N = 61
KINDS = dict(
  classify=dict(rows=[{"text": text(i, 1 + i % 9), "label": "xyz"[i % 7 % 3]} for i in range(N)]),
  multi=dict(rows=[{"text": text(i, 1 + i % 9), "label": list("xyz"[: i % 4])} for i in range(N)], multi=True),
  pairs=dict(rows=[{"text_a": text(i, 1 + i % 9), "text_b": text(i, 2), "label": i % 3} for i in range(N)]),
  regress=dict(rows=[{"text": text(i, 1 + i % 9), "score": i / 4} for i in range(N)]),
  causal=dict(rows=[{"text": text(i, 1 + i * 5 % 40)} for i in range(N)]),
  sft=dict(rows=[{"prompt": text(i, 1 + i % 5), "completion": " " + text(i, 1 + i % 3)} for i in range(N)]),
  prefix_lm=dict(rows=[{"prompt": text(i, 1 + i % 5), "completion": " " + text(i, 1 + i % 3)} for i in range(N)]),
  tag=dict(rows=[{"tokens": WORDS[: 1 + i % 9], "tags": ["O", "B-X", "I-X"] * 3} for i in range(N)]),
)
for row in KINDS["tag"]["rows"]:
  row["tags"] = row["tags"][: len(row["tokens"])]
NAMES = dict(multi="classify", pairs="classify")
EXAMPLE = ("labels", "label_weights")


@pytest.fixture
def opened(rows_store, wordpiece):
  def make(name, **given):
    case = dict(KINDS[name])
    return rows_store(case.pop("rows"), wordpiece, NAMES.get(name, name), length=30, **case, **given)

  return make


def content(batch, rows, segments):
  """Returns {example id: what the batch says of it} of a global batch."""
  out = {}
  for r, ids in enumerate(rows):
    for number, i in enumerate(ids):
      here = batch["input_segments"][r] == number + 1
      places = np.flatnonzero(here)
      assert len(places) and (np.diff(places) == 1).all()
      one = {k: x[r, here].tolist() for k, x in batch.items() if k not in EXAMPLE and k != "input_segments"}
      out[i] = one | {k: batch[k][r, number].tolist() for k in EXAMPLE if k in batch}
    real = sum(len(out[i]["inputs"]) for i in ids)
    for k, x in batch.items():
      assert not x[r, len(ids) if k in EXAMPLE else real :].any(), k
    assert len(ids) <= segments or "labels" not in batch
  return out


@pytest.mark.parametrize("name", KINDS)
def test_packed_and_padded_hold_the_same(opened, batches, name):
  s, seen = opened(name), []
  for given in (dict(), dict(pack=False), dict(pack=False, buckets=(0.3, 0.6)), dict(shuffle=False)):
    b, all_ = batches(s, **given), {}
    assert b.segments == 1 or b.pack
    for step in range(b.steps(1)):
      batch = b.host_batch(step, 0, 1)
      spec = b.spec(b.bucket(step))
      assert {k: (x.shape, x.dtype) for k, x in batch.items()} == spec
      made = content(batch, b.row_examples(step), b.segments)
      assert not made.keys() & all_.keys()
      all_ |= made
    assert sorted(all_) == list(range(len(s)))
    seen.append(all_)
  assert all(x == seen[0] for x in seen) and len(seen[0][0]["inputs"]) == s.lengths["inputs"][0]
  for i in (0, len(s) - 1):
    assert seen[0][i]["inputs"] == s.tokens("inputs", i).tolist()
    if "labels" in seen[0][i]:
      assert seen[0][i]["labels"] == s.scalar("labels", np.array([i]))[0].tolist() and seen[0][i]["label_weights"] == 1


@pytest.mark.parametrize("name", KINDS)
def test_hosts_and_restarts(opened, batches, name):
  s = opened(name)
  given = dict(balance="sampling") if s.objective.balanced else {}
  whole = batches(s, **given)
  everything = [whole.host_batch(i, 0, 1) for i in range(whole.steps(2.5))]
  for step in (len(everything) - 1, 0, whole.steps(1)):
    parts = [batches(s, **given).host_batch(step, h, 3) for h in range(3)]
    for k, x in everything[step].items():
      assert np.array_equal(x, np.concatenate([p[k] for p in parts])), k
  got = dict(batches(s, **given).stream(1, 4, 0, 1))
  assert all(
    np.array_equal(got[i][k], x) and got[i][k].dtype == x.dtype for i in (1, 3) for k, x in everything[i].items()
  )


@pytest.mark.parametrize("name", KINDS)
def test_worker_processes_make_the_same(opened, tmp_path, monkeypatch, name):
  monkeypatch.setattr(build, "CHUNK_ROWS", 20)
  monkeypatch.setattr(build, "SMALL", 30)
  stores = [opened(name, root=str(tmp_path / str(n)), workers=n) for n in (1, 2)]
  one, two = ({f.name: f.read_bytes() for f in s.folder.iterdir() if f.name != "meta.json"} for s in stores)
  assert one == two and stores[0].meta | dict(seconds=0) == stores[1].meta | dict(seconds=0)


def test_a_row_never_has_more_examples_than_labels(rows_store, wordpiece, batches):
  rows = [{"text": "a", "label": i % 2} for i in range(300)] + [{"text": text(1, 60), "label": 1}] * 100
  s = rows_store(rows, wordpiece, "classify", length=130)
  b = batches(s, batch=2)
  mean = s.lengths["inputs"].mean()
  assert b.segments == -(-int(np.ceil(1.5 * 130 / mean)) // 8) * 8 < 130 / 3
  sizes = [len(r) for e in range(3) for step in range(b.steps(e), b.steps(e + 1)) for r in b.row_examples(step)]
  assert max(sizes) == b.segments and len({b.host_batch(i, 0, 1)["labels"].shape for i in range(b.steps(1))}) == 1
  short = rows_store(rows[:300], wordpiece, "classify", length=1000, name="y.jsonl")
  assert batches(short).segments == 64 and batches(short, pack=False).segments == 1


# ---- what is drawn anew


def test_balance(opened, batches):
  rows = [
    {"text": text(i, 1 + i % 9), "label": "rare" if i % 20 == 0 else "odd" if i % 5 == 0 else "usual"}
    for i in range(200)
  ]
  KINDS["skewed"], NAMES["skewed"] = dict(rows=rows), "classify"
  try:
    s = opened("skewed")
  finally:
    del KINDS["skewed"], NAMES["skewed"]
  assert s.class_counts.tolist() == [30, 10, 160]
  for given in (dict(), dict(pack=False), dict(pack=False, buckets=(0.3, 0.4, 0.5, 0.6, 0.8), batch=2)):
    b, epochs = batches(s, balance="sampling", **given), []
    for epoch in range(6):
      ids = [i for step in range(b.steps(epoch), b.steps(epoch + 1)) for i in b.example_ids(step)]
      counts = np.bincount(s.scalar("labels", np.array(ids)), minlength=3)
      assert len(ids) == 200 and counts.max() - counts.min() <= 1
      times = np.bincount(ids, minlength=200)
      of = s.scalar("labels", np.arange(200))
      assert all(np.ptp(times[of == c]) <= 1 for c in range(3))  # nobody twice before everybody once
      epochs.append(ids)
    assert sorted(epochs[0]) != sorted(epochs[1]) and b.locate(b.steps(2))[0] == 2
    again = batches(s, balance="sampling", **given)
    assert again.example_ids(b.steps(1)) == b.example_ids(b.steps(1))
  assert len({b.steps(e + 1) - b.steps(e) for e in range(6)}) > 1 and b.summary()["balance"] == "sampling"


@pytest.mark.parametrize("name", ["multi", "regress", "sft"])
def test_balance_needs_classes(opened, batches, name):
  with pytest.raises(InputError, match=f"data.balance=sampling needs.*this one is {NAMES.get(name, name)}"):
    batches(opened(name), balance="sampling")
  with pytest.raises(InputError, match="did you mean 'sampling'"):
    batches(opened("classify"), balance="samplin")


MIX = (("reverse: {b}", "{a}"), ("{a} again", "{b}"))


@pytest.mark.parametrize("kind", ["seq2seq", "sft"])
def test_mix(rows_store, bytelevel, batches, kind):
  rows = [{"a": text(i, 1 + i % 4), "b": f" {i}"} for i in range(40)]
  task = dict(input="{a}", target="{b}", mix=MIX)
  s = rows_store(rows, bytelevel, kind, length=60, **task)
  plain = rows_store(rows, bytelevel, kind, length=60, input="{a}", target="{b}")
  assert len(s) == 120 and s.variants == 3 and s.report["examples"] == 40 and s.report["rows_kept"] == 40
  assert s.texts(3) == (rows[1]["a"], rows[1]["b"]) and s.texts(4) == (f"reverse: {rows[1]['b']}", rows[1]["a"])
  assert [s.texts(3 * i) for i in range(40)] == [plain.texts(i) for i in range(40)]
  assert [t["target"] for t in s.report["tasks"]] == ["{b}", "{a}", "{b}"]
  chosen = []
  for given in (dict(), dict(pack=False)):
    b = batches(s, lengths=dict(inputs=60, targets=60), **given)
    for epoch in range(2):
      ids = np.array([i for step in range(b.steps(epoch), b.steps(epoch + 1)) for i in b.example_ids(step)])
      assert sorted(ids // 3) == list(range(40)) and set(ids % 3) == {0, 1, 2}
      chosen.append(np.sort(ids).tolist())
  assert chosen[0] == chosen[2] and chosen[1] == chosen[3] and chosen[0] != chosen[1]


def test_a_row_goes_with_all_its_variants(rows_store, bytelevel):
  rows = [
    {"a": "a man", "b": " x"},
    {"a": "", "b": " y"},
    {"a": " ".join(["men"] * 30), "b": " z"},
    {"a": "a", "b": "b"},
  ]
  s = rows_store(rows, bytelevel, "sft", input="{a}", target="{b}", mix=MIX[:1], length=20, too_long="drop")
  assert [s.texts(i)[1] for i in range(len(s))] == [" x", "a man", "b", "a"]
  assert {k: v["count"] for k, v in s.report["dropped"].items()} == {
    "empty input": 1,
    "longer than data.lengths (inputs 20)": 1,
  }
  assert s.report["examples"] == 2


def test_mix_is_for_those_with_targets():
  with pytest.raises(InputError, match="task.mix is .*kind classify does not read.*seq2seq, sft, prefix_lm"):
    tasks.Task("classify", "{text}", mix=(("{a}", "{b}"),))


# ---- the seams of masking


def test_tokens_know_their_example_and_place(opened, batches):
  s, seen = opened("causal"), []

  def mask(batch, ids, places, seed, epoch):
    assert ids.shape == places.shape == batch["inputs"].shape and ids.dtype == places.dtype == np.int64
    assert np.array_equal(ids >= 0, batch["input_segments"] > 0) and seed == 5
    for i, p, token in zip(ids[ids >= 0], places[ids >= 0], batch["inputs"][ids >= 0]):
      assert s.tokens("inputs", i)[p] == token
    seen.append(epoch)
    return {
      **batch,
      "targets": batch["inputs"],
      "inputs": np.where((ids * 31 + places + epoch) % 7 == 0, 4, batch["inputs"]),
    }

  for given in (dict(), dict(pack=False)):
    b = batches(s, dynamic=fields.Dynamic(batch=mask), **given)
    whole = b.host_batch(b.steps(1), 0, 1)
    parts = [b.host_batch(b.steps(1), h, 2) for h in range(2)]
    assert all(np.array_equal(x, np.concatenate([p[k] for p in parts])) for k, x in whole.items())
    assert (whole["inputs"] == 4).any() and "targets" in dict(b.stream(0, 1, 0, 1))[0]
  assert set(seen) == {0, 1}


def test_sides_made_batch_by_batch(rows_store, wordpiece, batches, monkeypatch):
  """As span corruption: the inputs are every second token, the targets the others."""
  s = rows_store(KINDS["causal"]["rows"], wordpiece, "causal", length=30)
  monkeypatch.setattr(s, "objective", s.objective._replace(sides=("inputs", "targets"), stored=("inputs",)))
  of = lambda raw: dict(inputs=(raw + 1) // 2, targets=raw // 2)

  def corrupt(tokens, lengths, ids, seed, epoch):
    assert (lengths == s.lengths["inputs"][ids]).all() and seed == 5 and epoch == 0
    ends = np.cumsum(lengths)
    even = (np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)) % 2 == 0
    made = of(lengths)
    return dict(inputs=(tokens[even], made["inputs"]), targets=(tokens[~even], made["targets"]))

  b = batches(s, lengths=dict(inputs=16, targets=16), dynamic=fields.Dynamic(lengths_of=of, corrupt=corrupt))
  assert b.shapes == [(16, 16)]
  for step in range(b.steps(1)):
    batch = b.host_batch(step, 0, 1)
    assert np.array_equal(batch["weights"], (batch["target_segments"] > 0).astype(np.float32))
    for r, ids in enumerate(b.row_examples(step)):
      whole = [s.tokens("inputs", i).tolist() for i in ids]
      for name, start in (("inputs", 0), ("targets", 1)):
        real = batch[f"{name[:-1]}_segments"][r] > 0
        assert batch[name][r][real].tolist() == [t for x in whole for t in x[start::2]]
  assert 0 < b.summary()["fill"]["targets"] <= 1


def test_labels_need_room_in_a_row(opened):
  with pytest.raises(ValueError, match="opened for"):
    pipeline.Batches(opened("sft"), seed=1, batch=2, lengths=dict(inputs=4), pack=True, buckets=(), shuffle=True)
  with pytest.raises(InputError, match="a sft task has inputs, each at least 2"):
    opened("sft", lengths=dict(targets=4))
