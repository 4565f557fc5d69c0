"""What a generation run is told: lengths, strategy, special tokens; read from generation_config.json and the caller.

Every field of a generation_config.json that can change an output is read here or refused; nothing is dropped in
silence.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxft.errors import InputError

log = logging.getLogger("jaxft")

FILE = "generation_config.json (or config.json, where there is none)"  # what messages blame

# Fields that change the output and that this code does not compute, with the value that switches each off (so does an
# empty list or object).
REFUSED = dict(
  sequence_bias=None,
  guidance_scale=1.0,
  encoder_repetition_penalty=1.0,
  encoder_no_repeat_ngram_size=0,
  exponential_decay_length_penalty=None,
  remove_invalid_values=False,
  renormalize_logits=False,
  watermarking_config=None,
  num_beam_groups=1,
  diversity_penalty=0.0,
  penalty_alpha=None,
  constraints=None,
  force_words_ids=None,
  max_time=None,
  stop_strings=None,
  token_healing=False,
  dola_layers=None,
)
REFUSED_IN_SAMPLING = dict(min_p=None, top_h=None, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0)

# Fields that are read, and fields that say how to compute or what to return but not which tokens come out.
KINDS = (  # (what a field must be, its test, the fields)
  (
    "a whole number",
    lambda v: type(v) is int,
    "max_length max_new_tokens min_length min_new_tokens num_beams top_k num_return_sequences pad_token_id "
    "decoder_start_token_id forced_bos_token_id no_repeat_ngram_size".split(),
  ),
  ("a number", lambda v: type(v) in (int, float), "length_penalty temperature top_p repetition_penalty".split()),
  (
    "a whole number or a list of them",
    lambda v: type(v) is int or (isinstance(v, (list, tuple)) and all(type(i) is int for i in v)),
    "eos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens".split(),
  ),
  (
    "a list of lists of token ids",
    lambda v: isinstance(v, list) and all(isinstance(w, list) and all(type(i) is int for i in w) for w in v),
    ["bad_words_ids"],
  ),
)
READ = frozenset(("early_stopping", "do_sample", *(k for _, _, names in KINDS for k in names)))
HARMLESS = frozenset(
  (
    "bos_token_id transformers_version _from_model_config use_cache cache_implementation cache_config max_cache_len "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate return_legacy_cache "
    "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
    "assistant_early_exit assistant_ensemble_weight assistant_lookbehind target_lookbehind prompt_lookup_num_tokens "
    "max_matching_ngram_size speculation_type compile_config disable_compile continuous_batching_config low_memory "
    "prefill_chunk_size use_mtp"
  ).split()
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How to generate. Token counts are of new tokens, without the decoder's start token, with the end token.

  length: most new tokens; min_length: the end token is barred before so many. beams: 1 is greedy, or sampling where
  temperature > 0. length_penalty: scores are summed log-probabilities / length ** penalty. early_stopping: False, True
  or "never", as in transformers. samples: sequences returned a row (beams: at most `beams`). top_k 0 and top_p 1 are
  off.
  """

  length: int
  eos: tuple[int, ...]
  pad: int
  start: int | None  # the decoder's first token; None: a decoder, which goes on from its prompt
  beams: int = 1
  samples: int = 1
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_length: int = 0
  forced_bos: int | None = None
  forced_eos: tuple[int, ...] = ()
  suppress: tuple[int, ...] = ()
  begin_suppress: tuple[int, ...] = ()
  no_repeat_ngram: int = 0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    problems = [
      text
      for wrong, text in (
        (self.length < 1, f"max_new_tokens is {self.length}; it must be at least 1"),
        (self.beams < 1, f"beams is {self.beams}; it must be at least 1"),
        (self.samples < 1, f"num_return_sequences is {self.samples}; it must be at least 1"),
        (not self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 (greedy) or more"),
        (self.top_k < 0, f"top_k is {self.top_k}; it must be 0 (off) or more"),
        (not 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)"),
        (not 0 <= self.min_length <= self.length, f"the least length {self.min_length} is not within 0..{self.length}"),
        (not self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0"),
        (self.no_repeat_ngram < 0, f"no_repeat_ngram_size is {self.no_repeat_ngram}; it must be 0 (off) or more"),
        (
          self.early_stopping not in (False, True, "never"),
          f"early_stopping is {self.early_stopping!r}; it is False, True or 'never'",
        ),
        (
          self.beams > 1 and self.temperature > 0,
          "beams together with a temperature (beam sampling) are not supported; "
          "set temperature=0 for beam search or beams=1 for sampling",
        ),
        (
          self.beams > 1 and self.samples > self.beams,
          f"num_return_sequences {self.samples} is more than the {self.beams} beams",
        ),
        (
          self.beams == 1 and self.temperature == 0 and self.samples > 1,
          f"num_return_sequences is {self.samples}, but greedy search knows one answer; set beams or a temperature",
        ),
        (
          self.temperature == 0 and (self.top_k > 0 or self.top_p < 1),
          "top_k and top_p act on sampling only; give a temperature above 0 with them",
        ),
        (not self.eos, "the model names no end token (eos_token_id)"),
        (
          self.forced_bos in self.suppress,
          f"forced_bos_token_id {self.forced_bos} is among suppress_tokens and bad_words_ids: no first token",
        ),
        (
          self.forced_eos and set(self.forced_eos) <= set(self.suppress),
          f"forced_eos_token_id {list(self.forced_eos)} is among suppress_tokens and bad_words_ids: no last token",
        ),
      )
      if wrong
    ]
    if problems:
      raise InputError(f"generation: {'; '.join(problems)}.")

  @property
  def width(self) -> int:
    """Sequences a row that the cache holds (the K of the cache protocol)."""
    return self.beams if self.beams > 1 else self.samples


def read(generation: Mapping[str, Any], config: Mapping[str, Any] | None, **given: Any) -> Options:
  """Returns the Options of a model: `given` first (None: not given), then its generation_config.json, then neutral.

  `generation` is Skeleton.generation (decoder_start, eos, pad); `config` the parsed generation_config.json or None.
  `given` are fields of Options. Two neutral values differ from transformers on purpose: top_k is off (there: 50), and
  there is no default length (there: 20, which cuts most answers). InputError names every field that cannot be honoured.
  """
  c = {k: v for k, v in (config or {}).items() if v is not None}
  given = {k: v for k, v in given.items() if v is not None}
  sampling = (
    given["temperature"] > 0 if "temperature" in given else bool(c.get("do_sample")) and given.get("beams", 1) == 1
  )
  check(c, sampling)
  # max_length and min_length of the file count the decoder's start token, or the whole prompt of a decoder, with which
  # they say nothing of the answer; the other two go before them.
  c = c if generation["decoder_start"] is not None else _without_totals(c)
  eos = _ids(c.get("eos_token_id", generation["eos"]))
  barred = [i for word in c.get("bad_words_ids", ()) for i in word if i not in eos]  # transformers spares the end too
  theirs = dict(
    length=c.get("max_new_tokens", c["max_length"] - 1 if "max_length" in c else None),
    min_length=max(c.get("min_new_tokens", c.get("min_length", 0) - 1), 0),
    beams=c.get("num_beams"),
    samples=c.get("num_return_sequences"),
    length_penalty=c.get("length_penalty"),
    early_stopping=c.get("early_stopping"),
    temperature=c.get("temperature", 1.0) if sampling else 0.0,
    top_k=c.get("top_k") if sampling else 0,
    top_p=c.get("top_p") if sampling else 1.0,
    eos=eos,
    pad=c.get("pad_token_id", generation["pad"]),
    start=c.get("decoder_start_token_id", generation["decoder_start"]),
    forced_bos=c.get("forced_bos_token_id"),
    forced_eos=_ids(c.get("forced_eos_token_id")),
    suppress=(*_ids(c.get("suppress_tokens")), *barred),
    begin_suppress=_ids(c.get("begin_suppress_tokens")),
    no_repeat_ngram=c.get("no_repeat_ngram_size"),
    repetition_penalty=c.get("repetition_penalty"),
  )
  both = {k: v for k, v in theirs.items() if v is not None or k == "start"} | given
  if "length" not in both:
    raise InputError(
      "generation: the model's generation_config.json gives no length; set max_new_tokens to the most new "
      "tokens an answer may have."
    )
  if "length" in given and "min_length" not in given:
    both["min_length"] = min(both["min_length"], both["length"])
  return Options(**both)


def check(config: Mapping[str, Any], sampling: bool) -> None:
  """Raises InputError for fields of a generation_config.json that change the output and are not implemented here."""
  wrong = [
    f"{k}={config[k]!r} (it is {what})"
    for what, test, names in KINDS
    for k in names
    if config.get(k) is not None and not test(config[k])
  ]
  if wrong:
    raise InputError(f"{FILE}: of a wrong type: {', '.join(wrong)}. Correct it there.")
  refused = REFUSED | (REFUSED_IN_SAMPLING if sampling else {})
  bad = [f"{k}={config[k]!r}" for k, off in refused.items() if config.get(k) not in (None, [], {}, off)]
  longer = [word for word in config.get("bad_words_ids") or () if len(word) != 1]
  bad += [f"bad_words_ids of other than one token ({', '.join(map(str, longer))})"] if longer else []
  if bad:
    raise InputError(
      f"{FILE}: {', '.join(bad)} would change the output and is not implemented; remove it "
      "from the file (the outputs will then differ from those of transformers with it)."
    )
  unknown = sorted(k for k in config if k not in READ | HARMLESS | REFUSED.keys() | REFUSED_IN_SAMPLING.keys())
  if unknown:
    log.warning("%s: %s not known here and not used", FILE, ", ".join(unknown))


def _without_totals(c: dict) -> dict:
  """Returns the fields without those that count a decoder's prompt too."""
  said = [k for k in ("max_length", "min_length") if c.get(k)]
  if said:
    log.info("%s: %s counts the prompt too and is not used; the limit of new tokens holds.", FILE, ", ".join(said))
  return {k: v for k, v in c.items() if k not in said}


def _ids(value: Any) -> tuple[int, ...]:
  if value is None:
    return ()
  return (value,) if isinstance(value, int) else tuple(value)
