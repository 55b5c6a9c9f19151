"""A loss whose layers are called through a wrapper, made from its jaxpr.

A plan may count on every layer being computed again, or gathering its weights: what its author then
writes by hand, by `Planned.checkpoint` round the function of a layer, is done here to the traced
loss, so that what it holds can be read from it. Layers are the turns of a scan that takes their
weights apart, or the stretches of a program between the first and the last use of one layer's
parameters, each cut where least is handed on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxsys.lowering.jaxprs import bytes_of, inlined, is_literal, run, value_of
from jaxsys.planner.layers import Layers
from jaxsys.planner.value_cuts import scan_counts

PLAIN_CALLS = ("pjit", "jit", "closed_call", "core_call")
PASSED_ON = frozenset(
    (
        *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "copy"),
        *("convert_element_type", "stop_gradient", "name", "sharding_constraint"),
    )
)
"""Operations whose result is still the parameter that they read."""

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Wraps `layer(weights, rest)`."""


def with_layers(
    closed: core.ClosedJaxpr, layers: Layers, parameters: int, wrap: Wrap
) -> Callable[..., Any]:
    """The loss as a function of its flat inputs, its layers wrapped.

    Args:
        closed: of the loss; its first inputs are the parameters, flattened.
        layers: the repeated part of these.
        parameters: how many there are.
        wrap: what stands round a layer.
    """
    written = inlined(closed, PLAIN_CALLS)
    jaxpr = written.jaxpr
    origins = _origins(jaxpr, parameters)
    stretches = [] if layers.stacked else _stretches(jaxpr, layers, origins)
    weights = {v for v, index in origins.items() if index in set(layers.leaves)}

    def loss(*arguments: Any) -> Any:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values.update(zip(jaxpr.constvars, written.consts, strict=True))
        index = 0
        starts = dict(stretches)
        while index < len(jaxpr.eqns):
            equation = jaxpr.eqns[index]
            if layers.stacked and _takes_apart(equation, weights):
                _scan(equation, values, weights, wrap)
            elif index in starts:
                end = starts[index]
                _stretch(jaxpr, index, end, values, weights, wrap)
                index = end
                continue
            else:
                run([equation], values)
            index += 1
        return value_of(jaxpr.outvars[0], values)

    return loss


def loops_in_layers(closed: core.ClosedJaxpr, layers: Layers, parameters: int) -> bool:
    """Whether layers that are called one by one have loops of their own, as over time.

    A compiler lets such a loop run as soon as what it reads is there, where it is computed again
    too, and gathers its weights as early: nothing ties either to its turn.
    """
    if layers.stacked:
        return False
    jaxpr = inlined(closed, PLAIN_CALLS).jaxpr
    return any(
        equation.primitive.name in ("scan", "while")
        for start, end in _stretches(jaxpr, layers, _origins(jaxpr, parameters))
        for equation in jaxpr.eqns[start:end]
    )


def runs_again(closed: core.ClosedJaxpr, layers: Layers, parameters: int) -> bool:
    """Whether a layer is called more than once with the same weights, others in between."""
    if layers.stacked:
        return False
    jaxpr = inlined(closed, PLAIN_CALLS).jaxpr
    return len(_stretches(jaxpr, layers, _origins(jaxpr, parameters))) > layers.count


def _origins(jaxpr: core.Jaxpr, parameters: int) -> dict[Any, int]:
    """Variable -> the parameter that it is, in another shape or dtype at most."""
    origins: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars[:parameters])}
    for equation in jaxpr.eqns:
        if equation.primitive.name in PASSED_ON and equation.invars:
            source = equation.invars[0]
            if not is_literal(source) and source in origins:
                origins[equation.outvars[0]] = origins[source]
    return origins


def _takes_apart(equation: Any, weights: set[Any]) -> bool:
    if equation.primitive.name != "scan":
        return False
    body = equation.params["jaxpr"]
    body = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
    slices = equation.invars[sum(scan_counts(equation, body)) :]
    return any(not is_literal(v) and v in weights for v in slices)


