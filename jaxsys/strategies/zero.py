"""The ZeRO family: the same tasks as data parallelism, other lifetimes for weights and gradients.

Everything rests in shards. A step differs only in when a chunk's weights are gathered and when its
gradient is reduced (k counts a device's own microbatches, K of them):

| | weights gathered | gradient reduced |
|---|---|---|
| ZeRO-1 | before F of k=0, kept for the step | once, after the last B |
| ZeRO-2 | before F of k=0, kept for the step | after every B |
| ZeRO-3 | before every F and every B | after every B |
| ZeRO-3.5 | before F of k=0 and every B; B's copy lives until the next F | after every B |
| ZeRO-4 | as ZeRO-3.5 | during the next microbatch's forward pass; the last one at once |

Weights do not change between microbatches, so keeping a copy from one microbatch's B to the next
one's F changes no value, and nothing is kept or put off across the update. With K = 1 there is no
next microbatch: 3.5 and 4 are ZeRO-3.

    gathers of a chunk: 2K (ZeRO-3), K + 1 (3.5, 4);   reductions: K

No new memory peak (ZeRO-3.5) iff for every chunk l, the kept weights above l weigh no more than the
residuals above l: sum_{i kept, i > l} W_i <= sum_{i > l} A_i + slack. See `keepable`.

Source: ZeRO (Rajbhandari et al., SC 2020) for stages 1 to 3; "ZeRO-3.5" and "ZeRO-4" are names
used in a public DeepSpeed fork; schedules and the memory condition are derived here.
"""

from collections.abc import Callable, Collection, Sequence

from jaxsys.errors import UsageError
from jaxsys.schedule import (
    ALL,
    Block,
    Data,
    Move,
    MoveKind,
    Placement,
    Schedule,
    gradient_block,
)

from .choices import Choices, Gradient, Place, State, Weights
from .data_parallel import check_microbatches, local_tasks
from .strategy import Signs, Strategy


def zero_1(devices: int, microbatches: int, *, chunks: int = 1, lookahead: int = 1) -> Schedule:
    """Sharded optimizer: weights gathered once a step, gradients summed locally, reduced once."""
    everything = range(chunks)
    return trajectory(
        devices,
        microbatches,
        chunks=chunks,
        keep_within=everything,
        keep_between=everything,
        accumulate=everything,
        lookahead=lookahead,
        name="zero-1",
    )


def zero_2(devices: int, microbatches: int, *, chunks: int = 1, lookahead: int = 1) -> Schedule:
    """Sharded optimizer and gradients: weights gathered once, gradients reduced every time."""
    everything = range(chunks)
    return trajectory(
        devices,
        microbatches,
        chunks=chunks,
        keep_within=everything,
        keep_between=everything,
        lookahead=lookahead,
        name="zero-2",
    )


def zero_3(devices: int, microbatches: int, *, chunks: int = 1, lookahead: int = 1) -> Schedule:
    """Everything sharded: weights gathered before every use and dropped after it."""
    return trajectory(devices, microbatches, chunks=chunks, lookahead=lookahead, name="zero-3")


def zero_3_5(
    devices: int,
    microbatches: int,
    *,
    chunks: int = 1,
    keep: Collection[int] | None = None,
    lookahead: int = 1,
) -> Schedule:
    """ZeRO-3 that keeps B's copy of the chunks in `keep` (all, if not given) for the next F."""
    return trajectory(
        devices,
        microbatches,
        chunks=chunks,
        keep_between=range(chunks) if keep is None else keep,
        lookahead=lookahead,
        name="zero-3.5",
    )


def zero_4(
    devices: int,
    microbatches: int,
    *,
    chunks: int = 1,
    keep: Collection[int] | None = None,
    defer: Collection[int] | None = None,
    lookahead: int = 1,
) -> Schedule:
    """ZeRO-3.5 that reduces the chunks in `defer` (all, if not given) in the next forward pass."""
    return trajectory(
        devices,
        microbatches,
        chunks=chunks,
        keep_between=range(chunks) if keep is None else keep,
        defer=range(chunks) if defer is None else defer,
        lookahead=lookahead,
        name="zero-4",
    )


