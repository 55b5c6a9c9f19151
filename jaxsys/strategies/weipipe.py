"""WeiPipe: weights and their gradients travel round a ring, data stays where it is.

Worker r computes whole microbatches k*P + r; at tick t it holds, of the forward weight stream,
chunk (t - r) mod P, and of the backward stream, which starts at tick P with s = t - P, chunk
(r - 1 - s) mod P. Gradient sums ride with the backward stream. All three go r -> r + 1.

Where every tick lasts as long as its slowest worker, a step takes (M + P - 1) (T_F + T_B) and
M (T_F + T_B) would be ideal: a bubble of (P - 1) / (M + P - 1), as 1F1B has. Unlike a pipeline's it
is not forced by the data: weights are there before anything is computed, so a worker that need not
keep step starts at once, and the bubble is smaller.

Source: WeiPipe (Lin et al., PPoPP 2025) for the idea; the exact ticks, the mirrored start of the
backward stream and the way home of the gradients are derived here.
"""

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

from .data_parallel import check_microbatches

FORWARD_LANE = "F"
BACKWARD_LANE = "B"


def interleave(devices: int, microbatches: int) -> Schedule:
    """WeiPipe-Interleave: every steady tick runs one F and one B on every worker.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    p, m = devices, microbatches
    if p < 2:
        raise UsageError(f"devices={p}: a weight ring needs at least 2")
    check_microbatches(p, m)
    first_backward, last_backward = p, p + m + p - 2
    tasks, moves = [], []
    for worker in range(p):
        for turn in range(m):
            tick = worker + turn
            tasks.append(
                Task(
                    tick=tick,
                    device=worker,
                    kind=TaskKind.FORWARD,
                    chunk=turn % p,
                    microbatch=turn // p * p + worker,
                )
            )
            tasks.append(
                Task(
                    tick=tick + p,
                    device=worker,
                    kind=TaskKind.BACKWARD,
                    chunk=p - 1 - turn % p,
                    microbatch=turn // p * p + worker,
                )
            )
    last_forward = m + p - 2
    for tick in range(last_forward):
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
    for tick in range(first_backward, last_backward):
        for worker in range(p):
            chunk = (worker - 1 - (tick - p)) % p
            moves.append(_hop(Data.WEIGHT, chunk, worker, p, tick, BACKWARD_LANE))
    for chunk in range(p):
        # The sum starts on worker 0 at its first B of the chunk and hops until the last tick ends.
        start = first_backward + p - 1 - chunk
        for tick in range(start + 1, last_backward + 1):
            worker = (tick - 1 - start) % p
            moves.append(_hop(Data.GRADIENT, chunk, worker, p, tick, ""))
        at_end = (last_backward - start) % p
        home = -chunk % p
        if at_end != home:
            moves.append(
                Move(
                    kind=MoveKind.PERMUTE,
                    block=gradient_block(chunk),
                    source=at_end,
                    target=home,
                    start=last_backward + 1,
                    arrive=last_backward + 2,
                )
            )
    return Schedule(
        name="weipipe-interleave",
        devices=p,
        chunks=p,
        microbatches=m,
        placement=Placement.OWNER,
        owners=tuple(-chunk % p for chunk in range(p)),
        starts=tuple(
            (Block(data=Data.WEIGHT, chunk=chunk, lane=FORWARD_LANE), -chunk % p)
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
