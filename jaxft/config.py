"""Every option of jaxft, its default and what it means; and the checks that keep a config honest.

A config file returns `base()` with some fields changed. A field that is not here cannot be set, and a field that nobody
read is an error: `Reader` counts. Nothing below floor 4 sees a config; `jaxft/setup.py` unpacks it into arguments.
"""

import json
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxft.errors import InputError, did_you_mean

# What people who come from other trainers type, and where it lives here.
OTHER_NAMES = dict(
  learning_rate="optimizer.lr",
  lr="optimizer.lr",
  lr_scheduler_type="optimizer.schedule",
  weight_decay="optimizer.decay",
  warmup_steps="optimizer.warmup",
  warmup_ratio="optimizer.warmup (below 1 it is a share of the steps)",
  optim="optimizer.name",
  max_grad_norm="optimizer.clip",
  num_train_epochs="epochs",
  max_steps="steps",
  gradient_accumulation_steps="micro",
  per_device_train_batch_size="batch (rows over all devices)",
  label_smoothing_factor="loss.label_smoothing",
  bf16="model.dtype",
  model_name_or_path="model.init",
  dataset_name="data.train (as 'hub:NAME')",
  train_file="data.train",
  validation_file="data.validation",
  output_dir="the flag --workdir",
  max_source_length="data.lengths.inputs",
  max_target_length="data.lengths.targets",
  source_prefix="task.input (write the prefix into the template)",
  gradient_checkpointing="model.remat",
  lora_r="lora.rank",
  r="lora.rank",
  lora_alpha="lora.alpha",
  lora_dropout="lora.dropout",
  target_modules="lora.targets",
  modules_to_save="trainable (what is trained beside the adapters)",
  use_rslora="lora.rslora",
  early_stopping_patience="stop.patience",
  metric_for_best_model="save.best",
  save_steps="save.every",
  save_total_limit="save.keep",
  logging_steps="log.every",
  generation_num_beams="evals.NAME.beams",
  generation_max_length="evals.NAME.length",
)

# One entry of `evals`. every: steps between two (0: only at the end); start: also before the first step; data: a source
# as in `data.train` (empty: data.validation); batch: rows at a time, which changes no value; limit: rows read (0: all).
_EACH = dict(every=0, start=False, data="", batch=64, limit=0)
EVAL = dict(  # `kind` says which of these it reads; metrics: eval/metrics.py and eval/scores.py have their names
  loss=dict(kind="loss", **_EACH),  # loss, perplexity (of tokens, words, bytes), bits_per_byte, accuracy, tokens
  generate=dict(
    kind="generate",
    **_EACH,
    beams=1,
    length=0,  # most new tokens; 0: the longest reference and a quarter more
    length_penalty=1.0,  # beams are ranked by log-probability / length ** penalty
    # of sacrebleu, sacrebleu_intl, sacrebleu_zh, sacrebleu_char, chrf, chrf_word, ter, rouge, rouge1, rouge2, rougeL,
    # rougeLsum (each with _stem too), exact_match
    metrics=("sacrebleu", "chrf", "exact_match"),
    samples=8,  # rows written to samples/NAME-STEP.jsonl
  ),
  # the words of task.verbalizer, the likeliest of which is the answer
  rank=dict(kind="rank", **_EACH, metrics=("accuracy", "f1_macro"), samples=8),
  classify=dict(kind="classify", **_EACH, metrics=("accuracy", "f1_macro"), samples=8),
  regress=dict(kind="regress", **_EACH, metrics=("pearson", "spearman", "mse"), samples=8),
  tag=dict(kind="tag", **_EACH, metrics=("precision", "recall", "f1", "token_accuracy"), samples=8),
  # n_best: starts and ends of a window that are paired; max_answer_length: in tokens
  qa=dict(kind="qa", **_EACH, metrics=("exact_match", "f1"), samples=8, n_best=20, max_answer_length=30),
)


