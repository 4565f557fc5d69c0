"""jaxft beside transformers' Trainer and Seq2SeqTrainer on a CPU: real tokens a second, in alternating rounds.

  python benchmarks/peers.py --data=FOLDER [--cases t5-small bert-base gpt2 t5-10m] [--rounds=5] [--steps=3]

`--data` holds multi30k_en_de (train.en.gz, train.de.gz of Multi30k), glue_mrpc (train.tsv), tinyshakespeare (input.txt)
and the vocabularies tok_t5 (sentencepiece.model), tok_bert (google_uncased_en_vocab.txt) and tok_gpt2 (encoder.json,
vocab.bpe). Every side trains the same architecture from fresh weights in float32 with AdamW, clipping at 1.0 and the
dropout of the architecture, on about the same examples a step. Trainer pads to the longest of a batch, as its
documentation has it, or (`grouped`) draws batches of similar length, or (`compiled`) has torch_compile=True besides;
GPT-2 and Llama take blocks of 256 tokens on all sides, as run_clm.py makes them; cases with -lora train adapters on
all linear layers, with PEFT on Trainer's side. jaxft packs, with the large pages that its binaries ask for. A token
counts if it is real. --tunix, --easydel and --flax name interpreters that have the JAX peers. Results go to
benchmarks/results/peers_cpu.json, or --output; benchmarks/performance.py makes the page of all of them.
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import os
import pathlib
import random
import sys
import tempfile

import contest
import peers_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers_cpu.json"
LR, DECAY, CLIP, MANY = 1e-4, 0.01, 1.0, 10**6
CONTESTANTS = ("jaxft", "trainer", "trainer-grouped", "trainer-compiled", "tunix", "easydel", "flax-t5")


TEMPLATES = dict(  # of jaxft's task
  seq2seq=dict(input="{en}", target="{de}"),
  causal=dict(input="{text}"),
  classify=dict(input="{sentence1}", pair="{sentence2}", labels=("no", "yes")),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Model, data and batch. `examples` are those of a step, about; `length` is that of a packed row, on either side."""

  kind: str
  tokenizer: str
  examples: int
  length: int
  model: dict
  lora: int = 0  # rank of adapters on all linear layers, with PEFT on the other side; 0: the whole model is trained


def t5(width: int, mlp: int, layers: int, heads: int, **more) -> dict:
  return dict(
    model_type="t5", vocab_size=32128, d_model=width, d_kv=64, num_heads=heads, d_ff=mlp, num_layers=layers,
    num_decoder_layers=layers, dropout_rate=0.1, layer_norm_epsilon=1e-6, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0, **more)  # fmt: skip


CASES = {
  "t5-small": Case("seq2seq", "t5", 32, 128, t5(512, 2048, 6, 8, feed_forward_proj="relu")),
  "bert-base": Case(
    "classify", "bert", 16, 128,
    dict(model_type="bert", vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
         intermediate_size=3072, hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
         max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0)),
  "gpt2": Case(
    "causal", "gpt2", 2, 256,
    dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
         activation_function="gelu_new", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, layer_norm_epsilon=1e-5,
         bos_token_id=50256, eos_token_id=50256)),
  "llama-50m": Case(
    "causal", "gpt2", 4, 256,
    dict(model_type="llama", vocab_size=50257, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
         num_attention_heads=8, num_key_value_heads=4, rope_theta=10000.0, rms_norm_eps=1e-5, hidden_act="silu",
         max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=50256, eos_token_id=50256)),
  "t5-10m": Case("seq2seq", "t5", 64, 128, t5(192, 512, 3, 3, feed_forward_proj="gated-gelu")),
}  # fmt: skip
CASES |= {f"{name}-lora": dataclasses.replace(CASES[name], lora=16) for name in ("gpt2", "llama-50m")}


def contestants(case: Case, args: argparse.Namespace) -> list[str]:
  """Returns who takes part: blocks of one length need no grouping, and the JAX peers have models of one kind."""
  wanted = {n: True for n in args.contestants}
  wanted["trainer-grouped"] = "trainer-grouped" in wanted and case.kind != "causal"
  for name in ("tunix", "easydel"):
    wanted[name] = bool(getattr(args, name)) and case.model["model_type"] == "llama" and not case.lora
  wanted["flax-t5"] = bool(args.flax) and case.model["model_type"] == "t5"
  return [n for n in CONTESTANTS if wanted.get(n)]


