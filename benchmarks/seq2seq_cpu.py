"""jaxft beside transformers' Seq2SeqTrainer: tokens per second and memory of fine-tuning a small T5 on a CPU.

  python benchmarks/seq2seq_cpu.py --data=multi30k_en_de --tokenizer=FOLDER

`--data` is a folder with train.en.gz and train.de.gz (Multi30k, https://github.com/multi30k/dataset, data/task1/raw),
`--tokenizer` a T5 tokenizer's. Every contestant is a process of its own that trains without a pause in its own loop and
is stopped at step boundaries, so rounds can alternate (ours, theirs, ours, ...) and all meet the same disturbances.
All train the same architecture from scratch, in float32 unless the name says otherwise, with AdamW, clipping at 1.0 and
the same dropout, on about `--examples` examples a step: theirs are padded to the longest of the batch, ours are packed
into rows. A token counts if it is real: padding does not. Needs torch, transformers and accelerate besides jaxft.
"""

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CONTESTANTS = {  # name -> what is said of it
  "jaxft": "float32, packed rows",
  "jaxft-bf16": "bfloat16 activations, float32 parameters, packed rows",
  "trainer": "float32, padded to the longest of the batch, random order",
  "trainer-grouped": "float32, batches of similar length (train_sampling_strategy=group_by_length)",
  "trainer-bf16": "bf16=True (autocast), random order",
  "trainer-grouped-bf16": "bf16=True (autocast), batches of similar length",
}
DEFAULT = ("jaxft", "trainer", "trainer-grouped")
LR, DECAY, CLIP = 1e-3, 0.01, 1.0
MANY = 10**6  # steps: more than anybody runs; the referee ends the training
MARK = "REPORT "  # begins the lines of a worker that the parent reads
PAUSE = 0.5  # seconds before a round, in which the last one's threads stop spinning
ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "accelerate", "numpy")


def arguments() -> argparse.Namespace:
  """Returns the parsed flags; ends with exit status 2 where the data or the tokenizer is missing."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", help="folder with train.en.gz and train.de.gz")
  p.add_argument("--tokenizer", help="folder of a T5 tokenizer")
  p.add_argument("--contestants", nargs="+", choices=tuple(CONTESTANTS), default=DEFAULT)
  p.add_argument("--rounds", type=int, default=7)
  p.add_argument("--steps", type=int, default=10, help="optimizer steps a round")
  p.add_argument("--warmup", type=int, default=5, help="steps before the first round, not counted")
  p.add_argument("--examples", type=int, default=64, help="examples a step")
  p.add_argument("--length", type=int, default=128, help="tokens of a packed row, on either side")
  p.add_argument("--width", type=int, default=192)
  p.add_argument("--layers", type=int, default=3, help="of the encoder, and again of the decoder")
  p.add_argument("--heads", type=int, default=3, help="of 64 each")
  p.add_argument("--mlp", type=int, default=512)
  p.add_argument("--untied", action="store_true", help="a head of its own, as T5 1.1 has it: V x D more parameters")
  p.add_argument("--dropout", type=float, default=0.1)
  p.add_argument("--output", default=str(pathlib.Path(__file__).parent / "results" / "seq2seq_cpu.json"))
  p.add_argument("--worker", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
  args = p.parse_args()
  needs = dict(data=("parallel text", ("train.en.gz", "train.de.gz")), tokenizer=("a tokenizer", ("tokenizer.json",)))
  for name, (what, files) in needs.items():
    folder = getattr(args, name)
    missing = [f for f in files if not folder or not (pathlib.Path(folder) / f).is_file()]
    if missing:
      p.error(f"--{name}={folder or ''}: needs a folder of {what} with {', '.join(missing)}; nothing is downloaded.")
  return args


def model_config(args: argparse.Namespace) -> dict:
  """Returns the config.json of the model, T5 1.1's shape at a small size."""
  return dict(
    model_type="t5",
    vocab_size=32128,
    d_model=args.width,
    d_kv=64,
    num_heads=args.heads,
    d_ff=args.mlp,
    num_layers=args.layers,
    num_decoder_layers=args.layers,
    feed_forward_proj="gated-gelu",
    dropout_rate=args.dropout,
    layer_norm_epsilon=1e-6,
    tie_word_embeddings=not args.untied,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
  )


