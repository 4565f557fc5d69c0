"""Joining a cluster, without one: who asks JAX to, and what becomes of its answer.

Catches: workers of a TPU VM that never join, a lone TPU or a laptop that fails for want of a cluster, a swallowed
error.
"""

import pytest

from jaxft import cluster
from jaxft.errors import ClusterError


@pytest.fixture
def joined(monkeypatch):
  """Returns the calls of jax.distributed.initialize, with an environment that names no cluster."""
  calls = []
  for name in ("JAXFT_COORDINATOR", "SLURM_NTASKS", "JAX_COORDINATOR_ADDRESS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda *a: calls.append(a))
  monkeypatch.setattr(cluster, "_tpu_here", lambda: False)
  return calls


def test_a_laptop_joins_nothing(joined):
  cluster.join()
  assert joined == []


def test_named_by_hand(joined, monkeypatch):
  for name, value in dict(COORDINATOR="a:1", PROCESSES="3", PROCESS="2").items():
    monkeypatch.setenv(f"JAXFT_{name}", value)
  cluster.join()
  assert joined == [("a:1", 3, 2)]
  monkeypatch.delenv("JAXFT_PROCESS")
  with pytest.raises(ClusterError, match="JAXFT_PROCESS"):
    cluster.join()


def test_a_tpu_vm_asks_jax(joined, monkeypatch):
  monkeypatch.setattr(cluster, "_tpu_here", lambda: True)
  cluster.join()
  assert joined == [()]


@pytest.mark.parametrize("error, fails", [("coordinator_address should be defined", False), ("a worker is gone", True)])
def test_a_tpu_alone_goes_on_and_a_broken_cluster_does_not(joined, monkeypatch, error, fails):
  def refuse():
    raise ValueError(error)

  monkeypatch.setattr(cluster, "_tpu_here", lambda: True)
  monkeypatch.setattr(cluster.jax.distributed, "initialize", refuse)
  if fails:
    with pytest.raises(ClusterError, match=error):
      cluster.join()
  else:
    cluster.join()
