"""Data parallelism: every device holds all weights and computes its own microbatches.

Gradients are summed over the devices once a step. With one device it is plain accumulation.
"""

from jaxsys.errors import UsageError
from jaxsys.schedule import (
    ALL,
    Block,
    Data,
    Move,
    MoveKind,
    Placement,
    Schedule,
    Task,
    TaskKind,
    gradient_block,
)

from .choices import Place
from .strategy import Strategy


def data_parallel(devices: int, microbatches: int, *, chunks: int = 1) -> Schedule:
    """Plain data parallelism (ZeRO-0).

    Args:
        devices: P.
        microbatches: M over all devices, a multiple of P; device d computes d, d + P, ...
        chunks: C, in how many pieces the layers are run and reduced.

    Raises:
        UsageError: if P does not divide M.
    """
    check_microbatches(devices, microbatches)
    return Schedule(
        name="dp",
        devices=devices,
        chunks=chunks,
        microbatches=microbatches,
        placement=Placement.REPLICATED,
        starts=tuple(
            (Block(data=Data.WEIGHT, chunk=chunk), device)
            for device in range(devices)
            for chunk in range(chunks)
        ),
        tasks=tuple(local_tasks(devices, microbatches, chunks)),
        moves=tuple(
            Move(
                kind=MoveKind.ALL_REDUCE,
                block=gradient_block(chunk),
                source=ALL,
                target=ALL,
                # Ready once the last microbatch has passed it; the first chunks are done last.
                start=2 * chunks * (microbatches // devices) - chunk,
                arrive=2 * chunks * (microbatches // devices) - chunk + 1,
            )
            for chunk in reversed(range(chunks))
        ),
    )


def local_tasks(devices: int, microbatches: int, chunks: int) -> list[Task]:
    """All chunks forward, then all chunks backward, one microbatch of each device after another."""
    tasks = []
    for device in range(devices):
        for turn in range(microbatches // devices):
            base = 2 * chunks * turn
            for chunk in range(chunks):
                for kind, tick in (
                    (TaskKind.FORWARD, base + chunk),
                    (TaskKind.BACKWARD, base + 2 * chunks - 1 - chunk),
                ):
                    tasks.append(
                        Task(
                            tick=tick,
                            device=device,
                            kind=kind,
                            chunk=chunk,
                            microbatch=turn * devices + device,
                        )
                    )
    return tasks


def check_microbatches(devices: int, microbatches: int) -> None:
    """Raises UsageError unless every device gets the same positive number of microbatches."""
    if devices < 1:
        raise UsageError(f"devices={devices} must be at least 1")
    if microbatches < devices or microbatches % devices:
        legal = ", ".join(str(devices * k) for k in range(1, 5))
        raise UsageError(
            f"microbatches={microbatches} must be a positive multiple of devices={devices}; "
            f"use {legal}, ..."
        )


STRATEGIES = (
    Strategy(
        name="dp",
        build=data_parallel,
        placement=Placement.REPLICATED,
        place=Place(axis="shard"),
        recognises=lambda signs: signs.schedule.placement is Placement.REPLICATED,
        even_microbatches=True,
        layers_are_chunks=True,
    ),
)
