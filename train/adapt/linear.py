"""Whether a custom derivative hands gradients on linearly.

A step adds up the gradients of its microbatches and divides by their weight afterwards. That is the
gradient of the whole batch's mean only if every backward pass is linear in what it is given. JAX's
own are; a `custom_vjp` may clip, normalise or round the gradient it gets, and would then train
another model under a schedule than in a loop, without a word. Adapted models may have such ones
where each sample is treated alone (`alone`): they divide first.

A `custom_vjp` with symbolic zeros is told which of its inputs are differentiated. Schedules
differentiate by parts (what is between blocks, then parameters), so such a derivative must give
each input the same whatever else is differentiated.

Followed through the backward pass is what the gradient enters: nothing, linearly, or otherwise. An
operation that is not known (a kernel's) is believed to be linear.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsys.train.adapt.fingerprint import (
    UNKNOWN,
    call_of,
    fingerprint_of_jaxpr,
    opened,
    scan_counts,
)

Part = Literal["zero", "none", "linear", "other"]
"""What of the gradient is in a value; "zero" is a value that is zero, linear in anything."""

_CHANGES = frozenset(
    ("abs", "acos", "acosh", "and", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh")
    + ("cbrt", "ceil", "clamp", "cos", "cosh", "cumlogsumexp", "cummax", "cummin", "cumprod", "eq")
    + ("erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "is_finite", "le")
    + ("log", "log1p", "logistic", "lt", "max", "min", "ne", "nextafter", "not", "or", "pow")
    + ("reduce_max", "reduce_min", "reduce_prod", "rem", "round", "rsqrt", "sign", "sin", "sinh")
    + ("sort", "sqrt", "square", "tan", "tanh", "top_k", "xor")
)
"""Linear in nothing."""

_STAYS_ZERO = frozenset(
    ("broadcast_in_dim", "convert_element_type", "copy", "mul", "reshape", "squeeze", "transpose")
)
_PRODUCTS = frozenset(("mul", "dot_general", "conv_general_dilated"))
_CALLS = frozenset(
    ("checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")
    + ("custom_vjp_call_jaxpr", "remat", "remat2")
)
_MOST_ROUNDS = 8


NOT_LINEAR = (
    "a custom derivative (custom_vjp) is not linear in the gradient that it is given (it clips, "
    "normalises or rounds it)"
)
_LATE = (
    f"{NOT_LINEAR}; a step adds up its microbatches' gradients before they are divided by the "
    "batch's weight, so it would be another number: take the whole model apart with from_function, "
    "which divides first, or leave that to the optimizer"
)
_BY_PARTS = (
    "a custom derivative (symbolic_zeros=True) gives an input another gradient where fewer of its "
    "inputs are differentiated; a schedule differentiates by parts, so it would be another number: "
    "leave symbolic_zeros out"
)


def why_not(equation: Any) -> str | None:
    """Why the custom derivatives in an equation are others under a schedule that divides last.

    Args:
        equation: of a jaxpr; those in its own jaxprs count too.

    Returns:
        None if they are not.
    """
    return _LATE if not_linear(equation) else why_not_by_parts(equation)


def not_linear(equation: Any) -> tuple[Any, ...]:
    """Equations in one, or itself, with a custom derivative that is not linear."""
    return tuple(inner for inner in custom_derivatives(equation) if not is_linear(inner))


def why_not_by_parts(equation: Any) -> str | None:
    """Why custom derivatives in an equation are others where fewer inputs are differentiated."""
    for inner in custom_derivatives(equation):
        if inner.params.get("symbolic_zeros") and not _is_by_parts(inner):
            return _BY_PARTS
    return None


def custom_derivatives(equation: Any) -> Iterator[Any]:
    """Equations with a `custom_vjp`, the equation itself and those in its jaxprs."""
    if equation.primitive.name.startswith("custom_vjp_call"):
        yield equation
    for inner in _jaxprs(equation.params):
        for deeper in inner.eqns:
            yield from custom_derivatives(deeper)


def is_linear(equation: Any) -> bool:
    """Whether a `custom_vjp`'s backward pass is linear in the gradient it is given."""
    shapes = shapes_of(equation)
    try:
        outputs = jax.eval_shape(call_of(equation), shapes)
        moving = [n for n, shape in enumerate(shapes) if moves(shape)]
        closed = jax.make_jaxpr(pulled(equation, moving))(shapes, outputs)
    except UNKNOWN:  # of the user's own
        return True
    parts: list[Part] = [*("none" for _ in shapes), *("linear" for _ in outputs)]
    return "other" not in _followed(closed.jaxpr, closed.consts, parts)


def _is_by_parts(equation: Any) -> bool:
    """Whether each input's gradient is the same where it alone is differentiated."""
    shapes = shapes_of(equation)
    moving = [n for n, shape in enumerate(shapes) if moves(shape)]

    def mark(chosen: list[int], place: int) -> Any:
        back = pulled(equation, chosen)
        closed = jax.make_jaxpr(lambda x, g: back(x, g)[place])(shapes, outputs)
        return fingerprint_of_jaxpr(_live(closed.jaxpr), closed.consts)

    try:
        outputs = jax.eval_shape(call_of(equation), shapes)
        return all(mark(moving, place) == mark([n], 0) for place, n in enumerate(moving))
    except UNKNOWN:
        return True


