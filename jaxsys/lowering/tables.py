"""Turns a schedule into static tables that every device indexes with its own row.

Copies get buffer slots by their lifetimes (interval colouring, so a device needs as many slots as
it holds copies at once). Each tick becomes a row of small integers per device: which slot to read,
which to write, which chunk and microbatch. What all devices share about a tick, its signature, is
static; ticks whose signatures repeat are folded into one scan.
"""

from dataclasses import dataclass, replace

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.schedule import (
    ALL,
    Copy,
    Data,
    Move,
    MoveKind,
    Placement,
    Schedule,
    TaskKind,
    Trace,
    gradient_block,
    task_inputs,
    task_outputs,
)

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
    everyone: bool = False
    """Every device receives in this very tick, so that nothing has to be masked."""


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
    pairs: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    """pairs[position in period][group]: the (source, target) pairs of its permute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Everything the lowering needs to know of a schedule."""

    columns: dict[str, int]
    rows: np.ndarray
    """int32 [P, T, columns]."""
    slots: dict[BufferKey, int]
    """How many slots each buffer has."""
    start_slots: dict[BufferKey, np.ndarray]
    """Weight lane -> int32 [P, V]: the slot of each chunk at rest, -1 where it does not start."""
    final_slots: np.ndarray
    """int32 [P, V]: where the gradient of each chunk at rest ends (Placement.OWNER)."""
    local_chunks: np.ndarray
    """int32 [P, V]: the chunks that rest on each device, in chunk order."""
    microbatch_order: np.ndarray | None
    """int32 [M], microbatches grouped by their reader; None where one has several readers."""
    segments: tuple[Segment, ...]


def build_tables(schedule: Schedule, found: Trace) -> Tables:
    """Makes the tables of a checked schedule.

    Raises:
        UsageError: for what the compiled step cannot do: moves in flight for more than a tick.
    """
    return _Builder(schedule, found).build()


