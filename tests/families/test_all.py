"""What holds for every family, over all tiny configs: defaults, fields, dropout, packing, fresh weights.

Caught by these tests: a default that is not transformers'; a field that is read and not used; a dropout that is
missing, too much, of another rate or elsewhere; positions, masks, windows, relative bias or pooling that run from one
example of a row into the next; fresh weights of another deviation. The reference is the installed transformers; tests
that need its torch models are skipped without torch.
"""

import functools
import json

import jax
import numpy as np
import pytest
import transformers
from flax import nnx

from jaxft import names, trees
from jaxft.errors import InputError
from jaxft.families import fields, registry
from jaxft.models import layers
from tests.families import parity, reference, tiny

CONFIGS = {n: c for group in list(vars(tiny).values()) if isinstance(group, dict) for n, c in group.items()
           if isinstance(c, dict) and "model_type" in c}  # fmt: skip
KINDS = list(dict.fromkeys(c["model_type"] for c in CONFIGS.values()))
PARTS = {"gemma3"}  # families that settle as another
DEPTHS = (
  "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"
)  # fmt: skip


def of(kind: str) -> list[dict]:
  """Returns the tiny configs of a family."""
  return [c for c in CONFIGS.values() if c["model_type"] == kind]


def test_every_family_has_a_tiny_config():
  assert set(KINDS) == set(registry.FAMILIES) - PARTS


def table(kind: str) -> dict[str, fields.Field]:
  return {**fields.COMMON, **registry.FAMILIES[kind].fields}


def twin(f: fields.Field) -> bool:
  return f.what.startswith("the same as")


def numbers(config: dict) -> tuple:
  """Returns all that a config.json says of the model: its numbers with every head, and the tokens of decoding."""
  chosen = registry.FAMILIES[config["model_type"]]
  own = [k for k in chosen.fields if k in registry.GENERATION]
  c = fields.read({k: v for k, v in config.items() if k not in registry.GENERATION or k in own}, chosen.fields)
  tokens = c["pad_token_id"], c["eos_token_id"], *(c[k] for k in own)
  return chosen.spec(c), [h.spec(c, 7) for h in chosen.heads.values()], tokens


def theirs(config: dict):
  given = dict(config)
  return transformers.AutoConfig.for_model(given.pop("model_type"), **given)


MUST = {  # what the config.json of a family must say beyond the defaults of transformers, which mean another model
  "deberta-v2": dict(relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=256)
}


def bare(kind: str) -> dict:
  """Returns the shortest config.json of a family, at the size that transformers has for it."""
  made = transformers.CONFIG_MAPPING[kind](**MUST.get(kind, {}))
  needed = {k: getattr(made, k) for k, f in table(kind).items() if f.default is fields.REQUIRED}
  return {"model_type": kind, **needed}


OTHER_DEFAULTS = {  # (family, field) -> why the default is another than the attribute of transformers' config
  ("qwen2", "sliding_window"): "null there as long as use_sliding_window is false, which comes to the same",
  ("qwen3", "sliding_window"): "as in qwen2",
}


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(kind):
  """Each by itself, save those that are null here and derived there; and all together: what a file without any optional
  field means, at the size that transformers has for it."""
  made, known = transformers.CONFIG_MAPPING[kind](**MUST.get(kind, {})), table(kind)
  optional = {k: f for k, f in known.items() if f.default is not fields.REQUIRED and not twin(f) and hasattr(made, k)}
  wrong = {k: (f.default, getattr(made, k)) for k, f in optional.items()
           if f.default is not None and f.default != getattr(made, k)}  # fmt: skip
  assert {(kind, k) for k in wrong} == {k for k in OTHER_DEFAULTS if k[0] == kind}, wrong
  assert numbers(bare(kind)) == numbers(json.loads(made.to_json_string()))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_means_what_transformers_makes_of_it(name):
  """transformers writes all fields, with its own defaults and under its new names; the numbers stay the same."""
  config = CONFIGS[name]
  assert numbers(json.loads(theirs(config).to_json_string())) == numbers(config)


OLD_BART = "classif_dropout extra_pos_embeddings force_bos_token_to_be_generated save_step"
NO_EFFECT = {  # fields that a family reads and that change no number of it; each says why in its FIELDS
  "gpt2": "reorder_and_upcast_attn n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels "
  "summary_first_dropout",
  "opt": "activation_dropout",
  "gpt_neox": "attention_probs_dropout_prob hidden_dropout_prob is_decoder",
  "electra": "summary_type summary_use_proj summary_activation summary_last_dropout",
  "modernbert": "max_position_embeddings layer_norm_eps position_embedding_type sparse_prediction reference_compile "
  "sparse_pred_ignore_index deterministic_flash_attn repad_logits_with_grad",
  "gemma2": "cache_implementation",
  "gemma3_text": "cache_implementation _sliding_window_pattern",
  "phi3": "max_position_embeddings original_max_position_embeddings embd_pdrop",
  **dict.fromkeys(("bart", "mbart"), OLD_BART),
  **dict.fromkeys(("pegasus", "marian"), f"classifier_dropout {OLD_BART}"),
  "t5": "dense_act_fn is_gated_act n_positions max_position_embeddings",
  "mt5": "dense_act_fn is_gated_act n_positions max_position_embeddings",
}
ANYWHERE = {"bos_token_id", "transformers.js_config"}  # of no effect in any family
WHOLE = {"partial_rotary_factor"}  # refused unless 1 in the families that turn whole heads
STATES = ({}, dict(rope_scaling=dict(type="dynamic", factor=2.0)), dict(use_sliding_window=True))  # where some matter
ACTIVATION, ANYTHING = fields.activation().what, "anything"


