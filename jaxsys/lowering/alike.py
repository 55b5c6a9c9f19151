"""What of a sharded schedule is alike: chunks, ticks and turns that a loop can stand for.

Chunks in a row that have the same layers, and whose weights and sums live as long, are a group. A
pass over it, F or B, is a loop whose body gathers and reduces for chunks so far from its own. What
only the first ticks do besides comes before the loop, what only the last do after it; what all but
some do is left out in those. In a loop chunks keep what outlives a tick in rows of one array, a
shelf; what comes and goes in a tick or two is handed from tick to tick.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from jaxsys.schedule import Move, MoveKind, Schedule, Task, TaskKind

LEAST = 4
"""Chunks or ticks from which a loop is worth its copies in and out of rows."""


class Held(StrEnum):
    """How long copies of a chunk's weights stay."""

    PASSING = "passing"
    """From a gather to the one task that reads them."""
    BETWEEN = "between"
    """From B to the next F, while there are no residuals."""
    ALWAYS = "always"
    """From F to B too."""


@dataclass(frozen=True, slots=True)
class Group:
    """Chunks in a row that are alike."""

    chunks: range
    weights: Held
    sums: bool
    """Whether sums of gradients outlive the tick after their B."""

    @property
    def shelved(self) -> bool:
        """Whether it is kept in rows, for loops."""
        return len(self.chunks) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A move that most ticks of a span make."""

    kind: MoveKind
    offset: int
    """Of its chunk, from the task's."""
    due: int
    """Ticks until it must have arrived."""
    when: range
    """The ticks that make it, counted from the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Ticks that a loop stands for: one task on one chunk of a group after another."""

    ticks: range
    group: Group
    step: int
    """From a tick's chunk to the next one's."""
    slots: tuple[Slot, ...]
    early: tuple[Move, ...] = ()
    """Made before the loop."""
    late: tuple[Move, ...] = ()
    """Made after it."""

    def flights(self, chunk: int) -> list[tuple[Slot, int, int]]:
        """What is in flight when the tick of a chunk begins: slot, its chunk, ticks it has."""
        return [
            (slot, chunk + slot.offset - self.step * ago, slot.due - ago)
            for slot in self.slots
            for ago in range(slot.due, 0, -1)
        ]


