"""Collectives one after another, where devices match them by their order alone.

Gloo, by which processes of CPU devices meet, matches collectives of a kind by the order in which a
device comes to them. XLA:CPU starts them in the order of the program, but goes on beyond a loop or
a branch that holds one before it has ended: what stands behind may then come first on one device
and last on another, which ends in an abort where sizes differ and in wrong numbers where they do
not. A barrier does not help: it orders a program and leaves nothing to wait for when it runs. So
what a collective is given is made to hang on what the one before has brought.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxsys.layered import PyTree


def by_order_alone(mesh: Mesh) -> bool:
    """Whether a mesh's devices match collectives so."""
    devices: list[Any] = list(mesh.devices.flat)
    return devices[0].platform == "cpu" and len({d.process_index for d in devices}) > 1


def after(value: PyTree, done: PyTree) -> PyTree:
    """`value` to the bit, which is there only when `done` is."""
    # Zero, which the compiler does not know.
    nothing = lax.optimization_barrier(jnp.uint8(0))
    mark = nothing
    for leaf in jax.tree.leaves(done):
        if leaf.size:
            first = lax.slice_in_dim(leaf.reshape(-1), 0, 1)[0]
            mark = mark | (nothing & (first != 0).astype(jnp.uint8))
    return jax.tree.map(lambda leaf: jnp.where(mark != 0, jnp.zeros_like(leaf), leaf), value)
