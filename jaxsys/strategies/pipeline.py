"""Pipelines with a whole backward pass: GPipe, 1F1B and interleaved 1F1B.

Stage i of P keeps its layers; microbatches pass down and their cotangents back up. With T_F and T_B
the times of a stage, a step takes (M + P - 1) (T_F + T_B) where M (T_F + T_B) would be ideal: a
bubble of (P - 1) / (M + P - 1). GPipe holds M residuals on every stage, 1F1B min(M, P - i) on
stage i.

Sources: GPipe (Huang et al., 2019); 1F1B (PipeDream-Flush, Narayanan et al., 2021); interleaved
(Narayanan et al., SC 2021).
"""

from collections.abc import Callable

from jaxsys.errors import UsageError
from jaxsys.schedule import Placement, Schedule, Task, TaskKind

from .choices import Order, Place
from .data_parallel import check_microbatches
from .stages import check_stages, earliest_ticks, pipeline_schedule
from .strategy import Signs, Strategy


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
    return _at_ticks("gpipe", p, m, lambda i, n: i + n, lambda i, n: m + p - 1 + (p - 1 - i) + n)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """1F1B as published: least memory, hops exposed.

    Stage i runs P - i forwards, then one backward and one forward in turn. On a grid where F and B
    take a tick each, B of microbatch m on stage i is at tick 2P - 1 - i + 2m; F is at i + m while
    m < P - i and at i + 2m afterwards. Stage i holds min(M, P - i) residuals. In a steady tick half
    of the devices run F and the other half B, and every hop is needed at once, so it is exposed. If
    all devices keep step a tick takes max(T_F, T_B); the total (M + P - 1) (T_F + T_B) is reached
    for any times where sends do not block (`simulate(..., eager_sends=True)`).

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number.

    Raises:
        UsageError: if P or M is not positive.
    """
    p = devices
    return _at_ticks(
        "1f1b",
        p,
        microbatches,
        lambda i, n: i + n if n < p - i else i + 2 * n,
        lambda i, n: 2 * p - 1 - i + 2 * n,
    )


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
    p = devices
    return _at_ticks(
        "1f1b-overlap",
        p,
        microbatches,
        lambda i, n: 2 * (i + n),
        lambda i, n: 2 * (2 * p - 2 - i + n) + 1,
    )


def interleaved_one_f_one_b(
    devices: int, microbatches: int, *, chunks_per_device: int = 2
) -> Schedule:
    """Interleaved 1F1B: v chunks on each device, so that the pipeline fills in steps of 1/v.

    Chunk c lives on device c mod P. Microbatches go in groups of P: a group passes a device's first
    chunk, then its second, and so on, and backwards in the opposite order. Device i runs
    2 (P - 1 - i) + (v - 1) P + 1 forwards, then one backward and one forward in turn. With t_F and
    t_B the times of a chunk, a step takes (v M + P - 1) (t_F + t_B): a bubble of
    (P - 1) / (v M + P - 1), for v times the transfers. As in `one_f_one_b` half of the devices run
    F while the others run B, and hops are exposed.

    Args:
        devices: P; there are v P chunks.
        microbatches: M, a multiple of P.
        chunks_per_device: v.

    Raises:
        UsageError: if P does not divide M, or v is not positive.
    """
    p, m, v = devices, microbatches, chunks_per_device
    check_microbatches(p, m)
    if v < 1:
        raise UsageError(f"chunks_per_device={v} must be at least 1")
    orders = []
    for device in range(p):
        forward = [
            (TaskKind.FORWARD, turn // p % v * p + device, turn // (v * p) * p + turn % p)
            for turn in range(v * m)
        ]
        backward = [
            (
                TaskKind.BACKWARD,
                (v - 1 - turn // p % v) * p + device,
                turn // (v * p) * p + turn % p,
            )
            for turn in range(v * m)
        ]
        ahead = min(v * m, 2 * (p - 1 - device) + (v - 1) * p + 1)
        order = forward[:ahead]
        for turn, task in enumerate(backward):
            order += [task, *forward[ahead + turn : ahead + turn + 1]]
        orders.append(order)
    return pipeline_schedule(
        "1f1b-interleaved",
        devices=p,
        chunks=v * p,
        microbatches=m,
        tasks=earliest_ticks(orders, chunks=v * p),
    )


Tick = Callable[[int, int], int]
"""(stage, microbatch) -> in which tick."""


def _at_ticks(
    name: str, devices: int, microbatches: int, forward: Tick, backward: Tick
) -> Schedule:
    """The pipeline of one chunk a stage whose F and B are at these ticks."""
    check_stages(devices, microbatches)
    tasks = [
        Task(tick=at(stage, index), device=stage, kind=kind, chunk=stage, microbatch=index)
        for stage in range(devices)
        for index in range(microbatches)
        for kind, at in ((TaskKind.FORWARD, forward), (TaskKind.BACKWARD, backward))
    ]
    sizes = {"devices": devices, "chunks": devices, "microbatches": microbatches}
    return pipeline_schedule(name, **sizes, tasks=tasks)


def _whole(signs: Signs) -> bool:
    """Whether a stage is one chunk and a backward pass one task."""
    return signs.staged and not signs.split and signs.schedule.chunks == signs.schedule.devices


STRATEGIES = (
    Strategy(
        name="gpipe",
        build=gpipe,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.ALL_FORWARD),
        recognises=lambda signs: (
            _whole(signs) and signs.fewest < signs.residuals == signs.schedule.microbatches
        ),
    ),
    Strategy(
        name="1f1b",
        build=one_f_one_b,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.EARLIEST_BACKWARD),
        recognises=lambda signs: _whole(signs) and signs.residuals <= signs.fewest,
        offered=True,
    ),
    Strategy(
        name="1f1b-overlap",
        build=one_f_one_b_overlap,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.SPACED),
        recognises=lambda signs: (
            _whole(signs)
            and signs.fewest < signs.residuals < signs.schedule.microbatches
            and not _ticks(signs, TaskKind.FORWARD) & _ticks(signs, TaskKind.BACKWARD)
        ),
    ),
    Strategy(
        name="1f1b-interleaved",
        build=interleaved_one_f_one_b,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.EARLIEST_BACKWARD, chunks=2),
        even_microbatches=True,
        chunks_per_device=2,
        recognises=lambda signs: (
            signs.staged and not signs.split and signs.schedule.chunks > signs.schedule.devices
        ),
    ),
)


def _ticks(signs: Signs, kind: TaskKind) -> set[int]:
    return {task.tick for task in signs.schedule.tasks if task.kind is kind}
