"""Reading a config.json: every field is read, known to change nothing, or refused by name, all complaints at once.

A family declares {field: Field}. What a file lacks gets the default, which is what transformers 5 takes for it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.errors import InputError, did_you_mean
from jaxft.models import layers

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """What a value must be, and the value where there is none."""

  what: str
  test: Callable[[Any], bool]
  default: Any = REQUIRED
  null: bool = False  # null is a value


def _field(what: str, test: Callable[[Any], bool]) -> Callable[..., Field]:
  return lambda default=REQUIRED: Field(what, test, default, default is None)


def is_id(v: Any) -> bool:
  return type(v) is int and v >= 0


count = _field("a whole number above 0", lambda v: type(v) is int and v > 0)
number = _field("a number", lambda v: type(v) in (int, float))
share = _field("a number of at least 0 and below 1", lambda v: type(v) in (int, float) and 0 <= v < 1)
text = _field("a text", lambda v: type(v) is str)
flag = _field("true or false", lambda v: type(v) is bool)
token = _field("a token id", is_id)
tokens = _field("a token id or a list of them", lambda v: is_id(v) or (type(v) is list and all(map(is_id, v))))
names = _field("a list of texts", lambda v: type(v) is list and all(type(x) is str for x in v))
group = _field("an object", lambda v: type(v) is dict)
activation = _field(f"one of {', '.join(layers.ACTIVATIONS)}", lambda v: isinstance(v, str) and v in layers.ACTIVATIONS)


gated_activation = _field(
  f"ACT or gated-ACT with ACT one of {', '.join(layers.ACTIVATIONS)}",
  lambda v: isinstance(v, str) and v.removeprefix("gated-") in layers.ACTIVATIONS,
)


def maybe(field: Field) -> Field:
  """Returns the field, which may also be null, and is null where there is none (unless it has another default)."""
  return dataclasses.replace(field, null=True, default=None if field.default is REQUIRED else field.default)


def only(*values: Any) -> Field:
  """Returns a field that must have one of `values`, because nothing else is built here; the first is the default."""
  return Field(f"one of {', '.join(map(repr, values))} here", lambda v: v in values, values[0], True)


def same(name: str) -> Field:
  """Returns a second name of the field `name`, which must agree with it."""
  return Field(f"the same as {name}", lambda v: True, name)


COMMON = dict(  # of all families
  pad_token_id=maybe(token()),
  bos_token_id=maybe(token()),
  eos_token_id=maybe(tokens()),
  tie_encoder_decoder=only(False),
  chunk_size_feed_forward=only(0),
  pruned_heads=only({}, None),
  quantization_config=only(None),
  torchscript=only(False),
  cross_attention_hidden_size=only(None),
  is_decoder=only(False),
  add_cross_attention=only(False),
  classifier_dropout=maybe(share()),
)


def divided(c: Mapping[str, Any], whole: str, by: str) -> int:
  """Returns c[whole] / c[by], the width of a head; raises InputError where it is no whole number."""
  if c[whole] % c[by]:
    raise InputError(
      f"config.json of a {c['model_type']}: {whole}={c[whole]} is no multiple of {by}={c[by]}. Correct one of the two."
    )
  return c[whole] // c[by]


HARMLESS = frozenset(  # kept and written back; they change no number of the model
  "model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path use_cache output_past "
  "task_specific_params tokenizer_class sep_token_id cls_token_id mask_token_id unk_token_id gradient_checkpointing "
  "output_attentions output_hidden_states return_dict use_return_dict id2label label2id num_labels _num_labels "
  "problem_type finetuning_task prefix _commit_hash attn_implementation _attn_implementation "
  "_attn_implementation_autoset use_bfloat16 tf_legacy_loss is_torchscript auto_map keys_to_ignore_at_inference "
  "adapters tokenizer_vocab_size jaxft_head".split()
)


def second_names(fields: Mapping[str, Field]) -> dict[str, str]:
  """Returns {second name: first name} of the fields made with `same`."""
  return {k: f.default for k, f in fields.items() if f.what.startswith("the same as")}


def read(json: Mapping[str, Any], fields: Mapping[str, Field]) -> dict:
  """Returns `json` with the defaults of what it lacks; raises InputError on a field that is missing, unknown, of a
  wrong type, or of a value that is not built here.
  """
  fields = {**COMMON, **fields}
  twins = second_names(fields)
  unknown = [f"{k}{did_you_mean(k, [*fields, *HARMLESS])}" for k in json if k not in fields and k not in HARMLESS]
  missing = [k for k, f in fields.items() if f.default is REQUIRED and k not in json]
  wrong = [
    f"{k}={json[k]!r} (it is {f.what})"
    for k, f in fields.items()
    if k in json and not (json[k] is None and f.null) and not f.test(json[k])
  ]
  wrong += [
    f"{k}={json[k]!r} beside {v}={json.get(v)!r}" for k, v in twins.items() if k in json and json[k] != json.get(v)
  ]
  if unknown or missing or wrong:
    parts = (
      ("unknown fields, which may change the model", unknown),
      ("missing", missing),
      ("of a wrong type or value, or not supported", wrong),
    )
    said = "; ".join(f"{title}: {', '.join(names)}" for title, names in parts if names)
    raise InputError(
      f"config.json of a {json['model_type']}: {said}. Remove what does not matter, or ask for support of what does."
    )
  return {**{k: f.default for k, f in fields.items() if k not in twins and f.default is not REQUIRED}, **json}
