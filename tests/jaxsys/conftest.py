"""Programs that run a few times on small arrays: compiling them is most of what tests wait for."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """XLA's own passes stay; LLVM's expensive ones, which take longer than they save, do not."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
