"""Hostile templates end with an error, soon and small; harmless ones give what jinja2 gives.

Catches: an attribute of Python's inside that can be reached, a loop, call, filter or operator that is not counted, a
budget that only works in the main thread or is shared by threads, a machine that slept taken for an endless loop, a
counting wrapper that changes `loop`, macros, filters or `~`.
"""

import resource
import subprocess
import sys
import threading
import time

import jinja2.sandbox
import pytest

from jaxft.data import sandbox
from jaxft.data.chat_template import Template
from jaxft.errors import InputError

CHAT = [dict(role="user", content="q"), dict(role="assistant", content="a")]
ATTRIBUTES = [
  "{{ ''.__class__ }}",
  "{{ messages.__class__.__mro__ }}",
  "{{ ''['__class__'] }}",
  "{{ ''|attr('__class__') }}",
  "{{ messages|map(attribute='__class__')|list }}",
  "{{ '{0.__class__}'.format(messages) }}",
  "{{ ('{0.__class__}'|attr('format'))(messages) }}",
  "{{ '{a.__class__}'.format_map({'a': 1}) }}",
  "{{ raise_exception.__globals__ }}",
  "{{ namespace.__init__ }}",
  "{{ cycler.__init__.__globals__ }}",
  "{{ strftime_now.__self__ }}",
  "{{ self._TemplateReference__context }}",
  "{% set ns = namespace() %}{% set ns.__html__ = 1 %}{{ ns.a }}",
  "{{ namespace(_x=1)._x }}",
  "{{ messages.append(1) }}",
  "{{ messages[0].update({'role': 'x'}) }}",
  "{% for m in messages %}{{ loop._iterator }}{% endfor %}",
  "{{ 'a'.encode() }}",
]
LATER = "{% if messages[0].content == 'q' %}HERE{% endif %}"
LONG = "{% set a = 'a' * 1000000 %}"
DOUBLE = "{% set ns = namespace(a=START) %}{% for i in range(99) %}{% set ns.a = STEP %}{% endfor %}"
SLOW = dict(
  loops="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  loops_that_write="{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
  loop_in_a_set="{% set x %}{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endset %}",
  loop_in_a_test="{% for i in range(99999) if range(99999)|map('string')|list|length == 1 %}{% endfor %}",
  macros="{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
  recursive="{% for i in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
  filters="{% for i in range(99999) %}{{ range(99999)|sort|reverse|list|length }}{% endfor %}",
  sums="{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.n = ns.n + 1 %}"
  "{% endfor %}{% endfor %}",
)
BIG = dict(
  output=LONG + "{% for i in range(99999) %}{{ a }}{% endfor %}",
  output_of_a_macro=LONG + "{% macro f() %}{% for i in range(999) %}{{ a }}{% endfor %}{% endmacro %}{{ f()|length }}",
  output_of_a_set=LONG + "{% set x %}{% for i in range(999) %}{{ a }}{% endfor %}{% endset %}{{ x|length }}",
  times="{{ 'abc' * 10**9 }}",
  times_left="{{ 10**9 * 'abc' }}",
  times_list="{{ ([1] * 10**9)|length }}",
  plus=DOUBLE.replace("START", "'abc'").replace("STEP", "ns.a + ns.a"),
  plus_list=DOUBLE.replace("START", "[1]").replace("STEP", "ns.a + ns.a"),
  tilde=DOUBLE.replace("START", "'abc'").replace("STEP", "ns.a ~ ns.a"),
  nested=DOUBLE.replace("START", "[1]").replace("STEP", "[ns.a, ns.a]") + "{{ ns.a }}",
  nested_json=DOUBLE.replace("START", "[1]").replace("STEP", "{'a': ns.a, 'b': ns.a}") + "{{ ns.a|tojson }}",
  nested_text=DOUBLE.replace("START", "[1]").replace("STEP", "[ns.a, ns.a]") + "{{ ns.a|string|length }}",
  nested_join=DOUBLE.replace("START", "[1]").replace("STEP", "[ns.a, ns.a]") + "{{ ns.a|join|length }}",
  nested_tilde=DOUBLE.replace("START", "[1]").replace("STEP", "[ns.a, ns.a]") + "{{ (ns.a ~ '')|length }}",
  nested_format=DOUBLE.replace("START", "[1]").replace("STEP", "[ns.a, ns.a]") + "{{ '%s' % [ns.a] }}",
  kept=LONG + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [a ~ i] %}{% endfor %}",
  percent="{{ '%1000000000d' % 1 }}",
  percent_star="{{ '%*d' % (1000000000, 1) }}",
  format_filter="{{ '%(x)1000000000d'|format(x=1) }}",
  format="{{ '{:1000000000d}'.format(1) }}",
  format_nested="{{ '{:{}d}'.format(1, '1000000000') }}",
  ljust="{{ 'a'.ljust(10**9) }}",
  zfill="{{ 'a'.zfill(10**9)|length }}",
  center="{{ 'a'|center(10**9) }}",
  indent=LONG + "{{ a.replace('a', '\n\n\n\n')|indent(99) }}",
  json_indent="{{ messages|tojson(indent=10**9) }}",
  json_separators=LONG + "{{ ([1] * 1000)|tojson(separators=(a, a)) }}",
  replace=LONG + "{{ a.replace('a', a)|length }}",
  replace_filter=LONG + "{{ a|replace('a', a)|length }}",
  join=LONG + "{{ a.join(a)|length }}",
  join_filter=LONG + "{{ range(1000)|join(a)|length }}",
  join_again=LONG + "{{ ([a] * 1000)|join|length }}",
  batch="{{ [1]|batch(10**9, 'x')|list|length }}",
  slice="{{ [1]|slice(10**9)|list|length }}",
  sum=LONG + "{{ ([[1] * 99999] * 9999)|sum(start=[])|length }}",
  power="{{ 10**(10**10) }}",
  product="{% set ns = namespace(n=9**99) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
  round="{{ 1.5|round(10**9, 'ceil') }}",
  folded="{{ ('x'|center(10**9))|length }}{{ 'a' * 10**10 }}",
)


