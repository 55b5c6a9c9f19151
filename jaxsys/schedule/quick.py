"""The totals of a step, for many costs and any number of microbatches: `simulate`'s recursion.

A planner asks for the same schedule with other times, sizes and links again and again, and for
four numbers of each. So tasks and moves become rows of numbers, and nothing of a timeline is kept:
where devices wait for transfers at the head of the tick in which these must have landed, what a
task reads is there whenever its device has come to it. The numbers are those of `simulate`, to the
last bit for times; a test holds them equal.

A pipeline or ring fills, does the same again and again, and drains. So of many microbatches only as
many need a schedule as it takes to see the middle twice; its ticks are then run over and over. The
recursion is of sums and maxima, which a constant added to every time leaves as it is: once all
times are, at the end of a turn through the middle, what they were some turns before and a constant
later, all further turns are known. What is multiplied is what following task by task gives, but for
rounding.

Of schedules whose chunks rest on owners: group collectives are for `simulate`.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .schedule import Data, MoveKind, Placement, Schedule, Task, TaskKind
from .simulate import Costs, Link, done_s
from .trace import Trace

KINDS = tuple(TaskKind)
DATA = tuple(Data)
LOOKED_BACK = 8
"""Turns of the middle after which times may be as they were."""
TOLERANCE = 1e-11
"""By what share of the time between two states they may differ that are called the same."""
FEWEST_TURNS, MOST_TASKS = 24, 60_000
"""Turns of the middle that are followed before its time is taken to stay what it is, or as many as
have so many tasks: where two devices are slow by nearly as much, times settle late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A step: seconds, and of the device that has most the seconds computed and the bytes sent."""

    step_s: float
    busy_s: float
    sent_bytes: float
    inside_bytes: float
    """To other members of its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    """The ticks that are repeated where there are more microbatches."""

    first: int
    """The first of them."""
    ticks: int
    microbatches: int
    """That one turn through them adds."""


