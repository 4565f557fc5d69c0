"""Small made-up data sets, one for each kind of task: to try a config offline, and to see that a run learns.

`builtin:samples-NAME[:SPLIT]`. Each row follows from its number alone, and its text decides by a hash which split it is
in. They are easy on purpose: a model of 100,000 parameters learns most of them in minutes on a CPU.
"""

import itertools
import random
from collections.abc import Callable, Iterator

PEOPLE = (
  "Ada Boris Chen Dora Emil Fatima Goran Hana Ivan Jun Kofi Lena Milo Nora Omar Petra Quinn Rosa Sami Tara".split()
)
PLACES = "Oslo Lima Kyoto Cairo Porto Quito Perth Bergen Dakar Hanoi Turin Bern Accra Sofia Leeds Minsk".split()
FIRMS = ["Acme", "Blue River", "Northwind", "Globex", "Red Kite", "Stone Bridge", "Umbra", "Vela"]
THINGS = "film book hotel meal phone garden song car play train coffee chair lamp camera boat coat".split()
GOOD = "wonderful great lovely brilliant superb charming delightful excellent".split()
BAD = "awful terrible dull dreadful poor boring horrible disappointing".split()
ACTS = "bought sold found lost repaired painted described borrowed carried hid".split()
ANIMALS = "cat dog horse owl fox hen frog bear mouse goat".split()
TOPICS = dict(
  sport=("match", "goal", "team", "coach", "race"),
  money=("bank", "price", "share", "loan", "tax"),
  science=("cell", "planet", "atom", "study", "energy"),
  food=("soup", "bread", "recipe", "oven", "spice"),
  travel=("flight", "ticket", "beach", "border", "suitcase"),
  music=("chord", "album", "drum", "choir", "melody"),
)
INTENTS = dict(
  card_lost=("I lost my card", "my card is gone", "someone took my card"),
  card_arrival=("when does my card come", "my new card is not here yet", "where is the card I ordered"),
  change_pin=("I want another PIN", "how do I change my PIN", "please set a new PIN"),
  top_up=("how do I add money", "I want to top up", "put money on my account"),
  refund=("I want my money back", "how do I get a refund", "please return my payment"),
  exchange_rate=("what is the exchange rate", "how much is a euro today", "which rate do you use"),
  transfer_failed=("my transfer failed", "the payment did not go through", "why was my transfer refused"),
  close_account=("close my account", "I want to leave the bank", "please delete my account"),
)


def _sentiment(r: random.Random) -> dict:
  good = r.random() < 0.5
  word, other = r.choice(GOOD if good else BAD), r.choice(BAD if good else GOOD)
  shapes = (
    f"the {r.choice(THINGS)} was {word}",
    f"one {word} {r.choice(THINGS)}, I must say",
    f"{r.choice(PEOPLE)} found the {r.choice(THINGS)} {word}",
    f"not {other} at all, a {word} {r.choice(THINGS)}",
  )
  return dict(sentence=r.choice(shapes), label="positive" if good else "negative")


def _sale(r: random.Random) -> tuple[str, str, str, str]:
  return r.choice(PEOPLE), r.choice(ACTS), r.choice(THINGS), r.choice(PLACES)


def _pair(r: random.Random) -> dict:
  who, act, thing, place = _sale(r)
  same = r.random() < 0.5
  other = (
    (who, act, thing, place) if same else (r.choice([p for p in PEOPLE if p != who]), r.choice(ACTS), thing, place)
  )
  return dict(
    sentence1=f"{who} {act} a {thing} in {place}.",
    sentence2=f"In {other[3]}, a {other[2]} was what {other[0]} {other[1]}.",
    label=int(same),
  )


def _similarity(r: random.Random) -> dict:
  one, keep = _sale(r), [r.random() < 0.6 for _ in range(4)]
  two = [a if k else b for a, b, k in zip(one, _sale(r), keep)]
  text = lambda s: f"{s[0]} {s[1]} a {s[2]} in {s[3]}."
  return dict(sentence1=text(one), sentence2=text(two), score=round(5 * sum(a == b for a, b in zip(one, two)) / 4, 2))


def _topic(r: random.Random) -> dict:
  topic = r.choice(sorted(TOPICS))
  a, b = r.sample(TOPICS[topic], 2)
  return dict(text=f"{r.choice(PEOPLE)} asked about the {a} and the {b} in {r.choice(PLACES)}", label=topic)


