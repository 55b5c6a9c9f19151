"""Flat rows for all of a layer's parameters, so that a chunk travels as one message.

A permute for each leaf would leave the compiler a dozen small transfers to place around a tick's
compute; with one large array for each stream there is one, which it can hold open all tick long.
Constants that are no floats travel with them, in a row for each dtype. Blocks of unlike kinds have
rows of one length, the longest kind's: a tick takes whatever kind comes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.layered import Block, Layer, LayeredModel, PyTree

from .flat import Leaves, floats, with_floats

Row = list[jax.Array]
"""A layer's leaves in rows [..., size], one for each dtype; gradients have rows of floats alone."""


class Packing:
    """How a layer's leaves lie in rows, by kind."""

    def __init__(self, layers: Mapping[str, PyTree]) -> None:
        """`layers`: kind -> shapes and dtypes of one layer's parameters."""
        flat = {kind: jax.tree.flatten(layer) for kind, layer in layers.items()}
        self._leaves = {kind: leaves for kind, (leaves, _) in flat.items()}
        self._structure = {kind: structure for kind, (_, structure) in flat.items()}
        sizes: dict[Any, int] = {}
        for leaves in self._leaves.values():
            for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
                size = sum(math.prod(leaf.shape) for leaf in leaves if leaf.dtype == dtype)
                sizes[dtype] = max(sizes.get(dtype, 0), size)
        self._sizes = dict(sorted(sizes.items(), key=lambda item: not _floating(item[0])))
        """Of every dtype's row; floats first."""

    def pack(self, kind: str, tree: PyTree) -> Row:
        """Leaves [..., *shape] -> rows [..., size]."""
        return _pack(jax.tree.leaves(tree), self._leaves[kind], self._sizes)

    def pack_gradient(self, kind: str, gradients: Leaves) -> Row:
        """Gradients of floats [..., *shape] -> rows [..., size]."""
        return _pack(gradients, floats(self._leaves[kind]), self._float_sizes)

    def unpack(self, kind: str, rows: Row) -> PyTree:
        """Rows [..., size] -> leaves [..., *shape]."""
        leaves = _unpack(rows, self._leaves[kind], self._sizes)
        return jax.tree.unflatten(self._structure[kind], leaves)

    def unpack_gradient(self, kind: str, rows: Row) -> Leaves:
        """Rows [..., size] -> gradients of floats [..., *shape]."""
        return _unpack(rows, floats(self._leaves[kind]), self._float_sizes)

    def packed(self, model: LayeredModel) -> LayeredModel:
        """The model whose blocks take rows."""
        blocks = {kind: self.packed_block(kind, block) for kind, block in model.kinds.items()}
        block = next(iter(blocks.values())) if callable(model.block) else blocks
        return dataclasses.replace(model, block=block)

    def packed_block(self, kind: str, block: Block) -> Block:
        """The same block on rows, whose gradient is one concatenation."""

        @jax.custom_vjp
        def unpack(floating: Row) -> Leaves:
            return self.unpack_gradient(kind, floating)

        # The transpose of slices would be padded sums; packing the cotangents says the same.
        unpack.defvjp(
            lambda floating: (unpack(floating), None),
            lambda _, leaves: (self.pack_gradient(kind, leaves),),
        )

        def packed(rows: Row, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            weights = with_floats(self.unpack(kind, rows), unpack(floats(rows)))
            return block(weights, x, microbatch, layer)

        return packed

    @property
    def _float_sizes(self) -> dict[Any, int]:
        return {dtype: size for dtype, size in self._sizes.items() if _floating(dtype)}


def _floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _pack(leaves: Leaves, specs: Leaves, sizes: dict[Any, int]) -> Row:
    lead = leaves[0].shape[: leaves[0].ndim - len(specs[0].shape)]
    rows = []
    for dtype, size in sizes.items():
        pairs = [(leaf, s) for leaf, s in zip(leaves, specs, strict=True) if s.dtype == dtype]
        parts = [leaf.reshape(*lead, math.prod(s.shape)) for leaf, s in pairs]
        spare = size - sum(math.prod(s.shape) for _, s in pairs)
        if spare:
            parts.append(jnp.zeros((*lead, spare), parts[0].dtype if parts else dtype))
        rows.append(jnp.concatenate(parts, axis=-1))
    return rows


def _unpack(rows: Row, specs: Leaves, sizes: dict[Any, int]) -> Leaves:
    held = dict(zip(sizes, rows, strict=True))
    starts = dict.fromkeys(sizes, 0)
    leaves = []
    for spec in specs:
        row, start, size = held[spec.dtype], starts[spec.dtype], math.prod(spec.shape)
        part = jax.lax.slice_in_dim(row, start, start + size, axis=-1)
        leaves.append(part.reshape(*row.shape[:-1], *spec.shape))
        starts[spec.dtype] += size
    return leaves
