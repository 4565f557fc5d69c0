"""What a config asks for besides templates of rows: chats through the tokenizer's own template, from data to export.

Catches: ids that are not those of apply_chat_template, a template that is lost on the way to the exported folder or to
decoding, one that is taken where rows are plain, a broken one that is not named.
"""

import json
import types

import numpy as np
import pytest

from jaxft import config, decode, evaluations, kinds, main, setup
from jaxft.config import Reader
from jaxft.data import tokens
from jaxft.errors import InputError
from jaxft.modeling import ASSETS
from jaxft.standin import apply

OTHER = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def turn(role, content):
  return dict(role=role, content=content)


CHATS = [
  [turn("user", "a?"), turn("assistant", "b"), turn("user", "c?"), turn("assistant", "dd")],
  [turn("system", "be"), turn("user", "x"), turn("assistant", " y ")],
]


@pytest.fixture
def decoder():
  return tokens.load(str(ASSETS / "bytes-decoder"))


@pytest.fixture
def made(tmp_path):
  """Returns a function that gives the config of a small Llama on rows, which a file then has."""

  def make(rows, name="x.jsonl", **task):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c = config.base()
    c.evals = dict(loss=dict(config.EVAL["loss"]), generate=dict(config.EVAL["generate"], length=4, beams=1))
    c.task.update(kind="sft", **task)
    c = apply(c, "llama", "chats", steps=2)
    c.data.train = c.data.validation = str(path)
    c.data.cache, c.log.tensorboard = str(tmp_path / "cache"), False
    return config.check(c)

  return make


def opened(c, t):
  r = Reader(c)
  return setup.store(r, t, r.data.train, "data.train", labels=())


@pytest.mark.parametrize("template", ["", OTHER])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_ids_are_those_of_transformers(made, decoder, tmp_path, template, turns):
  if template:
    (tmp_path / "t.jinja").write_text(template)
  c = made([dict(messages=m) for m in CHATS], template=str(tmp_path / "t.jinja") if template else "", turns=turns)
  s = opened(c, decoder)
  for i, messages in enumerate(CHATS):
    want = decoder.hf.apply_chat_template(
      messages, tokenize=True, return_dict=False, chat_template=template or None, add_generation_prompt=False
    )
    ids, weights = s.tokens("inputs", i).tolist(), s.gather("weights", np.array([i])) > 0
    assert ids == list(want)
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"][0 if turns == "all" else -1 :]
    learnt = decoder.hf.decode(np.array(ids)[weights])
    if template:
      answers = [m["content"] for m in messages if m["role"] == "assistant"][0 if turns == "all" else -1 :]
    assert learnt == "".join(a + "</s>" for a in answers)
  assert s.chats


def test_plain_columns_stay_plain(made, decoder):
  s = opened(made([dict(prompt="q:", completion="a")] * 2), decoder)
  assert decoder.hf.decode(s.tokens("inputs", 0)) == "q:a</s>" and not s.chats
  s = opened(made([dict(prompt=CHATS[0][:1], completion=CHATS[0][1:2])], name="y.jsonl"), decoder)
  assert decoder.hf.decode(s.tokens("inputs", 0)) == "<|user|>a?</s><|assistant|>b</s>" and s.chats


@pytest.mark.parametrize(
  "template,message",
  [
    ("{{ raise_exception('no system') }}", "line 1: the chat template refuses the chat: no system"),
    ("{% for m in messages %}{{ ''.__class__ }}{% endfor %}", "may not touch|fails with"),
    ("{% for %}", "cannot be read, line 1"),
    ("/no/such.jinja", "task.template is '/no/such.jinja', which cannot be read"),
  ],
)
def test_broken_templates(made, decoder, template, message):
  with pytest.raises(InputError, match=message):
    opened(made([dict(messages=CHATS[0])], template=template), decoder)


def test_unknown_roles_and_kinds(made, decoder):
  with pytest.raises(InputError, match=r"line 2: message 1 has the role 'usr'.*did you mean"):
    opened(made([dict(messages=CHATS[0]), dict(messages=[turn("usr", "a"), turn("assistant", "b")])]), decoder)
  c = made([dict(text="a")], template="{{ x }}")
  c.task.kind = "causal"
  with pytest.raises(InputError, match=r"task.template is .* kind causal does not read; it is for sft, prefix_lm"):
    kinds.chats(Reader(c), decoder)


def test_from_chats_to_answers(made, tmp_path):
  c = made([dict(messages=m) for m in CHATS] * 8, template=OTHER)
  main.train(c, str(tmp_path / "run"))
  given = json.loads((tmp_path / "run/model/task.json").read_text())
  assert given["chat"] is True
  for folder in ("run/model", "run/export"):
    assert tokens.load(str(tmp_path / folder)).hf.chat_template == OTHER
  sample = json.loads(next((tmp_path / "run/samples").glob("generate-*")).read_text().splitlines()[0])
  assert sample["reference"] == "b"
  rows = [dict(messages=CHATS[0]), dict(messages=CHATS[0][:3]), dict(messages=[turn("oracle", "a")])]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  report = decode.decode(str(tmp_path / "run"), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), length=4)
  out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert report.errors == 1 and "oracle" in out[2]["error"] and out[0]["output"] == out[1]["output"]
  decode.decode(str(tmp_path / "run/export"), str(tmp_path / "in.jsonl"), str(tmp_path / "again.jsonl"), length=4)
  assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()


def test_longer_than_positions(made, decoder):
  c, skeleton = made([dict(messages=CHATS[0])]), types.SimpleNamespace(positions=8, json=dict(model_type="llama"))
  model = types.SimpleNamespace(skeleton=skeleton)
  with pytest.raises(InputError, match=r"this llama has 8 positions, and data.train has examples of \d+ tokens"):
    setup.check_positions(Reader(c), model, opened(c, decoder), "data.train")


def test_a_config_without_evaluations_is_read_whole(caplog):
  """Training without evals is no mistake; validation data that nobody looks at is said."""
  c = config.base()
  reader = config.Reader(c)
  assert evaluations.make(reader, None, None) == [] and "data.validation" not in reader.unread()
  assert not caplog.text
  c.data.validation = "dev.jsonl"
  evaluations.make(config.Reader(c), None, None)
  assert "nothing is evaluated" in caplog.text
