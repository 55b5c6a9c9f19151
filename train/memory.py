"""What a step will hold on each device, from shapes alone, before anything is compiled.

`jaxsys.lowering.memory` says what a lowered step holds; here its sizes come from a trainer's own
model and state. Alternatives that would fit are looked for alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.axes import INNER, PIECES, SHARING
from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.hardware import free_host_bytes, gib
from jaxsys.layered import (
    LayeredModel,
    Parameters,
    PyTree,
    inside_parts,
    part_shapes,
    parts_of,
)
from jaxsys.lowering import Recompute
from jaxsys.lowering.eight_bits import encoded_bytes
from jaxsys.lowering.flat import floats
from jaxsys.lowering.kinds import RestOrder
from jaxsys.lowering.memory import (
    Around,
    block_bytes,
    head_bytes,
    head_sum_bytes,
    longest_block_bytes,
    longest_layer_bytes,
    sharded_peak_bytes,
    tabled_bytes,
    tree_bytes,
)
from jaxsys.lowering.refusal import why_not_shared_places
from jaxsys.lowering.sequences import Sequences
from jaxsys.lowering.tables import buffers_of
from jaxsys.planner.costs import cut, full_chunks
from jaxsys.schedule import Block, Costs, Data, Placement, Schedule, TaskKind, check
from jaxsys.strategies import STRATEGIES, for_layers


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
    looped: bool = False
    """Chunks that are alike are a loop, of a schedule whose parameters rest in shards."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Mesh axis of `jaxsys.axes.AROUND` -> devices along it."""
    context: ContextSplit | None = None
    """How each sequence lies over devices."""

    @property
    def around(self) -> dict[str, int]:
        """`sizes`, with those that share each sequence."""
        shared = {} if self.context is None else {self.context.axis: self.context.parts}
        return {**self.sizes, **shared}

    @property
    def inner(self) -> dict[str, int]:
        """Axis of `jaxsys.axes.INNER` -> devices that compute a block together."""
        return {name: count for name, count in self.sizes.items() if name in INNER}

    @property
    def pieces(self) -> int:
        """In how many pieces the devices of a place have what rests and travels there."""
        return math.prod(count for name, count in self.sizes.items() if name in PIECES)

    @property
    def sharers(self) -> int:
        """Devices that share each sequence, and what of the state rests in shards."""
        return 1 if self.context is None else self.context.parts

    @property
    def policies(self) -> tuple[Recompute, ...]:
        """What backward computes again, layer by layer."""
        if isinstance(self.recompute, tuple):
            return self.recompute
        return (self.recompute,) * self.model.layers


def step_bytes(step: StepShape) -> float:
    """The most that any device is predicted to hold."""
    split, inner = step.context, step.inner
    if split is not None:
        part = Sequences(model=step.model, split=split).part(step.microbatch)
        step = replace(step, model=step.model.over(split), microbatch=part)
        inner[split.axis] = split.parts
    parts = parts_of(step.model.joined_by(step.schedule.features_by), step.inner)
    if parts is not None:
        mine = part_shapes(step.parameters, parts, step.inner)
        share = tree_bytes(mine) / tree_bytes(step.parameters)
        step = replace(
            step,
            model=parts.model,
            parameters=mine,
            state_bytes=step.state_bytes * share,
        )
    return inside_parts(inner, lambda: _step_bytes(step))


