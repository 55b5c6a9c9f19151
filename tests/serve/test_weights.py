"""Quantised matrices are as close as their form allows, and products use them as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import forward, initial_parameters, preset
from jaxsys.serve import paged_model
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.weights import QUANTISATIONS, matmul, serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)


@pytest.fixture(scope="module")
def parameters():
    return initial_parameters(CONFIG, seed=1)


@pytest.fixture(scope="module")
def whole(parameters):
    return serving_weights(CONFIG, parameters)


@pytest.mark.parametrize("form", QUANTISATIONS)
def test_each_weight_is_the_nearest_of_its_column(parameters, whole, form):
    small = serving_weights(CONFIG, parameters, quantisation=form)
    for name, inputs in (("qkv", 1), ("out", 3), ("mlp/up", 1), ("mlp/down", 1)):
        exact = np.asarray(whole.layers[1].matrices[name].values)
        values, scale = small.layers[1].matrices[name]
        assert scale is not None
        assert values.dtype.itemsize == 1 and scale.shape == exact.shape[inputs:]
        error = np.abs(np.asarray(values.astype(jnp.float32)) * np.asarray(scale) - exact)
        # Half a step of an integer; of e4m3 half a unit in the last of three bits, or half its
        # least number, 2**-9.
        steps = np.maximum(2.0**-4 * np.abs(exact), 2.0**-10 * np.asarray(scale))
        bound = 0.5 * np.asarray(scale) if form == "int8" else steps
        assert (error <= 1.001 * bound).all()
        assert error.max() > 0
    assert small.step_bytes < 0.35 * whole.step_bytes


@pytest.mark.parametrize("form", QUANTISATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_values_it_stands_for(parameters, form, dtype):
    matrix = serving_weights(CONFIG, parameters, quantisation=form).layers[0].matrices["out"]
    assert matrix.scale is not None
    x = jax.random.normal(jax.random.key(0), (2, 3, *matrix.values.shape[:3]), jnp.dtype(dtype))
    found = matmul(x, matrix, inputs=3)
    meant = np.asarray(matrix.values.astype(jnp.float32)) * np.asarray(matrix.scale)
    expected = np.einsum("btgrk,grkd->btd", np.asarray(x, np.float32), meant)
    assert found.dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize(("form", "most"), [("int8", 0.02), ("fp8", 0.06)])
def test_logits_move_little(parameters, form, most):
    """Root mean square of the change over that of the logits, through the paged pass."""
    device = jax.devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    kernels = choose_kernels(dtype=jnp.dtype("float32"), head_dim=CONFIG.head_dim, device=device)
    small = serving_weights(CONFIG, parameters, quantisation=form)
    cache = paged_model.empty_cache(CONFIG, 8, 4, small.dtype, place)
    tokens = jnp.arange(3, 23, dtype=jnp.int32)
    prefill = jax.jit(functools.partial(paged_model.prefill_pass, CONFIG, kernels, False))
    found, _ = prefill(
        small, cache, tokens, np.int32(0), np.int32(20), np.arange(5, dtype=np.int32)
    )
    expected = np.asarray(forward(CONFIG, parameters, tokens[None])[0, -1])
    change = np.asarray(found[0]) - expected
    ratio = np.sqrt((change**2).mean() / (expected**2).mean())
    assert 1e-4 < ratio < most
