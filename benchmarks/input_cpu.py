"""How fast batches are made, without any device: python benchmarks/input_cpu.py --data=FOLDER [--rounds=5]

`--data` is that of peers.py. For each case the tokens are cached first (its time is that of tokenising with all cores),
then packed batches of a warm cache are taken from the pipeline of training as fast as they come. Results go to
benchmarks/results/input_cpu.json; benchmarks/performance.py makes the page of them.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import contest
import peers

RESULTS = peers.RESULTS.parent / "input_cpu.json"
CASES = {  # name: (case of peers.py, rows of a batch, lengths, copies of the data)
  "T5, packed 512/128": ("t5-small", 64, dict(inputs=512, targets=128), 16),
  "T5, packed 512/512": ("t5-small", 64, dict(inputs=512, targets=512), 16),
  "BERT, packed 128": ("bert-base", 64, dict(inputs=128), 40),
  "GPT-2, packed 1024": ("gpt2", 32, dict(inputs=1024), 20),
}


def measure(name: str, args: argparse.Namespace) -> dict:
  """Returns tokens a second of the tokenizer and of the pipeline, in rounds."""
  from jaxft import config, modeling, setup

  case_name, rows, lengths, copies = CASES[name]
  case = peers.CASES[case_name]
  with tempfile.TemporaryDirectory() as work:
    folder = pathlib.Path(work)
    peers.tokenizer(case.tokenizer, pathlib.Path(args.data), folder / "tokenizer")
    given = peers.rows_of(case, pathlib.Path(args.data))
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
      for copy in range(copies):
        file.writelines(json.dumps(dict(x, copy=copy)) + "\n" for x in given)
    c = config.base()
    c.model.config, c.model.tokenizer, c.task.kind = case.model, str(folder / "tokenizer"), case.kind
    c.task.update(peers.TEMPLATES[case.kind])
    c.data.train, c.data.cache, c.data.too_long = str(folder / "train.jsonl"), str(folder / "tokens"), "truncate"
    c.data.lengths, c.batch, c.steps = lengths, rows, 1
    r = config.Reader(config.check(c))
    source = modeling.source(r)
    began = time.perf_counter()
    data = setup.training_data(r, source)
    seconds = time.perf_counter() - began
    tokens = sum(int(x.sum()) for x in data.lengths.values())
    m = setup.model_for(r, source, data)
    batches = setup.batches(r, data, m)
    at, found = 0, []
    for i in range(args.rounds + 1):  # the first one imports TensorFlow and plans the epoch
      began, real, places = time.perf_counter(), 0, 0
      for _, batch in batches.stream(at, at + args.steps, 0, 1):
        for key, x in batch.items():
          if key.endswith("segments"):
            real, places = real + int((x > 0).sum()), places + x.size
      at += args.steps
      took = time.perf_counter() - began
      found += [dict(tokens=real, places=places, seconds=took)] if i else []
      print(f"{name}: {real / took / 1e6:.2f} M tokens/s{'' if i else ' with the start'}", flush=True)
  rate = [r["tokens"] / r["seconds"] for r in found]
  return dict(
    rows=rows, lengths=lengths, examples=len(data), tokens=tokens, tokenise_seconds=seconds,
    tokenise_tokens_per_second=tokens / seconds, tokens_per_second=statistics.median(rate), lowest=min(rate),
    highest=max(rate), rounds=found)  # fmt: skip


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", required=True)
  p.add_argument("--rounds", type=int, default=5)
  p.add_argument("--steps", type=int, default=100, help="batches of a round")
  p.add_argument("--output", default=str(RESULTS))
  args = p.parse_args()
  words = [w for w in sys.argv[1:] if not w.startswith(("--data", "--output"))]
  command = " ".join(["python benchmarks/input_cpu.py --data=FOLDER", *words])
  out = dict(contest.machine(), date=datetime.date.today().isoformat(), command=command)
  out["cases"] = {name: measure(name, args) for name in CASES}
  out["load_after"] = os.getloadavg()
  pathlib.Path(args.output).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
  print(f"written: {args.output}")


if __name__ == "__main__":
  main()
