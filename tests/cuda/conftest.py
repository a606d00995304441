"""What the tests of compiled kernels share: they need CUDA's compiler, but no GPU."""

import importlib.util

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Skips where CUDA's compiler is missing; programs that are not compiled for the H200 run on the CPU."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs pip install 'jax[cuda13]', which compiles for a GPU without one")
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "cpu")
    yield
    jax.config.update("jax_platforms", before)
