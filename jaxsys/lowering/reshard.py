"""Arrays from one layout on a mesh to another, one collective a mesh axis.

Asked for another sharding of an array that is cut along two axes, XLA may put all of it on every
device for a moment (it says "involuntary full rematerialization"). Here each mesh axis goes by
itself from where it cuts to where it is to cut, by an all-to-all; an axis of the array that is in
the way stands aside likewise. Only where nothing divides is an array gathered, along that one mesh
axis.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One mesh axis moves; it is the innermost that cuts where it comes from and where it goes."""

    name: str
    source: int | None
    """The array's axis that it cuts; None: it cuts none, and each device takes its part."""
    target: int | None
    """The one that it is to cut; None: it is gathered."""

    def run(self, part: jax.Array) -> jax.Array:
        """Inside shard_map: a device's part before -> after."""
        if self.source is None:
            assert self.target is not None
            size = part.shape[self.target] // lax.axis_size(self.name)
            start = lax.axis_index(self.name) * size
            return lax.dynamic_slice_in_dim(part, start, size, self.target)
        if self.target is None:
            return lax.all_gather(part, self.name, axis=self.source, tiled=True)
        return lax.all_to_all(
            part, self.name, split_axis=self.target, concat_axis=self.source, tiled=True
        )


def reshard(leaf: jax.Array, mesh: Mesh, source: PartitionSpec, target: PartitionSpec) -> jax.Array:
    """The same array, laid out as `target` says; to be traced inside a jit.

    Args:
        leaf: cut as `source` says.
        mesh: on which it lies.
        source: how it lies.
        target: how it is to lie.
    """
    steps = steps_between(leaf.shape, mesh.shape, source, target)
    if not steps:
        return leaf

    def run(part: jax.Array) -> jax.Array:
        for step in steps:
            part = step.run(part)
        return part

    # All devices of an axis that cuts nothing have the same: nothing here says so to types.
    moved = jax.shard_map(run, mesh=mesh, in_specs=source, out_specs=target, check_vma=False)
    return moved(leaf)


def reshard_all(tree: Any, mesh: Mesh, source: Any, target: Any) -> Any:
    """`reshard` of every leaf; NamedShardings, or any with a `spec`, say how they lie."""
    return jax.tree.map(lambda x, a, b: reshard(x, mesh, a.spec, b.spec), tree, source, target)


def steps_between(
    shape: Sequence[int], sizes: Mapping[str, int], source: PartitionSpec, target: PartitionSpec
) -> list[Step]:
    """How mesh axes move, one after another, from one layout of an array to another."""
    have, want = _cuts(source, len(shape)), _cuts(target, len(shape))
    steps: list[Step] = []

    def held(axis: int) -> int:
        return shape[axis] // math.prod(sizes[name] for name in have[axis])

    def move(source: int | None, target: int | None, name: str) -> None:
        if source is not None:
            have[source].pop()
        if target is not None:
            have[target].append(name)
        if sizes[name] > 1:
            steps.append(Step(name=name, source=source, target=target))

    def aside(axis: int, to: int | None) -> None:
        """The innermost of an axis goes elsewhere: home if that is free, never to `to`."""
        name = have[axis][-1]
        free = [
            other
            for other in range(len(shape))
            if other not in (axis, to) and held(other) % sizes[name] == 0
        ]
        home = [a for a in free if want[a][: len(have[a]) + 1] == [*have[a], name]]
        move(axis, next(iter([*home, *free]), None), name)

    for axis, names in enumerate(want):
        for place, name in enumerate(names):
            if have[axis][: place + 1] == names[: place + 1]:
                continue
            while len(have[axis]) > place:
                aside(axis, None)
            at = next((a for a, cut in enumerate(have) if name in cut), None)
            while at is not None and have[at][-1] != name:
                aside(at, axis)
            move(at, axis, name)
    for axis, names in enumerate(want):
        while len(have[axis]) > len(names):
            move(axis, None, have[axis][-1])
    return steps


def _cuts(spec: PartitionSpec, axes: int) -> list[list[str]]:
    """For each axis of an array the mesh axes that cut it, from the outermost in."""
    found: list[list[str]] = []
    for entry in (*spec, *[None] * (axes - len(spec))):
        found.append([] if entry is None else [*entry] if isinstance(entry, tuple) else [entry])
    return found
