"""The sentences of the built-in data: (kind, language -> template).

A slot is `{kind}`, `{kind:form}` or `{kind_2:form}`: the part before `_` names its kind in `phrases.KINDS`, the whole
name its value, the form how it is said. Several English templates are habits that mean the same. A sentence without a
language is not made in it, because it needs a grammar that is not in `phrases`.
"""

import re

TABLE = (
  (
    "date",
    dict(
      en=["{date:full}", "{date:us}"],
      fr="{date:full}",
      de="{date:full}",
      es="{date:full}",
      it="{date:full}",
      nl="{date:full}",
    ),
  ),
  (
    "date",
    dict(
      en=["{date:long}", "{date:long_us}", "{date:iso}"],
      fr="{date:long}",
      de="{date:long}",
      es="{date:long}",
      it="{date:long}",
      nl="{date:long}",
    ),
  ),
  (
    "date",
    dict(
      en=["{date:full} at {time}", "{date:us} at {time}"],
      fr="{date:full} à {time}",
      de="{date:full} um {time} Uhr",
      es="{date:full} a las {time}",
      it="{date:full} alle {time}",
      nl="{date:full} om {time} uur",
    ),
  ),
  (
    "date",
    dict(
      en="The meeting is on {date:day} at {time}.",
      fr="La réunion est le {date:day} à {time}.",
      de="Die Besprechung ist am {date:day} um {time} Uhr.",
      es="La reunión es el {date:day} a las {time}.",
      it="La riunione è {date:day} alle {time}.",
      nl="De vergadering is op {date:day} om {time} uur.",
    ),
  ),
  (
    "date",
    dict(
      en=["She was born on {date:long}.", "She was born on {date:long_us}."],
      fr="Elle est née le {date:long}.",
      de="Sie wurde am {date:long} geboren.",
      es="Nació el {date:long}.",
      it="È nata il {date:long}.",
      nl="Ze is geboren op {date:long}.",
    ),
  ),
  (
    "date",
    dict(
      en="The museum in {city} is closed in {date:month}.",
      fr="Le musée {city:from} est fermé en {date:month}.",
      de="Das Museum in {city} ist im {date:month} geschlossen.",
      es="El museo de {city} está cerrado en {date:month}.",
      it="Il museo di {city} è chiuso nel {date:month}.",
      nl="Het museum in {city} is gesloten in {date:month}.",
    ),
  ),
  (
    "span",
    dict(
      en="from {span:from number} to {span:to long}",
      fr="du {span:from number} au {span:to long}",
      de="vom {span:from number}. bis {span:to long}",
      es="del {span:from number} al {span:to long}",
      nl="van {span:from number} tot {span:to long}",
    ),
  ),
  (
    "time",
    dict(
      en="The train to {city} leaves at {time}.",
      fr="Le train pour {city} part à {time}.",
      de="Der Zug nach {city} fährt um {time} Uhr ab.",
      es="El tren a {city} sale a las {time}.",
      it="Il treno per {city} parte alle {time}.",
      nl="De trein naar {city} vertrekt om {time} uur.",
    ),
  ),
  (
    "time",
    dict(
      en="Open every {date:weekday} from {hours:from} to {hours:to}",
      fr="Ouvert le {date:weekday} de {hours:from} à {hours:to}",
      de="Geöffnet am {date:weekday} von {hours:from} bis {hours:to} Uhr",
      es="Abierto cada {date:weekday} de {hours:from} a {hours:to}",
      it="Aperto ogni {date:weekday} dalle {hours:from} alle {hours:to}",
      nl="Elke {date:weekday} open van {hours:from} tot {hours:to} uur",
    ),
  ),
  (
    "number",
    dict(en="{number:w}", fr="{number:w}", de="{number:w}", es="{number:w}", it="{number:w}", nl="{number:w}"),
  ),
  ("number", dict(en="{decimal}", fr="{decimal}", de="{decimal}", es="{decimal}", it="{decimal}", nl="{decimal}")),
  (
    "number",
    dict(
      en="{number} in words",
      fr="{number:w} en toutes lettres",
      de="{number:w} in Worten",
      es="{number:w} en letras",
      it="{number:w} in lettere",
      nl="{number:w} in letters",
    ),
  ),
  (
    "number",
    dict(
      en="{number:w} in figures",
      fr="{number} en chiffres",
      de="{number} in Ziffern",
      es="{number} en cifras",
      it="{number} in cifre",
      nl="{number} in cijfers",
    ),
  ),
  ("count", dict(en="{things:w}", fr="{things:w}", de="{things:w}", it="{things:w}", nl="{things:w}")),
  (
    "count",
    dict(
      en="There are {things} in {city}.",
      fr="Il y a {things} à {city}.",
      de="Es gibt {things} in {city}.",
      it="Ci sono {things} a {city}.",
      nl="Er zijn {things} in {city}.",
    ),
  ),
  (
    "rank",
    dict(
      en="the {rank:th} chapter, {date:month}",
      fr="le {rank:th} chapitre, {date:month}",
      de="das {rank:th} Kapitel, {date:month}",
      es="el capítulo {rank:th}, {date:month}",
      it="il {rank:th} capitolo, {date:month}",
      nl="het {rank:th} hoofdstuk, {date:month}",
    ),
  ),
  (
    "rank",
    dict(
      en="He lives in {city}, on the {rank:th} floor.",
      fr="Il habite à {city}, au {rank:th} étage.",
      it="Abita a {city}, al piano {rank}.",
      es="Vive en {city}, en el piso {rank}.",
    ),
  ),
  (
    "percent",
    dict(
      en="Prices rose by {percent} in {date:month}.",
      fr="Les prix ont augmenté de {percent} en {date:month}.",
      de="Die Preise stiegen im {date:month} um {percent}.",
      es="Los precios subieron un {percent} en {date:month}.",
      nl="De prijzen stegen in {date:month} met {percent}.",
    ),
  ),
  (
    "percent",
    dict(
      en="{percent} of the answers were wrong.",
      fr="{percent} des réponses étaient fausses.",
      de="{percent} der Antworten waren falsch.",
      es="El {percent} de las respuestas eran incorrectas.",
      nl="{percent} van de antwoorden was fout.",
    ),
  ),
  (
    "unit",
    dict(
      en="The distance is {length}.",
      fr="La distance est de {length}.",
      de="Die Entfernung beträgt {length}.",
      es="La distancia es de {length}.",
      it="La distanza è di {length}.",
      nl="De afstand is {length}.",
    ),
  ),
  (
    "unit",
    dict(
      en="The package weighs {mass}.",
      fr="Le colis pèse {mass}.",
      de="Das Paket wiegt {mass}.",
      es="El paquete pesa {mass}.",
      it="Il pacco pesa {mass}.",
      nl="Het pakket weegt {mass}.",
    ),
  ),
  (
    "unit",
    dict(
      en="{mass} of flour and {volume} of water",
      fr="{mass} de farine et {volume} d'eau",
      de="{mass} Mehl und {volume} Wasser",
      es="{mass} de harina y {volume} de agua",
      it="{mass} di farina e {volume} di acqua",
      nl="{mass} bloem en {volume} water",
    ),
  ),
  (
    "unit",
    dict(
      en="The surface is {area}, or {area_2}.",
      fr="La surface est de {area}, ou {area_2}.",
      de="Die Fläche beträgt {area} oder {area_2}.",
      es="La superficie es de {area}, o {area_2}.",
      nl="De oppervlakte is {area}, of {area_2}.",
    ),
  ),
  (
    "unit",
    dict(
      en="{energy} and {speed}",
      fr="{energy} et {speed}",
      de="{energy} und {speed}",
      es="{energy} y {speed}",
      it="{energy} e {speed}",
      nl="{energy} en {speed}",
    ),
  ),
  (
    "unit",
    dict(
      en="In {city} it is {degrees:short}.",
      fr="À {city}, il fait {degrees:short}.",
      de="In {city} sind es {degrees:short}.",
      es="En {city} hay {degrees:short}.",
      it="A {city} ci sono {degrees:short}.",
      nl="In {city} is het {degrees:short}.",
    ),
  ),
  (
    "duration",
    dict(
      en="The trip takes {duration}.",
      fr="Le voyage dure {duration}.",
      de="Die Reise dauert {duration}.",
      es="El viaje dura {duration}.",
      it="Il viaggio dura {duration}.",
      nl="De reis duurt {duration}.",
    ),
  ),
  (
    "duration",
    dict(
      en="{duration} after {date:long}",
      fr="{duration} après le {date:long}",
      de="{duration} nach dem {date:long}",
      es="{duration} después del {date:long}",
      it="{duration} dopo il {date:long}",
      nl="{duration} na {date:long}",
    ),
  ),
  (
    "money",
    dict(
      en="The ticket to {city} costs {money}.",
      fr="Le billet pour {city} coûte {money}.",
      de="Die Fahrkarte nach {city} kostet {money}.",
      es="El billete a {city} cuesta {money}.",
      it="Il biglietto per {city} costa {money}.",
      nl="Het kaartje naar {city} kost {money}.",
    ),
  ),
  (
    "money",
    dict(
      en="{money} is {money_2:sign}.",
      fr="{money} font {money_2:sign}.",
      de="{money} sind {money_2:sign}.",
      es="{money} son {money_2:sign}.",
      it="{money} sono {money_2:sign}.",
      nl="{money} is {money_2:sign}.",
    ),
  ),
  (
    "ago",
    dict(
      en="The train to {city} left {ago:ago}.",
      fr="Le train pour {city} est parti {ago:ago}.",
      de="Der Zug nach {city} ist {ago:ago} abgefahren.",
      es="El tren a {city} salió {ago:ago}.",
      it="Il treno per {city} è partito {ago:ago}.",
      nl="De trein naar {city} is {ago:ago} vertrokken.",
    ),
  ),
  (
    "ago",
    dict(
      en="The shop opens {ago:in}, at {time}.",
      fr="Le magasin ouvre {ago:in}, à {time}.",
      de="Das Geschäft öffnet {ago:in} um {time} Uhr.",
      es="La tienda abre {ago:in}, a las {time}.",
      it="Il negozio apre {ago:in}, alle {time}.",
      nl="De winkel opent {ago:in}, om {time} uur.",
    ),
  ),
  (
    "country",
    dict(en="{countries}", fr="{countries}", de="{countries}", es="{countries}", it="{countries}", nl="{countries}"),
  ),
  (
    "country",
    dict(
      en="He worked in {country} for {stay}.",
      fr="Il a travaillé {country:in} pendant {stay}.",
      es="Trabajó en {country} durante {stay}.",
    ),
  ),
  (
    "language",
    dict(
      en="She speaks {tongues:and}.",
      fr="Elle parle {tongues:and}.",
      de="Sie spricht {tongues:and}.",
      es="Habla {tongues:and}.",
      it="Parla {tongues:and}.",
      nl="Ze spreekt {tongues:and}.",
    ),
  ),
  (
    "language",
    dict(
      en="translated from {tongue} into {tongue_2}, {things}",
      fr="traduit {tongue:from} en {tongue_2}, {things}",
      nl="vertaald uit het {tongue} in het {tongue_2}, {things}",
    ),
  ),
  (
    "city",
    dict(
      en="The flight from {city} to {city_2} takes {flight}.",
      fr="Le vol {city:from} à {city_2} dure {flight}.",
      de="Der Flug von {city} nach {city_2} dauert {flight}.",
      es="El vuelo de {city} a {city_2} dura {flight}.",
      it="Il volo da {city} a {city_2} dura {flight}.",
      nl="De vlucht van {city} naar {city_2} duurt {flight}.",
    ),
  ),
)


def _slots(templates: dict) -> tuple[str, ...]:
  """Returns the slots of a sentence in a fixed order; English has them all."""
  return tuple(sorted(set(re.findall(r"{(\w+)", str(templates["en"])))))


SENTENCES = [(kind, _slots(templates), templates) for kind, templates in TABLE]
