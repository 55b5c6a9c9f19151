"""Eight CPU devices for every test, set once before JAX starts, and strict array semantics."""

import os

import jax
import pytest

if not os.environ.get("JAXSYS_TEST_GPU"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quickly_compiled():
    """XLA's own passes stay; LLVM's expensive ones, which take longer than they save, do not."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
