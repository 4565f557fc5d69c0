"""Chat templates in the styles that models have, against transformers' own rendering, and the spans of their answers.

Catches: an environment that differs from transformers' (trimming, tojson, a variable that is missing), a span that
holds the prompt, lacks the end-of-turn token or takes the line break after it, an answer in the middle of a chat whose
span is found in another text than the one that is given, reasoning that is dropped in silence, EOS of a whole chat
taken for the end of each turn, messages left out that are learnt, a null that becomes "None", parts printed as a list.
"""

import datetime
import pickle

import numpy as np
import pytest
import tokenizers
import transformers

from jaxft.data import chat_template
from jaxft.data.chat_template import Chat, Template
from jaxft.errors import InputError

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<r>' + m.content + '</r><|im_end|>\\n' }}
    {%- elif m.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' }}{{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<c>' }}{{- call.function.arguments | tojson }}{{- '</c>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set before = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set before = none %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must take turns: user, assistant') }}
{% endif %}
{% if loop.first and before is not none %}{% set text = '<<SYS>>\\n' ~ before ~ '\\n<</SYS>>\\n\\n' ~ m['content'] %}
{% else %}{% set text = m['content'] %}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token ~ '[INST] ' ~ text | trim ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ text | trim ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages and messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{- m.content + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant,\\n  and not ' + m.role) }}{% endif %}{% endfor %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
  {% if m['role'] in ['user', 'system', 'assistant'] %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% endif %}
  {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
QWEN3 = """{% set ns = namespace(last=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{% set said = m.content %}
{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{% if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + said + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{- '<|User|>' + m.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}{{ '\\n' }}{% else %}
{{- m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role.title() ~ ': ' ~ m.content ~ '\\n\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}" \
        "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"  # fmt: skip
STYLES = dict(chatml=CHATML, llama2=LLAMA2, llama3=LLAMA3, gemma=GEMMA, mistral=MISTRAL, phi3=PHI3, zephyr=ZEPHYR)
STYLES |= dict(qwen3=QWEN3, r1=R1, marked=MARKED, plain=PLAIN, dated=DATED)
EOS = dict(chatml="<|im_end|>", llama3="<|eot_id|>", gemma="<eos>", phi3="<|endoftext|>", qwen3="<|im_end|>")
NO_SYSTEM = ("gemma", "mistral")
W = "data.jsonl, line 7"


def talk(*contents, system=None):
  messages = [dict(role=("user", "assistant")[i % 2], content=c) for i, c in enumerate(contents)]
  return ([dict(role="system", content=system)] if system is not None else []) + messages


def make(style, **given):
  return Template(STYLES[style], "<s>", EOS.get(style, "</s>"), **given)


@pytest.fixture(scope="module")
def hf():
  """Returns a function that gives transformers' tokenizer with a style's template."""
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = tokenizers.decoders.ByteLevel()
  special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
  )
  t.train_from_iterator(["user assistant system Hello there, how is it? Fine, and you? Über 3 °C."] * 9, trainer)

  def give(style):
    return transformers.PreTrainedTokenizerFast(
      tokenizer_object=t, bos_token="<s>", eos_token=EOS.get(style, "</s>"), chat_template=STYLES[style]
    )

  return give


TALKS = [
  talk("Hello there", "Fine, and <you>?"),
  talk(" 1 < 2 & 3 ", "\n  yes  \n", "Ünïcode °\n\nlines", "no 🙂"),
  talk("a", "b", "c", "d", "e", "f", system="Be \"good\"."),
  talk("a", "b", "c", system=""),
]  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_texts_are_those_of_transformers(style, hf):
  tokenizer, template = hf(style), make(style)
  for messages in TALKS:
    if style in NO_SYSTEM and messages[0]["role"] == "system":
      continue
    for prompt in (False, True):
      expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
      made = template.prompt(messages, None, W) if prompt else template.examples(messages, None, W, "last", True)
      if prompt:
        assert made == expected
      elif messages[-1]["role"] == "assistant":
        assert made[0].text == expected


EXPECTED = dict(  # of talk("q", "a", "r", "b"), what is to be learnt
  chatml=["a<|im_end|>", "b<|im_end|>"],
  llama2=[" a </s>", " b </s>"],
  llama3=["a<|eot_id|>", "b<|eot_id|>"],
  gemma=["a<end_of_turn>", "b<end_of_turn>"],
  mistral=["a</s>", "b</s>"],
  phi3=["a<|end|>", "b<|end|>\n<|endoftext|>"],
  zephyr=["a</s>", "b</s>"],
  r1=["a</s>", "b</s>"],
  marked=["a<|im_end|>", "b<|im_end|>"],
  plain=[" a\n\n", " b\n\n"],
)


@pytest.mark.parametrize("style", EXPECTED)
def test_spans(style):
  template, messages = make(style), talk("q", "a", "r", "b")
  whole = template.render(messages, None, W)
  assert [whole.text[a:b] for a, b in whole.spans] == EXPECTED[style]
  assert template.render(messages, None, W, "last") == Chat(whole.text, whole.spans[1:])
  alone = template.examples(messages, None, W, split=True)
  assert alone[1] == Chat(whole.text, whole.spans[1:]) and len(alone) == 2
  (start, end), text = alone[0].spans[0], alone[0].text
  assert text[start:end] in (EXPECTED[style][0], EXPECTED[style][0] + "\n<|endoftext|>")
  assert text == template.render(messages[:2], None, W).text and start == whole.spans[0][0]
  begins = bool(template.bos_token) and whole.text.startswith(template.bos_token)
  assert begins == (style in ("llama2", "llama3", "gemma", "mistral", "r1"))
  if style != "r1":  # there the prompt begins the reasoning, which the template then drops
    assert text[:start] == template.prompt(messages[:1], None, W)
  again = pickle.loads(pickle.dumps(template))
  assert again.render(messages, None, W) == whole and again.now == template.now


def test_spans_are_transformers_masks(hf):
  tokenizer, template = hf("marked"), make("marked")
  for messages in TALKS[:3]:
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    chat = template.render(messages, None, W)
    encoded = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == made["input_ids"] and 0 < sum(made["assistant_masks"])
    assert chat_template.covered(encoded["offset_mapping"], chat.spans).tolist() == [
      bool(x) for x in made["assistant_masks"]
    ]


def test_a_prompt_that_begins_the_reasoning():
  whole = make("r1").render(talk("q", "<b>a</b>", "r", "<think>\nx</think>b"), None, W)
  assert [whole.text[a:b] for a, b in whole.spans] == ["<b>a</b></s>", "b</s>"]  # not b>a</b>, though <think> has the <


def test_covered():
  offsets = np.array([(0, 0), (0, 2), (2, 5), (5, 6), (6, 9), (9, 9), (9, 10), (10, 12)])
  assert chat_template.covered(offsets, [(3, 6), (9, 10)]).tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
  assert not chat_template.covered(offsets, []).any()
  assert chat_template.covered(np.zeros((0, 2)), [(0, 1)]).shape == (0,)


def test_reasoning():
  template = make("qwen3")
  messages = talk("q", "<think>\nx\n</think>\n\na", "r", "<think>\ny\n</think>\n\nb")
  with pytest.raises(InputError, match=r"line 7: once others follow.*message 2 of 4.*'.*<think>.*split") as e:
    template.render(messages, None, W)
  assert "<think>" in str(e.value) and "assistant\\na<|im_end|>" in str(e.value)
  whole = template.render(messages, None, W, "last")
  assert [whole.text[a:b] for a, b in whole.spans] == ["<think>\ny\n</think>\n\nb<|im_end|>"]
  first, last = template.examples(messages, None, W, split=True)
  assert last == whole and "x" not in last.text
  assert [first.text[a:b] for a, b in first.spans] == ["<think>\nx\n</think>\n\na<|im_end|>"]
  short = make("qwen3", variables=dict(enable_thinking=False))
  assert short.prompt(messages[:3], None, W).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
  [quick] = short.examples(talk("q", "a"), None, W, split=True)  # the prompt says the empty reasoning already
  assert [quick.text[a:b] for a, b in quick.spans] == ["a<|im_end|>"]
  own = [dict(role="user", content="q"), dict(role="assistant", content="a", thinking="z")]
  assert "<think>\nz\n</think>" in template.render(own, None, W).text


def test_reasoning_names_are_those_of_transformers(hf):
  for name in chat_template.THOUGHTS:
    own = [dict(role="user", content="q"), {"role": "assistant", "content": "a", name: "z"}]
    assert make("qwen3").render(own, None, W).text == hf("qwen3").apply_chat_template(own, tokenize=False)


def test_left_out():
  template = make("chatml")
  messages = talk("q", "a", "r", "b", "s", "c")
  messages[1]["train"], messages[3]["weight"], messages[5]["weight"] = False, 0, 1
  whole = template.render(messages, None, W)
  assert [whole.text[a:b] for a, b in whole.spans] == ["c<|im_end|>"]
  assert whole.text == template.render(talk("q", "a", "r", "b", "s", "c"), None, W).text
  messages[5]["train"] = False
  for turns in ("all", "last"):
    with pytest.raises(InputError, match="line 7: there is no answer to learn; train is false"):
      template.render(messages, None, W, turns)
  messages[5]["train"], messages[5]["weight"] = None, 0.5
  with pytest.raises(InputError, match="message 6 has weight 0.5"):
    template.render(messages, None, W)


def test_sharegpt_and_tools(hf):
  rows = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"ä": [1]}}'},
    {"from": "observation", "value": "[2]"},
    {"from": "gpt", "value": "a"},
  ]
  call = {"type": "function", "function": {"name": "f", "arguments": {"ä": [1]}}}
  messages = [
    dict(role="user", content="q", name=None),
    dict(role="assistant", content=None, tool_calls=[call]),
    dict(role="tool", content="[2]"),
    dict(role="assistant", content="a", tool_calls=None),
  ]
  tools = [dict(type="function", function=dict(name="f", description="ü <b>", parameters={}))]
  expected = hf("chatml").apply_chat_template(messages, tools=tools, tokenize=False)
  whole = make("chatml").render(messages, tools, W)
  assert whole.text == expected and "ü <b>" in expected
  assert [whole.text[a:b] for a, b in whole.spans] == ['\n<c>{"ä": [1]}</c><|im_end|>', "a<|im_end|>"]
  assert make("chatml").render(rows, '[{"type": "function", "function": {"name": "f", "description": "ü <b>", '
                               '"parameters": {}}}]', W) == whole  # fmt: skip
  assert make("chatml").render(rows, [dict(name="f", description="ü <b>", parameters={})], W) == whole
  assert make("chatml").render(np.array(rows), "", W) == make("chatml").render(messages, None, W)


def test_contents():
  parts = [dict(type="text", text="p"), dict(type="text", text="q")]
  row = [dict(role="user", content=parts), dict(role="assistant", content="ä".encode())]
  assert make("zephyr").render(row, None, W).text == make("zephyr").render(talk("p\n\nq", "ä"), None, W).text
  reader = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}" \
           "{{ '[' + p.text + ']' }}{% endfor %}{% endif %}</s>{% endfor %}"  # fmt: skip
  assert Template(reader, None, "</s>").render(row, None, W).text == "[p][q]</s>ä</s>"
  null = [dict(role="system", content=None), dict(role="user", content="q"), {"from": "gpt", "value": None}]
  made = make("chatml").render(null, None, W)
  assert "None" not in made.text and [made.text[a:b] for a, b in made.spans] == ["<|im_end|>"]
  named = Template("{% for m in messages %}{{ m.content }}{{ '!' if m.name is defined }}</s>{% endfor %}", None, None)
  assert named.prompt([dict(role="user", content="q", name=None), dict(role="user", content="q", name="n")], [], W) == (
    "q</s>q!</s>"
  )
  numbers = [dict(role="user", content=np.str_("q"), n=np.int64(3)), dict(role="assistant", content="a", t=object())]
  text = Template("{% for m in messages %}{{ m.content ~ m.n ~ m.t }}</s>{% endfor %}", None, "</s>")
  assert text.render(numbers, None, W).text == "q3</s>a<object></s>"


@pytest.mark.parametrize(
  "style,messages,says",
  [
    ("gemma", talk("q", "a", system="s"), "refuses the chat: System role not supported"),
    ("mistral", talk("q", "a", system="s"), "refuses the chat: Only user and assistant, and not system"),
    ("llama2", [dict(role="user", content="q")] * 2 + talk("q", "a"), "Roles must take turns: user, assistant"),
    ("chatml", [dict(role="usr", content="q")], "message 1 has the role 'usr'.*did you mean 'user'"),
    ("chatml", [dict(content="q")], "message 1 has the role None"),
    ("chatml", [dict(role=["user"], content="q")], r"message 1 has the role \['user'\]"),
    ("chatml", talk("q"), r"no answer to learn; no assistant is among the messages \(user\)"),
    ("chatml", [], r"messages are \[\]"),
    ("chatml", None, "messages are None"),
    ("chatml", "hello", "messages are 'hello'"),
    ("chatml", ["hello"], "message 1 is 'hello'"),
    ("chatml", [dict(role="user", text="q")], "message 1 has no content; it has role, text"),
    ("chatml", [dict(role="user", content=3)], "message 1 is 3; this model reads text"),
    ("chatml", [dict(role="user", content=[dict(type="image", url="x")])], "message 1 is .*image.*reads text"),
    ("chatml", [dict(role="user", content=b"\xff")], "message 1 is bytes that are not UTF-8"),
    ("chatml", [{"from": "function_call", "value": "f(x)"}], "message 1 is a function_call with .*json"),
    ("zephyr", talk("q", "a") + [dict(role="tool", content="x"), dict(role="assistant", content=" ")], None),
    ("dated", talk(*"qaqaqaqaqaqa"), "writes nothing for message 10"),
  ],
)
def test_errors(style, messages, says):
  if says is None:
    assert len(make(style).render(messages, None, W).spans) == 2
    return
  with pytest.raises(InputError, match=f"(?s)line 7.*({says})") as e:
    make(style).render(messages, None, W)
  assert "\n" not in str(e.value)


def test_first_message_is_an_answer():
  assert make("phi3").render(talk("q", "a")[1:], None, W).spans  # a greeting
  with pytest.raises(InputError, match=r"fails with UndefinedError.*of messages 1 to 0"):
    make("chatml").render(talk("q", "a")[1:], None, W)


def test_prompt_that_is_not_how_the_answer_begins():
  other = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ END }}"
  for prompt, end in (("<bot>", ""), ("\n<bot>", "\n<end>")):
    text = other.replace("END", f"'{prompt}' if add_generation_prompt else '{end}'")
    with pytest.raises(InputError, match=r"prompt for it: '<user>q</s>\\?n?<bot>' there, '<user>q</s><assistant>a</s>"):
      Template(text, None, "<end>").render(talk("q", "a"), None, W)


@pytest.mark.parametrize(
  "text,says",
  [("{% for %}", "cannot be read, line 1"), ("{{ x | nope }}", "No filter named 'nope'"), ("", "not the text"),
   (None, "not the text"), ({"default": "x"}, "name one")],
)  # fmt: skip
def test_broken_templates(text, says):
  with pytest.raises(InputError, match=f"chat template.*{says}"):
    Template(text, None, None)


def test_other_arguments():
  with pytest.raises(InputError, match="did you mean 'last'"):
    make("chatml").render(talk("q", "a"), None, W, "lst")
  for tools in ("{", '{"a": 1}', 3, ["x"]):
    with pytest.raises(InputError, match="line 7: tools are"):
      make("chatml").render(talk("q", "a"), tools, W)
  then = make("dated", now=datetime.datetime(2024, 7, 26))
  assert then.prompt(talk("q"), None, W) == "26 Jul 2024<user>q</s>"
  assert pickle.loads(pickle.dumps(then)).prompt(talk("q"), None, W) == then.prompt(talk("q"), None, W)
