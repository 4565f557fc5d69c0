"""What fills the slots of the built-in sentences: values drawn at random, and how each is said in each language.

Dates, times, numbers, units, currencies, durations, lists and names come from Unicode CLDR through Babel, numbers in
words from num2words (2.18.0 and 0.5.14 when this was written). What CLDR leaves to grammar (`du`, `au`, `vingt et une`)
is ours.
"""

import dataclasses
import datetime
import decimal
import functools
import random
from collections.abc import Callable
from typing import Any

from babel import Locale, dates, lists, numbers, units
from num2words import num2words

LANGUAGES = dict(en="English", fr="French", de="German", es="Spanish", it="Italian", nl="Dutch")


@dataclasses.dataclass(frozen=True)
class Kind:
  draw: Callable[[random.Random], Any]
  say: Callable[[Any, str, str], str]  # (value, language, form)


@dataclasses.dataclass(frozen=True)
class Said:
  """A value in a language, so that `str.format` says it."""

  kind: Kind
  value: Any
  lang: str

  def __format__(self, form: str) -> str:
    return self.kind.say(self.value, self.lang, form)


def fill(template: str, values: dict[str, Any], lang: str) -> str:
  """Returns `template` with its slots said in `lang`.

  The typographic spaces and apostrophe of CLDR (U+00A0, U+202F, U+2019) become the keyboard's, which a byte-level model
  can say in one byte instead of two or three.
  """
  said = {slot: Said(KINDS[slot.split("_")[0]], value, lang) for slot, value in values.items()}
  return template.format(**said).translate(PLAIN)


@functools.cache
def _locale(lang: str) -> Locale:
  return Locale(lang)  # a name instead costs Babel a third of the time


PLAIN = {0x202F: " ", 0xA0: " ", 0x2019: "'"}

# ---- dates and times

DATE = dict(  # form -> language -> CLDR pattern; en has two habits
  full=dict(
    en="EEEE, d MMMM y",
    fr="EEEE d MMMM y",
    de="EEEE, d. MMMM y",
    es="EEEE, d 'de' MMMM 'de' y",
    it="EEEE d MMMM y",
    nl="EEEE d MMMM y",
  ),
  us=dict(en="EEEE, MMMM d, y"),
  long=dict(en="d MMMM y", fr="d MMMM y", de="d. MMMM y", es="d 'de' MMMM 'de' y", it="d MMMM y", nl="d MMMM y"),
  long_us=dict(en="MMMM d, y"),
  day=dict(
    en="EEEE d MMMM", fr="EEEE d MMMM", de="EEEE, d. MMMM", es="EEEE d 'de' MMMM", it="EEEE d MMMM", nl="EEEE d MMMM"
  ),
  month=dict(en="MMMM y", fr="MMMM y", de="MMMM y", es="MMMM 'de' y", it="MMMM y", nl="MMMM y"),
  weekday={lang: "EEEE" for lang in LANGUAGES},
  number={lang: "d" for lang in LANGUAGES},
  iso=dict(en="yyyy-MM-dd"),
)
CLOCK = dict(en="h:mm a", fr="HH:mm", de="HH:mm", es="H:mm", it="HH:mm", nl="HH:mm")


def draw_date(r: random.Random) -> datetime.date:
  return datetime.date(1900, 1, 1) + datetime.timedelta(r.randrange(55_000))  # to 2050


def say_date(v: datetime.date, lang: str, form: str) -> str:
  pattern = DATE[form][lang]
  if lang == "fr" and v.day == 1:
    pattern = pattern.replace("d", "d'er'")  # "le 1er mars": CLDR writes "1 mars"
  return dates.format_date(v, pattern, locale=_locale(lang))


def draw_span(r: random.Random) -> tuple[datetime.date, datetime.date]:
  first = draw_date(r).replace(day=r.randint(1, 20))
  return first, first.replace(day=r.randint(first.day + 1, 28))


def say_span(v, lang: str, form: str) -> str:
  return say_date(v["from to".split().index(form.split()[0])], lang, form.split()[1])


