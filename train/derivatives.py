"""Whether a layered model's own derivatives are what a step takes them for.

A step adds up gradients of microbatches, block by block, and divides by the batch's weight at the
end. Derivatives of JAX's own make that the gradient of the whole batch; a `custom_vjp` need not,
see `jaxsys.train.adapt.linear`; nor may parameters move the weight, of which no gradient is taken.
Adapters look at a user's model when they take it apart; here it is models that are written by hand.
What jaxsys itself defines (its decoders, and what adapters make) is known, and not traced again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, Parameters, PyTree, WithoutLayer
from jaxsys.lowering.flat import pull_back
from jaxsys.train.adapt.linear import are_zero, why_not


def check_derivatives(model: LayeredModel, parameters: Parameters, microbatch: PyTree) -> None:
    """Raises UsageError if a derivative of the model's would be another number under a schedule.

    Args:
        model: the layered model.
        parameters: shapes, in layer order, in the dtype that is computed in.
        microbatch: shapes of one.
    """
    functions = {"embed": model.embed, **model.kinds, "head_loss": model.head_loss}
    if all(map(_is_ours, functions.values())):
        return
    edge = parameters["edge"]
    x = jax.eval_shape(model.embed, edge, microbatch)
    layer = Layer(index=jax.ShapeDtypeStruct((), jnp.int32))  # type: ignore[arg-type]
    inputs: dict[str, tuple[Any, ...]] = {
        "embed": (edge, microbatch),
        "head_loss": (edge, x, microbatch),
    }
    for kind, stack in model.stacks(parameters["blocks"]).items():
        own = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), stack)
        inputs[kind] = (own, x, microbatch, layer)
    for name, function in functions.items():
        if _is_ours(function):
            continue
        closed = jax.make_jaxpr(function)(*inputs[name])
        for equation in closed.jaxpr.eqns:
            if (reason := why_not(equation)) is not None:
                raise UsageError(f"in {name}, {reason}")
    if not _is_ours(model.head_loss) and _weight_has_gradient(model, edge, x, microbatch):
        raise UsageError(
            "head_loss returns a weight that depends on parameters, whose gradient a step, which "
            "divides last, would leave out; return counts or weights of the batch, or "
            "jax.lax.stop_gradient of it"
        )


def _weight_has_gradient(model: LayeredModel, edge: PyTree, x: PyTree, microbatch: PyTree) -> bool:
    def pulled(edge: PyTree, x: PyTree, microbatch: PyTree) -> list[Any]:
        weight, back = pull_back(
            lambda edge, x: jnp.asarray(model.head_loss(edge, x, microbatch)[1], jnp.float32),
            edge,
            x,
        )
        return [leaf for part in back([jnp.ones_like(weight)]) for leaf in part]

    closed = jax.make_jaxpr(pulled)(edge, x, microbatch)
    return not are_zero(closed)


def _is_ours(function: Callable[..., Any]) -> bool:
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):  # of adapters, by the model that they are added to
            wrapped: Any = function
            function = wrapped.__wrapped__
        elif isinstance(function, WithoutLayer):
            function = function.block
        else:
            break
    return (getattr(function, "__module__", None) or "").startswith("jaxsys.")
