"""How the devices of a node share a place of a ring: where its pieces lie, joined and cut.

Along the mesh axis `MEMBER` each of D devices holds and sends a piece of every chunk that is in
their place, and computes microbatches of its own. Before a task reads a layer its pieces are joined
among them, and the sum of its gradient is cut among them after.

Legend: D devices of a place, N places, n elements of a piece.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import MEMBER, RING

WITHIN = (MEMBER,)
"""The mesh axes of a place's devices: they have added up a block's gradients in every task."""
THROUGHOUT = (RING, MEMBER)
"""The mesh axes of all places' devices."""


def devices_of_place(mesh: Mesh) -> int:
    """D."""
    return mesh.shape.get(MEMBER, 1)


def by_places(entry: Any) -> bool:
    """Whether an entry of a PartitionSpec cuts an axis over all places' devices."""
    return entry == THROUGHOUT


def gather_by_places(leaf: jax.Array, axis: int) -> jax.Array:
    """A leaf cut along `axis` over all places' devices, whole: each piece goes between places once.

    Devices gather their own pieces of all places, then each other's.
    """
    parts = lax.all_gather(leaf, RING, axis=axis)  # [..., N, n, ...]
    parts = lax.all_gather(parts, MEMBER, axis=axis + 1)  # [..., N, D, n, ...]
    size = math.prod(parts.shape[axis : axis + 3])
    return parts.reshape(*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])


def reduce_by_places(total: jax.Array, axis: int, size: int) -> jax.Array:
    """`gather_by_places` undone, with the sum over all: first inside places, then between them.

    Args:
        total: whole, each device's own.
        axis: along which it is cut.
        size: of a piece.
    """
    places, devices = lax.axis_size(RING), lax.axis_size(MEMBER)
    before, after = total.shape[:axis], total.shape[axis + 1 :]
    parts = total.reshape(*before, places, devices, size, *after)
    parts = lax.psum_scatter(parts, MEMBER, scatter_dimension=axis + 1)
    return lax.psum_scatter(parts, RING, scatter_dimension=axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPlace:
    """How the devices of a place share a layer."""

    axes: Mapping[str, list[int | None]]
    """Kind -> along which axis each leaf of a layer is cut; None: each device has all of it."""
    devices: int
    """D."""
    sum_dtype: Any
    """In which gradients are summed over them."""

    def gathered(self, row: jax.Array) -> jax.Array:
        """A device's row [n] -> all of theirs [D, n]."""
        return lax.all_gather(row, MEMBER)

    def summed(self, rows: jax.Array) -> jax.Array:
        """What each has for each [D, n] -> the sum for this one [n]."""
        # A sum in the dtype of one product would round once for each of them.
        return lax.psum_scatter(rows.astype(self.sum_dtype), MEMBER).astype(rows.dtype)

    def joined(self, axis: int | None, pieces: jax.Array) -> jax.Array:
        """A leaf's pieces [D, *shape] -> the leaf."""
        if axis is None:
            return pieces[0]
        shape = pieces.shape[1:]
        whole = (*shape[:axis], self.devices * shape[axis], *shape[axis + 1 :])
        return jnp.moveaxis(pieces, 0, axis).reshape(whole)

    def cut(self, axis: int | None, leaf: jax.Array) -> jax.Array:
        """A leaf -> what each device is given of it [D, *shape]."""
        if axis is None:
            return jnp.broadcast_to(leaf, (self.devices, *leaf.shape))
        size = leaf.shape[axis] // self.devices
        apart = (*leaf.shape[:axis], self.devices, size, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(apart), axis, 0)


def shared_place(
    mesh: Mesh, specs: Mapping[str, list[PartitionSpec]], sum_dtype: Any
) -> SharedPlace | None:
    """How the devices of a place share layers; None where each place is one device.

    Args:
        mesh: what the step runs on.
        specs: kind -> of a stack's leaves at rest.
        sum_dtype: in which gradients are summed.
    """
    if devices_of_place(mesh) == 1:
        return None
    axes = {kind: [_cut_axis(spec) for spec in mine] for kind, mine in specs.items()}
    return SharedPlace(axes=axes, devices=devices_of_place(mesh), sum_dtype=sum_dtype)


def _cut_axis(spec: PartitionSpec) -> int | None:
    """Along which axis of one layer a stack's spec cuts it over a place's devices."""
    for axis, entry in enumerate(spec[1:]):
        if MEMBER in (entry if isinstance(entry, tuple) else (entry,)):
            return axis
    return None