def base() -> ConfigDict:
  """Returns the whole config with its defaults."""
  c = ConfigDict()
  c.seed = 0  # data order, dropout and fresh weights follow from it and from the step alone
  c.steps = 0  # optimizer steps; 0: as many as `epochs` takes
  c.epochs = 3.0
  c.batch = 64  # rows of a step over all devices and micro-batches (a packed row holds several examples)
  c.micro = 1  # gradient accumulation: parts that a batch is cut into, one after the other

  c.model = _model()
  c.mesh = dict(data=1, fsdp=-1, tensor=1)  # devices an axis; one -1 takes what is left
  c.rules = dict(
    batch=("data", "fsdp"), embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor"
  )  # logical axis -> mesh axes

  c.task = _task()

  c.data = _data()
  # share of each target that is spread over the vocabulary; weight of logsumexp ** 2 (1e-4 is usual); class_weights of
  # the labels in order, or "balanced" (the rarer the heavier), or empty; logits_mib: of a device that logits over a
  # vocabulary may take, above it they are made in tiles of tokens (0: 128 on a CPU, else 512; -1: any number)
  c.loss = dict(
    label_smoothing=0.0, z_loss=0.0, class_weights=config_dict.FieldReference("", field_type=object), logits_mib=0
  )

  c.optimizer = _optimizer()
  c.trainable = (
    (r".*", True),
  )  # ordered: which parameters are trained; the rest have no gradient and no optimizer state
  # adapters (arXiv 2106.09685) of this rank (0: none) on the linear layers whose whole names match one of `targets`,
  # such as r".*_attn/[qv]"; times alpha / rank, rslora: alpha / sqrt(rank). Then they are trained, heads for labels and
  # spans, and nothing else, unless `trainable` is changed: then what it says
  c.lora = dict(rank=0, alpha=16.0, dropout=0.0, targets=(r".*/layers/.*",), rslora=False)
  c.unfreeze = ()  # ordered (regex, step or share of the steps): parameters that stand still until then

  c.evals = ConfigDict()  # name -> dict(kind=...); see EVAL above for the fields of a kind
  # every: steps, minutes: by the clock (0: off); keep: latest ones that stay; best: metric whose best one stays as
  # well, such as eval/loss/loss; mode: min or max, where it is best
  c.save = dict(every=500, minutes=15.0, keep=2, best="", mode="min")
  c.stop = dict(
    metric="", mode="min", patience=0, min_delta=0.0
  )  # early stopping after `patience` evaluations without gain
  c.numbers = dict(skip=3)  # non-finite steps skipped in a row before the run ends with exit code 43
  c.log = dict(every=10, tensorboard=True)
  c.export = dict(dtype="", shard_gb=5.0)  # Hugging Face folder at the end; dtype empty: as `model.params_dtype`
  return c


def _task() -> ConfigDict:
  c = ConfigDict()
  c.kind = "seq2seq"  # causal, sft, prefix_lm, classify, regress, tag, ...: docs/tasks.md
  # templates over the columns of a row: the input (text), a second text, the answer; the column of the label
  c.input, c.target, c.pair, c.label = "{input}", "{target}", "", "{label}"
  c.labels = ()  # names of all labels in order; empty: those of the training data
  c.multi = False  # classify: any number of labels a row
  c.scheme = ""  # tag: iob2, iob1, bilou or none
  c.stride = -1  # causal, qa: tokens that each further piece of a long text repeats; -1: 0, of qa 128
  c.mix = ()  # further pairs (input, target) of templates, one of all taken for a row each epoch
  c.verbalizer = ()  # seq2seq, sft: (value, word) of each label, such as ((0, "negative"), (1, "positive")), in targets
  c.turns = "all"  # sft, prefix_lm, of a chat: which answers are learnt: all, last, each (in an example of its own)
  c.mask = dict(share=0.15, whole_word=False)  # mlm, mlm_nsp: share of the tokens that is hidden, whole words or not
  c.corruption = dict(density=0.15, span=3.0)  # span_corruption: share of the tokens, mean length of a hidden span
  c.template = ""  # chat template: a .jinja file or its text; empty: the tokenizer's own
  return c


def _model() -> ConfigDict:
  c = ConfigDict()
  c.init = ""  # folder, Hub id or builtin:NAME with the weights to start from; empty: fresh weights from `model.config`
  c.config = ConfigDict()  # a config.json for fresh weights (model_type=..., d_model=...), free of the rest's checks
  c.languages = ()  # read and written, such as ("en_XX", "ro_RO"), of mBART; empty: as the tokenizer's files say
  c.tokenizer = ""  # folder or Hub id; empty: the one beside the weights
  c.dtype = "auto"  # of activations: bfloat16, float32; auto: bfloat16 on TPU and GPU, float32 on CPU
  c.params_dtype = "float32"  # of the master weights; those in bfloat16 are rounded stochastically
  c.frozen_dtype = ""  # of weights that are not trained, such as bfloat16 under adapters; empty: as params_dtype
  # rates, unset: as in the model's config.json. dropout: all that are not 0 there
  c.dropout = config_dict.placeholder(float)
  c.attention_dropout = config_dict.placeholder(float)
  c.head_dropout = config_dict.placeholder(float)
  c.neftune = 0.0  # noise on token embeddings in training, 5 is usual (arXiv 2310.05914)
  c.head = dict(width=0, act="tanh")  # a head W2 act(W1 h + b1) + b2 in place of the family's; 0: the family's
  c.attention = "auto"  # the fastest that fits; strict: an error where the hardware's kernel is refused; or its name
  c.remat = "none"  # what the backward pass recomputes: none, dots, attention, block, offload (docs/speed.md)
  c.unroll = 0  # layers in each turn of the scan over layers; 0: 12 on CPU without remat (less is copied), else 1
  c.resize = False  # let the vocabulary grow to the tokenizer's size
  return c


