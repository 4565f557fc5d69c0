"""Chats as text, by the Jinja template that a tokenizer brings, and which characters of it are answers to learn.

A template does not say where answers are, so they are found by rendering: what it writes for the messages before an
answer, generation prompt included, is the prompt that the model will be given; what the answer adds to that is what the
model has to write, up to the mark that ends the turn. This holds for any template. One core does 10,000 chats/s of
one answer and 5,000 of two with ChatML (AMD EPYC; an answer before the last takes two renderings more).
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jaxft.data import chat, sandbox
from jaxft.data.clean import utf8
from jaxft.errors import InputError, did_you_mean

ROLES = {**chat.ROLES, "model": "assistant", "bot": "assistant", "observation": "tool"}
KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
WRITES = ("assistant", "function_call", *(k for k, v in ROLES.items() if v == "assistant"))  # roles of answers
TURNS = ("all", "last")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of an answer's reasoning
PROBE = "jaxft probe"
SHOWN = 40  # characters on both sides of a difference


class Chat(NamedTuple):
  text: str
  spans: tuple[tuple[int, int], ...]  # of each answer to learn, the first character and the one after its last


class Template:
  """A chat template with the texts of its special tokens; pickles.

  `variables` are more of what the template may ask for (enable_thinking, other special tokens). `now` is what its
  strftime_now tells; without it, the time at which this was made, so that all processes agree. Texts are those of
  transformers' `apply_chat_template(..., tokenize=False)`, but for `sandbox`'s limits and lists of text parts, which a
  template that cannot read lists gets as one text (parts joined with a blank line) where transformers prints the list.

  Messages are role and content, or ShareGPT's from and value (human, gpt, function_call, observation); other keys
  (tool_calls, reasoning_content) go to the template as they are, nulls as if they were not there; content that is null
  is empty, unless the message has tool calls or reasoning. `train: false` or `weight: 0` leave an answer unlearnt.
  `tools` is a list, or its json; a bare function (name, parameters) becomes {type: function, function: ...}, which
  templates expect, and an empty list is none. `where` names the row in errors, which are InputErrors: a role that
  nobody knows, no answer to learn, a message without content, whatever the template refuses or does wrong.

  `closes` says whether the template ends an answer with anything; if not (GLM-4), a text needs an EOS at its end for
  the model to learn where to stop.
  """

  def __init__(
    self,
    text: str,
    bos_token: str | None,
    eos_token: str | None,
    variables: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
  ):
    if not isinstance(text, str) or not text.strip():
      raise InputError(
        f"chat template: it is {text!r:.60}, not the text of one. Give a template, or a tokenizer that brings one; "
        "where it brings several, name one."
      )
    self.text, self.bos_token, self.eos_token = text, bos_token or "", eos_token or ""
    self.variables, self.now = _plain(dict(variables or {})), now or datetime.datetime.now()
    self._given = {
      "documents": None,
      "strftime_now": self.now.strftime,
      **{k: v for k, v in (("bos_token", bos_token), ("eos_token", eos_token)) if v is not None},
      **self.variables,
    }
    with sandbox.Limits(), _explained("chat template"):
      sandbox.check(text)
      said = self._try(PROBE, "assistant")
      listed = self._try([{"type": "text", "text": PROBE}], "user")
    self.closes = said is None or not said.rstrip().endswith(PROBE)
    self._parts = listed is not None and PROBE in listed and "'type'" not in listed and '"type"' not in listed

  def __reduce__(self):
    return Template, (self.text, self.bos_token or None, self.eos_token or None, self.variables, self.now)

  def prompt(self, messages: Any, tools: Any, where: str) -> str:
    """Returns the text for a model that is to answer: all messages, and the generation prompt."""
    with sandbox.Limits():
      return _Talk(self, messages, tools, where).text(len(messages), True)

  def render(self, messages: Any, tools: Any, where: str, turns: str = "all") -> Chat:
    """Returns the whole chat as one text, with all answers or the last one to learn.

    Raises InputError where the template writes an answer otherwise once later messages follow (those that drop earlier
    reasoning): no one text has all prompts; `examples` with `split` makes a text of each.
    """
    return self.examples(messages, tools, where, turns)[0]

  def examples(self, messages: Any, tools: Any, where: str, turns: str = "all", split: bool = False) -> list[Chat]:
    """Returns the chat as in `render`, or, `split`, a text for each answer to learn, which ends with that answer."""
    if turns not in TURNS:
      raise InputError(f"config: turns is {turns!r}; it is 'all' or 'last'{did_you_mean(turns, TURNS)}.")
    with sandbox.Limits():
      talk = _Talk(self, messages, tools, where)
      answers = talk.answers(turns)
      return [talk.alone(i) for i in answers] if split else [talk.whole(answers)]

  def _try(self, content: Any, role: str) -> str | None:
    """Returns a chat that ends with a message, or None where the template will not have it."""
    before = [{"role": "user", "content": PROBE}] if role == "assistant" else []
    try:
      return self._made([*before, {"role": role, "content": content}], None, False)
    except (sandbox.TooMuch, jinja2.exceptions.SecurityError):
      raise
    except Exception:  # whatever a template does with what it does not expect
      return None

  def _made(self, messages: list[dict], tools: list | None, prompt: bool) -> str:
    return sandbox.render(
      self.text, {**self._given, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
    )


class _Talk:
  """One chat: its messages as the template gets them, and what the template makes of the first of them."""

  def __init__(self, template: Template, messages: Any, tools: Any, where: str):
    self.template, self.where, self.tools = template, where, _tools(tools, where)
    if not isinstance(messages, (list, tuple, np.ndarray)) or not len(messages):
      raise InputError(f"{where}: messages are {messages!r:.60}; a chat is a list of messages with role and content.")
    read = [_message(m, template, f"{where}: message {n}") for n, m in enumerate(messages, 1)]
    self.messages, self.learn = [m for m, _ in read], [x for _, x in read]

  def text(self, count: int, prompt: bool) -> str:
    """Returns the text of the first `count` messages, with or without the generation prompt."""
    part = f" (here: of messages 1 to {count})" if count < len(self.messages) else ""
    with _explained(f"{self.where}: the chat template", part):
      return self.template._made(self.messages[:count], self.tools, prompt)

  def answers(self, turns: str) -> list[int]:
    """Returns the numbers of the messages to learn, from 0."""
    found = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
    learnt = [i for i in (found if turns == "all" else found[-1:]) if self.learn[i]]
    if not learnt:
      roles = ", ".join(m["role"] for m in self.messages)
      why = "train is false or weight 0 for those of" if found else "no assistant is among"
      raise InputError(
        f"{self.where}: there is no answer to learn; {why} the messages ({roles}). Leave such chats out."
      )
    return learnt

  def whole(self, answers: list[int]) -> Chat:
    """Returns the chat as one text with the spans of `answers`."""
    whole = self.text(len(self.messages), False)
    spans = []
    for i in answers:
      text = whole if i + 1 == len(self.messages) else self.text(i + 1, False)
      start = self._start(i, text)
      # a chat may end with EOS where a turn does not: Phi-3 writes <|end|> after each answer, <|endoftext|> after all
      ends = [self._end(start, x) for x in (text, text.rstrip().removesuffix(self.template.eos_token))]
      end = next((x for x in ends if whole.startswith(text[:x]) and x > start), 0)
      if not end:
        raise InputError(
          f"{self.where}: once others follow, the chat template writes message {i + 1} of {len(self.messages)} "
          f"(assistant) otherwise: {_difference(text, whole)}. It rewrites earlier turns, as those that drop reasoning "
          "do, so one text cannot show every answer as the model has to write it. Make an example of each answer "
          "(split), or learn the last one only."
        )
      spans.append((start, end))
    return Chat(whole, tuple(spans))

  def alone(self, i: int) -> Chat:
    """Returns the chat up to message `i`, which is the answer to learn."""
    text = self.text(i + 1, False)
    start = self._start(i, text)
    return Chat(text, ((start, self._end(start, text)),))

  def _start(self, i: int, text: str) -> int:
    """Returns where answer `i` begins in `text`, that of the messages up to it."""
    prompt = self.text(i, True)
    if text.startswith(prompt):
      start = len(prompt)
    else:  # the prompt may say more than the answer's own header, as an opening <think>: what they share is the header
      start = _common(prompt, text)
      open_tag = re.search(r"[<\[][^<>\[\]\s]*$", text[:start])
      start = open_tag.start() if open_tag else start
      before = self.text(i, False).rstrip() if i else ""
      if not text.startswith(before):
        before = before.removesuffix(self.template.eos_token).rstrip()
      if not text.startswith(before) or not text[len(before) : start].strip():
        raise InputError(
          f"{self.where}: the chat template does not begin the text of message {i + 1} (assistant) with the prompt "
          f"for it: {_difference(prompt, text)}. So nobody can say what the model has to write; mend the template, or "
          "leave the message unlearnt (train: false)."
        )
    if not text[start:].strip():
      raise InputError(f"{self.where}: the chat template writes nothing for message {i + 1} (assistant).")
    return start

  def _end(self, start: int, text: str) -> int:
    """Returns where the answer ends that `text` ends with: after the mark that ends the turn, without the line break
    after the mark; where the template has no mark, the white space has to do.
    """
    bare = len(text.rstrip())
    return bare if self.template.closes and bare > start else len(text)


# ---- messages


def _message(message: Any, template: Template, where: str) -> tuple[dict, bool]:
  """Returns a message as templates know it, and whether it may be learnt."""
  if not isinstance(message, dict):
    raise InputError(f"{where} is {message!r:.60}; it should be an object with role and content (or from and value).")
  role = message.get("role") or message.get("from")
  out = {"role": ROLES.get(role, role) if isinstance(role, str) else role}
  content = message.get("content")
  content = message.get("value") if content is None else content
  if role == "function_call":
    out, content = {"role": "assistant", "tool_calls": _calls(content, where)}, None
  elif out["role"] not in KNOWN:
    known = (*KNOWN, *ROLES, "function_call")
    raise InputError(
      f"{where} has the role {role!r:.40}; roles are {', '.join(known)}{did_you_mean(role, known)}. Rename it, or "
      "leave the chat out."
    )
  out |= {k: _plain(v) for k, v in message.items() if v is not None and k not in _READ}
  if content is not None:
    out["content"] = content if type(content) is str else _content(content, template, where)
  elif not (out.get("tool_calls") or any(k in out for k in THOUGHTS)):
    if not {"content", "value"} & message.keys():
      raise InputError(f"{where} has no content; it has {', '.join(map(str, message))}.")
    out["content"] = ""
  thought = next((out[k] for k in THOUGHTS if k in out), None)
  if thought is not None:  # as transformers: templates read one name or the other
    out = {"thinking": thought, **out, "reasoning_content": thought}
  return out, _learnt(message, where)


_READ = ("role", "from", "content", "value", "train", "weight")


def _learnt(message: dict, where: str) -> bool:
  for key in ("train", "weight"):
    if message.get(key) not in (None, True, False):  # 1 and 0 are equal to these
      raise InputError(
        f"{where} has {key} {message[key]!r:.40}; it is true or 1 for an answer to learn, else false or 0."
      )
  return all(message.get(key) in (None, True) for key in ("train", "weight"))


def _content(content: Any, template: Template, where: str) -> Any:
  """Returns content that is no text: bytes as text, parts as a list or, where the template reads none, as a text."""
  if isinstance(content, bytes):
    return utf8(content, where)
  if isinstance(content, str):
    return str(content)
  parts = list(content) if isinstance(content, (list, tuple, np.ndarray)) else [None]
  parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
  if not all(isinstance(p, dict) and p.get("type", "text") == "text" and isinstance(p.get("text"), str) for p in parts):
    raise InputError(f"{where} is {content!r:.80}; this model reads text, or a list of parts of type text.")
  texts = [str(p["text"]) for p in parts]
  return [{"type": "text", "text": t} for t in texts] if template._parts else "\n\n".join(texts)


def _calls(content: Any, where: str) -> list[dict]:
  """Returns the tool calls of a function_call of ShareGPT, whose value is the json of one call or a list of them."""
  try:
    calls = json.loads(content)
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
  except (TypeError, KeyError, ValueError) as e:
    raise InputError(
      f"{where} is a function_call with the value {content!r:.80}; it should be json with name and arguments ({e})."
    ) from None


def _tools(tools: Any, where: str) -> list | None:
  if isinstance(tools, (str, bytes)):
    try:
      tools = json.loads(tools) if tools.strip() else None
    except ValueError as e:
      raise InputError(
        f"{where}: tools are {tools!r:.80}, which is no json ({e}). It should be a list of tools."
      ) from None
  tools = _plain(tools)
  if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
    raise InputError(f"{where}: tools are {tools!r:.80}; they should be a list of objects, or its json.")
  bare = lambda t: "name" in t and "function" not in t
  return [{"type": "function", "function": t} if bare(t) else t for t in tools or ()] or None


def _plain(value: Any) -> Any:
  """Returns the value rebuilt of json's types, so that a template finds no methods of others; the rest is its type's
  name, as in transformers.
  """
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return _plain(value.tolist())
  base = next((t for t in (str, int, float) if isinstance(value, t)), None)
  return base(value) if base else f"<{type(value).__name__}>"


# ---- what the texts and the errors need


def covered(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """Returns bool[N], which tokens at characters offsets i[N, 2] have a character in one of the spans, which are in
  order and apart: the tokens to learn. A token that begins before an answer and reaches into it is one of them.
  """
  offsets, edges = np.asarray(offsets).reshape(-1, 2), np.array(spans, np.int64).reshape(-1, 2)
  at = np.searchsorted(edges[:, 1], offsets[:, 0], "right")  # the first span that ends after the token's begin
  starts = np.append(edges[:, 0], np.iinfo(np.int64).max)
  return (offsets[:, 1] > starts[at]) & (offsets[:, 1] > offsets[:, 0])


def _common(a: str, b: str) -> int:
  """Returns how many characters two texts share at their beginning."""
  low, high = 0, min(len(a), len(b))
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
  return low


def _difference(a: str, b: str) -> str:
  at = _common(a, b)
  first, second = (x[max(at - SHOWN, 0) : at + SHOWN] for x in (a, b))
  return f"{first!r} there, {second!r} here (from character {at} on)"


@contextlib.contextmanager
def _explained(what: str, part: str = "") -> Iterator[None]:
  """Turns whatever a template raises into an InputError."""
  try:
    yield
  except InputError:
    raise
  except Exception as e:  # a template can raise anything
    said = re.sub(r"\s+", " ", str(e)).strip()[:300] or "no message"
    if isinstance(e, sandbox.TooMuch):
      how = f"was stopped: {said}. A template is a program; look at this one before you trust its source"
    elif isinstance(e, jinja2.exceptions.SecurityError):
      how = f"reaches for what templates may not touch: {said}. Look at it before you trust its source"
    elif isinstance(e, jinja2.exceptions.TemplateSyntaxError):
      how = f"cannot be read, line {e.lineno}: {said}. Mend it, or give another"
    elif type(e) is jinja2.exceptions.TemplateError:
      how = f"refuses the chat: {said}. Change such chats, leave them out, or give another template"
    else:
      how = f"fails with {type(e).__name__}: {said}. Change such chats, leave them out, or give another template"
    raise InputError(f"{what} {how}{part}.") from e
