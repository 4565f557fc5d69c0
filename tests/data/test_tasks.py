"""Templates, the columns people have, and cleaning.

Catches: `str.format` semantics leaking in (attributes, formats), a null that becomes "None", optional parts that
leave their
blank line, limits that count the template's own text, a filter that is off by one.
"""

import pytest

from jaxft.data import clean, tasks
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
  assert tasks.Task("seq2seq", "go", "{l.5}").render(row, clean.NOTHING.text, "")[2:] == (None, 0, 1)


@pytest.mark.parametrize(
  "template,says",
  [
    ("{enn}", ("f.jsonl, line 7", "task.input", "{enn}", "did you mean 'en'", "en, t (t.x), l")),
    ("{t.z}", ("'t' has x",)),
    ("{t}", ("an object with x", "{t.x}")),
    ("{l}", ("a list of 2", "{l.0}", "{l.*}")),
    ("{en.x}", ("'en' is 'E'",)),
    ("{en", ("open or empty brace",)),
    ("en}", ("not opened",)),
    ("{}", ("open or empty",)),
  ],
)
def test_template_errors(template, says):
  with pytest.raises(InputError) as e:
    render(tasks.Task("seq2seq", template, "{en}"), {"en": "E", "t": {"x": "y"}, "l": ["p", "q"]})
  assert all(s in str(e.value) for s in says), str(e.value)


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
  ],
)
def test_conventions(row, expected):
  assert render(DEFAULT.resolve(row), row) == expected


def test_conventions_do_not_touch_templates_that_are_given():
  task = tasks.Task("seq2seq", "{question}?", "{answer}")
  assert task.resolve({"input": "i", "target": "t"}) is task


def test_columns_that_are_not_a_pair():
  with pytest.raises(InputError, match=r"a, b, c are not a pair.*task.input='\{a\}'"):
    DEFAULT.resolve({"a": "1", "b": "2", "c": "3"})
  with pytest.raises(InputError, match="line 7.*turns user, assistant, user"):
    render(
      tasks.Task("seq2seq", "{chat.prompt}", "{chat.completion}"),
      {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]},
    )


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