def draw_time(r: random.Random) -> datetime.time:
  hour = r.choice([0, *range(2, 24)])  # one o'clock is singular in Spanish and Italian
  return datetime.time(hour, r.choice((0, 15, 30, 45, r.randrange(60), r.randrange(60))))


def say_time(v: datetime.time, lang: str, form: str) -> str:
  return dates.format_time(v, CLOCK[lang], locale=_locale(lang))


def draw_hours(r: random.Random) -> list[datetime.time]:
  return [datetime.time(r.randint(*hours), r.choice((0, 15, 30, 45))) for hours in ((6, 11), (14, 23))]


def say_hours(v, lang: str, form: str) -> str:
  return say_time(v[form == "to"], lang, "")


AGO = dict(second=90, minute=59, hour=48, day=60, week=30, month=30, year=99)


def draw_ago(r: random.Random) -> tuple[int, str]:
  unit = r.choice(list(AGO))
  return r.randint(1, AGO[unit]), unit


def say_ago(v: tuple[int, str], lang: str, form: str) -> str:
  n, unit = v
  days = dict(month=30, year=365).get(unit)
  delta = datetime.timedelta(days=n * days) if days else datetime.timedelta(**{unit + "s": n})
  return dates.format_timedelta(
    -delta if form == "ago" else delta, granularity=unit, threshold=1e9, add_direction=True, locale=_locale(lang)
  )


# ---- numbers, units, money


def draw_number(r: random.Random) -> int:
  return r.randrange(2, 10 ** r.choice((2, 3, 3, 4, 4, 6)))


@functools.lru_cache(50_000)
def words(n: int, lang: str, to: str = "cardinal") -> str:
  """Returns `n` in words; num2words needs 0.2 to 0.5 ms for one."""
  text = num2words(n, lang=lang, to=to).replace(",", "")
  return text.replace("tsième", "tième")  # num2words: "quatre-vingtsième"


def say_number(v: int, lang: str, form: str) -> str:
  if form == "":
    return numbers.format_decimal(v, locale=_locale(lang))
  text = words(v, lang, "ordinal" if form == "th" else "cardinal")
  if form == "f" and lang == "fr" and text.endswith("un"):
    return text + "e"  # "vingt et une pages"
  return text


def draw_decimal(r: random.Random) -> float:
  return r.randrange(1, 10 ** r.randint(2, 6)) / r.choice((10, 100))


def draw_percent(r: random.Random) -> decimal.Decimal:
  tenths = r.choice((r.randint(2, 99) * 10, r.randint(11, 999)))
  return decimal.Decimal(tenths) / 1000  # as a float, 0.822 is 82.20000000000001%


def say_percent(v: decimal.Decimal, lang: str, form: str) -> str:
  return numbers.format_percent(v, locale=_locale(lang), decimal_quantization=False)


UNITS = dict(
  length="length-kilometer length-meter length-centimeter length-mile length-foot".split(),
  mass="mass-kilogram mass-gram mass-tonne mass-pound".split(),
  volume="volume-liter volume-cubic-meter volume-milliliter".split(),
  area="area-square-kilometer area-square-meter area-hectare".split(),
  speed="speed-kilometer-per-hour speed-meter-per-second".split(),
  energy=(
    "power-watt power-kilowatt energy-kilowatt-hour energy-kilojoule digital-megabyte digital-gigabyte frequency-hertz"
  ).split(),
)


def draw_measure(names: list[str], r: random.Random) -> tuple[float, str]:
  return r.choice((r.randrange(2, 100), r.randrange(2, 5000), r.randrange(11, 1000) / 10)), r.choice(names)


def say_measure(v: tuple[float, str], lang: str, form: str) -> str:
  return units.format_unit(v[0], v[1], form or "long", locale=_locale(lang))


