"""Runs a schedule on names alone: which copy of which block is where, from when until when.

The checker, the memory of the simulator and the buffers of the lowering all read this one trace. It
enforces the data rules as it goes: an input must be where and when it is used, and every gradient
contribution must reach the parameters' place of rest exactly once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .schedule import (
    ALL,
    Block,
    Data,
    Move,
    MoveKind,
    Placement,
    Schedule,
    ScheduleError,
    Task,
    TaskKind,
)


class Copy(NamedTuple):
    """One copy of a block on a device.

    It is readable from the head of tick `born`, and needed until the end of tick `last_use`; what
    is born at `last_use + 1` or later may take its place in memory.
    """

    block: Block
    device: int
    born: int
    last_use: int
    made_at: int
    """The tick in which memory for it is first needed: its producer's, or its departure's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A weight-gradient task's sum, and the accumulator copy it goes to."""

    task: Task
    fresh: bool
    """True where the accumulator starts here, so that nothing is added to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All copies of a schedule, and where its gradients end."""

    copies: tuple[Copy, ...]
    """Device by device, in order of birth."""
    contributions: tuple[Contribution, ...]
    merges: frozenset[Move]
    """Gradient moves that land on an accumulator that is already there, and are added to it."""

    def on_device(self, device: int) -> Sequence[Copy]:
        """The copies on one device, in order of birth."""
        low = bisect_left(self.copies, device, key=lambda copy: copy.device)
        high = bisect_right(self.copies, device, key=lambda copy: copy.device)
        return self.copies[low:high]


@dataclass(slots=True)
class _Open:
    born: int
    made_at: int
    last_use: int
    parts: set[int] = field(default_factory=set)
    """For a gradient: the microbatches in the sum."""


def gradient_block(chunk: int) -> Block:
    """The accumulator of a chunk's weight gradient."""
    return Block(data=Data.GRADIENT, chunk=chunk)


def task_inputs(schedule: Schedule, task: Task) -> list[Block]:
    """The blocks a task reads on its own device."""
    c, m = task.chunk, task.microbatch
    if task.kind is TaskKind.WEIGHT_GRADIENT:
        return [Block(data=Data.TAP, chunk=c, microbatch=m)]
    blocks = [schedule.weight(c, task.kind)]
    if task.kind is TaskKind.FORWARD:
        if c > 0:
            blocks.append(Block(data=Data.ACTIVATION, chunk=c, microbatch=m))
        return blocks
    blocks.append(Block(data=Data.RESIDUAL, chunk=c, microbatch=m))
    if c == schedule.chunks - 1:
        blocks.append(Block(data=Data.ACTIVATION, chunk=c + 1, microbatch=m))
    else:
        blocks.append(Block(data=Data.COTANGENT, chunk=c, microbatch=m))
    return blocks


def task_outputs(schedule: Schedule, task: Task) -> list[Block]:
    """The blocks a task makes on its own device, gradient contributions aside."""
    c, m = task.chunk, task.microbatch
    if task.kind is TaskKind.FORWARD:
        return [
            Block(data=Data.ACTIVATION, chunk=c + 1, microbatch=m),
            Block(data=Data.RESIDUAL, chunk=c, microbatch=m),
        ]
    if task.kind is TaskKind.WEIGHT_GRADIENT:
        return []
    blocks = [Block(data=Data.COTANGENT, chunk=c - 1, microbatch=m)] if c > 0 else []
    if task.kind is TaskKind.INPUT_GRADIENT:
        blocks.append(Block(data=Data.TAP, chunk=c, microbatch=m))
    return blocks


def trace(schedule: Schedule) -> Trace:
    """Follows every copy of every block through the schedule.

    Raises:
        ScheduleError: at the first task or move whose input is missing, or whose gradient
            contribution is lost or counted twice.
    """
    return _Tracer(schedule).run()


