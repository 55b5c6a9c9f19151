"""Pipelines with a whole backward pass: GPipe and 1F1B.

Stage i of P keeps its layers; microbatches pass down and their cotangents back up. With T_F and T_B
the times of a stage, a step takes (M + P - 1) (T_F + T_B) where M (T_F + T_B) would be ideal: a
bubble of (P - 1) / (M + P - 1). GPipe holds M residuals on every stage, 1F1B min(M, P - i) on
stage i.

Sources: GPipe (Huang et al., 2019); 1F1B (Narayanan et al., PipeDream-Flush, 2021).
"""

from jaxsys.schedule import Schedule, Task, TaskKind

from .stages import check_stages, pipeline_schedule


def gpipe(devices: int, microbatches: int) -> Schedule:
    """GPipe: every forward pass, then every backward pass.

    F of microbatch m on stage i is at tick i + m, B at (M + P - 1) + (P - 1 - i) + m. All devices
    run the same kind of task in a tick, and every hop is exposed.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    tasks = []
    for stage in range(p):
        for index in range(m):
            tasks.append(_task(stage + index, TaskKind.FORWARD, stage, index))
            tick = (m + p - 1) + (p - 1 - stage) + index
            tasks.append(_task(tick, TaskKind.BACKWARD, stage, index))
    return pipeline_schedule("gpipe", devices=p, chunks=p, microbatches=m, tasks=tasks)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """1F1B as published: least memory, hops exposed.

    Stage i runs P - i forwards, then one backward and one forward in turn. On a grid where F and B
    take a tick each, B of microbatch m on stage i is at tick 2P - 1 - i + 2m; F is at i + m while
    m < P - i and at i + 2m afterwards. Stage i holds min(M, P - i) residuals. In a steady tick half
    of the devices run F and the other half B, and every hop is needed at once: with devices that
    wait for each other at every hop a tick takes max(T_F, T_B). The total (M + P - 1) (T_F + T_B)
    is reached where sends do not block (`simulate(..., eager_sends=True)`) or T_F = T_B.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    tasks = []
    for stage in range(p):
        for index in range(m):
            tick = stage + index if index < p - stage else stage + 2 * index
            tasks.append(_task(tick, TaskKind.FORWARD, stage, index))
            tick = 2 * p - 1 - stage + 2 * index
            tasks.append(_task(tick, TaskKind.BACKWARD, stage, index))
    return pipeline_schedule("1f1b", devices=p, chunks=p, microbatches=m, tasks=tasks)


def one_f_one_b_overlap(devices: int, microbatches: int) -> Schedule:
    """1F1B with every hop hidden: more memory, and all devices run the same kind of task.

    Even ticks are F on all devices, odd ticks B. F of microbatch m on stage i is at tick 2 (i + m),
    B at 2 (2P - 2 - i + m) + 1. What an F tick makes travels under the next B tick and the other
    way round. P - 1 B ticks at the start and P - 1 F ticks at the end are empty, so a step still
    takes (M + P - 1) (T_F + T_B) even if devices keep step, whatever T_B / T_F is. Stage i holds
    min(M, 2 (P - 1 - i) + 1) residuals, up to almost twice 1F1B's.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    tasks = []
    for stage in range(p):
        for index in range(m):
            tasks.append(_task(2 * (stage + index), TaskKind.FORWARD, stage, index))
            tick = 2 * (2 * p - 2 - stage + index) + 1
            tasks.append(_task(tick, TaskKind.BACKWARD, stage, index))
    return pipeline_schedule("1f1b-overlap", devices=p, chunks=p, microbatches=m, tasks=tasks)


def _task(tick: int, kind: TaskKind, stage: int, microbatch: int) -> Task:
    return Task(tick=tick, device=stage, kind=kind, chunk=stage, microbatch=microbatch)
