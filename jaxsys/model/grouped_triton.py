"""Triton kernels of `jaxsys.model.grouped`, through Pallas; on CPUs they run interpreted, in tests.

A program multiplies one tile of an expert's rows with a block of that expert's columns, summing
over K in float32. MXFP4 matrices are unpacked in registers: the two halves of a byte are K's even
and odd numbers, so rows come as their even and odd channels and nothing is put back in order. For
bfloat16 codes are moved to where a sign, exponent and mantissa stand, two to an instruction, and
multiplied by a power of two.

Legend: R rows, E experts, K inputs, N outputs, T tiles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxsys.model.packed import BLOCK, Packed, decoded, factor


class Tiles(NamedTuple):
    """Which rows of which expert a tile has; those past `used` have none."""

    expert: Int[Array, " T"]
    start: Int[Array, " T"]
    stop: Int[Array, " T"]
    """Of the expert's rows: a tile may end before."""
    used: Int[Array, ""]
    """How many there are."""


def tiles(sizes: Int[Array, " E"], rows: int, height: int) -> Tiles:
    """Cuts the rows of each expert into tiles of `height`; T is as many as there can be."""
    experts = sizes.shape[0]
    most = rows // height + min(experts, rows)
    each = -(-sizes // height)
    ends = jnp.cumsum(each)
    tile = jnp.arange(most, dtype=jnp.int32)
    # Counted, not searched for: a search is a loop, whose every turn the host of a GPU waits for.
    expert = jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    before = jnp.cumsum(sizes)
    start = (before - sizes)[expert] + (tile - (ends - each)[expert]) * height
    there = tile < ends[-1]
    return Tiles(
        expert,
        jnp.where(there, start, 0).astype(jnp.int32),
        jnp.where(there, before[expert], 0).astype(jnp.int32),
        ends[-1].astype(jnp.int32),
    )


def single(experts: Int[Array, " R"]) -> Tiles:
    """A tile each for rows in any order: nothing is sorted, and an expert of two is read twice."""
    rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
    return Tiles(experts.astype(jnp.int32), rows, rows + 1, jnp.int32(experts.shape[0]))


class Blocks(NamedTuple):
    """Sizes of a program."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def height_for(rows: int, experts: int) -> int:
    """Tiles as high as experts have rows."""
    return _power(-(-rows // experts), 16, 128)


def blocks_for(height: int, rows: int, inputs: int, *, packed: bool = False) -> Blocks:
    """A program's sizes for tiles of `height`: narrow where reading weights is the work.

    Args:
        height: rows of a tile.
        rows: in all.
        inputs: K, or pairs where they are packed.
        packed: whether numbers are unpacked first: the work is that, and done once a tile.
    """
    height = max(16, height)  # what a tensor core multiplies at least
    if packed:
        if height > 16:
            return Blocks(height, 128, _power(inputs, 16, 64), 8, 3)
        if rows > 16:
            return Blocks(16, 128, _power(inputs, 16, 64), 4, 3)
        return Blocks(16, 64, _power(inputs, 16, 128), 4, 3)
    deep = 128 if height == 16 else 64
    depth = next(
        (d for d in (128, 64, 32) if d <= deep and inputs % d == 0), _power(inputs, 16, 64)
    )
    if height == 16:
        return Blocks(16, 32 if rows <= 128 else 64, depth, 4, 4)
    if height == 32:
        return Blocks(32, 64, depth, 4, 4)
    if height == 64:
        return Blocks(64, 128, depth, 4, 3)
    return Blocks(height, 256, depth, 8, 4)


def product(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E K N"],
    cut: Tiles,
    blocks: Blocks,
    *,
    outputs_first: bool = False,
    share: int = 1,
    interpret: bool | None = None,
) -> Float[Array, "share*R N"]:
    """Each row with the matrix of its tile's expert; every row must be in a tile.

    Args:
        cut: tiles of at most `blocks.rows` rows.
        outputs_first: whether weights are [E, N, K].
        share: so many rows of the result in turn read the same row.
        interpret: run without a GPU; where there is none if None.
    """
    count, inputs = rows.shape
    outputs = weights.shape[1 if outputs_first else 2]
    kernel = functools.partial(
        _product_kernel,
        blocks=blocks,
        inputs=inputs,
        outputs=outputs,
        outputs_first=outputs_first,
        share=share,
    )
    shape = (share * count, outputs)
    return _call(kernel, blocks, cut, (rows, weights), shape, rows.dtype, interpret)


def packed_product(
    rows: Float[Array, "R K"],
    weights: Packed,
    cut: Tiles,
    blocks: Blocks,
    *,
    share: int = 1,
    interpret: bool | None = None,
) -> Float[Array, "share*R N"]:
    """As `product`, of packed matrices [E, N, K]; `blocks.inputs` counts pairs."""
    count, inputs = rows.shape
    outputs = weights.codes.shape[1]
    interpret = _no_gpu() if interpret is None else interpret
    kernel = functools.partial(
        _packed_kernel,
        blocks=blocks,
        inputs=inputs // 2,
        outputs=outputs,
        share=share,
        # The shortest numbers are subnormal on their way, which CPUs take for zero.
        unpack=_by_bits if rows.dtype == jnp.bfloat16 and not interpret else _by_cases,
    )
    operands = (rows[:, 0::2], rows[:, 1::2], weights.codes, weights.exponents)
    return _call(kernel, blocks, cut, operands, (share * count, outputs), rows.dtype, interpret)


def _call(kernel, blocks, cut, operands, shape, dtype, interpret) -> jax.Array:
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(cut.expert.shape[0], -(-shape[1] // blocks.outputs)),
        interpret=_no_gpu() if interpret is None else interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    )
    return call(cut.expert, cut.start, cut.stop, *operands)


def _no_gpu() -> bool:
    return jax.default_backend() == "cpu"


def outer(
    rows: Float[Array, "R K"],
    others: Float[Array, "R N"],
    sizes: Int[Array, " E"],
    blocks: Blocks | None = None,
    *,
    interpret: bool | None = None,
) -> Float[Array, "E K N"]:
    """Each expert's rows, turned, with its other rows: what a product's gradient is for weights."""
    (count, inputs), outputs, experts = rows.shape, others.shape[1], sizes.shape[0]
    if blocks is None:
        height = min(64, _power(-(-count // experts), 16, 64))
        blocks = Blocks(height, _power(outputs, 16, 256), _power(inputs, 16, 128), 8, 4)
    stops = jnp.cumsum(sizes).astype(jnp.int32)
    kernel = functools.partial(_outer_kernel, blocks=blocks, inputs=inputs, outputs=outputs)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((experts, inputs, outputs), rows.dtype),
        grid=(-(-inputs // blocks.inputs), -(-outputs // blocks.outputs), experts),
        out_specs=pl.BlockSpec((None, inputs, outputs), lambda i, j, expert: (expert, 0, 0)),
        interpret=_no_gpu() if interpret is None else interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    )(stops - sizes.astype(jnp.int32), stops, rows, others)


# Kernels ------------------------------------------------------------------------------------------


def span(start: jax.Array, size: int, end: Any) -> tuple[jax.Array, jax.Array]:
    """Indices from `start`, and which of them are before `end`."""
    index = start + jnp.arange(size, dtype=jnp.int32)
    return index, index < end


def load_block(ref: Any, first: jax.Array, second: jax.Array, seen: Any, expert: Any = None) -> Any:
    """A block; of one expert's matrix where it is given: Triton takes a single index."""
    places = (first[:, None], second[None, :])
    # Triton casts no integer to a float of eight bits.
    other = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    place = ref.at[places if expert is None else (expert, *places)]
    return triton.load(place, mask=seen, other=other)


def _both(first, second):
    return first[:, None] & second[None, :]


def _product_kernel(
    expert_ref,
    start_ref,
    stop_ref,
    x_ref,
    w_ref,
    out_ref,
    *,
    blocks,
    inputs,
    outputs,
    outputs_first,
    share,
):
    tile, part = pl.program_id(0), pl.program_id(1)
    expert, start, stop = expert_ref[tile], start_ref[tile], stop_ref[tile]

    @pl.when(start < stop)
    def _():
        row, of_expert = span(start, blocks.rows, stop)
        column, there = span(part * blocks.outputs, blocks.outputs, outputs)

        def turn(step, total):
            k, inside = span(step * blocks.inputs, blocks.inputs, inputs)
            x = load_block(x_ref, row // share, k, _both(of_expert, inside))
            if outputs_first:
                w = load_block(w_ref, column, k, _both(there, inside), expert).astype(x.dtype).T
            else:
                w = load_block(w_ref, k, column, _both(inside, there), expert).astype(x.dtype)
            return total + triton.dot(x, w)

        zeros = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
        total = jax.lax.fori_loop(0, -(-inputs // blocks.inputs), turn, zeros)
        _store(out_ref, row, column, total, _both(of_expert, there))


def _packed_kernel(
    expert_ref, start_ref, stop_ref, even_ref, odd_ref, codes_ref, exponents_ref, out_ref,
    *, blocks, inputs, outputs, share, unpack,
):  # fmt: skip
    tile, part = pl.program_id(0), pl.program_id(1)
    expert, start, stop = expert_ref[tile], start_ref[tile], stop_ref[tile]
    # Numbers of a block whose codes lie in one program: exponents are read once.
    alike = BLOCK // 2
    many = blocks.inputs // alike

    @pl.when(start < stop)
    def _():
        row, of_expert = span(start, blocks.rows, stop)
        column, there = span(part * blocks.outputs, blocks.outputs, outputs)

        def turn(step, total):
            k, inside = span(step * blocks.inputs, blocks.inputs, inputs)
            own, seen = _both(of_expert, inside), _both(there, inside)
            even, odd = (load_block(ref, row // share, k, own) for ref in (even_ref, odd_ref))
            codes = load_block(codes_ref, column, k, seen, expert)
            block, within = span(step * many, many, inputs // alike)
            exponents = load_block(exponents_ref, column, block, _both(there, within), expert)
            each = jax.lax.broadcast_in_dim(exponents, (blocks.outputs, many, alike), (0, 1))
            low, high = unpack(codes, each.reshape(codes.shape), even.dtype)
            return total + triton.dot(even, low.T) + triton.dot(odd, high.T)

        zeros = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
        total = jax.lax.fori_loop(0, -(-inputs // blocks.inputs), turn, zeros)
        if unpack is _by_bits:
            total *= jnp.float32(2.0**_AFTER)
        _store(out_ref, row, column, total, _both(of_expert, there))


def _by_cases(codes, exponents, dtype):
    """Both halves' numbers, of any dtype."""
    pair, scale = codes.astype(jnp.int32), factor(exponents)
    return tuple((decoded(half) * scale).astype(dtype) for half in (pair & 15, pair >> 4))


_AFTER = 26
"""Powers of two that sums of numbers by bits lack: with them each number times its scale is one
product within bfloat16's range, for exponents up to `packed.LARGEST`."""


def _by_bits(codes, exponents, dtype):
    """The same in bfloat16, over 2**`_AFTER`, four numbers at a time.

    A code's last three bits are put behind bfloat16's sign, as the end of its exponent and the
    beginning of its mantissa, which is its number times 2**-126, zero and a half included.
    """
    scale = exponents.astype(jnp.int16) + (126 - _AFTER)
    scale = jax.lax.bitcast_convert_type(scale << 7, dtype)
    like = jax.ShapeDtypeStruct(codes.shape, dtype)
    return tuple(
        triton.elementwise_inline_asm(
            _UNPACK.format(*shifts),
            args=[codes, scale],
            constraints="=&r,=&r,r,r,r",
            pack=4,
            result_shape_dtypes=[like],
        )[0]
        for shifts in ((6, 12), (2, 8))
    )


_UNPACK = """{{
.reg .b32 pair, sign, none;
mov.b32 none, 0x80008000;
prmt.b32 pair, $2, 0, 0x4140;
shl.b32 sign, pair, {1}; shl.b32 pair, pair, {0};
and.b32 sign, sign, 0x80008000; and.b32 pair, pair, 0x01C001C0; or.b32 pair, pair, sign;
fma.rn.bf16x2 $0, pair, $3, none;
prmt.b32 pair, $2, 0, 0x4342;
shl.b32 sign, pair, {1}; shl.b32 pair, pair, {0};
and.b32 sign, sign, 0x80008000; and.b32 pair, pair, 0x01C001C0; or.b32 pair, pair, sign;
fma.rn.bf16x2 $1, pair, $4, none;
}}"""
"""PTX: two bytes to the halves of a register, a half's code to its place, times its scale."""


def _outer_kernel(start_ref, stop_ref, x_ref, y_ref, out_ref, *, blocks, inputs, outputs):
    expert = pl.program_id(2)
    start, stop = start_ref[expert], stop_ref[expert]
    k, inside = span(pl.program_id(0) * blocks.inputs, blocks.inputs, inputs)
    column, there = span(pl.program_id(1) * blocks.outputs, blocks.outputs, outputs)

    def turn(step, total):
        row, own = span(start + step * blocks.rows, blocks.rows, stop)
        x = load_block(x_ref, row, k, _both(own, inside))
        y = load_block(y_ref, row, column, _both(own, there))
        return total + triton.dot(x.T, y)

    zeros = jnp.zeros((blocks.inputs, blocks.outputs), jnp.float32)
    turns = (stop - start + blocks.rows - 1) // blocks.rows
    total = jax.lax.fori_loop(0, turns, turn, zeros)
    _store(out_ref, k, column, total, _both(inside, there))


def _store(ref, first, second, values, seen):
    place = ref.at[first[:, None], second[None, :]]
    triton.store(place, values.astype(ref.dtype), mask=seen)


def _power(value: int, least: int, most: int) -> int:
    """The next power of two, within bounds."""
    return min(most, max(least, 1 << (value - 1).bit_length()))