def _step_bytes(step: StepShape) -> float:
    schedule, model, microbatch = step.schedule, step.model, step.microbatch
    sharded = schedule.placement is Placement.SHARDED
    edge, blocks = (
        in_dtype(step.parameters[part], step.compute_dtype) for part in ("edge", "blocks")
    )
    layer_of = {
        kind: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), stack)
        for kind, stack in model.stacks(blocks).items()
    }
    x = jax.eval_shape(model.embed, edge, microbatch)
    policies = step.policies
    split = any(task.kind is TaskKind.INPUT_GRADIENT for task in schedule.tasks)
    # Steps with buffers have room for a layer of any kind wherever they have one.
    longest_of = {
        policy: longest_block_bytes(model, layer_of, x, microbatch, policy, split=split)
        for policy in set(policies)
        if not sharded
    }
    pairs = list(zip(policies, model.kind_of, strict=True))
    found = {
        pair: block_bytes(
            model, layer_of[pair[1]], x, microbatch, pair[0], split=split, kind=pair[1]
        )
        if sharded
        else longest_of[pair[0]]
        for pair in dict.fromkeys(pairs)
    }
    weight_of = {kind: tree_bytes(layer) for kind, layer in layer_of.items()}
    gradient_of = {
        kind: tree_bytes(floats(layer), step.gradient_dtype) for kind, layer in layer_of.items()
    }
    parts = (cut if sharded else full_chunks)(model.layers, schedule.chunks)
    longest = max(len(part) for part in parts)
    longest_weight, longest_floats = longest_layer_bytes(layer_of)
    longest_gradient = longest_floats * (
        jnp.dtype(step.gradient_dtype).itemsize / jnp.dtype(step.compute_dtype).itemsize
    )

    def weighed(part: Sequence[int], each: Mapping[str, float], most: float) -> float:
        return sum(each[model.kind_of[i]] for i in part) if sharded else longest * most

    # Of a chunk that is computed again all its layers' residuals are there by then.
    again = longest * longest_of["chunk"].residual if "chunk" in longest_of else 0.0

    def kept(part: Sequence[int]) -> float:
        if policies[0] == "chunk":
            return tree_bytes(x)
        whole = sum(found[pairs[i]].residual for i in part)
        return whole if sharded else longest * longest_of[policies[0]].residual

    costs = Costs(
        forward_s=0.0,
        backward_s=0.0,
        weight_bytes=[weighed(p, weight_of, longest_weight) / step.pieces for p in parts],
        gradient_bytes=[weighed(p, gradient_of, longest_gradient) / step.pieces for p in parts],
        activation_bytes=tree_bytes(x),
        residual_bytes=[kept(part) for part in parts],
        tap_bytes=[0.0 if sharded else longest * longest_of[policies[0]].tap for _ in parts],
    )
    in_place = 0.0
    if step.pieces > 1:  # a layer's rows as they came, leaves of them, its gradient in rows
        in_place = 2 * longest_weight + longest_gradient
    # Chunks are as long as the longest where they rest; what pads them has its state too.
    rest = step.state_bytes
    if schedule.placement is Placement.OWNER:
        order = RestOrder(model, np.arange(schedule.chunks)[None], longest)
        padded = sum(
            (schedule.chunks * rows - model.kind_of.count(kind)) * weight_of[kind]
            for kind, rows in order.rows.items()
        )
        rest *= 1 + padded / tree_bytes((edge, blocks))
    around = Around(
        rest=rest / state_share(schedule, step.around),
        edge=tree_bytes(edge),
        edge_sums=tree_bytes(floats(edge), step.gradient_dtype),
        block=max(each.work for each in found.values()) + again + in_place,
        head=head_bytes(model, edge, x, microbatch),
        freeing=[max((found[pairs[i]].freeing_work for i in p), default=0.0) for p in parts],
        forward=[max((found[pairs[i]].forward for i in p), default=0.0) for p in parts],
        head_sums=head_sum_bytes(model, edge, x, microbatch, step.gradient_dtype),
    )
    live = check(schedule)
    if sharded:
        group = schedule.devices * step.sharers
        return sharded_peak_bytes(schedule, costs, around, live, group=group, looped=step.looped)
    size = {
        data: max(costs.block_bytes(Block(data=data, chunk=c)) for c in range(schedule.chunks))
        for data in Data
    }
    buffers, sent_weight = buffers_of(schedule, live), None
    if model.travels_in_float8 is not None:
        # Rows that chunks share have room for the longest kind's of each form.
        sent_of = [encoded_bytes(model, layer) for layer in layer_of.values()]
        sent_weight = longest * max(sent_of) / step.pieces
    return float(
        tabled_bytes(schedule, buffers, size, around, sent_weight=sent_weight, unroll=step.unroll)
    )


