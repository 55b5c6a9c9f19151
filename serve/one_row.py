"""x W^T for one row of x and a matrix in a small form, by a kernel of Pallas for GPUs.

A token of one request reads every matrix once and multiplies each number once, which is no work
for tensor cores: a program takes a few outputs, walks over their inputs and adds up products in
float32, number by number. XLA makes such a kernel too, which is slower where rows are long and
where the matrix is small. On an H200, microseconds of one row in fp8, by the profiler
(results/kernels_h200.json):

    outputs x inputs          6144 x 4096   4096 x 4096   28672 x 4096   4096 x 14336
    XLA's sum                         9.0           8.4             31             27
    this                             10.4           6.8             36             18
    reading, at 4.4 TB/s              5.7           3.8             27             13

Legend: N outputs, K inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.model.grouped_triton import load_block, span

LONG = 8192
"""Inputs from which the kernel is quicker than XLA's sum of numbers that are not packed."""
OUTPUTS = 2
"""Of one program, which is one warp."""
_NUMBERS = 1024
"""Inputs of a turn."""


def product(
    x: Float[Array, "1 K"],
    values: Float[Array, "N K"],
    scale: Float[Array, " N"],
    dtype: jnp.dtype,
    *,
    outputs: int = OUTPUTS,
    turn: int = _NUMBERS,
    interpret: bool = False,
) -> Float[Array, "1 N"]:
    """The product with numbers of one byte and a scale for each output.

    Args:
        outputs: of one program.
        turn: inputs of a turn.
        interpret: run it without a GPU, operation by operation.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    size, inputs = values.shape
    return pl.pallas_call(
        functools.partial(_kernel, outputs=outputs, step=turn, inputs=inputs),
        grid=(size // outputs,),
        out_shape=jax.ShapeDtypeStruct((size,), dtype),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=2),
        interpret=interpret,
        name="one_row",
    )(x.reshape(-1), values, scale)[None]


def fits(values: jax.Array) -> bool:
    """Whether the kernel takes these values [N, K], and is quicker than XLA's sum."""
    outputs, inputs = values.shape
    return outputs % OUTPUTS == 0 and (inputs >= LONG or outputs <= inputs)


def _kernel(
    x_ref: Any, w_ref: Any, scale_ref: Any, o_ref: Any, *, outputs: int, step: int, inputs: int
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    row = pl.program_id(0) * outputs + jnp.arange(outputs, dtype=jnp.int32)

    def turn(index: jax.Array, sums: jax.Array) -> jax.Array:
        k, inside = span(index * step, step, inputs)
        if inputs % step:
            w = load_block(w_ref, row, k, inside[None])
            x = triton.load(x_ref.at[k], mask=inside, other=0.0)
        else:
            w, x = triton.load(w_ref.at[row[:, None], k[None]]), triton.load(x_ref.at[k])
        return sums + w.astype(jnp.float32) * x.astype(jnp.float32)[None]

    start = jnp.zeros((outputs, step), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-inputs // step), turn, start)
    o_ref[row] = (sums.sum(axis=1) * scale_ref[row]).astype(o_ref.dtype)
