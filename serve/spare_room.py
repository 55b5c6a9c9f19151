"""Room for small buffers, apart from where steps have their scratch memory.

XLA records a decode step's kernels once, as a CUDA graph, with the addresses they work at, and must
write the graph anew (3 to 4 ms for 32 layers) where one of these has changed since the last run.
What a step is given and gives rests where it was (`Steps`), but its scratch memory is allocated
anew at each run, from the one pool that also holds what comes and goes beside it: rows of inputs,
tokens on their way to the host, rules of a new batch, a prompt's logits. The pool takes the
smallest free stretch that is long enough (best fit with coalescing). Where none is short, such a
small buffer is cut from the stretch that the last scratch left, and the next scratch lies
elsewhere: with three iterations' tokens about, in two steps of three.

So free stretches of the small buffers' sizes are left between buffers that stay.
"""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Sharding

SMALL_BYTES = 1 << 16
"""Tokens, rules and the like take a fraction of this."""
STRETCHES = 8
"""Of each size: what two iterations in flight and one being handed on have, and as many again."""


def leave_room(
    sizes: Iterable[int], placement: Sharding, *, stretches: int = STRETCHES
) -> list[jax.Array]:
    """Leaves free stretches of `sizes` bytes, and of `SMALL_BYTES`, between buffers that stay.

    Args:
        placement: of the buffers.
        stretches: how many of each size.

    Returns:
        The buffers that stay, as long as somebody has them. There is one more of each size than
        stretches.
    """
    staying: list[jax.Array] = []
    for size in sorted({SMALL_BYTES, *sizes}):
        row = [
            jax.device_put(np.zeros(size, np.uint8), placement) for _ in range(2 * stretches + 1)
        ]
        jax.block_until_ready(row)
        for one in row[1::2]:
            one.delete()
        staying += row[::2]
    return staying
