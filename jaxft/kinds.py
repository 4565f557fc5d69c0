"""From a config to what its kind of task needs besides the templates of rows: the chat template, what is hidden from
the model, and what training texts are changed by.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxft import config
from jaxft.config import Reader
from jaxft.data import augment, chat_template, fields, hidden, masking, objectives, tasks, tokens
from jaxft.errors import InputError, did_you_mean

CHAT = "chat_template.jinja"  # beside a tokenizer
READERS = dict(  # fields of c.task that are no fields of tasks.Task: the kinds that read them
  template=tuple(k for k, o in objectives.KINDS.items() if "turns" in o.options),
  mask=("mlm", "mlm_nsp"),
  corruption=("span_corruption",),
)
AUGMENTED = ("classify", "regress", "seq2seq")


def own(c: Reader, name: str) -> Any:
  """Returns c.task.NAME, one of READERS; raises InputError where it is set and this kind of task does not read it."""
  value, kind = c.task[name], c.task["kind"]
  default = config.base().task[name]
  if kind not in READERS[name] and value != (default if isinstance(default, str) else default.to_dict()):
    raise InputError(
      f"config: task.{name} is {value!r:.60}, which a task of kind {kind} does not read; it is for "
      f"{', '.join(READERS[name])}. Remove it, or set task.kind."
    )
  return value


def task(c: Reader) -> tasks.Task:
  """Returns how rows become examples."""
  t = {k: v for k, v in c.task.items() if k not in READERS}
  wrong = sorted(set(t) - {f.name for f in dataclasses.fields(tasks.Task)})
  if wrong:
    raise InputError(f"config: task.{wrong[0]} does not exist{did_you_mean(wrong[0], tasks.Task.__annotations__)}.")
  return tasks.Task(**t, words=words(c))


def chat_text(c: Reader, tokenizer: tokens.Tokenizer) -> str:
  """Returns the text of the chat template that `task.template` gives: a file, the text itself, or the name of one of
  those that the tokenizer brings; empty: the field is, so that the tokenizer's own counts."""
  given, brought = own(c, "template"), tokenizer.hf.chat_template
  if not given:
    return ""
  if isinstance(brought, dict) and given in brought:
    return brought[given]
  if "{{" in given or "{%" in given:
    return given
  try:
    return pathlib.Path(given).expanduser().read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    names = f", or one of {', '.join(brought)}, which the tokenizer brings" if isinstance(brought, dict) else ""
    raise InputError(
      f"config: task.template is {given!r:.80}, which cannot be read ({getattr(e, 'strerror', None) or e}). It is the "
      f"path of a .jinja file, or its text{names}."
    ) from None


def template(tokenizer: tokens.Tokenizer, text: str = "") -> chat_template.Template | None:
  """Returns the template `text`, or the tokenizer's own; None where it brings none."""
  text = text or tokenizer.hf.chat_template
  if isinstance(text, dict):
    if "default" not in text:
      raise InputError(
        f"tokenizer: {tokenizer.name} brings the chat templates {', '.join(text)} and none of them is the default; "
        f"name one in task.template{did_you_mean('default', text)}."
      )
    text = text["default"]
  if not text:
    return None
  special = {k: str(v) for k, v in tokenizer.hf.special_tokens_map.items() if isinstance(v, str)}
  ends = (special.pop("bos_token", None), special.pop("eos_token", None))
  return chat_template.Template(text, *ends, special)


def chats(c: Reader, tokenizer: tokens.Tokenizer) -> chat_template.Template | None:
  """Returns the chat template of a config; None where the kind of task reads none, or there is none."""
  text = chat_text(c, tokenizer)
  return template(tokenizer, text) if c.task["kind"] in READERS["template"] else None


# ---- what changes with each epoch


def lengths(c: Reader) -> dict[str, int]:
  """Returns the most tokens of a stored example; more than `data.lengths` where corruption makes it shorter."""
  own(c, "mask")
  d, corruption = c.data.lengths, own(c, "corruption")
  if c.task["kind"] != "span_corruption":
    return d
  _check_corruption(**corruption)
  if set(d) != {"inputs", "targets"}:
    raise InputError(f"config: data.lengths is {d}; span_corruption has inputs and targets, such as 512 and 114.")
  return dict(inputs=masking.longest_raw(d["inputs"], d["targets"], corruption["density"], corruption["span"]))


def _check_corruption(density: float, span: float) -> None:
  if not 0 < density < 1 or span < 1:
    raise InputError(
      f"config: task.corruption has density={density} and span={span}; density is the share of tokens that is hidden, "
      "between 0 and 1, span the mean length of what is hidden, at least 1."
    )


