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

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import Queue

BROKEN_SHARES = (0.2, 0.4)
"""Shares of arrivals lost at every clock between which their worth falls."""


MOST_CYCLES = 24
"""Batches followed when arrivals are played on."""


class ToCome(NamedTuple):
    """Prompts that are expected, and what serving them takes: n at once t[0] + (n - 1) * t[1]."""

    per_s: float
    horizon_s: float
    one_s: Sequence[float]
    """Of a lone prompt, at each clock."""
    more_s: Sequence[float]
    """Of each further one in the same batch."""
    power_w: Sequence[float]

    def played_on(self, level: int, backlog_s: float, bound_s: float) -> tuple[float, float]:
        """Joules, and first tokens later than `bound_s`, of what comes within the horizon.

        Who comes while a batch runs is the next one: its prompts arrive evenly over that time and
        wait for its rest and their own.
        """
        one_s, more_s, power_w = self.one_s[level], self.more_s[level], self.power_w[level]
        now_s = running_s = backlog_s
        busy_s = late = 0.0
        for _ in range(MOST_CYCLES):
            if now_s >= self.horizon_s:
                break
            count = self.per_s * running_s
            if count < 1.0:  # idle until the next one comes
                busy_s += one_s
                late += one_s > bound_s
                now_s += max(one_s, 1.0 / self.per_s)
                running_s = one_s
                continue
            next_s = one_s + (count - 1.0) * more_s
            late += count * min(max((running_s + next_s - bound_s) / running_s, 0.0), 1.0)
            busy_s += next_s
            now_s += next_s
            running_s = next_s
        # Cycles do not end with the horizon: counted in proportion.
        played_s = now_s - backlog_s
        share = max(0.0, self.horizon_s - backlog_s) / played_s if played_s else 0.0
        return busy_s * power_w * share, late * share


def batches_at_hand(
    load: Load,
    queue: Queue,
    *,
    left_s: float,
    budget: int,
    most: int,
) -> tuple[list[Load], list[list[float]]]:
    """The iteration and the queue behind it, cut as the scheduler will cut it.

    Args:
        load: of the iteration.
        queue: prompts in it and behind it.
        left_s: time from now to the deadline of a prompt that arrives at time zero.
        budget: prompt tokens of a batch.
        most: batches of the queue told apart; the rest counts as one more.

    Returns:
        Loads, and for each the times from now by which the prompts that end with it should be done.
    """
    loads, deadlines_s = [load], [[]]
    lengths: list[int] = []
    dues_s: list[float] = []
    for piece in queue.pieces:
        due_s = left_s + piece.request.timing.arrival_s
        if piece.last:
            deadlines_s[0].append(due_s)
        else:  # the rest of a long prompt comes first of all that waits
            lengths.append(piece.request.total_length - piece.start - piece.length)
            dues_s.append(due_s)
    for request in queue.waiting:
        lengths.append(request.prompt_length + request.generated)
        dues_s.append(left_s + request.timing.arrival_s)
    first = tokens = 0
    for place, length in enumerate(lengths, start=1):
        tokens += length
        if place == len(lengths) or (tokens >= budget and len(loads) <= most):
            loads.append(Load(prefill_tokens=tokens, prefill_requests=place - first))
            deadlines_s.append(dues_s[first:place])
            first, tokens = place, 0
    return loads, deadlines_s


def prompt_costs_j(
    times_s: Sequence[Sequence[float]],
    powers_w: Sequence[Sequence[float]],
    deadlines_s: Sequence[list[float]],
    *,
    bound_s: float,
    clearance: Sequence[float],
    worth: float,
    broken_worth: float,
    to_come: ToCome | None = None,
) -> tuple[list[float], int]:
    """The cost of each clock in joules, and how many prompts none of them serves in time.

    Args:
        times_s: of each batch at each clock, [batch][clock], clocks ascending.
        powers_w: likewise.
        deadlines_s: of each batch, times from now by which its prompts should be done.
        bound_s: the TTFT planned for.
        clearance: share of the time to its deadline that a batch may take, [clock].
        worth: energies of a prompt that its first token in time is worth.
        broken_worth: what is left of that where a large share is late at every clock.
        to_come: what is expected to arrive meanwhile.
    """
    levels = range(len(clearance))
    energies_j, done_s, late = [0.0] * len(levels), [0.0] * len(levels), [0.0] * len(levels)
    for batch_s, batch_w, dues_s in zip(times_s, powers_w, deadlines_s, strict=True):
        dues_s = sorted(dues_s)
        for f in levels:
            energies_j[f] += batch_s[f] * batch_w[f]
            done_s[f] += batch_s[f]
            late[f] += bisect.bisect_left(dues_s, done_s[f] / clearance[f])
    prompts = sum(map(len, deadlines_s))
    if not prompts:
        return energies_j, 0
    lost, work_s = int(late[-1]), done_s[-1]
    if lost:
        waited_s = bound_s - min(map(min, filter(None, deadlines_s)))
        rate = prompts / max(waited_s, work_s)
        late = [count + rate * each_s for count, each_s in zip(late, done_s, strict=True)]
    if to_come is not None:
        prompts += to_come.per_s * to_come.horizon_s
        for f in levels:
            energy_j, late_more = to_come.played_on(f, done_s[f], bound_s * clearance[f])
            energies_j[f] += energy_j
            late[f] += late_more
    # Who comes early in this work waits for its end, and then for a batch of his own.
    broken = 1 - (bound_s - times_s[0][-1]) / work_s
    low, high = BROKEN_SHARES
    share = min(max((broken - low) / (high - low), 0.0), 1.0)
    value_j = (worth + share * (broken_worth - worth)) * energies_j[0] / prompts
    costs_j = [energy_j + value_j * n for energy_j, n in zip(energies_j, late, strict=True)]
    return costs_j, lost
