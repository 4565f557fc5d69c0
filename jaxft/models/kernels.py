"""The ladder of attention: the fastest way that hardware, dtype, shapes, mask and bias allow, and why not a faster one.

splash: JAX's Pallas kernel for TPUs. cudnn: NVIDIA's flash attention through XLA. flash: our own kernel, flash.py, for
what these refuse. blocks: XLA with the scores of some queries at a time. dense: XLA with all scores. Each site of a
model says once which it takes, and what refused the faster ones. Letters as in scores.py.
"""

import concurrent.futures
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import sharding
from jaxft.errors import InputError, did_you_mean
from jaxft.models import flash, layers
from jaxft.models.scores import Mask, attend, in_blocks

log = logging.getLogger("jaxft")
STEPS = ("splash", "cudnn", "flash", "blocks", "dense")  # fastest first
CHOICES = ("auto", "strict", *STEPS)  # strict: an error where the hardware's own kernel is refused
KERNEL = dict(tpu="splash", gpu="cudnn", cuda="cudnn")  # platform -> its own kernel
FLASH = dict(tpu="tpu", gpu="gpu", cuda="gpu")  # platform -> what flash.py calls it
LANES, BLOCK = 128, 512  # of a TPU; queries or keys of a block of splash at most
VMEM = 12 * 2**20  # bytes of a TPU core's fast memory that the keys and values of a head may take in flash
SCORES = 2.0**28  # bytes of a device that all scores may take before they are made in blocks
_said: set = set()


def check(how: str) -> str:
  """Returns model.attention; raises InputError where it is none of CHOICES."""
  if how not in CHOICES:
    raise InputError(
      f"config: model.attention is {how!r}{did_you_mean(how, CHOICES)}; it is one of {', '.join(CHOICES)}."
    )
  return how


def attention(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask: Any, rate: float, key, softcap: float, how: str) -> jax.Array:
  """Returns softmax(q k + bias) v, [B, T, N, H], by the step of the ladder that `how` (of CHOICES) and the shapes give.

  A query without any key gets 0 and passes no gradient. `mask` is a `Mask` (or what it gives, dense); `bias_NTS` [1 or
  B, N, T, S] or None. Scores are not scaled. `rate` is dropout of the probabilities, with a `key`.
  """
  rate = rate if key is not None else 0.0
  if not isinstance(mask, Mask):  # bool [B, 1, T, S], of one new token
    return attend(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask, rate, key, softcap)
  name, reasons = choose(q_BTNH, k_BSGH, bias_NTS, mask, rate, softcap, how)
  if how != name and (reasons or name != "dense"):  # chosen here, and there was something to choose
    _say(q_BTNH.shape, k_BSGH.shape, mask, name, reasons)
  if name == "splash":
    return _splash(q_BTNH, k_BSGH, v_BSGH, mask, softcap)
  if name == "cudnn":
    return _cudnn(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask)
  if name == "flash":
    return _flash(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask, rate, key, softcap)
  if name == "blocks":
    t = _queries(q_BTNH.shape, k_BSGH.shape[1])
    return in_blocks(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask, rate, key, softcap, t)
  return attend(q_BTNH, k_BSGH, v_BSGH, bias_NTS, mask, rate, key, softcap)


def choose(q, k, bias, mask: Mask, rate: float, softcap: float, how: str) -> tuple[str, dict[str, str]]:
  """Returns (step, {faster step: why it was refused}); raises InputError where `how` asks for what is refused."""
  platform = sharding.platform()
  own = KERNEL.get(platform, "")
  reasons: dict[str, str] = {}
  for name in STEPS:
    why = REFUSED[name](platform, q, k, bias, mask, rate, softcap)
    if how == name and why and name != "blocks":
      raise InputError(f"config: model.attention is {how!r}, but {why}. Use 'auto'.")
    if how == name or (how in ("auto", "strict") and not why):
      break
    if how not in STEPS:
      reasons[name] = why
  if how == "strict" and own and name not in (own, "flash"):
    raise InputError(
      f"config: model.attention is 'strict', and the kernels of this hardware are refused: {own}, as {reasons[own]}; "
      f"flash, as {reasons['flash']}."
    )
  return name, {n: why for n, why in reasons.items() if n == own or (own and n == "flash")}


def _not_splash(platform: str, q, k, bias, mask: Mask, rate: float, softcap: float) -> str:
  if platform != "tpu":
    return "it is for TPUs"
  if bias is not None:
    return "a bias is added to the scores"
  if rate:
    return f"attention has a dropout of {rate:g} (model.attention_dropout=0 switches it off)"
  if mask.prefix is not None:
    return "prompts see themselves in both directions"
  if isinstance(mask.window, jax.Array):
    return "windows differ between the layers"
  return _not_split(q, k)


