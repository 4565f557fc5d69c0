"""The kinds of task: what each makes of a row, and what of that a batch has. A new kind is a new entry of KINDS."""

from collections.abc import Callable
from typing import Any

from jaxft.data import chat, classify, columns, hidden, lm, qa, squad, tagging, words
from jaxft.data.fields import Aligned, Columns, Example, Objective
from jaxft.data.templates import render, render_target

DEFAULTS = (columns.INPUT, columns.TARGET)


def _render_pair(task: Any, row: dict, fix: Callable[[str], str], where: str, template: Any) -> Example:
  row, nulls = chat.prepare(row, where) if task.chats else (row, 0)
  input, input_chars, more = render(task.input, "input", row, fix, where)
  target, target_chars, most = render_target(task, row, fix, where)
  return Example(input, target, input_chars, target_chars, nulls + more + most, (input, target))


def _encode_pair(examples, job) -> Columns:
  inputs, targets = zip(*(e.parts for e in examples)) if examples else ((), ())
  return Columns(dict(inputs=job.encoder.encode(list(inputs)), targets=job.target_encoder.encode(list(targets))))


def _both(task) -> bool:
  return (task.input, task.target) == DEFAULTS


def _either(task) -> bool:
  return task.input == columns.INPUT or task.label == columns.LABEL


def _texts(example: Example) -> tuple[str, ...]:
  return example.parts[0]


WEIGHTS = Aligned("inputs", "uint8", "weights", "float32")
TYPES = Aligned("inputs", "uint8", "input_types", "int32")  # only where a tokenizer gives them
WORDS = Aligned("inputs", "int32", "", "")  # only where task.words
SAID = ("target", "mix", "verbalizer", "ranked")  # what kinds read that have an answer in words
SEQ2SEQ = Objective(
  sides=("inputs", "targets"), options=(*SAID, "words"), default=_both, resolve=columns.resolve_pair,
  render=_render_pair, encode=words.numbered(_encode_pair, lambda e: e.parts[:1]), aligned=dict(words=WORDS),
  ends="targets", weighted=True,
)  # fmt: skip
CAUSAL = Objective(
  sides=("inputs",), options=("stride",), default=lambda task: task.input == columns.INPUT,
  resolve=columns.resolve_text, render=lm.render_document, encode=lm.encode_documents, ends="inputs", split=True,
  weighted=True,
)  # fmt: skip
SFT = Objective(
  sides=("inputs",), options=(*SAID, "turns"), default=_both, resolve=columns.resolve_prompt,
  render=lm.render_completion, encode=lm.encode_completions, aligned=dict(weights=WEIGHTS), ends="inputs", cut="start",
  weighted=True, blank="no part of them is an answer",
)  # fmt: skip
CLASSIFY = Objective(
  sides=("inputs",), options=("pair", "label", "labels", "multi", "words"), default=_either,
  resolve=columns.resolve_label, render=classify.render_label, encode=words.numbered(classify.encode_label, _texts),
  aligned=dict(types=TYPES, words=WORDS), scalars=dict(labels="int32"), labelled="labels", balanced=True,
)  # fmt: skip
MLM = Objective(
  sides=("inputs",), options=("stride", "words"), default=CAUSAL.default, resolve=columns.resolve_text,
  render=lm.render_document, encode=hidden.encode_masked,
  aligned=dict(types=TYPES, words=WORDS._replace(name="words", batch="int32")), windows=True,
)  # fmt: skip
KINDS = dict(
  seq2seq=SEQ2SEQ,
  causal=CAUSAL,
  sft=SFT,
  prefix_lm=SFT._replace(aligned=dict(weights=WEIGHTS, prefix=Aligned("inputs", "uint8", "input_prefix", "int32"))),
  classify=CLASSIFY,
  regress=CLASSIFY._replace(
    options=("pair", "label", "words"), resolve=columns.resolve_score, render=classify.render_numbers,
    encode=words.numbered(classify.encode_numbers, _texts), scalars=dict(labels="float32"), labelled="", balanced=False,
  ),
  tag=Objective(
    sides=("inputs",), options=("label", "labels", "scheme"), default=_either, resolve=columns.resolve_tags,
    render=tagging.render_tags, encode=tagging.encode_tags,
    aligned=dict(weights=WEIGHTS, targets=Aligned("inputs", "int32", "targets", "int32")), labelled="targets",
    weighted=True, blank="no word of theirs gives a token",
  ),
  qa=Objective(
    sides=("inputs",), options=("pair", "label", "stride"), default=lambda task: True, resolve=columns.resolve_question,
    render=qa.render_question, encode=qa.encode_questions,
    aligned=dict(types=TYPES, firsts=Aligned("inputs", "int32", "", ""), afters=Aligned("inputs", "int32", "", "")),
    scalars=dict(starts="int32", ends="int32"), kept=dict(asked="uint8", begin="int32", end="int32"), windows=True,
    expand=squad.flatten,
  ),
  mlm=MLM,
  mlm_nsp=MLM._replace(
    options=("words",), resolve=columns.resolve_document, render=hidden.render_sentences, encode=hidden.encode_pairs,
    scalars=dict(labels="int32"), windows=False,
  ),
  span_corruption=CAUSAL._replace(
    sides=("inputs", "targets"), options=(), stored=("inputs",), encode=hidden.encode_raw, ends="",
  ),
)  # fmt: skip
MULTI = CLASSIFY._replace(  # classify with any number of labels a row
  render=classify.render_labels,
  encode=words.numbered(classify.encode_labels, _texts),
  scalars=dict(labels="float32"),
  balanced=False,
)


def of(kind: str, multi: bool) -> Objective:
  """Returns the objective of a kind of task, `multi` as `task.multi`."""
  return MULTI if kind == "classify" and multi else KINDS[kind]
