"""What a checkpoint says about itself: the leaves, a checksum of each that no layout changes, and a digest over it
all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


class Corrupt(Exception):
  """A checkpoint is there but cannot be trusted."""


def paths(tree: Tree) -> dict[str, Any]:
  """Returns {path: leaf} of any tree: dict keys, attributes and list positions joined by "/"."""
  return {
    jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of `x` as uint32, of the same shape (64-bit types get a last axis of 2)."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  bits = x.dtype.itemsize * 8
  if bits == 64:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


@jax.jit
def checksums(leaves: Sequence[jax.Array]) -> jax.Array:
  """Returns uint32[len(leaves)]: for each leaf the sum modulo 2^32 of its words, each times an odd hash of its
  position.

  Integer sums with wrap-around are exact in any order, so the value is the same under any sharding. An odd factor has
  an inverse modulo 2^32, so a change of one word always shows; the position in it makes exchanged words show. Computed
  where the arrays live.
  """

  def one(x):
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      position = position * np.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (position + np.uint32(1)) * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x85EBCA77)
    return jnp.sum(words * ((mixed ^ (mixed >> 13)) | np.uint32(1)), dtype=jnp.uint32)

  return jnp.stack([one(x) for x in leaves]) if leaves else jnp.zeros((0,), jnp.uint32)


def plain(leaf: Any) -> Any:
  """Returns `leaf` as what is stored: a typed PRNG key becomes its data."""
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  return leaf


def manifest(flat: Mapping[str, jax.Array]) -> dict[str, list]:
  sums = np.asarray(checksums(list(flat.values())))
  return {p: [list(x.shape), np.dtype(x.dtype).name, int(s)] for (p, x), s in zip(flat.items(), sums)}


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `meta` with a digest over its JSON, so that a flipped bit in the metadata shows as well."""
  body = json.loads(json.dumps(meta))
  return dict(body=body, sha256=_digest(body))


def unseal(sealed: Any) -> dict[str, Any]:
  """Returns what `seal` got; raises Corrupt where the digest differs."""
  if not isinstance(sealed, dict) or sealed.get("sha256") != _digest(sealed.get("body")):
    raise Corrupt("its metadata does not match the digest in it")
  return sealed["body"]


def _digest(body: Any) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
