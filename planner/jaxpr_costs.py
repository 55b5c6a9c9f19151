"""What a JAX function costs, read from its jaxpr: products, bytes, residuals, repeated layers.

XLA's own cost analysis counts a loop's body once; here a scan's body counts `length` times, and of
a conditional the dearest branch. Products are those of `dot_general` and convolutions; everything
else is taken to pass through memory once (its results written and read), which fusion makes an
upper bound. What runs on a mesh's devices with parts of its operands is counted on all of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxsys.errors import UsageError

PyTree = Any

FREE = frozenset(
    {
        "reshape",
        "squeeze",
        "broadcast_in_dim",
        "convert_element_type",
        "transpose",
        "stop_gradient",
        "sharding_constraint",
        "optimization_barrier",
        "copy",
        "slice",
        "iota",
    }
)
"""Operations that XLA fuses into their readers or that move nothing."""
PASSES_WEIGHTS_ON = FREE | {"dynamic_slice", "gather", "custom_jvp_call", "custom_vjp_call"}


@dataclass(slots=True, kw_only=True)
class FunctionCost:
    """Forward cost of one call."""

    product_flops: float = 0.0
    elementwise_bytes: float = 0.0
    while_loops: int = 0
    """Loops without a known length, counted as run once."""
    flops_by_input: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Input number -> FLOPs of products that read it directly, or through a reshape or cast."""
    scanned: dict[int, int] = field(default_factory=dict)
    """Input number -> length, for inputs that a scan takes apart along their leading axis."""
    scans: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    """The same scan by scan: its length and the inputs that it takes apart."""
    carry_bytes: dict[int, float] = field(default_factory=dict)
    """Scan length -> bytes of what the longest such scan hands from step to step."""


def function_cost(closed: core.ClosedJaxpr) -> FunctionCost:
    """Counts a traced function, its inner functions included."""
    cost = FunctionCost()
    origins = {variable: index for index, variable in enumerate(closed.jaxpr.invars)}
    _walk(closed.jaxpr, origins, 1.0, cost)
    return cost


def trace_loss(loss_fn: Callable[..., Any], params: PyTree, batch: PyTree) -> core.ClosedJaxpr:
    """The jaxpr of a loss, from arrays or shapes.

    Raises:
        UsageError: if the function does not trace, or does not return a scalar (or one with
            auxiliary output).
    """
    shapes = (shapes_of(params), shapes_of(batch))
    try:
        closed, out = jax.make_jaxpr(loss_fn, return_shape=True)(*shapes)
    except Exception as error:  # whatever the user's function raises
        first = str(error).strip().splitlines()
        raise UsageError(
            f"the loss does not trace with these parameters and batch: {type(error).__name__}: "
            f"{first[0] if first else ''}"
        ) from error
    head = out[0] if isinstance(out, tuple) else out
    if getattr(head, "shape", None) != ():
        raise UsageError(
            f"the loss returns {_shown(head)}; it must return a scalar, or (scalar, auxiliary)"
        )
    return closed


def residual_bytes(loss_fn: Callable[..., Any], params: PyTree, batch: PyTree) -> float:
    """Bytes that the backward pass needs of the forward pass, parameters and batch not counted."""
    kept = trace_residuals(loss_fn, params, batch).jaxpr.outvars
    return float(sum(variable_bytes(v) for v in kept))


def trace_residuals(loss_fn: Callable[..., Any], params: PyTree, batch: PyTree) -> core.ClosedJaxpr:
    """The forward pass as a jaxpr that returns what the backward pass needs of it."""

    def residuals(params: PyTree, batch: PyTree) -> PyTree:
        def scalar(p: PyTree) -> jax.Array:
            out = loss_fn(p, batch)
            return out[0] if isinstance(out, tuple) else out

        return jax.tree.leaves(jax.vjp(scalar, params)[1])

    closed = jax.make_jaxpr(residuals)(shapes_of(params), shapes_of(batch))
    given = set(closed.jaxpr.invars) | set(closed.jaxpr.constvars)
    kept = {v: None for v in closed.jaxpr.outvars if isinstance(v, core.Var) and v not in given}
    return closed.replace(jaxpr=closed.jaxpr.replace(outvars=list(kept)))