def interpreter(name: str, args: argparse.Namespace) -> str:
  return {"tunix": args.tunix, "easydel": args.easydel, "flax-t5": args.flax}.get(name, sys.executable)


def ids_of(case: Case, work: pathlib.Path) -> None:
  """Writes the token ids of all examples, for the peers whose interpreter may have no tokenizer."""
  _, rows, _ = their_data(case, argparse.Namespace(work=work))
  pick = (lambda r: [r["input_ids"], r["labels"]]) if case.kind == "seq2seq" else lambda r: r["input_ids"]
  (work / "ids.json").write_text(json.dumps([pick(r) for r in rows]))


def rows_of(case: Case, data: pathlib.Path) -> list[dict]:
  """Returns the training rows of a case."""
  if case.kind == "seq2seq":
    sides = []
    for language in ("en", "de"):
      with gzip.open(data / "multi30k_en_de" / f"train.{language}.gz", "rt", encoding="utf-8") as file:
        sides.append(file.read().splitlines())
    return [dict(en=a, de=b) for a, b in zip(*sides, strict=True)]
  if case.kind == "classify":
    lines = (data / "glue_mrpc" / "train.tsv").read_text(encoding="utf-8-sig").splitlines()
    cells = [x.split("\t") for x in lines[1:]]
    return [dict(sentence1=x[3], sentence2=x[4], label=["no", "yes"][int(x[0])]) for x in cells]
  text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
  return [dict(text=x) for x in text.split("\n\n") if x.strip()]