def read_pairs(folder: str) -> list[tuple[str, str]]:
  """Returns the (English, German) sentences of the training data."""
  sides = []
  for language in ("en", "de"):
    with gzip.open(pathlib.Path(folder) / f"train.{language}.gz", "rt", encoding="utf-8") as file:
      sides.append(file.read().splitlines())
  return list(zip(*sides, strict=True))


class Referee:
  """A worker's end of the pipe: `step` after each optimizer step; the worker sleeps in it between its rounds."""

  def __init__(self, warmup: int, **facts):
    self.left, self.sums, self.facts = warmup, {}, facts
    self.start, self.cpu = time.perf_counter(), time.process_time()

  @property
  def last(self) -> bool:
    """Whether the next step ends the round, so what is still under way has to be waited for."""
    return self.left == 1

  def step(self, loss: float | None = None, **counts: int) -> bool:
    """Adds a step and its counts; at the end of a round reports and waits for the next. False ends the worker."""
    for name, value in counts.items():
      self.sums[name] = self.sums.get(name, 0) + int(value)
    self.left -= 1
    if self.left > 0:
      return True
    seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # Linux counts in KiB
    report = dict(self.sums, seconds=seconds, cpu_seconds=cpu, loss=loss, peak_mib=peak, **self.facts)
    print(MARK + json.dumps(report), flush=True)
    order = sys.stdin.readline().strip()
    self.left, self.sums, self.start, self.cpu = int(order or 0), {}, time.perf_counter(), time.process_time()
    return self.left > 0


