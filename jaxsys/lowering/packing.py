"""Flat rows for all of a layer's parameters, so that a chunk travels as one message.

A permute for each leaf would leave the compiler a dozen small transfers to place around a tick's
compute; with one large array for each stream there is one, which it can hold open all tick long.
Constants that are no floats travel with them, in a row for each dtype. Blocks of unlike kinds have
rows of one length, the longest kind's: a tick takes whatever kind comes.

Where the devices of a node share a place of the ring, a row is a device's own piece of each leaf:
that is what rests with it and what it sends on, so that a layer crosses the link between nodes once
for the node. A block joins the pieces as it begins, and cuts its gradient as it ends.

Legend: D devices of a place, n elements of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.layered import BlockFunction, Layer, LayeredModel, PyTree, each_form

from .flat import Leaves, floats, is_float, with_floats
from .place import SharedPlace

Row = list[jax.Array]
"""A layer's leaves in rows [..., size], one for each dtype; gradients have rows of floats alone."""


class Packing:
    """How a layer's leaves lie in rows, by kind."""

    def __init__(self, layers: Mapping[str, PyTree], *, place: SharedPlace | None = None) -> None:
        """Lays them out.

        Args:
            layers: kind -> shapes and dtypes of one layer's parameters, as a device has them.
            place: how the devices of a place share them; None where each has them whole.
        """
        self._place = place
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
        blocks = {
            kind: each_form(functools.partial(self.packed_block, kind), block)
            for kind, block in model.kinds.items()
        }
        block = next(iter(blocks.values())) if callable(model.block) else blocks
        return dataclasses.replace(model, block=block)

    def packed_block(self, kind: str, block: BlockFunction) -> BlockFunction:
        """The same block on rows, whose gradient is one concatenation."""

        @jax.custom_vjp
        def unpack(floating: Row) -> Leaves:
            return self._whole_floats(kind, floating)

        # The transpose of slices would be padded sums; packing the cotangents says the same.
        unpack.defvjp(
            lambda floating: (unpack(floating), None),
            lambda _, leaves: (self._own_gradient(kind, leaves),),
        )

        def packed(rows: Row, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            weights = with_floats(self._whole(kind, rows), unpack(floats(rows)))
            return block(weights, x, microbatch, layer)

        return packed

    # Between a device's rows and whole leaves, which are the same where it has a place alone.

    def _whole(self, kind: str, rows: Row) -> PyTree:
        """Rows [n] -> whole leaves; floats among them are for `_whole_floats` to say."""
        if self._place is None:
            return self.unpack(kind, rows)
        # Constants come from other devices too; floats, which are replaced, from none.
        gathered = [
            jnp.broadcast_to(row, (self._place.devices, *row.shape))
            if is_float(row)
            else self._place.gathered(row)
            for row in rows
        ]
        leaves = jax.tree.leaves(self.unpack(kind, gathered))
        pairs = zip(self._place.axes[kind], leaves, strict=True)
        whole = [self._place.joined(axis, pieces) for axis, pieces in pairs]
        return jax.tree.unflatten(self._structure[kind], whole)

    def _whole_floats(self, kind: str, floating: Row) -> Leaves:
        """Rows of floats [n] -> whole leaves of floats."""
        if self._place is None:
            return self.unpack_gradient(kind, floating)
        pieces = self.unpack_gradient(kind, [self._place.gathered(row) for row in floating])
        pairs = zip(self._float_axes(kind), pieces, strict=True)
        return [self._place.joined(axis, leaf) for axis, leaf in pairs]

    def _own_gradient(self, kind: str, leaves: Leaves) -> Row:
        """Gradients of whole leaves of floats -> a device's rows [n], summed over the place."""
        place = self._place
        if place is None:
            return self.pack_gradient(kind, leaves)
        pairs = zip(self._float_axes(kind), leaves, strict=True)
        rows = self.pack_gradient(kind, [place.cut(axis, leaf) for axis, leaf in pairs])
        return [place.summed(row) for row in rows]

    def _float_axes(self, kind: str) -> list[int | None]:
        assert self._place is not None
        pairs = zip(self._place.axes[kind], self._leaves[kind], strict=True)
        return [axis for axis, leaf in pairs if is_float(leaf)]

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
