"""Activations. Catches: a gelu that rounds its tail away in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxft.models import layers


@pytest.mark.parametrize("dtype, rtol", [("float32", 2e-5), ("bfloat16", 0.04)])
def test_gelu(dtype, rtol):
  x = jnp.linspace(-3, 3, 61).astype(dtype)
  exact = np.asarray(x, np.float64) * scipy.stats.norm.cdf(np.asarray(x, np.float64))
  np.testing.assert_allclose(np.asarray(layers.ACTIVATIONS["gelu"](x), np.float64), exact, rtol=rtol)
