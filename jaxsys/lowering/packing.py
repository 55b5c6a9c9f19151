"""One flat row for all of a layer's parameters, so that a chunk travels as one message.

A permute for each leaf would leave the compiler a dozen small transfers to place around a tick's
compute; with one large array for each stream there is one, which it can hold open all tick long.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import PyTree


class Packing:
    """How one layer's leaves lie in a row of `size` elements."""

    def __init__(self, layer: PyTree) -> None:
        """`layer`: shapes and dtypes of one layer's parameters, all of one dtype."""
        leaves, self.structure = jax.tree.flatten(layer)
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.size = sum(self.sizes)
        if len({leaf.dtype for leaf in leaves}) > 1:
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            raise UsageError(f"a layer's parameters have dtypes {kinds}; a ring carries one")

    def pack(self, tree: PyTree) -> jax.Array:
        """Leaves [..., *shape] -> [..., size]."""
        leaves = jax.tree.leaves(tree)
        lead = leaves[0].shape[: leaves[0].ndim - len(self.shapes[0])]
        flat = [leaf.reshape(*lead, size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return jnp.concatenate(flat, axis=-1)

    def unpack(self, rows: jax.Array) -> PyTree:
        """[..., size] -> leaves [..., *shape]."""
        lead, leaves, start = rows.shape[:-1], [], 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            part = jax.lax.slice_in_dim(rows, start, start + size, axis=-1)
            leaves.append(part.reshape(*lead, *shape))
            start += size
        return jax.tree.unflatten(self.structure, leaves)

    def packed_block(
        self, block: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    ) -> Callable[[jax.Array, jax.Array, PyTree], jax.Array]:
        """The same block on a row, whose gradient is one concatenation."""
        unpack = jax.custom_vjp(self.unpack)
        # The transpose of slices would be padded sums; packing the cotangents says the same.
        unpack.defvjp(lambda row: (self.unpack(row), None), lambda _, tree: (self.pack(tree),))
        return lambda row, x, microbatch: block(unpack(row), x, microbatch)
