"""The built-in data and the starter's folder.

Catches: a row that depends on what was read before it or on the process (hash seed), overlapping splits, English to
French or a test sentence among the starter's rows, spans that touch or get lost, wrong grammar around CLDR's names, a
tokenizer that needs torch.
"""

import itertools
import json
import pathlib
import random
import re
import subprocess
import sys

import pytest

import jaxft
from jaxft.data import builtin, phrases, sentences
from jaxft.errors import InputError

STARTER = pathlib.Path(jaxft.__file__).parent / "assets" / "starter"
SENTINEL = re.compile(r"<extra_id_(\d+)>")


def rows(name, split, count):
  return list(itertools.islice(builtin.read(name, split), count))


@pytest.fixture(scope="module")
def splits():
  return {split: rows("cldr-en-fr", split, n) for split, n in dict(train=1500, validation=500, test=500).items()}


def test_rows_are_always_the_same():
  code = (
    "import itertools, json; from jaxft.data import builtin\n"
    "print(json.dumps([list(itertools.islice(builtin.read(n, 'train'), 37)) for n in builtin.SIZES]))"
  )
  env = {"PYTHONHASHSEED": "17", "PYTHONPATH": str(STARTER.parents[2])}
  other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
  assert json.loads(other.stdout) == [rows(n, "train", 37) for n in builtin.SIZES]


def test_sizes(splits):
  assert len(list(builtin.read("cldr-en-fr", "test"))) == len(splits["validation"]) == 500
  assert builtin.SIZES["cldr-en-fr"]["train"] == 20_000


def test_splits_share_no_sentence(splits):
  english = {split: [r["input"] for r in found] for split, found in splits.items()}
  for found in english.values():
    assert len(set(found)) == len(found)
  french = {split: {r["target"] for r in found} for split, found in splits.items()}
  for a, b in itertools.combinations(french, 2):
    assert not french[a] & french[b]  # so the two habits of English, "5 March" and "March 5", stay together


def test_every_kind_is_in_every_split(splits):
  kinds = {kind for kind, _, _ in sentences.SENTENCES}
  for split in splits.values():
    assert {r["kind"] for r in split} == kinds


def test_the_starter_never_sees_the_task_nor_its_test_sentences():
  held = {r["input"] for r in rows("cldr-en-fr", "validation", 500) + rows("cldr-en-fr", "test", 500)}
  found = rows("cldr-pretrain", "train", 3000)
  assert not held & {r["input"].split(": ", 1)[-1] for r in found}
  for i in range(300):  # the two sets draw other sentences, so the rule itself is asked too
    _, split, english, say = builtin._sentence(random.Random(f"any/{i}"))
    if say("de") and "/" not in english and not re.search(r"\d{4}-\d\d|[A-Z][a-z]+ \d+, \d{4}", english):
      assert split == builtin.split_of(english)
  prefixes = {r["input"].split(": ")[0] for r in found if not SENTINEL.search(r["input"])}
  assert prefixes == {"German", "Spanish", "Italian", "Dutch"}
  alone = [r for r in found if SENTINEL.search(r["input"])]
  assert 0.3 < len(alone) / len(found) < 0.5
  french = [r for r in alone if re.search(r"[àû] \d\d:\d\d|coûte| après le ", r["input"])]
  assert french and not any(re.search(r" (leaves|costs|after) ", r["input"] + r["target"]) for r in french)


def test_span_corruption_can_be_undone():
  shares = []
  for seed in range(300):
    r = random.Random(seed)
    text = "".join(r.choice("abcdefgh é") for _ in range(r.randint(3, 90)))
    source, target = builtin.corrupt(text, r)
    pieces = SENTINEL.split(target)
    spans = dict(zip(pieces[1::2], pieces[2::2]))
    assert not pieces[0] and list(spans) == [str(k) for k in range(len(spans))] and all(spans.values())
    restored = source
    for k, span in spans.items():
      restored = restored.replace(f"<extra_id_{k}>", span)
    assert restored == text
    assert not re.search(r">(?=<)", source) and list(spans) == SENTINEL.findall(source)
    shares.append(sum(map(len, spans.values())) / len(text))
  assert 0.15 < sum(shares) / len(shares) < 0.3


def say(kind, value, lang, form=""):
  return phrases.fill("{" + kind + (":" + form if form else "") + "}", {kind: value}, lang)


@pytest.mark.parametrize(
  "kind, value, form, french",
  [
    ("number", 21, "w", "vingt et un"),
    ("number", 21, "f", "vingt et une"),
    ("number", 80, "w", "quatre-vingts"),
    ("number", 281, "f", "deux cent quatre-vingt-une"),
    ("rank", 1, "th", "premier"),
    ("rank", 80, "th", "quatre-vingtième"),
    ("country", "JP", "in", "au Japon"),
    ("country", "MX", "in", "au Mexique"),
    ("country", "US", "in", "aux États-Unis"),
    ("country", "KR", "in", "en Corée du Sud"),
    ("country", "CU", "in", "à Cuba"),
    ("country", "AF", "in", "en Afghanistan"),
    ("country", "IL", "in", "en Israël"),
    ("tongue", "en", "from", "de l'anglais"),
    ("tongue", "he", "from", "de l'hébreu"),
    ("tongue", "hu", "from", "du hongrois"),
    ("city", "Europe/Athens", "from", "d'Athènes"),
    ("city", "Europe/London", "from", "de Londres"),
  ],
)
def test_french_grammar(kind, value, form, french):
  assert say(kind, value, "fr", form) == french


def test_no_missing_elision(splits):
  for r in splits["train"]:
    wrong = re.findall(r"\b(?:de|le|la) (?!onz|uat)[aeiouéèêîôâÉÎ]\w*", r["target"])
    assert not wrong, r


def test_dates_and_plain_characters(splits):
  assert any(" 1er " in f" {r['target']}" for r in splits["train"])
  for r in itertools.chain(*splits.values()):
    assert not re.search("[\u202f\u00a0\u2019]", r["input"] + r["target"])
    assert not re.search(r"\d{6}[,.]?\d*0000|{|}", r["input"] + r["target"]), r
    assert not re.search(r"(^|du |le )1 (jan|fév|mars|avr|mai|juin|juil|août|sept|oct|nov|déc)", r["target"]), r


@pytest.mark.parametrize(
  "name, split, words",
  [("cldr-en-fra", "train", "did you mean 'cldr-en-fr'"), ("cldr-en-fr", "valid", "train, validation, test")],
)
def test_unknown_names(name, split, words):
  with pytest.raises(InputError, match=re.escape(words)):
    builtin.read(name, split)


def test_the_starters_tokenizer_loads_without_torch_and_network():
  code = (
    "import os, sys; sys.modules['torch'] = None; os.environ['HF_HUB_OFFLINE'] = '1'\n"
    "from transformers import AutoTokenizer; import json\n"
    f"t = AutoTokenizer.from_pretrained({str(STARTER)!r})\n"
    "ids = t('été<extra_id_0>').input_ids\n"
    "print(json.dumps([len(t), ids, t.decode(ids, skip_special_tokens=True)]))"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  config = json.loads((STARTER / "config.json").read_text())
  expected = [b + 3 for b in "été".encode()] + [259, 1]
  assert json.loads(out.splitlines()[-1]) == [config["vocab_size"], expected, "été"]
