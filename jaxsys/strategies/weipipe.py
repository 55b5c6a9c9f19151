"""WeiPipe: weights and their gradients travel round a ring, data stays where it is.

Worker r computes whole microbatches k*P + r. At tick t it holds, of the forward weight stream,
chunk (t - r) mod P; a second weight stream brings the chunks in backward order, and the sums of
their gradients ride along with it or follow it. All three go r -> r + 1. The turn plans, with the
length of a step where every tick lasts as long as its busiest worker:

    naive        each microbatch F on P ticks, then B on P ticks   see `naive`
    interleave   every steady tick one F and one B                (M + P - 1) (T_F + T_B)
    wzb1         every steady tick one F, one I and one W         (M + P - 1) (T_F + T_I) + M T_W
    wzb2         F, I and W in waves of P ticks each              (3 M + P - 1) T, all times T
    wzb2_paired  waves of I, and of W beside the next F           (2 M + P - 1) T_I, as T_F + T_W

Interleave has 1F1B's bubble, (P - 1) / (M + P - 1). Unlike a pipeline's it is not forced by the
data: weights are there before anything is computed, so a worker that need not keep step starts at
once, and all these bubbles are smaller. What cannot be avoided in step is that each worker begins
its first microbatch in a tick of its own, since only one of them can hold chunk 0.

Source: WeiPipe (Lin et al., PPoPP 2025) for the idea of the ring and of its four variants; the
exact ticks of all plans, the mirrored start of the backward stream and the way home of the
gradients are derived here. `scripts/search_wzb.py` searches small rings for better plans.
"""

from collections.abc import Sequence

