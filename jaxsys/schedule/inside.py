"""What travels inside a task whose sequences several devices share, as data.

A schedule says where blocks are from tick to tick. Where `context` devices compute each of its
tasks together, on pieces of the same sequences, more is sent within the task: keys and values, or
heads for tokens. `attention_transfers` is that part of the language: the transfers of one pass
through one attention, in the order in which they are sent, each with the piece of work that it
waits for and the one that waits for it.

    work 0              a group's own pieces: its queries on its own keys
    work s, 0 < s < R   a visit: its queries on the keys of the group s places before it

`timed` gives them a clock. `jaxsys.context.attention` runs the same, and a test counts both.

Legend: P devices share a sequence, U of them exchange heads, R = P / U groups form a ring.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from jaxsys.axes import WAYS, DividedAround, why_not_joined
from jaxsys.errors import did_you_mean


class Carried(StrEnum):
    """What a transfer inside a task brings."""

    KEYS = "keys and values"
    """Of a group's pieces, in the dtype of compute."""
    KEY_GRADIENTS = "gradients of keys and values"
    """Sums of what visits found, float32."""
    HEADS = "heads for tokens"
    """Queries, keys and values, or their gradients: each device gives heads and gets tokens."""
    TOKENS = "tokens for heads"
    """Attention's output, or its gradient, on the way back."""
    PIECES = "pieces of activations"
    """Of devices that share features: each one's tokens, or sums that its products add to."""


class Collective(StrEnum):
    """How it is sent."""

    HOP = "hop"
    """To the next group of the ring, a permute."""
    GATHER = "gather"
    SUM = "sum"
    """A reduce-scatter."""
    EXCHANGE = "exchange"
    """An all-to-all among the devices that exchange heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One transfer of a pass through attention; they leave one after another."""

    collective: Collective
    carries: Carried
    after: int
    """The work whose result it carries; -1: it may leave at once."""
    before: int
    """The first work that waits for it; as many as there is work: the pass ends with it."""

    def __str__(self) -> str:
        return f"{self.collective} of {self.carries}"


def exchanging(by: str, parts: int, exchange: int | None) -> int:
    """U: all of them in `ulysses`, as many as are said in `mixed`, else one."""
    return {"ulysses": parts, "mixed": exchange or 1}.get(by, 1)


def why_not_shared(by: str, parts: int, exchange: int | None) -> str | None:
    """Why so many devices cannot share sequences so; None if they can."""
    if parts < 1:
        return f"context={parts} must be at least 1"
    if by not in WAYS:
        return (
            f"context_by={by!r} is not known{did_you_mean(by, WAYS)}; use one of {', '.join(WAYS)}"
        )
    if by != "mixed":
        if exchange is None:
            return None
        return f"context_exchange={exchange} is of context_by='mixed'; leave it out with {by!r}"
    legal = [u for u in range(2, parts) if parts % u == 0]
    if exchange in legal:
        return None
    say = f"use {' or '.join(map(str, legal))}" if legal else "use ring or ulysses"
    return (
        f"context_by='mixed' of context={parts} devices exchanges heads among "
        f"context_exchange={exchange}, which must divide {parts} and leave a ring; {say}"
    )


def why_not_divided(parts: DividedAround) -> str | None:
    """Likewise of a plan or schedule that says how its devices do, and how they join features."""
    joined = why_not_joined(parts)
    if joined is not None:
        return joined
    return why_not_shared(parts.context_by, parts.context, parts.context_exchange)


