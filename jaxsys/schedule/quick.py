"""The totals of a step, for many costs: `simulate`'s recursion over a schedule compiled once.

A planner asks for the same schedule with other times, sizes and links again and again, and for
four numbers of each. So tasks and moves become rows of numbers, blocks on devices become slots, and
lifetimes an array; nothing of a timeline is kept. The numbers are those of `simulate`, to the last
bit for times; a test holds them equal.

Of schedules whose chunks rest on owners: group collectives are for `simulate`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .schedule import Block, Data, MoveKind, Placement, Schedule, Task, TaskKind
from .simulate import Costs, Link, done_s
from .trace import Trace, gradient_block, task_inputs, task_outputs

KINDS = tuple(TaskKind)
DATA = tuple(Data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A step: seconds, and of the device that has most the seconds computed and the bytes sent."""

    step_s: float
    busy_s: float
    sent_bytes: float
    inside_bytes: float
    """To other members of its place."""


class QuickSchedule:
    """A schedule ready to be simulated with many costs."""

    def __init__(self, schedule: Schedule) -> None:
        """Compiles it.

        Args:
            schedule: legal, its chunks on owners.

        Raises:
            ValueError: if its chunks do not rest on owners.
        """
        if schedule.placement is not Placement.OWNER:
            raise ValueError(f"{schedule.name} rests {schedule.placement}: use simulate")
        self.devices, self.chunks = schedule.devices, schedule.chunks
        self.slots: dict[tuple[Block, int], int] = {}
        self.starts = [self._slot(block, device) for block, device in schedule.starts]
        self.moves = [[self._move(m) for m in row] for row in schedule.moves_by_start]
        self.tasks = [[self._task(schedule, t) for t in row] for row in schedule.tasks_by_tick]
        self.slot_count = len(self.slots)
        del self.slots  # only numbers are kept

    def _slot(self, block: Block, device: int) -> int:
        return self.slots.setdefault((block, device), len(self.slots))

    def _move(self, move) -> tuple:
        return (
            move.kind is MoveKind.COPY,
            DATA.index(move.block.data),
            move.block.chunk,
            move.source,
            move.target,
            self._slot(move.block, move.source),
            self._slot(move.block, move.target),
            self._slot(move.landed, move.target),
            move.landed.data is Data.GRADIENT,
            move.arrive,
        )

    def _task(self, schedule: Schedule, task) -> tuple:
        device = task.device
        sums = task.kind in (TaskKind.BACKWARD, TaskKind.WEIGHT_GRADIENT)
        return (
            device,
            KINDS.index(task.kind),
            task.chunk,
            tuple(self._slot(b, device) for b in task_inputs(schedule, task)),
            tuple(self._slot(b, device) for b in task_outputs(schedule, task)),
            self._slot(gradient_block(task.chunk), device) if sums else -1,
        )

    def run(self, costs: Costs, link: Link) -> Totals:
        """Simulates it with these costs; see `simulate`."""
        p = self.devices
        work_s = self._work_s(costs)
        around = self._around(costs)
        inside = [0.0] * p
        size = _sizes(costs, self.chunks)
        transfer_s = [[link.transfer_s(one) for one in row] for row in size]
        ready = [0.0] * self.slot_count
        for slot in self.starts:
            ready[slot] = costs.before_s
        head = [costs.before_s] * p
        send_free, receive_free = [0.0] * p, [0.0] * p
        busy, sent = [0.0] * p, [0.0] * p
        slowed = bool(link.contention or link.waiting_contention)
        beside: list[deque] = [deque() for _ in range(p)]
        landing: dict[int, list[tuple[int, bool, int, int, float]]] = {}
        after_s = sent_inside = 0.0
        for tick, (moves, tasks) in enumerate(zip(self.moves, self.tasks, strict=True)):
            arrived = landing.pop(tick, ())
            for slot, is_sum, _, _, end in arrived:
                ready[slot] = max(end, ready[slot]) if is_sum else end
            for _, _, source, target, end in arrived:
                head[source] = max(head[source], end)
                head[target] = max(head[target], end)
            for is_copy, data, chunk, source, target, here, there, slot, is_sum, arrive in moves:
                if is_copy:
                    end = head[source]
                    # It is there at once, and once more where it lands.
                    ready[slot] = end
                else:
                    begin = max(
                        head[source],
                        head[target],
                        ready[here],
                        ready[there],
                        send_free[source],
                        receive_free[target],
                    )
                    end = begin + transfer_s[data][chunk]
                    if slowed:
                        opened = max(head[source], send_free[source], ready[here])
                        beside[source].append((opened, begin, link.waiting_contention))
                        beside[source].append((begin, end, link.contention))
                    send_free[source] = receive_free[target] = end
                    sent[source] += size[data][chunk]
                if arrive == tick:
                    ready[slot] = max(end, ready[slot]) if is_sum else end
                    head[source] = max(head[source], end)
                    head[target] = max(head[target], end)
                else:
                    landing.setdefault(arrive, []).append((slot, is_sum, source, target, end))
            for device, kind, chunk, inputs, outputs, sums in tasks:
                begin = head[device]
                for slot in inputs:
                    begin = max(begin, ready[slot])
                duration = work_s[kind][chunk]
                if around is not None:
                    before_s, after_s, sent_inside = around[kind][chunk]
                    begin += before_s
                end = begin + duration
                if slowed:
                    end = done_s(beside[device], begin, duration)
                if around is not None:
                    end += after_s
                    inside[device] += sent_inside
                for slot in outputs:
                    ready[slot] = end
                if sums >= 0:
                    ready[sums] = max(end, ready[sums])
                head[device] = end
                busy[device] += duration
        last = max(head)
        for rows in landing.values():
            for *_, end in rows:
                last = max(last, end)
        return Totals(
            step_s=last + costs.after_s + costs.update_s,
            busy_s=max(busy),
            sent_bytes=max(sent) + costs.other_sent_bytes,
            inside_bytes=max(inside),
        )

    def _around(self, costs: Costs) -> list[list[tuple[float, float, float]]] | None:
        """[kind][chunk], see `Costs.around`; None where no place has members."""
        if not any(_each(costs.join_s, 1) + _each(costs.cut_s, 1)):
            return None
        return [
            [
                costs.around(Task(tick=0, device=0, kind=kind, chunk=chunk, microbatch=0))
                for chunk in range(self.chunks)
            ]
            for kind in KINDS
        ]

    def _work_s(self, costs: Costs) -> list[list[float]]:
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
            row = _each(one, self.chunks)
            if kind is not TaskKind.WEIGHT_GRADIENT:
                row[0] += costs.embed_s
                if kind is not TaskKind.FORWARD:
                    row[self.chunks - 1] += costs.head_s
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
        size = np.array(_sizes(costs, self.chunks))[self.data, self.chunk]
        width = self.ticks + 2
        places = self.devices * width
        change = np.bincount(self.device * width + self.first, weights=size, minlength=places)
        change -= np.bincount(self.device * width + self.last, weights=size, minlength=places)
        live = change.reshape(self.devices, width).cumsum(1)[:, : self.ticks]
        return float(live.max(initial=0.0))


def _sizes(costs: Costs, chunks: int) -> list[list[float]]:
    """[data][chunk]; an activation may be one past the last chunk, the head's."""
    return [
        _each(one, chunks + 1)
        for one in (
            costs.weight_bytes,
            costs.gradient_bytes,
            costs.activation_bytes,
            costs.activation_bytes,
            costs.residual_bytes,
            costs.tap_bytes,
        )
    ]
