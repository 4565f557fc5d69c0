"""A tiny encoder-decoder like the real ones (embedding, two stacks of different depth, head) for tests of the step."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.train import losses

B, T, S, D, N, H, F, V = 16, 7, 5, 24, 8, 3, 40, 56

AXES = dict(
  embed=dict(embedding=("vocab", "embed")),
  head=dict(kernel=("embed", "vocab")),
  encoder=dict(
    bias=dict(embedding=(None, "heads")),
    layers=dict(
      q=dict(kernel=("layers", "embed", "heads", "head_dim")),
      o=dict(kernel=("layers", "heads", "head_dim", "embed")),
      norm=dict(scale=("layers", None)),
    ),
  ),
  decoder=dict(layers=dict(wi=dict(kernel=("layers", "embed", "mlp")), wo=dict(kernel=("layers", "mlp", "embed")))),
)
SIZES = dict(
  embed=dict(embedding=(V, D)),
  head=dict(kernel=(D, V)),
  encoder=dict(
    bias=dict(embedding=(4, N)),
    layers=dict(q=dict(kernel=(3, D, N, H)), o=dict(kernel=(3, N, H, D)), norm=dict(scale=(3, D))),
  ),
  decoder=dict(layers=dict(wi=dict(kernel=(2, D, F)), wo=dict(kernel=(2, F, D)))),
)
SHAPES = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SIZES, is_leaf=lambda x: isinstance(x, tuple))


def init(dtype=np.float32):
  """Returns fresh parameters, by numpy: compiling jax.random for every leaf would take longer than the tests."""
  rng = np.random.default_rng(5)
  params = jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.2).astype(dtype), SHAPES)
  params["encoder"]["layers"]["norm"]["scale"][0, 0] = -0.0  # a frozen layer must keep this sign too
  return params


class Toy:
  """`hidden` and `logits` as the real models have them."""

  def __init__(self, params, rate):
    self.p, self.rate = params, rate

  def hidden(self, batch, key):
    def encode(x, layer):
      p, i = layer
      h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["norm"]["scale"]
      q = jnp.einsum("btd,dnh->btnh", h, p["q"]["kernel"]) + self.p["encoder"]["bias"]["embedding"][1][:, None]
      if key is not None:
        q = q * jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, q.shape) / (1 - self.rate)
      return x + jnp.einsum("btnh,nhd->btd", jnp.tanh(q), p["o"]["kernel"]), None

    decode = lambda x, p: (x + jax.nn.relu(x @ p["wi"]["kernel"]) @ p["wo"]["kernel"], None)
    table = self.p["embed"]["embedding"]
    x = jax.lax.scan(encode, table[batch["inputs"]], (self.p["encoder"]["layers"], jnp.arange(3)))[0]
    context = jnp.sum(x * (batch["input_segments"] > 0)[..., None], 1, keepdims=True)
    before = jnp.pad(batch["targets"][:, :-1], ((0, 0), (1, 0)))
    return jax.lax.scan(decode, table[before] + 0.1 * context, self.p["decoder"]["layers"])[0]

  def logits(self, x):
    return x.astype(jnp.float32) @ self.p["head"]["kernel"].astype(jnp.float32)


def loss(rate=0.0, e=0.1, z=1e-3):
  """Returns the loss function that a train step takes."""
  o = losses.Options(e, z)
  return lambda params, batch, key: losses.seq2seq(Toy(params, rate), batch, key if rate else None, o)


def batch(seed=0, rows=B):
  """Returns rows of very different lengths, one of them empty."""
  rng = np.random.default_rng(seed)
  inputs, targets = rng.integers(1, V, (rows, T)), rng.integers(1, V, (rows, S))
  n, m = rng.integers(1, T + 1, rows), rng.integers(1, S + 1, rows)
  n[3] = m[3] = 0
  seen_n, seen_m = np.arange(T) < n[:, None], np.arange(S) < m[:, None]
  return dict(
    inputs=np.where(seen_n, inputs, 0).astype(np.int32),
    input_segments=seen_n.astype(np.int32),
    targets=np.where(seen_m, targets, 0).astype(np.int32),
    target_segments=seen_m.astype(np.int32),
    weights=seen_m.astype(np.float32),
  )
