"""Experts published in MXFP4: blocks of 32 four-bit floats (e2m1) that share an eight-bit exponent.

A matrix [E, in, out] lies as `_blocks` [E, out, in / 32, 16], two numbers a byte, the lower half
first, and `_scales` [E, out, in / 32], exponents plus 127 (OCP Microscaling Formats 1.0).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model.rows import Rows, spans
from jaxsys.model.safetensors_file import SafetensorsFile

BLOCKS, SCALES = "_blocks", "_scales"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

BLOCK = 32
"""Numbers that share an exponent."""
LARGEST = 154
"""Exponent of a packed block, which is a scale of 2**27: products widen numbers in bfloat16."""


class Packed(NamedTuple):
    """Matrices as they are published, outputs first; numbers 2i and 2i + 1 of an output share byte
    i, the lower half first."""

    codes: jax.Array
    """uint8 [..., out, in / 2]."""
    exponents: jax.Array
    """uint8 [..., out, in / 32], of two, plus 127."""


def decoded(codes: jax.Array) -> jax.Array:
    """Codes 0..15, as integers, to the float32 values that they stand for."""
    power, low = (codes >> 1) & 3, codes & 1
    twice = jnp.where(power == 0, low, (2 + low) << jnp.maximum(power - 1, 0))
    return jnp.where(codes >= 8, -0.5, 0.5) * twice.astype(jnp.float32)


def factor(exponents: jax.Array) -> jax.Array:
    """Powers of two, float32, made of their bits; the least, 2**-127, becomes zero."""
    return jax.lax.bitcast_convert_type(exponents.astype(jnp.int32) << 23, jnp.float32)


def unpacked(weights: Packed) -> jax.Array:
    """The matrices [..., out, in] in float32."""
    codes = weights.codes.astype(jnp.int32)
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    values = decoded(pairs).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
    return values * jnp.repeat(factor(weights.exponents), BLOCK, axis=-1)


VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Of the sixteen codes."""


def present(found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes with every pair of blocks and scales as the one matrix that it is.

    Raises:
        UsageError: if a pair does not fit together.
    """
    shapes = dict(found)
    for name, blocks in found.items():
        if not name.endswith(BLOCKS):
            continue
        whole = name.removesuffix(BLOCKS)
        scales = found.get(whole + SCALES)
        if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
            raise UsageError(
                f"tensor {name!r} of shape {blocks} and its scales of shape {scales} are no MXFP4 "
                "matrix: [E, out, in / 32, 16] and [E, out, in / 32]"
            )
        shapes[whole] = (blocks[0], 32 * blocks[2], blocks[1])
        del shapes[name], shapes[whole + SCALES]
    return shapes


def read(blocks: SafetensorsFile, scales: SafetensorsFile, name: str) -> Packed:
    """The matrices [E, out, in] as they are, in host memory; views of the files.

    Raises:
        UsageError: if an exponent is the one that means NaN, or larger than products take.
    """
    codes, exponents = blocks.read_bytes(name + BLOCKS), scales.read_bytes(name + SCALES)
    most = int(exponents.max(initial=0))
    if most == 255:
        raise UsageError(f"tensor {name + SCALES!r} holds NaN; the checkpoint is damaged")
    if most > LARGEST:
        raise UsageError(
            f"tensor {name + SCALES!r} holds a scale of 2**{most - 127}; packed experts have at "
            f"most 2**{LARGEST - 127}: load them unpacked, or repair the checkpoint"
        )
    held: Any = (codes.reshape(*codes.shape[:2], -1), exponents)
    return Packed(*held)


def expand(blocks: SafetensorsFile, scales: SafetensorsFile, name: str) -> Rows:
    """The matrices [E, in, out] in bfloat16, which has all such numbers; rows are experts.

    Raises:
        UsageError: as `read`.
    """
    whole = Expanded(read(blocks, scales, name))
    return Rows(shape=whole.shape, read=lambda start, stop: whole[start:stop])


class Expanded:
    """Packed matrices [E, out, in] as those [E, in, out] that they stand for, on the host.

    Made in bfloat16 where experts are sliced, `value[2:3]`.
    """

    def __init__(self, held: Packed) -> None:
        self._codes, self._exponents = (np.asarray(part) for part in held)
        experts, columns, half = self._codes.shape
        self.shape = (experts, 2 * half, columns)

    def __getitem__(self, experts: slice) -> np.ndarray:
        codes, exponents = self._codes[experts], self._exponents[experts]
        made = np.empty((len(codes), self.shape[2], self.shape[1]), BFLOAT16)
        for expert, start, stop in (
            (expert, *span)
            for expert in range(len(codes))
            for span in spans(made.shape[1:], 0, made.shape[1])
        ):
            some = codes[expert, start:stop]
            pairs = np.stack([some & 15, some >> 4], axis=-1)
            values = VALUES[pairs.reshape(len(some), -1, BLOCK)]
            powers = exponents[expert, start:stop].astype(np.int32)[..., None] - 127
            made[expert, start:stop] = np.ldexp(values, powers).reshape(len(some), -1)
        return made.swapaxes(1, 2)