def state_share(schedule: Schedule, around: Mapping[str, int]) -> int:
    """Over how many devices a schedule's state rests in parts.

    Args:
        schedule: what is run.
        around: mesh axis -> devices along it. Of those that share each sequence all stand for one
            of the schedule's devices where its state rests in shards; of those that have pieces of
            a place of a ring where it rests on owners.
    """
    if schedule.placement is Placement.REPLICATED:
        return 1
    axes = SHARING if schedule.placement is Placement.SHARDED else PIECES
    return schedule.devices * math.prod(around.get(name, 1) for name in axes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a device may hold."""

    bytes: float
    shared_by: int = 0
    """CPU devices that have the host's memory together, each its part; 0 for other devices."""

    def __str__(self) -> str:
        shown = gib(self.bytes)
        if not self.shared_by:
            return shown
        whole = f"{gib(self.bytes * self.shared_by)} free on this host"
        return whole if self.shared_by == 1 else f"{shown} ({whole}, for {self.shared_by} devices)"


def limit_of(device: Any) -> Limit:
    """What an accelerator lets a program allocate; a CPU device's part of what its host has free.

    Where neither is told, no limit.
    """
    if device.platform != "cpu":
        return Limit(bytes=float((device.memory_stats() or {}).get("bytes_limit", math.inf)))
    free, devices = free_host_bytes(), jax.local_device_count("cpu")
    return Limit(bytes=math.inf if free is None else free / devices, shared_by=devices)


def check_state_fits(
    schedule: Schedule, state_bytes: float, limit: Limit, *, around: Mapping[str, int]
) -> None:
    """Raises UsageError if masters and optimizer state do not fit as the schedule rests them, on
    so many devices along the axes `around` it."""
    split = state_share(schedule, around)
    if state_bytes / split > limit.bytes:
        raise UsageError(
            f"parameters and optimizer state of {schedule.name} take "
            f"{gib(state_bytes / split)} a device, of {limit}; use "
            f"{_more(limit)}{'' if split > 1 else ', or a schedule that splits them'}; or go on "
            "anyway with memory_gib=inf"
        )


def _more(limit: Limit) -> str:
    return "a smaller model" if limit.shared_by else "more devices"


def check_fits(step: StepShape, limit: Limit) -> None:
    """Raises UsageError, which names what would fit, if the step is predicted not to."""
    limit_bytes = limit.bytes
    needed = step_bytes(step)
    if needed <= limit_bytes:
        return
    others = [(step_bytes(other), name) for name, other in _alternatives(step)]
    fitting = [f"{name} ({gib(size)})" for size, name in others if size <= limit_bytes]
    if fitting:
        advice = f"what would fit: {', '.join(fitting[:3])}"
    else:
        least, name = min([*others, (needed, "this")])
        advice = (
            f"nothing tried would fit, the least, {name}, needs {gib(least)}: use "
            f"{_more(limit)}, smaller microbatches or "
            "shorter sequences"
        )
    raise UsageError(
        f"a step of {step.schedule.name} is predicted to need {gib(needed)} a device, of "
        f"{limit}; {advice}; or go on anyway with memory_gib=inf"
    )


def _alternatives(step: StepShape) -> Iterator[tuple[str, StepShape]]:
    """More recompute, other schedules, and half the microbatch."""
    policies: tuple[Recompute, ...] = ("selective", "block")
    for policy in policies:
        if step.recompute != policy:
            yield f"recompute {policy}", replace(step, recompute=policy)
    if jnp.dtype(step.compute_dtype).itemsize > 2:
        yield "compute_dtype='bfloat16'", replace(step, compute_dtype=jnp.bfloat16)
    old = step.schedule
    for name, strategy in STRATEGIES.items():
        if not strategy.offered:
            continue
        try:
            made = for_layers(
                name,
                devices=old.devices,
                microbatches=old.microbatches,
                layers=step.model.layers,
            )
            cut(step.model.layers, made.chunks)
        except UsageError:
            continue
        if made.name != old.name and (step.pieces == 1 or why_not_shared_places(made) is None):
            yield f"{name} with recompute block", replace(step, schedule=made, recompute="block")
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(step.microbatch)}
    if all(size % 2 == 0 for size in sizes):
        half = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((s.shape[0] // 2, *s.shape[1:]), s.dtype),
            step.microbatch,
        )
        yield "half the microbatch size", replace(step, microbatch=half)


def in_dtype(shapes: Any, dtype: Any) -> Any:
    """Shapes with floats in a dtype."""

    def cast(leaf: Any) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)

    return jax.tree.map(cast, shapes)
