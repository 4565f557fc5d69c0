"""The data sets of tasks_cpu.py: how each is read as its authors published it, and what it is trained with."""

import csv
import dataclasses
import hashlib
import json
import pathlib
import random
import re
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Case:
  """A data set: `read(folder of all sets)` gives rows to train on and to score, with `texts` and a label as columns."""

  title: str
  kind: str  # of task
  read: Callable[[pathlib.Path], tuple[list[dict], list[dict]]]
  metrics: tuple[str, ...]
  epochs: float
  texts: tuple[str, ...] = ("text",)
  lr: float = 1e-4
  length: int = 128  # tokens an example has at most, and a packed row
  batch: int = 32


def lines(path: pathlib.Path, encoding: str = "utf-8") -> list[str]:
  return [x for x in path.read_text(encoding=encoding).replace("\r\n", "\n").split("\n") if x]


def read_mrpc(data):
  rows = [x.split("\t") for x in lines(data / "glue_mrpc" / "msr_paraphrase_train.txt", "utf-8-sig")[1:]]
  dev = {tuple(x.split("\t")) for x in lines(data / "glue_mrpc" / "dev_ids.tsv")}
  part = lambda inside: [
    dict(sentence1=a, sentence2=b, label=label) for label, i, j, a, b in rows if ((i, j) in dev) == inside
  ]
  return part(False), part(True)


def read_sst2(data):
  rows = lambda name: [
    dict(zip(("text", "label"), x.rsplit("\t", 1))) for x in lines(data / "glue_sst2" / f"{name}.tsv")[1:]
  ]
  return random.Random(0).sample(rows("train"), 10_000), rows("dev")


def read_stsb(data):
  rows = lambda name: [x.split("\t") for x in lines(data / "glue_stsb" / f"sts-{name}.tsv")]
  return tuple(
    [dict(sentence1=x[5], sentence2=x[6], label=float(x[4])) for x in rows(name)] for name in ("train", "dev")
  )


def read_trec(data):
  row = lambda label, text: dict(text=text, label=label.split(":")[0])
  return tuple(
    [row(*x.split(" ", 1)) for x in lines(data / "trec" / f"TREC.{n}", "latin-1")] for n in ("train", "test")
  )


def read_banking77(data):
  out = []
  for name in ("train", "test"):
    with open(data / "banking77" / f"{name}.csv", newline="", encoding="utf-8") as file:
      out.append([dict(text=x["text"], label=x["category"]) for x in csv.DictReader(file)])
  return tuple(out)


def read_sms(data):
  """Without duplicates; a tenth of the texts, by their MD5, is dev, a tenth test, which is left alone."""
  rows = [
    dict(zip(("label", "text"), x.split("\t", 1)))
    for x in dict.fromkeys(lines(data / "sms_spam" / "SMSSpamCollection"))
  ]
  bucket = lambda row: hashlib.md5(row["text"].encode()).digest()[0] % 10
  return [x for x in rows if bucket(x) > 1], [x for x in rows if bucket(x) == 1]


def read_wnut17(data):
  def rows(name):
    blocks = re.split(r"\n\s*\n", (data / "wnut17" / name).read_text(encoding="utf-8").strip())
    pairs = [[x.split("\t") for x in b.split("\n") if x.strip()] for b in blocks]
    return [dict(tokens=[p[0] for p in x], tags=[p[1].strip() for p in x]) for x in pairs]

  return rows("wnut17train.conll"), rows("emerging.dev.conll")


def read_xquad(data):
  """By article: 36 to train on, 6 dev, 6 test, which are left alone."""

  def rows(articles):
    for q, context in ((q, p["context"]) for a in articles for p in a["paragraphs"] for q in p["qas"]):
      answers = {k: [x[k] for x in q["answers"]] for k in ("text", "answer_start")}
      yield dict(id=q["id"], question=q["question"], context=context, answers=answers)

  articles = json.loads((data / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
  return list(rows(articles[:36])), list(rows(articles[36:42]))


PAIR = ("sentence1", "sentence2")
CASES = dict(
  mrpc=Case("MRPC, paraphrases", "classify", read_mrpc, ("accuracy", "f1"), 3, PAIR),
  sst2=Case("SST-2, 10,000 phrases", "classify", read_sst2, ("accuracy",), 2),
  stsb=Case("STS-B, similarity", "regress", read_stsb, ("pearson", "spearman"), 3, PAIR),
  trec=Case("TREC, 6 kinds of questions", "classify", read_trec, ("accuracy", "f1_macro"), 4),
  banking77=Case("banking77, 77 intents", "classify", read_banking77, ("accuracy", "f1_macro"), 5, lr=2e-4),
  sms=Case("SMS spam", "classify", read_sms, ("accuracy", "f1"), 2),
  wnut17=Case("WNUT-17, entities", "tag", read_wnut17, ("precision", "recall", "f1"), 5, lr=2e-4),
  xquad=Case("XQuAD, English", "qa", read_xquad, ("exact_match", "f1"), 3, length=384, batch=12),
)
