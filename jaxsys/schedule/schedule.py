"""A Schedule: where every block of data is, and what is computed, at every tick of a step.

Plain frozen data, made and checked without a device. Time is cut into ticks; in a tick a device

1. at the head lets every move with `start == tick` depart, from what it holds at that moment
   (a move with `arrive == start` also lands before the tick's tasks: its transfer is exposed);
2. runs its tasks, at most one of each kind, in the order F, B or I, W;
3. at the end takes in every move with `arrive == tick + 1` and then adds the gradient
   contributions of the tick's tasks to the accumulators it holds.

So a move with `arrive == start + 1` travels while the tick computes. Ticks have no length of their
own: `simulate` gives them one, `jaxsys.lowering` turns them into a jitted step.

Legend: P devices, C chunks (consecutive layers), M microbatches.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property

from jaxsys.axes import AROUND, CALLED, DividedAround, parts_sharing
from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import parse_json, shown

from .inside import why_not_divided

FORMAT_VERSION = 1
MOST_OBJECTS = 1_000_000
"""Of tasks, moves and their blocks in a file."""
MOST_TICKS = 1_000_000
"""Of a schedule in a file."""
_NESTED = ("format", "owners", "starts", "tasks", "moves")
ALL = -1
"""Stands for every device, as source and target of a group collective."""


class ScheduleError(ValueError):
    """A schedule breaks a rule: says which task or move, where and when."""


class TaskKind(StrEnum):
    """What is computed on one chunk of one microbatch."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both gradients: I and W in one."""
    INPUT_GRADIENT = "I"
    """dL/dx of a chunk: needs its weights, is on the critical path."""
    WEIGHT_GRADIENT = "W"
    """dL/dw of a chunk: needs no weights, only what I left behind, and can wait."""


