"""Jaxprs taken apart: calls written out, parts run, and what an output depends on."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

CALLS = ("pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call")
"""Primitives that only call a jaxpr: they can be written out."""

VIEWS = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims")
"""Primitives that only rearrange: cheaper done again than kept as a second copy."""


def inlined(closed: core.ClosedJaxpr, calls: Sequence[str] = CALLS) -> core.ClosedJaxpr:
    """The same jaxpr with the bodies of its calls written out, or of those named."""

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))
        for equation in jaxpr.eqns:
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if equation.primitive.name in calls and inner is not None:
                inputs = [value_of(v, values) for v in equation.invars]
                body, inner_consts = (
                    (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                )
                outputs = evaluate(body, inner_consts, inputs)
                values.update(zip(equation.outvars, outputs, strict=True))
            else:
                run([equation], values)
        return [value_of(v, values) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args))(
        *closed.in_avals
    )


def named(closed: core.ClosedJaxpr, arguments: Any) -> dict[Any, Any]:
    """A jaxpr's inputs, the leaves of `arguments`, and its constants by variable."""
    values = dict(zip(closed.jaxpr.invars, jax.tree.leaves(arguments), strict=True))
    return values | dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))


def run(equations: list[Any], values: dict[Any, Any]) -> None:
    """Evaluates equations, whose inputs are in `values`, into it."""
    for equation in equations:
        outputs = results_of(equation, [value_of(v, values) for v in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))


def results_of(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """What one equation makes of other inputs than its own."""
    bound = equation.primitive.get_bind_params(equation.params)
    # A pair (functions, parameters) in some JAX releases, parameters alone in others.
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
    outputs = equation.primitive.bind(*functions, *inputs, **parameters)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def slice_of(jaxpr: Any, outputs: list[Any], given: Iterable[Any] = ()) -> list[Any]:
    """The equations that the outputs depend on, in order, where `given` variables are there."""
    given = set(given)
    needed = {v for v in outputs if not is_literal(v)} - given
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(v in needed for v in equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if not is_literal(v) and v not in given)
    return kept[::-1]


def value_of(variable: Any, values: dict[Any, Any]) -> Any:
    """What an equation reads: a variable's value, or the constant written into it."""
    return variable.val if is_literal(variable) else values[variable]


def is_literal(variable: Any) -> bool:
    """Whether what an equation reads is a constant written into it."""
    return hasattr(variable, "val")


def bytes_of(variable: Any) -> int:
    """Of what a variable holds."""
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