def shapes_of(tree: PyTree) -> PyTree:
    """Arrays -> ShapeDtypeStructs; what has no shape is a scalar."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)), tree
    )


def _walk(
    jaxpr: core.Jaxpr, origins: dict[Any, int], times: float, cost: FunctionCost
) -> dict[Any, int]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = list(_inner_jaxprs(equation))
        if name == "dot_general":
            _product(equation, _dot_flops(equation), origins, times, cost)
        elif name == "conv_general_dilated":
            _product(equation, _convolution_flops(equation), origins, times, cost)
        elif name == "scan":
            _scan(equation, inner[0], origins, times, cost)
        elif name == "cond":
            _dearest(equation, inner, origins, times, cost)
        elif name == "while":
            _while(equation, origins, times, cost)
        elif inner:
            each = times * _copies(equation)
            for one in inner:
                _walk(one, _pass_in(one, equation.invars, origins), each, cost)
        elif name not in FREE:
            cost.elementwise_bytes += 2 * times * sum(variable_bytes(v) for v in equation.outvars)
        if name in PASSES_WEIGHTS_ON and not inner:
            source = next((v for v in equation.invars if _known(v, origins)), None)
            if source is not None:
                origins[equation.outvars[0]] = origins[source]
    return origins


def _product(
    equation: Any, flops: float, origins: dict[Any, int], times: float, cost: FunctionCost
) -> None:
    cost.product_flops += times * flops
    for variable in equation.invars[:2]:
        if _known(variable, origins):
            cost.flops_by_input[origins[variable]] += times * flops


def _scan(
    equation: Any, body: core.Jaxpr, origins: dict[Any, int], times: float, cost: FunctionCost
) -> None:
    length = equation.params["length"]
    # Which are constants and which carried is said in another way by each JAX; shapes tell alike:
    # what is taken apart, or stacked, has one axis more outside the body than in it.
    alike = [
        rank(mine) == rank(theirs)
        for mine, theirs in zip(body.invars, equation.invars, strict=True)
    ]
    taken = {
        origins[variable]
        for variable, whole in zip(equation.invars, alike, strict=True)
        if not whole and _known(variable, origins)
    }
    cost.scanned |= {index: length for index in taken}
    cost.scans.append((length, frozenset(taken)))
    handed_on = sum(
        rank(mine) == rank(theirs)
        for mine, theirs in zip(body.outvars, equation.outvars, strict=True)
    )
    carried = equation.invars[sum(alike) - handed_on : sum(alike)]
    held = sum(variable_bytes(v) for v in carried)
    cost.carry_bytes[length] = max(cost.carry_bytes.get(length, 0.0), held)
    _walk(body, _pass_in(body, equation.invars, origins), times * length, cost)


def _while(equation: Any, origins: dict[Any, int], times: float, cost: FunctionCost) -> None:
    """Its operands are the condition's constants, the body's, and what is carried."""
    cost.while_loops += 1
    condition, body = (opened(equation.params[f"{part}_jaxpr"]) for part in ("cond", "body"))
    asked, given = equation.params["cond_nconsts"], equation.invars
    carried = len(given) - asked - equation.params["body_nconsts"]
    tested = [*given[:asked], *given[len(given) - carried :]]
    _walk(condition, _pass_in(condition, tested, origins), times, cost)
    _walk(body, _pass_in(body, given[asked:], origins), times, cost)


def _copies(equation: Any) -> int:
    """On how many devices an inner function runs with its own part of what it is given."""
    if equation.primitive.name != "shard_map":
        return 1
    mesh, manual = equation.params["mesh"], equation.params["newly_manual_axes"]
    return math.prod(size for axis, size in mesh.shape.items() if axis in manual)


def _dearest(
    equation: Any,
    branches: list[core.Jaxpr],
    origins: dict[Any, int],
    times: float,
    cost: FunctionCost,
) -> None:
    counted = []
    for branch in branches:
        one = FunctionCost()
        _walk(branch, _pass_in(branch, equation.invars[1:], origins), times, one)
        counted.append(one)
    most = max(counted, key=lambda one: (one.product_flops, one.elementwise_bytes))
    cost.product_flops += most.product_flops
    cost.elementwise_bytes += most.elementwise_bytes
    cost.while_loops += most.while_loops
    for index, flops in most.flops_by_input.items():
        cost.flops_by_input[index] += flops


def _inner_jaxprs(equation: Any) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield opened(one)


def opened(one: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
    """An inner jaxpr as JAX 0.11 and later hold it, without its constants."""
    return one.jaxpr if isinstance(one, core.ClosedJaxpr) else one


def _pass_in(inner: core.Jaxpr, given: Any, origins: dict[Any, int]) -> dict[Any, int]:
    offset = len(given) - len(inner.invars)
    pairs = zip(inner.invars, given[max(0, offset) :], strict=False)
    return {mine: origins[theirs] for mine, theirs in pairs if _known(theirs, origins)}


def _known(variable: Any, origins: dict[Any, int]) -> bool:
    return isinstance(variable, core.Var) and variable in origins


def _dot_flops(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _convolution_flops(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"]
    # Each output takes every kernel element of its output channel once.
    per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output


def rank(variable: Any) -> int:
    """How many axes a jaxpr's variable has."""
    return variable.aval.ndim


def variable_bytes(variable: Any) -> float:
    """What a variable of a jaxpr takes."""
    aval = variable.aval
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0.0
    try:
        return float(math.prod(aval.shape) * aval.dtype.itemsize)
    except TypeError:
        return 0.0


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{value.dtype}{list(shape)}" if shape is not None else type(value).__name__
