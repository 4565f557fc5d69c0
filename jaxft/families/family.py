"""What a family is made of, and the tables of names that families share."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxft import names
from jaxft.errors import InputError
from jaxft.models import attention, block, encdec, heads, layers, single, stack

Json = dict[str, Any]  # a config.json, or what fields.read made of one


@dataclasses.dataclass(frozen=True)
class Head:
  """One head of a family: its class in transformers, its numbers, and its modules on the Hub.

  `spec(json, out)` gives the numbers for `out` outputs; `hub` names the modules of dense, norm and out (".weight" and
  ".bias" follow), `bias` the output's bias where that has a name of its own, `copies` more names of the output's weight
  and bias. `prefix` is that of the model's own tensors.
  """

  architecture: str
  spec: Callable[[Json, int], heads.Spec]
  hub: Mapping[str, str]
  prefix: str
  bias: str = ""
  copies: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
  also: str = ""  # a second head beside it, by its kind (the next-sentence head of BERT's pre-training)


@dataclasses.dataclass(frozen=True)
class Family:
  """A model_type; `rules` are those of the model without heads and without prefix."""

  fields: Mapping[str, Any]  # fields.Field by name
  spec: Callable[[Json], Any]  # what fields.read made of a config.json -> numbers; raises on what it cannot honour
  rules: Callable[[Any], list[names.Rule]]
  heads: Mapping[str, Head]  # by kind: lm, mlm, classify, tag, qa, nsp, base
  default: str  # the kind of a config.json that names no architecture
  ignored: tuple[str, ...] = ()  # tensors that files may hold besides, with their prefix, see names.ignore
  renames: tuple[tuple[str, str], ...] = ()  # of very old files
  settle: Callable[[Json, pathlib.Path], Json] = lambda json, folder: json  # what only the tensors beside it tell
  complete: Callable[[Json, Any], Json] = lambda json, spec: {}  # what transformers writes besides, or instead

  def build(self, spec: Any, how: layers.Build) -> nnx.Module:
    return encdec.EncDec(spec, how) if isinstance(spec, encdec.Spec) else single.Single(spec, how)


def first_token(c: Json, *names: str) -> int:
  """Returns the decoder's first token: the first of the fields `names` that is not null."""
  found = [c[k] for k in names if c[k] is not None]
  if not found:
    raise InputError(
      f"config.json: {' and '.join(names)} say nothing (null), so that the decoder has no first token. Set {names[0]}."
    )
  return found[0]


def end_tokens(c: Json) -> tuple[int, ...]:
  """Returns eos_token_id, which may be null or several."""
  eos = c["eos_token_id"]
  return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def labelled(name: str, std: Callable[[Json], float], classify: str, qa: str) -> dict[str, Head]:
  """Returns the heads of BART and T5 for sequences and spans, with fresh weights of `std` and these two prefixes."""

  def label(c: Json, out: int) -> heads.Spec:
    width, drop = c["d_model"], c["classifier_dropout"]
    return heads.Spec(out, True, std(c), dense=width, act="tanh", pool="last", dropout_in=drop, dropout=drop)

  there = dict(dense="classification_head.dense", out="classification_head.out_proj")
  span = lambda c, out: heads.Spec(out, True, std(c))
  return dict(
    classify=Head(f"{name}ForSequenceClassification", label, there, classify),
    qa=Head(f"{name}ForQuestionAnswering", span, dict(out="qa_outputs"), qa),
  )


def head_rules(spec: heads.Spec, head: Head, ours: str) -> list[names.Rule]:
  """Returns the rules of a head that is called `ours`."""
  hub, out = head.hub, []
  if spec.dense:
    out += linear(hub["dense"], f"{ours}/dense", spec.dense_bias)
  if spec.norm:
    out += norm(hub["norm"], f"{ours}/norm", spec.norm)
  weights, biases = head.copies
  if spec.out and not spec.tied:
    out.append(dataclasses.replace(names.linear(f"{hub['out']}.weight", f"{ours}/kernel"), copies=weights))
  if spec.out and spec.bias:
    dims = ((), (0,)) if spec.fixed_bias else None  # a buffer [1, V]
    out.append(names.Rule(head.bias or f"{hub['out']}.bias", f"{ours}/bias", dims, copies=biases))
  return out


