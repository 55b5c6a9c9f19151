"""How the shards of blocks lie on a device, and how whole leaves come of them and go back.

Legend: P devices, K layers of a chunk, n elements of a chunk's shard.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsys.layered import PyTree
from jaxsys.mesh import ring_axis

from .base import is_spec
from .flat import Leaves, is_float


class Stack:
    """The shards of all blocks of a kind, [layers of the kind, ...] each."""

    def __init__(self, shards: PyTree, specs: PyTree) -> None:
        self.leaves, self.structure = jax.tree.flatten(shards)
        self.specs = spec_leaves(specs)
        self.axes = [ring_axis(spec) for spec in self.specs]

    def layer(self, devices: int) -> PyTree:
        """Shapes and dtypes of one layer's whole parameters."""
        found = []
        for leaf, axis in zip(self.leaves, self.axes, strict=True):
            shape = list(leaf.shape)
            if axis is not None:
                shape[axis] *= devices
            found.append(jax.ShapeDtypeStruct(shape[1:], leaf.dtype))
        return jax.tree.unflatten(self.structure, found)


class ChunkLayout:
    """How a chunk's shards lie in rows, and how whole leaves come back from P of each.

    There is a row for each dtype. Leaves that no axis divides rest whole: they are not sent, and
    their gradient is summed over the ring once, at the end.
    """

    def __init__(self, shards: Leaves, axes: list[int | None], devices: int) -> None:
        """`shards`: leaves [K, ...] of one device; `axes`: along which each is cut."""
        self.axes, self.devices = axes, devices
        self.shapes = [leaf.shape for leaf in shards]
        self.own_dtypes = [leaf.dtype for leaf in shards]
        sent = {
            leaf.dtype: None for leaf, axis in zip(shards, axes, strict=True) if axis is not None
        }
        self.dtypes = list(sent)
        self.rows = [
            -1 if a is None else self.dtypes.index(s.dtype)
            for s, a in zip(shards, axes, strict=True)
        ]

    @property
    def of_floats(self) -> "ChunkLayout":
        """The same of the gradient, which is of floats alone."""
        shards = [
            jax.ShapeDtypeStruct(s, d) for s, d in zip(self.shapes, self.own_dtypes, strict=True)
        ]
        pairs = [(s, a) for s, a in zip(shards, self.axes, strict=True) if is_float(s)]
        return ChunkLayout([s for s, _ in pairs], [a for _, a in pairs], self.devices)

    @property
    def whole(self) -> Leaves:
        """Shapes and dtypes of whole leaves."""
        found = []
        for dtype, shape, axis in zip(self.own_dtypes, self.shapes, self.axes, strict=True):
            sizes = list(shape)
            if axis is not None:
                sizes[axis] *= self.devices
            found.append(jax.ShapeDtypeStruct(tuple(sizes), dtype))
        return found

    def pack(self, shards: Leaves) -> Leaves:
        """Shards of the chunk -> [n] each."""
        return [
            jnp.concatenate(
                [leaf.reshape(-1) for leaf, at in zip(shards, self.rows, strict=True) if at == row]
            )
            for row in range(len(self.dtypes))
        ]

    def unpack(self, rows: Leaves, own: Leaves) -> Leaves:
        """[P, n] each and the chunk's own shards -> whole leaves [K, ...]."""
        found, starts = [], [0] * len(rows)
        for leaf, shape, axis, at in zip(own, self.shapes, self.axes, self.rows, strict=True):
            if axis is None:
                found.append(leaf)
                continue
            size = math.prod(shape)
            part = rows[at][:, starts[at] : starts[at] + size].reshape(self.devices, *shape)
            starts[at] += size
            merged = (*shape[:axis], self.devices * shape[axis], *shape[axis + 1 :])
            found.append(jnp.moveaxis(part, 0, axis).reshape(merged))
        return found

    def pack_whole(self, whole: Leaves) -> Leaves:
        """Whole leaves [K, ...] -> [P, n] each: row p is what belongs to device p."""
        parts: list[Leaves] = [[] for _ in self.dtypes]
        for leaf, shape, axis, at in zip(whole, self.shapes, self.axes, self.rows, strict=True):
            if axis is not None:
                cut = (*shape[:axis], self.devices, shape[axis], *shape[axis + 1 :])
                rows = jnp.moveaxis(leaf.reshape(cut), axis, 0)
                parts[at].append(rows.reshape(self.devices, -1))
        return [jnp.concatenate(part, axis=1) for part in parts]

    def split(self, rows: Leaves, whole: Leaves) -> Leaves:
        """[n] each -> shards [K, ...]; leaves that rest whole are taken from `whole`."""
        found, starts = [], [0] * len(rows)
        for leaf, shape, axis, at in zip(whole, self.shapes, self.axes, self.rows, strict=True):
            if axis is None:
                found.append(leaf)
                continue
            size = math.prod(shape)
            found.append(rows[at][starts[at] : starts[at] + size].reshape(shape))
            starts[at] += size
        return found


def spec_leaves(specs: PyTree) -> list[PartitionSpec]:
    """The specs of a tree."""
    return jax.tree.leaves(specs, is_leaf=is_spec)