def tokenizer(name: str, data: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes a tokenizer in the files of Hugging Face into `folder`."""
  import shutil

  import transformers

  files = dict(
    t5={"spiece.model": "tok_t5/sentencepiece.model"},
    bert={"vocab.txt": "tok_bert/google_uncased_en_vocab.txt"},
    gpt2={"vocab.json": "tok_gpt2/encoder.json", "merges.txt": "tok_gpt2/vocab.bpe"},
  )
  folder.mkdir(parents=True, exist_ok=True)
  for target, source in files[name].items():
    shutil.copy(data / source, folder / target)
  of = dict(t5="T5Tokenizer", bert="BertTokenizer", gpt2="GPT2Tokenizer")[name]
  getattr(transformers, of).from_pretrained(folder).save_pretrained(folder)


# ---- our side


def train_ours(args: argparse.Namespace, case: Case) -> None:
  """Trains with jaxft's data, step and prefetch, until the referee ends it."""
  import jax

  from jaxft import config, modeling, programs, setup
  from jaxft.train import prefetch, step

  programs.keep(f"{args.work}/xla")
  c = config.base()
  c.model.config, c.model.tokenizer, c.model.dtype = case.model, f"{args.work}/tokenizer", "float32"
  c.task.kind = case.kind
  c.task.update(TEMPLATES[case.kind])
  c.data.train, c.data.cache, c.data.too_long = f"{args.work}/train.jsonl", f"{args.work}/tokens", "truncate"
  c.data.lengths = dict(inputs=case.length, targets=case.length)
  if case.kind != "seq2seq":
    c.data.lengths = dict(inputs=case.length)
  c.steps, c.batch, c.lora.rank = MANY, case.examples, case.lora
  c.optimizer.update(lr=LR, schedule="constant", decay=DECAY, clip=CLIP)
  r = config.Reader(config.check(c))
  source = modeling.source(r)
  data = setup.training_data(r, source)
  m = setup.model_for(r, source, data)
  if case.kind != "causal":  # as many rows as hold --examples of them on average
    c.batch = max(1, round(case.examples / setup.batches(r, data, m).summary()["examples_a_row"]))
  batches, t = setup.batches(r, data, m), setup.trainer(r, m, data, MANY)
  state = step.init_state(modeling.load(m, 0, fresh=True), 0, t.tx, t.abstract)
  counts = {}

  def stream():
    for i, rows in batches.stream(0, MANY, 0, 1):
      segments = [x for k, x in rows.items() if k.endswith("segments")]
      counts[i] = dict(
        examples=segments[-1].max(1).sum() if case.kind != "causal" else len(segments[0]),
        tokens=sum((x > 0).sum() for x in segments),
        places=sum(x.size for x in segments),
      )
      yield i, rows

  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  referee = contest.Referee(args.warmup, parameters=count((state.params, state.frozen)), trained=count(state.params))
  with prefetch.Prefetch(stream(), setup.put(m, batches.batch)) as ready:
    go, i = True, 0
    while go:
      index, batch, *_ = prefetch.checked(next(ready), i)
      state, metrics = t.step(state, batch)
      loss = float(metrics["loss"]) if referee.last else None  # waits for the device
      go, i = referee.step(loss=loss, **counts.pop(index)), i + 1


# ---- their side


def their_data(case: Case, args: argparse.Namespace) -> tuple:
  """Returns (model, rows, collator) as the examples of transformers have them."""
  import transformers

  tok = transformers.AutoTokenizer.from_pretrained(f"{args.work}/tokenizer")
  given = [json.loads(x) for x in (pathlib.Path(args.work) / "train.jsonl").read_text(encoding="utf-8").splitlines()]
  column = lambda name: [x[name] for x in given]
  config = transformers.AutoConfig.for_model(**case.model)
  if case.kind == "seq2seq":
    ids, labels = tok(column("en"))["input_ids"], tok(text_target=column("de"))["input_ids"]
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    rows = [dict(input_ids=i, labels=l) for i, l in zip(ids, labels)]
    return model, rows, transformers.DataCollatorForSeq2Seq(tok, model=model)
  if case.kind == "classify":
    made = tok(column("sentence1"), column("sentence2"), truncation=True, max_length=case.length)
    labels = [int(x == "yes") for x in column("label")]
    rows = [dict(labels=y, **{k: v[i] for k, v in made.items()}) for i, y in enumerate(labels)]
    return (
      transformers.AutoModelForSequenceClassification.from_config(config), rows,
      transformers.DataCollatorWithPadding(tok))  # fmt: skip
  stream = [t for ids in tok(column("text"))["input_ids"] for t in (*ids, tok.eos_token_id)]
  blocks = [stream[i : i + case.length] for i in range(0, len(stream) - case.length + 1, case.length)]
  rows = [dict(input_ids=b, labels=b, attention_mask=[1] * len(b)) for b in blocks]
  return transformers.AutoModelForCausalLM.from_config(config), rows, transformers.default_data_collator


def train_theirs(args: argparse.Namespace, case: Case) -> None:
  """Trains with Trainer or Seq2SeqTrainer as their documentation has them, until the referee ends it."""
  import transformers

  transformers.set_seed(0)
  model, rows, collator = their_data(case, args)
  if case.lora:
    import peft

    linear = ["c_attn", "c_proj", "c_fc"] if case.model["model_type"] == "gpt2" else "all-linear"
    how = dict(r=case.lora, lora_alpha=16, target_modules=linear, fan_in_fan_out=linear != "all-linear")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **how))
  trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
  referee = contest.Referee(args.warmup, parameters=sum(p.numel() for p in model.parameters()), trained=trained)
  seq2seq = case.kind == "seq2seq"
  of = transformers.Seq2SeqTrainer if seq2seq else transformers.Trainer

  class Counted(of):
    def _get_train_sampler(self, *rest, **more):  # whole batches in another order: grouped ones go from long to short
      ids = list(super()._get_train_sampler(*rest, **more))
      batches = [ids[i : i + case.examples] for i in range(0, len(ids), case.examples)]
      random.Random(0).shuffle(batches)
      return [i for b in batches for i in b if len(b) == case.examples]

    def training_step(self, model, inputs, *rest, **more):
      self.seen = inputs, super().training_step(model, inputs, *rest, **more)
      return self.seen[1]

  class Stop(transformers.TrainerCallback):
    def on_step_end(self, options, state, control, **more):
      batch, loss = trainer.seen
      ids, labels = batch["input_ids"], batch["labels"]
      more_tokens, more_places = ((labels != -100).sum(), labels.numel()) if seq2seq else (0, 0)
      control.should_training_stop = not referee.step(
        loss=float(loss), examples=len(ids), tokens=batch["attention_mask"].sum() + more_tokens,
        places=ids.numel() + more_places)  # fmt: skip

  options = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
  with tempfile.TemporaryDirectory() as folder:
    how = options(
      folder, per_device_train_batch_size=case.examples, learning_rate=LR, weight_decay=DECAY, max_grad_norm=CLIP,
      max_steps=MANY, lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no",
      logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
      torch_compile="compiled" in args.worker,
      train_sampling_strategy="random" if args.worker == "trainer" or case.kind == "causal" else "group_by_length",
    )  # fmt: skip
    trainer = Counted(model, how, train_dataset=rows, data_collator=collator, callbacks=[Stop()])
    trainer.train()


