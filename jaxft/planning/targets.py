"""The devices that a run can be planned for: what they are, and their makers' numbers."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxft import flops
from jaxft.errors import InputError, did_you_mean

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device in numbers of its maker's data sheet.

  `memory` bytes (of TPUs what their compiler leaves to a program), `bandwidth` bytes/s of that memory, `link` bytes/s
  that a device sends to its neighbours over all its `links` together, one way; `far` the same to other hosts, where
  that is another network.
  """

  kind: str  # as jax calls the device, for flops.PEAK_BF16
  memory: float
  bandwidth: float
  link: float
  links: int = 1
  far: float = 0.0  # 0: as `link`
  cores: int = 1  # whose cycles the compiler of TPUs counts one by one
  clock: float = 0.0  # cycles/s
  capability: tuple[int, int] = (0, 0)  # of CUDA
  units: int = 0  # streaming multiprocessors
  clock_ghz: float = 0.0
  l2: int = 0

  @property
  def peak(self) -> float:
    return next(f for part, f in flops.PEAK_BF16 if part in self.kind)


# TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm; links and clocks as in Austin et al. 2025, "How to Scale
# Your Model", chapter 2 (one-way, all axes). GPUs: data sheets of NVIDIA, memory as their driver counts it; `far` is a
# 400 Gb/s network card for each.
CHIPS: dict[str, Chip] = dict(
  v5e=Chip("tpu v5e", 15.75 * 2**30, 8.1e11, 1.8e11, 4, clock=1.5e9),
  v5p=Chip("tpu v5p", 95.74 * 2**30, 2.8e12, 5.4e11, 6, cores=2, clock=1.75e9),
  v6e=Chip("tpu v6", 31.25 * 2**30, 1.6e12, 3.6e11, 4, clock=1.75e9),
  h100=Chip("h100", 84.9e9, 3.35e12, 4.5e11, far=5e10, capability=(9, 0), units=132, clock_ghz=1.98, l2=52428800),
  h200=Chip("h200", 150.1e9, 4.8e12, 4.5e11, far=5e10, capability=(9, 0), units=132, clock_ghz=1.98, l2=52428800),
  a100=Chip("a100", 84.9e9, 2.04e12, 3e11, far=2.5e10, capability=(8, 0), units=108, clock_ghz=1.41, l2=41943040),
  l4=Chip("l4", 24.1e9, 3e11, 3.2e10, far=1.25e10, capability=(8, 9), units=58, clock_ghz=2.04, l2=50331648),
  b200=Chip("b200", 192e9, 8e12, 9e11, far=5e10, capability=(10, 0), units=148, clock_ghz=1.97, l2=132120576),
)
SHARE_OF_GPU = 0.92  # of a GPU's memory, which launch/ gives to JAX; its own choice is 0.75
HOST = 8  # GPUs of a machine
SWEEP = tuple("v5e:2x4 v5e:4x4 v6e:2x4 v6e:4x4 v5p:2x2x1 v5p:2x2x2 v5p:2x2x4 h100 h100x8 a100x8".split())


@dataclasses.dataclass(frozen=True)
class Target:
  """So many devices of one kind."""

  name: str
  platform: str  # tpu, cuda, cpu
  devices: int
  chip: Chip | None  # None: a CPU
  topology: str  # as the compiler of the platform names it

  @property
  def link(self) -> float:
    """Bytes a second between devices, the slowest way that a collective over all of them must take."""
    far = self.chip.far and self.devices > HOST
    return self.chip.far if far else self.chip.link


def parse(name: str) -> Target:
  """Returns the target of v5e:4x4, v5p:2x2x2, h100x8, h100, cpu or cpux8; raises InputError on anything else."""
  found = re.fullmatch(r"cpu(?:x(\d+))?", name)
  if found:
    return Target(name, "cpu", int(found.group(1) or 1), None, "")
  found = re.fullmatch(r"(v\d\w?):(\d+x\d+(?:x\d+)?)", name)
  if found and found.group(1) in CHIPS:
    sides = [int(x) for x in found.group(2).split("x")]
    flat = found.group(1) in ("v5e", "v6e")
    if flat != (len(sides) == 2):
      raise InputError(
        f"target {name}: a slice of {found.group(1)} has {2 if flat else 3} sides, such as "
        f"{found.group(1)}:{'4x4' if flat else '2x2x2'}."
      )
    return Target(name, "tpu", math.prod(sides), CHIPS[found.group(1)], name)
  found = re.fullmatch(r"([a-z]+\d+)(?:x(\d+))?", name)
  if found and found.group(1) in CHIPS and CHIPS[found.group(1)].units:
    n = int(found.group(2) or 1)
    hosts = max(1, n // HOST)
    if n > HOST and n % HOST:
      raise InputError(f"target {name}: machines have {HOST} GPUs; give up to {HOST}, or a multiple of it.")
    return Target(name, "cuda", n, CHIPS[found.group(1)], f"1x{hosts}x{n // hosts}")
  raise InputError(
    f"target {name!r}{did_you_mean(name.split(':')[0], CHIPS)}: it is a slice of TPUs (v5e:4x4, v6e:2x2, v5p:2x2x2), "
    f"so many GPUs ({', '.join(f'{k}x8' for k, v in CHIPS.items() if v.units)}), cpu or cpux8."
  )


def devices(target: Target) -> Sequence[Any]:
  """Returns the devices of a target, to compile for; raises InputError where their compiler is not installed.

  CPUs are those of this process.
  """
  if target.platform == "cpu":
    here = jax.devices("cpu")
    if len(here) < target.devices:
      raise InputError(f"target {target.name}: this process has {len(here)} CPU device(s). Start it anew.")
    return here[: target.devices]
  from jax.experimental import topologies  # only where something is compiled for what is not here

  how = dict(platform=target.platform, topology_name=target.topology)
  if target.platform == "cuda":
    how = dict(platform="cuda", topology=target.topology, target_config=_config(target.chip))
  try:
    return topologies.get_topology_desc(**how).devices
  except Exception as e:  # its errors have no common parent: a missing plugin, a topology that does not exist
    said = " ".join(str(e).split())[:200]
    extra = "tpu" if target.platform == "tpu" else "gpu"
    raise InputError(
      f"target {target.name}: its compiler does not give this topology ({type(e).__name__}: {said}). It comes with "
      f"pip install 'jaxft[{extra}]', and needs no {extra.upper()}; where it is installed, the topology may not exist."
    ) from e


def _config(chip: Chip) -> str:
  """Returns what XLA's compiler for GPUs asks about a device, as a text proto."""
  major, minor = chip.capability
  shared = 227 * 1024 if major >= 9 else (163 if minor == 0 else 99) * 1024
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024} threads_per_core_limit: {2048 if minor != 9 else 1536}
  core_count: {chip.units} fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {chip.l2} clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {int(chip.memory)} shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {chip.kind.upper()}"
"""


def usable(target: Target) -> float:
  """Returns the bytes of a device that a run may take; 0 for a CPU, whose memory is the machine's."""
  if target.chip is None:
    return 0.0
  return target.chip.memory * (SHARE_OF_GPU if target.platform == "cuda" else 1)
