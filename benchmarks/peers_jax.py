"""The JAX peers of peers.py, each with an interpreter of its own, as they pin other versions of JAX: Tunix PeftTrainer
(pip install google-tunix), EasyDeL's Trainer (pip install easydel pillow, and torch, which it asks for), and the T5
that transformers had in Flax until 4.57, trained as its run_summarization_flax.py did (pip install jax==0.4.30
flax==0.8.5 optax==0.2.3 transformers==4.44.2, Python 3.11)."""

import argparse
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Iterator

import contest
import numpy as np


def batches(rows: list, size: int) -> Iterator[list]:
  """Yields `size` rows at a time, in a new random order each epoch."""
  rng = np.random.default_rng(0)
  while True:
    order = rng.permutation(len(rows))
    for i in range(0, len(rows) - size + 1, size):
      yield [rows[j] for j in order[i : i + size]]


def read(args: argparse.Namespace) -> list:
  return json.loads((pathlib.Path(args.work) / "ids.json").read_text())


def said(*names: str) -> dict:
  return {"versions": {n: importlib.metadata.version(n) for n in names}}


def train_tunix(args: argparse.Namespace, case, lr: float, decay: float, clip: float) -> None:
  """Trains a Llama shape with Tunix's PeftTrainer, all weights, until the referee ends it."""
  import jax
  import optax
  from flax import nnx
  from tunix.models.llama3 import model as llama3
  from tunix.sft import peft_trainer, utils

  m = case.model
  config = llama3.ModelConfig(
    num_layers=m["num_hidden_layers"], vocab_size=m["vocab_size"], embed_dim=m["hidden_size"],
    hidden_dim=m["intermediate_size"], num_heads=m["num_attention_heads"], num_kv_heads=m["num_key_value_heads"],
    head_dim=m["hidden_size"] // m["num_attention_heads"], rope_theta=int(m["rope_theta"]), norm_eps=m["rms_norm_eps"],
    weight_tying=m["tie_word_embeddings"])  # fmt: skip
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    referee = contest.Referee(args.warmup, parameters=size, **said("google-tunix", "jax", "flax", "optax"))

    class Ended(Exception):
      pass

    class Counted(peft_trainer.PeftTrainer):
      def _post_process_train_step(self, aux):
        loss = float(self._buffered_train_metrics.losses[-1]) if referee.last else None  # waits for the device
        if not referee.step(loss=loss, examples=case.examples, tokens=args.tokens, places=args.tokens):
          raise Ended

    def rows():
      for ids in batches(read(args), case.examples):
        x = np.array(ids, np.int32)
        yield peft_trainer.TrainingInput(input_tokens=x, input_mask=np.ones_like(x, bool))

    def inputs(x):
      there = x.input_mask
      return dict(
        input_tokens=x.input_tokens, input_mask=there, positions=utils.build_positions_from_mask(there),
        attention_mask=utils.make_causal_attn_mask(there))  # fmt: skip

    args.tokens = case.examples * case.length
    how = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**6)
    tx = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(lr, weight_decay=decay))
    trainer = Counted(model, tx, how).with_gen_model_input_fn(inputs)
    try:
      trainer.train(rows())
    except Ended:
      return


def train_easydel(args: argparse.Namespace, case, lr: float, decay: float, clip: float) -> None:
  """Trains a Llama shape with EasyDeL's Trainer, all weights, until the referee ends it."""
  import datasets
  import easydel
  import jax
  import jax.numpy as jnp
  from flax import nnx

  config = easydel.LlamaConfig(**{k: v for k, v in case.model.items() if k != "model_type"})
  model = easydel.LlamaForCausalLM(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
  referee = contest.Referee(args.warmup, parameters=size, **said("easydel", "jax", "flax", "optax"))
  tokens = case.examples * case.length

  class Ended(Exception):
    pass

  class Counted(easydel.Trainer):
    def on_step_end(self, state, metrics, step):
      if not referee.step(loss=float(metrics.loss), examples=case.examples, tokens=tokens, places=tokens):
        raise Ended
      return super().on_step_end(state, metrics, step)

  rows = read(args)
  data = datasets.Dataset.from_dict(
    dict(input_ids=rows, labels=rows, attention_mask=[[1] * case.length for _ in rows])
  )
  how = easydel.TrainingArguments(
    total_batch_size=case.examples, learning_rate=lr, weight_decay=decay, clip_grad=clip, max_length=case.length,
    num_train_epochs=1000, use_wandb=False, do_last_save=False, resume_if_possible=False, log_grad_norms=False,
    save_directory=f"{args.work}/easydel", log_steps=10**6, report_steps=10**6)  # fmt: skip
  try:
    Counted(arguments=how, model=model, dataset_train=data).train()
  except Ended:
    return


def train_flax(args: argparse.Namespace, case, lr: float, decay: float, clip: float) -> None:
  """Trains FlaxT5 with rows padded to the longest of the data, until the referee ends it."""
  import jax
  import jax.numpy as jnp
  import optax
  from transformers import FlaxT5ForConditionalGeneration, T5Config

  rows = read(args)
  longest = [8 * math.ceil(max(len(r[side]) for r in rows) / 8) for side in (0, 1)]
  config = T5Config(**{k: v for k, v in case.model.items() if k != "model_type"})
  model = FlaxT5ForConditionalGeneration(config, seed=0, input_shape=(1, 8))
  params = model.params
  size = sum(x.size for x in jax.tree.leaves(params))
  referee = contest.Referee(args.warmup, parameters=size, **said("transformers", "jax", "flax", "optax"))
  tx = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(lr, weight_decay=decay))

  def loss_fn(params, batch, key):
    labels, there = batch.pop("labels"), batch["decoder_attention_mask"]
    logits = model(**batch, params=params, dropout_rng=key, train=True)[0]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (each * there).sum() / there.sum()

  def step(params, opt, batch, key):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, key)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  jitted, opt, key = jax.jit(step, donate_argnums=(0, 1)), tx.init(params), jax.random.PRNGKey(0)

  def padded(side: int, given: list) -> np.ndarray:
    out = np.zeros((len(given), longest[side]), np.int32)
    for i, r in enumerate(given):
      out[i, : len(r[side])] = r[side]
    return out

  for i, given in enumerate(batches(rows, case.examples)):
    x, y = padded(0, given), padded(1, given)
    there = dict(attention_mask=(x != 0).astype(np.int32), decoder_attention_mask=(y != 0).astype(np.int32))
    batch = dict(input_ids=x, labels=y, decoder_input_ids=np.pad(y, ((0, 0), (1, 0)))[:, :-1], **there)
    params, opt, loss = jitted(params, opt, {k: jnp.asarray(v) for k, v in batch.items()}, jax.random.fold_in(key, i))
    told = float(loss) if referee.last else None
    tokens = sum(int(v.sum()) for v in there.values())
    if not referee.step(loss=told, examples=len(given), tokens=tokens, places=x.size + y.size):
      return


SIDES = {"tunix": train_tunix, "easydel": train_easydel, "flax-t5": train_flax}