def say_duration(v: tuple[int, int, str, str], lang: str, form: str) -> str:
  n, m, large, small = v
  parts = [units.format_unit(x, f"duration-{u}", "long", locale=_locale(lang)) for x, u in ((n, large), (m, small))]
  return lists.format_list(parts, locale=_locale(lang))


def draw_duration(scales: tuple, r: random.Random) -> tuple[int, int, str, str]:
  large, small, most = r.choice(scales)
  return r.randint(1, 12), r.randint(1, most), large, small


SHORT = (("hour", "minute", 59), ("minute", "second", 59))
LONG = (("day", "hour", 23), ("year", "month", 11), ("week", "day", 6))


MONEY = "USD EUR GBP JPY CHF CAD AUD CNY INR BRL MXN SEK NOK DKK PLN CZK KRW THB ISK HUF SGD NZD ARS".split()


def draw_money(r: random.Random) -> tuple[float, str]:
  return r.choice((r.randrange(2, 100), r.randrange(2, 20_000), r.randrange(101, 99_999) / 100)), r.choice(MONEY)


def say_money(v: tuple[float, str], lang: str, form: str) -> str:
  amount, code = v
  if form == "sign":
    return numbers.format_currency(amount, code, locale=_locale(lang))
  whole = amount == int(amount)
  return numbers.format_currency(
    amount, code, "#,##0" if whole else "#,##0.00", locale=_locale(lang), format_type="name", currency_digits=not whole
  )


# ---- names


# CLDR's name begins with an article, or the grammar of `de` and `à` is not that of a plain name, for those left out.
COUNTRIES = (
  "AR AU AT BE BO BR BG CA CL CN CO HR CY CZ DK EC EG EE ET FI FR GE DE GH GR GT HN HU IS IN ID IQ IE "
  "IL IT JM JP JO KZ KE KW LV LB LR LY LT LU MG MY ML MT MX MA NA NP NL NZ NI NE NG NO PK PA PY PE PH "
  "PL PT QA RO RU RW SA SN RS SG SK SI SO ZA KR ES SE CH SY TZ TH TN TR UG UA GB US UY UZ VE VN YE ZM "
  "ZW CU AF AL DZ AM"
).split()
ISLANDS = "CY SG CU MT MG".split()  # "à Chypre"
PLURAL = "NL US PH".split()
EXCEPTIONS = "MX ZW KR".split()  # "le Mexique", "la Corée du Sud": else a final e is feminine
TONGUES = (
  "af sq ar hy az eu be bn bs bg ca zh hr cs da nl en et fi fr gl ka de el he hi hu is id ga it ja kk "
  "km ko lv lt mk ms mt mn no fa pl pt ro ru sr sk sl es sw sv ta th tr uk ur vi cy"
).split()
CITIES = (
  "Europe/Vienna Europe/Brussels Europe/Copenhagen Europe/London Europe/Athens Europe/Warsaw "
  "Europe/Lisbon Europe/Bucharest Europe/Moscow Africa/Algiers Asia/Jerusalem Asia/Baghdad Asia/Tehran "
  "Asia/Seoul Asia/Beirut Asia/Singapore Asia/Damascus America/Mexico_City Asia/Manila Europe/Paris "
  "Europe/Berlin Europe/Madrid Europe/Rome Europe/Prague Europe/Budapest Europe/Dublin Europe/Oslo "
  "Europe/Stockholm Europe/Helsinki Europe/Zurich Europe/Amsterdam Asia/Tokyo Asia/Shanghai "
  "Asia/Bangkok Africa/Nairobi Africa/Lagos Africa/Tunis America/New_York America/Chicago "
  "America/Toronto America/Lima America/Bogota Africa/Johannesburg Australia/Sydney Australia/Melbourne "
  "Europe/Sofia Europe/Belgrade Europe/Zagreb Asia/Dubai"
).split()


def say_country(v: str, lang: str, form: str) -> str:
  name = _locale(lang).territories[v]
  if lang != "fr" or form != "in":
    return name
  if v in PLURAL:
    return "aux " + name
  if v in ISLANDS:
    return "à " + name
  feminine = name.endswith("e") != (v in EXCEPTIONS)
  return ("en " if feminine or _vowel(name) else "au ") + name


