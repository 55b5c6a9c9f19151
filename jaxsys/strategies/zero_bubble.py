"""Zero-bubble pipelines: the backward pass is cut in two, and the half that can wait fills gaps.

I (dL/dx) is on the critical path; W (dL/dw) only needs what I left behind. Every stage runs some
forwards, then I, W and F in turn, its W lagging behind its I:

            forwards first   lag of W   held (residuals, taps)   idle inside a stage's span
    ZB-H1   P - i            i          P                        (P - 1) (T_F + T_I - T_W)
    ZB-H2   2 (P - i) - 1    2 i        2P - 1                   (P - 1) (T_F + T_I - 2 T_W)

on stage i of P, for T_W <= T_F, T_I and enough microbatches. With three equal times that is a third
of 1F1B's (P - 1) (T_F + T_I + T_W), and nothing. A stage's span is from its first task to its last:
a step that all stages must end together, say to clip gradients by their global norm, also contains
the (P - 1) T_F by which the last stage starts later, so that with three equal times both take
(3 M + P - 1) T, which no pipeline of P stages can beat. H2 gains where stages pass from one step to
the next without waiting for each other.

Their ticks are those of three equal times; with others, these totals hold where sends do not block
(`simulate(..., eager_sends=True)`), and devices that keep step lose much of the gain.
`zero_bubble_overlap` gains less, but for any three times and in step.

Source: Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024) for the idea and the formulas. The
lags are derived here.
"""

from jaxsys.schedule import Placement, Schedule, Task, TaskKind

from .choices import Backward, Order, Place
from .stages import check_stages, earliest_ticks, pipeline_schedule
from .strategy import Signs, Strategy


def zero_bubble_h1(devices: int, microbatches: int) -> Schedule:
    """ZB-H1: as many microbatches held as 1F1B holds on its first stage, a third of its bubble.

    With equal times a step is max(3M + P - 1, 2M + 2P - 1) ticks long.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number; the formulas of the bubble need M >= P.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    orders = [_order(stage, m, ahead=p - stage, lag=stage) for stage in range(p)]
    return pipeline_schedule(
        "zb-h1", devices=p, chunks=p, microbatches=m, tasks=earliest_ticks(orders, chunks=p)
    )


def zero_bubble_h2(devices: int, microbatches: int) -> Schedule:
    """ZB-H2: twice the microbatches held, and no stage idles between its first task and its last.

    With equal times a step is max(3M + P - 1, 2M + 2P - 1) ticks long, of which a stage idles
    max(0, 2P - 1 - M) ticks inside its span.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number; nothing idles from M = 2P - 1 on.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    # With few microbatches a full lag would leave W for after the last I, where nothing is left to
    # fill.
    orders = [
        _order(stage, m, ahead=2 * (p - stage) - 1, lag=min(2 * stage, stage + max(0, m - p)))
        for stage in range(p)
    ]
    return pipeline_schedule(
        "zb-h2", devices=p, chunks=p, microbatches=m, tasks=earliest_ticks(orders, chunks=p)
    )


def zero_bubble_overlap(devices: int, microbatches: int) -> Schedule:
    """Every hop hidden, and all devices run the same kind of task: two thirds of 1F1B's bubble.

    Ticks are F, I and W in turn on all devices. In period k (ticks 3k, 3k + 1, 3k + 2) stage i runs
    F of microbatch k - i, I of microbatch k - (2P - 2 - i), and, as all stages do, W of microbatch
    k - (2P - 2). So W is in M ticks only, which the P - 1 periods of filling and draining lack: a
    step takes (M + P - 1) (T_F + T_I) + M T_W even if devices keep step, whatever the three times
    are. Stage i holds min(M, 2 (P - 1 - i) + 1) residuals and up to min(M, i + 1) taps.

    Args:
        devices: P, the number of stages; also the number of chunks.
        microbatches: M, any positive number.

    Raises:
        UsageError: if P or M is not positive.
    """
    p, m = devices, microbatches
    check_stages(p, m)
    tasks = [
        Task(tick=3 * period + place, device=stage, kind=kind, chunk=stage, microbatch=index)
        for stage in range(p)
        for index in range(m)
        for place, kind, period in (
            (0, TaskKind.FORWARD, stage + index),
            (1, TaskKind.INPUT_GRADIENT, 2 * p - 2 - stage + index),
            (2, TaskKind.WEIGHT_GRADIENT, 2 * p - 2 + index),
        )
    ]
    return pipeline_schedule("zb-overlap", devices=p, chunks=p, microbatches=m, tasks=tasks)


def _order(
    stage: int, microbatches: int, *, ahead: int, lag: int
) -> list[tuple[TaskKind, int, int]]:
    forward = list(range(microbatches))
    order = [(TaskKind.FORWARD, stage, m) for m in forward[:ahead]]
    for m in range(microbatches):
        order.append((TaskKind.INPUT_GRADIENT, stage, m))
        if m >= lag:
            order.append((TaskKind.WEIGHT_GRADIENT, stage, m - lag))
        if m + ahead < microbatches:
            order.append((TaskKind.FORWARD, stage, m + ahead))
    left = range(max(0, microbatches - lag), microbatches)
    return [*order, *((TaskKind.WEIGHT_GRADIENT, stage, m) for m in left)]


def _split(signs: Signs) -> bool:
    """Whether a stage is one chunk and a backward pass two tasks."""
    return signs.staged and signs.split and signs.schedule.chunks == signs.schedule.devices


def _early(signs: Signs) -> bool:
    """Whether the first stage holds nearly twice what it must, or all there is."""
    most = min(2 * signs.schedule.devices - 1, signs.schedule.microbatches)
    return _split(signs) and signs.fewest < signs.residuals == most


STRATEGIES = (
    Strategy(
        name="zb-h1",
        build=zero_bubble_h1,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.EARLIEST_BACKWARD, backward=Backward.SPLIT, delay=1),
        recognises=lambda signs: _split(signs) and signs.residuals <= signs.fewest == signs.taps,
    ),
    Strategy(
        name="zb-h2",
        build=zero_bubble_h2,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.EAGER_FORWARD, backward=Backward.SPLIT, delay=2),
        recognises=lambda signs: _early(signs) and signs.taps == 2 * signs.schedule.devices - 1,
    ),
    Strategy(
        name="zb-overlap",
        build=zero_bubble_overlap,
        placement=Placement.OWNER,
        place=Place(axis="stages", order=Order.SPACED, backward=Backward.SPLIT),
        recognises=lambda signs: _early(signs) and signs.taps == signs.schedule.devices,
    ),
)
