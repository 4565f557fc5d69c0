"""Eight CPU devices for every test; must be set before jax is imported."""

import os

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ["JAX_PLATFORMS"] = "cpu"


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first, so that no process of pytest-xdist is left alone with them at the end."""
  long = ("test_road.py", "test_t5.py", "test_hosts.py")
  items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))
