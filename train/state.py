"""What a training run carries from step to step, and where each leaf of it rests.

The optimizer's part is laid out, moved and saved as `rules` says: what follows a parameter lies
where that parameter does.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.layered import Parameters, PyTree
from jaxsys.lowering import LossAndGradients
from jaxsys.mesh import inner_sizes, over, shard_axes

Names = tuple[str, ...]
"""A leaf's path as plain names."""


class TrainState(NamedTuple):
    """All arrays of a run; on the devices in the order the schedule keeps them at rest."""

    parameters: Parameters
    """float32 masters."""
    optimizer: PyTree
    step: jax.Array
    """int32: batches taken, skipped ones too."""
    skipped: jax.Array
    """int32: batches whose loss or gradient was not finite."""


class AveragedState(NamedTuple):
    """The same of a run that keeps an average of its parameters, see `step.Updates`."""

    parameters: Parameters
    optimizer: PyTree
    step: jax.Array
    skipped: jax.Array
    average: Parameters
    """Of the parameters over steps."""


State = TrainState | AveragedState
"""What a step takes and returns."""


class RunnableStep(Protocol):
    """What the trainer needs of `jaxsys.lowering.lower`'s result."""

    @property
    def compiler_options(self) -> dict[str, Any]: ...

    def rest_shardings(self, parameters: Any) -> Any: ...
    def to_rest(self, parameters: Any) -> Any: ...
    def in_rest_order(self, parameters: Any) -> Any: ...
    def from_rest(self, parameters: Any) -> Any: ...
    def batch_shardings(self, batch: Any) -> Any: ...
    def loss_and_gradients(self, parameters: Any, batch: Any) -> LossAndGradients: ...


def path_names(path: tuple[Any, ...]) -> Names:
    """A pytree path as plain names, the same for dicts, attributes and indices."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def layer_shardings(mesh: Mesh) -> Callable[[Parameters], Parameters]:
    """Shardings of parameters in layer order: cut over the ring along an axis of the layer's own.

    So layers can be put in another order, or read one at a time, without moving anything, and any
    number of layers will do. The devices of `jaxsys.axes.INNER` take their part too, where an axis
    divides by all of them. A leaf without an axis that divides is whole everywhere.
    """
    shards = shard_axes(mesh)
    groups = dict.fromkeys(((*shards, *inner_sizes(mesh)), shards, shards[:1]))

    def spec(leaf: Any, first: int) -> NamedSharding:
        for names in groups:
            parts = math.prod(mesh.shape[name] for name in names)
            for axis in range(first, leaf.ndim) if parts > 1 else ():
                if leaf.shape[axis] and leaf.shape[axis] % parts == 0:
                    return NamedSharding(mesh, PartitionSpec(*[None] * axis, over(names)))
        return NamedSharding(mesh, PartitionSpec())

    def shardings(shapes: Parameters) -> Parameters:
        return {
            "edge": jax.tree.map(lambda leaf: spec(leaf, 0), shapes["edge"]),
            "blocks": jax.tree.map(lambda leaf: spec(leaf, 1), shapes["blocks"]),
        }

    return shardings
