"""Where samples can lie in a value.

    Same    no sample enters: parameters, constants, what is drawn from the microbatch's key
    Along   an axis of samples, or of rows that hold each sample's in a row (B T rows of tokens)
    Placed  places to read or write at, of which each sample has those in its own part
    Summed  sums over samples of each one's own, nothing else done to them
    Mixed   samples enter each other's parts
    Unknown an operation that is not followed

Legend: B samples in the microbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsys.train.adapt.fingerprint import words_of


@dataclass(frozen=True, slots=True)
class Same:
    """No sample enters."""

    uneven: frozenset[int] = frozenset()
    """Axes along which slices may differ from each other."""
    drawn: bool = False
    """From the microbatch's key."""
    zero: bool = False
    """All elements are zero."""
    order: int | None = None
    """An axis along which they are 0, 1, 2, ..."""
    blocks: int = 1
    """Where they differ along one axis alone: so many equally long parts of it are even."""


@dataclass(frozen=True, slots=True)
class Along:
    """Samples lie along an axis."""

    axis: int
    copies: int = 1
    """So many batches one after another along it, such as both parts of pairs."""
    group: int = 1
    """So many samples in a row may enter each other's parts: answers to one prompt."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Places along an axis, each sample's own: one component of each is the sample's number."""

    axis: int
    component: int


@dataclass(frozen=True, slots=True)
class Summed:
    """Sums over samples."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Samples enter each other's parts."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Not followed."""


State = Same | Along | Placed | Summed | Mixed | Unknown


def everything_uneven(shape: Sequence[int], *, drawn: bool = False) -> Same:
    """What no sample enters, and of which nothing more is known."""
    return Same(frozenset(axis for axis, length in enumerate(shape) if length > 1), drawn)


def of_constant(value: Any) -> Same:
    """The state of a constant, by its elements."""
    words = words_of(value)[0]
    shape = np.shape(value)
    if words.shape != shape:  # keys
        return everything_uneven(shape)
    differs = [
        axis
        for axis, length in enumerate(shape)
        if length > 1
        and not np.array_equal(
            words, np.broadcast_to(words.take([0], axis), shape), equal_nan=words.dtype.kind == "f"
        )
    ]
    order, blocks = None, 1
    if len(differs) == 1:
        row = np.moveaxis(words, differs[0], 0).reshape(shape[differs[0]], -1)[:, 0]
        ends = np.flatnonzero(row[1:] != row[:-1]) + 1
        blocks = len(ends) + 1
        blocks = blocks if np.array_equal(ends * blocks, np.arange(1, blocks) * len(row)) else 1
        if words.dtype.kind in "iu" and np.array_equal(row, np.arange(len(row))):
            order = differs[0]
    zero = words.dtype.kind in "biuf" and not words.any()
    return Same(frozenset(differs), zero=zero, order=order, blocks=blocks)
