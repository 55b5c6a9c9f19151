"""New keys and values into their pages by one kernel of Pallas for GPUs, in place.

A step writes a few numbers a layer, in float8 with a scale a token and head. XLA makes two kernels
of them at least, seven to ten with float8 (largest numbers, casts, one update a pool), and one more
for each of what is turned by its position, all of one or two microseconds. Here a program takes one
head of one token, turns it and its queries where asked, and writes all there is of it.

Legend: N tokens, P pages, S tokens a page, G key/value heads, R query heads for each, K numbers of
a head, W of them turned.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys import float8
from jaxsys.model.grouped_triton import span

Pool = tuple[jax.Array, jax.Array | None]
"""Pages [P, S, G, K] and, where they are float8, scales [P, S, G]."""


def write(
    pools: Sequence[Pool],
    fresh: Sequence[Float[Array, "N G K"]],
    pages: Int[Array, " N"],
    offsets: Int[Array, " N"],
    *,
    interpret: bool = False,
) -> list[Pool]:
    """The pools with each of `fresh` at its tokens' places; those past the last page are dropped.

    Args:
        offsets: within the pages.
        interpret: run it without a GPU, operation by operation.
    """
    return _call(_write, pools, (*fresh,), pages, offsets, None, interpret)[0]


def turn_and_write(
    pools: Sequence[Pool],
    fused: Float[Array, "N G R+2 K"],
    cosines: Float[Array, "N W/2"],
    sines: Float[Array, "N W/2"],
    pages: Int[Array, " N"],
    offsets: Int[Array, " N"],
    *,
    interleaved: bool = False,
    interpret: bool = False,
) -> tuple[list[Pool], Float[Array, "N G R K"]]:
    """As `write`, of keys that are turned first, and their queries, turned too.

    Args:
        fused: queries, then the key and the value, before they are turned.
        cosines: with `sines`, of each token, as `jaxsys.model.rope.rotate` takes them.
        interleaved: whether neighbours are turned together, not halves.
        interpret: run it without a GPU, operation by operation.
    """
    tokens, groups, heads, width = fused.shape
    queries = jax.ShapeDtypeStruct((tokens, groups, heads - 2, width), fused.dtype)
    body = functools.partial(_turn_and_write, interleaved=interleaved)
    held, (q,) = _call(body, pools, (fused, cosines, sines), pages, offsets, queries, interpret)
    return held, q


def _call(
    body: Any,
    pools: Sequence[Pool],
    given: tuple[jax.Array, ...],
    pages: jax.Array,
    offsets: jax.Array,
    more: jax.ShapeDtypeStruct | None,
    interpret: bool,
) -> tuple[list[Pool], list[jax.Array]]:
    """A program for each token and head; `body` gets refs of both's own and of whole pools."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    held = [array for pool in pools for array in pool if array is not None]
    scaled = [scales is not None for _, scales in pools]

    def own(array: Any) -> Any:
        """By token, and by head where there are heads."""
        if array.ndim < 3:
            rest = array.shape[1:]
            return pl.BlockSpec((None, *rest), lambda n, g: (n, *(0 for _ in rest)))
        rest = array.shape[2:]
        return pl.BlockSpec((None, None, *rest), lambda n, g: (n, g, *(0 for _ in rest)))

    whole = [pl.BlockSpec(a.shape, lambda n, g, ndim=a.ndim: (0,) * ndim) for a in held]
    before, results = 2 + len(given), [] if more is None else [more]

    def kernel(pages_ref: Any, offsets_ref: Any, *refs: Any) -> None:
        mine, found = refs[: len(given)], refs[len(given) + len(held) :]
        places = _Place(pages_ref[...], offsets_ref[...], pl.program_id(1))
        body(mine, places, _pairs(scaled, found), found[len(held) :])

    done = pl.pallas_call(
        kernel,
        grid=(pages.shape[0], given[0].shape[1]),
        in_specs=[own(pages), own(offsets), *map(own, given), *whole],
        out_specs=[*whole, *map(own, results)],
        out_shape=[*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in held), *results],
        input_output_aliases={before + index: index for index in range(len(held))},
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="write_pages",
    )(pages, offsets, *given, *held)
    return list(_pairs(scaled, done)), list(done[len(held) :])


class _Place(NamedTuple):
    page: Any
    offset: Any
    head: Any


class _Part(NamedTuple):
    """Some numbers of a head."""

    at: jax.Array
    there: jax.Array
    values: jax.Array


def _pairs(scaled: Sequence[bool], arrays: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each pool with its scales, if it has any."""
    rest = iter(arrays)
    return [(next(rest), next(rest) if small else None) for small in scaled]


def _write(mine: Any, place: _Place, pools: Any, _: Any) -> None:
    for x_ref, pool in zip(mine, pools, strict=True):
        _put([_read(x_ref, (), 0, x_ref.shape[0])], place, *pool)


def _turn_and_write(
    mine: Any, place: _Place, pools: Any, results: Any, *, interleaved: bool
) -> None:
    from jax.experimental.pallas import triton

    x_ref, cosines_ref, sines_ref = mine
    (q_ref,) = results
    heads, width = x_ref.shape
    half = cosines_ref.shape[0]
    cosines, sines = (_read(ref, (), 0, half).values for ref in (cosines_ref, sines_ref))
    for row in range(heads - 1):
        first, second = (
            _read(x_ref, (row,), at, half, step=2 if interleaved else 1)
            for at in (0, 1 if interleaved else half)
        )
        a, b = first.values.astype(jnp.float32), second.values.astype(jnp.float32)
        parts = [
            first._replace(values=(a * cosines - b * sines).astype(x_ref.dtype)),
            second._replace(values=(b * cosines + a * sines).astype(x_ref.dtype)),
        ]
        if width > 2 * half:
            parts.append(_read(x_ref, (row,), 2 * half, width - 2 * half))
        if row == heads - 2:
            _put(parts, place, *pools[0])
            continue
        for part in parts:
            triton.store(q_ref.at[row, part.at], part.values, mask=part.there)
    _put([_read(x_ref, (heads - 1,), 0, width)], place, *pools[1])


def _read(ref: Any, lead: tuple[int, ...], start: int, size: int, step: int = 1) -> _Part:
    from jax.experimental.pallas import triton

    count, there = span(jnp.int32(0), 1 << (size - 1).bit_length(), size)
    index = start + count * step
    return _Part(index, there, triton.load(ref.at[(*lead, index)], mask=there, other=0.0))


def _put(parts: Sequence[_Part], place: _Place, pool_ref: Any, scale_ref: Any) -> None:
    """One head of one token into a pool, unless its page is past the last."""
    from jax.experimental.pallas import triton

    real = place.page < pool_ref.shape[0]
    wide = [part.values.astype(jnp.float32) for part in parts]
    scale = None
    if scale_ref is not None:
        most = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(values)) for values in wide])
        scale = float8.scale_of(most, pool_ref.dtype)
        triton.store(scale_ref.at[place.page, place.offset, place.head], scale, mask=real)
    for part, values in zip(parts, wide, strict=True):
        small = part.values if scale is None else float8.cast(values / scale, pool_ref.dtype)
        at = pool_ref.at[place.page, place.offset, place.head, part.at]
        triton.store(at, small.astype(pool_ref.dtype), mask=part.there & real)
