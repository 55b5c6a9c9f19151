"""A plan as shardings of a user's own parameters, optimizer state and batches, for `jax.jit`."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.axes import AXES
from jaxsys.planner.applied import LayerLeaf
from jaxsys.planner.jaxpr_costs import shapes_of
from jaxsys.planner.layers import Layers, leaves_of
from jaxsys.planner.plans import Plan, State, Weights

PyTree = Any
REPLICA, SHARD, FEATURES = dict.fromkeys(axis.user for axis in AXES.values())


def axis_sizes(plan: Plan) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for axis in AXES.values():  # shard, stages and ring are one: at most one is more than 1
        sizes[axis.user] = sizes.get(axis.user, 1) * getattr(plan, axis.name)
    return sizes


def specs_of(
    params: PyTree, layers: Layers, plan: Plan, cuts: Mapping[int, int]
) -> tuple[PyTree, PyTree]:
    """PartitionSpecs of parameters and of optimizer state.

    Args:
        params: as they are given.
        layers: the repeated part.
        plan: what is to be run.
        cuts: parameter -> the axis along which its features are split.
    """
    split_weights = any(path.weights is not Weights.STAY for path in plan.layers)
    split_state = plan.state is State.SPLIT and plan.shard > 1
    inside = set(layers.leaves)
    leaves, structure = jax.tree.flatten(shapes_of(params))

    def spec(index: int, leaf: Any, sharded: bool) -> PartitionSpec:
        names: list[Any] = [None] * len(leaf.shape)
        first = 1 if layers.stacked and index in inside else 0
        axes = sorted(range(first, len(leaf.shape)), key=lambda a: -leaf.shape[a])
        if index in cuts:
            names[cuts[index]] = FEATURES
        if sharded:
            axis = next((a for a in axes if not names[a] and leaf.shape[a] % plan.shard == 0), None)
            if axis is not None:
                names[axis] = SHARD
        return PartitionSpec(*names)

    def tree(sharded: bool, among: Collection[int]) -> PyTree:
        rows = enumerate(leaves)
        return structure.unflatten([spec(i, leaf, sharded and i in among) for i, leaf in rows])

    # What is used all step long rests whole: no layer gathers it.
    return tree(split_weights and split_state, inside), tree(split_state, range(len(leaves)))


def layer_leaves(params: PyTree, layers: Layers, cuts: Mapping[int, int]) -> tuple[LayerLeaf, ...]:
    """The parameters of one layer, of like subtrees the first's."""
    leaves, first = leaves_of(params), 1 if layers.stacked else 0
    mine = layers.leaves if layers.stacked else layers.leaves[: len(layers.leaves) // layers.count]
    found = []
    for index in mine:
        names: list[Any] = [None] * len(leaves[index].shape)
        if index in cuts:
            names[cuts[index]] = FEATURES
        found.append(
            LayerLeaf(shape=leaves[index].shape[first:], whole=PartitionSpec(*names[first:]))
        )
    return tuple(found)


def shardings_on(mesh: Mesh, specs: PyTree) -> PyTree:
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s if s is not None else PartitionSpec()),
        specs,
        is_leaf=lambda s: s is None or isinstance(s, PartitionSpec),
    )
