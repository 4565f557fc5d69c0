"""Marian, the OPUS-MT models (Tiedemann and Thottingal 2020): config.json and names on the Hub.

Only models with one vocabulary for both sides. Positions are sines, as those of Pegasus.
"""

from jaxft.families import bart, fields, pegasus
from jaxft.families.family import Family

SHAPE = dict(pre=False, norm=False, sinusoidal=True)

FIELDS = bart.given(58100, 58100, None, 0, **SHAPE) | dict(
  decoder_vocab_size=fields.same("vocab_size"), share_encoder_decoder_embeddings=fields.only(True)
)

FAMILY = Family(
  FIELDS,
  lambda c: bart.build(c, **SHAPE),
  bart.rules,
  bart.language("MarianMTModel"),
  default="lm",
  settle=pegasus.settle,
)
