"""What of a legal schedule is not lowered, and why."""

from typing import Any

import jax.numpy as jnp

from jaxsys.axes import DividedAround
from jaxsys.context import ContextSplit
from jaxsys.schedule import Data, MoveKind, Placement, Schedule
from jaxsys.strategies.data_parallel import local_tasks

TABLED_MOVES = (MoveKind.PERMUTE, MoveKind.COPY, MoveKind.ALL_REDUCE)
"""What a step that follows tables has transfers for."""
SHARDED_MOVES = (MoveKind.ALL_GATHER, MoveKind.REDUCE_SCATTER)
"""What one whose parameters rest in shards has."""


def why_not_lowered(schedule: Schedule) -> str | None:
    """Why no step is made of a legal schedule; None if one is."""
    sharded = schedule.placement is Placement.SHARDED
    moves = SHARDED_MOVES if sharded else TABLED_MOVES
    for move in schedule.moves:
        if move.kind not in moves:
            return f"{schedule.name}: {move.kind} is not lowered where parameters rest so"
        if not sharded and move.arrive > move.start + 1:
            return f"{move} is in flight for more than one tick"
    if sharded:
        turns = local_tasks(schedule.devices, schedule.microbatches, schedule.chunks)
        if set(schedule.tasks) != set(turns):
            return (
                f"schedule {schedule.name} does not take one microbatch after another on every "
                "device"
            )
    return None


def why_not_shared_places(schedule: Schedule) -> str | None:
    """Why the devices of a node do not share the chunks of a legal schedule; None if they do."""
    if any(
        move.kind is MoveKind.PERMUTE and move.block.data is Data.WEIGHT for move in schedule.moves
    ):
        return None
    return (
        f"schedule {schedule.name} sends no weights from place to place, which is what the members "
        "of a place share; use a ring such as weipipe-keep, or these devices as part of the ring"
    )


def why_not_in_float8(schedule: Schedule, compute_dtype: Any) -> str | None:
    """Why no weights of a legal schedule travel in float8; None if they do."""
    if jnp.finfo(compute_dtype).maxexp < jnp.finfo(jnp.bfloat16).maxexp:
        return (
            f"transfers in float8 are of numbers with float32's exponents, and compute_dtype is "
            f"{jnp.dtype(compute_dtype)}; use bfloat16 or float32, or leave float8 transfers out"
        )
    moved = (MoveKind.PERMUTE, MoveKind.ALL_GATHER)
    if any(move.kind in moved and move.block.data is Data.WEIGHT for move in schedule.moves):
        return None
    return (
        f"schedule {schedule.name} sends no weights, which float8 transfers are of; leave them "
        "out, or use one that gathers weights or sends them around, such as zero-3 or weipipe-keep"
    )


def why_not_cut(schedule: Schedule, split: ContextSplit | None) -> str | None:
    """Why no step of a legal schedule cuts sequences so, or joins features as it says; None if one
    does.

    Where devices do not all have a task in a tick, those without pass over what it sends. That is
    well for collectives of one place's devices; a hop is one collective of all places.
    """
    if schedule.placement is Placement.SHARDED or schedule.devices == 1:
        return None
    for said, instead in filter(None, (_hops(split), _features_hop(schedule))):
        if schedule.placement is not Placement.REPLICATED:
            return f"schedule {schedule.name} {_not_in_turn(said, instead)}"
        if schedule.microbatches % schedule.devices:
            return (
                f"schedule {schedule.name} has microbatches={schedule.microbatches} that do not "
                f"divide evenly over {schedule.devices} devices, and {said} has all devices send "
                f"at once; use a multiple of {schedule.devices}, or {instead}"
            )
    return None


def why_not_in_turn(split: ContextSplit | None) -> str | None:
    """Why sequences are not cut so in stages or a ring; None if they are."""
    hops = _hops(split)
    return None if hops is None else _not_in_turn(*hops)


def why_not_joined_in_turn(parts: DividedAround) -> str | None:
    """Why features are not joined so in stages or a ring; None if they are."""
    hops = _features_hop(parts)
    return None if hops is None else _not_in_turn(*hops)


def _not_in_turn(said: str, instead: str) -> str:
    return (
        f"has devices without a task in some ticks, and {said} has all devices send at once; use "
        f"{instead}, or a schedule whose parameters rest in shards such as zero-3"
    )


def _hops(split: ContextSplit | None) -> tuple[str, str] | None:
    """(what is sent by hops, what is not in its place); None where nothing is."""
    if split is None or split.groups == 1 or split.by == "gather":
        return None
    return f"context_by={split.by!r}", "context_by='gather' or 'ulysses'"


def _features_hop(parts: DividedAround) -> tuple[str, str] | None:
    """Likewise."""
    if parts.features_by != "ring":
        return None
    return f"features_by={parts.features_by!r}", "features_by='gather'"
