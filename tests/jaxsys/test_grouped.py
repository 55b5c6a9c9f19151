"""Products with experts' matrices equal those of each row alone, whatever computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import grouped, grouped_triton
from jaxsys.model.packed import VALUES, Packed, unpacked

EXPERTS, INPUTS, OUTPUTS = 5, 64, 24
SIZES = {
    "some without rows": [3, 0, 17, 0, 2],
    "one has all": [0, 0, 0, 22, 0],
    "one each": [1, 1, 1, 1, 1],
}


@pytest.fixture(params=SIZES)
def sizes(request):
    return np.array(SIZES[request.param], np.int32)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed_weights():
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 256, (EXPERTS, OUTPUTS, INPUTS // 2)).astype(np.uint8)
    exponents = generator.integers(120, 130, (EXPERTS, OUTPUTS, INPUTS // 32)).astype(np.uint8)
    return Packed(jnp.asarray(codes), jnp.asarray(exponents))


def by_row(rows, weights, sizes):
    """weights [E, N, K]."""
    experts = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([weights[e] @ row for row, e in zip(rows, experts, strict=True)])


def test_all_codes_stand_for_their_values():
    codes = jnp.asarray(np.arange(16, dtype=np.uint8)[None])
    found = np.asarray(unpacked(Packed(codes, jnp.full((1, 1), 128, np.uint8))))
    wanted = np.stack([VALUES, np.full(16, VALUES[0])], axis=-1).reshape(1, 32)
    np.testing.assert_array_equal(found, 2 * wanted)
    high = np.asarray(unpacked(Packed(codes << 4, jnp.full((1, 1), 127, np.uint8))))
    np.testing.assert_array_equal(high[0, 1::2], VALUES)


def sorted_work(sizes):
    rows = int(sizes.sum())
    height = grouped_triton.height_for(rows, EXPERTS)
    return grouped.Work(grouped_triton.tiles(jnp.asarray(sizes), rows, height), height, 1)


def given(form, sizes):
    """Weights, what they stand for [E, N, K]; those of unused experts are NaN where they can be."""
    if form == "packed":
        weights = packed_weights()
        return weights, np.asarray(unpacked(weights))
    values = normal((EXPERTS, OUTPUTS, INPUTS), 1)
    return jnp.asarray(np.where((sizes > 0)[:, None, None], values, np.nan)), values


@pytest.mark.parametrize("way", ["walk", "triton"])
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_each_row_meets_its_experts_matrix_and_no_other(sizes, form, way):
    rows = normal((sizes.sum(), INPUTS))
    weights, values = given(form, sizes)
    found = grouped.used_product(jnp.asarray(rows), weights, sorted_work(sizes), way)
    np.testing.assert_allclose(found, by_row(rows, values, sizes), atol=2e-4)


@pytest.mark.parametrize("way", ["walk", "triton"])
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_few_rows_are_not_sorted(form, way):
    """Three tokens with two experts each; outputs of two axes."""
    chosen = np.array([[4, 0], [2, 4], [2, 1]])
    weights, values = given(form, np.ones(EXPERTS, np.int32))
    weights = jax.tree.map(lambda leaf: leaf.reshape(EXPERTS, 2, -1, leaf.shape[-1]), weights)
    rows = normal((3, INPUTS))
    assert grouped.work_of(jnp.asarray(chosen), 11).places is not None
    plan = grouped.work_of(jnp.asarray(chosen), 12)
    assert plan.places is None and plan.work.share == 2
    found = grouped.used_product(jnp.asarray(rows), weights, plan.work, way)
    wanted = np.stack([values[e] @ rows[i // 2] for i, e in enumerate(chosen.reshape(-1))])
    np.testing.assert_allclose(found, wanted.reshape(6, 2, -1), atol=2e-4)


def test_the_kernels_gradients_are_those_of_ragged_dot(sizes):
    rows, weights = normal((sizes.sum(), INPUTS)), normal((EXPERTS, INPUTS, OUTPUTS), 1)
    weight = normal((sizes.sum(), OUTPUTS), 2)

    def loss(product):
        return lambda rows, weights: jnp.sum(product(rows, weights, sizes) * weight)

    found = jax.grad(loss(grouped._product), (0, 1))(rows, weights)
    wanted = jax.grad(loss(jax.lax.ragged_dot), (0, 1))(rows, weights)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_tiles_cover_each_row_once(sizes):
    for height in (1, 4, 16):
        cut = grouped_triton.tiles(jnp.asarray(sizes), int(sizes.sum()), height)
        covered = []
        for tile in range(int(cut.used)):
            stop = min(int(cut.stop[tile]), int(cut.start[tile]) + height)
            covered += [(int(cut.expert[tile]), row) for row in range(int(cut.start[tile]), stop)]
        wanted = [(e, r) for r, e in enumerate(np.repeat(np.arange(EXPERTS), sizes))]
        assert covered == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn", "packed"])
def test_kernels_lower_for_a_gpu(dtype):
    """Whether Triton takes what the interpreter does: no GPU is needed to see that."""
    rows = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    blocks = grouped_triton.blocks_for(16, 64, 128)

    def of(shape, kind):
        return jax.ShapeDtypeStruct((8, *shape), jnp.dtype(kind))

    def run(rows, weights, sizes):
        cut = grouped_triton.tiles(sizes, 64, 16)
        if dtype == "packed":
            return grouped_triton.packed_product(rows, weights, cut, blocks, interpret=False)
        return grouped_triton.product(
            rows, weights, cut, blocks, outputs_first=True, interpret=False
        )

    weights = of((48, 256), dtype) if dtype != "packed" else None
    if weights is None:
        weights = Packed(of((48, 128), "uint8"), of((48, 8), "uint8"))  # pyright: ignore
    traced = jax.jit(run).trace(rows, weights, sizes)
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX lowers for a GPU that is there: {error}")
    assert "triton" in text