def trajectory(
    devices: int,
    microbatches: int,
    *,
    chunks: int,
    keep_within: Collection[int] = (),
    keep_between: Collection[int] = (),
    defer: Collection[int] = (),
    accumulate: Collection[int] = (),
    lookahead: int = 1,
    name: str = "sharded",
) -> Schedule:
    """Any member of the family, chunk by chunk.

    Args:
        devices: P.
        microbatches: M over all devices, a multiple of P; device d computes d, d + P, ...
        chunks: C.
        keep_within: chunks whose weights stay from F to B of a microbatch.
        keep_between: chunks whose weights stay from B to the next microbatch's F.
        defer: chunks whose gradient is reduced during their own F of the next microbatch.
        accumulate: chunks whose gradient is summed locally and reduced once a step.
        lookahead: ticks a gather starts ahead of its use, and a reduction may lag behind.
        name: the schedule's name.

    Raises:
        UsageError: if P does not divide M, or a set names a chunk that is not there, or a chunk is
            both deferred and accumulated.
    """
    check_microbatches(devices, microbatches)
    if lookahead < 1:
        raise UsageError(f"lookahead={lookahead} must be at least 1 tick")
    sets = {
        "keep_within": keep_within,
        "keep_between": keep_between,
        "defer": defer,
        "accumulate": accumulate,
    }
    for which, members in sets.items():
        wrong = sorted(c for c in members if not 0 <= c < chunks)
        if wrong:
            raise UsageError(f"{which}={wrong} must name chunks 0 to {chunks - 1}")
    both = sorted(set(defer) & set(accumulate))
    if both:
        raise UsageError(f"chunks {both} cannot be both deferred and accumulated")
    turns = microbatches // devices
    moves = _gathers(chunks, turns, set(keep_within), set(keep_between), lookahead)
    moves += _reductions(chunks, turns, set(defer), set(accumulate), lookahead)
    return Schedule(
        name=name,
        devices=devices,
        chunks=chunks,
        microbatches=microbatches,
        placement=Placement.SHARDED,
        tasks=tuple(local_tasks(devices, microbatches, chunks)),
        moves=tuple(moves),
    )


def forward_tick(chunks: int, turn: int, chunk: int) -> int:
    """The tick of F of a chunk in a device's microbatch number `turn`."""
    return 2 * chunks * turn + chunk


def backward_tick(chunks: int, turn: int, chunk: int) -> int:
    """The tick of B of a chunk in a device's microbatch number `turn`."""
    return 2 * chunks * (turn + 1) - 1 - chunk


def keepable(
    weight_bytes: Sequence[float], residual_bytes: Sequence[float], *, slack_bytes: float = 0.0
) -> frozenset[int]:
    """The chunks that ZeRO-3.5 keeps without a new memory peak, as many as equal chunks allow.

    What is kept from any chunk up must fit in the residuals from there up, which the backward pass
    has freed and the next forward pass has yet to make. The lower a chunk, the more has been freed
    above it: the bottom ones are taken first. Of uniform chunks that is floor(C A / W).

    Args:
        weight_bytes: W of each chunk, gathered.
        residual_bytes: A of each chunk.
        slack_bytes: H, what the head's transient or the user leaves free at ZeRO-3's peak.

    Returns:
        Chunk numbers.
    """
    chunks = len(weight_bytes)
    kept: set[int] = set()

    def legal() -> bool:
        weights = residuals = 0.0
        for chunk in reversed(range(chunks)):
            weights += weight_bytes[chunk] if chunk in kept else 0.0
            residuals += residual_bytes[chunk]
            if weights > (residuals + slack_bytes) * (1 + 1e-12):
                return False
        return True

    for chunk in range(chunks):
        kept.add(chunk)
        if not legal():
            kept.remove(chunk)
    return frozenset(kept)