class _Tracer:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.held: list[dict[Block, _Open]] = [{} for _ in range(schedule.devices)]
        self.copies: list[Copy] = []
        self.contributions: list[Contribution] = []
        self.merges: set[Move] = set()
        self.reduced: dict[int, set[int]] = {}
        """Chunk -> microbatches whose gradient has been reduced to the shards or replicas."""
        self.sent_parts: dict[int, set[int]] = {}

    def run(self) -> Trace:
        schedule = self.schedule
        for block, device in schedule.starts:
            if block.data is not Data.WEIGHT:
                raise ScheduleError(f"{block} cannot be there at the start: only weights can")
            at_rest = schedule.placement is Placement.REPLICATED or (
                schedule.placement is Placement.OWNER and schedule.owners[block.chunk] == device
            )
            if not at_rest:
                raise ScheduleError(f"{block} does not rest on device {device}")
            self.held[device][block] = _Open(born=0, made_at=0, last_use=0)
        landing: dict[int, list[Move]] = {}
        for tick in range(schedule.ticks):
            departing = schedule.moves_by_start[tick]
            for move in departing:
                if move.arrive == tick:
                    self.depart(move)
                    self.land(move)
            for move in departing:
                if move.arrive > tick:
                    self.depart(move)
                    landing.setdefault(move.arrive, []).append(move)
                elif move.arrive < tick:
                    raise ScheduleError(f"{move} arrives before it starts")
            tasks = schedule.tasks_by_tick[tick]
            for task in tasks:
                self.read(task)
            for task in tasks:
                for block in task_outputs(schedule, task):
                    self.open(block, task.device, born=tick + 1, made_at=tick, by=task)
            for move in landing.pop(tick + 1, []):
                self.land(move)
            for task in tasks:
                if task.kind in (TaskKind.BACKWARD, TaskKind.WEIGHT_GRADIENT):
                    self.contribute(task)
        if landing:
            move = next(iter(landing.values()))[0]
            raise ScheduleError(f"{move} never arrives: the schedule has {schedule.ticks} ticks")
        self.finish()
        return Trace(
            copies=tuple(sorted(self.copies, key=lambda c: (c.device, c.born, c.block))),
            contributions=tuple(self.contributions),
            merges=frozenset(self.merges),
        )

    def open(self, block: Block, device: int, *, born: int, made_at: int, by: Task | Move) -> _Open:
        held = self.held[device]
        if block in held:
            if block.data in (Data.ACTIVATION, Data.COTANGENT, Data.RESIDUAL, Data.TAP):
                raise ScheduleError(
                    f"{by} makes {block} on device {device}, which is already there"
                )
            self.close(block, device)  # a newer copy of the same weights takes over
        held[block] = _Open(born=born, made_at=made_at, last_use=born)
        return held[block]

    def close(self, block: Block, device: int) -> _Open:
        copy = self.held[device].pop(block)
        self.copies.append(
            Copy(
                block=block,
                device=device,
                born=copy.born,
                last_use=copy.last_use,
                made_at=copy.made_at,
            )
        )
        return copy

    def use(self, block: Block, device: int, tick: int, *, by: Task | Move) -> None:
        copy = self.held[device].get(block)
        if copy is None or copy.born > tick:
            raise ScheduleError(f"{by} needs {block} on device {device}, where it is not")
        copy.last_use = max(copy.last_use, tick)

    def read(self, task: Task) -> None:
        for block in task_inputs(self.schedule, task):
            self.use(block, task.device, task.tick, by=task)
            # Activations and their like are read once, by the one task they are made for.
            if block.data in (Data.ACTIVATION, Data.COTANGENT, Data.RESIDUAL, Data.TAP):
                self.close(block, task.device)

    def depart(self, move: Move) -> None:
        block = move.block
        busy_until = max(move.start, move.arrive - 1)
        if move.kind is MoveKind.ALL_GATHER:
            if block.data is not Data.WEIGHT or self.schedule.placement is not Placement.SHARDED:
                raise ScheduleError(f"{move}: only sharded weights are gathered")
            return
        if move.kind in (MoveKind.REDUCE_SCATTER, MoveKind.ALL_REDUCE):
            self.depart_reduction(move, busy_until)
            return
        if move.kind is MoveKind.COPY and move.source != move.target:
            raise ScheduleError(f"{move}: a copy stays on its device")
        if move.kind is MoveKind.PERMUTE and move.source == move.target:
            raise ScheduleError(f"{move}: a permute goes to another device")
        self.use(block, move.source, move.start, by=move)
        self.held[move.source][block].last_use = max(
            self.held[move.source][block].last_use, busy_until
        )
        if block.data is Data.GRADIENT:
            gone = self.close(block, move.source)
            self.sent_parts[id(move)] = gone.parts
        elif block.data in (Data.RESIDUAL, Data.TAP):
            raise ScheduleError(f"{move}: a {block.data} never moves")
        elif block.data in (Data.ACTIVATION, Data.COTANGENT):
            self.close(block, move.source)

    def depart_reduction(self, move: Move, busy_until: int) -> None:
        if move.block.data is not Data.GRADIENT:
            raise ScheduleError(f"{move}: only gradients are reduced")
        wants = Placement.SHARDED if move.kind is MoveKind.REDUCE_SCATTER else Placement.REPLICATED
        if self.schedule.placement is not wants:
            raise ScheduleError(f"{move}: parameters are {self.schedule.placement}, not {wants}")
        parts: set[int] = set()
        for device in range(self.schedule.devices):
            if move.block in self.held[device]:
                self.use(move.block, device, move.start, by=move)
                self.held[device][move.block].last_use = busy_until
                gone = self.close(move.block, device)
                if parts & gone.parts:
                    raise ScheduleError(f"{move} counts microbatches {parts & gone.parts} twice")
                parts |= gone.parts
        if not parts:
            raise ScheduleError(f"{move} finds no gradient to reduce")
        self.sent_parts[id(move)] = parts

    def land(self, move: Move) -> None:
        block = move.landed
        if move.kind is MoveKind.ALL_GATHER:
            for device in range(self.schedule.devices):
                self.open(block, device, born=move.arrive, made_at=move.start, by=move)
            return
        if move.kind in (MoveKind.REDUCE_SCATTER, MoveKind.ALL_REDUCE):
            done = self.reduced.setdefault(block.chunk, set())
            parts = self.sent_parts.pop(id(move))
            if done & parts:
                raise ScheduleError(f"{move} counts microbatches {done & parts} twice")
            done |= parts
            return
        if block.data is not Data.GRADIENT:
            self.open(block, move.target, born=move.arrive, made_at=move.start, by=move)
            return
        parts = self.sent_parts.pop(id(move))
        there = self.held[move.target].get(block)
        if there is None:
            there = self.open(block, move.target, born=move.arrive, made_at=move.start, by=move)
        else:
            self.merges.add(move)
        if there.parts & parts:
            raise ScheduleError(f"{move} counts microbatches {there.parts & parts} twice")
        there.parts |= parts

    def contribute(self, task: Task) -> None:
        block = gradient_block(task.chunk)
        there = self.held[task.device].get(block)
        fresh = there is None
        if there is None:
            there = self.open(block, task.device, born=task.tick + 1, made_at=task.tick, by=task)
        if task.microbatch in there.parts or task.microbatch in self.reduced.get(task.chunk, ()):
            raise ScheduleError(f"{task} adds its gradient a second time")
        there.parts.add(task.microbatch)
        there.last_use = max(there.last_use, task.tick + 1)
        self.contributions.append(Contribution(task=task, fresh=fresh))

    def finish(self) -> None:
        schedule, last = self.schedule, self.schedule.ticks
        everything = set(range(schedule.microbatches))
        for chunk in range(schedule.chunks):
            block = gradient_block(chunk)
            if schedule.placement is Placement.OWNER:
                home = schedule.owners[chunk]
                copy = self.held[home].get(block)
                got = copy.parts if copy else set()
                if copy:
                    copy.last_use = last
                where = f"device {home}"
            else:
                home, got, where = ALL, self.reduced.get(chunk, set()), "the reduced gradient"
            strays = [d for d, held in enumerate(self.held) if block in held and d != home]
            if strays:
                raise ScheduleError(f"{block} is left behind on devices {strays}")
            if got != everything:
                missing = sorted(everything - got)
                raise ScheduleError(f"{block} on {where} lacks microbatches {missing}")
        for device, held in enumerate(self.held):
            for block in list(held):
                if block.data not in (Data.WEIGHT, Data.GRADIENT):
                    raise ScheduleError(f"{block} on device {device} is never used")
                self.close(block, device)
