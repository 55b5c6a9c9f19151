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
    """Stacked parameters that one scan takes apart, else the largest family of like subtrees.

    Of several scans, such as an encoder's and a decoder's, the one with most parameters is meant.
    """
    leaves = jax.tree.leaves(shapes_of(params))
    scans = [
        (length, [i for i in sorted(taken) if i < count and leaves[i].shape[:1] == (length,)])
        for length, taken in cost.scans
        if length > 1
    ]
    weigh = lambda scan: sum(leaves[i].size for i in scan[1])  # noqa: E731
    length, taken = max(scans, key=weigh, default=(0, []))
    if taken:
        return Layers(
            count=length,
            leaves=tuple(taken),
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
    """The most of the parameters that sibling subtrees of one structure and shapes make up.

    Numbered ones before others, and those of several rows of them together: two towers of like
    blocks are not two layers, and the layers of both are alike.
    """
    paths = jax.tree_util.tree_leaves_with_path(shapes_of(params))
    groups: dict[Any, dict[Any, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
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
            groups[level, shape][prefix[:-1]].append(members)
    best: Layers | None = None
    most = (False, 0)
    for (level, _), by_parent in groups.items():
        numbered = {
            parent: families
            for parent, families in by_parent.items()
            if len(families) > 1 and all(_is_number(paths[m[0]][0][level - 1]) for m in families)
        }
        rows = [numbered] if numbered else [{p: f} for p, f in by_parent.items() if len(f) > 1]
        for chosen in rows:
            every = [members for families in chosen.values() for members in families]
            rank = (bool(numbered), sum(paths[i][1].size for members in every for i in members))
            if rank <= most:
                continue
            most = rank
            parents = " and ".join(
                jax.tree_util.keystr(parent) or "the parameters" for parent in chosen
            )
            best = Layers(
                count=len(every),
                leaves=tuple(i for members in every for i in members),
                stacked=False,
                where=f"{len(every)} like subtrees of {parents}",
            )
    return best


def _is_number(key: Any) -> bool:
    """Whether a key of a tree is a place in a row, such as 3 or block_3."""
    name = getattr(key, "idx", getattr(key, "key", getattr(key, "name", "")))
    return isinstance(name, int) or (isinstance(name, str) and name[-1:].isdigit())


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


def why_whole(leaves: Sequence[Any], layers: Layers, devices: int) -> str:
    """Why `feature_ways` finds no devices that could share a layer."""
    first = 1 if layers.stacked else 0
    matrices = [leaves[i].shape[first:] for i in matrices_of(leaves, layers)]
    if devices == 1:
        return "there is one device"
    if not matrices:
        return "its layers have no matrix"
    ways = next(n for n in range(2, devices + 1) if devices % n == 0)
    whole = (shape for shape in matrices if all(n % ways for n in shape))
    return next(
        (f"{ways} divides no axis of a matrix {list(shape)}" for shape in whole),
        "no number of devices divides an axis of every matrix of a layer",
    )
