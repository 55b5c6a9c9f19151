"""How much a function holds at once, from its jaxpr: what is made, and until when it is read.

Elementwise operations are free where only such read them: a compiler makes their results inside
the kernels that use them, so what they are made from is held until then instead. Arguments are not
counted, and what is read for the last time by a loop or an elementwise operation gives its place to
the result.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from .jaxprs import VIEWS, bytes_of, inlined, is_literal
from .residuals import ELEMENTWISE

LOOPS = ("scan", "while")
BARRIER = "optimization_barrier"
"""Its results are what it is given, once all of that is there."""
SENT = ("all_to_all", "ppermute", "all_gather", "psum_scatter", "reduce_scatter")
"""What devices send each other while they compute."""
KERNELS = ("pallas_call", "core_map", "custom_call", "ffi_call", "triton_kernel_call")
"""Their bodies work in a chip's registers and shared memory."""


def peak_bytes(function: Callable[..., Any], *args: Any, freed: Collection[int] = ()) -> float:
    """The most that `function` holds besides its arguments, results included.

    Args:
        function: a traceable function.
        *args: arrays, or shapes and dtypes.
        freed: the places of arguments whose arrays are gone once they have been read for the last
            time; others are there all along.
    """
    jaxpr = inlined(jax.make_jaxpr(function)(*args)).jaxpr
    inputs = iter(jaxpr.invars)
    given = [
        variable
        for place, argument in enumerate(args)
        for variable in itertools.islice(inputs, len(jax.tree.leaves(argument)))
        if place in freed
    ]
    return float(_peak(jaxpr, given) - sum(map(bytes_of, given)))


def _peak(jaxpr: Any, given: Sequence[Any] = ()) -> int:
    """What it holds, of its inputs those `given`."""
    kernels = _kernels(jaxpr)
    reads = [(index, v) for index, (_, read) in enumerate(kernels) for v in read]
    first = {v: index for index, v in reversed(reads)}
    last = {v: index for index, v in reads}
    for equation, read in kernels:
        if equation.primitive.name in SENT:
            until = max((first[v] for v in equation.outvars if v in first), default=0)
            last |= {v: max(last[v], until) for v in read}
    last |= dict.fromkeys(_results(jaxpr, kernels), len(kernels))
    ends: dict[int, list[Any]] = defaultdict(list)
    for variable, index in last.items():
        ends[index].append(variable)
    held: dict[Any, int] = {v: bytes_of(v) for v in given}
    most = sum(held.values())
    for index, (equation, read) in enumerate(kernels):
        if equation.primitive.name in ELEMENTWISE or equation.primitive.name in LOOPS:
            for variable in read.intersection(ends[index]):
                held.pop(variable, None)
        held |= {v: bytes_of(v) for v in equation.outvars}
        inside = max((_peak(body) for body in _bodies(equation)), default=0)
        most = max(most, sum(held.values()) + inside)
        unread = (v for v in equation.outvars if last.get(v, index) <= index)
        for variable in (*ends[index], *unread):
            held.pop(variable, None)
    return most


def _kernels(jaxpr: Any) -> list[tuple[Any, set[Any]]]:
    """The equations whose results are written to memory, and the written values that they read."""
    written = {v for v in jaxpr.outvars if not is_literal(v)}
    for equation in reversed(jaxpr.eqns):
        name = equation.primitive.name
        passes_on = name in VIEWS and any(v in written for v in equation.outvars)
        reduces = name.startswith("reduce_") and name not in SENT
        fuses = name in ELEMENTWISE or name in VIEWS or reduces
        if passes_on or not fuses:
            written.update(v for v in equation.invars if not is_literal(v))
    made_from: dict[Any, set[Any]] = {v: {v} for v in [*jaxpr.invars, *jaxpr.constvars]}
    kernels = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == BARRIER:
            pairs = zip(equation.outvars, equation.invars, strict=True)
            made_from |= {v: set() if is_literal(x) else made_from[x] for v, x in pairs}
            continue
        read: set[Any] = set().union(*(made_from[v] for v in equation.invars if not is_literal(v)))
        inside = name in ELEMENTWISE and not any(v in written for v in equation.outvars)
        if name in VIEWS or inside:
            made_from |= dict.fromkeys(equation.outvars, read)
        else:
            made_from |= {v: {v} for v in equation.outvars}
            kernels.append((equation, read))
    return kernels


def _results(jaxpr: Any, kernels: list[tuple[Any, set[Any]]]) -> set[Any]:
    """The written values that the jaxpr returns, views of them included."""
    made_from = {
        v: e.invars[place if e.primitive.name == BARRIER else 0]
        for e in jaxpr.eqns
        if e.invars
        for place, v in enumerate(e.outvars)
    }
    written = {v for equation, _ in kernels for v in equation.outvars}
    found = set()
    for variable in jaxpr.outvars:
        while not is_literal(variable) and variable not in written and variable in made_from:
            variable = made_from[variable]
        if not is_literal(variable):
            found.add(variable)
    return found


def _bodies(equation: Any) -> Iterator[Any]:
    if equation.primitive.name in KERNELS:
        return
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.Jaxpr):
                one = core.ClosedJaxpr(one, ())
            if isinstance(one, core.ClosedJaxpr):
                yield inlined(one).jaxpr
