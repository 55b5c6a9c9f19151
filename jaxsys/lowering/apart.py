"""Slots that lie apart: each of a buffer's slots a value of its own, and a branch for each.

In one tick the devices of a ring or a pipeline are at different chunks, so which slot a device
writes or reads is a number in its row of the tables. In one array with an axis of slots, all that a
layer's products and attention have made is copied to its place, since no kernel of theirs writes
into a part of an array: of a ring of two at 16,384 tokens that was 6 % of the step. Where slots lie
apart, a branch for each has its slot's number written into the program: kernels then write there
themselves, and no room is needed for what would be copied.

A branch writes a chunk's layers out once more. So slots lie apart where all branches together have
at most `MOST` times the model's layers; layers in a loop, as on CPUs, write rows in place anyway.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax import lax

from jaxsys.layered import PyTree
from jaxsys.schedule import Data

from .bodies import BufferKey

MOST = 2
"""Times the layers of the model that the branches of one kind of task may have together."""
RESIDUALS: BufferKey = (Data.RESIDUAL, "")
TAPS: BufferKey = (Data.TAP, "")


def lie_apart(slots: Mapping[BufferKey, int], chunks: int) -> frozenset[BufferKey]:
    """The buffers whose slots lie apart where a chunk's layers are written out.

    Args:
        slots: how many slots each buffer has.
        chunks: C, which the model's layers are divided into.
    """
    residuals, taps = slots.get(RESIDUALS, 1), slots.get(TAPS, 1)
    found = set()
    if 1 < residuals <= MOST * chunks:
        found.add(RESIDUALS)
    if taps > 1 and residuals * taps <= MOST * chunks:  # I reads of the ones and writes the others
        found.add(TAPS)
    return frozenset(found)


def in_slot(
    buffer: PyTree, slot: Any, run: Callable[[PyTree, Any], tuple[Any, PyTree]], *, apart: bool
) -> tuple[Any, PyTree]:
    """`run(buffer, slot) -> (what it makes, buffer)` on one slot.

    Args:
        buffer: of all slots; a tuple of them where they lie apart, and `run` gets one of these.
        slot: int32 [], known when the program runs.
    """
    if not apart:
        return run(buffer, slot)

    def branch(number: int) -> Callable[[PyTree], tuple[Any, PyTree]]:
        def on_it(buffer: PyTree) -> tuple[Any, PyTree]:
            made, written = run(buffer[number], 0)
            return made, (*buffer[:number], written, *buffer[number + 1 :])

        return on_it

    return lax.switch(slot, [branch(number) for number in range(len(buffer))], buffer)