def _not_split(q, k) -> str:
  """Says why rows and heads cannot be split over the mesh for a kernel that sees one device."""
  rows, heads = sharding.ways("batch"), sharding.ways("heads")
  if q.shape[0] % rows or q.shape[2] % heads or k.shape[2] % heads:
    return f"{q.shape[0]} rows, {q.shape[2]} heads and {k.shape[2]} of keys do not split {rows} and {heads} ways"
  return ""


def _not_cudnn(platform: str, q, k, bias, mask: Mask, rate: float, softcap: float) -> str:
  if platform not in ("gpu", "cuda"):
    return "it is for NVIDIA GPUs"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"activations are {q.dtype.name}, not bfloat16"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"heads of {q.shape[-1]} are no multiple of 8 up to 128"
  if rate:
    return f"attention has a dropout of {rate:g} (model.attention_dropout=0 switches it off)"
  if softcap:
    return f"scores have a cap of {softcap:g}"
  if bias is not None and bias.shape[0] != 1:
    return "each row has a bias of its own"
  if q.shape[1] % 2 or k.shape[1] % 2:
    return f"its gradient wants even lengths, and these are {q.shape[1]} and {k.shape[1]}"
  return _not_split(q, k)


def _not_flash(platform: str, q, k, bias, mask: Mask, rate: float, softcap: float) -> str:
  if platform not in FLASH:
    return "it is for TPUs and NVIDIA GPUs"
  if q.dtype != jnp.bfloat16:
    return f"activations are {q.dtype.name}, not bfloat16"
  if q.shape[-1] > 256:
    return f"heads of {q.shape[-1]} are wider than 256"
  if bias is not None and bias.shape[0] != 1:
    return "each row has a bias of its own"
  if platform == "tpu" and _fast_memory(q, k, bias) > VMEM:
    return f"{max(q.shape[1], k.shape[1])} tokens do not fit into fast memory"
  return _not_split(q, k) or _wrong(platform)