def dynamic(c: Reader, tokenizer: tokens.Tokenizer, *, training: bool = True) -> fields.Dynamic:
  """Returns what is done to each batch; not `training`: for evaluation, with nothing that only training wants."""
  kind, change = c.task["kind"], _augment(c)
  out = fields.Dynamic()
  if kind in READERS["mask"]:
    out = _masked(c, tokenizer)
  elif kind in READERS["corruption"]:
    out = _corrupted(c, tokenizer)
  return out._replace(augment=change, says=(*out.says, _rates(c))) if training and change else out


def _masked(c: Reader, tokenizer: tokens.Tokenizer) -> fields.Dynamic:
  mask = own(c, "mask")
  share, whole = mask["share"], mask["whole_word"]
  if not 0 < share <= 1:
    raise InputError(f"config: task.mask has share={share}; it is the share of tokens that is hidden, above 0 up to 1.")
  if tokenizer.hf.mask_token_id is None:
    raise InputError(
      f"tokenizer: {tokenizer.name} has no mask token, which a task of kind {c.task['kind']} needs. Take the tokenizer "
      "of a model that was trained with one (BERT, RoBERTa)."
    )
  hide = functools.partial(
    hidden.hide, special=tuple(tokenizer.hf.all_special_ids), mask_id=tokenizer.hf.mask_token_id,
    vocab=tokenizer.size, share=share, whole_word=whole)  # fmt: skip
  what = "words, all their tokens together" if whole else "tokens"
  says = f"{share:.0%} of the {what}, at least one an example, are hidden: 80% masked, 10% random, 10% as they are"
  return fields.Dynamic(batch=hide, says=(says,))


def _corrupted(c: Reader, tokenizer: tokens.Tokenizer) -> fields.Dynamic:
  how, most = own(c, "corruption"), lengths(c)["inputs"]
  vocab = tokenizer.hf.get_vocab()
  sentinels = list(
    itertools.takewhile(lambda x: x is not None, map(vocab.get, map("<extra_id_{}>".format, itertools.count())))
  )
  made = masking.corrupted_lengths(np.array([most]), how["density"], how["span"])
  spans = int(sum(made)[0]) - most - 2  # a sentinel on each side for each, and two ends
  spans //= 2
  if len(sentinels) < spans or tokenizer.eos is None:
    what = (
      f"{len(sentinels)} sentinels (<extra_id_0> and so on)" if tokenizer.eos is not None else "no end-of-text token"
    )
    raise InputError(
      f"tokenizer: {tokenizer.name} has {what}, but texts of up to {most} tokens have {spans} hidden spans and need as "
      "many sentinels, and an end. Take T5's tokenizer, shorter data.lengths, or a larger task.corruption span."
    )
  corrupt = functools.partial(hidden.spans, sentinels=np.array(sentinels), eos=tokenizer.eos, **how)
  says = f"{how['density']:.0%} of the tokens are hidden in spans of {how['span']:g} on average, behind sentinels"
  return fields.Dynamic(functools.partial(hidden.span_lengths, **how), corrupt, says=(says,))


def words(c: Reader) -> bool:
  """Says whether a store needs the words that tokens belong to."""
  return bool((c.task["kind"] in READERS["mask"] and own(c, "mask")["whole_word"]) or _augment(c))


def _augment(c: Reader) -> Callable | None:
  """Returns what makes training texts a little different in each epoch, a `Dynamic.augment`; None: nothing."""
  rates, kind = c.data.augment, c.task["kind"]
  rates = {k: getattr(rates, k) for k in ("word_dropout", "word_swap")}
  if not any(rates.values()):
    return None
  if kind not in AUGMENTED:
    raise InputError(
      f"config: data.augment is {rates}, which is for tasks of kind {', '.join(AUGMENTED)}; in one of kind {kind} the "
      "words themselves are what is predicted, or hold it."
    )
  if not all(0 <= x < 1 for x in rates.values()):
    raise InputError(f"config: data.augment is {rates}; its rates are probabilities, from 0 to below 1.")
  return functools.partial(augment.both, **rates)


def _rates(c: Reader) -> str:
  a = c.data.augment
  said = [f"{r:.0%} of the words {what}" for r, what in (
    (a.word_dropout, "are left out"), (a.word_swap, "are swapped with the next")) if r]  # fmt: skip
  return f"in training, {' and '.join(said)}"
