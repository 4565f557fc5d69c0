"""One turn of a chat: a list of messages as `chat.prompt` and `chat.completion`, which templates may name.

Read are `messages` (role, content), ShareGPT's `conversations` (from, value), and `prompt` with `completion` or
`response`, where a side that is text counts as one message. A longer talk is an error here, never a longer text.
"""

from typing import Any

from jaxft.data.clean import utf8
from jaxft.errors import InputError

CHATS = ("messages", "conversations")
ANSWERS = ("completion", "response")
ROLES = dict(human="user", gpt="assistant")
TURNS = (["user", "assistant"], ["system", "user", "assistant"])


def is_turns(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict)


def prepare(row: dict, where: str, *, answered: bool = True) -> tuple[dict, int]:
  """Returns the row with `chat.prompt` and `chat.completion`, and how many messages were null, which count as empty.

  Not `answered`: the answer may be missing, as in a row that is to be decoded.
  """
  if "chat" in row:
    return row, 0
  column = next((c for c in CHATS if row.get(c) is not None), None)
  answer = next((c for c in ANSWERS if c in row), None)
  if column:
    turns, named = _messages(row[column], column, where), repr(column)
  elif "prompt" in row and (answer or not answered):
    turns = _side(row, "prompt", "user", where) + (_side(row, answer, "assistant", where) if answer else [])
    named = f"'prompt' with {answer!r}" if answer else "'prompt'"
  else:  # a null column is a null field; without one, the template's error says what the row has
    return ({**row, "chat": None} if any(c in row for c in CHATS) else row), 0
  if not answered and [role for role, _ in turns[-1:]] == ["user"]:
    turns.append(("assistant", ""))
  roles = [role for role, _ in turns]
  if roles not in TURNS:
    raise InputError(
      f"{where}: {named} holds the turns {', '.join(roles) or '(none)'}; a seq2seq task takes one question and its "
      "answer (user, assistant; perhaps a system message before). Cut longer talks into such pairs."
    )
  *before, last = [text or "" for _, text in turns]
  chat = dict(prompt="\n\n".join(filter(None, before)), completion=last)
  return {**row, "chat": chat}, sum(text is None for _, text in turns)


def _side(row: dict, column: str, role: str, where: str) -> list[tuple[str, str | None]]:
  value = row[column]
  if isinstance(value, (list, tuple)):
    return _messages(value, column, where)
  return [(role, _content(value, f"{where}: {column!r}"))]


def _messages(messages: Any, column: str, where: str) -> list[tuple[str, str | None]]:
  """Returns [(role, text or None)]."""
  if not isinstance(messages, (list, tuple)):
    raise InputError(f"{where}: {column!r} is {messages!r:.60}; it should be a list of messages with role and content.")
  out = []
  for number, message in enumerate(messages, 1):
    if not isinstance(message, dict) or not {"content", "value"} & message.keys():
      raise InputError(
        f"{where}: message {number} of {column!r} is {message!r:.60}; it should be an object with role and content "
        "(or from and value)."
      )
    role = str(message.get("role") or message.get("from"))
    content = message.get("content")
    content = message.get("value") if content is None else content
    out.append((ROLES.get(role, role), _content(content, f"{where}: message {number} of {column!r}")))
  return out


def _content(value: Any, what: str) -> str | None:
  """Returns the text of a message; several parts of type text are joined with a blank line."""
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, bytes):
    return utf8(value, what)
  if isinstance(value, (list, tuple)) and all(map(_is_text_part, value)):
    return "\n\n".join(part["text"] for part in value)
  raise InputError(
    f"{what} is {value!r:.80}; a seq2seq task takes text, or a list of parts of type text. Leave such rows out."
  )


def _is_text_part(part: Any) -> bool:
  return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
