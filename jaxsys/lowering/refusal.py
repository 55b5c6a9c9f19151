"""What of a legal schedule is not lowered, and why."""

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


def why_not_cut(schedule: Schedule, split: ContextSplit) -> str | None:
    """Why no step of a legal schedule cuts its sequences so; None if one does.

    Where devices do not all have a task in a tick, those without pass over what it sends. That is
    well for collectives of one place's devices; a hop is one collective of all places.
    """
    if schedule.placement is Placement.SHARDED or not _hops(split):
        return None
    everyone = schedule.devices == 1 or (
        schedule.placement is Placement.REPLICATED and schedule.microbatches % schedule.devices == 0
    )
    if everyone:
        return None
    where = "context_by='gather' or 'ulysses'"
    if schedule.placement is Placement.REPLICATED:
        return (
            f"schedule {schedule.name} has microbatches={schedule.microbatches} that do not divide "
            f"evenly over {schedule.devices} devices, and context_by={split.by!r} has all devices "
            f"send at once; use a multiple of {schedule.devices}, or {where}"
        )
    return f"schedule {schedule.name} {why_not_in_turn(split)}"


def why_not_in_turn(split: ContextSplit) -> str | None:
    """Why sequences are not cut so in stages or a ring; None if they are."""
    if not _hops(split):
        return None
    return (
        f"has devices without a task in some ticks, and context_by={split.by!r} has all devices "
        "send at once; use context_by='gather' or 'ulysses', or a schedule whose parameters rest "
        "in shards such as zero-3"
    )


def _hops(split: ContextSplit) -> bool:
    return split.groups > 1 and split.by != "gather"
