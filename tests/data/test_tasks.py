"""Templates, the columns people have, and cleaning.

Catches: `str.format` semantics leaking in (attributes, formats), a null that becomes "None", bytes that become "b'x'",
optional parts that leave their blank line, limits that count the template's own text, a filter that is off by one; a
first row that decides for rows of other columns, a chat that is read where no template asks, or joined from many turns.
"""

import numpy as np
import pytest

from jaxft.data import clean, files, tasks
from jaxft.errors import InputError

DEFAULT = tasks.Task("seq2seq", "{input}", "{target}")


def render(task, row, options=clean.NOTHING):
  e = task.render(row, options.text, "f.jsonl, line 7")
  return e.input, e.target


def test_templates():
  row = {"en": " a {b}", "de": "ä", "t": {"x": {"y": "deep"}}, "l": ["p", "q"], "o.k": "dotted", "n": 3, "none": None}
  task = tasks.Task("seq2seq", "to German: {en}|{t.x.y}|{l.1}|{l.*}|{o.k}|{n}|{{x}}|{none}", ["{de}", "{none}"])
  example = task.render(row, clean.NOTHING.text, "")
  assert example.input == "to German:  a {b}|deep|q|p q|dotted|3|{x}|" and example.target == "ä"
  assert example.input_chars == len(" a {b}deepqp qdotted3") and example.target_chars == 1 and example.nulls == 2
  assert tasks.Task("seq2seq", "go", "{l.5}").render(row, clean.NOTHING.text, "")[2:5] == (None, 0, 1)


@pytest.mark.parametrize(
  "template,says",
  [
    ("{enn}", ("f.jsonl, line 7", "task.input", "{enn}", "did you mean 'en'", "en, t (t.x), l")),
    ("{t.z}", ("'t' has x",)),
    ("{t}", ("an object with x", "{t.x}")),
    ("{l}", ("a list of 2", "{l.0}", "{l.*}")),
    ("{en.x}", ("'en' is 'E'",)),
    ("{b}", ("f.jsonl, line 7", "task.input", "{b}", "not UTF-8", "byte 2")),
    ("{m.*}", ("{m.*}", "not UTF-8")),
    ("{en", ("open or empty brace",)),
    ("en}", ("not opened",)),
    ("{}", ("open or empty",)),
  ],
)
def test_template_errors(template, says):
  with pytest.raises(InputError) as e:
    row = {"en": "E", "t": {"x": "y"}, "l": ["p", "q"], "b": b"a\xff", "m": ["p", b"\xff"]}
    render(tasks.Task("seq2seq", template, "{en}"), row)
  assert all(s in str(e.value) for s in says), str(e.value)


def test_bytes_are_text():
  row = {"b": "ä".encode(), "l": ["p", "ü".encode()], "o": {"x": np.bytes_(b"n")}}
  assert render(tasks.Task("seq2seq", "{b}|{l.*}|{l.1}", "{o.x}"), row) == ("ä|p ü|ü", "n")
  assert render(DEFAULT.resolve({"s": b"1", "t": b"2"}), {"s": b"1", "t": b"2"}) == ("1", "2")


def test_a_null_on_the_way_is_a_null():
  task = tasks.Task("seq2seq", "{translation.en}", "{l.0.x}{l.*}")
  assert task.render({"translation": None, "l": None}, clean.NOTHING.text, "")[:5] == ("", "", 0, 0, 3)
  with pytest.raises(InputError, match="translation"):
    render(task, {"l": None})


def test_task_errors():
  with pytest.raises(InputError, match="did you mean 'seq2seq'"):
    tasks.Task("seq2sek", "{a}", "{b}")
  with pytest.raises(InputError, match="no field"):
    tasks.Task("seq2seq", "{a}", "yes")


