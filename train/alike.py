"""Equations of a trace, written out so that they can be told apart and compared."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsys.layered import PyTree
from jaxsys.lowering.jaxprs import CALLS, is_literal, run, value_of

MOST_COMPARED = 1024
"""Elements of a constant that is compared by value; larger ones must be the same array."""


def written_out(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The jaxpr without calls, and with both branches of every condition and a choice of results.

    A condition over the whole tree (gradient accumulation, skipping bad updates) would tie all its
    leaves together.
    """

    def bodies(equation: Any) -> list[Any] | None:
        if equation.primitive.name == "cond":
            branches = list(equation.params["branches"])
            return None if any(b.effects for b in branches) else branches
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        return [inner] if equation.primitive.name in CALLS and inner is not None else None

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))
        for equation in jaxpr.eqns:
            inner = bodies(equation)
            if inner is None:
                run([equation], values)
                continue
            inputs = [value_of(v, values) for v in equation.invars]
            which, inputs = (
                (inputs[0], inputs[1:]) if equation.primitive.name == "cond" else (None, inputs)
            )
            results = [
                evaluate(body.jaxpr, body.consts, inputs)
                if hasattr(body, "consts")
                else evaluate(body, (), inputs)
                for body in inner
            ]
            chosen = (
                results[0]
                if which is None
                else [_choice(which, r) for r in zip(*results, strict=True)]
            )
            values.update(zip(equation.outvars, chosen, strict=True))
        return [value_of(v, values) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args))(
        *closed.in_avals
    )


def _choice(which: Any, results: Sequence[Any]) -> Any:
    if len(results) == 1 or all(r is results[0] for r in results):
        return results[0]
    index = jnp.clip(which, 0, len(results) - 1)
    if len(results) == 2:
        index = index.astype(bool)
    return jax.lax.select_n(index, *results)


def kind(variable: Any) -> Hashable:
    aval = variable.aval
    return aval.shape, str(aval.dtype), getattr(aval, "weak_type", False)


def same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    a, b = np.asarray(one), np.asarray(other)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def canonical(value: Any) -> Any:
    """Something equal for parameters of equations that mean the same."""
    if isinstance(value, core.ClosedJaxpr):
        return _of_jaxpr(value.jaxpr), tuple(_constant(c) for c in value.consts)
    if isinstance(value, core.Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, Mapping):
        return tuple(sorted((k, canonical(v)) for k, v in value.items()))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(canonical(v) for v in value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _constant(value: Any) -> Hashable:
    if getattr(value, "size", MOST_COMPARED + 1) > MOST_COMPARED:
        return id(value)
    array = np.asarray(value)
    return array.shape, str(array.dtype), array.tobytes()


def _of_jaxpr(jaxpr: Any) -> Hashable:
    numbers: dict[Any, int] = {}

    def name(variable: Any) -> Hashable:
        if is_literal(variable):
            value = np.asarray(variable.val)
            return "literal", value.tobytes(), value.shape, str(value.dtype)
        return numbers.setdefault(variable, len(numbers)), kind(variable)

    head = tuple(name(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            equation.primitive.name,
            canonical(equation.params),
            tuple(name(v) for v in equation.invars),
            tuple(name(v) for v in equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    return head, body, tuple(name(v) for v in jaxpr.outvars)


def traced(function: Callable[..., PyTree], *shapes: PyTree) -> tuple[core.ClosedJaxpr, PyTree]:
    """A function's jaxpr, and the shapes that it returns."""
    return jax.make_jaxpr(function, return_shape=True)(*shapes)