def linear(hub: str, ours: str, bias: bool) -> list[names.Rule]:
  """Returns the rules of a linear layer."""
  more = [names.plain(f"{hub}.bias", f"{ours}/bias")] if bias else []
  return [names.linear(f"{hub}.weight", f"{ours}/kernel"), *more]


def norm(hub: str, ours: str, spec: layers.NormSpec) -> list[names.Rule]:
  """Returns the rules of a normalisation."""
  scale = [names.plain(f"{hub}.weight", f"{ours}/scale")] if spec.scaled else []
  return scale + ([names.plain(f"{hub}.bias", f"{ours}/bias")] if spec.bias else [])


def layer_rules(hub: str, ours: str, spec: block.Spec, table: Mapping[str, str]) -> list[names.Rule]:
  """Returns the rules of a layer's modules. `hub` is what stands before them there, with `{i}`; `ours` the path of the
  layers; `table` has {ours: theirs}, with ours one of self_attn/q, cross_attn/o, mlp/wi_0, self_norm, ...
  """
  out = []
  for name, theirs in table.items():
    there, here, last = hub + theirs, f"{ours}/{name}", name.split("/")[-1]
    if last in ("q", "k", "v"):
      out.append(names.heads_in(f"{there}.weight", f"{here}/kernel"))
      out += [names.heads_bias(f"{there}.bias", f"{here}/bias")] if last in spec.attention.bias else []
    elif last == "o":
      out.append(names.heads_out(f"{there}.weight", f"{here}/kernel"))
      out += [names.plain(f"{there}.bias", f"{here}/bias")] if "o" in spec.attention.bias else []
    elif last in ("q_norm", "k_norm"):
      whole = spec.attention.qk_norm_whole
      out.append((names.heads_bias if whole else names.plain)(f"{there}.weight", f"{here}/scale"))
    elif last.endswith("norm"):
      out += norm(there, here, spec.norm)
    else:
      out += linear(there, here, spec.mlp_bias)
  return out


def stack_rules(hub: str, ours: str, spec: stack.Spec, table: Mapping[str, str]) -> list[names.Rule]:
  """Returns the rules of what stands around the layers; `table` has {ours: theirs}, with ours one of positions, types,
  norm, project, project_back, final_norm.
  """
  there = dict(
    positions=0 if spec.sinusoidal else spec.positions,
    types=spec.types,
    norm=spec.norm,
    project=spec.project,
    project_back=spec.project_back,
    final_norm=spec.final_norm,
  )
  out = []
  for name in (n for n, has in there.items() if has):
    theirs, here = hub + table[name], f"{ours}/{name}"
    if name in ("positions", "types"):
      out.append(names.plain(f"{theirs}.weight", f"{here}/embedding"))
    elif name.endswith("norm"):
      out += norm(theirs, here, spec.layer.norm)
    else:
      out += linear(theirs, here, spec.project_bias)
  return out


def with_rate(spec: Any, key: str, rate: float) -> Any:
  """Returns the numbers with the dropout rates that `key` (of the config's group model) means set to `rate`."""
  if not 0 <= rate < 1:
    raise InputError(f"config: model.{key} is {rate}; it is a share of at least 0 and below 1.")
  of = dict(dropout=None, attention_dropout=attention.AttentionSpec, head_dropout=heads.Spec)[key]
  names = ("attention_dropout", "head_dropout")
  found = []

  def change(x: Any) -> Any:
    if isinstance(x, tuple):
      return tuple(change(y) for y in x)
    if not dataclasses.is_dataclass(x):
      return x
    new = {f.name: change(getattr(x, f.name)) for f in dataclasses.fields(x)}
    for name in (n for n in new if "dropout" in n):
      if (of is None and new[name]) or (of is not None and isinstance(x, of) and name == "dropout"):
        new[name] = rate
        found.append(name)
    return dataclasses.replace(x, **new)

  spec = change(spec)
  if not found and rate:
    raise InputError(
      f"config: model.dropout is {rate}, but this model has no dropout to change; {' or '.join(names)} sets one."
    )
  return spec
