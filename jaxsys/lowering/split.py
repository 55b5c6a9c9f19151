"""Splits a backward pass into what gives dx (I) and what gives dw (W), for any block.

The backward pass is traced to a jaxpr. Whatever dx depends on is I; what is left, from its first
products on, is W. The values that cross from I to W are the taps: kept from I until W runs, which
may be much later and needs no weights (zero-bubble schedules: Qi et al., ICLR 2024). For a product
y = x W they are x and dy. What is cheap and ends small, as the sum over tokens that is a norm's
scale's gradient, is done in I, or what it sums would be kept; and what elementwise operations make
from less is made again in W (`residuals`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .flat import Leaves
from .jaxprs import VIEWS, inlined, is_literal, named, run, slice_of, value_of
from .residuals import ELEMENTWISE, what_to_keep


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
    in_i = {id(e) for e in for_dx}
    for_dw = [e for e in slice_of(jaxpr, dw) if id(e) not in in_i]
    made_in_w: set[Any] = set()
    second: list[Any] = []
    for equation in for_dw:
        if _is_product(equation) or any(v in made_in_w for v in _read(equation)):
            second.append(equation)
            made_in_w.update(equation.outvars)
    wanted = [v for e in second for v in _read(e)] + [v for v in dw if not is_literal(v)]
    wanted = [v for v in dict.fromkeys(wanted) if v not in made_in_w and v not in jaxpr.constvars]
    taps = what_to_keep(jaxpr, wanted, set())
    first = slice_of(jaxpr, [*dx, *taps])
    again = {id(e) for e in slice_of(jaxpr, wanted, given=taps)} | {id(e) for e in second}
    second = [e for e in jaxpr.eqns if id(e) in again]

    def input_gradient(*args: Any) -> tuple[Leaves, Leaves]:
        values = named(closed, args)
        run(first, values)
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


def _is_product(equation: Any) -> bool:
    """Whether an equation is work worth putting off: no elementwise operation, view or sum."""
    name = equation.primitive.name
    return not (name in ELEMENTWISE or name in VIEWS or name.startswith("reduce_"))


def _read(equation: Any) -> list[Any]:
    return [v for v in equation.invars if not is_literal(v)]