def parts_of(closed: Any, inputs: int) -> list[Part]:
    """What of the gradients is in each result of a backward pass (inputs, then gradients)."""
    gradients = len(closed.jaxpr.invars) - inputs
    parts: list[Part] = ["none" if n < inputs else "linear" for n in range(inputs + gradients)]
    return _followed(closed.jaxpr, closed.consts, parts)


def are_zero(closed: Any) -> bool:
    """Whether all results of a jaxpr are zero whatever it is given."""
    return all(part == "zero" for part in parts_of(closed, len(closed.jaxpr.invars)))


def shapes_of(equation: Any) -> list[jax.ShapeDtypeStruct]:
    """Of what an equation reads."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]


def pulled(equation: Any, chosen: Sequence[int]) -> Callable[[Any, Any], list[Any]]:
    """(inputs, gradients of the outputs) -> gradients of the chosen inputs, the others constant."""
    call = call_of(equation)

    def back(inputs: Any, gradients: Any) -> list[Any]:
        def of(moving: Any) -> Any:
            whole = list(inputs)
            for n, value in zip(chosen, moving, strict=True):
                whole[n] = value
            return call(whole)

        return jax.vjp(of, [inputs[n] for n in chosen])[1](gradients)[0]

    return back


def _live(jaxpr: Any) -> Any:
    """A jaxpr without the equations that its outputs do not depend on."""
    wanted = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(variable in wanted for variable in equation.outvars):
            kept.append(equation)
            wanted.update(atom for atom in equation.invars if not hasattr(atom, "val"))
    return jaxpr.replace(eqns=kept[::-1])


def moves(value: Any) -> bool:
    """Whether a value has a gradient."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _jaxprs(parameters: Any) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield opened(item)[0]


def _followed(jaxpr: Any, consts: Any, parts: Sequence[Part]) -> list[Part]:
    known: dict[Any, Part] = dict(zip(jaxpr.invars, parts, strict=True))
    for variable, const in zip(jaxpr.constvars, consts, strict=False):
        known[variable] = _of_constant(const)

    def read(atom: Any) -> Part:
        return _of_constant(atom.val) if hasattr(atom, "val") else known.get(atom, "none")

    for equation in jaxpr.eqns:
        found = _results(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_constant(value: Any) -> Part:
    try:
        return "none" if np.any(np.asarray(value)) else "zero"
    except TypeError:  # keys
        return "none"


def _results(equation: Any, parts: list[Part]) -> list[Part]:
    name, parameters = equation.primitive.name, equation.params
    count = len(equation.outvars)
    if all(part == "zero" for part in parts) and name in _STAYS_ZERO:
        return ["zero"] * count
    if all(part in ("zero", "none") for part in parts):
        return ["none"] * count
    if "other" in parts:
        return ["other"] * count
    inner = next(
        (parameters[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in parameters), None
    )
    if name in _CALLS and inner is not None:
        return _followed(*opened(inner), parts)
    if name == "scan":
        return _scan(equation, parts)
    if name == "cond":
        if parts[0] == "linear":
            return ["other"] * count
        ways = [_followed(*opened(branch), parts[1:]) for branch in parameters["branches"]]
        return [_sum(way) for way in zip(*ways, strict=True)]
    if name in _CHANGES:
        return ["other"] * count
    if name in _PRODUCTS:
        return ["linear" if parts.count("linear") == 1 else "other"] * count
    if name == "div":
        return ["linear" if parts[1] != "linear" else "other"]
    if name == "integer_pow":
        return ["linear" if parameters["y"] == 1 else "other"]
    if name == "convert_element_type":
        return ["linear" if moves(equation.outvars[0].aval) else "other"]
    if name == "select_n":
        return ["other"] if parts[0] == "linear" else [_sum(parts[1:])]
    if name in ("add", "add_any", "sub", "concatenate", "stack", "pad"):
        return [_sum(parts)]
    if name in ("dynamic_update_slice", "scatter-add", "scatter_add"):
        return [_sum(parts[:2] if name == "dynamic_update_slice" else [parts[0], parts[2]])]
    return ["linear"] * count


def _sum(parts: Sequence[Part]) -> Part:
    """Of a sum, or a choice: a constant beside the gradient is linear in it only if it is zero."""
    if all(part == "zero" for part in parts):
        return "zero"
    if "linear" not in parts:
        return "other" if "other" in parts else "none"
    return "linear" if all(part in ("linear", "zero") for part in parts) else "other"


def _scan(equation: Any, parts: list[Part]) -> list[Part]:
    body = opened(equation.params["jaxpr"])
    shapes = [[v.aval.shape for v in side] for side in (equation.invars, equation.outvars)]
    consts, carry = scan_counts(body[0], *shapes)
    moving = parts[consts : consts + carry]
    for _ in range(_MOST_ROUNDS):
        found = _followed(*body, [*parts[:consts], *moving, *parts[consts + carry :]])
        joined: list[Part] = [
            a if a == b else _carried(a, b) for a, b in zip(moving, found, strict=False)
        ]
        if joined == moving:
            return [*moving, *found[carry:]]
        moving = joined
    return ["linear" for _ in equation.outvars]


def _carried(before: Part, after: Part) -> Part:
    """Of a carry that is the one at first and the other later."""
    if {before, after} == {"zero", "none"}:
        return "none"
    return _sum([before, after])
