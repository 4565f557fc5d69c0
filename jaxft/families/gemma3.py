"""Gemma 3 without images: its text models (model_type gemma3_text), and of a gemma3 the text part.

As Gemma 2, but q and k have norms instead of a cap on the scores, and of six layers five have a window and a rope of
their own. Older files give the two ropes as rope_theta (with rope_scaling) and rope_local_base_freq, those of
transformers 5 as rope_parameters, an object for each type of layer.
"""

import dataclasses
import logging
import pathlib

from jaxft.errors import InputError
from jaxft.families import decoder, fields, gemma, ropes
from jaxft.families.family import Json
from jaxft.models import rope, single

FIELDS = dict(
  gemma.GEMMA2,
  max_position_embeddings=fields.count(131_072),
  sliding_window_pattern=fields.count(6),  # one layer of so many has no window
  _sliding_window_pattern=fields.maybe(fields.count()),  # of no effect: what transformers 5 remembers of it
  rope_local_base_freq=fields.maybe(fields.number()),
  final_logit_softcapping=gemma.above(None),
  attn_logit_softcapping=fields.only(None),
  use_bidirectional_attention=fields.only(False, None),
)
SIZES = dict(  # what transformers takes where a text_config has none
  vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8
)


def spec(c: Json) -> single.Spec:
  every, depth = c["sliding_window_pattern"], c["num_hidden_layers"]
  types = ropes.layers(c, [ropes.SLIDING if i % every else ropes.FULL for i in range(1, depth + 1)])
  more = dict(scale=c["query_pre_attn_scalar"] ** -0.5, qk_norm=decoder.rms(c, 1.0))
  return gemma.model(
    c,
    c["hidden_activation"],
    ("pre", "post"),
    more,
    windows=ropes.windows(types, c["sliding_window"]),
    ropes=_ropes(c),
    kinds=tuple(ropes.LAYERS.index(t) for t in types),
  )


def _ropes(c: Json) -> tuple[rope.Rope, rope.Rope]:
  """Returns the rope of layers that see everything and that of layers with a window."""
  given = c["rope_parameters"] or {}
  if not all(k in ropes.LAYERS and type(v) is dict for k, v in given.items()):
    raise InputError(
      f"config.json: rope_parameters is {given!r:.200}; for a gemma3_text it holds an object for each of "
      f"{' and '.join(ropes.LAYERS)}."
    )
  full, local = given.get(ropes.FULL, {}) | (c["rope_scaling"] or {}), {**c, "rope_theta": c["rope_local_base_freq"]}
  return (
    ropes.of(full, c, c["head_dim"], 1e6, partial=False),
    ropes.of(given.get(ropes.SLIDING, {}), local, c["head_dim"], 1e4, partial=False),
  )


def text_part(json: Json, folder: pathlib.Path) -> Json:
  """Returns the config.json of the text part of a gemma3; raises InputError where that has another head."""
  named = (json.get("architectures") or ["Gemma3ForConditionalGeneration"])[0]
  if named != "Gemma3ForConditionalGeneration" or type(json.get("text_config")) is not dict:
    raise InputError(
      f"{folder}: config.json describes a {named} of type gemma3, with images. jaxft takes the text part of a "
      "Gemma3ForConditionalGeneration with its text_config, or a gemma3_text."
    )
  logging.getLogger("jaxft").warning(
    "%s: a Gemma 3 for images and text, of which jaxft takes the text part; what it saves is a gemma3_text.", folder
  )
  whole = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
  outer = {k: json[k] for k in whole if json.get(k) is not None}
  own = dict(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"])
  return {**SIZES, **outer, **json["text_config"], **own}


_text = decoder.family(
  FIELDS,
  "Gemma3",
  spec,
  "lm classify",
  rules=gemma.rules,
  renames=((r"^(language_model\.model|model\.language_model)\.", "model."), (r"^language_model\.lm_head", "lm_head")),
  ignored=("lm_head.weight", *(f"{p}{n}.*" for p in ("", "model.") for n in ("vision_tower", "multi_modal_projector"))),
)
_label = dataclasses.replace(_text.heads["classify"], architecture="Gemma3TextForSequenceClassification")
TEXT = dataclasses.replace(_text, heads={**_text.heads, "classify": _label})
FAMILIES = dict(gemma3_text=TEXT, gemma3=dataclasses.replace(TEXT, settle=text_part))
