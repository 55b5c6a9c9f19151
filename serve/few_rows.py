"""x W^T for a few rows of x and a quantised matrix, read once, by a kernel of Pallas for GPUs.

Such a product takes as long as its matrix takes to be read. Each program has some outputs: it walks
over the inputs, widens the small numbers in registers, and lets tensor cores multiply by x, padded
to `MOST` rows. Scales meet the sums, not the numbers: those of outputs at the end, those of int4's
groups after each group.

Legend: M rows, N outputs, K inputs, g inputs of a group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST = 16
"""Rows, which is what tensor cores take at least."""
OUTPUTS = 32
"""Of one program."""
INPUTS = 256
"""Of one turn of its walk, for eight-bit numbers."""


def unpacked(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bytes [..., n] to int8 numbers from -8 to 7: those of the lower halves, and the upper."""
    low = (values & 15).astype(jnp.int8) - 8
    return low, (values >> 4).astype(jnp.int8) - 8


def fits(values: jax.Array, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes these values: sizes in whole blocks, 16-bit x."""
    if dtype not in (jnp.bfloat16, jnp.float16) or values.shape[0] % OUTPUTS:
        return False
    if values.ndim == 3:
        half = values.shape[2]
        return half >= 16 and half & (half - 1) == 0
    return values.shape[1] % INPUTS == 0


def product(
    x: Float[Array, "M K"],
    values: jax.Array,
    scale: jax.Array,
    dtype: jnp.dtype,
    *,
    outputs: int = OUTPUTS,
    inputs: int = INPUTS,
    warps: int = 4,
    stages: int = 4,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product with values [N, K] (scales [N]) or packed int4 [N, K / g, g / 2] ([N, K / g]).

    Args:
        outputs: of one program.
        inputs: of one turn; of int4 it is a group.
        interpret: run it without a GPU, operation by operation.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, size = x.shape[0], values.shape[0]
    x = jnp.pad(x, ((0, MOST - rows), (0, 0)))
    packed = values.ndim == 3
    if packed:
        groups, half = values.shape[1:]
        x = x.reshape(MOST, groups, 2, half)
        body = functools.partial(_int4_kernel, groups=groups)
        specs = [
            pl.BlockSpec(x.shape, lambda n: (0, 0, 0, 0)),
            pl.BlockSpec((outputs, groups, half), lambda n: (n, 0, 0)),
            pl.BlockSpec((outputs, groups), lambda n: (n, 0)),
        ]
    else:
        body = functools.partial(_byte_kernel, inputs=inputs)
        specs = [
            pl.BlockSpec(x.shape, lambda n: (0, 0)),
            pl.BlockSpec((outputs, values.shape[1]), lambda n: (n, 0)),
            pl.BlockSpec((outputs,), lambda n: (n,)),
        ]
    call = pl.pallas_call(
        body,
        grid=(size // outputs,),
        in_specs=specs,
        out_specs=pl.BlockSpec((MOST, outputs), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((MOST, size), dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="few_rows",
    )
    return call(x, values, scale)[:rows]


ONE_ROW = {"outputs": 8, "inputs": 1024, "warps": 4, "stages": 3}


def fits_one(values: jax.Array) -> bool:
    """Whether `one_row` takes these values: sizes in whole blocks."""
    return values.shape[0] % ONE_ROW["outputs"] == 0 and values.shape[1] % ONE_ROW["inputs"] == 0


def one_row(
    x: Float[Array, "1 K"],
    values: Array,
    scale: Array,
    dtype: jnp.dtype,
    *,
    outputs: int = ONE_ROW["outputs"],
    inputs: int = ONE_ROW["inputs"],
    warps: int = ONE_ROW["warps"],
    stages: int = ONE_ROW["stages"],
    interpret: bool = False,
) -> Float[Array, "1 N"]:
    """One row times [N, K] in eight bits, without tensor cores: numbers times numbers, summed."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    size, length = values.shape
    call = pl.pallas_call(
        functools.partial(_one_row_kernel, inputs=inputs),
        grid=(size // outputs,),
        in_specs=[
            pl.BlockSpec((None, length), lambda n: (0, 0)),
            pl.BlockSpec((outputs, length), lambda n: (n, 0)),
            pl.BlockSpec((outputs,), lambda n: (n,)),
        ],
        out_specs=pl.BlockSpec((None, outputs), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((1, size), dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="one_row",
    )
    return call(x, values, scale)


def _one_row_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, inputs: int) -> None:
    from jax.experimental import pallas as pl

    outputs, size = w_ref.shape

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        part = pl.ds(index * inputs, inputs)
        x = x_ref[part].astype(jnp.float32)
        return sums + w_ref[:, part].astype(jnp.float32) * x[None]

    start = jnp.zeros((outputs, inputs), jnp.float32)
    sums = jax.lax.fori_loop(0, size // inputs, turn, start).sum(axis=1)
    o_ref[...] = (sums * scale_ref[...]).astype(o_ref.dtype)


def _byte_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, inputs: int) -> None:
    from jax.experimental import pallas as pl

    outputs, size = w_ref.shape

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        part = pl.ds(index * inputs, inputs)
        x = x_ref[:, part]
        return sums + _dot(x, w_ref[:, part].astype(x.dtype))

    start = jnp.zeros((MOST, outputs), jnp.float32)
    sums = jax.lax.fori_loop(0, size // inputs, turn, start)
    o_ref[...] = (sums * scale_ref[...][None]).astype(o_ref.dtype)


def _int4_kernel(x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, groups: int) -> None:
    outputs = w_ref.shape[0]

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        codes = w_ref[:, index].astype(jnp.int32)
        x = x_ref[:, index, 0], x_ref[:, index, 1]
        low, high = ((part - 8).astype(x[0].dtype) for part in (codes & 15, codes >> 4))
        found = _dot(x[0], low) + _dot(x[1], high)
        return sums + found * scale_ref[:, index][None]

    start = jnp.zeros((MOST, outputs), jnp.float32)
    o_ref[...] = jax.lax.fori_loop(0, groups, turn, start).astype(o_ref.dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[M, k] and [n, k] -> float32 [M, n]."""
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)
