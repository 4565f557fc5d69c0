"""How the processes of a job find each other, on one host or on many."""

import importlib.util
import logging
import os
import pathlib

import jax

from jaxft.errors import ClusterError

log = logging.getLogger("jaxft")


def join() -> None:
  """Joins the other processes of the job, where there are any.

  JAXFT_COORDINATOR=host:port with JAXFT_PROCESSES and JAXFT_PROCESS names them by hand; on TPU VMs and in a SLURM step
  of several tasks JAX finds them itself. Raises ClusterError where that fails.
  """
  by_hand = os.environ.get("JAXFT_COORDINATOR")
  found = int(os.environ.get("SLURM_NTASKS", 1)) > 1 or os.environ.get("JAX_COORDINATOR_ADDRESS")
  tpu = _tpu_here()
  if not (by_hand or found or tpu):
    return
  try:
    if by_hand:
      jax.distributed.initialize(by_hand, int(os.environ["JAXFT_PROCESSES"]), int(os.environ["JAXFT_PROCESS"]))
    else:
      jax.distributed.initialize()
  except (KeyError, ValueError, RuntimeError) as e:
    if tpu and not (by_hand or found) and "coordinator_address" in str(e):  # jax knows no cluster of this kind
      log.info("A TPU without a cluster that JAX knows; this process works alone.")
      return
    raise ClusterError(
      f"cluster: {type(e).__name__}: {e}. JAXFT_COORDINATOR=host:port, JAXFT_PROCESSES (how many) and "
      "JAXFT_PROCESS (this one, from 0) name the processes by hand."
    ) from e


def _tpu_here() -> bool:
  """Says whether this host has TPU chips and the library for them; asked before any backend of JAX starts."""
  wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
  chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
  return "tpu" in wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None
