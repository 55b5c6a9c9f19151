"""Keys and values written into pages by one kernel, against the same by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys import float8
from jaxsys.model.rope import rotate
from jaxsys.serve import page_writes

PAGES = jnp.array([1, 5, 4], jnp.int32)
"""The second is past the last of five."""
OFFSETS = jnp.array([3, 0, 2], jnp.int32)
DTYPE = jnp.bfloat16


def pool_of(form, width):
    """Pages of four tokens and two heads with something in them."""
    x = jax.random.normal(jax.random.key(1), (5, 4, 2, width))
    if form == "bfloat16":
        return x.astype(DTYPE), None
    small, scales = float8.scaled(x, float8.E4M3, axis=-1)
    return small, scales[..., 0]


def put(pool, fresh):
    """What `fresh` [3, 2, K] makes of a pool."""
    array, scales = pool
    if scales is not None:
        fresh, own = float8.scaled(fresh, array.dtype, axis=-1)
        scales = scales.at[PAGES, OFFSETS].set(own[..., 0], mode="drop")
    return array.at[PAGES, OFFSETS].set(fresh, mode="drop"), scales


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            np.testing.assert_array_equal(
                np.asarray(one, np.float32), np.asarray(other, np.float32)
            )


def heads(width, rows):
    x = jax.random.normal(jax.random.key(2), (3, 2, rows, width)).astype(DTYPE)
    return x.at[0, 0].set(0).at[2, 1, -1, 0].set(jnp.nan)


@pytest.mark.parametrize(("form", "width"), [("float8", 24), ("bfloat16", 32)])
def test_pages_hold_what_xla_writes(form, width):
    pools = [pool_of(form, width)] * 2
    x = heads(width, 2)
    fresh = [x[:, :, 0], x[:, :, 1]]
    found = page_writes.write(pools, fresh, PAGES, OFFSETS, interpret=True)
    for got, pool, new in zip(found, pools, fresh, strict=True):
        assert_same(got, put(pool, new))


@pytest.mark.parametrize(
    ("form", "width", "half", "interleaved"),
    [("float8", 32, 16, False), ("bfloat16", 24, 12, True), ("float8", 32, 6, False)],
)
def test_keys_and_queries_are_turned_on_their_way(form, width, half, interleaved):
    pools = [pool_of(form, width)] * 2
    x = heads(width, 5)
    angles = jax.random.normal(jax.random.key(3), (3, half))
    tables = jnp.cos(angles), jnp.sin(angles)
    run = functools.partial(page_writes.turn_and_write, interleaved=interleaved, interpret=True)
    found, q = run(pools, x, *tables, PAGES, OFFSETS)

    @jax.jit
    def turned(x, cosines, sines):
        by_head = (table[:, None, None] for table in (cosines, sines))
        return rotate(x[:, None], *by_head, interleaved=interleaved)[:, 0]

    wanted = turned(x[:, :, :4], *tables)
    np.testing.assert_allclose(
        np.asarray(q, np.float32), np.asarray(wanted[:, :, :3], np.float32), atol=0.02
    )
    # A sum that is rounded otherwise may end beside.
    for got, pool, new in zip(found, pools, (wanted[:, :, 3], x[:, :, 4]), strict=True):
        wide = [np.asarray(a, np.float32) for a in (got[0], put(pool, new)[0])]
        if form == "float8":
            scales = [np.asarray(s)[..., None] for s in (got[1], put(pool, new)[1])]
            wide = [a * s for a, s in zip(wide, scales, strict=True)]
        np.testing.assert_allclose(wide[0], wide[1], atol=0.02 if form == "bfloat16" else 0.3)
    assert_same(found[1], put(pools[1], x[:, :, 4]))


@pytest.mark.parametrize("form", [float8.E4M3, DTYPE])
def test_they_lower_for_a_gpu(form):
    """Whether Triton takes what the interpreter does."""

    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    pool = of((9, 64, 2, 96), form), of((9, 64, 2)) if form == float8.E4M3 else None
    places = of((7,), jnp.int32), of((7,), jnp.int32)
    x, table = of((7, 2, 5, 96), DTYPE), of((7, 32))
    run = jax.jit(page_writes.turn_and_write).trace([pool, pool], x, table, table, *places)
    try:
        text = run.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX lowers for a GPU that is there: {error}")
    assert "write_pages" in text and "output_operand_aliases" in text