def others(config: dict, name: str, f: fields.Field):
  """Yields other values of a field that are of its type."""
  depth = max(config[d] for d in DEPTHS if d in config)
  rope = dict(rope_type="default", rope_theta=77.0)
  types = ("full_attention", "sliding_attention")
  pool = [True, False, 0.31, 0.6, 2.5, *range(1, 7), 8, 12, 24, 30, 48, 60, [4, 5], "tanh", "relu", "gated-silu", rope,
          {k: {**rope, "rope_theta": 78.0 + i} for i, k in enumerate(types)}, dict(type="linear", factor=2.0),
          *([types[(i + k) % 2] for i in range(depth)] for k in (0, 1)), *([k] * depth for k in types)]  # fmt: skip
  for value in pool:
    if f.test(value) and value != config.get(name, f.default):
      yield value


def matters(config: dict, name: str, f: fields.Field) -> bool:
  """Says whether some other value of a field changes the model; raises what is no InputError."""

  def read(c):
    try:
      return numbers(c)
    except InputError:
      return None

  before = read(config)
  return before is not None and any(read({**config, name: v}) not in (None, before) for v in others(config, name, f))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_changes_the_model(kind):
  """In one config at least; those that must have one value are refused otherwise, and need no effect."""
  own, least = registry.FAMILIES[kind].fields, bare(kind)
  configs = [*of(kind), *({**least, **state} for state in STATES if set(state) <= set(own))]
  free = {k: f for k, f in own.items() if not twin(f) and (f.what == ACTIVATION or not f.what.startswith("one of "))}
  idle = {k for k, f in free.items() if f.what != ANYTHING and not any(matters(c, k, f) for c in configs)}
  assert idle - ANYWHERE - WHOLE == set(NO_EFFECT.get(kind, "").split())


def shallow(config: dict) -> dict:
  """Returns the config with one layer a side."""
  types = {"layer_types": config["layer_types"][:1]} if "layer_types" in config else {}
  return {**config, **{k: 1 for k in DEPTHS if k in config}, **types}


def rated(config: dict) -> dict:
  """Returns the config with another rate, not 0, for each dropout that the family reads."""
  shares = [k for k, f in table(config["model_type"]).items() if f.what == fields.share().what]
  return {**config, **{k: 0.11 + 0.02 * i for i, k in enumerate(shares)}}


def outputs(skeleton, params, kind: str, rows: dict, key):
  """Returns what a model with a head of `kind` predicts, as training computes it."""
  model = skeleton.bind(params)
  if kind in ("classify", "tag", "qa", "mlm"):
    return getattr(model, "classify" if kind == "classify" else "tag")(rows, key)
  body, head, other = layers.keys(key, 3)
  hidden = model.hidden(rows, body)
  more = dict(mlm_nsp="nsp", base="head").get(kind)
  if more and getattr(model, more).spec.pool:
    model.classified(hidden, rows["input_segments"], 1, other, more)
  return hidden if kind == "base" else model.logits(hidden, head)


HEADS = [(kind, head) for kind in KINDS for head in registry.FAMILIES[kind].heads if head != "nsp"]


@pytest.mark.parametrize("kind,head", HEADS)
def test_dropout_stands_where_transformers_has_it(kind, head, monkeypatch):
  """The same sequence of (entries, last dimension, rate) passes through dropout."""
  torch = pytest.importorskip("torch", reason="no torch: the places of dropout are not compared")
  config, seen, mine = rated(shallow(of(kind)[0])), [], []
  note = lambda seen, x, rate: seen.append((int(np.prod(x.shape)), x.shape[-1], rate)) if rate else None
  original, kept = torch.nn.functional.dropout, layers.dropout

  def dropped(x, p=0.5, training=True, inplace=False):
    note(seen, x, p if training else 0.0)
    return original(x, p, training)

  monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
  monkeypatch.setattr(layers, "dropout", lambda x, rate, key: (note(mine, x, rate), kept(x, rate, key))[1])
  model = parity.torch_model(config, head).train()
  layout = "seq2seq" if head == "lm" and model.config.is_encoder_decoder else head
  rows = parity.batch(layout, config)
  if head == "classify":  # where an encoder-decoder looks
    rows["inputs"][np.arange(len(parity.LENGTHS)), np.array(parity.LENGTHS) - 1] = config.get("eos_token_id", 3)
  parity.theirs(model, layout, rows)
  want = registry.Wanted(head, labels=parity.LABELS)
  skeleton = registry.skeleton(config, want=want, **parity.HOW)
  jax.eval_shape(lambda p: outputs(skeleton, p, layout, rows, jax.random.key(0)), skeleton.shapes)
  assert mine == seen and (seen or not any("dropout" in k or "pdrop" in k for k in config))


