"""What each clock costs while prompts wait: energy, and first tokens that come too late.

Work at hand is a row of batches: the one about to run and those the queue will be cut into. At
clock f batch k ends after the times of batches 0..k, and every prompt of it whose deadline is
before that is late. With E(f) the energy of all batches and W(f) their time,

    cost(f) = E(f) + v * (late(f) + [late(top) > 0] * a * W(f))

A prompt that even the highest clock (top) serves late counts at every clock alike and so binds
nothing by itself; but where there are such, the work is more than can be done in time, and those
who come meanwhile, at rate a, will be late too for as long as it takes.

v is what a first token in time is worth, stated in energies that one prompt takes at the lowest
clock. An SLO that a fifth of the arrivals miss whatever the clock is broken, and one more prompt in
time is worth less there: v falls from `worth` to `broken_worth` as that share goes from 0.2 to 0.4.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsys.serve.energy.gpu_model import Load

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration

BROKEN_SHARES = (0.2, 0.4)
"""Shares of arrivals lost at every clock between which their worth falls."""


def batches_at_hand(
    load: Load,
    iteration: "Iteration",
    waiting: "Collection[Request]",
    *,
    left_s: float,
    budget: int,
    most: int,
) -> tuple[list[Load], list[float], list[int]]:
    """The iteration and the queue behind it, cut as the scheduler will cut it.

    Args:
        load: of the iteration.
        left_s: time from now to the deadline of a prompt that arrives at time zero.
        budget: prompt tokens of a batch.
        most: batches of the queue told apart; the rest counts as one more.

    Returns:
        Loads; times from now by which prompts should be done; and the batch that each is part of.
    """
    loads, deadlines_s, batches = [load], [], []
    queue: list[tuple[int, float]] = []
    for piece in iteration.prefills:
        deadline_s = left_s + piece.request.timing.arrival_s
        if piece.last:
            deadlines_s.append(deadline_s)
            batches.append(0)
        else:  # the rest of a long prompt comes first of all that waits
            rest = piece.request.total_length - piece.start - piece.length
            queue.append((rest, deadline_s))
    queue += [(r.total_length, left_s + r.timing.arrival_s) for r in waiting]
    tokens = prompts = 0
    for place, (length, deadline_s) in enumerate(queue, start=1):
        tokens += length
        prompts += 1
        deadlines_s.append(deadline_s)
        batches.append(len(loads))
        if place == len(queue) or (tokens >= budget and len(loads) <= most):
            loads.append(Load(prefill_tokens=tokens, prefill_requests=prompts))
            tokens = prompts = 0
    return loads, deadlines_s, batches


def prompt_costs_j(
    times_s: np.ndarray,
    powers_w: np.ndarray,
    deadlines_s: Sequence[float],
    batches: Sequence[int],
    *,
    bound_s: float,
    clearance: np.ndarray,
    worth: float,
    broken_worth: float,
) -> tuple[np.ndarray, int]:
    """The cost of each clock in joules, and how many prompts none of them serves in time.

    Args:
        times_s: of each batch at each clock, [batch, clock], clocks ascending.
        powers_w: likewise.
        deadlines_s: times from now by which each prompt should be done.
        batches: the batch of each.
        bound_s: the TTFT planned for.
        clearance: share of the time to its deadline that a batch may take, [clock].
        worth: energies of a prompt that its first token in time is worth.
        broken_worth: what is left of that where a large share is late at every clock.
    """
    energies_j = (times_s * powers_w).sum(axis=0)
    prompts = len(deadlines_s)
    if not prompts:
        return energies_j, 0
    done_s = times_s.cumsum(axis=0)
    due_s = np.array(deadlines_s)
    ends_s = (done_s / clearance)[batches]
    late = (due_s[:, None] < ends_s).sum(axis=0, dtype=float)
    lost = int(late[-1])
    work_s = float(done_s[-1, -1])
    if lost:
        waited_s = bound_s - float(due_s.min())
        late += prompts / max(waited_s, work_s) * done_s[-1]
    # Who comes early in this work waits for its end, and then for a batch of his own.
    broken = 1 - (bound_s - float(times_s[0, -1])) / work_s
    value_j = np.interp(broken, BROKEN_SHARES, (worth, broken_worth)) * energies_j[0] / prompts
    return energies_j + value_j * late, lost
