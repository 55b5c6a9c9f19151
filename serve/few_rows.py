"""x W^T for a few rows of x and packed int4 weights, by a kernel of Pallas for GPUs.

XLA unpacks such a matrix whole before it multiplies. Here x is cast to eight-bit integers too, with
a scale for each row and group of inputs, and an instruction multiplies four pairs of bytes and adds
them up (`dp4a`), as llama.cpp's products do: five instructions take eight numbers of one row,
where numbers that become floats first take thirty. Sums of a group are whole numbers, exactly; its
two scales meet them in float32. Rounding x moves a product by 0.65 % of its size, four bits of
weights by some 10 %. On an H200, microseconds (results/kernels_h200.json):

    outputs x inputs            6144 x 4096   4096 x 4096   28672 x 4096   4096 x 14336
    1 row                               5.4           4.4             18             12
    1 row, numbers as floats             13             9             45             27
    8 rows, 16 rows                                               52, 93
    reading, at 4.4 TB/s                2.9           1.9             13            6.7

Legend: M rows, N outputs, K inputs, g inputs of a group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys import float8
from jaxsys.model.grouped_triton import span

MOST = 16
"""Rows up to which it is quicker than unpacking the matrix whole."""
_WORDS = 128
"""Of an output, eight numbers each, in a turn: twice as many where there is one row."""
_SIGNS, _UPPER = (int.from_bytes([byte] * 4, "little", signed=True) for byte in (0x80, 0xF0))
"""Each byte's first bit, and its upper half."""


def packed(codes: jax.Array) -> jax.Array:
    """Codes [..., n], whole numbers from -8 to 7 less -8, to words [..., n / 8], n a multiple of 8.

    A byte has a number of the first half below one of the second, a word four bytes in turn.
    """
    half = codes.shape[-1] // 2
    codes = codes.astype(jnp.uint8)
    pair = codes[..., :half] | (codes[..., half:] << 4)
    return jax.lax.bitcast_convert_type(pair.reshape(*pair.shape[:-1], -1, 4), jnp.int32)


def unpacked(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words [..., n] to int8 numbers from -8 to 7 [..., 4n]: the first half, and the second."""
    pair = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)
    low = (pair & 15).astype(jnp.int8) - 8
    return low, (pair >> 4).astype(jnp.int8) - 8


def fits(words: jax.Array) -> bool:
    """Whether the kernel takes these weights [N, K / g, g / 8]: powers of two, whole blocks."""
    each = words.shape[2]
    return 4 <= each <= _WORDS and each & (each - 1) == 0 and words.shape[0] % 4 == 0


def product(
    x: Float[Array, "M K"],
    words: jax.Array,
    scale: Float[Array, "N K/g"],
    dtype: jnp.dtype,
    *,
    outputs: int | None = None,
    turn: int | None = None,
    warps: int | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product with packed weights [N, K / g, g / 8] and scales [N, K / g].

    Args:
        outputs: of one program; what was quickest for so many rows if None, as the others.
        turn: words of an output in a turn.
        warps: of a program.
        interpret: run it without a GPU, operation by operation.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, (size, groups, each) = x.shape[0], words.shape
    alone = rows == 1
    outputs, warps = outputs or (4 if alone else 2), warps or (2 if alone else 1)
    turn = turn or (2 * _WORDS if alone else _WORDS)
    wide = x.astype(jnp.float32).reshape(rows, groups, -1)
    most = jnp.max(jnp.abs(wide), axis=2)
    # The scale is worked out again in the kernel: one kernel less than to hand it over.
    small = float8.cast(wide / float8.scale_of(most, jnp.int8)[..., None], jnp.int8)
    small = small.reshape(rows, groups, 2, each, 4)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            outputs=outputs,
            many=max(1, turn // each),
            dot=_by_cases if interpret else _by_bytes,
        ),
        grid=(size // outputs,),
        out_shape=jax.ShapeDtypeStruct((rows, size), dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="few_rows",
    )
    return call(jax.lax.bitcast_convert_type(small, jnp.int32), most, words, scale)


def _kernel(
    x_ref: Any,
    most_ref: Any,
    w_ref: Any,
    scale_ref: Any,
    o_ref: Any,
    *,
    outputs: int,
    many: int,
    dot: Any,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows = x_ref.shape[0]
    _, groups, each = w_ref.shape
    output = pl.program_id(0) * outputs + jnp.arange(outputs, dtype=jnp.int32)
    word = jnp.arange(each, dtype=jnp.int32)

    def turn(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, there = span(index * many, many, groups)

        def load(ref: Any, place: tuple[Any, ...], seen: jax.Array) -> jax.Array:
            """A mask costs where none is needed."""
            if groups % many == 0:
                return triton.load(ref.at[place])
            return triton.load(ref.at[place], mask=seen, other=0)

        place = output[:, None, None], group[None, :, None], word[None, None]
        w = load(w_ref, place, there[None, :, None])
        # Sixteen times each number, as signed bytes.
        low = ((w << 4) ^ _SIGNS) & _UPPER
        high = (w ^ _SIGNS) & _UPPER
        scale = load(scale_ref, (output[:, None], group[None]), there[None])
        found = []
        for row, before in enumerate(sums):
            x = [
                load(x_ref, (row, group[:, None], part, word[None]), there[:, None])
                for part in (0, 1)
            ]
            both = dot(high, x[1][None], dot(low, x[0][None], jnp.zeros(low.shape, jnp.int32)))
            of_x = float8.scale_of(load(most_ref, (row, group), there), jnp.int8) * (1 / 16)
            found.append(before + both.astype(jnp.float32) * (scale * of_x[None])[:, :, None])
        return tuple(found)

    start = tuple(jnp.zeros((outputs, many, each), jnp.float32) for _ in range(rows))
    sums = jax.lax.fori_loop(0, -(-groups // many), turn, start)
    for row, one in enumerate(sums):
        o_ref[row, output] = one.sum(axis=2).sum(axis=1).astype(o_ref.dtype)


def _by_cases(a: jax.Array, b: jax.Array, sums: jax.Array) -> jax.Array:
    """Sums plus the products of the four signed bytes of `a` with those of `b`."""
    for place in range(4):
        sums += _byte(a, place) * _byte(b, place)
    return sums


def _byte(word: jax.Array, place: int) -> jax.Array:
    return (word.astype(jnp.int32) << (24 - 8 * place)) >> 24


def _by_bytes(a: jax.Array, b: jax.Array, sums: jax.Array) -> jax.Array:
    """The same by one instruction."""
    from jax.experimental.pallas import triton

    b = jnp.broadcast_to(b, a.shape)
    return triton.elementwise_inline_asm(
        "dp4a.s32.s32 $0, $1, $2, $3;",
        args=[a, b, sums],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.int32)],
    )[0]
