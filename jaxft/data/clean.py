"""Which pairs are kept: text normalisation, length and ratio filters, exact duplicates; every drop has a reason
that is counted.
"""

import dataclasses
import hashlib
import unicodedata

from jaxft.errors import InputError, did_you_mean

FORMS = ("", "NFC", "NFKC", "NFD", "NFKD")
DUPLICATE = "exact duplicate of an earlier pair"
SURROGATE = "broken UTF-16 surrogate"


@dataclasses.dataclass(frozen=True)
class Options:
  """`strip` and `unicode` act on each field before the template; the limits count characters of the fields, not of
  the template.
  """

  strip: bool
  unicode: str  # "", NFC, NFKC, NFD, NFKD
  min_chars: int  # either side; 0 switches off, as below
  max_chars: int
  max_ratio: float  # longer side over shorter side
  dedup: bool  # of the rendered (input, target); the first is kept

  def __post_init__(self):
    if self.unicode not in FORMS:
      raise InputError(
        f"config: data.clean.unicode is {self.unicode!r}; the forms are NFC, NFKC, NFD, NFKD or "
        f"empty{did_you_mean(self.unicode, FORMS)}."
      )
    if self.max_chars and self.max_chars < self.min_chars:
      raise InputError(
        f"config: data.clean.max_chars ({self.max_chars}) is below min_chars ({self.min_chars}); nothing could be kept."
      )
    if self.max_ratio and self.max_ratio < 1:
      raise InputError(
        f"config: data.clean.max_ratio is {self.max_ratio}; it is the longer side over the shorter, so at least 1 (0: "
        "off)."
      )

  def text(self, value: str) -> str:
    """Returns one field, normalised."""
    if self.unicode:
      value = unicodedata.normalize(self.unicode, value)
    return value.strip() if self.strip else value

  def reason(self, inputs: int | None, targets: int | None) -> str:
    """Returns why a pair is dropped, or "". The two are the characters of each side's fields (None: it has no
    fields).
    """
    if targets == 0:
      return "empty target"
    if inputs == 0:
      return "empty input"
    sizes = [n for n in (inputs, targets) if n is not None]
    if self.min_chars and sizes and min(sizes) < self.min_chars:
      return f"shorter than clean.min_chars={self.min_chars}"
    if self.max_chars and sizes and max(sizes) > self.max_chars:
      return f"longer than clean.max_chars={self.max_chars}"
    if self.max_ratio and len(sizes) == 2 and max(sizes) > self.max_ratio * min(sizes):
      return f"length ratio above clean.max_ratio={self.max_ratio:g}"
    return ""


NOTHING = Options(strip=False, unicode="", min_chars=0, max_chars=0, max_ratio=0.0, dedup=False)


def utf8(value: bytes, what: str) -> str:
  """Returns the text of bytes that are UTF-8; else raises InputError about `what` (place and name)."""
  try:
    return value.decode()
  except UnicodeDecodeError as e:
    raise InputError(
      f"{what} is bytes that are not UTF-8 text ({value[:16]!r}..., byte {e.start + 1}: {e.reason}); store it as text, "
      "or name another field."
    ) from None


def digest(input: str, target: str) -> bytes:
  """Returns 16 bytes that stand for a pair in the search for duplicates (one false hit in 10^20 at 10^9 rows)."""
  h = hashlib.blake2b(input.encode("utf-8", "surrogatepass"), digest_size=16)
  h.update(b"\0" + target.encode("utf-8", "surrogatepass"))
  return h.digest()
