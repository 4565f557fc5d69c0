"""The config of the road's tests: a tiny byte-level T5 on a few rows, every number nobody's default.

It stands in for a file of configs/. The argument is the folder with train.jsonl and dev.jsonl.
"""

from jaxft import config


def get_config(folder: str = "."):
  c = config.base()
  c.seed, c.steps, c.batch, c.micro = 3, 12, 8, 2
  c.model.config = dict(
    model_type="t5",
    vocab_size=384,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=3,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    dropout_rate=0.07,
    layer_norm_epsilon=3e-6,
    relative_attention_num_buckets=10,
    relative_attention_max_distance=17,
    decoder_start_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
    initializer_factor=1.0,
  )
  c.model.tokenizer, c.model.dtype = "builtin:starter", "float32"
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.task = dict(kind="seq2seq", input="up: {lower}", target="{upper}")
  c.data.train, c.data.validation = f"{folder}/train.jsonl", f"{folder}/dev.jsonl"
  c.data.lengths, c.data.cache = dict(inputs=48, targets=40), f"{folder}/cache"
  c.optimizer.update(lr=3e-3, schedule="cosine", warmup=2, decay=0.01)
  c.loss.update(label_smoothing=0.03, z_loss=1e-4)
  c.evals = dict(loss=dict(kind="loss", every=6, batch=4), text=dict(kind="generate", batch=5, length=12, samples=3))
  c.save.update(every=3, keep=2, best="eval/loss/loss", mode="max")  # so that the best is not the last
  c.log.every = 1
  return c