def say_tongue(v: str, lang: str, form: str) -> str:
  name = _locale(lang).languages[v]
  if lang == "fr" and form == "from":
    return ("de l'" if _vowel(name) or v in ("he", "hi") else "du ") + name  # "du hongrois": its h is aspirated
  return name


def say_city(v: str, lang: str, form: str) -> str:
  name = _locale(lang).time_zones.get(v, {}).get("city") or v.split("/")[-1].replace("_", " ")
  if lang == "fr" and form == "from":
    return ("d'" if _vowel(name) or name == "Helsinki" else "de ") + name
  return name


def _vowel(name: str) -> bool:
  return name[0].lower() in "aeiouâéèêîôû"


def draw_some(names: list[str], r: random.Random) -> tuple[tuple[str, ...], str]:
  return tuple(r.sample(names, r.choice((1, 2, 2, 3, 3, 4)))), r.choice(("standard", "standard", "or"))


def say_some(say: Callable, v, lang: str, form: str) -> str:
  names, style = v
  said = [say(n, lang, "") for n in names]
  return lists.format_list(said, "standard" if form == "and" else style, locale=_locale(lang))


# ---- nouns that are counted: (gender in French, plural by language)

NOUNS = (
  ("f", dict(en="pages", fr="pages", de="Seiten", it="pagine", nl="bladzijden")),
  ("m", dict(en="books", fr="livres", de="Bücher", it="libri", nl="boeken")),
  ("f", dict(en="houses", fr="maisons", de="Häuser", it="case", nl="huizen")),
  ("m", dict(en="trees", fr="arbres", de="Bäume", it="alberi", nl="bomen")),
  ("f", dict(en="people", fr="personnes", de="Personen", it="persone", nl="personen")),
  ("m", dict(en="tickets", fr="billets", de="Karten", it="biglietti", nl="kaartjes")),
  ("f", dict(en="letters", fr="lettres", de="Briefe", it="lettere", nl="brieven")),
  ("m", dict(en="students", fr="étudiants", de="Studenten", it="studenti", nl="studenten")),
)


def draw_things(r: random.Random) -> tuple[int, int]:
  return draw_number(r), r.randrange(len(NOUNS))


def say_things(v: tuple[int, int], lang: str, form: str) -> str:
  gender, noun = NOUNS[v[1]]
  return f"{say_number(v[0], lang, form and gender)} {noun[lang]}"


KINDS = dict(
  date=Kind(draw_date, say_date),
  span=Kind(draw_span, say_span),
  time=Kind(draw_time, say_time),
  hours=Kind(draw_hours, say_hours),
  ago=Kind(draw_ago, say_ago),
  number=Kind(draw_number, say_number),
  decimal=Kind(draw_decimal, say_number),
  rank=Kind(lambda r: r.randint(1, 60), say_number),
  percent=Kind(draw_percent, say_percent),
  money=Kind(draw_money, say_money),
  flight=Kind(functools.partial(draw_duration, SHORT[:1]), say_duration),
  stay=Kind(functools.partial(draw_duration, LONG), say_duration),
  duration=Kind(functools.partial(draw_duration, SHORT + LONG), say_duration),
  degrees=Kind(lambda r: (r.randint(-30, 45), "temperature-celsius"), say_measure),
  country=Kind(lambda r: r.choice(COUNTRIES), say_country),
  tongue=Kind(lambda r: r.choice(TONGUES), say_tongue),
  city=Kind(lambda r: r.choice(CITIES), say_city),
  countries=Kind(functools.partial(draw_some, COUNTRIES), functools.partial(say_some, say_country)),
  tongues=Kind(functools.partial(draw_some, TONGUES), functools.partial(say_some, say_tongue)),
  things=Kind(draw_things, say_things),
  **{name: Kind(functools.partial(draw_measure, u), say_measure) for name, u in UNITS.items()},
)