class _Builder:
    def __init__(self, schedule: Schedule, found: Trace) -> None:
        self.schedule, self.found = schedule, found
        self.columns: dict[str, int] = {}
        self.cells: dict[tuple[int, int, int], int] = {}
        self.slots: dict[BufferKey, int] = {}
        self.slot_of: dict[tuple[int, object], list[tuple[Copy, int]]] = {}

    def build(self) -> Tables:
        schedule = self.schedule
        for move in schedule.moves:
            if move.kind not in (MoveKind.PERMUTE, MoveKind.COPY, MoveKind.ALL_REDUCE):
                raise UsageError(f"{schedule.name}: {move.kind} is not lowered by this step")
            if move.arrive > move.start + 1:
                raise UsageError(f"{move} is in flight for more than one tick")
        self.assign_slots()
        order = self.microbatch_order()
        local = self.local_microbatches(order)
        signatures, pairs = [], []
        for tick in range(schedule.ticks):
            tasks = self.task_row(tick, local)
            groups, group_pairs = self.group_row(tick)
            signatures.append(TickSignature(tasks=tasks, groups=groups))
            pairs.append(group_pairs)
        rows = np.zeros((schedule.devices, schedule.ticks, len(self.columns)), np.int32)
        for (device, tick, column), value in self.cells.items():
            rows[device, tick, column] = value
        chunks = self.local_chunks()
        return Tables(
            columns=self.columns,
            rows=rows,
            slots=self.slots,
            start_slots=self.start_slots(chunks),
            final_slots=self.final_slots(chunks),
            local_chunks=chunks,
            microbatch_order=order,
            segments=fold(signatures, pairs),
        )

    def set(self, tick: int, device: int, name: str, value: int) -> None:
        column = self.columns.setdefault(name, len(self.columns))
        self.cells[device, tick, column] = value

    def assign_slots(self) -> None:
        for device in range(self.schedule.devices):
            free_from: dict[BufferKey, list[int]] = {}
            for copy in self.found.on_device(device):
                key = (copy.block.data, copy.block.lane)
                ends = free_from.setdefault(key, [])
                slot = next((i for i, end in enumerate(ends) if end < copy.born), len(ends))
                if slot == len(ends):
                    ends.append(-1)
                ends[slot] = copy.last_use
                self.slot_of.setdefault((device, copy.block), []).append((copy, slot))
            for key, ends in free_from.items():
                self.slots[key] = max(self.slots.get(key, 0), len(ends))

    def slot(self, device: int, block: object, tick: int) -> int:
        """The slot of the copy of a block that is there at the head of a tick."""
        for copy, slot in reversed(self.slot_of[device, block]):
            if copy.born <= tick:
                return slot
        raise AssertionError(f"{block} has no copy on device {device} at tick {tick}")

    def microbatch_order(self) -> np.ndarray | None:
        readers = self.schedule.microbatch_devices
        per_device: list[list[int]] = [[] for _ in range(self.schedule.devices)]
        for microbatch, devices in enumerate(readers):
            if len(devices) != 1:
                return None
            per_device[next(iter(devices))].append(microbatch)
        if len({len(row) for row in per_device}) != 1:
            return None
        return np.array([m for row in per_device for m in row], np.int32)

    def local_microbatches(self, order: np.ndarray | None) -> dict[int, int]:
        if order is None:
            return {m: m for m in range(self.schedule.microbatches)}
        share = len(order) // self.schedule.devices
        return {int(m): place % share for place, m in enumerate(order)}

    def task_row(self, tick: int, local: dict[int, int]) -> tuple[TaskSignature, ...]:
        schedule = self.schedule
        fresh = {c.task: c.fresh for c in self.found.contributions}
        by_kind: dict[TaskKind, list] = {}
        for task in schedule.tasks_by_tick[tick]:
            by_kind.setdefault(task.kind, []).append(task)
            device, kind = task.device, task.kind
            self.set(tick, device, f"{kind}.valid", 1)
            self.set(tick, device, f"{kind}.chunk", task.chunk)
            self.set(tick, device, f"{kind}.microbatch", local[task.microbatch])
            for block in task_inputs(schedule, task):
                name = f"{kind}.in.{block.data}"
                self.set(tick, device, name, self.slot(device, block, tick))
            for block in task_outputs(schedule, task):
                name = f"{kind}.out.{block.data}"
                self.set(tick, device, name, self.slot(device, block, tick + 1))
            if task in fresh:
                block = gradient_block(task.chunk)
                self.set(tick, device, f"{kind}.out.gradient", self.slot(device, block, tick + 1))
                self.set(tick, device, f"{kind}.fresh", int(fresh[task]))
        signatures = []
        for kind in TaskKind:
            tasks = by_kind.get(kind, [])
            if tasks:
                signatures.append(
                    TaskSignature(
                        kind=kind,
                        everyone=len(tasks) == schedule.devices,
                        first=_share(task.chunk == 0 for task in tasks),
                        last="never"
                        if kind is TaskKind.FORWARD  # the head belongs to the backward pass
                        else _share(task.chunk == schedule.chunks - 1 for task in tasks),
                    )
                )
        return tuple(signatures)

    def group_row(self, tick: int):
        groups: list[tuple[GroupSignature, list[Move]]] = []
        for move in self.schedule.moves_by_start[tick]:
            signature = self.group_signature(move)
            for known, moves in groups:
                clash = any(
                    move.source == ALL or m.source == move.source or m.target == move.target
                    for m in moves
                )
                if known == signature and not clash:
                    moves.append(move)
                    break
            else:
                groups.append((signature, [move]))
        groups.sort(key=lambda g: (not g[0].exposed, g[0].source, g[0].kind))
        for index, (_, moves) in enumerate(groups):
            for move in moves:
                everyone = range(self.schedule.devices)
                sources = everyone if move.source == ALL else [move.source]
                targets = everyone if move.target == ALL else [move.target]
                for device in sources:
                    self.set(tick, device, f"{index}.send", self.slot(device, move.block, tick))
                for device in targets:
                    self.set(tick, device, f"{index}.valid", 1)
                    if move.kind is MoveKind.ALL_REDUCE:
                        self.set(tick, device, f"{index}.receive", move.block.chunk)
                    else:
                        slot = self.slot(device, move.landed, move.arrive)
                        self.set(tick, device, f"{index}.receive", slot)
        everyone = self.schedule.devices
        return (
            tuple(
                replace(signature, everyone=moves[0].source == ALL or len(moves) == everyone)
                for signature, moves in groups
            ),
            tuple(
                tuple(sorted((m.source, m.target) for m in moves if m.source != ALL))
                for _, moves in groups
            ),
        )

    def group_signature(self, move: Move) -> GroupSignature:
        return GroupSignature(
            kind=move.kind,
            source=(move.block.data, move.block.lane),
            target=(move.landed.data, move.landed.lane),
            exposed=move.arrive == move.start,
            merge=move in self.found.merges,
        )

    def local_chunks(self) -> np.ndarray:
        schedule = self.schedule
        if schedule.placement is Placement.REPLICATED:
            return np.tile(np.arange(schedule.chunks, dtype=np.int32), (schedule.devices, 1))
        return np.array(
            [
                [c for c in range(schedule.chunks) if schedule.owners[c] == device]
                for device in range(schedule.devices)
            ],
            np.int32,
        )

    def start_slots(self, chunks: np.ndarray) -> dict[BufferKey, np.ndarray]:
        table: dict[BufferKey, np.ndarray] = {}
        for block, device in self.schedule.starts:
            row = table.setdefault((block.data, block.lane), np.full(chunks.shape, -1, np.int32))
            place = int(np.flatnonzero(chunks[device] == block.chunk)[0])
            row[device, place] = self.slot_of[device, block][0][1]
        return table

    def final_slots(self, chunks: np.ndarray) -> np.ndarray:
        final = np.zeros(chunks.shape, np.int32)
        if self.schedule.placement is Placement.OWNER:
            for device, place in np.ndindex(chunks.shape):
                block = gradient_block(int(chunks[device, place]))
                final[device, place] = self.slot(device, block, self.schedule.ticks)
        return final


