"""Splits a backward pass into what gives dx (I) and what gives dw (W), for any block.

The backward pass is traced to a jaxpr. Whatever dx depends on is I; the rest is W. The values that
cross from I to W, mostly each product's input and output cotangent, are the taps: kept from I until
W runs, which may be much later and needs no weights (zero-bubble schedules: Qi et al., ICLR 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .flat import Leaves
from .jaxprs import VIEWS, inlined, is_literal, named, run, slice_of, value_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """A backward pass in two halves."""

    input_gradient: Callable[..., tuple[Leaves, Leaves]]
    """The backward pass's own arguments -> (dx, taps)."""
    weight_gradient: Callable[[Leaves], Leaves]
    """taps -> dweights."""
    taps: list[jax.ShapeDtypeStruct]


def split_backward(backward: Callable[..., tuple[Leaves, Leaves]], *args: Any) -> SplitBackward:
    """Splits `backward(*args) -> (dweights, dx)`.

    Args:
        backward: a traceable function that returns the weight gradients and dx.
        *args: shapes and dtypes of its arguments.
    """
    closed, shapes = jax.make_jaxpr(backward, return_shape=True)(*args)
    closed = inlined(closed)
    jaxpr = closed.jaxpr
    count = len(shapes[0])
    dw, dx = jaxpr.outvars[:count], jaxpr.outvars[count:]
    for_dx = slice_of(jaxpr, dx)
    for_dw = [e for e in slice_of(jaxpr, dw) if not any(e is other for other in for_dx)]
    made_by = {variable: e for e in jaxpr.eqns for variable in e.outvars}
    made_in_w = {variable for e in for_dw for variable in e.outvars}

    taps: list[Any] = []
    again: list[Any] = []
    wanted = [v for e in for_dw for v in e.invars] + list(dw)
    while wanted:
        variable = wanted.pop()
        if is_literal(variable) or variable in made_in_w or variable in taps:
            continue
        if variable in jaxpr.constvars:
            continue
        maker = made_by.get(variable)
        if maker is not None and maker.primitive.name in VIEWS:
            again.append(maker)
            made_in_w.update(maker.outvars)
            wanted.extend(maker.invars)
        else:
            taps.append(variable)
    in_w = {id(e) for e in for_dw} | {id(e) for e in again}
    second = [e for e in jaxpr.eqns if id(e) in in_w]
    taps = [v for v in [*jaxpr.invars, *made_by] if v in set(taps)]

    def input_gradient(*args: Any) -> tuple[Leaves, Leaves]:
        values = named(closed, args)
        run(for_dx, values)
        return [value_of(v, values) for v in dx], [values[v] for v in taps]

    def weight_gradient(kept: Leaves) -> Leaves:
        values = dict(zip(taps, kept, strict=True))
        values.update(zip(jaxpr.constvars, closed.consts, strict=True))
        run(second, values)
        return [value_of(v, values) for v in dw]

    return SplitBackward(
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        taps=[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taps],
    )