class Data(StrEnum):
    """The kinds of data a schedule keeps track of."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    """A partial sum of a chunk's weight gradient, in the accumulator's dtype."""
    ACTIVATION = "activation"
    """Input of chunk c (so c == C is the last chunk's output, which the head reads)."""
    COTANGENT = "cotangent"
    """Gradient of the loss with respect to the output of chunk c."""
    RESIDUAL = "residual"
    """What F keeps for the backward pass of the same chunk and microbatch; never moves."""
    TAP = "tap"
    """What I keeps for W; never moves."""


class MoveKind(StrEnum):
    """How data moves."""

    PERMUTE = "permute"
    COPY = "copy"
    """Within a device, from one lane to another."""
    ALL_GATHER = "all_gather"
    """Weights, from their shards to every device."""
    REDUCE_SCATTER = "reduce_scatter"
    """Gradients, from every device's partial sum to the shards."""
    ALL_REDUCE = "all_reduce"
    """Gradients, from every device's partial sum to every device."""


class Placement(StrEnum):
    """Where a chunk's parameters and optimizer state rest between steps."""

    OWNER = "owner"
    """Each chunk whole on one device."""
    REPLICATED = "replicated"
    """Each chunk whole on every device."""
    SHARDED = "sharded"
    """Each chunk cut evenly over all devices."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Block:
    """The name of a block of data; copies of it may be on several devices at once."""

    data: Data
    chunk: int
    microbatch: int = -1
    """-1 for weights and gradients."""
    lane: str = ""
    """Tells apart two copies of a chunk's weights that travel separately."""

    def __str__(self) -> str:
        lane = f"/{self.lane}" if self.lane else ""
        microbatch = f",{self.microbatch}" if self.microbatch >= 0 else ""
        return f"{self.data}({self.chunk}{microbatch}){lane}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One computation: kind, on which chunk and microbatch, on which device, in which tick."""

    tick: int
    device: int
    kind: TaskKind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        where = f"tick {self.tick} device {self.device}"
        return f"{self.kind}(chunk={self.chunk}, microbatch={self.microbatch}) at {where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One transfer of a block, in flight from the head of `start` until the head of `arrive`.

    A gradient leaves its source (the sum moves); everything else is copied.
    """

    kind: MoveKind
    block: Block
    source: int
    target: int
    start: int
    arrive: int
    to_lane: str | None = None
    """The lane it lands in, where that is not the block's own."""

    @property
    def landed(self) -> Block:
        """The block as the target knows it."""
        if self.to_lane is None:
            return self.block
        b = self.block
        return Block(data=b.data, chunk=b.chunk, microbatch=b.microbatch, lane=self.to_lane)

    def __str__(self) -> str:
        ends = "all" if self.source == ALL else f"{self.source}->{self.target}"
        return f"{self.kind} {self.block} {ends} ticks {self.start}..{self.arrive}"


@dataclass(frozen=True, kw_only=True)
class Schedule(DividedAround):
    """A whole training step. `jaxsys.schedule.check` proves it; nothing here needs a device.

    What a plan has around these devices, or within each, is said beside (`DividedAround`).
    """

    name: str
    devices: int
    """P."""
    chunks: int
    """C, numbered in layer order."""
    microbatches: int
    """M, over all devices of the ring."""
    placement: Placement
    owners: tuple[int, ...] = ()
    """Chunk -> device, for Placement.OWNER; empty otherwise."""
    starts: tuple[tuple[Block, int], ...] = ()
    """Weight copies that are made from the parameters at rest before tick 0: (block, device)."""
    tasks: tuple[Task, ...]
    moves: tuple[Move, ...] = ()
    forward_lane: str = ""
    """The lane F reads weights from."""
    backward_lane: str = ""
    """The lane B and I read weights from."""

    def __post_init__(self) -> None:
        around = (axis.name for axis in AROUND.values())
        for field in ("devices", "chunks", "microbatches", *around):
            if getattr(self, field) < 1:
                raise ScheduleError(f"{field}={getattr(self, field)} must be at least 1")
        refused = why_not_divided(self)
        if refused is not None:
            raise ScheduleError(refused)
        if self.placement is Placement.OWNER:
            if len(self.owners) != self.chunks:
                raise ScheduleError(f"{len(self.owners)} owners for {self.chunks} chunks")
            per_device = Counter(self.owners)
            each_owns = set(range(min(self.devices, self.chunks + 1))) == set(per_device)
            if not each_owns or len(set(per_device.values())) != 1:
                raise ScheduleError(
                    f"owners={self.owners} must give each of {self.devices} devices as many chunks"
                )

    @property
    def sharers(self) -> int:
        """Devices over which what is gathered and summed in shards lies, for each of `devices`."""
        return parts_sharing(self) if self.placement is Placement.SHARDED else 1

    @cached_property
    def ticks(self) -> int:
        """T: one more than the last tick in which anything happens."""
        last_task = max((task.tick for task in self.tasks), default=-1)
        last_move = max((max(m.start, m.arrive - 1) for m in self.moves), default=-1)
        return max(last_task, last_move) + 1

    @cached_property
    def tasks_by_tick(self) -> tuple[tuple[Task, ...], ...]:
        """Tasks of each tick, in the order they run on a device: F, then B or I, then W."""
        rows: list[list[Task]] = [[] for _ in range(self.ticks)]
        for task in self.tasks:
            rows[task.tick].append(task)
        order = list(TaskKind)
        return tuple(tuple(sorted(r, key=lambda t: (t.device, order.index(t.kind)))) for r in rows)

    @cached_property
    def moves_by_start(self) -> tuple[tuple[Move, ...], ...]:
        """Moves that depart at the head of each tick, in the order given."""
        rows: list[list[Move]] = [[] for _ in range(self.ticks)]
        for move in self.moves:
            rows[move.start].append(move)
        return tuple(tuple(row) for row in rows)

    @cached_property
    def microbatch_devices(self) -> tuple[frozenset[int], ...]:
        """For each microbatch the devices that read its data, in the first and last chunk."""
        readers: list[set[int]] = [set() for _ in range(self.microbatches)]
        for task in self.tasks:
            ends = task.chunk in (0, self.chunks - 1)
            if ends and task.kind is not TaskKind.WEIGHT_GRADIENT:
                readers[task.microbatch].add(task.device)
        return tuple(frozenset(r) for r in readers)

    def weight(self, chunk: int, kind: TaskKind) -> Block:
        """The weight copy that a task of this kind reads."""
        lane = self.forward_lane if kind is TaskKind.FORWARD else self.backward_lane
        return Block(data=Data.WEIGHT, chunk=chunk, lane=lane)

    def to_json(self) -> str:
        """The schedule as versioned JSON, for `from_json`."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Reads `to_json`'s text.

        Raises:
            ScheduleError: if the text is not such a schedule, or of another format version.
        """
        try:
            raw = Fields(parse_json(text, name="it", most_containers=MOST_OBJECTS), name="")
            version = raw.get("format")
        except UsageError as error:
            raise ScheduleError(f"not a schedule in JSON: {error}") from error
        if isinstance(version, str):
            raise ScheduleError(f"this is a {shown(version)[1:-1]}, not a schedule")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ScheduleError(
                f"schedule format {shown(version)}, but this version reads {FORMAT_VERSION}"
            )
        try:
            return cls._of(raw)
        except UsageError as error:
            raise ScheduleError(str(error)) from error

    @classmethod
    def _of(cls, raw: Fields) -> "Schedule":
        """Raises UsageError if a field is not what it must be."""
        around = [axis.name for axis in AROUND.values() if axis.name in raw.value]
        for name in ("devices", "chunks", "microbatches", *around):
            raw.integer(name, least=1, most=MOST_TICKS)
        tasks = tuple(task.record(Task) for task in raw.objects("tasks"))
        moves = tuple(
            move.record(Move, block=move.fields("block").record(Block))
            for move in raw.objects("moves")
        )
        starts = []
        for index, start in enumerate(raw.array("starts")):
            if not isinstance(start, list) or len(start) != 2 or type(start[1]) is not int:
                raise raw.wrong(f"starts[{index}]", "a block and a device", start)
            block = Fields(start[0], name=raw.name, at=f"starts[{index}][0]").record(Block)
            starts.append((block, start[1]))
        times = [time for move in moves for time in (move.start, move.arrive)]
        for time in (*times, *(task.tick for task in tasks)):
            if not 0 <= time <= MOST_TICKS:
                raise UsageError(f"tick {time} must be from 0 to {MOST_TICKS}")
        plain = Fields({k: v for k, v in raw.value.items() if k not in _NESTED}, name=raw.name)
        return plain.record(
            cls,
            called=CALLED,
            owners=tuple(raw.array("owners", of=int)),
            starts=tuple(starts),
            tasks=tasks,
            moves=moves,
        )