def train_theirs(args: argparse.Namespace) -> None:
  """Trains with Seq2SeqTrainer as its documentation has it, until the referee ends it."""
  import torch
  import transformers

  transformers.set_seed(0)
  tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
  model = transformers.T5ForConditionalGeneration(transformers.T5Config(**model_config(args)))
  source, target = zip(*read_pairs(args.data))
  ids, labels = tokenizer(list(source))["input_ids"], tokenizer(text_target=list(target))["input_ids"]
  rows = [dict(input_ids=i, labels=l) for i, l in zip(ids, labels)]
  referee = Referee(args.warmup, parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

  class Counted(transformers.Seq2SeqTrainer):
    def training_step(self, model, inputs, *rest, **more):
      self.seen = inputs, super().training_step(model, inputs, *rest, **more)
      return self.seen[1]

  class Stop(transformers.TrainerCallback):
    def on_step_end(self, options, state, control, **more):
      batch, loss = trainer.seen
      ids, labels = batch["input_ids"], batch["labels"]
      control.should_training_stop = not referee.step(
        loss=float(loss),
        examples=len(ids),
        input_tokens=batch["attention_mask"].sum(),
        target_tokens=(labels != -100).sum(),
        places=ids.numel() + labels.numel(),
      )

  with tempfile.TemporaryDirectory() as folder:
    options = transformers.Seq2SeqTrainingArguments(
      folder,
      per_device_train_batch_size=args.examples,
      learning_rate=LR,
      weight_decay=DECAY,
      max_grad_norm=CLIP,
      max_steps=MANY,
      lr_scheduler_type="constant",
      bf16="bf16" in args.worker,
      use_cpu=True,
      report_to="none",
      save_strategy="no",
      logging_strategy="no",
      disable_tqdm=True,
      dataloader_pin_memory=False,
      seed=0,
      train_sampling_strategy="group_by_length" if "grouped" in args.worker else "random",
    )
    trainer = Counted(
      model,
      options,
      train_dataset=rows,
      processing_class=tokenizer,
      callbacks=[Stop()],
      data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()


def our_config(args: argparse.Namespace, cache: str):
  """Returns jaxft's config of the same training."""
  from jaxft import config

  c = config.base()
  c.model.config, c.model.tokenizer = model_config(args), args.tokenizer
  c.model.dtype = "bfloat16" if "bf16" in args.worker else "float32"
  c.task = dict(kind="seq2seq", input="{en}", target="{de}")
  c.data.train = {x: str(pathlib.Path(args.data) / f"train.{x}.gz") for x in ("en", "de")}
  c.data.lengths, c.data.cache = dict(inputs=args.length, targets=args.length), cache
  c.steps, c.optimizer.schedule, c.optimizer.lr = MANY, "constant", LR
  c.optimizer.decay, c.optimizer.clip = DECAY, CLIP
  return config.check(c)


def train_ours(args: argparse.Namespace) -> None:
  """Trains with jaxft's data, step and prefetch, until the referee ends it."""
  import jax

  from jaxft import config, modeling, setup
  from jaxft.train import loop, step

  with tempfile.TemporaryDirectory() as folder:
    c = our_config(args, folder)
    source = modeling.source(config.Reader(c))
    store = setup.training_data(config.Reader(c), source)
    m = setup.model_for(config.Reader(c), source, store)
    # rows hold several examples: as many rows as hold --examples of them on average
    c.batch = max(1, round(args.examples / setup.batches(config.Reader(c), store, m).summary()["examples_a_row"]))
    c = config.Reader(c)
    batches, t = setup.batches(c, store, m), setup.trainer(c, m, store, MANY)
    state = step.init_state(modeling.load(m, 0), 0, t.tx, t.abstract)
    counts = {}

    def stream():
      for i, rows in batches.stream(0, MANY, 0, 1):
        inputs, targets = rows["input_segments"], rows["target_segments"]
        counts[i] = dict(
          examples=targets.max(1).sum(),
          input_tokens=(inputs > 0).sum(),
          target_tokens=(targets > 0).sum(),
          places=inputs.size + targets.size,
        )
        yield i, rows

    referee = Referee(
      args.warmup,
      parameters=sum(x.size for x in jax.tree.leaves(state.params)),
      rows=batches.batch,
      threads=os.cpu_count(),
    )
    with loop.Prefetch(stream(), setup.put(m, batches.batch)) as ready:
      go = True
      while go:
        item = next(ready)
        if isinstance(item, BaseException):
          raise item
        state, metrics = t.step(state, item[1])
        loss = float(metrics["loss"]) if referee.last else None  # waits for the device
        go = referee.step(loss=loss, **counts.pop(item[0]))


class Worker:
  """A contestant's process."""

  def __init__(self, name: str, log: pathlib.Path):
    self.name, self.log = name, log
    command = [sys.executable, __file__, *sys.argv[1:], f"--worker={name}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="true")
    with log.open("w") as errors:
      self.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
      )

  def report(self) -> dict:
    for line in self.process.stdout:
      if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-4000:]}")

  def round(self, steps: int) -> dict:
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    return self.report()

  def end(self) -> None:
    self.process.stdin.close()  # the referee reads nothing and ends the training
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()


def compete(args: argparse.Namespace) -> dict[str, list[dict]]:
  """Returns the reports of the rounds of every contestant, run in turns; the order turns too."""
  workers, rounds = [], {name: [] for name in args.contestants}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for name in args.contestants:
        workers.append(Worker(name, pathlib.Path(folder) / f"{name}.log"))
        ready = workers[-1].report()
        size = ready["parameters"] / 1e6
        print(f"{name}: {CONTESTANTS[name]}; {size:.2f} M parameters, warm after {ready['seconds']:.0f} s", flush=True)
      for i in range(args.rounds):
        for w in workers[i % len(workers) :] + workers[: i % len(workers)]:
          time.sleep(PAUSE)
          rounds[w.name].append(w.round(args.steps))
        print(f"round {i + 1}: " + ", ".join(f"{n} {rate(r[-1]):,.0f} tokens/s" for n, r in rounds.items()), flush=True)
    finally:
      for w in workers:
        w.end()
  return rounds


def rate(report: dict) -> float:
  return (report["input_tokens"] + report["target_tokens"]) / report["seconds"]


