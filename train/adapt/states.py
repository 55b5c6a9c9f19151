"""Where samples lie in all that a loss is made of; see `samples`.

Legend: B samples in the microbatch.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.train.adapt.axes import (
    Along,
    Same,
    State,
    Unknown,
    everything_uneven,
    of_constant,
)
from jaxsys.train.adapt.samples import Followed
from jaxsys.train.adapt.values import BatchLeaf, Constant, Operation, Value, Whole, known

OUTPUT = "jaxsys_model_output"
"""The name of a model's outputs: in what cannot be followed up to there, samples are believed to
lie along the first axis."""

_MOST_ELEMENTS = 1 << 20
"""Of known arrays that are looked at."""


def states_of(
    loss: Value, samples: int, key: int | None, followed: Followed | None = None
) -> dict[Value, State]:
    """Of all that a loss is made of, where samples lie.

    Args:
        loss: a value of a program.
        samples: B.
        key: the microbatch's leaf that is its key.
        followed: what follows operations.
    """
    followed = followed or Followed(samples)
    states: dict[Value, State] = {}
    waiting = [loss]
    while waiting:
        value = waiting[-1]
        maker = value.maker
        if value in states:
            waiting.pop()
        elif maker is None:
            states[waiting.pop()] = state_of_leaf(value, samples, key)
        elif ahead := [one for one in maker.inputs if one not in states]:
            waiting += ahead
        else:
            found = states_made(maker, states, followed)
            states.update(zip(maker.outputs, found, strict=True))
            states.setdefault(value, found[value.place])
    return states


def state_of_leaf(value: Value, samples: int, key: int | None) -> State:
    """Of what no operation makes; arguments as of `states_of`."""
    if isinstance(value, Constant):
        shape = value.aval.shape  # keys made here would belong to whatever traces this
        return of_constant(value.words) if value.keys is None else everything_uneven(shape)
    if isinstance(value, BatchLeaf):
        if value.number == key:
            return Same(drawn=True)
        return Along(0) if value.aval.shape[:1] == (samples,) else Unknown()
    if isinstance(value, Whole) and value.amount is not None:
        return of_constant(value.amount)
    return everything_uneven(value.aval.shape)


def states_made(
    operation: Operation, states: Mapping[Value, State], followed: Followed
) -> list[State]:
    """Of what an operation makes of values whose states are known."""
    if all(not (v.depends or v.varies) for v in operation.outputs):
        return [_of_known(value, followed.known) for value in operation.outputs]
    found = followed.operation(
        operation,
        [states[value] for value in operation.inputs],
        [value.aval.shape for value in operation.inputs],
        [value.aval.shape for value in operation.outputs],
    )
    if operation.primitive.name == "name" and operation.parameters.get("name") == OUTPUT:
        first = operation.outputs[0].aval.shape[:1] == (followed.samples,)
        found = [Along(0) if isinstance(s, Unknown) and first else s for s in found]
    return found


def _of_known(value: Value, found: dict[Value, Any]) -> State:
    """Of what is known now, by its elements; of large arrays these are not looked at."""
    shape = value.aval.shape
    keys = jnp.issubdtype(value.aval.dtype, jax.dtypes.prng_key)
    if keys or math.prod(shape) > _MOST_ELEMENTS:
        return everything_uneven(shape)
    return of_constant(known(value, found))
