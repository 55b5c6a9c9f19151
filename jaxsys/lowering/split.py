"""Splits a backward pass into what gives dx (I) and what gives dw (W), for any block.

The backward pass is traced to a jaxpr. Whatever dx depends on is I; the rest is W. The values that
cross from I to W, mostly each product's input and output cotangent, are the taps: kept from I until
W runs, which may be much later and needs no weights (zero-bubble schedules: Qi et al., ICLR 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

from jaxsys.layered import PyTree

CALLS = ("pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call")
"""Primitives that only call a jaxpr: written out, so that the split can go through them."""

VIEWS = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims")
"""Primitives that only rearrange: done again in W rather than kept as a second copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """A backward pass in two halves."""

    input_gradient: Callable[..., tuple[jax.Array, list[jax.Array]]]
    """The backward pass's own arguments -> (dx, taps)."""
    weight_gradient: Callable[[list[jax.Array]], PyTree]
    """taps -> dweights."""
    taps: list[jax.ShapeDtypeStruct]


def split_backward(backward: Callable[..., tuple[PyTree, jax.Array]], *args: Any) -> SplitBackward:
    """Splits `backward(*args) -> (dweights, dx)`.

    Args:
        backward: a traceable function that returns the weight gradients and dx.
        *args: shapes and dtypes of its arguments.
    """
    closed, shapes = jax.make_jaxpr(backward, return_shape=True)(*args)
    closed = _inlined(closed)
    jaxpr = closed.jaxpr
    structure = jax.tree.structure(shapes[0])
    *dw, dx = jaxpr.outvars
    for_dx = _slice(jaxpr, [dx])
    for_dw = [e for e in _slice(jaxpr, dw) if not any(e is other for other in for_dx)]
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

    def input_gradient(*args: Any) -> tuple[jax.Array, list[jax.Array]]:
        values = dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))
        values.update(zip(jaxpr.constvars, closed.consts, strict=True))
        _run(for_dx, values)
        return _value(dx, values), [values[v] for v in taps]

    def weight_gradient(kept: list[jax.Array]) -> PyTree:
        values = dict(zip(taps, kept, strict=True))
        values.update(zip(jaxpr.constvars, closed.consts, strict=True))
        _run(second, values)
        return jax.tree.unflatten(structure, [_value(v, values) for v in dw])

    return SplitBackward(
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        taps=[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taps],
    )


def _inlined(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))
        for equation in jaxpr.eqns:
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if equation.primitive.name in CALLS and inner is not None:
                inputs = [_value(v, values) for v in equation.invars]
                body, inner_consts = (
                    (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                )
                outputs = evaluate(body, inner_consts, inputs)
                values.update(zip(equation.outvars, outputs, strict=True))
            else:
                _run([equation], values)
        return [_value(v, values) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args))(
        *closed.in_avals
    )


def _run(equations: list[Any], values: dict[Any, Any]) -> None:
    for equation in equations:
        inputs = [_value(v, values) for v in equation.invars]
        bound = equation.primitive.get_bind_params(equation.params)
        # A pair (functions, parameters) in some JAX releases, parameters alone in others.
        functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
        outputs = equation.primitive.bind(*functions, *inputs, **parameters)
        if not equation.primitive.multiple_results:
            outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))


def _slice(jaxpr: Any, outputs: list[Any]) -> list[Any]:
    """The equations that the outputs depend on, in order."""
    needed = {v for v in outputs if not is_literal(v)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(v in needed for v in equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if not is_literal(v))
    return kept[::-1]


def _value(variable: Any, values: dict[Any, Any]) -> Any:
    return variable.val if is_literal(variable) else values[variable]


def is_literal(variable: Any) -> bool:
    """Whether what an equation reads is a constant written into it."""
    return hasattr(variable, "val")
