"""Which ticks share one compiled body.

What all devices share about a tick, its signature, is static. Ticks whose signatures repeat are
folded into one loop, and the few odd ones at the ends of a step share a body with masks.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from jaxsys.schedule import Data, MoveKind, TaskKind

BufferKey = tuple[Data, str]
"""A kind of data and its lane: one buffer with some slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSignature:
    """What is static about a kind of task in a tick."""

    kind: TaskKind
    everyone: bool
    """Every device runs it, so nothing has to be masked."""
    first: str
    """Whether it is the first chunk: "never", "always", or "some" devices."""
    last: str
    """Likewise for the last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSignature:
    """What is static about a group of moves that one collective carries."""

    kind: MoveKind
    source: BufferKey
    target: BufferKey
    exposed: bool
    merge: bool
    """The gradients it brings are added to what is there."""
    number: int = 0
    """Tells apart groups of a tick that are alike but for who sends."""
    everyone: bool = False
    """Every device receives in this very tick, so that nothing has to be masked."""
    pairs: frozenset[tuple[int, int]] = field(default=frozenset(), compare=False)
    """The (source, target) pairs of its permute."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a group has in common with the one that it falls together with in another tick."""
        return not self.exposed, self.source, self.kind, self.target, self.merge, self.number

    @property
    def name(self) -> str:
        """How the table's columns call it."""
        return "{}.{}.{}.{}.{}.{}".format(*self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class TickSignature:
    """What all devices share about a tick."""

    tasks: tuple[TaskSignature, ...]
    groups: tuple[GroupSignature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`repeats` times a period of ticks with the same signatures."""

    start: int
    period: tuple[TickSignature, ...]
    repeats: int


def fold(signatures: list[TickSignature], *, longest: int = 64) -> list[Segment]:
    """Cuts a run of ticks into repeated periods, so that the least is written out.

    Dynamic programming over the first tick: the cost of a segment is the length of its period.
    Ticks fall together only where one signature serves them all, see `join`.
    """
    ticks = len(signatures)
    joins = _Joins()
    signatures = [joins.own(signature) for signature in signatures]
    best: list[tuple[int, int, int]] = [(0, 0, 0)] * (ticks + 1)
    for start in range(ticks - 1, -1, -1):
        options = []
        for period in range(1, min(longest, ticks - start) + 1):
            if period > 1 and start + 2 * period > ticks:
                break
            repeats, _ = joins.repeat(signatures, start, period)
            if repeats == 1 and period > 1:
                continue
            cost = period + best[start + repeats * period][0]
            options.append((cost, period, repeats))
        best[start] = min(options)
    segments, tick = [], 0
    while tick < ticks:
        _, period, repeats = best[tick]
        _, common = joins.repeat(signatures, tick, period)
        segments.append(Segment(start=tick, period=tuple(common), repeats=repeats))
        tick += period * repeats
    return segments


MOST_TICKS_THAT_PAY = 4
"""How many ticks of a shared body may pay for masks that they alone would not need."""


def share_bodies(segments: list[Segment]) -> tuple[Segment, ...]:
    """Lets the few ticks at the ends of a step share a body, with masks for what some lack.

    While a schedule fills and drains hardly two ticks are alike, and each would be compiled for
    itself. Permutes are never masked: what is sent stays what the schedule says.
    """
    shared: list[list[Segment]] = []
    for segment in segments:
        if shared and _shared(together := [*shared[-1], segment]) is not None:
            shared[-1] = together
        else:
            shared.append([segment])
    return tuple(_shared(row) or row[0] for row in shared)


def _shared(segments: list[Segment]) -> Segment | None:
    """The segments as one, or None where they cannot be or too many ticks would pay."""
    if any(len(segment.period) > 1 for segment in segments):
        return None
    body: TickSignature | None = segments[0].period[0]
    for segment in segments[1:]:
        body = body and join(body, segment.period[0], masks=True)
    if body is None:
        return None
    pay = [
        segment.repeats
        for segment in segments
        if _busy(segment.period[0]) or not _same_kinds(segment.period[0], body)
    ]
    if len(segments) > 1 and sum(pay) > MOST_TICKS_THAT_PAY:
        return None
    if len(segments) > 1 and all(_busy(segment.period[0]) for segment in segments):
        return None  # nothing is masked yet, and what a branch passes on XLA may copy
    repeats = sum(segment.repeats for segment in segments)
    return Segment(start=segments[0].start, period=(body,), repeats=repeats)


def join(one: TickSignature, other: TickSignature, *, masks: bool = False) -> TickSignature | None:
    """The signature that serves both ticks, or None.

    It masks what only some devices do in either. Unless `masks`, a tick in which every device runs
    every task is joined with its like alone, since it would pay for masks that it does not need,
    and none is joined with one that has other kinds of tasks or moves.
    """
    alone = _busy(one) or _busy(other) or not _same_kinds(one, other)
    if alone and one != other and not masks:
        return None
    tasks = [
        _join_tasks([task for tick in (one, other) for task in tick.tasks if task.kind is kind])
        for kind in TaskKind
        if any(task.kind is kind for tick in (one, other) for task in tick.tasks)
    ]
    groups = []
    for key in sorted({group.key for tick in (one, other) for group in tick.groups}):
        same = [group for tick in (one, other) for group in tick.groups if group.key == key]
        if len(same) == 1 and same[0].kind is not MoveKind.COPY:
            return None
        pairs = same[0].pairs | same[-1].pairs
        if not _is_permutation(pairs):
            return None
        everyone = len(same) == 2 and all(group.everyone for group in same)
        groups.append(replace(same[0], everyone=everyone, pairs=pairs))
    return TickSignature(tasks=tuple(tasks), groups=tuple(groups))


def _join_tasks(tasks: list[TaskSignature]) -> TaskSignature:
    """One kind of task, of two ticks or of one that another lacks."""
    a, b = tasks[0], tasks[-1]
    return TaskSignature(
        kind=a.kind,
        everyone=len(tasks) == 2 and a.everyone and b.everyone,
        first=a.first if a.first == b.first else "some",
        last=a.last if a.last == b.last else "some",
    )


def _busy(tick: TickSignature) -> bool:
    return all(task.everyone for task in tick.tasks)


def _same_kinds(one: TickSignature, other: TickSignature) -> bool:
    return [task.kind for task in one.tasks] == [task.kind for task in other.tasks] and [
        group.key for group in one.groups
    ] == [group.key for group in other.groups]


class _Joins:
    """Joins of ticks, each made once: a step has few that differ."""

    def __init__(self) -> None:
        self._known: dict[Any, TickSignature] = {}
        self._made: dict[tuple[int, int], TickSignature | None] = {}

    def own(self, tick: TickSignature) -> TickSignature:
        """The one object that stands for all ticks of this signature and these pairs."""
        return self._known.setdefault((tick, tuple(group.pairs for group in tick.groups)), tick)

    def join(self, one: TickSignature, other: TickSignature) -> TickSignature | None:
        """`join` of two that are `own`."""
        key = id(one), id(other)
        if key not in self._made:
            made = join(one, other)
            self._made[key] = None if made is None else self.own(made)
        return self._made[key]

    def repeat(
        self, ticks: list[TickSignature], start: int, period: int
    ) -> tuple[int, list[TickSignature]]:
        """How often a period from `start` on repeats, and what serves all its repeats."""
        common, repeats = ticks[start : start + period], 1
        while start + (repeats + 1) * period <= len(ticks):
            tried = []
            for k in range(period):
                joined = self.join(common[k], ticks[start + repeats * period + k])
                if joined is None:
                    return repeats, common
                tried.append(joined)
            common, repeats = tried, repeats + 1
        return repeats, common


def _is_permutation(pairs: frozenset[tuple[int, int]]) -> bool:
    return len({s for s, _ in pairs}) == len(pairs) == len({t for _, t in pairs})
