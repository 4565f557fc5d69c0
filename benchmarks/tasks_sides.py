"""The two sides of tasks_cpu.py, each in a process of its own: training with jaxft, and with transformers' Trainer."""

import argparse
import json
import pathlib
import random
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

from contest import MARK
from task_sets import CASES, Case, lines

DECAY, CLIP, WARMUP, STRIDE = 0.01, 1.0, 0.1, 128
LM = dict(batch=8, length=256, lr=1e-3)  # of mode lm
LORA = dict(rank=8, alpha=16, dropout=0.1, lr=1e-3)  # of mode adapters
LINEAR = ["query", "key", "value", "intermediate.dense", "output.dense"]  # of BERT, as PEFT calls them
HEADS = dict(classify="Sequence", regress="Sequence", tag="Token", qa="Question")


def rate(args: argparse.Namespace, case: Case) -> float:
  """Returns the learning rate."""
  return LORA["lr"] if args.mode == "adapters" else case.lr


def labels_of(args: argparse.Namespace) -> list[str]:
  return json.loads((pathlib.Path(args.start) / "labels.json").read_text())


def prepare(args: argparse.Namespace, case: Case) -> None:
  """Writes what both sides start from into args.start: the encoder with a head for its labels, the tokenizer."""
  import transformers

  start, labels = pathlib.Path(args.start), labels_of(args)
  transformers.set_seed(args.seed)
  head = dict(id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)}) if labels else {}
  if case.kind == "regress":
    head = dict(num_labels=1, problem_type="regression")
  auto_class(case).from_pretrained(args.model, dtype="float32", **head).save_pretrained(start)
  transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(start)
  print(MARK + "{}")


def auto_class(case: Case):
  import transformers

  what = HEADS[case.kind]
  return getattr(transformers, f"AutoModelFor{what}{'Answering' if what == 'Question' else 'Classification'}")


class Clock:
  """What the steps after the first `skip` take. The peak is that of the whole process so far."""

  def __init__(self, skip: int):
    self.skip, self.sums, self.losses = skip, dict(steps=0, examples=0, tokens=0, places=0), []
    self.start()

  def start(self) -> None:
    self.began, self.cpu = time.perf_counter(), time.process_time()

  def add(self, step: int, **counts: int) -> None:
    for name, value in dict(counts, steps=1).items() if step >= self.skip else ():
      self.sums[name] += int(value)

  def stop(self) -> None:
    status = pathlib.Path("/proc/self/status")  # ru_maxrss of a child begins at the memory of its parent
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    self.facts = dict(
      seconds=time.perf_counter() - self.began, cpu_seconds=time.process_time() - self.cpu, peak_mib=peak // 1024
    )

  def report(self, **more) -> None:
    loss = statistics.fmean(float(x) for x in self.losses[-10:])
    print(MARK + json.dumps(dict(self.sums, **self.facts, loss=loss, **more)), flush=True)


def our_config(args: argparse.Namespace, case: Case):
  """Returns jaxft's config of a case."""
  from jaxft import config

  c = config.base()
  c.seed, c.model.init, c.model.dtype = args.seed, args.start, "float32"
  c.task.kind = case.kind
  if case.kind in ("classify", "regress"):
    c.task.input, c.task.pair = (*(f"{{{x}}}" for x in case.texts), "")[:2]
  elif case.kind == "qa":
    c.task.stride = STRIDE
  c.task.labels = tuple(labels_of(args))
  c.data.update(train=f"{args.start}/train.jsonl", validation=f"{args.start}/dev.jsonl", too_long="truncate")
  c.data.cache, c.data.workers, c.data.lengths = f"{args.cache}/tokens", 1, dict(inputs=case.length)
  c.optimizer.update(lr=rate(args, case), warmup=WARMUP, decay=DECAY, clip=CLIP)
  if args.mode == "adapters":
    c.lora.update(rank=LORA["rank"], alpha=float(LORA["alpha"]), dropout=LORA["dropout"])
  c.epochs = float(args.epochs or case.epochs)
  c.evals = dict(dev=dict(config.EVAL[case.kind], metrics=case.metrics, samples=0))
  return config.check(c)


def train_ours(args: argparse.Namespace, case: Case) -> None:
  """Trains with jaxft's data, step and prefetch, as jaxft.main does."""
  from jaxft import config, evaluations, modeling, programs, setup
  from jaxft.train import step

  c, speed = our_config(args, case), args.mode == "speed"
  if speed:
    programs.keep(f"{args.cache}/xla")
  r = config.Reader(c)
  source = modeling.source(r)
  data = setup.training_data(r, source)
  m = setup.model_for(r, source, data)
  a_row = setup.batches(r, data, m).summary()["examples_a_row"]
  c.batch = max(1, round(args.examples / a_row))
  batches = setup.batches(r, data, m)
  steps = args.warmup + args.steps if speed else setup.total_steps(r, batches)
  t, clock = setup.trainer(r, m, data, steps), Clock(args.warmup if speed else 0)
  state = run_ours(t, modeling.load(m, args.seed), batches, setup.put(m, c.batch), args.seed, clock)
  metrics = {} if speed else evaluations.make(r, m, None)[0].run(step.whole(state), steps)
  clock.report(rows=c.batch, mean_examples=c.batch * a_row, of=len(data), metrics=metrics)


