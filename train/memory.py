"""What a step will hold on each device, from shapes alone, before anything is compiled.

State at rest, whole copies of the edge's parameters and the sums of their gradients, what the
schedule has alive, and the most that one task holds while it runs. A lowered step keeps a buffer of
slots for each kind of data (`jaxsys.lowering.tables`), the arrivals of a tick beside the slots that
they land in, and a chunk's weight gradients before they are added; steps whose parameters rest in
shards are written out, and hold what is alive. Alternatives that would fit are looked for alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys import strategies
from jaxsys.errors import UsageError
from jaxsys.hardware import GIB
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.lowering import Recompute
from jaxsys.lowering.programs import BlockProgram, block_program
from jaxsys.lowering.split import split_backward
from jaxsys.lowering.tables import Tables, build_tables
from jaxsys.planner.costs import cut
from jaxsys.schedule import (
    Block,
    Costs,
    Data,
    Link,
    MoveKind,
    Placement,
    Schedule,
    TaskKind,
    check,
    simulate,
)
from jaxsys.train.liveness import peak_bytes

ALTERNATIVES = ("1f1b", "weipipe-interleave", "zero-3")


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step's memory depends on."""

    schedule: Schedule
    model: LayeredModel
    parameters: Parameters
    """Shapes at rest, in layer order."""
    state_bytes: float
    """Masters and optimizer state, of the whole model."""
    microbatch: PyTree
    """Shapes of one."""
    compute_dtype: Any
    gradient_dtype: Any
    recompute: Recompute | tuple[Recompute, ...]
    unroll: bool = False
    """A chunk's layers are written out."""

    @property
    def policies(self) -> tuple[Recompute, ...]:
        """What backward computes again, layer by layer."""
        if isinstance(self.recompute, tuple):
            return self.recompute
        return (self.recompute,) * self.model.layers


def step_bytes(step: StepShape) -> float:
    """The most that any device is predicted to hold."""
    schedule = step.schedule
    work = _Work(step)
    rest = step.state_bytes
    if schedule.placement is not Placement.REPLICATED:
        rest /= schedule.devices
    edge = _bytes(work.edge) + work.edge_sums
    if schedule.placement is Placement.SHARDED:
        gradients = _bytes(step.parameters) / schedule.devices
        alive = max(simulate(schedule, work.costs(), Link()).peak_bytes)
        return rest + edge + gradients + alive + max(work.block, work.head)
    tables = build_tables(schedule, check(schedule))
    size = {data: work.most(data) for data in Data}
    slots = sum(count * size[data] for (data, _), count in tables.slots.items())
    if step.unroll and tables.slots[Data.RESIDUAL, ""] > 1:
        slots += size[Data.RESIDUAL]  # a slot's layers are leaves of their own, copied in and out
    if schedule.placement is Placement.REPLICATED and schedule.chunks > 1:
        slots += schedule.chunks * size[Data.GRADIENT]  # of all chunks, summed over the devices
    # The loop over layers stacks a chunk's weight gradients onto zeros of the same size.
    gradients = 2 * size[Data.WEIGHT]
    in_block = gradients + _in_flight(tables, size) + work.block
    # The loss comes before, and arrivals after it; its branch returns sums beside those it was
    # given, and the zeros are there all step long.
    in_head = size[Data.WEIGHT] + work.edge_sums + work.head
    return rest + edge + slots + max(in_block, in_head)


def _in_flight(tables: Tables, size: dict[Data, float]) -> float:
    """What arrives in a tick, and what is read out of or put into buffers of several slots."""
    several = {key for key, count in tables.slots.items() if count > 1}
    arrivals = max(
        sum(
            size[group.source[0]] * (2 if group.source in several else 1)
            for group in tick.groups
            if group.kind is MoveKind.PERMUTE
        )
        for segment in tables.segments
        for tick in segment.period
    )
    used = sum(size[key[0]] for key in several if key[0] in (Data.WEIGHT, Data.GRADIENT))
    return arrivals + used


