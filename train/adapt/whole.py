"""What a microbatch must know of the whole batch, put where a model uses what is its own.

`(loss * mask / mask.sum()).sum()` divides each sample's part by what all samples add up to, and
`(loss / len(loss)).sum()` by their number. Of a microbatch both are other numbers; but its part of
the whole batch's loss is just what the model makes of its samples once it is handed

    sums      over samples, of the batch alone (masks, weights, counts by class), that enter what
              is made of samples
    numbers   that are made of B, found by comparing what is traced for B, 2 B and 4 B samples; such
              as grow with a power of B

of all samples instead. Each is a `Whole`, summed up before the first microbatch runs; of a sum that
is made of other sums (a variance) after these.

Legend: B samples in the microbatch, N in the batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsys.train.adapt.axes import Mixed, State, Summed, Unknown
from jaxsys.train.adapt.fingerprint import words_of
from jaxsys.train.adapt.samples import Followed
from jaxsys.train.adapt.states import state_of_leaf, states_made
from jaxsys.train.adapt.twins import numbers_between
from jaxsys.train.adapt.values import (
    BatchLeaf,
    BlockLeaf,
    EdgeLeaf,
    Program,
    StackedLeaf,
    Value,
    Whole,
    known,
)


def put_whole(
    programs: Sequence[Program], samples: int, leaves: int, key: int | None
) -> list[Whole]:
    """Puts what the whole batch has into programs of one function.

    Args:
        programs: for B, 2 B and 4 B samples; changed.
        samples: B.
        leaves: of the batch.
        key: the one that is its key, None if there is none.

    Returns:
        What is put into the first of them, in order; empty where nothing is, or where the programs
        are not made alike.
    """
    marks = [[operation.primitive for operation in one.operations] for one in programs]
    if any(mark != marks[0] for mark in marks):
        return []
    put = _Put(programs, samples, leaves, key)
    put.sums()
    put.numbers()
    return put.wholes[0]


def value_of_whole(whole: Whole, total: Any, share: Any) -> Any:
    """What a microbatch is handed.

    Args:
        whole: in whose place.
        total: of a sum, its sum over the whole batch.
        share: N / B.
    """
    aval = whole.aval
    if whole.amount is not None:
        total = jnp.asarray(whole.amount, jnp.float32) * share**whole.power
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        total = jnp.round(total)
    return jnp.asarray(total).astype(aval.dtype)


def round_of(whole: Whole) -> int:
    """After how many other sums it can be summed up: 0 if it is made of none."""
    if whole.amount is not None:
        return 0
    inside = wholes_in(whole.of)
    return 1 + max(map(round_of, inside)) if inside else 0


def wholes_in(value: Value) -> list[Whole]:
    """All `Whole`s that a value is made of."""
    waiting, seen = [value], {value}
    while waiting:
        one = waiting.pop()
        if one.maker is not None:
            waiting += [v for v in dict.fromkeys(one.maker.inputs) if v not in seen]
            seen.update(one.maker.inputs)
    return [one for one in seen if isinstance(one, Whole)]


class _Put:
    def __init__(
        self, programs: Sequence[Program], samples: int, leaves: int, key: int | None
    ) -> None:
        self.programs, self.samples, self.leaves, self.key = programs, samples, leaves, key
        self.wholes: list[list[Whole]] = [[] for _ in programs]
        # Of one sample it cannot be seen where samples lie.
        self.seen_in = 0 if samples > 1 else 1

    def sums(self) -> None:
        """Sums over samples that enter what is made of samples."""
        count = self.samples * 2**self.seen_in
        followed = Followed(count)
        states: dict[Value, State] = {}
        alone: dict[Value, bool] = {}
        numbers: dict[Value, int] = {}
        for index, operation in enumerate(self.programs[self.seen_in].operations):
            for value in operation.inputs:
                if value.maker is None:
                    states[value] = state_of_leaf(value, count, self.key)
                    alone[value] = self._is_of_batch(value)
            found = states_made(operation, states, followed)
            given = [states[value] for value in operation.inputs]
            mixed = any(isinstance(state, Mixed | Unknown) for state in found)
            if mixed and not any(isinstance(state, Mixed | Unknown) for state in given):
                for place, (value, state) in enumerate(zip(operation.inputs, given, strict=True)):
                    if isinstance(state, Summed) and alone[value]:
                        self._put(index, place, numbers.setdefault(value, len(numbers)))
                for value in operation.inputs:
                    if isinstance(value, Whole):
                        states[value] = state_of_leaf(value, count, self.key)
                        alone[value] = True
                found = states_made(operation, states, followed)
            states.update(zip(operation.outputs, found, strict=True))
            mine = all(alone[value] for value in operation.inputs)
            alone.update(dict.fromkeys(operation.outputs, mine))
            self._flags(index)

    def numbers(self) -> None:
        """Numbers that are made of B."""
        roots = [
            [one.outputs[0], *(whole.of for whole in wholes)]
            for one, wholes in zip(self.programs, self.wholes, strict=True)
        ]
        places = [
            numbers_between(list(zip(roots[a], roots[a + 1], strict=True)), self.key)
            for a in (0, 1)
        ]
        # Of one sample axes come and go: what others make of it is told by the next two.
        if self.samples == 1:
            places[0] = places[1]
        if not (isinstance(places[0], list) and isinstance(places[1], list)):
            return
        at = {
            id(operation): index
            for one in self.programs
            for index, operation in enumerate(one.operations)
        }
        read_at = [*places[0], *places[1]]
        found = dict.fromkeys((at[id(operation)], place) for (operation, place), _ in read_at)
        numbers: dict[Any, int] = {}
        base = len(self.wholes[0])
        put: list[tuple[int, int, np.ndarray, float]] = []
        for index, place in found:
            read = [known(one.operations[index].inputs[place]) for one in self.programs]
            words = [np.asarray(words_of(value)[0]) for value in read]
            power = _power(words)
            if power is None:
                return
            put.append((index, place, words[0], power))
        for index, place, amount, power in put:
            value = self.programs[0].operations[index].inputs[place]
            number = numbers.setdefault((value, power), base + len(numbers))
            self._put(index, place, number, amount, power)
        if put:
            for index in range(len(self.programs[0].operations)):
                self._flags(index)

    def _put(
        self,
        index: int,
        place: int,
        number: int,
        amount: np.ndarray | None = None,
        power: float = 0.0,
    ) -> None:
        """Puts one in each program."""
        for program, wholes in zip(self.programs, self.wholes, strict=True):
            operation = program.operations[index]
            inputs = list(operation.inputs)
            if number == len(wholes):
                value = inputs[place]
                wholes.append(
                    Whole(
                        aval=value.aval,
                        depends=True,
                        number=self.leaves + number,
                        of=value,
                        amount=amount,
                        power=power,
                    )
                )
            inputs[place] = wholes[number]
            operation.inputs = tuple(inputs)

    def _flags(self, index: int) -> None:
        """What an operation makes depends on what it reads now."""
        for program in self.programs:
            operation = program.operations[index]
            for value in operation.outputs:
                value.depends = any(one.depends for one in operation.inputs)
                value.varies = any(one.varies for one in operation.inputs)
                if any(isinstance(one, Whole) for one in operation.inputs):
                    value.pure = frozenset()

    def _is_of_batch(self, value: Value) -> bool:
        """Whether a leaf is the batch's own, and no key."""
        if isinstance(value, BatchLeaf):
            return value.number != self.key
        return not isinstance(value, EdgeLeaf | BlockLeaf | StackedLeaf)


def _power(words: list[np.ndarray]) -> float | None:
    """How a number grows with B, of what it is for B, 2 B and 4 B; None if by no power."""
    if any(one.dtype.kind not in "iuf" or one.ndim != words[0].ndim for one in words):
        return None
    for axis in range(words[0].ndim):
        if len({one.shape[axis] for one in words}) > 1:
            words = [one.take([0], axis) for one in words]
    first, second, third = (one.astype(np.float64) for one in words)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([np.ravel(second / first), np.ravel(third / second)])
    if not ratios.size or not np.all(np.isfinite(ratios)) or np.any(ratios <= 0):
        return None
    if np.max(ratios) - np.min(ratios) > 1e-6 * np.max(ratios):
        return None
    power = round(2 * math.log2(float(np.mean(ratios)))) / 2
    whole = words[0].dtype.kind in "iu"
    if abs(2**power - np.mean(ratios)) > 1e-6 * np.mean(ratios) or (whole and power not in (1, 2)):
        return None
    return power
