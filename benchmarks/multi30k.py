r"""English to German on Multi30k: a small T5 1.1 from fresh weights, packed, for about half an hour on 2 CPU cores.

python -m jaxft.main --config=benchmarks/multi30k.py:DATA,TOKENIZER --workdir=runs/multi30k

DATA holds {train,val,test_2016_flickr}.{en,de}.gz, TOKENIZER a T5 tokenizer (32,100 ids).
"""

from jaxft import config


def get_config(arg: str = "multi30k,google-t5/t5-small"):
  data, tokenizer = arg.split(",")
  files = lambda split: {side: f"{data}/{split}.{side}.gz" for side in ("en", "de")}
  c = config.base()
  c.steps, c.batch = 700, 16
  c.model.config = dict(
    model_type="t5",
    vocab_size=32_128,
    d_model=192,
    d_kv=64,
    d_ff=512,
    num_layers=3,
    num_decoder_layers=3,
    num_heads=3,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=True,
    scale_decoder_outputs=True,
    dropout_rate=0.1,
    layer_norm_epsilon=1e-6,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    initializer_factor=1.0,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
  )
  c.model.tokenizer = tokenizer
  c.task = dict(kind="seq2seq", input="translate English to German: {en}", target="{de}")
  c.data.train, c.data.validation = files("train"), files("val")
  c.data.lengths = dict(inputs=128, targets=128)
  c.optimizer.update(name="adamw", lr=2e-3, schedule="cosine", warmup=0.1, b2=0.98, decay=0.01)
  c.loss.label_smoothing = 0.1
  c.evals = dict(
    loss=dict(kind="loss", every=100, batch=16),
    test=dict(kind="generate", data=files("test_2016_flickr"), batch=100, beams=4, metrics=("sacrebleu", "chrf")),
  )
  c.save.update(every=100, best="eval/loss/loss")
  return c
