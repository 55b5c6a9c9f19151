"""A tensor of a checkpoint, read some rows at a time.

What is stored in few bits is spread out to many while it is read. Made piece by piece and written
to its place in the dtype that is wanted, it is never there whole in another one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

AT_ONCE = 1 << 18
"""Numbers of a piece: 1 MiB in float32, which with what its making needs stays in a cache."""


def spans(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows of an array from `start` to `stop`, some at a time."""
    step = max(1, AT_ONCE // max(1, math.prod(shape[1:])))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A tensor whose rows, the places of its first axis, are read when they are asked for."""

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    """(start, stop) -> those rows, of any float dtype; may be a view of a file."""
    is_view: bool = False
    """Whether reading all rows at once takes no memory."""

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows from `start` to `stop`, piece by piece: where each begins, and its values."""
        at_once = [(start, stop)] if self.is_view else spans(self.shape, start, stop)
        for first, end in at_once:
            yield first, self.read(first, end)


def rows_of(values: np.ndarray) -> Rows:
    """Those of an array, such as a view of a file."""
    return Rows(shape=values.shape, read=lambda start, stop: values[start:stop], is_view=True)


def same(one: Rows, other: Rows) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    return all(
        np.array_equal(one.read(*span), other.read(*span))
        for span in spans(one.shape, 0, one.shape[0])
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinity."""
    return all(
        bool(np.isfinite(values[first:end]).all())
        for first, end in spans(values.shape, 0, values.shape[0])
    )
