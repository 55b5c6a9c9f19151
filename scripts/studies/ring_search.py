"""Exhaustive search for the shortest step of any weight-ring plan, to judge WZB1 and WZB2 by.

The space holds every plan of this form, for P workers, P chunks and M microbatches in all:

- Two weight lanes, F and B, each hold every chunk once, one on each worker. Worker r has chunk
  (f - r) mod P of the one and (r - b) mod P of the other, where f and b may be chosen anew for
  every tick: lanes turn as far as they like between two ticks, at no cost.
- In a tick a worker runs at most one F, one I and one W. It runs the F of its M / P microbatches
  one after another, each from the first chunk to the last, and the I likewise, each from the last
  chunk to the first; so its next F and its next I are known. It may run them if the lane has
  brought their chunk and what they read was made in an earlier tick. W may be any whose I ran in an
  earlier tick: sums of gradients get where they must by themselves.
- On no worker do residuals and taps together exceed `held` between two ticks, which is what
  `peak_live` counts: a tick may fill by F the room that it makes by W.
- A tick costs either what its busiest worker runs ("busiest": devices that run what they like), or
  the sum of the kinds of tasks that any worker runs ("together": devices that run the same program,
  where a kind takes its time on all of them). A step costs the sum of its ticks.

Real plans have less freedom, so no plan of this form can be shorter than what is found here; a
plan that is as short and passes the checker is optimal.
"""

import heapq
import itertools
from collections.abc import Iterator
from typing import Literal

from jaxsys.errors import UsageError
from jaxsys.schedule import Schedule, TaskKind
from jaxsys.strategies.data_parallel import check_microbatches

Counts = tuple[int, int, int]
"""How many F, I and W a worker has done."""
State = tuple[Counts, ...]
TickCost = Literal["busiest", "together"]
NOTHING: Counts = (0, 0, 0)


def shortest_step(
    devices: int,
    microbatches: int,
    *,
    held: int,
    times: tuple[int, int, int] = (1, 1, 1),
    tick_cost: TickCost = "busiest",
) -> int | None:
    """The least cost of a step over all plans of the space described above, by A*.

    Args:
        devices: P; 2 and 3 take seconds.
        microbatches: M, a multiple of P.
        held: the most residuals and taps on a worker.
        times: of F, I and W, positive integers.
        tick_cost: how the cost of a tick is counted.

    Returns:
        The cost, or None where no plan fits in `held`.

    Raises:
        UsageError: if a size is not legal.
    """
    check_microbatches(devices, microbatches)
    if min(times) < 1:
        raise UsageError(f"times={times} must be positive")
    p, m = devices, microbatches

    def left(state: State) -> int:
        """What the worker that is most behind has still to run."""
        return max(sum((m - n) * t for n, t in zip(c, times, strict=True)) for c in state)

    step = _together if tick_cost == "together" else _busiest
    start: State = (NOTHING,) * p
    known: dict[State, int] = {start: 0}
    queue: list[tuple[int, int, State]] = [(left(start), 0, start)]
    while queue:
        _, cost, state = heapq.heappop(queue)
        if cost > known[state]:
            continue
        if all(counts == (m, m, m) for counts in state):
            return cost
        for added, following in step(state, p, m, held, times):
            total = cost + added
            if total < known.get(following, total + 1):
                known[following] = total
                heapq.heappush(queue, (total + left(following), total, following))
    return None


def plan_cost(
    schedule: Schedule, *, times: tuple[int, int, int] = (1, 1, 1), tick_cost: TickCost = "busiest"
) -> int:
    """The cost of a schedule's step, counted as `shortest_step` counts; B costs I and W."""
    forward, inputs, weights = times
    by_kind = {
        TaskKind.FORWARD: forward,
        TaskKind.BACKWARD: inputs + weights,
        TaskKind.INPUT_GRADIENT: inputs,
        TaskKind.WEIGHT_GRADIENT: weights,
    }
    total = 0
    for tasks in schedule.tasks_by_tick:
        if tick_cost == "together":
            total += sum(by_kind[kind] for kind in {task.kind for task in tasks})
        else:
            each = [0] * schedule.devices
            for task in tasks:
                each[task.device] += by_kind[task.kind]
            total += max(each)
    return total


def _ready(counts: Counts, worker: int, f: int, b: int, p: int, m: int) -> Counts:
    """Which of F, I and W a worker can run with the lanes turned to f and b, as ones and zeros."""
    forwards, inputs, weights = counts
    return (
        int(forwards < m and forwards % p == (f - worker) % p),
        int(
            inputs < m
            and p - 1 - inputs % p == (worker - b) % p
            and forwards >= (inputs // p + 1) * p
        ),
        int(weights < inputs),
    )


def _within(counts: Counts, done: Counts, held: int) -> bool:
    return not done[0] or counts[0] + 1 - counts[2] - done[2] <= held


def _together(
    state: State, p: int, m: int, held: int, times: tuple[int, int, int]
) -> Iterator[tuple[int, State]]:
    # Whoever can run a kind that is paid for does: a plan that ran it later still works, with its
    # later turn left empty.
    for f, b in itertools.product(range(p), repeat=2):
        ready = [_ready(counts, r, f, b, p, m) for r, counts in enumerate(state)]
        some = [max(column) for column in zip(*ready, strict=True)]
        for kinds in itertools.product(*((0, 1) if any_ready else (0,) for any_ready in some)):
            following = []
            for counts, (forward, one_input, weight) in zip(state, ready, strict=True):
                done = forward * kinds[0], one_input * kinds[1], weight * kinds[2]
                if not _within(counts, done, held):
                    done = 0, done[1], done[2]
                following.append(_add(counts, done))
            if any(kinds):
                yield sum(k * t for k, t in zip(kinds, times, strict=True)), tuple(following)


def _busiest(
    state: State, p: int, m: int, held: int, times: tuple[int, int, int]
) -> Iterator[tuple[int, State]]:
    sums = sorted({sum(c) for n in (1, 2, 3) for c in itertools.combinations(times, n)})
    for f, b in itertools.product(range(p), repeat=2):
        ready = [_ready(counts, r, f, b, p, m) for r, counts in enumerate(state)]
        if not any(map(any, ready)):
            continue
        for cost in sums:
            choices = [
                _fullest(counts, mine, cost, times, held)
                for counts, mine in zip(state, ready, strict=True)
            ]
            for chosen in itertools.product(*choices):
                yield (
                    cost,
                    tuple(_add(c, done) for c, done in zip(state, chosen, strict=True)),
                )


def _fullest(
    counts: Counts, ready: Counts, cost: int, times: tuple[int, int, int], held: int
) -> list[Counts]:
    """The sets of ready tasks that fit into a cost and to which none can be added."""
    fitting: list[Counts] = [
        (forward, one_input, weight)
        for forward in range(ready[0] + 1)
        for one_input in range(ready[1] + 1)
        for weight in range(ready[2] + 1)
        if forward * times[0] + one_input * times[1] + weight * times[2] <= cost
        and _within(counts, (forward, one_input, weight), held)
    ]
    return [
        one
        for one in fitting
        if not any(
            other != one and all(a >= b for a, b in zip(other, one, strict=True))
            for other in fitting
        )
    ]


def _add(counts: Counts, done: Counts) -> Counts:
    return counts[0] + done[0], counts[1] + done[1], counts[2] + done[2]