# ---- the contest


def arguments() -> argparse.Namespace:
  """Returns the parsed flags; ends with exit status 2 where there is no data."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--data", help="folder of the data sets and vocabularies")
  p.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
  p.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
  p.add_argument("--tunix", default="", help="Python that has Tunix; see peers_jax.py")
  p.add_argument("--easydel", default="", help="Python that has EasyDeL; see peers_jax.py")
  p.add_argument("--flax", default="", help="Python that has transformers with Flax; see peers_jax.py")
  p.add_argument("--rounds", type=int, default=5)
  p.add_argument("--steps", type=int, default=3, help="optimizer steps a round")
  p.add_argument("--warmup", type=int, default=8, help="steps before the first round, not counted")
  p.add_argument("--output", default=str(RESULTS))
  p.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
  p.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
  p.add_argument("--work", help=argparse.SUPPRESS)
  args = p.parse_args()
  if not args.worker and not pathlib.Path(args.data or "?").is_dir():
    p.error(f"--data={args.data or ''}: there is no such folder; nothing is downloaded.")
  return args


def run(args: argparse.Namespace, name: str) -> dict:
  """Returns the result of one case."""
  case = CASES[name]
  with tempfile.TemporaryDirectory() as work:
    rows = rows_of(case, pathlib.Path(args.data))
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows)
    (pathlib.Path(work) / "train.jsonl").write_text(text, encoding="utf-8")
    tokenizer(case.tokenizer, pathlib.Path(args.data), pathlib.Path(work) / "tokenizer")
    given = [f"--case={name}", f"--work={work}", f"--warmup={args.warmup}"]
    sides = contestants(case, args)
    if {"tunix", "easydel", "flax-t5"} & {*sides}:
      ids_of(case, pathlib.Path(work))
    # jaxft's binaries see to it themselves that malloc asks for large pages; a worker here is none of them
    own = ["env", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"]
    start = lambda n: [*(own if n == "jaxft" else ()), interpreter(n, args), __file__]
    commands = {n: [*start(n), *given, f"--worker={n}"] for n in sides}
    rounds = contest.compete(commands, args.rounds, args.steps)
  summary = contest.summarise(rounds, args.steps)
  for other, r in summary["jaxft"].get("ratio", {}).items():
    print(f"{name}: jaxft / {other}: {r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})", flush=True)
  return dict(dataclasses.asdict(case), steps=args.steps, summary=summary, rounds=rounds)


def main() -> None:
  args = arguments()
  if args.worker in peers_jax.SIDES:
    return peers_jax.SIDES[args.worker](args, CASES[args.case], LR, DECAY, CLIP)
  if args.worker:
    return (train_ours if args.worker == "jaxft" else train_theirs)(args, CASES[args.case])
  before, output = contest.machine(), pathlib.Path(args.output)
  fixed = {k: v for k, v in before.items() if k != "load_before"}
  old = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
  cases = old.get("cases", {}) if all(old.get(k) == v for k, v in fixed.items()) else {}
  words = [w for w in sys.argv[1:] if not w.startswith(("--data", "--output", "--tunix", "--easydel", "--flax"))]
  command = " ".join(["python benchmarks/peers.py --data=FOLDER", *words])
  for name in args.cases:
    facts = dict(date=datetime.date.today().isoformat(), command=command, load_before=os.getloadavg())
    cases[name] = facts | run(args, name) | dict(load_after=os.getloadavg())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(dict(fixed, cases=cases), indent=1) + "\n", encoding="utf-8")
  print(f"written: {output}")


if __name__ == "__main__":
  main()
