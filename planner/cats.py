"""Constraint-aware tensors: every block of data of a schedule, with where and when it is.

A CAT is a block, its events (a set of devices that hold it over the same ticks), and the blocks it
is made of. Computation is implied: it happens where and when its inputs meet. The checker has
already enforced that they do, so that a CAT's dependencies and events can be read, compared and
grouped, but not contradict each other.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from jaxsys.schedule import (
    Block,
    Data,
    Schedule,
    Trace,
    check,
    gradient_block,
    task_inputs,
    task_outputs,
)
from jaxsys.schedule.schedule import TaskKind


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Occurrence:
    """Devices that hold a block over the same ticks."""

    first_tick: int
    last_tick: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cat:
    """One block of data through a step."""

    block: Block
    events: tuple[Occurrence, ...]
    """In order of time."""
    needs: tuple[Block, ...]
    """What it is computed from; empty for weights."""

    @property
    def first_tick(self) -> int:
        """When it is first held anywhere."""
        return min(event.first_tick for event in self.events)

    @property
    def last_tick(self) -> int:
        """When it is last held anywhere."""
        return max(event.last_tick for event in self.events)

    @property
    def devices(self) -> frozenset[int]:
        """All devices that hold it at any time."""
        return frozenset(device for event in self.events for device in event.devices)

    def shape(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Its events with times counted from its own start: equal for CATs that do alike."""
        start = self.first_tick
        return tuple(
            (event.first_tick - start, event.last_tick - start, event.devices)
            for event in self.events
        )


def cats(schedule: Schedule, *, known_trace: Trace | None = None) -> tuple[Cat, ...]:
    """The CATs of a legal schedule.

    Raises:
        ScheduleError: if the schedule is not legal.
    """
    found = known_trace or check(schedule)
    holders: dict[Block, dict[tuple[int, int], set[int]]] = defaultdict(lambda: defaultdict(set))
    for copy in found.copies:
        holders[copy.block][copy.born, copy.last_use].add(copy.device)
    needs: dict[Block, dict[Block, None]] = defaultdict(dict)
    for task in schedule.tasks:
        made = list(task_outputs(schedule, task))
        if task.kind in (TaskKind.BACKWARD, TaskKind.WEIGHT_GRADIENT):
            made.append(gradient_block(task.chunk))
        for block in made:
            needs[block].update(dict.fromkeys(task_inputs(schedule, task)))
    return tuple(
        Cat(
            block=block,
            events=tuple(
                sorted(
                    Occurrence(first_tick=a, last_tick=b, devices=tuple(sorted(devices)))
                    for (a, b), devices in spans.items()
                )
            ),
            needs=tuple(needs[block]),
        )
        for block, spans in sorted(holders.items())
    )


def grouped(found: Iterable[Cat]) -> list[list[Cat]]:
    """CATs of one kind whose events have the same shape, together."""
    groups: dict[object, list[Cat]] = {}
    for cat in found:
        groups.setdefault((cat.block.data, cat.shape()), []).append(cat)
    return list(groups.values())


def residents(found: Iterable[Cat], data: Data, device: int) -> int:
    """The most blocks of a kind that a device holds at once."""
    change: dict[int, int] = defaultdict(int)
    for cat in found:
        if cat.block.data is data:
            for event in cat.events:
                if device in event.devices:
                    change[event.first_tick] += 1
                    change[event.last_tick + 1] -= 1
    live = peak = 0
    for tick in sorted(change):
        live += change[tick]
        peak = max(peak, live)
    return peak


def travels(found: Iterable[Cat], data: Data) -> bool:
    """Whether any block of a kind is on different devices at different times."""
    return any(
        len({(event.first_tick, event.last_tick) for event in cat.events}) > 1
        and len({event.devices for event in cat.events}) > 1
        for cat in found
        if cat.block.data is data
    )