def summarise(rounds: dict[str, list[dict]], steps: int) -> dict[str, dict]:
  """Returns medians over the rounds, and against each of theirs the ratio of tokens per second, round by round."""
  out, sums = {}, ("examples", "input_tokens", "target_tokens", "places", "seconds", "cpu_seconds")
  for name, reports in rounds.items():
    total = {k: sum(r[k] for r in reports) for k in sums}
    out[name] = dict(
      note=CONTESTANTS[name],
      tokens_per_second=round(statistics.median(map(rate, reports)), 1),
      tokens_per_second_of_all=round((total["input_tokens"] + total["target_tokens"]) / total["seconds"], 1),
      tokens_per_cpu_second=round((total["input_tokens"] + total["target_tokens"]) / total["cpu_seconds"], 1),
      seconds_per_step=round(statistics.median(r["seconds"] for r in reports) / steps, 4),
      examples_per_step=round(total["examples"] / steps / len(reports), 2),
      real_share_of_places=round((total["input_tokens"] + total["target_tokens"]) / total["places"], 4),
      peak_mib=max(r["peak_mib"] for r in reports),
      parameters=reports[0]["parameters"],
      threads=reports[0]["threads"],
      loss=[round(reports[i]["loss"], 4) for i in (0, -1)],
    )
  for ours in (n for n in rounds if n.startswith("jaxft")):
    for theirs in (n for n in rounds if not n.startswith("jaxft")):
      ratios = sorted(rate(a) / rate(b) for a, b in zip(rounds[ours], rounds[theirs]))
      out[ours].setdefault("ratio", {})[theirs] = dict(
        median=round(statistics.median(ratios), 3), lowest=round(ratios[0], 3), highest=round(ratios[-1], 3)
      )
  return out


def machine() -> dict:
  """Returns what the figures depend on besides the code."""
  info = pathlib.Path("/proc/cpuinfo")
  found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
  return dict(
    device="cpu",
    cpu=found[1] if found else platform.processor(),
    cores=os.cpu_count(),
    load_before=os.getloadavg(),
    python=platform.python_version(),
    versions={p: importlib.metadata.version(p) for p in PACKAGES},
  )


def show(summary: dict[str, dict]) -> None:
  print(f"\n{'':22}{'tokens/s':>10}{'a core-s':>10}{'s/step':>9}{'examples':>10}{'real':>8}{'peak MiB':>10}")
  for name, s in summary.items():
    print(
      f"{name:22}{s['tokens_per_second']:>10,.0f}{s['tokens_per_cpu_second']:>10,.0f}{s['seconds_per_step']:>9.3f}"
      f"{s['examples_per_step']:>10.1f}{s['real_share_of_places']:>8.1%}{s['peak_mib']:>10,}"
    )
  for name, s in summary.items():
    for other, r in s.get("ratio", {}).items():
      print(f"{name} / {other}: {r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})")


def main() -> None:
  args = arguments()
  if args.worker:
    return train_ours(args) if args.worker.startswith("jaxft") else train_theirs(args)
  before = machine()
  rounds = compete(args)
  summary = summarise(rounds, args.steps)
  show(summary)
  flags = {k: v for k, v in vars(args).items() if k not in ("data", "tokenizer", "output", "worker")}
  result = dict(
    before,
    load_after=os.getloadavg(),
    date=datetime.date.today().isoformat(),
    flags=flags,
    command="python benchmarks/seq2seq_cpu.py --data=multi30k_en_de --tokenizer=FOLDER " + own_flags(),
    model=model_config(args),
    summary=summary,
    rounds=rounds,
  )
  output = pathlib.Path(args.output)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(result, indent=2) + "\n")
  print(f"written: {output}")


def own_flags() -> str:
  """Returns the command line without the places of this machine."""
  words = re.split(r"\s+(?=--)", " ".join(sys.argv[1:]))
  return " ".join(w for w in words if not w.startswith(("--data", "--tokenizer", "--output")))


if __name__ == "__main__":
  main()
