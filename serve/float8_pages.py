"""Attention of one query a request over pages of float8, by a kernel of Pallas for GPUs.

    o = sum_s softmax(q k_s a_s)_s b_s v_s   with the scales a, b of each token and head

A request's pages are shared out among some programs a key/value head, each with a running maximum
and sum (Milakov & Gimelshein, 1805.02867); what they found is joined after them, as FlashDecoding
does. Numbers are widened in registers; scales meet scores and weights, a number each.

Legend: B requests, W pages of a block table, P pages, S tokens a page, G key/value heads, R query
heads for each, K head width, C programs a request and head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 16
"""Query heads of a program, padded: what tensor cores take at least."""
PROGRAMS = 1024
"""To share requests and heads out among; an H200 holds a few on each of its 132 multiprocessors."""
_LOWEST = -1e30


def fits(q: jax.Array, keys: jax.Array) -> bool:
    """Whether the kernel takes these sizes: powers of two, so many query heads a key/value head."""
    sizes = keys.shape[1], keys.shape[3]
    return all(n >= 16 and n & (n - 1) == 0 for n in sizes) and q.shape[2] <= ROWS


def programs_of(batch: int, groups: int, width: int) -> int:
    """Programs that share a request's pages."""
    count = 1
    while count < width and batch * groups * count < PROGRAMS:
        count *= 2
    return count


def decode(
    q: Float[Array, "B G R K"],
    keys: Float[Array, "P S G K"],
    values: Float[Array, "P S G K"],
    scales: tuple[Float[Array, "P S G"], Float[Array, "P S G"]],
    tables: Int[Array, "B W"],
    positions: Int[Array, " B"],
    scale: float,
    *,
    programs: int | None = None,
    warps: int = 4,
    stages: int = 3,
    interpret: bool = False,
) -> Float[Array, "B G R K"]:
    """Each query sees the positions up to its own.

    Args:
        scales: of keys and of values.
        tables: page numbers; entries past a request's pages may be anything.
        scale: of the scores.
        programs: a request and head; a power of two.
        interpret: run it without a GPU, operation by operation.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, groups, rows, width = q.shape
    page_count, page_size = keys.shape[:2]
    parts = programs or programs_of(batch, groups, tables.shape[1])
    tables = jnp.clip(tables, 0, page_count - 1)
    pool = pl.BlockSpec((page_count, page_size, None, width), lambda b, g, c: (0, 0, g, 0))
    of_scales = pl.BlockSpec((page_count, page_size, None), lambda b, g, c: (0, 0, g))
    heads = (None, None, ROWS, width)
    found = pl.pallas_call(
        functools.partial(_kernel, parts=parts, scale=scale),
        grid=(batch, groups, parts),
        in_specs=[
            pl.BlockSpec(heads, lambda b, g, c: (b, g, 0, 0)),
            pool,
            of_scales,
            pool,
            of_scales,
            pl.BlockSpec((None, tables.shape[1]), lambda b, g, c: (b, 0)),
            pl.BlockSpec((None,), lambda b, g, c: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, *heads), lambda b, g, c: (b, g, c, 0, 0)),
            pl.BlockSpec((None, None, None, ROWS), lambda b, g, c: (b, g, c, 0)),
            pl.BlockSpec((None, None, None, ROWS), lambda b, g, c: (b, g, c, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, parts, ROWS, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, parts, ROWS), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, parts, ROWS), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="float8_pages",
    )(
        jnp.pad(q, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0))),
        keys,
        scales[0],
        values,
        scales[1],
        tables,
        positions,
    )
    output, highest, total = (array[:, :, :, :rows] for array in found)
    top = highest.max(axis=2, keepdims=True)
    share = jnp.exp(highest - top)
    joined = (output * share[..., None]).sum(axis=2) / (total * share).sum(axis=2)[..., None]
    return joined.astype(q.dtype)


def _kernel(
    q_ref: Any, k_ref: Any, k_scale_ref: Any, v_ref: Any, v_scale_ref: Any, table_ref: Any,
    position_ref: Any, o_ref: Any, highest_ref: Any, total_ref: Any, *, parts: int, scale: float,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    page_size, width = k_ref.shape[1:]
    part = pl.program_id(2)
    position = position_ref[...]
    pages = position // page_size + 1
    share = (pages + parts - 1) // parts
    first = part * share
    last = jnp.minimum(first + share, pages)
    q = q_ref[...]
    offsets = jnp.arange(page_size, dtype=jnp.int32)

    def turn(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        highest, total, output = carry
        page = table_ref[index]
        k = k_ref[page].astype(q.dtype)
        scores = _dot(q, k, 1) * (k_scale_ref[page] * scale)[None]
        seen = index * page_size + offsets <= position
        scores = jnp.where(seen[None], scores, _LOWEST)
        raised = jnp.maximum(highest, scores.max(axis=1))
        weights = jnp.exp(scores - raised[:, None])
        fade = jnp.exp(highest - raised)
        total = total * fade + weights.sum(axis=1)
        # Behind a request's last token a page may hold anything, NaN too.
        v_scale = jnp.where(seen, v_scale_ref[page], 0.0)
        v = jnp.where(seen[:, None], v_ref[page].astype(q.dtype), 0)
        fresh = _dot((weights * v_scale[None]).astype(q.dtype), v, 0)
        return raised, total, output * fade[:, None] + fresh

    start = (
        jnp.full((ROWS,), _LOWEST, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
        jnp.zeros((ROWS, width), jnp.float32),
    )
    highest, total, output = jax.lax.fori_loop(first, last, turn, start)
    o_ref[...], highest_ref[...], total_ref[...] = output, highest, total


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