def attention_transfers(
    by: str, parts: int, exchange: int | None = None, *, backward: bool
) -> tuple[Transfer, ...]:
    """The transfers of one pass through one attention, in the order in which they leave.

    Args:
        by: what travels, one of `WAYS`.
        parts: P.
        exchange: U, of `mixed`.
        backward: of the backward pass, what is computed again left aside.
    """
    if parts == 1:
        return ()
    groups = end = parts // exchanging(by, parts, exchange)
    exchanges = groups < parts
    found: list[Transfer] = []

    def send(collective: Collective, carries: Carried, after: int, before: int) -> None:
        found.append(Transfer(collective=collective, carries=carries, after=after, before=before))

    if exchanges:
        first = Carried.TOKENS if backward else Carried.HEADS
        send(Collective.EXCHANGE, first, -1, 0)
    if by == "gather":
        send(Collective.GATHER, Carried.KEYS, -1, 1)
        if backward:
            send(Collective.SUM, Carried.KEY_GRADIENTS, end - 1, end)
    else:
        # A piece is sent on as soon as it is there; gradients go on with what a visit added.
        for step in range(1, groups):
            send(Collective.HOP, Carried.KEYS, -1, step)
            if backward and step > 1:
                send(Collective.HOP, Carried.KEY_GRADIENTS, step - 1, step + 1)
        if backward and groups > 1:
            send(Collective.HOP, Carried.KEY_GRADIENTS, groups - 1, end)
    if exchanges:
        last = Carried.HEADS if backward else Carried.TOKENS
        send(Collective.EXCHANGE, last, end - 1, end)
    return tuple(found)


def joining_transfers(ways: int, *, summed: bool) -> tuple[Transfer, ...]:
    """The transfers of one join of devices that share features, where pieces go round a ring.

    Its work is P products of a piece each. A piece that comes is what the next product reads; a sum
    leaves when a product has been added to it, and comes while the next one is made.

    Args:
        ways: P.
        summed: a sum after products; else a gather before them.
    """
    return tuple(
        Transfer(
            collective=Collective.HOP,
            carries=Carried.PIECES,
            after=step - 1 if summed else -1,
            before=step + 1 if summed else step,
        )
        for step in range(1, ways)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """A transfer inside a task, with its times counted from the task's begin."""

    name: str
    start_s: float
    end_s: float
    sent_bytes: float


def timed(
    transfers: Sequence[Transfer],
    sizes: Mapping[Transfer, tuple[float, float]],
    work_s: Sequence[float],
    *,
    contention: float = 0.0,
) -> tuple[float, tuple[Inside, ...]]:
    """Seconds of a pass through attention, and when its transfers are under way.

    One stream computes, one sends, each in its order; work waits for what it needs. Work beside a
    transfer takes `contention` longer, as in `simulate`.

    Args:
        transfers: see `attention_transfers`.
        sizes: transfer -> (seconds, bytes that a device sends).
        work_s: seconds of each work, R of them, alone.
        contention: by what share work takes longer while a transfer is under way.
    """
    waiting = list(transfers)
    done_s = {-1: 0.0}
    free_s = now_s = 0.0
    arrived: list[tuple[Transfer, float, float]] = []

    def leave() -> None:
        """Lets all go that have what they carry, in their order."""
        nonlocal free_s
        while waiting and waiting[0].after in done_s:
            transfer = waiting.pop(0)
            begin = max(free_s, done_s[transfer.after])
            free_s = begin + sizes[transfer][0]
            arrived.append((transfer, begin, free_s))

    for number, alone_s in enumerate([*work_s, 0.0]):
        leave()
        needs = [end for transfer, _, end in arrived if transfer.before <= number]
        now_s = max([now_s, *needs])
        if number < len(work_s):
            now_s = _beside(now_s, alone_s, arrived, contention)
            done_s[number] = now_s
    named = tuple(
        Inside(name=str(transfer), start_s=begin, end_s=end, sent_bytes=sizes[transfer][1])
        for transfer, begin, end in arrived
    )
    return now_s, named


def _beside(
    now_s: float,
    work_s: float,
    sent: Sequence[tuple[Transfer, float, float]],
    contention: float,
) -> float:
    """When work that begins now is done, beside transfers that leave one after another."""
    left = work_s
    for _, begin, end in sent:
        if end <= now_s or not contention:
            continue
        alone = max(0.0, begin - now_s)
        if left <= alone:
            break
        now_s, left = now_s + alone, left - alone
        done = (end - now_s) / (1.0 + contention)
        if left <= done:
            return now_s + left * (1.0 + contention)
        now_s, left = end, left - done
    return now_s + left
