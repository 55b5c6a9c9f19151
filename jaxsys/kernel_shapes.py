"""Stand-ins for a GPU's attention kernels where only shapes are asked for: primitives by name."""

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive


def attention_shapes(forward: str, backward: str) -> tuple[Primitive, Primitive]:
    """Primitives that have shapes and no values: (q, k, v) -> out, statistics; (q, k, v, ...) ->
    their gradients."""
    ahead, back = Primitive(forward), Primitive(backward)
    ahead.multiple_results = back.multiple_results = True

    @ahead.def_abstract_eval
    def _(q: Any, k: Any, v: Any) -> list[Any]:
        del k
        rows, length, heads, _ = q.shape
        statistics = q.update(shape=(rows, heads, length), dtype=jnp.dtype(jnp.float32))
        return [q.update(shape=(*q.shape[:-1], v.shape[-1])), statistics]

    @back.def_abstract_eval
    def _(q: Any, k: Any, v: Any, *_: Any) -> list[Any]:
        return [q, k, v]

    return ahead, back
