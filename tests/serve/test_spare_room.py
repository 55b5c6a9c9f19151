"""Free stretches for small buffers: what is left, and what a pool's scratch memory makes of it."""

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxsys.serve.spare_room import SMALL_BYTES, leave_room

SCRATCH, LOGITS = 9 << 20, 4 * 128_256


class Pool:
    """Best fit with coalescing, as XLA's pool allots: by multiples of 256 bytes, a stretch cut
    where the rest is as large as what is asked for, and its neighbours joined when it comes free.
    """

    def __init__(self) -> None:
        self.stretches = [(0, 1 << 36, True)]
        """Address, bytes, whether free."""

    def allot(self, size: int) -> int:
        size = -(-size // 256) * 256
        fitting = [(s, a) for a, s, free in self.stretches if free and s >= size]
        length, at = min(fitting)
        index = self.stretches.index((at, length, True))
        cut = length >= 2 * size
        self.stretches[index : index + 1] = (
            [(at, size, False), (at + size, length - size, True)] if cut else [(at, length, False)]
        )
        return at

    def free(self, at: int) -> None:
        joined: list[tuple[int, int, bool]] = []
        for address, size, free in self.stretches:
            free = free or address == at
            if joined and joined[-1][2] and free:
                joined[-1] = (joined[-1][0], joined[-1][1] + size, True)
            else:
                joined.append((address, size, free))
        self.stretches = joined


def places_of_scratch(pool: Pool, steps: int) -> list[int]:
    """Where each decode step's scratch lies: rows come, tokens of the last three steps are about,
    the batch changes at step 13 and a prompt is computed at step 20."""
    places, rows, tokens, rules = [], [], [], [pool.allot(64) for _ in range(12)]
    for step in range(steps):
        logits = None
        if step == 13:
            new = [pool.allot(64) for _ in range(12)]
            for one in rules:
                pool.free(one)
            rules = new
        if step == 20:
            logits, prompt = pool.allot(LOGITS), pool.allot(90 << 20)
            pool.free(prompt)
            tokens.append(pool.allot(4))
        rows.append(pool.allot(4 * 66 * 4))
        places.append(pool.allot(SCRATCH))
        pool.free(places[-1])
        if logits is not None:
            pool.free(logits)
        tokens.append(pool.allot(64))
        for waiting, most in ((rows, 1), (tokens, 3)):
            while len(waiting) > most:
                pool.free(waiting.pop(0))
    return places


def test_scratch_stays_where_small_buffers_have_stretches_of_their_own():
    bare = Pool()
    bare.allot(16 << 30)  # weights
    assert len(set(places_of_scratch(bare, 40))) > 1

    parted = Pool()
    parted.allot(16 << 30)
    for size in sorted({SMALL_BYTES, 4 * 16 * 66, LOGITS}):  # as `leave_room` does
        row = [parted.allot(size) for _ in range(17)]
        for one in row[1::2]:
            parted.free(one)
    assert len(set(places_of_scratch(parted, 40))) == 1


def test_every_other_buffer_stays():
    placement = SingleDeviceSharding(jax.devices()[0])
    staying = leave_room([1000, SMALL_BYTES], placement, stretches=3)
    assert [one.nbytes for one in staying] == [1000] * 4 + [SMALL_BYTES] * 4
    assert all(not one.is_deleted() for one in staying)
    assert all(np.asarray(one).max() == 0 for one in staying)
