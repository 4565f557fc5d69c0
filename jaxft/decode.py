"""Decodes: python -m jaxft.decode --model=FOLDER_OR_RUN --input=in.jsonl --output=out.jsonl --template="German: {en}"

Reads JSON Lines with the template's fields, or chats (`messages`) for a model with a chat template, and perhaps an `id`
(else the number of the row), writes {"id", "output"} lines: text, or the label of a classifier, the tags of words, the
value of a regression, the answer in a context (--scores: with probabilities). Run again after a kill, it does what is
missing; each id is there exactly once. Exit code 3: some rows have an "error" in place of an "output".
"""

import types

from absl import flags

from jaxft import cli


def define() -> types.SimpleNamespace:
  return types.SimpleNamespace(
    model=flags.DEFINE_string("model", None, "Hugging Face folder, Hub id, or run folder (its best checkpoint)."),
    input=flags.DEFINE_string("input", None, "JSON Lines file (or csv, tsv, parquet, txt; .gz)."),
    output=flags.DEFINE_string("output", None, "JSON Lines file to write."),
    template=flags.DEFINE_string("template", "", "Input text with {fields}; empty: that of the run, else {input}."),
    pair=flags.DEFINE_string("pair", "", "Template of the text beside it, for models that label pairs."),
    checkpoint=flags.DEFINE_string("checkpoint", "best", "Of a run folder: best, latest or a step."),
    max_new_tokens=flags.DEFINE_integer("max_new_tokens", None, "Most new tokens (unset: as the model says, or 256)."),
    beams=flags.DEFINE_integer("beams", None, "Beams; 1 is greedy."),
    length_penalty=flags.DEFINE_float("length_penalty", None, "Beam scores are divided by length ** penalty."),
    temperature=flags.DEFINE_float("temperature", None, "Above 0: sampling."),
    top_k=flags.DEFINE_integer("top_k", None, "Sampling from the k likeliest tokens."),
    top_p=flags.DEFINE_float("top_p", None, "Sampling from the likeliest tokens that hold this probability."),
    samples=flags.DEFINE_integer("samples", None, "Answers a row."),
    seed=flags.DEFINE_integer("seed", 0, "Of sampling."),
    batch=flags.DEFINE_integer("batch", 32, "Rows decoded at a time, over all devices."),
    length=flags.DEFINE_integer("inputs_length", None, "Longest input (unset: 1024), or window, in tokens."),
    too_long=flags.DEFINE_enum("too_long", "error", ["error", "truncate"], "What becomes of longer inputs."),
    dtype=flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of activations and weights."),
    scores=flags.DEFINE_bool("scores", False, "Write log-probabilities and whether the answer was cut."),
    overwrite=flags.DEFINE_bool("overwrite", False, "Replace an existing output."),
  )


if __name__ == "__main__":
  FLAGS = cli.parse(define, __doc__)  # --help and wrong flags need none of the imports below, which take seconds

from jaxft import cluster, decoding, display, observe, programs
from jaxft.errors import InputError
from jaxft.infer import batch_decode


def decode(
  model: str,
  input: str,
  output: str,
  *,
  template: str = "",
  pair: str = "",
  checkpoint: str = "best",
  seed: int = 0,
  batch: int = 32,
  inputs_length: int | None = None,
  too_long: str = "error",
  dtype: str = "auto",
  scores: bool = False,
  overwrite: bool = False,
  **generation,
) -> batch_decode.Report:
  """Decodes every row of `input` with `model` into `output`; `generation` are fields of infer.options.Options (None:
  not given), for models that write text; inputs_length 0: no limit.
  """
  cluster.join()
  of = decoding.load(model, checkpoint, dtype)
  if pair and not template:
    raise InputError("decode: --pair is the template of a second text; give that of the first, --template, too.")
  of = of._replace(templates=[(template, pair)], chat=None) if template else of
  kind, how = of.model.skeleton.kind, decoding.make(of, batch, inputs_length, generation)
  said = " or ".join(" and ".join(repr(x) for x in t if x) for t in of.templates)
  observe.log.info("Decoding %s with %s, template %s, %s.", input, model, said, how.told)
  report = batch_decode.decode(
    how.worker, of.params, decoding.read(input, kind), output, render=how.render, seed=seed, inputs_length=how.limit,
    too_long=too_long, scores=scores, overwrite=overwrite, progress=display.Bar("decode"),
    about=dict(model=model, checkpoint=checkpoint, template=of.templates, strip=of.fix.strip, unicode=of.fix.unicode,
               dtype=of.model.skeleton.dtype.name, **(dict(chat=of.chat.text) if of.chat else {})))  # fmt: skip
  cut = f", {report.cut} cut by the limit of {how.told.length} tokens" if kind == "lm" else ""
  observe.log.info(
    "%d rows in %.1f s (%d done before), %d errors%s: %s", report.rows, report.seconds, report.resumed, report.errors,
    cut, output)  # fmt: skip
  return report


def main(f: types.SimpleNamespace) -> int:
  if not (f.model.value and f.input.value and f.output.value):
    raise InputError("--model, --input and --output are needed; see --help.")
  observe.setup_logging(None)
  programs.keep()
  return decode(
    f.model.value,
    f.input.value,
    f.output.value,
    template=f.template.value,
    pair=f.pair.value,
    checkpoint=f.checkpoint.value,
    seed=f.seed.value,
    batch=f.batch.value,
    inputs_length=f.length.value,
    too_long=f.too_long.value,
    dtype=f.dtype.value,
    scores=f.scores.value,
    overwrite=f.overwrite.value,
    length=f.max_new_tokens.value,
    beams=f.beams.value,
    length_penalty=f.length_penalty.value,
    temperature=f.temperature.value,
    top_k=f.top_k.value,
    top_p=f.top_p.value,
    samples=f.samples.value,
  ).code


if __name__ == "__main__":
  cli.run(main, FLAGS)
