"""Eight CPU devices for every test, set once before JAX starts, and strict array semantics."""

import os

import jax

if not os.environ.get("JAXSYS_TEST_GPU"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