def run_ours(t, params, batches, put, seed: int, clock: Clock, keep: Callable = lambda rows: None):
  """Returns the state after all steps of the trainer `t`; `keep` sees the batches."""
  import jax

  from jaxft.train import prefetch, step

  def stream():
    for i, rows in batches.stream(0, t.steps, 0, 1):
      segments = rows["input_segments"]
      clock.add(i, examples=segments.max(1).sum(), tokens=(segments > 0).sum(), places=segments.size)
      keep(rows)
      yield i, rows

  state = step.init_state(params, seed, t.tx, t.abstract)
  with prefetch.Prefetch(stream(), put) as ready:
    for i in range(t.steps):
      batch = prefetch.checked(next(ready), i)[1]
      if i == clock.skip:
        jax.block_until_ready(state)
        clock.start()
      state, metrics = t.step(state, batch)
      clock.losses.append(metrics["loss"])
      float(clock.losses[max(0, i - 2)])  # at most so far ahead, as in jaxft.main
    jax.block_until_ready(state)
    clock.stop()
  return state


def their_rows(case: Case, tokenizer, path: str, labels: list[str]) -> tuple[list[dict], list]:
  """Returns the examples as Trainer takes them, and for qa (question, its features) of each question."""
  rows = [json.loads(x) for x in lines(pathlib.Path(path))]
  how, number = dict(truncation=True, max_length=case.length), {x: i for i, x in enumerate(labels)}
  if case.kind == "qa":  # windows equal to those of transformers' tokenizers, see there
    from jaxft.data import squad

    asked = [squad.read(x, f"row {i}") for i, x in enumerate(rows, 1)]
    made = squad.Windows(tokenizer.backend_tokenizer, case.length, STRIDE).features(asked)
    out = [
      dict(input_ids=f.ids.tolist(), token_type_ids=f.types.tolist(), start_positions=f.start, end_positions=f.end)
      for features in made
      for f in features
    ]
    return out, list(zip(asked, made))
  out = []
  for x in rows:
    if case.kind == "tag":
      e = tokenizer(x["tokens"], is_split_into_words=True, **how)
      words = e.word_ids()
      first = [w is not None and w != before for w, before in zip(words, [None, *words])]
      label = [number[x["tags"][w]] if f else -100 for w, f in zip(words, first)]
    else:
      e = tokenizer(*(x[name] for name in case.texts), **how)
      label = x["label"] if case.kind == "regress" else number[x["label"]]
    out.append(dict(e, labels=label))
  return out, []


def fit_theirs(args, model, rows: list[dict], collator, clock: Clock, order: Callable, **options):
  """Returns the Trainer after training; `order` gets its sampler and returns one."""
  import transformers

  class Counted(transformers.Trainer):
    def _get_train_sampler(self, *rest, **more):
      return order(super()._get_train_sampler(*rest, **more))

    def training_step(self, model, inputs, *rest, **more):
      if self.state.global_step == clock.skip:
        clock.start()
      loss = super().training_step(model, inputs, *rest, **more)
      clock.losses.append(float(loss))
      mask = inputs["attention_mask"]
      clock.add(self.state.global_step, examples=len(mask), tokens=mask.sum(), places=mask.numel())
      return loss

  class Stop(transformers.TrainerCallback):
    def on_step_end(self, *_, **more):
      clock.stop()

  with tempfile.TemporaryDirectory() as folder:
    how = transformers.TrainingArguments(
      folder, weight_decay=DECAY, max_grad_norm=CLIP, optim="adamw_torch", use_cpu=True, report_to="none",
      seed=args.seed, save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
      **options)  # fmt: skip
    trainer = Counted(model, how, train_dataset=rows, data_collator=collator, callbacks=[Stop()])
    trainer.train()
  return trainer


