"""Whether a layered model's own derivatives are what a step takes them for.

A step adds up gradients of microbatches, block by block, and divides by the batch's weight at the
end. Derivatives of JAX's own make that the gradient of the whole batch; a `custom_vjp` need not,
see `jaxsys.train.adapt.linear`. Adapters look at a user's model when they take it apart; here it is
models that are written by hand. What jaxsys itself defines (its decoders, and what adapters make)
is known, and not traced again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, Parameters, PyTree
from jaxsys.train.adapt.linear import why_not


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


def _is_ours(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith("jaxsys.")