@pytest.mark.parametrize(
  "row,expected",
  [
    ({"input": "i", "target": "t", "x": 1}, ("i", "t")),
    ({"translation": {"ro": "r", "en": "e"}, "id": "0"}, ("r", "e")),
    ({"document": "d", "summary": "s", "id": "9"}, ("d", "s")),
    ({"prompt": "p", "completion": "c"}, ("p", "c")),
    ({"instruction": "do", "input": "", "output": "o"}, ("do", "o")),
    ({"instruction": "do", "input": "it", "output": "o"}, ("do\n\nit", "o")),
    ({"instruction": "do", "context": "c", "response": "r", "category": "x"}, ("do\n\nc", "r")),
    ({"instruction": "do", "context": "", "response": "r", "category": "x"}, ("do", "r")),
    ({"instruction": "do", "response": "r", "category": "x"}, ("do", "r")),
    ({"s": "first", "t": None}, ("first", "")),
    ({"question": "q", "answer": ["a", "b"]}, ("q", "a")),
    (
      {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}, "id": "1"},
      ("question: q context: c", "a"),
    ),
    ({"source": ["s1", "s2"], "target": ["t1", "t2"], "z": 0}, ("s1 s2", "t1")),
    ({"mr": "m", "ref": "r"}, ("m", "r")),
    (
      {
        "messages": [
          {"role": "system", "content": "be"},
          {"role": "user", "content": "u"},
          {"role": "assistant", "content": "a"},
        ]
      },
      ("be\n\nu", "a"),
    ),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "tools": ""}, ("u", "a")),
    ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}, ("p", "c")),
    ({"prompt": [{"from": "human", "value": "p"}], "response": "c"}, ("p", "c")),
    ({"prompt": "p", "completion": [{"role": "assistant", "content": None, "value": "c"}]}, ("p", "c")),
    (
      {
        "messages": [
          {"role": "user", "content": [{"type": "text", "text": "q", "url": None}, {"type": "text", "text": "r"}]},
          {"role": "assistant", "content": b"a"},
        ]
      },
      ("q\n\nr", "a"),
    ),
  ],
)
def test_conventions(row, expected):
  assert render(DEFAULT.resolve(row), row) == expected


def test_conventions_do_not_touch_templates_that_are_given():
  task = tasks.Task("seq2seq", "{question}?", "{answer}")
  assert task.resolve({"input": "i", "target": "t"}) is task


def test_chats_do_not_touch_templates_that_are_given():
  row = {"q": "?", "a": "!", "messages": ["x"], "prompt": [{"role": "user", "content": "p"}], "completion": "c"}
  assert render(tasks.Task("seq2seq", "{q}", "{a}"), row) == ("?", "!")
  assert render(tasks.Task("seq2seq", "{prompt.0.content}", "{completion}"), row) == ("p", "c")
  with pytest.raises(InputError, match="{prompt}, which is a list"):
    render(tasks.Task("seq2seq", "{prompt}", "{completion}"), row)
  assert render(tasks.Task("seq2seq", "{chat.x}", "{a}"), {**row, "chat": {"x": "own"}}) == ("own", "!")


CHAT = tasks.Task("seq2seq", "{chat.prompt}", "{chat.completion}")


def turn(role, content):
  return {"role": role, "content": content}


@pytest.mark.parametrize(
  "row,expected",
  [
    ({"messages": [turn("system", None), turn("user", "u"), turn("assistant", "a")]}, ("u", "a", 1)),
    ({"messages": [turn("user", "u"), turn("assistant", None)]}, ("u", "", 1)),
    ({"prompt": [turn("user", None)], "completion": [turn("assistant", "c")]}, ("", "c", 1)),
    ({"prompt": [turn("user", "u")], "completion": None}, ("u", "", 1)),
    ({"messages": None, "id": 1}, ("", "", 2)),
  ],
)
def test_nulls_of_a_chat_are_counted(row, expected):
  e = CHAT.render(row, clean.NOTHING.text, "")
  assert (e.input, e.target, e.nulls) == expected


