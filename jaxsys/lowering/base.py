"""What every lowered step shares: the mesh it fits, its shardings, and the parameters at its edge.

Embedding, final norm and head rest in shards over the ring where an axis divides, are gathered once
a step in the compute dtype, and their gradients are reduced back to the shards once.

Where several devices compute a block together (`jaxsys.layered.Parts`) each holds its part of what
is cut along their axis, all step long, and what is not cut has its gradient summed over them last.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.axes import ALWAYS, AROUND, RING, hops_along
from jaxsys.context import ContextSplit
from jaxsys.context.agreed import split_on
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, Parts, PyTree, parts_of
from jaxsys.mesh import (
    axes_of,
    batch_axes,
    batch_parts,
    inner_sizes,
    over,
    ring_axis,
    shard_axes,
)
from jaxsys.schedule import Placement, Schedule

from .flat import Leaves, cast, floats, is_float
from .order import after, by_order_alone
from .place import by_places, gather_by_places, reduce_by_places
from .sequences import Sequences
from .xla import CPU_COMPILER_OPTIONS, gpu_compiler_options


class LossAndGradients(NamedTuple):
    """What one pass over a batch finds."""

    loss: jax.Array
    """float32, sum of losses over sum of weights."""
    gradients: Parameters
    """Of `loss`, like the parameters; zeros of their own dtype for constants."""
    weight: jax.Array
    """float32, the sum of weights."""
    metrics: dict[str, jax.Array]
    """float32 sums over all microbatches of what `head_loss` returns beside loss and weight."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A schedule ready to run on a mesh."""

    schedule: Schedule
    model: LayeredModel
    mesh: Mesh
    compute_dtype: Any
    """Of gathered or travelling weights and of all compute."""
    gradient_dtype: Any
    """In which gradients are summed, and travel where nothing else is asked for."""
    context: ContextSplit | None = None
    """How every sequence lies over the mesh's CONTEXT axis; None: each is whole on a device."""

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options for the jit around `loss_and_gradients`."""
        if self.platform == "cpu":
            return dict(CPU_COMPILER_OPTIONS)
        options = gpu_compiler_options(self.mesh, hops_along(self.schedule))
        return {**options, **self.model.gpu_options}

    @property
    def platform(self) -> str:
        """What the mesh is made of: "cpu", "gpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def replicas(self) -> int:
        """D, the data replicas beside each other: those that share experts or a place too."""
        return batch_parts(self.mesh)

    @cached_property
    def parts(self) -> Parts | None:
        """How several devices compute a block together; None where none do."""
        model = self.model.over(self.context).joined_by(self.schedule.features_by)
        return parts_of(model, inner_sizes(self.mesh))

    @property
    def run_model(self) -> LayeredModel:
        """The model as a device runs it: a part of it or all, on pieces of sequences or all."""
        return self.model.over(self.context) if self.parts is None else self.parts.model

    @cached_property
    def sequences(self) -> Sequences:
        """What of a batch is cut, and how."""
        return Sequences(model=self.model, split=self.context)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The mesh axes over which what rests in shards is cut."""
        return shard_axes(self.mesh)

    @property
    def shards(self) -> int:
        """The devices of these axes."""
        return math.prod(self.mesh.shape[name] for name in self.shard_axes)

    def cuts(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs of parameters over the axes of parts; of blocks one layer's."""
        if self.parts is not None:
            return self.parts.cuts
        return jax.tree.map(lambda _: PartitionSpec(), parameters)

    def rest_specs(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs of parameters at rest."""
        raise NotImplementedError

    def rest_shardings(self, parameters: Parameters) -> Parameters:
        """NamedShardings of parameters at rest; leaves may be arrays or ShapeDtypeStructs."""
        specs = self.rest_specs(parameters)
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs, is_leaf=is_spec)

    def batch_shardings(self, batch: PyTree) -> PyTree:
        """NamedShardings of a batch with leaves [D M, B, ...]."""
        specs = self.sequences.specs(batch, batch_axes(self.mesh))
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs, is_leaf=is_spec)

    def check_layers(self, parameters: Parameters) -> None:
        """Raises UsageError unless all blocks are stacked [L, ...], those of a kind [its, ...]."""
        counts = Counter(self.model.kind_of)
        blocks = parameters["blocks"]
        if not callable(self.model.block) and {*blocks} != {*counts}:
            raise UsageError(
                f"blocks are stacked by kinds {', '.join(map(repr, blocks))}; the model has "
                f"{', '.join(map(repr, counts))}"
            )
        for kind, stack in self.model.stacks(blocks).items():
            for leaf in jax.tree.leaves(stack):
                if leaf.shape[:1] != (counts[kind],):
                    raise UsageError(
                        f"a {kind} parameter has shape {leaf.shape}; expected [{counts[kind]}, ...]"
                    )
                if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                    raise UsageError(
                        f"a {kind} parameter is {leaf.dtype}; keep its real and imaginary parts"
                    )

    def check_batch(self, batch: PyTree) -> None:
        """Raises UsageError unless the batch holds D M microbatches."""
        each, replicas = self.schedule.microbatches, self.replicas
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] != replicas * each:
                raise UsageError(
                    f"batch has {leaf.shape[0]} microbatches but schedule {self.schedule.name} "
                    f"takes {each} on each of {replicas} data replicas: {replicas * each} in all"
                )
        self.sequences.check(batch)

    def outcome_specs(self, specs: Parameters) -> LossAndGradients:
        """PartitionSpecs of what a step returns, from those of parameters at rest."""
        whole: Any = PartitionSpec()
        return LossAndGradients(loss=whole, gradients=specs, weight=whole, metrics=whole)

    # Inside shard_map, where shapes are per device.

    def gather_edge(self, edge: PyTree, specs: PyTree) -> PyTree:
        """The edge's parameters at rest -> whole, in the compute dtype."""

        last: list[jax.Array] = []

        def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            axis = ring_axis(spec)
            if axis is None:
                return leaf
            leaf = self.in_turn(leaf, last)
            if by_places(spec[axis]):
                last[:] = [gather_by_places(leaf, axis)]
            else:
                last[:] = [lax.all_gather(leaf, spec[axis], axis=axis, tiled=True)]
            return last[0]

        return jax.tree.map(gather, cast(edge, self.compute_dtype), specs)

    def in_turn(self, value: PyTree, done: PyTree) -> PyTree:
        """What a collective is given, once another has brought `done`, where that must be waited
        for."""
        return after(value, done) if by_order_alone(self.mesh) else value

    def empty_edge_gradient(self, edge: PyTree) -> Leaves:
        """Zeros for the sums of the gradients of a whole edge's floats."""
        return [jnp.zeros(leaf.shape, self.gradient_dtype) for leaf in floats(edge)]

    def reduce_edge(self, sums: Leaves, edge: PyTree, specs: PyTree, weight: jax.Array) -> PyTree:
        """Each device's sums over whole floats -> mean gradients like `edge` at rest."""

        last: list[jax.Array] = [weight]

        def reduce(total: jax.Array, at_rest: jax.Array, spec: PartitionSpec) -> jax.Array:
            total = self.in_turn(total.astype(at_rest.dtype), last)
            total = self.over_others(total, spec)
            axis = ring_axis(spec)
            if axis is None:
                last[:] = [lax.psum(total, RING)]
            elif by_places(spec[axis]):
                last[:] = [reduce_by_places(total, axis, at_rest.shape[axis])]
            else:
                scattered = lax.psum_scatter(total, spec[axis], scatter_dimension=axis, tiled=True)
                last[:] = [scattered]
            return last[0] / weight

        rest = iter(sums)
        return jax.tree.map(
            lambda leaf, spec: (
                reduce(next(rest), leaf, spec) if is_float(leaf) else jnp.zeros_like(leaf)
            ),
            edge,
            specs,
        )

    def over_others(
        self, total: jax.Array, spec: PartitionSpec, *, done: tuple[str, ...] = ()
    ) -> jax.Array:
        """The sum over all who have a part of a gradient of their own, besides the ring and those
        over whom it is `done`."""
        cut = axes_of(spec) | {*done}
        others = tuple(
            name
            for name in self.mesh.axis_names
            if name != RING and name not in cut and self.mesh.shape[name] > 1
        )
        return lax.psum(total, others) if others else total

    def over_all(self, scores: PyTree) -> PyTree:
        """The sum over all devices."""
        return lax.psum(scores, self.mesh.axis_names)


def check_fit(schedule: Schedule, model: LayeredModel, mesh: Mesh) -> None:
    """Raises UsageError unless mesh and layers fit the schedule."""
    for axis in ALWAYS:
        if axis not in mesh.axis_names:
            raise UsageError(f"mesh axes are {mesh.axis_names}; a step needs {ALWAYS}")
    if mesh.shape[RING] != schedule.devices:
        raise UsageError(
            f"mesh axis {RING!r} has {mesh.shape[RING]} devices but schedule {schedule.name} "
            f"has {schedule.devices}"
        )
    parts_of(model.joined_by(schedule.features_by), inner_sizes(mesh))
    for name, axis in AROUND.items():
        count, ways = getattr(schedule, axis.name), mesh.shape.get(name, 1)
        # Any number of copies may stand around; how sequences lie `context_on` has seen.
        if not (axis.copies or axis.shares) and count not in (1, ways):
            raise UsageError(
                f"schedule {schedule.name} is planned for {axis.name} over {count} devices, the "
                f"mesh has {name}={ways}; use make_mesh(..., {name}={count})"
            )
    if model.layers < schedule.chunks:
        raise UsageError(
            f"layers={model.layers} cannot fill chunks={schedule.chunks} of schedule "
            f"{schedule.name} on a ring of devices={schedule.devices}; use {_less(schedule, model)}"
        )


def context_on(
    mesh: Mesh, model: LayeredModel, schedule: Schedule, asked: ContextSplit | None
) -> ContextSplit | None:
    """How sequences lie over a mesh, see `jaxsys.context.agreed.split_on`.

    Raises:
        UsageError: if what is asked is for something else, or the model cannot be cut.
    """
    split = split_on(mesh, schedule, asked, name=schedule.name)
    if split is not None:
        model.over(split)
    return split


def _less(schedule: Schedule, model: LayeredModel) -> str:
    """What would fit: only chunks that rest on owners are as many as the devices ask for."""
    owned = schedule.placement is Placement.OWNER
    most = model.layers // max(1, schedule.chunks // schedule.devices) if owned else 0
    return f"devices={most} or fewer" if most else f"a schedule of at most {model.layers} chunks"


def sharded_spec(
    shape: tuple[int, ...],
    parts: int,
    *,
    first_axis: int = 0,
    cut: PartitionSpec = PartitionSpec(),  # noqa: B008 a value that nothing changes
    axes: tuple[str, ...] = (RING,),
) -> PartitionSpec:
    """Over the ring along the first axis that `parts` divides and that is not cut, or along none.

    Args:
        shape: of the leaf.
        parts: devices of `axes`.
        first_axis: along which it may be.
        cut: how the axes from `first_axis` on are cut already.
        axes: the mesh axes that it is cut over, RING among them.
    """
    names = [*[None] * first_axis, *cut]
    names += [None] * (len(shape) - len(names))
    for axis in range(first_axis, len(shape)):
        if names[axis] is None and shape[axis] and shape[axis] % parts == 0:
            names[axis] = over(axes)
            break
    return spec_of(names)


def spec_of(names: list[Any]) -> PartitionSpec:
    """The PartitionSpec, without the axes behind the last that is cut."""
    while names and names[-1] is None:
        names = names[:-1]
    return PartitionSpec(*names)


def add_to(totals: Leaves, parts: Leaves) -> Leaves:
    """`totals` + `parts` in the dtypes of `totals`."""
    return [t + p.astype(t.dtype) for t, p in zip(totals, parts, strict=True)]


def is_spec(value: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_spec)`."""
    return isinstance(value, PartitionSpec)
