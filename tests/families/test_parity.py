"""Every family and head against transformers, live; skipped where torch is not installed."""

import pytest

from jaxft.families import registry
from tests.families import parity, tiny

torch = pytest.importorskip("torch", reason="no torch: families other than T5 are not compared with transformers")
CASES = [(name, kind) for name, config in tiny.CONFIGS.items() for kind in registry.FAMILIES[config["model_type"]].heads
         if kind != "nsp"]  # fmt: skip


@pytest.mark.parametrize("name,kind", CASES)
def test_logits_loss_gradients(name, kind, tmp_path):
  parity.check(tiny.CONFIGS[name], kind, tmp_path)


@pytest.mark.parametrize("name,kind", CASES)
def test_export(name, kind, tmp_path):
  parity.check_export(tiny.CONFIGS[name], kind, tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("way", range(len(parity.WAYS)))
@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "lm"])
def test_generation(name, way, tmp_path):
  parity.check_generation(tiny.CONFIGS[name], tmp_path, parity.WAYS[way])