def drawn(shapes):
  """Returns weights with a deviation of 0.3, around 1 in norms."""
  rng = np.random.RandomState(5)
  draw = lambda path, x: float(path[-1].key == "scale") + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def packed(config: dict, lengths: tuple[int, int], side: str) -> dict[str, np.ndarray]:
  """Returns four rows: one example, another, the two, and the two the other way round."""
  rng, width = np.random.default_rng(3), sum(lengths) + 3
  one, two = (rng.integers(3, config["vocab_size"], n) for n in lengths)
  first, second = (np.arange(n) // 2 % 2 for n in lengths)  # token types
  row = lambda *parts: np.pad(np.concatenate(parts), (0, width - sum(map(len, parts)))).astype(np.int32)
  rows = lambda a, b: np.stack([row(a), row(b), row(a, b), row(b, a)])
  full = lambda x, segment: np.full(len(x), segment)
  segments = [row(full(one, 1)), row(full(two, 1)), row(full(one, 1), full(two, 2)), row(full(two, 1), full(one, 2))]
  types = {f"{side}_types": rows(first, second)} if config.get("type_vocab_size", 0) > 1 else {}
  return {f"{side}s": rows(one, two), f"{side}_segments": np.stack(segments), **types}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_padded(kind):
  """Two examples in one row, in either order, give the hidden states and predictions that each gives alone."""
  config, (a, b) = of(kind)[0], (13, 7)
  head = "classify" if "classify" in registry.FAMILIES[kind].heads else registry.FAMILIES[kind].default
  skeleton = registry.skeleton(config, want=registry.Wanted(head), **parity.HOW)
  batch = packed(config, (a, b), "input") | dict(label_weights=np.ones((4, 2), np.float32))
  if skeleton.encoder_decoder:
    a, b = 6, 11
    batch |= packed(config, (a, b), "target")

  def run(p, batch):
    model = skeleton.bind(p)
    return model.hidden(batch, None), model.classify(batch, None) if head == "classify" else jax.numpy.zeros((4, 2, 1))

  run = jax.jit(run, compiler_options=reference.FAST)
  hidden, classes = jax.device_get(run(drawn(skeleton.shapes), batch))
  one, two = hidden[0, :a], hidden[1, :b]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(hidden[2, : a + b], np.concatenate([one, two]))
  close(hidden[3, : a + b], np.concatenate([two, one]))
  close(classes[2], [classes[0, 0], classes[1, 0]])
  close(classes[3], [classes[1, 0], classes[0, 0]])
  assert np.abs(one[:5] - two[:5]).max() > 0.1
  assert head != "classify" or np.abs(classes[0, 0] - classes[1, 0]).max() > 0.01


def fresh_torch(config: dict, head: str):
  """Returns the model in transformers with its own fresh weights."""
  import torch

  torch.manual_seed(0)
  c = theirs(config)
  auto = "seq2seq" if head == "lm" and c.is_encoder_decoder else head
  return getattr(transformers, parity.AUTO[auto]).from_config(c)


@pytest.mark.parametrize("kind,head", HEADS)
def test_fresh_weights_are_distributed_as_the_original(kind, head):
  """Means and deviations of all tensors of one layer; that `layers.fresh` draws by them is tested with T5."""
  pytest.importorskip("torch", reason="no torch: fresh weights are compared for T5 only")
  config = shallow(of(kind)[0])
  skeleton = registry.skeleton(config, want=registry.Wanted(head), **parity.HOW)
  leaves = {"/".join(path): leaf for path, leaf in nnx.split(skeleton.module)[1].flat_state()}
  model = fresh_torch(config, head)
  theirs = (*model.named_parameters(), *model.named_buffers())
  tensors = {parity.SAVED.get((kind, name), name): p.detach().numpy() for name, p in theirs}
  for entry in names.entries(skeleton.rules, trees.flatten(skeleton.shapes)):
    for rule in entry.rules:
      x, leaf = rule.cut(tensors[entry.name]), leaves[rule.ours]
      x = x[np.any(x != 0, -1)] if x.ndim > 1 else x  # transformers makes the row of the padding 0
      if not leaf.std:
        assert np.all(x == leaf.mean), entry.name
      elif x.size > 50:
        assert abs(np.log(x.std() / leaf.std)) < 5 / np.sqrt(2 * x.size), (entry.name, x.std(), leaf.std)
        assert abs(x.mean() - leaf.mean) < 5 * leaf.std / np.sqrt(x.size), entry.name
