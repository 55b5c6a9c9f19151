"""The repeated part of a model's parameters: found by structure, whatever the model is called."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxsys.planner.jaxpr_costs import FunctionCost, shapes_of

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The repeated part of a model's parameters."""

    count: int
    leaves: tuple[int, ...]
    """Which leaves of the parameters belong to layers, counted in flattening order."""
    stacked: bool
    """Whether each of them holds all layers along its leading axis."""
    where: str
    """In words."""


def leaves_of(tree: PyTree) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(shapes_of(tree))


def find_layers(params: PyTree, cost: FunctionCost, count: int) -> Layers:
    """Stacked parameters that a scan takes apart, else the largest family of like subtrees."""
    leaves = jax.tree.leaves(shapes_of(params))
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in cost.scanned.items():
        if index < count and length > 1:
            by_length[length].append(index)
    if by_length:
        weigh = lambda n: sum(leaves[i].size for i in by_length[n])  # noqa: E731
        length = max(by_length, key=weigh)
        return Layers(
            count=length,
            leaves=tuple(sorted(by_length[length])),
            stacked=True,
            where=f"{length}, stacked, taken apart by a scan",
        )
    family = _family(params)
    if family is not None:
        return family
    return Layers(
        count=1, leaves=tuple(range(count)), stacked=False, where="1: no part is there twice"
    )


def _family(params: PyTree) -> Layers | None:
    """The most of the parameters that sibling subtrees of one structure and shapes make up."""
    paths = jax.tree_util.tree_leaves_with_path(shapes_of(params))
    groups: dict[Any, list[list[int]]] = defaultdict(list)
    depth = max((len(path) for path, _ in paths), default=0)
    for level in range(1, depth):
        subtrees: dict[Any, list[int]] = defaultdict(list)
        for index, (path, _) in enumerate(paths):
            if len(path) > level:
                subtrees[path[:level]].append(index)
        for prefix, members in subtrees.items():
            shape = tuple(
                (str(paths[i][0][level:]), paths[i][1].shape, str(paths[i][1].dtype))
                for i in members
            )
            groups[prefix[:-1], shape].append(members)
    best: Layers | None = None
    most = 0
    for (prefix, _), families in groups.items():
        size = sum(paths[i][1].size for members in families for i in members)
        if len(families) > 1 and size > most:
            most = size
            parent = jax.tree_util.keystr(prefix) or "the parameters"
            best = Layers(
                count=len(families),
                leaves=tuple(i for members in families for i in members),
                stacked=False,
                where=f"{len(families)} like subtrees of {parent}",
            )
    return best


def matrices_of(leaves: Sequence[Any], layers: Layers) -> list[int]:
    """The parameters of layers whose features can be split."""
    first = 1 if layers.stacked else 0
    return [i for i in layers.leaves if len(leaves[i].shape) - first >= 2]


def feature_ways(leaves: Sequence[Any], layers: Layers, devices: int) -> tuple[int, ...]:
    """Counts that divide some axis of every matrix of a layer."""
    first = 1 if layers.stacked else 0
    matrices = [leaves[i].shape[first:] for i in matrices_of(leaves, layers)]
    return tuple(
        ways
        for ways in range(1, devices + 1)
        if devices % ways == 0
        and (ways == 1 or matrices)
        and all(any(n % ways == 0 for n in shape) for shape in matrices)
    )