class QuickSchedule:
    """A schedule ready to be simulated with many costs."""

    def __init__(self, schedule: Schedule, *, period: int = 0) -> None:
        """Compiles it.

        Args:
            schedule: legal, its chunks on owners.
            period: microbatches that may be added; 0: none.

        Raises:
            ValueError: if its chunks do not rest on owners.
        """
        if schedule.placement is not Placement.OWNER:
            raise ValueError(f"{schedule.name} rests {schedule.placement}: use simulate")
        self.devices, self.chunks = schedule.devices, schedule.chunks
        self.microbatches = schedule.microbatches
        data = {one: index for index, one in enumerate(DATA)}
        kinds = {one: index for index, one in enumerate(KINDS)}
        once: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Tasks and moves, most of which come many times."""

        def kept(*values: int) -> tuple[int, ...]:
            return once.setdefault(values, values)

        self.moves = [
            [
                kept(data[m.block.data], m.block.chunk, m.source, m.target, m.arrive - m.start)
                for m in row
                if m.kind is not MoveKind.COPY  # it is there at once
            ]
            for row in schedule.moves_by_start
        ]
        self.tasks = [
            [kept(t.device, kinds[t.kind], t.chunk) for t in row] for row in schedule.tasks_by_tick
        ]
        self.middle = self._middle(period) if period else None

    def _middle(self, period: int) -> Middle | None:
        """The first ticks that come twice, one time after the other, and add so many microbatches.

        Only that is looked at which times depend on: which microbatch it is makes no difference.
        """
        rows = list(zip(self.moves, self.tasks, strict=True))
        wanted = dict.fromkeys(
            ((kind, chunk) for tasks in self.tasks for _, kind, chunk in tasks), period
        )
        for ticks in range(1, len(rows) // 2 + 1):
            run = 0
            for tick in range(len(rows) - ticks):
                run = run + 1 if rows[tick] == rows[tick + ticks] else 0
                if run < ticks:
                    continue
                first = tick + 1 - ticks
                turn = self.tasks[first : first + ticks]
                if Counter((kind, chunk) for tasks in turn for _, kind, chunk in tasks) == wanted:
                    return Middle(first=first, ticks=ticks, microbatches=period)
        return None

    def run(self, costs: Costs, link: Link, *, microbatches: int | None = None) -> Totals:
        """Simulates it with these costs; see `simulate`.

        Args:
            costs: of its tasks and blocks.
            link: between neighbours.
            microbatches: its own and a multiple of its middle's more; its own, if not given.

        Raises:
            ValueError: if they are none such.
        """
        more = 0 if microbatches is None else microbatches - self.microbatches
        run = _Run(self, costs, link)
        if more == 0:
            run.advance(0, len(self.tasks))
            return run.finish()
        middle = self.middle
        if middle is None or more < 0 or more % middle.microbatches:
            raise ValueError(f"{microbatches} microbatches are not {self.microbatches} and turns")
        first, last = middle.first, middle.first + middle.ticks
        run.advance(0, first)
        run.repeat(first, last, more // middle.microbatches)
        run.advance(first, len(self.tasks))
        return run.finish()


class _Run:
    """A simulation, as far as it has come."""

    def __init__(self, quick: QuickSchedule, costs: Costs, link: Link) -> None:
        p = quick.devices
        self.quick, self.costs, self.link = quick, costs, link
        self.work_s = work_seconds(costs, quick.chunks)
        self.around = around_s(costs, quick.chunks)
        self.size = sizes_of(costs, quick.chunks, sent=True)
        self.transfer_s = [[link.transfer_s(one) for one in row] for row in self.size]
        self.head = [costs.before_s] * p
        self.send_free, self.receive_free = [0.0] * p, [0.0] * p
        self.busy, self.sent, self.inside = [0.0] * p, [0.0] * p, [0.0] * p
        self.beside: list[deque[tuple[float, float, float]]] = [deque() for _ in range(p)]
        self.landing: dict[int, list[tuple[int, int, float]]] = {}

    def advance(self, first: int, last: int) -> None:
        """Runs the ticks from `first` to before `last`."""
        head, send_free, receive_free = self.head, self.send_free, self.receive_free
        busy, sent, beside, landing = self.busy, self.sent, self.beside, self.landing
        work_s, around, size, transfer_s = self.work_s, self.around, self.size, self.transfer_s
        link = self.link
        slowed = bool(link.contention or link.waiting_contention)
        after_s = inside_bytes = 0.0
        for tick in range(first, last):
            for source, target, end in landing.pop(tick, ()):
                head[source] = max(head[source], end)
                head[target] = max(head[target], end)
            for data, chunk, source, target, ticks in self.quick.moves[tick]:
                begin = max(head[source], head[target], send_free[source], receive_free[target])
                end = begin + transfer_s[data][chunk]
                if slowed:
                    opened = max(head[source], send_free[source])
                    beside[source].append((opened, begin, link.waiting_contention))
                    beside[source].append((begin, end, link.contention))
                send_free[source] = receive_free[target] = end
                sent[source] += size[data][chunk]
                if ticks:
                    landing.setdefault(tick + ticks, []).append((source, target, end))
                else:
                    head[source] = max(head[source], end)
                    head[target] = max(head[target], end)
            for device, kind, chunk in self.quick.tasks[tick]:
                begin, duration = head[device], work_s[kind][chunk]
                if around is not None:
                    before_s, after_s, inside_bytes = around[kind][chunk]
                    begin += before_s
                end = begin + duration
                if slowed:
                    end = done_s(beside[device], begin, duration)
                if around is not None:
                    end += after_s
                    self.inside[device] += inside_bytes
                head[device] = end
                busy[device] += duration

    def repeat(self, first: int, last: int, turns: int) -> None:
        """Runs the ticks from `first` to before `last` so often, and then stands at `first`."""
        a_turn = sum(map(len, self.quick.tasks[first:last]))
        followed = max(FEWEST_TURNS, MOST_TASKS // max(1, a_turn))
        seen: deque[_Moment] = deque([_Moment(self)], maxlen=LOOKED_BACK)
        while turns:
            self.advance(first, last)
            ticks = last - first
            self.landing = {tick - ticks: landed for tick, landed in self.landing.items()}
            turns, followed = turns - 1, followed - 1
            moment = _Moment(self)
            cycle = next((n for n, old in enumerate(seen, 1) if moment.follows(old)), None)
            if cycle is None and followed == 0:
                cycle = 1
            if cycle is not None and turns >= cycle:
                self.skip(moment, seen[cycle - 1], turns // cycle)
                turns %= cycle
                moment = _Moment(self)
            seen.appendleft(moment)

    def skip(self, now: "_Moment", before: "_Moment", times: int) -> None:
        """As often again what came between two moments."""
        later = times * (now.head - before.head)
        for row in (self.head, self.send_free, self.receive_free):
            row[:] = [time + later for time in row]
        self.landing = {
            tick: [(source, target, end + later) for source, target, end in landed]
            for tick, landed in self.landing.items()
        }
        for sends in self.beside:
            moved = [(start + later, end + later, share) for start, end, share in sends]
            sends.clear()
            sends.extend(moved)
        for row, new, old in zip(
            (self.busy, self.sent, self.inside), now.sums, before.sums, strict=True
        ):
            row[:] = [a + times * (a - b) for a, b in zip(new, old, strict=True)]

    def finish(self) -> Totals:
        """What a step takes once all its ticks have run."""
        last = max(self.head)
        for landed in self.landing.values():
            for _, _, end in landed:
                last = max(last, end)
        costs = self.costs
        return Totals(
            step_s=last + costs.after_s + costs.update_s,
            busy_s=max(self.busy),
            sent_bytes=max(self.sent) + costs.other_sent_bytes,
            inside_bytes=max(self.inside),
        )


class _Moment:
    """All times that anything may still wait for, seen from the first device's head."""

    def __init__(self, run: _Run) -> None:
        self.head = now = run.head[0]
        self.sums = (run.busy[:], run.sent[:], run.inside[:])
        seen = [at - now for at in run.head]
        for free in (run.send_free, run.receive_free):
            # What is free before its device gets there keeps nobody waiting.
            seen += [max(0.0, time - at) for time, at in zip(free, run.head, strict=True)]
        for tick in sorted(run.landing):
            seen += [end - now for _, _, end in run.landing[tick]]
        for at, sends in zip(run.head, run.beside, strict=True):
            for start, end, _ in sends:
                if end > at:
                    seen += [max(0.0, start - at), end - at]
        self.seen = seen

    def follows(self, other: "_Moment") -> bool:
        """Whether all is as it was then, but for a constant."""
        if len(self.seen) != len(other.seen):
            return False
        close = TOLERANCE * (self.head - other.head)
        return all(abs(a - b) <= close for a, b in zip(self.seen, other.seen, strict=True))