class _Work:
    """Sizes of what tasks read, write and hold."""

    def __init__(self, step: StepShape) -> None:
        self.step, model = step, step.model
        cast = lambda tree: jax.tree.map(lambda s: _cast(s, step.compute_dtype), tree)  # noqa: E731
        self.edge = cast(step.parameters["edge"])
        self.edge_sums = _bytes(self.edge, step.gradient_dtype)
        self.layer = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), cast(step.parameters["blocks"])
        )
        microbatch = step.microbatch
        self.x = x = jax.eval_shape(model.embed, self.edge, microbatch)
        self.parts = cut(model.layers, step.schedule.chunks)
        policies = dict.fromkeys(step.policies)
        programs = {policy: self.program(policy) for policy in policies}
        self.kept = {policy: _bytes(found.residuals) for policy, found in programs.items()}

        def block(policy: Recompute) -> float:
            found = programs[policy]
            layer = peak_bytes(found.backward, self.layer, found.residuals, x, microbatch)
            # Of a chunk that is computed again all its layers' residuals are there by then.
            again = max(len(part) for part in self.parts) if policy == "chunk" else 0
            return layer + again * self.kept[policy]

        def head(edge: PyTree, x: jax.Array, microbatch: PyTree) -> PyTree:
            loss, pull, _ = jax.vjp(
                lambda e, v: model.head_loss(e, v, microbatch), edge, x, has_aux=True
            )
            return pull(jnp.ones_like(loss))

        self.block = max(block(policy) for policy in policies)
        self.head = peak_bytes(head, self.edge, x, microbatch)
        self.taps = 0.0
        if any(task.kind is TaskKind.INPUT_GRADIENT for task in step.schedule.tasks):
            found = programs[step.policies[0]]
            halves = split_backward(found.backward, self.layer, found.residuals, x, microbatch)
            self.taps = _bytes(halves.taps)

    def program(self, policy: Recompute) -> BlockProgram:
        step, inner = self.step, "none" if policy == "chunk" else policy
        return block_program(step.model, self.layer, self.x, step.microbatch, inner)

    def costs(self) -> Costs:
        """Bytes of each chunk's data."""
        policies = self.step.policies
        return Costs(
            forward_s=0.0,
            backward_s=0.0,
            weight_bytes=[len(part) * _bytes(self.layer) for part in self.parts],
            gradient_bytes=[
                len(part) * _bytes(self.layer, self.step.gradient_dtype) for part in self.parts
            ],
            activation_bytes=_bytes(self.x),
            residual_bytes=[
                _bytes(self.x)
                if policies[part[0]] == "chunk"
                else sum(self.kept[policies[i]] for i in part)
                for part in self.parts
            ],
            tap_bytes=[len(part) * self.taps for part in self.parts],
        )

    def most(self, data: Data) -> float:
        """Bytes of a kind of data, of the largest chunk."""
        costs = self.costs()
        return max(
            costs.block_bytes(Block(data=data, chunk=chunk)) for chunk in range(len(self.parts))
        )


def check_fits(step: StepShape, limit_bytes: float) -> None:
    """Raises UsageError, which names what would fit, if the step is predicted not to."""
    needed = step_bytes(step)
    if needed <= limit_bytes:
        return
    others = [(step_bytes(other), name) for name, other in _alternatives(step)]
    fitting = [f"{name} ({size / GIB:.3g} GiB)" for size, name in others if size <= limit_bytes]
    if fitting:
        advice = f"what would fit: {', '.join(fitting[:3])}"
    else:
        least, name = min([*others, (needed, "this")])
        advice = (
            f"nothing tried would fit, the least, {name}, needs {least / GIB:.3g} GiB: use more "
            "devices, smaller microbatches or shorter sequences"
        )
    raise UsageError(
        f"a step of {step.schedule.name} is predicted to need {needed / GIB:.3g} GiB a device, of "
        f"{limit_bytes / GIB:.3g} GiB; {advice}; or go on anyway with memory_gib=inf"
    )


def _alternatives(step: StepShape) -> Iterator[tuple[str, StepShape]]:
    """More recompute, other schedules, and half the microbatch."""
    policies: tuple[Recompute, ...] = ("selective", "block")
    for policy in policies:
        if step.recompute != policy:
            yield f"recompute {policy}", replace(step, recompute=policy)
    old = step.schedule
    for name in ALTERNATIVES:
        options = {"chunks": step.model.layers} if name.startswith("zero-") else {}
        try:
            made = strategies.build(
                name, devices=old.devices, microbatches=old.microbatches, **options
            )
            cut(step.model.layers, made.chunks)
        except UsageError:
            continue
        if made.name != old.name:
            yield f"{name} with recompute block", replace(step, schedule=made, recompute="block")
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(step.microbatch)}
    if all(size % 2 == 0 for size in sizes):
        half = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((s.shape[0] // 2, *s.shape[1:]), s.dtype),
            step.microbatch,
        )
        yield "half the microbatch size", replace(step, microbatch=half)


def _cast(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)


def _bytes(tree: PyTree, dtype: Any = None) -> float:
    return float(
        sum(leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    )
