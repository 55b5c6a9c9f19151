"""Turns a schedule into static tables that every device indexes with its own row.

Copies get buffer slots by their lifetimes (interval colouring, so a device needs as many slots as
it holds copies at once). Each tick becomes a row of small integers per device: which slot to read,
which to write, which chunk and microbatch. `bodies` folds the ticks into loops.
"""

from collections.abc import Sequence
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

from .bodies import (
    BufferKey,
    GroupSignature,
    Segment,
    TaskSignature,
    TickSignature,
    fold,
    share_bodies,
)
from .refusal import why_not_lowered


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """What a device keeps from tick to tick, and what it takes in."""

    slots: dict[BufferKey, int]
    """How many slots each buffer has."""
    groups: tuple[tuple[GroupSignature, ...], ...]
    """What starts to move in a tick; ticks that are alike once."""


def buffers_of(schedule: Schedule, found: Trace) -> Buffers:
    """The buffers of a checked schedule's tables, without the tables."""
    return Buffers(
        slots=_most_at_once(schedule, found),
        groups=tuple(
            dict.fromkeys(
                tuple(sorted(_grouped(row, found), key=lambda group: group.key))
                for row in schedule.moves_by_start
            )
        ),
    )


def _most_at_once(schedule: Schedule, found: Trace) -> dict[BufferKey, int]:
    """For each buffer the most copies that one device has of it at once: as many slots do."""
    spans: dict[BufferKey, list[tuple[int, int, int]]] = {}
    for copy in found.copies:
        span = copy.device, copy.born, copy.last_use + 1
        spans.setdefault((copy.block.data, copy.block.lane), []).append(span)
    most = {}
    width = schedule.ticks + 3
    for key, rows in spans.items():
        device, born, gone = np.array(rows).T
        places = schedule.devices * width
        change = np.bincount(device * width + born, minlength=places)
        change -= np.bincount(device * width + gone, minlength=places)
        most[key] = int(change.reshape(schedule.devices, width).cumsum(1).max())
    return most


def _grouped(moves: Sequence[Move], found: Trace) -> dict[GroupSignature, list[Move]]:
    """A tick's moves in groups that one collective carries: of each device one to send and one to
    receive at most."""
    groups: dict[GroupSignature, list[Move]] = {}
    sources: dict[GroupSignature, set[int]] = {}
    targets: dict[GroupSignature, set[int]] = {}
    for move in moves:
        signature = _signature(move, found)
        while signature in groups and (
            move.source == ALL
            or move.source in sources[signature]
            or move.target in targets[signature]
        ):
            signature = replace(signature, number=signature.number + 1)
        groups.setdefault(signature, []).append(move)
        sources.setdefault(signature, set()).add(move.source)
        targets.setdefault(signature, set()).add(move.target)
    return groups


def _signature(move: Move, found: Trace) -> GroupSignature:
    block = move.block
    return GroupSignature(
        kind=move.kind,
        source=(block.data, block.lane),
        target=(block.data, block.lane if move.to_lane is None else move.to_lane),
        exposed=move.arrive == move.start,
        # Only sums merge, and other moves take long to look up.
        merge=block.data is Data.GRADIENT and move in found.merges,
    )


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
        refused = why_not_lowered(schedule)
        if refused is not None:
            raise UsageError(refused)
        self.assign_slots()
        order = self.microbatch_order()
        local = self.local_microbatches(order)
        signatures = [
            TickSignature(tasks=self.task_row(tick, local), groups=self.group_row(tick))
            for tick in range(schedule.ticks)
        ]
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
            segments=share_bodies(fold(signatures)),
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

    def group_row(self, tick: int) -> tuple[GroupSignature, ...]:
        everyone = range(self.schedule.devices)
        groups = _grouped(self.schedule.moves_by_start[tick], self.found)
        row = []
        for group, moves in groups.items():
            for move in moves:
                sources = everyone if move.source == ALL else [move.source]
                targets = everyone if move.target == ALL else [move.target]
                for device in sources:
                    slot = self.slot(device, move.block, tick)
                    self.set(tick, device, f"{group.name}.send", slot)
                for device in targets:
                    self.set(tick, device, f"{group.name}.valid", 1)
                    if move.kind is MoveKind.ALL_REDUCE:
                        slot = move.block.chunk
                    else:
                        slot = self.slot(device, move.landed, move.arrive)
                    self.set(tick, device, f"{group.name}.receive", slot)
            row.append(
                replace(
                    group,
                    everyone=moves[0].source == ALL or len(moves) == len(everyone),
                    pairs=frozenset((m.source, m.target) for m in moves if m.source != ALL),
                )
            )
        return tuple(sorted(row, key=lambda group: group.key))

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


def _share(flags) -> str:
    listed = list(flags)
    return "always" if all(listed) else "some" if any(listed) else "never"
