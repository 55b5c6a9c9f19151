"""Experts published in MXFP4: blocks of 32 four-bit floats (e2m1) that share an eight-bit exponent.

A matrix [E, in, out] lies as `_blocks` [E, out, in / 32, 16], two numbers a byte, the lower half
first, and `_scales` [E, out, in / 32], exponents plus 127 (OCP Microscaling Formats 1.0).
"""

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model.safetensors_file import SafetensorsFile

BLOCKS, SCALES = "_blocks", "_scales"

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


def expand(blocks: SafetensorsFile, scales: SafetensorsFile, name: str) -> np.ndarray:
    """The matrix [E, in, out] in float32."""
    codes = blocks.read_bytes(name + BLOCKS)
    exponents = scales.read_bytes(name + SCALES).astype(np.int32) - 127
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    values = np.ldexp(VALUES[pairs.reshape(*codes.shape[:-1], 32)], exponents[..., None])
    experts, columns = codes.shape[:2]
    return values.reshape(experts, columns, -1).swapaxes(1, 2)