def stopped(text, says):
  start = time.monotonic()
  with pytest.raises(InputError, match=says) as e:
    Template(text, "<s>", "</s>").render(CHAT, None, "row 7")
  assert "\n" not in str(e.value) and len(str(e.value)) < 700
  return time.monotonic() - start


@pytest.mark.parametrize("text", ATTRIBUTES)
def test_attributes(text):
  stopped(text, "chat template reaches for what templates may not touch")


@pytest.fixture
def quick(monkeypatch):
  """Makes the limits a tenth, so that the tests take seconds."""
  monkeypatch.setattr(sandbox, "SECONDS", 0.2)
  monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.05)
  monkeypatch.setattr(sandbox, "LIMIT", sandbox.LIMIT // 10)
  monkeypatch.setattr(sandbox, "TOTAL", sandbox.TOTAL // 10)


@pytest.mark.parametrize("name", SLOW)
def test_endless(name, quick):
  assert stopped(SLOW[name], "chat template was stopped: it is not done after 0.2 seconds") < 10


@pytest.mark.parametrize("name", BIG)
def test_huge(name, quick):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert stopped(BIG[name], "chat template was stopped") < 10
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux, bytes on a Mac
  assert grown < 200_000 * (1024 if sys.platform == "darwin" else 1)


def test_two_seconds_from_any_thread():
  taken = {}

  def work(i):
    taken[i] = stopped(SLOW["loops"], "not done after 2 seconds")

  threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert len(taken) == 3 and all(2 <= x < 30 for x in taken.values())


def test_main_thread_of_another_process():
  code = (
    "from jaxft.data.chat_template import Template\n"
    f"Template({LATER.replace('HERE', SLOW['macros'])!r}, None, None).prompt({CHAT}, None, 'row 7')"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert "InputError: row 7: the chat template was stopped: it is not done after 2 seconds" in done.stderr


def test_templates_that_wait_for_a_row(quick):
  for text, says in ((SLOW["loops"], "stopped"), (BIG["times"], "stopped"), (ATTRIBUTES[0], "reaches")):
    stopped(LATER.replace("HERE", text), f"row 7: the chat template.*{says}")


def test_a_machine_that_slept_is_not_to_blame(monkeypatch):
  jumps = iter(range(0, 10**9, 1000))
  monkeypatch.setattr(sandbox.time, "monotonic", lambda: next(jumps))
  assert Template("{% for i in range(9999) %}{{ i }}{% endfor %}", None, None).prompt(CHAT, None, "")[-4:] == "9998"


def test_other_failures():
  stopped("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError")
  stopped("{{ 1 // 0 }}", "fails with ZeroDivisionError")
  stopped("{% include 'x' %}", "fails with TypeError")
  stopped("{{ range(10**9)|length }}", "fails with OverflowError")
  stopped("{{ messages[0].nothing.more }}", "fails with UndefinedError")
  for text in ("{{ lipsum() }}", "{{ [1, 2]|random }}"):
    with pytest.raises(InputError, match="undefined|No filter"):
      Template(text, None, None).prompt(CHAT, None, "")
  with pytest.raises(InputError, match="it is 1,000,001 characters long"):
    Template("x" * 1_000_001, None, None)
  assert getattr(sandbox._here, "limits", None) is None


HARMLESS = """{% macro wrap(x, n=2) %}<{{ x }}:{{ n }}{{ caller() if caller else '' }}>{% endmacro %}
{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{{ loop.previtem }}
{{ loop.nextitem }}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}
{% for m in messages if m.role != 'system' %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% else %}none
{% endfor %}{% for x in nothing %}x{% else %}empty{% endfor %}
{% for k, v in messages[0].items() %}{{ k ~ v ~ 1 }}{% endfor %}
{% for i in [[1, [2]], [3]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}
{% call wrap('c') %}in{% endcall %}
{{ wrap('a') }}{{ wrap('b', n=3) }}{% set x %}block {{ 1 + 2 * 3 ** 2 % 4 }}{% endset %}{{ x|upper|trim|length }}{{ x }}
{{ [1, 2.5, none, true, {'a': [1]}] }}{{ 'a' * 3 + 'b' }}{{ '%s-%03d' % ('a', 5) }}{{ '{}|{:>4}'.format('a', 'b') }}
{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ [3, 1, 2]|sort|join }}{{ 'a b c'.split()|reverse|list }}{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXb'|replace('X', '-') }}
{{ 'x\ny'|indent(2) }}{{ {'b': 1, 'a': 2}|dictsort }}{{ 'é<"'|e }}{{ '-'.join(['a', 'b']) }}{{ (1, 2)|sum }}{{ 7 // 2 }}
{{ 'a'|center(5) }}{{ 1.239|round(2) }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ nothing|default('d') }}{{ 'ab'|first }}
{{ '%s and %s'|format(1, 'x') }}{{ ['a', 'b']|map('upper')|list }}{{ dict(a=1).a }}{{ namespace(q=5).q }}{{ 2 ** 10 }}
    {% if true %}indented
    {% endif %}
{% set ns = namespace(n=0) %}{% for i in range(10) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}{{ not_there }}"""


def test_harmless_templates_are_jinjas():
  plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  messages = [dict(role=r, content=c) for r, c in (("system", "s"), ("user", "ü"), ("assistant", "a"), ("user", "z"))]
  with sandbox.Limits():
    made = sandbox.render(HARMLESS, dict(messages=messages))
  assert made == plain.from_string(HARMLESS).render(messages=messages)


def test_long_chats_are_not_stopped():
  joined = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
  messages = [dict(role=("user", "assistant")[i % 2], content="lorem ipsum " * 200) for i in range(4000)]
  made = Template(joined, None, "</s>").render(messages, None, "", "last")
  assert len(made.text) > 9_600_000 and made.text[slice(*made.spans[0])].endswith("</s>")
