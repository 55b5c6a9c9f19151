"""What every pipeline shares: chunks that stay on their device, activations that travel.

Chunk c lives on device c mod P, with v = C / P chunks a device. A generator says in which tick each
task runs; the moves follow: an activation or cotangent leaves at the head of the tick after the one
that made it. Where its reader runs in that same tick the hop is exposed (`arrive == start`);
otherwise it travels under that tick's compute and lands in the next.
"""

from collections.abc import Iterable, Sequence

from jaxsys.errors import UsageError
from jaxsys.schedule import Block, Data, Move, MoveKind, Placement, Schedule, Task, TaskKind


def pipeline_schedule(
    name: str, *, devices: int, chunks: int, microbatches: int, tasks: Iterable[Task]
) -> Schedule:
    """Adds the moves to a pipeline's tasks.

    Args:
        name: the schedule's name.
        devices: P.
        chunks: C, a multiple of P.
        microbatches: M.
        tasks: every F, and every B or I and W, with its tick.
    """
    tasks = tuple(tasks)
    owners = tuple(chunk % devices for chunk in range(chunks))
    return Schedule(
        name=name,
        devices=devices,
        chunks=chunks,
        microbatches=microbatches,
        placement=Placement.OWNER,
        owners=owners,
        starts=tuple(
            (Block(data=Data.WEIGHT, chunk=chunk), owner) for chunk, owner in enumerate(owners)
        ),
        tasks=tasks,
        moves=hops(tasks, chunks),
    )


def hops(tasks: Iterable[Task], chunks: int) -> tuple[Move, ...]:
    """The moves that carry each F's output and each B's or I's cotangent to its reader."""
    forward: dict[tuple[int, int], Task] = {}
    backward: dict[tuple[int, int], Task] = {}
    for task in tasks:
        if task.kind is TaskKind.FORWARD:
            forward[task.chunk, task.microbatch] = task
        elif task.kind is not TaskKind.WEIGHT_GRADIENT:
            backward[task.chunk, task.microbatch] = task
    moves = []
    for (chunk, microbatch), task in forward.items():
        if chunk + 1 < chunks:
            block = Block(data=Data.ACTIVATION, chunk=chunk + 1, microbatch=microbatch)
            moves.append(_hop(block, task, forward[chunk + 1, microbatch]))
    for (chunk, microbatch), task in backward.items():
        if chunk > 0:
            block = Block(data=Data.COTANGENT, chunk=chunk - 1, microbatch=microbatch)
            moves.append(_hop(block, task, backward[chunk - 1, microbatch]))
    found = [move for move in moves if move is not None]
    return tuple(sorted(found, key=lambda move: (move.start, move.source, move.block)))


def _hop(block: Block, maker: Task, reader: Task) -> Move | None:
    if maker.device == reader.device:
        return None
    start = maker.tick + 1
    return Move(
        kind=MoveKind.PERMUTE,
        block=block,
        source=maker.device,
        target=reader.device,
        start=start,
        arrive=start if reader.tick == start else start + 1,
    )


def check_stages(devices: int, microbatches: int) -> None:
    """Raises UsageError unless there is at least one device and one microbatch."""
    if devices < 1:
        raise UsageError(f"devices={devices} must be at least 1")
    if microbatches < 1:
        raise UsageError(
            f"microbatches={microbatches} must be at least 1 (best several times devices={devices})"
        )


def earliest_ticks(
    orders: Sequence[Sequence[tuple[TaskKind, int, int]]], *, chunks: int
) -> tuple[Task, ...]:
    """Puts each device's tasks, one a tick and in the order given, into the earliest ticks.

    A task waits for the one before it on its device, and until the tick after that of the tasks
    whose output it reads.

    Args:
        orders: for each device its tasks as (kind, chunk, microbatch).
        chunks: C.

    Raises:
        ValueError: if the orders wait for each other in a circle.
    """
    done: dict[tuple[TaskKind, int, int], int] = {}
    ahead = [0] * len(orders)
    free = [0] * len(orders)
    tasks: list[Task] = []
    progress = True
    while progress:
        progress = False
        for device, order in enumerate(orders):
            while ahead[device] < len(order):
                kind, chunk, microbatch = order[ahead[device]]
                needs = _reads(kind, chunk, microbatch, chunks)
                if any(need not in done for need in needs):
                    break
                tick = max([free[device], *(done[need] + 1 for need in needs)])
                done[kind, chunk, microbatch] = tick
                free[device] = tick + 1
                ahead[device] += 1
                tasks.append(
                    Task(tick=tick, device=device, kind=kind, chunk=chunk, microbatch=microbatch)
                )
                progress = True
    if any(at < len(order) for at, order in zip(ahead, orders, strict=True)):
        raise ValueError("the devices' orders wait for each other in a circle")
    return tuple(tasks)


def _reads(
    kind: TaskKind, chunk: int, microbatch: int, chunks: int
) -> list[tuple[TaskKind, int, int]]:
    if kind is TaskKind.WEIGHT_GRADIENT:
        return [(TaskKind.INPUT_GRADIENT, chunk, microbatch)]
    if kind is TaskKind.FORWARD:
        return [(kind, chunk - 1, microbatch)] if chunk else []
    above = [(kind, chunk + 1, microbatch)] if chunk + 1 < chunks else []
    return [(TaskKind.FORWARD, chunk, microbatch), *above]