class Alike:
    """The groups of a schedule's chunks, and its ticks in their terms.

    All devices of the schedule do the same: see `strategies.data_parallel.local_tasks`.
    """

    def __init__(self, schedule: Schedule, forms: Sequence[Hashable], *, looped: bool) -> None:
        """`forms`: what each chunk's layers are; `looped`: False leaves every chunk to itself."""
        self.schedule, self.chunks = schedule, schedule.chunks
        stay = [self._sums_stay(chunk) for chunk in range(self.chunks)]
        # The tick after the lowest chunk's B is its own next F: deferred or not it leaves there.
        stay[0] = stay[0] or stay[1 % self.chunks]
        rows = [(form, self._held(c), stay[c]) for c, form in enumerate(forms)]
        self.groups: list[Group] = []
        start = 0
        while start < len(rows):
            stop = start + 1
            while looped and stop < len(rows) and rows[stop] == rows[start]:
                stop += 1
            alike = range(start, stop)
            parts = [alike] if len(alike) >= LEAST else [range(c, c + 1) for c in alike]
            self.groups += [Group(part, *rows[start][1:]) for part in parts]
            start = stop
        self.group_of = [group for group in self.groups for _ in group.chunks]

    # What a device does, tick by tick.

    @cached_property
    def task_at(self) -> list[Task | None]:
        """The task of each tick."""
        rows: list[Task | None] = [None] * self.schedule.ticks
        for task in self.schedule.tasks:
            if task.device == 0:
                rows[task.tick] = task
        return rows

    @cached_property
    def copies(self) -> list[list[tuple[int, list[int]]]]:
        """Chunk -> the ticks in which copies of its weights arrive, and in which each is read."""
        found: list[list[tuple[int, list[int]]]] = [[] for _ in range(self.chunks)]
        arrivals = sorted(
            (move.arrive, move.block.chunk)
            for move in self.schedule.moves
            if move.kind is MoveKind.ALL_GATHER
        )
        for tick, chunk in arrivals:
            found[chunk].append((tick, []))
        for task in filter(None, self.task_at):
            [copy, *_] = [c for c in reversed(found[task.chunk]) if c[0] <= task.tick]
            copy[1].append(task.tick)
        return found

    @cached_property
    def last_uses(self) -> frozenset[int]:
        """Ticks whose task is the last to read the copy of weights that it reads."""
        return frozenset(uses[-1] for rows in self.copies for _, uses in rows if uses)

    @cached_property
    def sums(self) -> list[list[tuple[int, int]]]:
        """Chunk -> the ticks of a sum's first B and of its leaving, sum by sum."""
        leaving = {
            (move.start, move.block.chunk)
            for move in self.schedule.moves
            if move.kind is MoveKind.REDUCE_SCATTER
        }
        begun: dict[int, int] = {}
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.chunks)]
        for tick in range(self.schedule.ticks):
            for chunk in [c for c in begun if (tick, c) in leaving]:
                found[chunk].append((begun.pop(chunk), tick))
            task = self.task_at[tick]
            if task is not None and task.kind is TaskKind.BACKWARD:
                begun.setdefault(task.chunk, tick)
        return found

    def adds(self, tick: int) -> bool:
        """Whether the task of a tick is a B that adds to a sum that is there already."""
        task = self.task_at[tick]
        if task is None or task.kind is not TaskKind.BACKWARD:
            return False
        return any(begun < tick < left for begun, left in self.sums[task.chunk])

    def _held(self, chunk: int) -> Held:
        reads = [[self.task_at[t] for t in uses] for _, uses in self.copies[chunk]]
        pairs = {(a.kind, b.kind) for row in reads for a, b in pairwise(row) if a and b}
        if not pairs:
            return Held.PASSING
        within = (TaskKind.FORWARD, TaskKind.BACKWARD)
        return Held.ALWAYS if within in pairs else Held.BETWEEN

    def _sums_stay(self, chunk: int) -> bool:
        return any(left > begun + 1 for begun, left in self.sums[chunk])

    # Loops over chunks.

    def spans(self, ticks: range) -> Iterator["Span | int"]:
        """Ticks cut into passes over groups, and others one by one."""
        tick = ticks.start
        while tick < ticks.stop:
            task = self.task_at[tick]
            span = None
            if task is not None and self.group_of[task.chunk].shelved:
                rest = self.group_of[task.chunk].chunks
                forward = task.kind is TaskKind.FORWARD
                count = rest.stop - task.chunk if forward else task.chunk - rest.start + 1
                span = self.span(range(tick, tick + count))
            yield tick if span is None else span
            tick = tick + 1 if span is None else span.ticks.stop

    def span(self, ticks: range) -> "Span | None":
        """Ticks on chunks of a group as a loop; None if they do not do enough alike."""
        tasks = [task for task in self.task_at[ticks.start : ticks.stop] if task is not None]
        first, group = tasks[0], self.group_of[tasks[0].chunk]
        alike = {(task.kind, task.tick in self.last_uses, self.adds(task.tick)) for task in tasks}
        if len(alike) > 1 or len(tasks) < LEAST:
            return None
        step = 1 if first.kind is TaskKind.FORWARD else -1
        found: dict[tuple[MoveKind, int, int], list[Move]] = {}
        other: list[Move] = []
        for move in self.moves_in(ticks):
            offset = move.block.chunk - tasks[move.start - ticks.start].chunk
            if move.block.chunk in group.chunks:
                key = move.kind, offset, move.arrive - move.start
                found.setdefault(key, []).append(move)
            else:
                other.append(move)
        slots = []
        for (kind, offset, due), moves in found.items():
            when = range(moves[0].start - ticks.start, moves[-1].start - ticks.start + 1)
            if len(when) == len(moves) and 2 * len(moves) >= len(ticks):
                slots.append(Slot(kind=kind, offset=offset, due=due, when=when))
            else:
                other += moves
        span = Span(ticks=ticks, group=group, step=step, slots=tuple(slots))
        return self._with_others(span, sorted(other, key=lambda move: move.start))

    def moves_in(self, ticks: range) -> list[Move]:
        """The moves that start in these ticks, in order."""
        return [move for tick in ticks for move in self.schedule.moves_by_start[tick]]

    def _with_others(self, span: "Span", other: list[Move]) -> "Span | None":
        """The span with moves that are made before or after it; None if it cannot be so."""
        ticks, group = span.ticks, span.group
        gathers = [slot for slot in span.slots if slot.kind is MoveKind.ALL_GATHER]
        reductions = [slot for slot in span.slots if slot.kind is MoveKind.REDUCE_SCATTER]
        expected = {
            (chunk, due)
            for slot, chunk, due in span.flights(self.chunk_at(ticks.start))
            if slot.kind is MoveKind.ALL_GATHER
        }
        early, late = [], []
        for move in other:
            chunk, due = move.block.chunk, move.arrive - ticks.start
            if move.kind is MoveKind.ALL_GATHER:
                if (chunk, due) not in expected and move.arrive < ticks.stop:
                    return None
                (early if (chunk, due) in expected else late).append(move)
            elif any(begun < ticks.start <= left for begun, left in self.sums[chunk]):
                early.append(move)
            elif group.sums and chunk in group.chunks:
                late.append(move)
            else:
                return None
        flying = [move for move in self.schedule.moves if move.start < ticks.start <= move.arrive]
        found = {
            (move.block.chunk, move.arrive - ticks.start)
            for move in (*flying, *early)
            if move.kind is MoveKind.ALL_GATHER
        }
        waiting = any(
            arrived < ticks.start <= uses[0]
            for chunk in group.chunks
            for arrived, uses in self.copies[chunk]
            if uses
        )
        # A gather arrives for the task that reads it; one is left out where that is past the end.
        in_time = all(
            slot.due == slot.offset * span.step
            and slot.when.start == 0
            and slot.when.stop + slot.due >= len(ticks)
            for slot in gathers
        )
        # A sum that is not kept leaves in the tick after its B.
        passing = span.step > 0 or bool(reductions)
        passing = passing and all(slot.offset == -span.step for slot in reductions)
        if found != expected or waiting or not in_time or not (passing or group.sums):
            return None
        return replace(span, early=tuple(early), late=tuple(late))

    def chunk_at(self, tick: int) -> int:
        """The chunk of a tick's task."""
        task = self.task_at[tick]
        assert task is not None
        return task.chunk

    # Turns.

    def steady(self, turns: Sequence[range]) -> range:
        """The longest run of turns, given by their ticks, in which the same happens."""
        said = [self._say(ticks) for ticks in turns]
        best = range(0)
        for start in range(len(said)):
            stop = start + 1
            while stop < len(said) and said[stop] == said[start]:
                stop += 1
            best = max(best, range(start, stop), key=len)
        return best

    def _say(self, ticks: range) -> Hashable:
        """A turn's moves, those in flight when it begins, last uses, and sums that are there."""
        moves = [
            (move.kind, move.block.chunk, move.start - ticks.start, move.arrive - ticks.start)
            for move in self.schedule.moves
            if move.start in ticks or move.start < ticks.start <= move.arrive
        ]
        last = [tick - ticks.start for tick in ticks if tick in self.last_uses]
        adds = [tick - ticks.start for tick in ticks if self.adds(tick)]
        return moves, last, adds
