"""x W^T for one row of x and a matrix in a small form, by a kernel of Pallas for GPUs.

A token of one request reads every matrix once and multiplies each number once, which is no work
for tensor cores: a program takes a few outputs, walks over their inputs and adds up products in
float32, number by number. XLA makes such a kernel too, but its own is slower where rows are long,
and it unpacks int4 before it multiplies. On an H200, microseconds of one row:

    outputs x inputs          6144 x 4096   4096 x 4096   28672 x 4096   4096 x 14336
    fp8, XLA's sum                     14             9             35             27
    fp8, this                          14             9             36             19
    int4, this                         13             9             45             27

and int4 4096 x 14336 by tensor cores (`few_rows`) 37.

Legend: N outputs, K inputs, g inputs that share a scale.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.model.grouped_triton import load_block, span

LONG = 8192
"""Inputs from which the kernel is quicker than XLA's sum of numbers that are not packed."""
OUTPUTS = 4
"""Of one program."""
_NUMBERS, _PAIRS = 1024, 512
"""Inputs of a turn."""


def product(
    x: Float[Array, "1 K"],
    values: Float[Array, "N K"],
    scale: Float[Array, " N"],
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "1 N"]:
    """The product with numbers of one byte and a scale for each output.

    Args:
        interpret: run it without a GPU, operation by operation.
    """
    kernel = functools.partial(_of_numbers, inputs=values.shape[1])
    return _call(kernel, x.reshape(-1), values, scale, dtype, interpret)


def packed_product(
    x: Float[Array, "1 K"],
    values: jax.Array,
    scale: Float[Array, "N K/g"],
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "1 N"]:
    """The product with int4 numbers [N, K / g, g / 2], as `few_rows` has them."""
    size, groups, half = values.shape
    halves = x.reshape(groups, 2, half).swapaxes(0, 1).reshape(2, -1)
    kernel = functools.partial(_of_pairs, pairs=groups * half, half=half)
    return _call(kernel, halves, values.reshape(size, -1), scale, dtype, interpret)


def fits(values: jax.Array) -> bool:
    """Whether the kernel takes these values: whole blocks of outputs, groups of powers of two."""
    half = values.shape[-1]
    packed = values.ndim == 3
    whole = not packed or (16 <= half <= _PAIRS and half & (half - 1) == 0)
    return whole and values.shape[0] % OUTPUTS == 0


def _call(kernel: Any, x: Any, values: Any, scale: Any, dtype: Any, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    size = values.shape[0]
    return pl.pallas_call(
        kernel,
        grid=(size // OUTPUTS,),
        out_shape=jax.ShapeDtypeStruct((size,), dtype),
        compiler_params=triton.CompilerParams(num_warps=2, num_stages=2),
        interpret=interpret,
        name="one_row",
    )(x, values, scale)[None]


def _of_numbers(x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, inputs: int) -> None:
    row = _rows()

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        k, inside = span(index * _NUMBERS, _NUMBERS, inputs)
        w = load_block(w_ref, row, k, inside[None]).astype(jnp.float32)
        return sums + w * _part(x_ref, (k,), inside)[None]

    start = jnp.zeros((OUTPUTS, _NUMBERS), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-inputs // _NUMBERS), turn, start)
    o_ref[row] = (sums.sum(axis=1) * scale_ref[row]).astype(o_ref.dtype)


def _of_pairs(x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, pairs: int, half: int) -> None:
    row = _rows()
    many = _PAIRS // half

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        k, inside = span(index * _PAIRS, _PAIRS, pairs)
        codes = load_block(w_ref, row, k, inside[None]).astype(jnp.int32)
        # 128 and a number from 0 to 15, written behind the point: no integer is converted.
        low, high = (
            jax.lax.bitcast_convert_type(bits | 0x43000000, jnp.float32) - 136.0
            for bits in ((codes & 15) << 16, (codes & 0xF0) << 12)
        )
        found = low * _part(x_ref, (0, k), inside)[None]
        found += high * _part(x_ref, (1, k), inside)[None]
        group, there = span(index * many, many, pairs // half)
        scale = load_block(scale_ref, row, group, there[None])
        each = jax.lax.broadcast_in_dim(scale, (OUTPUTS, many, half), (0, 1))
        return sums + found * each.reshape(found.shape)

    start = jnp.zeros((OUTPUTS, _PAIRS), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-pairs // _PAIRS), turn, start)
    o_ref[row] = sums.sum(axis=1).astype(o_ref.dtype)


def _rows() -> jax.Array:
    from jax.experimental import pallas as pl

    return pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS, dtype=jnp.int32)


def _part(x_ref: Any, place: tuple[Any, ...], inside: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.load(x_ref.at[place], mask=inside, other=0.0).astype(jnp.float32)