def _intent(r: random.Random) -> dict:
  intent = r.choice(sorted(INTENTS))
  before = r.choice(("", "hello, ", "hi there, ", "please help: ", f"this is {r.choice(PEOPLE)}, "))
  return dict(text=before + r.choice(INTENTS[intent]) + r.choice(("", ".", "?", " today", " again")), category=intent)


def _entities(r: random.Random) -> dict:
  who, place, firm = r.choice(PEOPLE), r.choice(PLACES), r.choice(FIRMS)
  shape = r.choice(
    (
      "{who} works for {firm} in {place} .",
      "{firm} opened a shop in {place} .",
      "In {place} , {who} met a man from {firm} .",
      "{who} bought a {thing} .",
    )
  )
  kinds, tokens, tags = (
    dict(who=(who, "PER"), place=(place, "LOC"), firm=(firm, "ORG"), thing=(r.choice(THINGS), "")),
    [],
    [],
  )
  for word in shape.split():
    text, kind = kinds.get(word.strip("{}"), (word, ""))
    for i, part in enumerate(text.split()):
      tokens.append(part)
      tags.append(f"{'I' if i else 'B'}-{kind}" if kind else "O")
  return dict(tokens=tokens, ner_tags=tags)


def _question(r: random.Random) -> dict:
  facts = [_sale(r) for _ in range(3)]
  sentences = [f"{who} {act} a {thing} in {place}." for who, act, thing, place in facts]
  k = r.randrange(3)
  asked, answer = r.choice(
    (
      (f"Where was the {facts[k][2]} that {facts[k][0]} {facts[k][1]}?", facts[k][3]),
      (f"Who {facts[k][1]} a {facts[k][2]} in {facts[k][3]}?", facts[k][0]),
    )
  )
  start = sum(len(s) + 1 for s in sentences[:k]) + sentences[k].index(answer)
  context = " ".join(sentences)
  return dict(question=asked, context=context, answers=dict(text=[answer], answer_start=[start]))


def _story(r: random.Random) -> dict:
  who, animal, place = r.choice(PEOPLE), r.choice(ANIMALS), r.choice(PLACES)
  middle = [
    f"The {animal} {r.choice(ACTS)} a {r.choice(THINGS)}.",
    f"{who} was {r.choice(('happy', 'sad', 'tired'))}.",
    f"It was a {r.choice(GOOD + BAD)} day.",
    f"They had a {r.choice(THINGS)} and a {r.choice(THINGS)}.",
  ]
  r.shuffle(middle)
  return dict(
    text=" ".join([f"{who} had a {animal} in {place}.", *middle[: r.randint(2, 4)], f"Then {who} went home."])
  )


def _summary(r: random.Random) -> dict:
  who, act, thing, place = _sale(r)
  more = [f"The {r.choice(ANIMALS)} saw it.", f"It was {r.choice(GOOD)}.", f"{r.choice(PEOPLE)} did not care."]
  r.shuffle(more)
  document = f"Yesterday {who} was in {place}. There {who} {act} a {thing}. {' '.join(more[: r.randint(1, 3)])}"
  return dict(document=document, summary=f"{who} {act} a {thing}.")


def _chat(r: random.Random) -> dict:
  turns = [dict(role="system", content="Answer in one word.")] if r.random() < 0.3 else []
  for _ in range(r.randint(1, 3)):
    a, b = r.randint(0, 30), r.randint(0, 30)
    word = r.choice(ANIMALS)
    asked = r.choice(((f"What is {a} plus {b}?", str(a + b)), (f"Spell {word} in capitals.", word.upper())))
    turns += [dict(role="user", content=asked[0]), dict(role="assistant", content=asked[1])]
  return dict(messages=turns)


def _instruction(r: random.Random) -> dict:
  last = _chat(r)["messages"][-2:]
  return dict(prompt=last[0]["content"], completion=last[1]["content"])


ROWS: dict[str, Callable[[random.Random], dict]] = {
  f"samples-{name}": make
  for name, make in dict(
    sentiment=_sentiment,
    pairs=_pair,
    similarity=_similarity,
    topics=_topic,
    intents=_intent,
    entities=_entities,
    questions=_question,
    stories=_story,
    summaries=_summary,
    chats=_chat,
    instructions=_instruction,
  ).items()
}
SIZES = dict(train=1000, validation=100, test=100)


def rows(name: str) -> Iterator[dict]:
  """Yields the rows of a set without end, with repetitions."""
  return (ROWS[name](random.Random(f"{name}/{i}")) for i in itertools.count())
