"""Rings that keep: how long a copy lives on a worker is data, from WeiPipe to data parallelism.

A weight ring sends every chunk on at once and gets it back a turn later, P times for each
microbatch of a worker. `keep` has `weipipe.interleave`'s tasks, tick for tick, and leaves out the
hops that bring what is there already:

* of weights, a worker keeps the chunks that come to it in k of the P ticks of a turn: it holds them
  from its first turn to its last, and they are not sent to it again. All workers keep in the same
  ticks, so that in each the ring turns for everyone or stands still for everyone;
* of gradients, a sum that would be sent on in such a tick stays where it is and grows, turn after
  turn; in its worker's last turn it is passed on once, and takes up what rests on the others. At
  home it stays: the rest comes there, and after the last turn nobody waits for a second hop.

With A = M / P microbatches a worker and everything kept, a worker sends P - 1 chunks of weights and
as many of gradients a step, however large A is, where Interleave sends about 3 A P: it is data
parallelism whose collectives are taken apart into hops that travel under compute. A chunk of
weights that is kept takes room on every worker, twice (for F and for B) unless all are kept.

Source: the lifetimes are those that ZeRO-3.5 gives to gathered copies, given here to a ring's.
"""

from dataclasses import replace

from jaxsys.errors import UsageError
from jaxsys.schedule import Data, Move, MoveKind, Placement, Schedule, gradient_block

from .choices import Order, Place
from .strategy import Strategy
from .weipipe import BACKWARD_LANE, FORWARD_LANE, interleave


def keep(
    devices: int, microbatches: int, weights: int | None = None, gradients: int | None = None
) -> Schedule:
    """WeiPipe-Interleave whose workers keep some or all of what passes them.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.
        weights: of how many of the P chunks a worker keeps its copy; all, if not given.
        gradients: likewise of the sums of their gradients.

    Raises:
        UsageError: if P or M is not legal, or more is to be kept than there is.
    """
    p, m = devices, microbatches
    ring = interleave(p, m)
    kept = {"weights": weights, "gradients": gradients}
    for name, count in kept.items():
        if count is not None and not 0 <= count <= p:
            raise UsageError(f"{name}={count} are not of a ring of {p} chunks; keep 0 to {p}")
    own, sums = (p if count is None else count for count in kept.values())
    if own == sums == 0:
        return ring
    there = [
        move
        for move in ring.moves
        if move.block.data is Data.WEIGHT and not _is_there(move, p, own)
    ]
    return replace(
        ring,
        name=called(p, own, sums),
        moves=(*there, *_sums(p, m, sums)),
        # Where every chunk stays, B reads what F has read.
        backward_lane=FORWARD_LANE if own == p else BACKWARD_LANE,
    )


def called(devices: int, weights: int, gradients: int) -> str:
    """The name of a ring that keeps so many chunks' weights and gradients."""
    if weights == gradients == devices:
        return "weipipe-keep"
    return "weipipe-keep-weights" if (weights, gradients) == (devices, 0) else "weipipe-keep-some"


def keep_weights(devices: int, microbatches: int) -> Schedule:
    """`keep` of all weights and no gradients: of three streams one is left.

    With two devices weights take no more room than where they are sent on.

    Args:
        devices: P, at least 2; also the number of chunks.
        microbatches: M over the whole ring, a multiple of P.

    Raises:
        UsageError: if P or M is not legal.
    """
    return keep(devices, microbatches, gradients=0)


def _is_there(move: Move, p: int, kept: int) -> bool:
    """Whether a weight's move brings what its target keeps.

    Everyone's own chunk comes round in the last tick of a turn of the forward stream: of what is
    kept it comes first.
    """
    backward = BACKWARD_LANE in (move.block.lane, move.to_lane)
    if backward and kept == p:
        return True
    arrives = move.start + 1 - (p if backward else 0)
    return move.kind is MoveKind.PERMUTE and arrives >= p and p - 1 - arrives % p < kept


def _sums(p: int, m: int, kept: int) -> list[Move]:
    """Where each sum goes after each of a worker's backward passes: nowhere, on, or home."""
    moves = []
    for worker in range(p):
        for turn in range(m):
            tick, chunk = worker + p + turn + 1, (-1 - turn) % p
            last, home = turn >= m - p, -chunk % p
            if not last and tick % p < kept:
                continue
            target = (worker + 1) % p
            if last and worker == p - 1:
                target = home  # the others have added their parts
            if target != worker and not (last and worker == home):
                # What ends where it is added up waits, to travel beside the very last hop.
                ends = last and target == home == p - 1 and kept == p
                start = m + 2 * p - 1 if ends else tick
                moves.append(
                    Move(
                        kind=MoveKind.PERMUTE,
                        block=gradient_block(chunk),
                        source=worker,
                        target=target,
                        start=start,
                        arrive=start + 1,
                    )
                )
    return moves


STRATEGIES = (
    Strategy(
        name="weipipe-keep",
        build=keep,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.KEPT),
    ),
    Strategy(
        name="weipipe-keep-weights",
        build=keep_weights,
        placement=Placement.OWNER,
        even_microbatches=True,
        place=Place(axis="ring", order=Order.KEPT_WEIGHTS),
    ),
)
