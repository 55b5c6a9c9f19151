"""When two operations compute the same of equal inputs, derivatives included.

An operation is known by its primitive and parameters; jaxprs among them are compared equation by
equation, constants by their elements. A custom derivative is compared by what it computes, since
JAX makes new function objects for it at every trace. What cannot be compared is equal to itself
alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_DERIVATIVES = ("jvp_jaxpr_fun", "jvp", "fwd_jaxpr_thunk", "fwd", "bwd", "out_trees")
"""Parameters that hold functions of a custom derivative, or how they name their results."""

_WORDS = (
    "name",
    "debug_info",
    "in_layouts",
    "out_layouts",
    "donated_invars",
    "keep_unused",
    "inline",
)
"""Parameters that say nothing of what is computed."""


UNKNOWN = (TypeError, ValueError, NotImplementedError, AssertionError, jax.errors.JAXTypeError)
"""What a user's own derivative may raise when it is looked at."""


class _Itself:
    """Equal to nothing else."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


Derivatives = dict[Any, tuple[Any, Any]]
"""What is known of custom derivatives, by an equation's identity: the equation, so that its
identity stays its own, and its mark. And the calls whose derivative is being looked at."""


def fingerprint(equation: Any, derivatives: Derivatives) -> Any:
    """A hashable value that says all of an equation but what it reads."""
    name = equation.primitive.name
    shapes = tuple(aval_of(variable) for variable in equation.invars)
    parts = [name, shapes, _parameters(equation, derivatives)]
    call = tuple(parts)
    # A derivative may call its own function again (relu's does): that is the same one.
    if name.startswith(("custom_jvp_call", "custom_vjp_call")) and call not in derivatives:
        derivatives[call] = (None, None)
        parts.append(_derivative(equation, derivatives, forward="jvp" in name))
        del derivatives[call]
    return tuple(parts)


def fingerprint_of_array(value: Any, aval: Any) -> Any:
    """A hashable value that says dtype, shape and elements."""
    return (aval_of_type(aval), words_of(value)[0].tobytes())


def fingerprint_of_jaxpr(jaxpr: Any, consts: Any) -> Any:
    """A hashable value that says all that a jaxpr computes, derivatives aside."""
    return _of_jaxpr(jaxpr, consts, {})


def words_of(value: Any) -> tuple[np.ndarray, Any]:
    """A constant's elements on the host; of keys their words, and how keys are made of them."""
    keys, dtype = None, getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():
            keys, value = jax.random.key_impl(value), jax.random.key_data(value)
    return np.asarray(value), keys


def aval_of(variable: Any) -> Any:
    """Shape and dtype of what an equation reads."""
    return aval_of_type(variable.aval)


def aval_of_type(aval: Any) -> Any:
    """Shape and dtype; how a dtype would be promoted no longer matters in a jaxpr."""
    return (aval.shape, str(aval.dtype))


def opened(inner: Any) -> tuple[Any, Any]:
    """A jaxpr without its constants, and those, as each JAX release holds them."""
    if isinstance(inner, core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, getattr(inner, "consts", ())


def call_of(equation: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """An equation as a function of what it reads; its results that have gradients."""

    def call(inputs: Sequence[Any]) -> list[Any]:
        bound = equation.primitive.get_bind_params(equation.params)
        functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
        outputs = equation.primitive.bind(*functions, *inputs, **parameters)
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        return [o for o in outputs if jnp.issubdtype(o.dtype, jnp.inexact)]

    return call


def scan_counts(body: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, int]:
    """How many constants and carries a scan has.

    Each JAX release says it in another way; shapes tell alike: what is taken apart, or stacked, has
    one axis more outside the body than in it.

    Args:
        body: its jaxpr.
        inputs: shapes of what it reads.
        outputs: shapes of its results.
    """

    def alike(inner: Any, outer: Sequence[Any]) -> int:
        return sum(len(a.aval.shape) == len(b) for a, b in zip(inner, outer, strict=True))

    before_xs, carry = alike(body.invars, inputs), alike(body.outvars, outputs)
    return before_xs - carry, carry


def _parameters(equation: Any, derivatives: Derivatives) -> Any:
    skip = (*_WORDS, *(_DERIVATIVES if equation.primitive.name.startswith("custom_") else ()))
    return tuple(
        (key, _of(value, derivatives))
        for key, value in sorted(equation.params.items())
        if key not in skip
    )


def _of(value: Any, derivatives: Derivatives) -> Any:
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
        return _of_jaxpr(*opened(value), derivatives)
    if isinstance(value, list | tuple):
        fields = tuple(_of(item, derivatives) for item in value)
        return (type(value).__name__, *fields)
    if isinstance(value, dict):
        return tuple((key, _of(item, derivatives)) for key, item in sorted(value.items(), key=str))
    if isinstance(value, np.ndarray | jax.Array):
        return fingerprint_of_array(value, value)
    if isinstance(value, bool | int | float | complex):
        return (type(value).__name__, value)
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return value


def _of_jaxpr(jaxpr: Any, consts: Any, derivatives: Derivatives) -> Any:
    numbers: dict[Any, int] = {}

    def name(variable: Any) -> int:
        return numbers.setdefault(variable, len(numbers))

    def read(atom: Any) -> Any:
        if hasattr(atom, "val"):
            return fingerprint_of_array(atom.val, atom.aval)
        return name(atom)

    held = tuple(
        (name(variable), fingerprint_of_array(const, variable.aval))
        for variable, const in zip(jaxpr.constvars, consts, strict=bool(consts))
    )
    given = tuple((name(variable), aval_of(variable)) for variable in jaxpr.invars)
    rows = tuple(
        (
            fingerprint(equation, derivatives),
            tuple(read(atom) for atom in equation.invars),
            tuple((name(variable), aval_of(variable)) for variable in equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    return (held, given, rows, tuple(read(atom) for atom in jaxpr.outvars))


def _derivative(equation: Any, derivatives: Derivatives, *, forward: bool) -> Any:
    """What the custom derivative of an equation computes, as a jaxpr's fingerprint."""
    if (kept := derivatives.get(id(equation))) is not None:
        return kept[1]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    moving = [n for n, s in enumerate(shapes) if jnp.issubdtype(s.dtype, jnp.inexact)]

    whole = call_of(equation)

    def call(inputs: Any, chosen: Any) -> Any:
        inputs = list(inputs)
        for n, value in zip(moving, chosen, strict=True):
            inputs[n] = value
        return whole(inputs)

    def pushed(inputs: Any, tangents: Any) -> Any:
        chosen = [inputs[n] for n in moving]
        return jax.jvp(lambda c: call(inputs, c), (chosen,), (tangents,))

    def pulled(inputs: Any) -> Any:
        outputs, pull = jax.vjp(lambda c: call(inputs, c), [inputs[n] for n in moving])
        return outputs, pull(outputs)

    try:
        if forward:
            closed = jax.make_jaxpr(pushed)(shapes, [shapes[n] for n in moving])
        else:
            closed = jax.make_jaxpr(pulled)(shapes)
    except UNKNOWN:  # of the user's own derivative; it is then like itself alone
        mark: Any = _Itself(equation)
    else:
        mark = _of_jaxpr(closed.jaxpr, closed.consts, derivatives)
    derivatives[id(equation)] = (equation, mark)
    return mark