def _data() -> ConfigDict:
  c = ConfigDict()
  c.train = config_dict.FieldReference(
    "", field_type=object
  )  # see docs/data.md: path or glob, hub:..., tfds:..., builtin:..., dict of parallel files, weighted list
  c.validation = config_dict.FieldReference("", field_type=object)
  c.lengths = dict(inputs=512, targets=128)  # tokens a row, fixed for the whole run
  c.pack = True  # several examples a row, kept apart by segment ids
  c.buckets = ()  # without packing: shares of `lengths` to which a batch may be cut, such as (0.25, 0.5, 1.0)
  c.too_long = "error"  # examples over `lengths`: error (above `too_long_share`, else truncate), truncate, drop
  c.too_long_share = 0.01
  c.clean = dict(strip=True, unicode="", min_chars=0, max_chars=0, max_ratio=0.0, dedup=False)  # 0 and "" switch off
  c.balance = "none"  # sampling: as many examples of each class an epoch
  # in training, probability of each word to be left out, and to be swapped with the next; classify, regress, seq2seq
  c.augment = dict(word_dropout=0.0, word_swap=0.0)
  c.limit = 0  # rows read of the training data; 0: all
  c.cache = ""  # folder of token caches; empty: $JAXFT_CACHE, else ~/.cache/jaxft
  c.workers = 0  # processes that tokenise; 0: one a core
  return c


def _optimizer() -> ConfigDict:
  c = ConfigDict()
  c.name = "adamw"  # adamw, adamw_8bit (moments of a byte each), adafactor, lion, muon
  c.lr = 1e-3
  c.schedule = "linear"  # cosine, linear, constant, rsqrt, wsd
  c.warmup = 0.0  # steps, or below 1 a share of all steps
  c.cooldown = 0.2  # wsd: the last share of the steps, linear to zero
  c.end = 0.0  # cosine and linear: last learning rate as a share of `lr`
  c.clip = 1.0  # global norm of the gradient; 0: none
  c.b1 = 0.9  # adamw, lion, muon's momentum
  c.b2 = 0.999  # adamw, lion (0.99 is usual there), adafactor's decay exponent is its own
  c.eps = 1e-8
  c.decay = 0.0
  c.decay_rules = ((r".*(norm|bias|scale).*", 0.0), (r".*", 1.0))  # ordered: first match wins; times `decay`
  c.lr_rules = ((r".*", 1.0),)  # ordered: times `lr`
  c.layer_decay = 1.0  # times `lr` for each layer further from the head; 1: off
  c.toward_init = 0.0  # pull towards the weights at the start, as decay pulls to zero
  return c


def check(c: ConfigDict) -> ConfigDict:
  """Returns `c` with what a group lacks completed from the defaults; raises InputError on a key that does not exist and
  on a value of another type than its default."""
  with c.unlocked():
    _complete(base(), c, "")
    for name, given in c.evals.items():
      kind = given.get("kind", None) if isinstance(given, ConfigDict) else given
      if not isinstance(kind, str) or kind not in EVAL:
        raise InputError(
          f"config: evals.{name}.kind is {kind!r}; write evals.{name} = dict(kind=...), with one of {', '.join(EVAL)}"
          f"{did_you_mean(kind, EVAL)}."
        )
      if not isinstance(given, ConfigDict):
        raise InputError(f"config: evals.{name} is {given!r}; write dict(kind={kind!r}).")
      _complete(ConfigDict(EVAL[kind]), given, f"evals.{name}.")
  return c