def _fast_memory(q, k, bias) -> int:
  """Returns the bytes of VMEM that flash takes for what is there whole, twice: one is used, one is being loaded.

  These are two tensors of a head, a column of segments (of which each takes all lanes), and a strip of the bias.
  """
  lanes = -(-q.shape[3] // LANES) * LANES
  token = 2 * lanes * q.dtype.itemsize + 4 * LANES + (0 if bias is None else 256 * bias.dtype.itemsize)
  return 2 * max(q.shape[1], k.shape[1]) * token


@functools.cache
def _wrong(platform: str) -> str:
  """Says why flash is not to be trusted on the devices here: on a small case it gives other numbers than XLA does.

  It is run once in each process that has such devices, before a model takes it. What is compiled for devices that are
  elsewhere is taken as it is.
  """
  if jax.default_backend() != FLASH[platform]:
    return ""
  try:
    with concurrent.futures.ThreadPoolExecutor(1) as outside:  # of the program that is being traced in this thread
      found = outside.submit(flash.check, FLASH[platform]).result()
  except Exception as e:  # a compiler's, of whatever kind
    return f"on a small case it fails ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
  return "" if found < 0.02 else f"on a small case it is {found:.3g} off what XLA gives, with bfloat16 at most 0.02"


def _not_blocks(platform: str, q, k, bias, mask: Mask, rate: float, softcap: float) -> str:
  size = _score_bytes(q.shape, k.shape[1])
  return "" if size > SCORES else f"all scores take {size / 2**20:.0f} MiB"


REFUSED = dict(splash=_not_splash, cudnn=_not_cudnn, flash=_not_flash, blocks=_not_blocks, dense=lambda *_: "")


def _score_bytes(shape: tuple[int, ...], keys: int) -> float:
  """Returns the bytes of a device for float32 scores."""
  B, T, N, _ = shape
  return 4.0 * B / sharding.ways("batch") * N / sharding.ways("heads") * T * keys


def _queries(shape: tuple[int, ...], keys: int) -> int:
  """Returns the queries of a block whose scores take a quarter of SCORES: whole lanes, at least one of them."""
  T = shape[1]
  t = int(T * SCORES / 4 / _score_bytes(shape, keys)) // LANES * LANES
  return min(max(t, LANES), T)


def _say(q: tuple[int, ...], k: tuple[int, ...], mask: Mask, name: str, reasons: dict[str, str]) -> None:
  heads = f"{q[2]} heads of {q[3]}" + (f", {k[2]} of keys" if k[2] != q[2] else "")
  what = f"attention of {q[1]} queries to {k[1]} keys, {heads}{', causal' if mask.causal else ''}"
  told = (what, name, *reasons.items())
  if told not in _said:
    _said.add(told)
    why = "".join(f"; no {n}: {r}" for n, r in reasons.items())
    log.info("%s: %s%s.", what, name, why)


# ---- kernels


def _cudnn(q, k, v, bias, mask: Mask) -> jax.Array:
  """cuDNN's flash attention (jax.nn.dot_product_attention); the mask is one of bits [B, 1, T, S], the bias has its
  gradient. Heads of keys are repeated nowhere."""
  out = jax.nn.dot_product_attention(
    q, k, v, bias=None if bias is None else bias.astype(q.dtype), mask=mask.dense(), scale=1.0,
    is_causal=mask.causal and mask.prefix is None, implementation="cudnn")  # fmt: skip
  return jnp.where(mask.sees()[..., None, None], out, 0)


def _flash(q, k, v, bias, mask: Mask, rate: float, key, softcap: float, platform: str = "", interpret: bool = False):
  """Our own kernel on each device, which is told where its rows and heads stand among all."""
  platform, heads = platform or FLASH[sharding.platform()], q.shape[2]
  tensors, plain = ("batch", None, "heads", None), mask.replace(window=None)
  given = dict(q=(q, tensors), k=(k, tensors), v=(v, tensors), bias=(bias, (None, "heads", None, None)))
  given |= dict(mask=(plain, ("batch", None)), window=(mask.window, ()), key=(key if rate else None, (None,)))

  def local(q, k, v, bias, mask, window, key):
    start = sharding.place("batch") * q.shape[0], sharding.place("heads") * q.shape[2]
    return flash.attention(
      q, k, v, bias, mask.replace(window=window), rate, key, softcap, platform, heads=heads, start=start,
      interpret=interpret)  # fmt: skip

  out = _on_each_device(local, *given.values())
  return jnp.where(mask.sees()[..., None, None], out, 0)


def _splash(q, k, v, mask: Mask, softcap: float, interpret: bool = False) -> jax.Array:
  """Splash attention (jax.experimental.pallas.ops.tpu), segments and all; lengths are filled up to whole lanes."""
  splash, _ = _pallas()
  T, S = q.shape[1], k.shape[1]
  up = lambda n: -n % LANES
  fill = lambda x, n: jnp.pad(x, [(0, 0), (0, n)] + [(0, 0)] * (x.ndim - 2))
  q, k, v = (fill(x, up(x.shape[1])) for x in (q, k, v))
  segments = fill(mask.query, up(T)), fill(mask.key, up(S))
  window = None if mask.window is None or mask.window >= max(T, S) else int(mask.window)

  def local(q_BTNH, k_BSGH, v_BSGH, query, key):
    kernel = _kernel(q_BTNH.shape[2], T + up(T), S + up(S), mask.causal, window, softcap, interpret)
    one = lambda q, k, v, a, b: kernel(q, k, v, segment_ids=splash.SegmentIds(a, b))
    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
    return jax.vmap(one)(*heads_first, query, key).swapaxes(1, 2)

  tensors = ("batch", None, "heads", None)
  out = _on_each_device(local, *((x, tensors) for x in (q, k, v)), *((x, ("batch", None)) for x in segments))[:, :T]
  return jnp.where(mask.sees()[..., None, None], out.astype(q.dtype), 0)


def _pallas() -> tuple[Any, Any]:
  """Returns the two modules of splash attention, which take half a second to import, and only TPUs have a use for."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  return splash_attention_kernel, splash_attention_mask


def _on_each_device(fn, *given: tuple[Any, tuple]) -> jax.Array:
  """Returns fn(*operands) [B, T, N, H], run on the part of each device; `given` are (operand, logical axes): rows and
  heads are split as activations are."""
  operands, axes = zip(*given)
  found = sharding.current()
  if found is None:
    return fn(*operands)
  specs = tuple(sharding.spec(*found, a) for a in axes)
  return jax.shard_map(fn, mesh=found[0], in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, T: int, S: int, causal: bool, window: int | None, softcap: float, interpret: bool):
  splash, splash_mask = _pallas()
  if causal:
    one = splash_mask.CausalMask((T, S)) if window is None else splash_mask.LocalMask((T, S), (window - 1, 0), 0)
  else:
    one = splash_mask.FullMask((T, S)) if window is None else splash_mask.LocalMask((T, S), (window, window), 0)
  t, s = (max(b for b in range(LANES, BLOCK + 1, LANES) if n % b == 0) for n in (T, S))
  sizes = splash.BlockSizes(
    block_q=t, block_kv=s, block_kv_compute=s, block_q_dkv=t, block_kv_dkv=s, block_kv_dkv_compute=s, block_q_dq=t,
    block_kv_dq=s)  # fmt: skip
  with jax.ensure_compile_time_eval():  # its tables of blocks are constants of any program
    return splash.make_splash_mha(
      splash_mask.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      attn_logits_soft_cap=softcap or None, residual_checkpoint_name=layers.KEPT, interpret=interpret)  # fmt: skip