from jaxsys.errors import UsageError
from jaxsys.schedule import (
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

from .choices import Backward, Order, Place
from .data_parallel import check_microbatches
from .strategy import Signs, Strategy

FORWARD_LANE = "F"
BACKWARD_LANE = "B"


def naive(devices: int, microbatches: int) -> Schedule:
    """WeiPipe-Naive: a worker runs a microbatch's F on P ticks, then its B on P ticks.

    In all but one tick of every 2P some worker runs a B, so that in step a tick lasts T_B, where
    T_B >= T_F: with A = M / P the step takes (P + A - 1) T_F + A (2P - 1) T_B, nearly 2 M T_B.
    A worker holds P residuals.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    kinds = (TaskKind.FORWARD, TaskKind.BACKWARD)
    return _waves("weipipe-naive", devices, microbatches, kinds, every=2)


def interleave(devices: int, microbatches: int) -> Schedule:
    """WeiPipe-Interleave: every steady tick runs one F and one B on every worker.

    Worker r runs its n-th F at tick r + n and its n-th B at r + P + n, and holds P residuals, one
    microbatch of the whole model. Each stream moves one chunk a tick, so a worker sends three
    chunks for each F and B. With M = P no worker ever runs both in one tick, and a step is
    (P - 1) min(T_F, T_B) shorter than the formula.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    p, m = devices, microbatches
    _check(p, m)
    tasks = [*_forwards(p, m), *_backwards(p, m, TaskKind.BACKWARD)]
    # A sum starts on worker 0 at its first B, which comes later for earlier chunks.
    starts = [(2 * p - 1 - chunk, 0) for chunk in range(p)]
    moves = [*_weight_streams(p, m), *_gradient_stream(p, starts, last=m + 2 * p - 2)]
    return _schedule("weipipe-interleave", p, m, tasks, moves)


def wzb1(devices: int, microbatches: int) -> Schedule:
    """WZB1: Interleave with the weight gradients put off until all workers can run them together.

    F and I run as Interleave's F and B. W waits for tick 2P, when even the last worker has run an
    I, and then runs on all workers in the same M ticks: worker r takes chunk (r - n) mod P at tick
    2P + n. So the gradient sums have a ring phase of their own, in which a chunk's sum starts on
    worker c and ends on worker c - 1.

    No tick of the P - 1 in which the ring fills contains a W: the bubble is (P - 1) (T_F + T_I) for
    any three times, two thirds of Interleave's where they are equal, with Interleave's traffic.
    (With M = P a step is (P - 1) min(T_F, T_I) shorter still.) Where all workers run a kind of task
    in the same ticks no plan does better: at least M + P - 1 ticks must have an F, as many an I,
    and M a W. The price is memory: worker r holds up to P - r taps beside its P residuals, 2P in
    all on worker 0. `scripts/search_wzb.py` finds that small rings need 2P - 1 for it, and that
    in the P of Interleave they cannot do better than Interleave.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    p, m = devices, microbatches
    _check(p, m)
    tasks = [*_forwards(p, m), *_backwards(p, m, TaskKind.INPUT_GRADIENT)]
    for worker in range(p):
        for turn in range(m):
            tasks.append(
                Task(
                    tick=2 * p + turn,
                    device=worker,
                    kind=TaskKind.WEIGHT_GRADIENT,
                    chunk=(worker - turn) % p,
                    microbatch=turn // p * p + worker,
                )
            )
    starts = [(2 * p, chunk) for chunk in range(p)]
    moves = [*_weight_streams(p, m), *_gradient_stream(p, starts, last=m + 2 * p - 1)]
    return _schedule("weipipe-wzb1", p, m, tasks, moves)


def wzb2(devices: int, microbatches: int) -> Schedule:
    """WZB2: F, I and W of a microbatch in three waves, so that a worker once started never idles.

    Worker r runs, for its k-th microbatch, F on P ticks from 3Pk + r on, I on the P ticks after, W
    on the P ticks after these: one task in every tick from r to r + 3M - 1. With equal times T the
    bubble is (P - 1) T, a third of Interleave's, and all of it is that workers start one after
    another; nothing is idle where a worker may begin its next step while others finish this one.
    No plan whose workers keep step does better, nor with fewer than P residuals and taps held.

    The price is that a tick has different kinds of tasks on different workers, and lasts as long as
    the longest; and traffic: a chunk returns to its owner between waves, so that it takes up to
    1.5 (P - 1) hops for each microbatch of a worker, where Interleave takes P.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    kinds = (TaskKind.FORWARD, TaskKind.INPUT_GRADIENT, TaskKind.WEIGHT_GRADIENT)
    return _waves("weipipe-wzb2", devices, microbatches, kinds, every=3)


def wzb2_paired(devices: int, microbatches: int) -> Schedule:
    """WZB2 for long attention or recompute: W of a microbatch runs beside F of the next.

    As `wzb2`, but a microbatch follows the last after 2P ticks, so that a worker runs I on P ticks,
    then W and the next F on P ticks, and so on. With T_I = T_F + T_W all its steady ticks are as
    long as each other and the bubble is (P - 1) T_I, half of Interleave's; where they differ,
    steady ticks take the longer of the two. They are equal without recompute where attention takes
    two thirds of the time that F's products of weights take, and with full recompute where it takes
    none. A worker holds P residuals and taps, and a microbatch has `wzb2`'s traffic.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    kinds = (TaskKind.FORWARD, TaskKind.INPUT_GRADIENT, TaskKind.WEIGHT_GRADIENT)
    return _waves("weipipe-wzb2-paired", devices, microbatches, kinds, every=2)


def _forwards(p: int, m: int) -> list[Task]:
    return [
        Task(
            tick=worker + turn,
            device=worker,
            kind=TaskKind.FORWARD,
            chunk=turn % p,
            microbatch=turn // p * p + worker,
        )
        for worker in range(p)
        for turn in range(m)
    ]


def _backwards(p: int, m: int, kind: TaskKind) -> list[Task]:
    return [
        Task(
            tick=worker + p + turn,
            device=worker,
            kind=kind,
            chunk=p - 1 - turn % p,
            microbatch=turn // p * p + worker,
        )
        for worker in range(p)
        for turn in range(m)
    ]


def _weight_streams(p: int, m: int) -> list[Move]:
    """The two weight streams of a plan whose F and B or I run on M ticks without a pause."""
    moves = []
    for tick in range(m + p - 2):
        for worker in range(p):
            target = (worker + 1) % p
            if tick + 1 <= target + m - 1:  # not past the target's last F
                moves.append(_hop(Data.WEIGHT, (tick - worker) % p, worker, p, tick, FORWARD_LANE))
    for worker in range(p):
        # The forward stream brings the chunk that opens the backward stream here once: keep it.
        moves.append(
            Move(
                kind=MoveKind.COPY,
                block=Block(data=Data.WEIGHT, chunk=(worker - 1) % p, lane=FORWARD_LANE),
                source=worker,
                target=worker,
                start=(2 * worker - 1) % p,
                arrive=(2 * worker - 1) % p + 1,
                to_lane=BACKWARD_LANE,
            )
        )
    for tick in range(p, p + m + p - 2):
        for worker in range(p):
            chunk = (worker - 1 - (tick - p)) % p
            moves.append(_hop(Data.WEIGHT, chunk, worker, p, tick, BACKWARD_LANE))
    return moves


def _gradient_stream(p: int, starts: Sequence[tuple[int, int]], *, last: int) -> list[Move]:
    """Each chunk's sum hops from its (tick, worker) in `starts` until tick `last`, then home."""
    moves = []
    for chunk, (start, first) in enumerate(starts):
        for tick in range(start + 1, last + 1):
            worker = (first + tick - 1 - start) % p
            moves.append(_hop(Data.GRADIENT, chunk, worker, p, tick, ""))
        at_end = (first + last - start) % p
        home = -chunk % p
        if at_end != home:
            moves.append(
                Move(
                    kind=MoveKind.PERMUTE,
                    block=gradient_block(chunk),
                    source=at_end,
                    target=home,
                    start=last + 1,
                    arrive=last + 2,
                )
            )
    return moves


def _waves(name: str, p: int, m: int, kinds: Sequence[TaskKind], *, every: int) -> Schedule:
    """A plan in which every worker runs one kind of task on P ticks, then the next kind on P ticks.

    A worker's next microbatch starts `every` times P ticks after the last. A chunk leaves its owner
    so that it reaches worker 0 when it is due, and follows the wave to worker P - 1; a sum follows
    the last wave from worker 0, takes along what rests with its owner as it passes, and goes back
    there.
    """
    _check(p, m)
    tasks, moves = [], []
    period = every * p
    sums_at = (len(kinds) - 1) * p
    for base in range(0, m // p * period, period):
        for worker in range(p):
            for phase, kind in enumerate(kinds):
                for turn in range(p):
                    tasks.append(
                        Task(
                            tick=base + phase * p + worker + turn,
                            device=worker,
                            kind=kind,
                            chunk=turn if kind is TaskKind.FORWARD else p - 1 - turn,
                            microbatch=base // period * p + worker,
                        )
                    )
        for chunk in range(p):
            # From its owner `chunk` hops to worker 0, then P - 1 with the wave, less the one that
            # would bring it to its owner, where it still is.
            for hop in range(chunk + p - 1):
                if hop == p - 1:
                    continue
                worker = (hop - chunk) % p
                moves.append(_hop(Data.WEIGHT, chunk, worker, p, base + hop, FORWARD_LANE))
                tick = base + 2 * p - 1 - 2 * chunk + hop
                moves.append(_hop(Data.WEIGHT, chunk, worker, p, tick, BACKWARD_LANE))
            start = base + sums_at + p - 1 - chunk
            for hop in range(p - 1 + (1 - chunk) % p):
                moves.append(_hop(Data.GRADIENT, chunk, hop % p, p, start + 1 + hop, ""))
    return _schedule(name, p, m, tasks, moves, lanes=(FORWARD_LANE, BACKWARD_LANE))


def _schedule(
    name: str,
    p: int,
    m: int,
    tasks: Sequence[Task],
    moves: Sequence[Move],
    *,
    lanes: Sequence[str] = (FORWARD_LANE,),
) -> Schedule:
    """Puts a ring's schedule together; `lanes` are those that start from the weights at rest."""
    return Schedule(
        name=name,
        devices=p,
        chunks=p,
        microbatches=m,
        placement=Placement.OWNER,
        owners=tuple(-chunk % p for chunk in range(p)),
        starts=tuple(
            (Block(data=Data.WEIGHT, chunk=chunk, lane=lane), -chunk % p)
            for lane in lanes
            for chunk in range(p)
        ),
        tasks=tuple(tasks),
        moves=tuple(moves),
        forward_lane=FORWARD_LANE,
        backward_lane=BACKWARD_LANE,
    )


def _hop(data: Data, chunk: int, worker: int, devices: int, tick: int, lane: str) -> Move:
    return Move(
        kind=MoveKind.PERMUTE,
        block=Block(data=data, chunk=chunk, lane=lane),
        source=worker,
        target=(worker + 1) % devices,
        start=tick,
        arrive=tick + 1,
    )


def _check(devices: int, microbatches: int) -> None:
    if devices < 2:
        raise UsageError(f"devices={devices}: a weight ring needs at least 2")
    check_microbatches(devices, microbatches)


def _ring(signs: Signs, *, split: bool) -> bool:
    return signs.owned and signs.weights_travel and signs.split is split


STRATEGIES = (
    Strategy(
        name="weipipe-naive",
        build=naive,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.DEPTH_FIRST),
        recognises=lambda signs: _ring(signs, split=False) and not signs.pairs,
    ),
    Strategy(
        name="weipipe-interleave",
        build=interleave,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.SIDE_BY_SIDE),
        recognises=lambda signs: _ring(signs, split=False) and bool(signs.pairs),
        offered=True,
    ),
    Strategy(
        name="weipipe-wzb1",
        build=wzb1,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.SIDE_BY_SIDE, backward=Backward.SPLIT),
        recognises=lambda signs: (
            _ring(signs, split=True) and TaskKind.INPUT_GRADIENT in signs.pairs
        ),
    ),
    Strategy(
        name="weipipe-wzb2",
        build=wzb2,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.DEPTH_FIRST, backward=Backward.SPLIT),
        recognises=lambda signs: _ring(signs, split=True) and not signs.pairs,
    ),
    Strategy(
        name="weipipe-wzb2-paired",
        build=wzb2_paired,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.DEPTH_FIRST, backward=Backward.SPLIT, delay=1),
        recognises=lambda signs: (
            _ring(signs, split=True) and signs.pairs == {TaskKind.WEIGHT_GRADIENT}
        ),
    ),
)