ANY = (  # checked where they are used
  "data.train", "data.validation", "task.input", "task.target", "task.pair", "loss.class_weights", "model.dropout",
  "model.attention_dropout", "model.head_dropout",
)  # fmt: skip
FREE = ("model.config", "rules", "mesh", "data.lengths", "data.train", "data.validation", "evals", "task")


def _complete(known: ConfigDict, given: ConfigDict, prefix: str) -> None:
  for key, value in given.items():
    path = prefix + key
    if key not in known:
      raise InputError(f"config: there is no {path}{suggest(path, [prefix + k for k in known])}.")
    default = known[key]
    if isinstance(default, ConfigDict) and not isinstance(value, ConfigDict):
      raise InputError(f"config: {path} is {value!r}; it is a group: dict({', '.join(f'{k}=...' for k in default)}).")
    if isinstance(default, ConfigDict) and (path not in FREE or path == "task"):
      _complete(default, value, path + ".")
    elif not _fits(value, default, path):
      raise InputError(f"config: {path} is {value!r}, of type {type(value).__name__}; it takes a {_type(default)}.")
  for key in known:
    if key not in given:
      given[key] = known[key]


def _type(default: Any) -> str:
  return {"tuple": "tuple of pairs or values"}.get(type(default).__name__, type(default).__name__)


def _fits(value: Any, default: Any, path: str) -> bool:
  """Says whether `value` has the type of `default`; fields that take several types are in ANY."""
  if path in ANY or path.endswith(".data") or default is None or isinstance(default, ConfigDict):
    return True
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(value, bool) and isinstance(default, bool)
  if isinstance(default, (tuple, list)):
    return isinstance(value, (tuple, list))
  return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def suggest(path: str, known=None) -> str:
  """Returns where a misspelt or foreign `path` lives here, as " (did you mean ...?)", or an empty string."""
  leaf = path.split(".")[-1]
  if leaf in OTHER_NAMES:
    return f" (did you mean {OTHER_NAMES[leaf]}?)"
  return did_you_mean(path, known or [p for p, _ in flatten(base())])


def flatten(c: ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
  """Returns (dotted path, value) for every leaf."""
  out = []
  for key, value in c.items():
    out += flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) and value else [(prefix + key, value)]
  return out


def differences(c: ConfigDict, other: ConfigDict | None = None) -> dict[str, tuple[Any, Any]]:
  """Returns {path: (theirs, ours)} where `c` differs from `other` (by default from the defaults)."""
  ours, theirs = dict(flatten(c)), dict(flatten(base() if other is None else other))
  return {
    k: (theirs.get(k), ours.get(k)) for k in sorted({*ours, *theirs}) if _plain(ours.get(k)) != _plain(theirs.get(k))
  }


def changed(now: ConfigDict, before: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Returns {path: (before, now)} where a run's config is not what it was; a field that an older jaxft did not have is
  what it was where it has its default."""
  was, own = dict(flatten(before)), differences(now)
  return {k: pair for k, pair in differences(now, before).items() if k in was or k in own}


def _plain(value: Any) -> Any:
  return json.loads(json.dumps(value, default=lambda v: v.to_dict() if isinstance(v, ConfigDict) else str(v)))


def to_json(c: ConfigDict) -> str:
  return json.dumps(_plain(c), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> ConfigDict:
  """Reads what `to_json` wrote (tuples come back as lists, which compare equal in `differences`)."""
  raw = json.loads(text)
  sources = {k: raw["data"].pop(k) for k in ("train", "validation") if k in raw.get("data", {})}
  c = ConfigDict(raw)
  for key, value in sources.items():  # a ConfigDict would sort the columns of parallel files
    c.data[key] = config_dict.FieldReference("", field_type=object)
    c.data[key] = value
  return c


class Reader:
  """Reads a config and remembers what was read, so that `unread` can name the keys that nobody looked at."""

  def __init__(self, c: ConfigDict, prefix: str = "", seen: set[str] | None = None):
    self._c, self._prefix, self._seen = c, prefix, set() if seen is None else seen

  def __getattr__(self, key: str) -> Any:
    path = self._prefix + key
    value = self._c[key]
    if isinstance(value, ConfigDict) and path not in FREE:
      return Reader(value, path + ".", self._seen)
    self._seen.add(path)
    return value.to_dict() if isinstance(value, ConfigDict) else value

  def unread(self) -> list[str]:
    """Returns the paths of the keys that nobody read."""
    return [p for p, _ in flatten(self._c) if not any(p == s or p.startswith(s + ".") for s in self._seen)]
