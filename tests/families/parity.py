"""A family beside transformers: tiny random models through a folder, logits, loss, gradients, generation, export.

torch and transformers' models are imported in functions only. Weights are large (deviation 0.2, biases 0.1), so that
errors show.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import hub, trees
from jaxft.families import registry
from jaxft.infer import generate, options, sampling
from tests.families.reference import FAST

HOW = dict(dtype="float32", params_dtype="float32", remat="none", unroll=1, dropout=None)
LENGTHS, TARGETS = (23, 9, 2), (19, 4, 11)  # of the rows
LABELS = ("one", "two", "three")
SAVED = {  # parameters that transformers 5 saves by another name
  ("gpt_neox", "lm_head.weight"): "embed_out.weight",
  ("xlm-roberta", "lm_head.decoder.weight"): "roberta.embeddings.word_embeddings.weight",  # tied; built before it
}
AUTO = dict(
  lm="AutoModelForCausalLM",
  seq2seq="AutoModelForSeq2SeqLM",
  mlm="AutoModelForMaskedLM",
  classify="AutoModelForSequenceClassification",
  tag="AutoModelForTokenClassification",
  qa="AutoModelForQuestionAnswering",
  mlm_nsp="AutoModelForPreTraining",
  base="AutoModel",
)


def torch_model(config: dict, kind: str, seed: int = 0):
  """Returns the model of a config.json with a head of `kind` in transformers, in evaluation mode, drawn at random."""
  import torch
  import transformers

  given = dict(config)
  c = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
  if kind in registry.LABELLED:
    c.id2label = dict(enumerate(LABELS))
    c.label2id = {n: i for i, n in enumerate(LABELS)}
  c._attn_implementation = "eager"
  auto = "seq2seq" if kind == "lm" and c.is_encoder_decoder else kind
  model = getattr(transformers, AUTO[auto]).from_config(c)
  rng = np.random.RandomState(seed)
  with torch.no_grad():
    drawn = {n: p for n, p in model.named_parameters() if p.requires_grad}  # not Pegasus' tables of sines
    drawn |= {n: b for n, b in model.named_buffers() if n == "final_logits_bias"}
    for name, p in sorted(drawn.items()):
      std = 0.1 if name.endswith("bias") else 0.2
      centre = 1.0 if p.ndim == 1 and name.endswith("weight") and not _around_zero(model) else 0.0
      p.copy_(torch.tensor(centre + std * rng.standard_normal(tuple(p.shape))))
  return model.eval()


def _around_zero(model) -> bool:
  """Says whether norms store scale - 1."""
  return type(model).__name__.startswith("Gemma")


def batch(kind: str, c: dict, seed: int = 7) -> dict[str, np.ndarray]:
  """Returns rows of different lengths with padding, in the layout of `kind`."""
  rng, vocab = np.random.default_rng(seed), c["vocab_size"]
  inside = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  out = dict(
    inputs=np.where(inside, rng.integers(3, vocab, inside.shape), c.get("pad_token_id") or 0).astype(np.int32),
    input_segments=inside.astype(np.int32),
  )
  if kind == "seq2seq":
    targets = np.arange(max(TARGETS)) < np.array(TARGETS)[:, None]
    drawn = rng.integers(3, vocab, targets.shape)
    out["targets"] = np.where(targets, drawn, c.get("pad_token_id") or 0).astype(np.int32)
    out["target_segments"] = targets.astype(np.int32)
    out["weights"] = targets.astype(np.float32)
  elif kind in ("lm", "mlm", "mlm_nsp", "tag"):
    weights = inside & (rng.random(inside.shape) < 0.7)
    if kind == "lm":
      weights[:, 0] = False
      weights[2] = inside[2] & (np.arange(inside.shape[1]) > 0)
    out["weights"] = weights.astype(np.float32)
    if kind != "lm":
      out["targets"] = rng.integers(0, len(LABELS) if kind == "tag" else vocab, inside.shape).astype(np.int32)
  if kind == "classify" and registry.sort(c) == "encoder-decoder":  # which take the state at the end token
    out["inputs"][np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = c["eos_token_id"]
  if kind in ("classify", "mlm_nsp"):
    out["labels"] = rng.integers(0, 2, (len(LENGTHS), 1)).astype(np.int32)
    out["label_weights"] = np.ones((len(LENGTHS), 1), np.float32)
  if kind == "qa":
    out["starts"] = np.array([[3], [2], [0]], np.int32)
    out["ends"] = np.array([[7], [2], [1]], np.int32)
    out["label_weights"] = np.ones((len(LENGTHS), 1), np.float32)
  if c.get("type_vocab_size", 0) > 1:
    out["input_types"] = ((np.arange(inside.shape[1]) > 4) & inside).astype(np.int32)
  return out


def theirs(model, kind: str, rows: dict) -> tuple[list[np.ndarray], float, dict]:
  """Returns (outputs at real places, loss, gradients by name) of transformers."""
  import torch

  as_torch = lambda x: torch.tensor(np.asarray(x)).long()
  labels = lambda name: as_torch(np.where(rows["weights"] > 0, rows[name], -100))
  given = dict(input_ids=as_torch(rows["inputs"]), attention_mask=as_torch(rows["input_segments"]))
  if "input_types" in rows:
    given["token_type_ids"] = as_torch(rows["input_types"])
  if kind == "lm":
    given["labels"] = labels("inputs")
  elif kind in ("seq2seq", "mlm", "mlm_nsp", "tag"):
    given["labels"] = labels("targets")
  elif kind == "classify":
    given["labels"] = as_torch(rows["labels"][:, 0])
  elif kind == "qa":
    given |= dict(start_positions=as_torch(rows["starts"][:, 0]), end_positions=as_torch(rows["ends"][:, 0]))
  if kind == "mlm_nsp":
    given["next_sentence_label"] = as_torch(rows["labels"][:, 0])
  out = model(**given)
  real = rows["target_segments" if kind == "seq2seq" else "input_segments"] > 0
  if kind == "base":
    states = [out.last_hidden_state[torch.tensor(real)]] + ([out.pooler_output] if "pooler_output" in out else [])
    out.loss = sum((x * x).mean() for x in states)
  model.zero_grad()
  out.loss.backward()
  saved = lambda name: SAVED.get((model.config.model_type, name), name)
  grads = {saved(n): p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
  if kind == "base":
    outputs = [x.detach().numpy() for x in states]
  elif kind == "qa":
    outputs = [out.start_logits.detach().numpy()[real], out.end_logits.detach().numpy()[real]]
  elif kind == "mlm_nsp":
    outputs = [out.prediction_logits.detach().numpy()[real], out.seq_relationship_logits.detach().numpy()]
  else:
    outputs = [out.logits.detach().numpy() if kind == "classify" else out.logits.detach().numpy()[real]]
  return outputs, float(out.loss.detach()), grads


def _mean(logits, labels, weights) -> jax.Array:
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
  return -jnp.where(weights > 0, picked * weights, 0).sum() / weights.sum()


def loss_fn(skeleton, params, kind: str, rows: dict):
  """Returns (loss as transformers computes it, outputs) by the plainest means."""
  model = skeleton.bind(params)
  real = rows["target_segments" if kind == "seq2seq" else "input_segments"]
  if kind == "classify":
    logits = model.classify(rows, None)
    return _mean(logits, rows["labels"], rows["label_weights"]), [logits[:, 0]]
  logits = model.tag(rows, None) if kind in ("tag", "qa") else None
  if kind == "qa":
    masked = jnp.where(real[..., None] > 0, logits, -1e30)  # transformers lets padding take part: see `qa_rows`
    one = lambda i, name: _mean(masked[..., i][:, None], rows[name], rows["label_weights"])
    return (one(0, "starts") + one(1, "ends")) / 2, [logits[..., 0], logits[..., 1]]
  if kind == "tag":
    return _mean(logits, rows["targets"], rows["weights"]), [logits]
  hidden = model.hidden(rows, None)
  if kind == "base":
    states = [hidden] + ([model.classified(hidden, real, 1, None)[:, 0]] if skeleton.spec.heads[0][1].dense else [])
    size = jnp.sum(real > 0) * hidden.shape[-1]
    loss = jnp.sum(jnp.square(hidden) * (real > 0)[..., None]) / size
    return loss + sum(jnp.mean(jnp.square(x)) for x in states[1:]), states
  logits = model.logits(hidden)
  if kind == "lm":
    return _mean(logits[:, :-1], rows["inputs"][:, 1:], rows["weights"][:, 1:]), [logits]
  loss, outputs = _mean(logits, rows["targets"], rows["weights"]), [logits]
  if kind == "mlm_nsp":
    nsp = model.classified(hidden, rows["input_segments"], 1, None, "nsp")
    loss, outputs = loss + _mean(nsp, rows["labels"], rows["label_weights"]), [logits, nsp[:, 0]]
  return loss, outputs


def load(folder, want=None):
  """Returns (skeleton, params) of a folder, all of whose tensors must be there."""
  skeleton = registry.skeleton(registry.read_config(folder), want=want, **HOW)
  more = dict(prefix=skeleton.prefix, renames=skeleton.renames)
  return skeleton, hub.load(folder, skeleton.rules, skeleton.shapes, None, **more)


def ours(folder, kind: str, rows: dict) -> tuple[list[np.ndarray], float, dict]:
  """Returns (outputs at real places, loss, gradients by the Hub's names) from a model folder."""
  skeleton, params = load(folder)
  step = jax.value_and_grad(lambda p, rows: loss_fn(skeleton, p, kind, rows), has_aux=True)
  (loss, outputs), grads = jax.jit(step, compiler_options=FAST)(params, rows)
  real = rows["target_segments" if kind == "seq2seq" else "input_segments"] > 0
  outputs = [np.asarray(x) if x.shape[:2] != real.shape else np.asarray(x)[real] for x in outputs]
  return outputs, float(loss), by_hub_names(skeleton, jax.device_get(grads))


def by_hub_names(skeleton, tree) -> dict[str, np.ndarray]:
  from jaxft import names

  flat = trees.flatten(tree)
  out = {}
  for e in names.entries(skeleton.rules, flat):
    leaves = [(r, flat[r.ours]) for r in e.rules]
    out[e.name] = e.join([r.to_hub(np.asarray(x[e.layer] if r.stacked else x), x.shape) for r, x in leaves])
  return out


def compare(found, wanted, unused: tuple[str, ...] = ()) -> None:
  """Asserts that outputs, loss and gradients agree at 1e-5; `unused` are tensors that are not trained there."""
  for a, b in zip(found[0], wanted[0], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert abs(found[1] - wanted[1]) < 1e-5, (found[1], wanted[1])
  assert set(wanted[2]) <= set(found[2]), set(wanted[2]) - set(found[2])
  for name, g in found[2].items():
    want = wanted[2].get(name)
    if want is None:
      assert name in unused or not np.any(g), f"{name} has a gradient here and none there"
    else:
      np.testing.assert_allclose(g, want, rtol=1e-5, atol=1e-5, err_msg=name)
  assert max(np.abs(g).max() for g in wanted[2].values()) > 0.01  # not a comparison of zeros


def check(config: dict, kind: str, folder) -> None:
  """The whole parity of one family and head, at 1e-5 in float32."""
  model = torch_model(config, kind)
  model.save_pretrained(folder)
  layout = "seq2seq" if kind == "lm" and model.config.is_encoder_decoder else kind
  rows = batch(layout, config)
  if kind == "qa":
    rows = _one_length(rows)
  compare(ours(folder, layout, rows), theirs(model, layout, rows))


def _one_length(rows: dict) -> dict:
  """transformers' span loss runs over the padding too; rows without any have no such difference."""
  return {k: v[:1] for k, v in rows.items()}


def check_export(config: dict, kind: str, folder, made) -> None:
  """A model through jaxft comes back bit for bit, with a config.json that means the same to transformers."""
  model = torch_model(config, kind)
  model.save_pretrained(folder)
  skeleton, params = load(folder)
  more = dict(dtype="float32", shard_gb=1.0, generation_config=skeleton.generation_config or None, tokenizer_from=None)
  hub.save(made, skeleton.rules, params, skeleton.json, **more)
  again, problems = type(model).from_pretrained(made, output_loading_info=True)
  fixed = {n for n, p in model.named_parameters() if not p.requires_grad}  # which transformers computes where they lack
  assert problems["missing_keys"] <= fixed, problems
  assert not problems["unexpected_keys"] and not problems["mismatched_keys"], problems
  for name, p in model.state_dict().items():
    np.testing.assert_array_equal(again.state_dict()[name].numpy(), p.numpy(), err_msg=name)
  left, right = model.config.to_dict(), again.config.to_dict()
  drop = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
  assert {k: v for k, v in left.items() if k not in drop} == {k: v for k, v in right.items() if k not in drop}
  assert json.loads((made / "config.json").read_text())["architectures"] == [type(model).__name__]


WAYS = (
  dict(),
  dict(beams=3, samples=2, length_penalty=1.3),
  dict(no_repeat_ngram=2, repetition_penalty=1.4),
  dict(beams=2, no_repeat_ngram=3, min_length=4),
)
THEIRS = dict(
  beams="num_beams", samples="num_return_sequences", no_repeat_ngram="no_repeat_ngram_size",
  min_length="min_new_tokens", length_penalty="length_penalty", repetition_penalty="repetition_penalty")  # fmt: skip


def check_generation(config: dict, folder, way: dict, length: int = 9) -> None:
  """Greedy and beam output equal transformers' generate, for prompts of several lengths in one batch."""
  import torch

  model = torch_model(config, "lm")
  model.save_pretrained(folder)
  skeleton, params = load(folder)
  rows = batch("seq2seq" if skeleton.encoder_decoder else "lm", config)
  o = options.read(skeleton.generation, skeleton.generation_config, length=length, temperature=0.0, **way)
  run = jax.jit(
    lambda p, i, s, k: generate.generate(skeleton.bind(p), i, s, k, o), compiler_options=FAST
  )
  keys = sampling.row_keys(0, range(len(LENGTHS)))
  out = jax.device_get(run(params, rows["inputs"], rows["input_segments"], keys))
  for b, n in enumerate(LENGTHS):
    ids = torch.tensor(rows["inputs"][b : b + 1, :n]).long()
    given = {THEIRS[k]: v for k, v in way.items()}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                          pad_token_id=o.pad, **given).numpy()  # fmt: skip
    for r in range(o.samples):
      want = made[r, 1 if skeleton.encoder_decoder else n :].tolist()
      got = out.tokens_BRL[b, r, : out.lengths_BR[b, r]].tolist()
      assert got == want[: len(got)] and not set(want[len(got) :]) - {o.pad, *o.eos}, (b, r, got, want)