def _scan(equation: Any, values: dict[Any, Any], weights: set[Any], wrap: Wrap) -> None:
    given = equation.params["jaxpr"]
    closed = given if isinstance(given, core.ClosedJaxpr) else core.ClosedJaxpr(given, ())
    body = closed.jaxpr
    consts, carried = scan_counts(equation, body)
    inputs = [value_of(v, values) for v in equation.invars]
    start = consts + carried
    mine = [not is_literal(v) and v in weights for v in equation.invars[start:]]

    def layer(own: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
        fixed, carry, others = rest
        ours, theirs = iter(own), iter(others)
        slices = [next(ours) if is_mine else next(theirs) for is_mine in mine]
        inside = dict(zip(body.invars, [*fixed, *carry, *slices], strict=True))
        inside.update(zip(body.constvars, closed.consts, strict=True))
        run(list(body.eqns), inside)
        return [value_of(v, inside) for v in body.outvars]

    wrapped = wrap(layer)

    def turn(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        own = [s for s, is_mine in zip(slices, mine, strict=True) if is_mine]
        others = [s for s, is_mine in zip(slices, mine, strict=True) if not is_mine]
        made = wrapped(own, (inputs[:consts], list(carry), others))
        return made[:carried], made[carried:]

    carry, stacked = jax.lax.scan(
        turn,
        list(inputs[consts:start]),
        list(inputs[start:]),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
    )
    values.update(zip(equation.outvars, [*carry, *stacked], strict=True))


def _stretch(
    jaxpr: core.Jaxpr,
    start: int,
    end: int,
    values: dict[Any, Any],
    weights: set[Any],
    wrap: Wrap,
) -> None:
    equations = list(jaxpr.eqns[start:end])
    made = {v for e in equations for v in e.outvars}
    read = dict.fromkeys(v for e in equations for v in e.invars if not is_literal(v))
    inputs = [v for v in read if v not in made]
    own = [v for v in inputs if v in weights]
    others = [v for v in inputs if v not in weights]
    later = {v for e in jaxpr.eqns[end:] for v in e.invars if not is_literal(v)}
    later |= {v for v in jaxpr.outvars if not is_literal(v)}
    handed_on = [v for v in made if v in later]

    def layer(mine: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
        inside = dict(zip([*own, *others], [*mine, *rest], strict=True))
        run(equations, inside)
        return [inside[v] for v in handed_on]

    results = wrap(layer)([values[v] for v in own], [values[v] for v in others])
    values.update(zip(handed_on, results, strict=True))


def _stretches(
    jaxpr: core.Jaxpr, layers: Layers, origins: Mapping[Any, int]
) -> list[tuple[int, int]]:
    """First and last but one equation of each run of one layer, in order."""
    size = len(layers.leaves) // layers.count
    owner = {leaf: place // size for place, leaf in enumerate(layers.leaves)}
    uses: list[tuple[int, int | None]] = []
    for index, equation in enumerate(jaxpr.eqns):
        if equation.primitive.name in PASSED_ON:
            continue
        read = {origins[v] for v in equation.invars if not is_literal(v) and v in origins}
        mine = [owner[leaf] for leaf in read if leaf in owner]
        if read:
            uses.append((index, mine[0] if mine else None))
    runs: list[tuple[int, int, int | None]] = []
    for index, who in uses:
        before = next((r for r in reversed(runs) if r[2] is not None), None)
        if who is not None and before is not None and before[2] == who:
            while runs[-1] is not before:
                runs.pop()  # what a layer reads of the others' does not end it
            runs[-1] = (before[0], index, who)
        elif runs and runs[-1][2] == who:
            runs[-1] = (runs[-1][0], index, who)
        else:
            runs.append((index, index, who))
    handed_on = _handed_on(jaxpr, origins)
    edges: list[tuple[int, int]] = []
    for place, (first, last, who) in enumerate(runs):
        if who is None:
            continue
        low = runs[place - 1][1] + 1 if place else 0
        high = runs[place + 1][0] if place + 1 < len(runs) else len(jaxpr.eqns)
        start = min(range(low, first + 1), key=lambda at: handed_on[at])
        end = min(range(last + 1, high + 1), key=lambda at: handed_on[at])
        edges.append((max(start, edges[-1][1] if edges else 0), end))
    return edges


def _handed_on(jaxpr: core.Jaxpr, origins: Mapping[Any, int]) -> list[float]:
    """For each place between equations, bytes made before it and read after it."""
    change = [0.0] * (len(jaxpr.eqns) + 2)
    last: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        last.update((v, index) for v in equation.invars if not is_literal(v))
    for index, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            until = last.get(variable, -1)
            if variable not in origins and until > index:
                change[index + 1] += bytes_of(variable)
                change[until + 1] -= bytes_of(variable)
    total, found = 0.0, []
    for step in change[:-1]:
        total += step
        found.append(total)
    found[-1] = 0.0
    return found