def around_s(costs: Costs, chunks: int) -> list[list[tuple[float, float, float]]] | None:
    """[kind][chunk], see `Costs.around`; None where no place has members."""
    if not any(_each(costs.join_s, 1) + _each(costs.cut_s, 1)):
        return None
    return [
        [
            costs.around(Task(tick=0, device=0, kind=kind, chunk=chunk, microbatch=0))
            for chunk in range(chunks)
        ]
        for kind in KINDS
    ]


def work_seconds(costs: Costs, chunks: int) -> list[list[float]]:
    """[kind][chunk]"""
    rows = []
    for kind, one in zip(
        KINDS,
        (
            costs.forward_s,
            costs.backward_s,
            costs.input_gradient_s,
            costs.weight_gradient_s,
        ),
        strict=True,
    ):
        row = _each(one, chunks)
        if kind is not TaskKind.WEIGHT_GRADIENT:
            row[0] += costs.embed_s
            if kind is not TaskKind.FORWARD:
                row[chunks - 1] += costs.head_s
        rows.append(row)
    return rows


def _each(value: float | Sequence[float], count: int) -> list[float]:
    if isinstance(value, int | float):
        return [float(value)] * count
    return [*map(float, value), *[0.0] * (count - len(value))]


class QuickMemory:
    """The lifetimes of a schedule's data, to be weighed with many costs."""

    def __init__(self, schedule: Schedule, found: Trace) -> None:
        """Reads them from the schedule's trace."""
        copies, index = found.copies, {data: i for i, data in enumerate(DATA)}
        self.devices, self.chunks, self.ticks = schedule.devices, schedule.chunks, schedule.ticks
        self.device = np.array([c.device for c in copies], np.int32)
        self.first = np.array([c.made_at for c in copies], np.int32)
        self.last = np.array([min(c.last_use, schedule.ticks) + 1 for c in copies], np.int32)
        self.data = np.array([index[c.block.data] for c in copies], np.int8)
        self.chunk = np.array([c.block.chunk for c in copies], np.int32)

    def alive_bytes(self, costs: Costs) -> float:
        """The most that any device has alive of the schedule's data, static bytes not included."""
        size = np.array(sizes_of(costs, self.chunks))[self.data, self.chunk]
        width = self.ticks + 2
        places = self.devices * width
        change = np.bincount(self.device * width + self.first, weights=size, minlength=places)
        change -= np.bincount(self.device * width + self.last, weights=size, minlength=places)
        live = change.reshape(self.devices, width).cumsum(1)[:, : self.ticks]
        return float(live.max(initial=0.0))


def sizes_of(costs: Costs, chunks: int, *, sent: bool = False) -> list[list[float]]:
    """[data][chunk], on their way if `sent`; an activation may be one past the last chunk, the
    head's."""
    weights = costs.sent_weight_bytes if sent else None
    return [
        _each(one, chunks + 1)
        for one in (
            costs.weight_bytes if weights is None else weights,
            costs.gradient_bytes,
            costs.activation_bytes,
            costs.activation_bytes,
            costs.residual_bytes,
            costs.tap_bytes,
        )
    ]