@pytest.mark.parametrize(
  "row,says",
  [
    ({"messages": [turn(r, "x") for r in ("user", "assistant", "user")]}, "turns user, assistant, user"),
    ({"prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "completion": "d"}, "'prompt' with"),
    ({"messages": ["hi", "there"]}, "message 1 of 'messages' is 'hi'"),
    ({"messages": [{"role": "user", "text": "x"}]}, "message 1 of 'messages' is {'role'"),
    ({"messages": "hi"}, "should be a list"),
    ({"messages": []}, r"\(none\)"),
    ({"messages": [turn("user", [{"type": "image_url", "image_url": "u"}])]}, "message 1.*parts of type text"),
    ({"messages": [turn("user", {"a": 1})]}, "parts of type text"),
    ({"messages": [turn("user", b"\xff")]}, "message 1 of 'messages' is bytes that are not UTF-8"),
    ({"conversations": [{"from": ["x"], "value": "v"}]}, "turns"),
    ({"text": "x"}, "chat.prompt"),
  ],
)
def test_chats_that_are_refused(row, says):
  with pytest.raises(InputError, match=says) as e:
    render(CHAT, row)
  assert str(e.value).startswith("f.jsonl, line 7: ")


def test_each_row_gets_the_template_of_its_columns():
  resolve = tasks.Resolver(DEFAULT)
  rows = [
    ({"instruction": "i", "output": "o"}, ("i", "o")),
    ({"instruction": "i", "input": "x", "output": "o"}, ("i\n\nx", "o")),
    ({"output": "o", "instruction": "i"}, ("i", "o")),
    ({"question": "q", "answer": None}, ("q", "")),
    ({"question": "q", "answer": ["a", "b"]}, ("q", "a")),
    ({"question": "q", "answer": "text"}, ("q", "text")),
    ({"question": None, "answer": ["a"]}, ("", "a")),
    ({"en": "e", "de": None}, ("e", "")),
    ({"de": "d", "en": "e"}, ("e", "d")),  # the first row of these columns says which is the input
    ({"translation": {"de": "d", "en": "e"}}, ("d", "e")),
    ({"translation": None}, ("", "")),
    ({"prompt": [], "completion": "c"}, ("", "c")),
    ({"prompt": [turn("user", "p")], "completion": "c"}, ("p", "c")),
    ({"prompt": None, "completion": "c"}, ("", "c")),
    ({"messages": [turn("user", "u"), turn("assistant", "a")]}, ("u", "a")),
    ({"messages": None}, ("", "")),
  ]
  for row, expected in rows:
    assert render(resolve(row), row) == expected, row
  given = tasks.Task("seq2seq", "{a}", "{b}")
  assert tasks.Resolver(given)({"x": 1}) is given


def test_columns_that_are_not_a_pair():
  with pytest.raises(InputError, match=r"a, b, c are not a pair.*task.input='\{a\}'"):
    DEFAULT.resolve({"a": "1", "b": "2", "c": "3"})
  with pytest.raises(InputError, match="^f.jsonl, line 9: the columns a, b, c are not"):
    tasks.Resolver(DEFAULT)(files.Row({"a": "1", "b": "2", "c": "3"}, ("f.jsonl", "line"), 9))


def options(**given):
  return clean.Options(
    **{**dict(strip=False, unicode="", min_chars=0, max_chars=0, max_ratio=0.0, dedup=False), **given}
  )


def test_cleaning_of_fields():
  o = options(strip=True, unicode="NFKC")
  assert render(tasks.Task("seq2seq", "x: {a} ", "{b}"), {"a": " ﬁ\u3000", "b": "e\u0301\n"}, o) == ("x: fi ", "é")


@pytest.mark.parametrize(
  "given,sizes,reason",
  [
    (dict(), (3, 0), "empty target"),
    (dict(), (0, 3), "empty input"),
    (dict(), (None, 3), ""),
    (dict(), (3, 900), ""),
    (dict(min_chars=3), (3, 3), ""),
    (dict(min_chars=3), (3, 2), "shorter"),
    (dict(max_chars=5), (5, 5), ""),
    (dict(max_chars=5), (6, 5), "longer"),
    (dict(max_ratio=2.0), (4, 2), ""),
    (dict(max_ratio=2.0), (2, 5), "ratio"),
    (dict(max_ratio=2.0, min_chars=1), (None, 5), ""),
  ],
)
def test_filters(given, sizes, reason):
  got = options(**given).reason(*sizes)
  assert got.startswith(reason) if reason in ("",) and not got else reason in got and bool(got) == bool(reason)


@pytest.mark.parametrize("bad", [dict(unicode="NFX"), dict(min_chars=5, max_chars=3), dict(max_ratio=0.5)])
def test_bad_options(bad):
  with pytest.raises(InputError, match="data.clean"):
    options(**bad)


def test_digest_keeps_sides_apart():
  assert len({clean.digest("a", "b"), clean.digest("ab", ""), clean.digest("", "ab"), clean.digest("b", "a")}) == 4
