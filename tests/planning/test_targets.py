"""Targets by name. Catches: a topology of the wrong shape, a kind of device without its numbers, a missing compiler
that ends in a traceback.
"""

import pytest

from jaxft.errors import InputError
from jaxft.planning import targets


@pytest.mark.parametrize(
  "name, platform, devices, topology",
  [
    ("v5p:2x2x2", "tpu", 8, "v5p:2x2x2"),
    ("v5e:4x4", "tpu", 16, "v5e:4x4"),
    ("v6e:2x2", "tpu", 4, "v6e:2x2"),
    ("h100x8", "cuda", 8, "1x1x8"),
    ("a100", "cuda", 1, "1x1x1"),
    ("h200x32", "cuda", 32, "1x4x8"),
    ("cpu", "cpu", 1, ""),
    ("cpux8", "cpu", 8, ""),
  ],
)
def test_names(name, platform, devices, topology):
  t = targets.parse(name)
  assert (t.platform, t.devices, t.topology) == (platform, devices, topology)
  assert (t.chip is None) == (platform == "cpu")


@pytest.mark.parametrize(
  "name, said",
  [
    ("v5p:2x2", "has 3 sides, such as v5p:2x2x2"),
    ("v5e:2x2x2", "has 2 sides, such as v5e:4x4"),
    ("h10x8", "did you mean 'h100'"),
    ("v5px8", "it is a slice of TPUs"),
    ("h100x12", "a multiple of it"),
    ("", "it is a slice of TPUs"),
  ],
)
def test_what_is_none(name, said):
  with pytest.raises(InputError, match=said):
    targets.parse(name)


@pytest.mark.parametrize("name", targets.CHIPS)
def test_numbers(name):
  chip = targets.CHIPS[name]
  assert 1e14 < chip.peak < 3e15 and 1e10 < chip.memory < 3e11 and 2e11 < chip.bandwidth < 1e13 and chip.link > 1e10
  assert bool(chip.units) == bool(chip.capability[0]) == (not chip.clock)


def test_a_missing_compiler_is_one_paragraph(monkeypatch):
  from jax.experimental import topologies

  def missing(**how):
    raise RuntimeError("no such\nplugin")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  for name, extra in (("v5e:2x4", "tpu"), ("h100x8", "gpu")):
    with pytest.raises(InputError, match=rf"no such plugin.*pip install 'jaxft\[{extra}\]'"):
      targets.devices(targets.parse(name))