def fold(signatures: list[TickSignature], pairs: list, *, longest: int = 64) -> tuple[Segment, ...]:
    """Cuts a run of ticks into repeated periods, so that the least is written out.

    Dynamic programming over the first tick: the cost of a segment is the length of its period.
    Ticks fall together only where one signature serves them all (see `join`) and the union of their
    (source, target) pairs is still a permutation.
    """
    ticks = len(signatures)
    best: list[tuple[int, int, int]] = [(0, 0, 0)] * (ticks + 1)
    for start in range(ticks - 1, -1, -1):
        options = []
        for period in range(1, min(longest, ticks - start) + 1):
            if period > 1 and start + 2 * period > ticks:
                break
            repeats = 1
            while _period(signatures, start, period, repeats + 1) is not None:
                repeats += 1
            while repeats > 1 and not all(
                _is_permutation(_union(pairs, start + k, period, repeats)) for k in range(period)
            ):
                repeats -= 1
            if repeats == 1 and period > 1:
                continue
            cost = period + best[start + repeats * period][0]
            options.append((cost, period, repeats))
        best[start] = min(options)
    segments, tick = [], 0
    while tick < ticks:
        _, period, repeats = best[tick]
        common = _period(signatures, tick, period, repeats)
        assert common is not None
        segments.append(
            Segment(
                start=tick,
                period=common,
                repeats=repeats,
                pairs=tuple(
                    tuple(
                        tuple(sorted(group)) for group in _union(pairs, tick + k, period, repeats)
                    )
                    for k in range(period)
                ),
            )
        )
        tick += period * repeats
    return tuple(segments)


def join(one: TickSignature, other: TickSignature) -> TickSignature | None:
    """The signature that serves both ticks, or None.

    It masks what only some devices do in either. A tick in which every device runs every task is
    joined with its like alone: it would pay for masks that it does not need.
    """
    if one == other:
        return one
    if _busy(one) or _busy(other) or len(one.tasks) != len(other.tasks):
        return None
    if [replace(group, everyone=True) for group in one.groups] != [
        replace(group, everyone=True) for group in other.groups
    ]:
        return None
    tasks = []
    for a, b in zip(one.tasks, other.tasks, strict=True):
        if a.kind is not b.kind:
            return None
        tasks.append(
            TaskSignature(
                kind=a.kind,
                everyone=a.everyone and b.everyone,
                first=a.first if a.first == b.first else "some",
                last=a.last if a.last == b.last else "some",
            )
        )
    groups = [
        replace(a, everyone=a.everyone and b.everyone)
        for a, b in zip(one.groups, other.groups, strict=True)
    ]
    return TickSignature(tasks=tuple(tasks), groups=tuple(groups))


def _busy(tick: TickSignature) -> bool:
    return all(task.everyone for task in tick.tasks)


def _period(
    signatures: list[TickSignature], start: int, period: int, repeats: int
) -> tuple[TickSignature, ...] | None:
    """What serves `repeats` periods from `start` on; None where nothing does."""
    if start + repeats * period > len(signatures):
        return None
    common = []
    for k in range(period):
        joined: TickSignature | None = signatures[start + k]
        for r in range(1, repeats):
            joined = join(joined, signatures[start + r * period + k])
            if joined is None:
                return None
        common.append(joined)
    return tuple(common)


def _union(pairs: list, tick: int, period: int, repeats: int) -> list[set[tuple[int, int]]]:
    groups: list[set[tuple[int, int]]] = [set(group) for group in pairs[tick]]
    for r in range(1, repeats):
        for group, more in zip(groups, pairs[tick + r * period], strict=True):
            group |= set(more)
    return groups


def _is_permutation(groups: list[set[tuple[int, int]]]) -> bool:
    return all(
        len({s for s, _ in group}) == len(group) == len({t for _, t in group}) for group in groups
    )


def _share(flags) -> str:
    listed = list(flags)
    return "always" if all(listed) else "some" if any(listed) else "never"
