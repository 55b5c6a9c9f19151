"""Values in rows of arrays that have one or two axes more, and arrays of zeros."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .flat import Leaves


def zeros(specs: Leaves) -> Leaves:
    """Arrays of these shapes and dtypes."""
    return [jnp.zeros(s.shape, s.dtype) for s in specs]


def put_row(buffer: jax.Array, value: jax.Array, *index: Any) -> jax.Array:
    """`buffer` with `value` at the leading indices."""
    starts = (*index, *(0,) * value.ndim)
    lead = (1,) * len(index)
    return lax.dynamic_update_slice(buffer, value.reshape(*lead, *value.shape), starts)


def get_row(buffer: jax.Array, *index: Any) -> jax.Array:
    """What `buffer` holds at the leading indices."""
    shape = buffer.shape[len(index) :]
    starts = (*index, *(0,) * len(shape))
    return lax.dynamic_slice(buffer, starts, ((1,) * len(index)) + shape).reshape(shape)
