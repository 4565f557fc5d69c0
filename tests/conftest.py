"""Eight CPU devices for every test, and programs that are compiled fast; must be set before jax is imported.

Compiling is what the tests take time for: a tiny step with gradients takes 9.4 CPU seconds as usual, 6.0 without LLVM's
optimisation, 2.0 with the older code generator as well (which JAX has up to 0.10). What it makes is slower.
"""

import importlib.metadata
import logging
import os

import pytest

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # or each binary would start itself again for it


@pytest.fixture(autouse=True)
def logger():
  """Leaves the logger as it was: a run in this process gives it handlers, and the next test would see no messages."""
  log = logging.getLogger("jaxft")
  before = log.handlers[:], log.propagate, log.level
  yield
  log.handlers[:], log.propagate = before[:2]
  log.setLevel(before[2])


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first, so that no process of pytest-xdist is left alone with them at the end."""
  long = ("test_road.py", "test_all.py", "test_parity.py", "test_tiny_configs.py", "test_sweep.py", "test_t5.py")
  items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))
