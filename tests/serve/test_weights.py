"""Quantised matrices are as close as their form allows, and products use them as they are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsys import float8, forms
from jaxsys.errors import UsageError
from jaxsys.forms import form_of
from jaxsys.model import forward, initial_parameters, load, preset, save_safetensors
from jaxsys.serve import few_rows, one_row, paged_model
from jaxsys.serve.matrix import Way, group_of, quantised
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.weights import QUANTISATIONS, matmul, serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)


@pytest.fixture(scope="module")
def parameters():
    return initial_parameters(CONFIG, seed=1)


@pytest.fixture(scope="module")
def whole(parameters):
    return serving_weights(CONFIG, parameters)


def meant(matrix):
    """The matrix [K, N] that quantised values stand for."""
    scale = np.asarray(matrix.scale, np.float32)
    if not matrix.packed:
        return (np.asarray(matrix.values.astype(jnp.float32)) * scale[:, None]).T
    codes = np.asarray(matrix.values).view(np.uint8).astype(np.int32)
    numbers = np.concatenate([codes & 15, codes >> 4], axis=-1) - 8
    return (numbers * scale[..., None]).reshape(scale.shape[0], -1).T


def assert_same(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("form", QUANTISATIONS)
def test_matrices_are_made_small_some_outputs_at_a_time(parameters, monkeypatch, form):
    """Ten of 64 and more, the last ones twice: no output knows of another."""
    at_once = serving_weights(CONFIG, parameters, quantisation=form)
    monkeypatch.setattr("jaxsys.serve.weights._AT_ONCE", 10 * CONFIG.hidden_size)
    assert_same(serving_weights(CONFIG, parameters, quantisation=form), at_once)


@pytest.mark.parametrize("form", [None, "int8"])
def test_leaves_that_are_read_as_they_are_fused_are_the_same(parameters, tmp_path, form):
    save_safetensors(tmp_path / "m", CONFIG, parameters)
    model = load(tmp_path / "m", leafwise=True)
    read = serving_weights(model.config, model.parameters, quantisation=form)
    assert_same(read, serving_weights(CONFIG, parameters, quantisation=form))


@pytest.mark.parametrize("form", QUANTISATIONS)
def test_each_weight_is_the_nearest_of_its_column(parameters, whole, form):
    small = serving_weights(CONFIG, parameters, quantisation=form)
    asked = form
    for name in ("qkv", "out", "mlp/up", "mlp/down"):
        form = "int8" if name == "qkv" and asked == "int4" else asked
        exact = np.asarray(whole.layers[1].matrices[name].values)
        matrix = small.layers[1].matrices[name]
        scale = np.asarray(matrix.scale, np.float32)
        assert matrix.values.dtype.itemsize == (4 if form == "int4" else 1)
        assert matrix.values.shape[0] == exact.shape[1]
        error = np.abs(meant(matrix) - exact)
        if form == "int4":
            # Half a step, but for what lies past the end of a group's range.
            scale = np.abs(np.repeat(scale, exact.shape[0] // scale.shape[1], axis=1)).T
            inside = np.abs(exact) <= 7.5 * scale
            assert inside.mean() > 0.95 and (error <= 0.501 * scale)[inside].all()
            continue
        # Half a step of an integer; of e4m3 half a unit in the last of three bits, or half its
        # least number, 2**-9.
        steps = np.maximum(2.0**-4 * np.abs(exact), 2.0**-10 * scale)
        bound = 0.5 * scale if form == "int8" else steps
        assert (error <= 1.001 * bound).all()
        assert error.max() > 0
    assert small.step_bytes < 0.35 * whole.step_bytes


@pytest.mark.parametrize("form", QUANTISATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_values_it_stands_for(parameters, form, dtype):
    matrix = serving_weights(CONFIG, parameters, quantisation=form).layers[0].matrices["out"]
    heads = (CONFIG.num_heads, CONFIG.head_dim)
    x = jax.random.normal(jax.random.key(0), (2, 3, *heads), jnp.dtype(dtype))
    found = matmul(x, matrix, inputs=2)
    expected = np.asarray(x, np.float32).reshape(2, 3, -1) @ meant(matrix)
    assert found.dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, atol=tolerance * np.abs(expected).max()
    )


def test_both_sides_in_float8_are_the_product_of_two_roundings(parameters):
    """As GPUs multiply them; CPUs compute it too, slowly."""
    matrix = serving_weights(CONFIG, parameters, quantisation="fp8", how=Way(both=True)).layers[0]
    matrix = matrix.matrices["mlp/up"]
    x = jax.random.normal(jax.random.key(0), (1, 5, CONFIG.hidden_size))
    x = x.at[0, 3].set(0).at[0, 4].multiply(1e4)
    found = np.asarray(matmul(x, matrix)).reshape(5, -1)
    scale = np.abs(np.asarray(x[0])).max(axis=1, keepdims=True) / 448
    scale[3] = 1
    rounded = (np.asarray(x[0]) / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(found, rounded @ meant(matrix), rtol=1e-4, atol=1e-5 * scale.max())
    assert (found[3] == 0).all()
    sick = np.asarray(matmul(x.at[0, 1, 0].set(jnp.inf), matrix)).reshape(5, -1)
    assert np.isnan(sick[1]).all() and np.isfinite(np.delete(sick, 1, axis=0)).all()


def test_what_errs_straight_into_logits_or_attention_is_int8(parameters):
    """The head in every form, queries, keys and values where the rest has four bits."""
    assert not CONFIG.tie_embeddings
    cases: Any = (("fp8", jnp.float8_e4m3fn), ("int8", jnp.int8))
    for form, of_all in cases:
        small = serving_weights(CONFIG, parameters, quantisation=form)
        assert small.head is not None and small.head.values.dtype == jnp.int8
        assert {m.values.dtype for m in small.layers[0].matrices.values()} == {jnp.dtype(of_all)}
    small = serving_weights(CONFIG, parameters, quantisation="int4")
    assert small.head is not None and small.head.values.dtype == jnp.int8
    packed = {name for name, matrix in small.layers[1].matrices.items() if matrix.packed}
    assert packed == {"out", "mlp/up", "mlp/down"}
    assert [form_of(("attention", name), "int4") for name in ("latent_down", "out")] == [
        "int8", "int4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, "float32") for form in QUANTISATIONS), ("fp8", "bfloat16"),
                        ("int4", "bfloat16")],
)  # fmt: skip
def test_numbers_that_a_form_has_come_back_as_they_are(form, dtype):
    """A matrix that was rounded with more care, or lies so in a file: largest codes of any size."""
    generator = np.random.default_rng(0)
    scale = generator.uniform(1e-3, 1e-1, (64, 4, 1)).astype(np.float32)
    if form == "int4":
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        codes = np.clip(generator.normal(size=(64, 4, 32)) * 2, -8, 7).round()
    else:
        scale = scale[:, :1]
        codes = generator.normal(size=(64, 4, 32)) * 60
        codes[:, 0, 0] = generator.integers(8, 15, 64) * 32 if form == "fp8" else 127
        codes = np.asarray(forms.nearest(jnp.asarray(codes, jnp.float32), form))
    rows = jnp.asarray((codes * scale).reshape(64, 128), jnp.dtype(dtype))
    matrix = quantised(rows.T, form)
    assert matrix.scale is not None
    found = meant(matrix).T
    apart = np.abs(found - (codes * scale).reshape(64, 128)) / scale.max(axis=(1, 2))[:, None]
    # bfloat16 moves the scale by half a percent at most, and no number to another's place.
    largest = {"int4": 8, "int8": 127, "fp8": 448}[form]
    assert apart.max() < (1e-4 if dtype == "float32" else 2.0**-8) * largest


def test_the_kernel_for_few_rows_computes_the_same_product():
    w = jax.random.normal(jax.random.key(1), (512, 64))
    x = jax.random.normal(jax.random.key(0), (3, 512)).astype(jnp.bfloat16)
    matrix = quantised(w, "int4")
    assert matrix.scale is not None and few_rows.fits(matrix.values)
    run = functools.partial(few_rows.product, dtype=jnp.dtype("float32"), turn=48, interpret=True)
    found = run(x, matrix.values, matrix.scale)
    # Rows are whole numbers too, with a scale for each group of inputs.
    small, scale = float8.scaled(x.astype(jnp.float32).reshape(3, 16, 32), jnp.int8, axis=2)
    rounded = np.asarray(small * scale).reshape(3, 512)
    expected = rounded @ meant(matrix)
    # A number halfway between two may be rounded to either.
    far = np.abs(np.asarray(found) - expected)
    assert np.median(far) < 1e-4 and far.max() < 2e-3 * np.abs(expected).max()
    wide = np.asarray(x, np.float32) @ meant(matrix)
    assert np.sqrt(np.mean((found - wide) ** 2) / np.mean(wide**2)) < 0.01
    sick = run(x.at[1, 3].set(jnp.nan).at[2].set(0), matrix.values, matrix.scale)
    assert np.isnan(sick[1]).all() and (sick[2] == 0).all() and np.isfinite(sick[0]).all()


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_the_kernel_for_one_row_computes_the_same_product(form):
    """Of more inputs than a turn takes, the last turn not whole."""
    w = jax.random.normal(jax.random.key(1), (1280, 24))
    x = jax.random.normal(jax.random.key(0), (1, 1280)).astype(jnp.bfloat16)
    matrix = quantised(w, form)
    assert matrix.scale is not None and one_row.fits(matrix.values)
    found = one_row.product(x, matrix.values, matrix.scale, jnp.dtype("float32"), interpret=True)
    expected = np.asarray(x, np.float32) @ meant(matrix)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_one_row_is_a_sum_of_what_the_numbers_stand_for(form):
    w = jax.random.normal(jax.random.key(1), (1024, 16))
    x = jax.random.normal(jax.random.key(0), (1, 1, 1024)).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float32)[0] @ meant(quantised(w, form))
    summed = matmul(x, quantised(w, form, Way(summed_row=True)), dtype=jnp.dtype("float32"))
    np.testing.assert_allclose(np.asarray(summed)[0], expected, rtol=1e-4, atol=1e-3)


def test_groups_of_int4_are_whole_on_each_device():
    assert [group_of(n) for n in (4096, 576, 96, 20, 7)] == [32, 32, 32, 24, 8]
    assert group_of(14336, 4) == 32 and group_of(192, 2) == 32
    with pytest.raises(UsageError, match="int4 weights of 96 inputs are not whole groups of 32"):
        group_of(96, 2)


@pytest.mark.parametrize(("form", "most"), [("int8", 0.02), ("fp8", 0.06), ("int4", 0.2)])
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