def train_theirs(args: argparse.Namespace, case: Case) -> None:
  """Trains with Trainer as its documentation has it."""
  import transformers

  transformers.set_seed(args.seed)
  tokenizer, labels = transformers.AutoTokenizer.from_pretrained(args.start), labels_of(args)
  rows, _ = their_rows(case, tokenizer, f"{args.start}/train.jsonl", labels)
  model, speed = auto_class(case).from_pretrained(args.start, dtype="float32"), args.mode == "speed"
  steps, clock = args.warmup + args.steps, Clock(args.warmup if speed else 0)
  if args.mode == "adapters":
    import peft

    heads = ["classifier", "qa_outputs", "bert.pooler.dense"]
    how = dict(r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=LINEAR)
    model = peft.get_peft_model(model, peft.LoraConfig(**how, modules_to_save=heads))

  def some(sampler):  # whole batches of an epoch in another order: those grouped by length go from long to short
    ids = list(sampler)
    batches = [ids[i : i + args.examples] for i in range(0, len(ids), args.examples)]
    batches = [b for b in batches if len(b) == args.examples] or batches
    random.Random(args.seed).shuffle(batches)
    return [i for b in (batches * steps)[:steps] for i in b]

  collator = (
    transformers.DataCollatorForTokenClassification if case.kind == "tag" else transformers.DataCollatorWithPadding
  )
  trainer = fit_theirs(
    args, model, rows, collator(tokenizer), clock, some if speed else lambda sampler: sampler,
    max_steps=steps if speed else -1, num_train_epochs=args.epochs or case.epochs, learning_rate=rate(args, case),
    lr_scheduler_type="linear", warmup_steps=WARMUP, per_device_train_batch_size=args.examples,
    per_device_eval_batch_size=64,
    train_sampling_strategy="group_by_length" if args.side == "trainer-grouped" else "random")  # fmt: skip
  metrics = (
    {} if speed else score(case, trainer, *their_rows(case, tokenizer, f"{args.start}/dev.jsonl", labels), labels)
  )
  clock.report(of=len(rows), metrics=metrics)


def score(case: Case, trainer, rows: list[dict], asked: list, labels: list[str]) -> dict[str, float]:
  """Returns the metrics of Trainer's predictions, by jaxft's code."""
  from jaxft.data import squad
  from jaxft.eval import scores, spans

  out = trainer.predict(rows)
  found, truth = out.predictions, out.label_ids
  if case.kind == "classify":
    return scores.classify(case.metrics, found.argmax(-1), truth, labels)[0]
  if case.kind == "regress":
    return scores.regress(case.metrics, found.reshape(-1), truth)[0]
  if case.kind == "tag":
    named = lambda tags: [[labels[i] for i in row[t >= 0]] for row, t in zip(tags, truth)]
    return spans.tag(case.metrics, named(found.argmax(-1)), named(truth), labels)[0]
  answers, at = [], 0
  for question, features in asked:
    starts, ends = (x[at : at + len(features)] for x in found)
    cut = lambda logits, of=features: [x[: len(f.ids)] for x, f in zip(logits, of)]  # without padding
    answers.append(squad.decode(cut(starts), cut(ends), features, question.context)[0][0])
    at += len(features)
  return spans.squad(case.metrics, answers, [[text for text, _ in q.answers] for q, _ in asked])[0]


# ---- the language model


def lm_ours(args: argparse.Namespace) -> None:
  """Trains on with jaxft, and leaves its batches in args.start for the other side."""
  import numpy as np

  from jaxft import config, modeling, setup

  c, kept = config.base(), []
  c.model.update(init=args.lm_model, dtype="float32", dropout=0.0, attention_dropout=0.0)
  c.task.update(kind="causal", input="{text}")
  c.data.update(train=f"{args.start}/train.jsonl", pack=False, cache=f"{args.cache}/tokens", workers=1)
  c.data.lengths, c.batch, c.steps = dict(inputs=LM["length"]), LM["batch"], args.steps
  c.optimizer.update(lr=LM["lr"], schedule="constant", decay=DECAY, clip=CLIP)
  r = config.Reader(config.check(c))
  source = modeling.source(r)
  data = setup.training_data(r, source)
  m = setup.model_for(r, source, data)
  t, clock = setup.trainer(r, m, data, args.steps), Clock(0)
  run_ours(t, modeling.load(m, 0), setup.batches(r, data, m), setup.put(m, c.batch), 0, clock, kept.append)
  np.savez(
    f"{args.start}/batches.npz", **{k: np.concatenate([b[k] for b in kept]) for k in ("inputs", "input_segments")}
  )
  clock.report(losses=[float(x) for x in clock.losses])


def lm_theirs(args: argparse.Namespace) -> None:
  """Trains on with Trainer, on the batches that jaxft had, in their order."""
  import numpy as np
  import transformers

  transformers.set_seed(0)
  batches, clock = np.load(f"{args.start}/batches.npz"), Clock(0)
  rows = [
    dict(input_ids=ids, attention_mask=there.astype(int), labels=np.where(there, ids, -100))
    for ids, there in zip(batches["inputs"].astype(np.int64), batches["input_segments"] > 0)
  ]
  model = transformers.AutoModelForCausalLM.from_pretrained(args.lm_model, dtype="float32")
  fit_theirs(
    args, model, rows, transformers.default_data_collator, clock, lambda sampler: range(len(rows)),
    max_steps=args.steps, learning_rate=LM["lr"], lr_scheduler_type="constant",
    per_device_train_batch_size=LM["batch"])  # fmt: skip
  clock.report(losses=clock.losses)


def _of_case(of: Callable) -> Callable:
  return lambda args: of(args, CASES[args.case])


SIDES = {
  "prepare": _of_case(prepare),
  "jaxft": _of_case(train_ours),
  "trainer": _of_case(train_theirs),
  "trainer-grouped": _of_case(train_theirs),
  "lm-jaxft": lm_ours,
  "lm-trainer": lm_theirs,
}
