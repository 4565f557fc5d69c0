"""Answers by the likeliest word, against log-probabilities of one example at a time. Catches: a word beside the row of
another, the prompt's probability in the sum, a token left out at either end, other values where rows are packed."""

import jax
import numpy as np
import pytest

from jaxft import config, evaluations, modeling, setup, standin

WORDS = ("negative", "positive")


def made(family, pack, folder):
  c = config.base()
  kind = "seq2seq" if family == "t5" else "sft"
  c.task.update(kind=kind, input="{sentence}\nsentiment:", target=" {label}", verbalizer=tuple(zip(WORDS, WORDS)))
  c.evals = dict(words=dict(config.EVAL["rank"], metrics=("accuracy",), limit=9, batch=4))
  c = standin.apply(c, family, "sentiment", inputs=128, **(dict(targets=64) if family == "t5" else {}))
  c.evals.words.limit = 9
  c.data.update(pack=pack, cache=str(folder), workers=1)
  c.mesh = dict(data=2, fsdp=-1, tensor=1)
  r = config.Reader(config.check(c))
  source = modeling.source(r)
  m = setup.model_for(r, source, setup.training_data(r, source))
  params = jax.tree.map(lambda x: x * 4, modeling.load(m, 3, fresh=True))  # sharper than fresh ones are
  return r, m, params, evaluations.make(r, m, None)[0]


def by_hand(m, params, store, i):
  """Returns the log-probability of the answer of example `i`."""
  model = m.skeleton.bind(params)
  prompt, answer = store.prompt(i), store.answer(i)
  row = lambda x: np.asarray(x)[None]
  if m.skeleton.encoder_decoder:
    batch = dict(inputs=row(prompt), targets=row(answer), input_segments=row(prompt * 0 + 1))
    batch["target_segments"] = row(answer * 0 + 1)
    logits = model.logits(model.hidden(batch, None))[0]
  else:
    whole = np.concatenate([prompt, answer])
    hidden = model.hidden(dict(inputs=row(whole), input_segments=row(whole * 0 + 1)), None)
    logits = model.logits(hidden)[0][len(prompt) - 1 : -1]
  return float(jax.nn.log_softmax(logits)[np.arange(len(answer)), answer].sum())


@pytest.mark.parametrize("family, pack", [("t5", True), ("gpt2", True), ("gpt2", False)])
def test_likeliest_word(family, pack, tmp_path):
  c, m, params, evaluator = made(family, pack, tmp_path)
  store = evaluator._store
  found, _ = evaluator._pass(params)
  want = [by_hand(m, params, store, i) for i in range(0, len(store), 3)]
  np.testing.assert_allclose([f.output for f in found][::3], want, rtol=2e-4)
  values = evaluator.run(params, 0)
  pairs = np.array([f.output for f in found]).reshape(-1, 2)
  data = setup.store(c, m.tokenizer, c.data.validation, "v", labels=(), limit=9)
  right = [WORDS[k] == data.texts(i)[1].strip() for i, k in enumerate(pairs.argmax(1))]
  assert values == {"accuracy": pytest.approx(np.mean(right)), "examples": 9.0}
