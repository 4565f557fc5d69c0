"""From a config to what its kind of task needs besides the templates of rows: the chat template."""

import pathlib
from typing import Any

from jaxft.config import Reader
from jaxft.data import chat_template, objectives, tokens
from jaxft.errors import InputError, did_you_mean

CHAT = "chat_template.jinja"  # beside a tokenizer
# fields of c.task that are no fields of tasks.Task: an option that those kinds have which read it
FIELDS = dict(template="turns")


def own(c: Reader, name: str) -> Any:
  """Returns c.task.NAME, one of FIELDS; raises InputError where it is set and this kind of task does not read it."""
  value, kind = c.task[name], c.task["kind"]
  readers = [k for k, o in objectives.KINDS.items() if FIELDS[name] in o.options]
  if value and kind not in readers:
    raise InputError(
      f"config: task.{name} is {value!r:.60}, which a task of kind {kind} does not read; it is for "
      f"{', '.join(readers)}. Remove it, or set task.kind."
    )
  return value


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
  reads = FIELDS["template"] in objectives.KINDS[c.task["kind"]].options
  return template(tokenizer, text) if reads else None
