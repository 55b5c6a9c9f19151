"""Flat rows for all of a layer's parameters, so that a chunk travels as one message.

A permute for each leaf would leave the compiler a dozen small transfers to place around a tick's
compute; with one large array for each stream there is one, which it can hold open all tick long.
Constants that are no floats travel with them, in a row for each dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.layered import Block, Layer, PyTree

from .flat import Leaves, floats, is_float

Row = list[jax.Array]
"""A layer's leaves in rows [..., size], one for each dtype; gradients have rows of floats alone."""


class Packing:
    """How one layer's leaves lie in rows."""

    def __init__(self, layer: PyTree) -> None:
        """`layer`: shapes and dtypes of one layer's parameters."""
        self.leaves, self.structure = jax.tree.flatten(layer)
        dtypes = dict.fromkeys(leaf.dtype for leaf in self.leaves)
        self.dtypes = sorted(dtypes, key=lambda dtype: not jnp.issubdtype(dtype, jnp.floating))
        """Floats first."""

    def pack(self, tree: PyTree) -> Row:
        """Leaves [..., *shape] -> rows [..., size]."""
        return _pack(jax.tree.leaves(tree), self.leaves, self.dtypes)

    def pack_gradient(self, gradients: Leaves) -> Row:
        """Gradients of floats [..., *shape] -> rows [..., size]."""
        own = floats(self.leaves)
        return _pack(gradients, own, [d for d in self.dtypes if jnp.issubdtype(d, jnp.floating)])

    def unpack(self, rows: Row) -> PyTree:
        """Rows [..., size] -> leaves [..., *shape]."""
        return jax.tree.unflatten(self.structure, _unpack(rows, self.leaves, self.dtypes))

    def unpack_gradient(self, rows: Row) -> Leaves:
        """Rows [..., size] -> gradients of floats [..., *shape]."""
        own = floats(self.leaves)
        return _unpack(rows, own, [d for d in self.dtypes if jnp.issubdtype(d, jnp.floating)])

    def packed_block(self, block: Block) -> Block:
        """The same block on rows, whose gradient is one concatenation."""

        @jax.custom_vjp
        def unpack(floating: Row) -> Leaves:
            return self.unpack_gradient(floating)

        # The transpose of slices would be padded sums; packing the cotangents says the same.
        unpack.defvjp(
            lambda floating: (unpack(floating), None),
            lambda _, leaves: (self.pack_gradient(leaves),),
        )

        def packed(rows: Row, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            rest = iter(unpack([row for row in rows if is_float(row)]))
            leaves = [
                next(rest) if is_float(leaf) else leaf
                for leaf in jax.tree.leaves(self.unpack(rows))
            ]
            return block(jax.tree.unflatten(self.structure, leaves), x, microbatch, layer)

        return packed


def _pack(leaves: Leaves, specs: Leaves, dtypes: list[Any]) -> Row:
    lead = leaves[0].shape[: leaves[0].ndim - len(specs[0].shape)] if leaves else ()
    return [
        jnp.concatenate(
            [
                leaf.reshape(*lead, math.prod(spec.shape))
                for leaf, spec in zip(leaves, specs, strict=True)
                if spec.dtype == dtype
            ],
            axis=-1,
        )
        for dtype in dtypes
    ]


def _unpack(rows: Row, specs: Leaves, dtypes: list[Any]) -> Leaves:
    starts = [0] * len(dtypes)
    leaves = []
    for spec in specs:
        place, size = dtypes.index(spec.dtype), math.prod(spec.shape)
        row, start = rows[place], starts[place]
        part = jax.lax.slice_in_dim(row, start, start + size, axis=-1)
        leaves.append(part.reshape(*row.shape[:-1], *spec.shape))
        starts[place] += size
    return leaves