def _gathers(
    chunks: int, turns: int, keep_within: set[int], keep_between: set[int], lookahead: int
) -> list[Move]:
    moves = []

    def gather(chunk: int, use: int) -> None:
        start = max(0, use - lookahead)
        moves.append(
            Move(
                kind=MoveKind.ALL_GATHER,
                block=Block(data=Data.WEIGHT, chunk=chunk),
                source=ALL,
                target=ALL,
                start=start,
                # The very first has nothing to hide behind.
                arrive=max(use, start),
            )
        )

    for turn in range(turns):
        for chunk in range(chunks):
            if turn == 0 or chunk not in keep_between:
                gather(chunk, forward_tick(chunks, turn, chunk))
        for chunk in reversed(range(chunks)):
            if chunk not in keep_within:
                gather(chunk, backward_tick(chunks, turn, chunk))
    return moves


def _reductions(
    chunks: int, turns: int, defer: set[int], accumulate: set[int], lookahead: int
) -> list[Move]:
    moves = []
    for turn in range(turns):
        last = turn == turns - 1
        for chunk in range(chunks):
            if chunk in accumulate and not last:
                continue
            if chunk in defer and not last:
                # Under the chunk's own next F: gone before that F's residual needs the room, and
                # before the next B adds to it.
                start = forward_tick(chunks, turn + 1, chunk)
            else:
                start = backward_tick(chunks, turn, chunk) + 1
            moves.append(
                Move(
                    kind=MoveKind.REDUCE_SCATTER,
                    block=gradient_block(chunk),
                    source=ALL,
                    target=ALL,
                    start=start,
                    arrive=start + lookahead,
                )
            )
    return sorted(moves, key=lambda move: move.start)


class Trajectories:
    """The whole family: every layer may go its own way, and the boldest of them gives the name."""

    def covers(self, choices: Choices) -> bool:
        """Whether state rests in shards."""
        return choices.axis == "shard" and choices.state is State.SPLIT

    def called(self, choices: Choices) -> str:
        """By the boldest thing that any layer does."""
        return boldest(choices.weights, choices.gradients)

    def recognised(self, signs: Signs) -> str | None:
        """Likewise."""
        if signs.schedule.placement is not Placement.SHARDED:
            return None
        return boldest(signs.weights, signs.gradients)


def boldest(weights: Collection[Weights], gradients: Collection[Gradient]) -> str:
    """The name of what layers do together, by the boldest thing that any of them does."""
    if Weights.BETWEEN in weights or Weights.REFETCH in weights:
        if Gradient.DEFERRED in gradients:
            return "zero-4"
        return "zero-3.5" if Weights.BETWEEN in weights else "zero-3"
    if Weights.WITHIN in weights:
        return "zero-3-within"
    if Gradient.DEFERRED in gradients:
        return "zero-2-deferred"
    return "zero-2" if Gradient.EACH in gradients else "zero-1"


def _strategy(
    name: str,
    build: Callable[..., Schedule],
    weights: Weights,
    gradient: Gradient,
    *,
    offered: bool = False,
) -> Strategy:
    def recognises(signs: Signs) -> bool:
        sharded = signs.schedule.placement is Placement.SHARDED
        return sharded and boldest(signs.weights, signs.gradients) == name

    return Strategy(
        name=name,
        build=build,
        placement=Placement.SHARDED,
        place=Place(axis="shard", state=State.SPLIT, weights=weights, gradient=gradient),
        recognises=recognises,
        even_microbatches=True,
        layers_are_chunks=True,
        offered=offered,
    )


STRATEGIES = (
    _strategy("zero-1", zero_1, Weights.STAY, Gradient.ONCE),
    _strategy("zero-2", zero_2, Weights.STAY, Gradient.EACH),
    _strategy("zero-3", zero_3, Weights.REFETCH, Gradient.EACH, offered=True),
    _strategy("zero-3.5", zero_3_5, Weights.BETWEEN, Gradient.EACH),
    _strategy("zero-4", zero_4, Weights.BETWEEN, Gradient.DEFERRED),
)
