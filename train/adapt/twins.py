"""Whether two traces of a program, for unlike numbers of samples, compute the same of each sample.

A sum over samples of `loss / B` looks like a bare sum, but for twice as many samples it is made of
other numbers. So constants are compared wherever they enter, those inside loops included; of one
that is as long as there are samples its first element is.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxsys.train.adapt.fingerprint import opened, words_of
from jaxsys.train.adapt.values import BatchLeaf, BlockLeaf, Operation, Value, Whole, known

_MOST_ELEMENTS = 1 << 22
"""Of known arrays that are compared one by one."""

Place = tuple[Operation, int]
"""Where an operation reads."""


def numbers_between(
    pairs: Sequence[tuple[Value, Value]], key: int | None
) -> list[tuple[Place, Place]] | Operation | None:
    """Where values of two programs are made alike but for numbers read there.

    Args:
        pairs: values of the one and the other.
        key: the batch's leaf that is its key; what is drawn from it is not compared.

    Returns:
        If they are made otherwise, the one's operation that is, or None of a leaf.
    """
    waiting: list[tuple[Value, Value, tuple[Place, Place] | None]] = [(*p, None) for p in pairs]
    seen: set[tuple[Value, Value]] = set()
    found: list[tuple[Place, Place]] = []
    sampled: dict[Value, bool] = {}
    equal: dict[tuple[Value, Value], bool] = {}
    while waiting:
        a, b, read = waiting.pop()
        still = not (a.depends or b.depends or a.varies or b.varies)
        # Of what is large it is looked at what it is made of.
        made = a.maker is not None and b.maker is not None
        large = still and made and a.aval.size > _MOST_ELEMENTS
        if still and not large:
            if (a, b) not in equal:
                equal[a, b] = _same_numbers(known(a), known(b))
            if not equal[a, b]:
                if read is None:
                    return a.maker
                found.append(read)
            continue
        if (a, b) in seen:
            continue
        seen.add((a, b))
        if a.maker is None or b.maker is None:
            if not _same_leaf(a, b):
                return None
        elif not large and not a.depends and not _is_sampled(a, key, sampled):
            continue
        elif (
            a.place != b.place
            or a.maker.primitive is not b.maker.primitive
            or len(a.maker.inputs) != len(b.maker.inputs)
            or not _same_inside(a.maker.parameters, b.maker.parameters)
        ):
            return a.maker
        else:
            waiting += [
                (x, y, ((a.maker, n), (b.maker, n)))
                for n, (x, y) in enumerate(zip(a.maker.inputs, b.maker.inputs, strict=True))
            ]
    return found


def _same_leaf(a: Value, b: Value) -> bool:
    if isinstance(a, BlockLeaf) and isinstance(b, BlockLeaf):
        return (a.layer, a.name) == (b.layer, b.name)
    if isinstance(a, BatchLeaf) and isinstance(b, BatchLeaf):
        return a.number == b.number
    if isinstance(a, Whole) and isinstance(b, Whole):
        return a.number == b.number
    return a is b


def _is_sampled(value: Value, key: int | None, found: dict[Value, bool]) -> bool:
    """Whether a leaf of the batch other than its key enters a value."""
    waiting = [value]
    while waiting:
        one = waiting[-1]
        inputs = () if one.maker is None else one.maker.inputs
        ahead = [v for v in inputs if v not in found]
        if one in found or not ahead:
            waiting.pop()
            own = isinstance(one, BatchLeaf) and one.number != key
            found.setdefault(one, own or any(found[v] for v in inputs))
        else:
            waiting += ahead
    return found[value]


def _same_numbers(a: Any, b: Any) -> bool:
    a, b = (np.asarray(words_of(value)[0]) for value in (a, b))
    if a.ndim != b.ndim:
        return False
    for axis in range(a.ndim):
        if a.shape[axis] != b.shape[axis]:
            a, b = a.take([0], axis), b.take([0], axis)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _same_inside(a: Any, b: Any) -> bool:
    """Whether jaxprs among an operation's parameters hold the same constants."""
    return all(
        _same_jaxprs(x, y)
        for name in a
        for x, y in zip(_jaxprs_of(a[name]), _jaxprs_of(b.get(name)), strict=False)
    )


def _jaxprs_of(value: Any) -> Sequence[Any]:
    items = value if isinstance(value, list | tuple) else (value,)
    return [item for item in items if isinstance(item, core.ClosedJaxpr | core.Jaxpr)]


def _same_jaxprs(a: Any, b: Any) -> bool:
    (a, consts), (b, others) = opened(a), opened(b)
    if len(a.eqns) != len(b.eqns) or len(consts) != len(others):
        return False
    if not all(_same_numbers(x, y) for x, y in zip(consts, others, strict=True)):
        return False
    for x, y in zip(a.eqns, b.eqns, strict=True):
        if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
            return False
        for p, q in zip(x.invars, y.invars, strict=True):
            literal = hasattr(p, "val"), hasattr(q, "val")
            if literal[0] != literal[1] or (literal[0] and not _same_numbers(p.val, q.val)):
                return False
        if not _same_inside(x.params, y.params):
            return False
    return True
