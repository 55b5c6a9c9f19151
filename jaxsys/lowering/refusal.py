"""What of a legal schedule is not lowered, and why."""

from jaxsys.schedule import MoveKind, Placement, Schedule
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
