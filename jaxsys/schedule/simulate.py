"""Gives a schedule its time, bytes and memory by event simulation.

Every device has one compute stream and one in-order communication stream in each direction. A
move begins when its source has the data, both ends have reached the head of its tick and both
streams are free; both ends wait for it where it must have arrived. That is what the compiled step
does, so a transfer is hidden only where a tick's compute really covers it. No "sum minus overlap".
Where the link has a `contention`, compute beside transfers takes that much longer; beside one that
is open and waits for its other end, as a kernel of NCCL's does, `waiting_contention` longer.

`lockstep` couples the devices more: every tick starts on all at once, as the turns of a ring are
counted on paper. `eager_sends` couples them less: a send waits for its data and for nothing of its
target, and whoever reads a block waits for that block alone, as in a pipeline where every device
runs a program of its own; the formulas of published pipelines assume this.

Where the members of a node share each place (`Schedule.members`), a device stands for one of them.
What it sends to the next place is its piece; what members send each other, to join pieces before a
task and to cut a gradient after it, goes over their own link and is waited for.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from jaxsys.errors import UsageError

from .inside import Inside
from .schedule import ALL, Block, Data, Move, MoveKind, Schedule, Task, TaskKind
from .trace import Trace, gradient_block, task_inputs, task_outputs, trace

JOINED, CUT = "pieces joined", "gradients cut"
"""What the members of a place send each other, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins two neighbours: time of a message of n bytes is `latency_s + n / bytes_per_s`."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    launch_s: float = 0.0
    """Fixed cost of starting one transfer or collective, however many messages it takes."""
    contention: float = 0.0
    """By what share compute takes longer while its device sends."""
    waiting_contention: float = 0.0
    """Likewise while its device is ready to send and its target is not."""
    switch_s: float | None = None
    """Of a collective that a switch of these devices runs, however many they are; None: none does,
    and collectives go round a ring."""

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise UsageError(f"bytes_per_s={self.bytes_per_s!r} must be above 0")
        for name in ("latency_s", "launch_s", "contention", "waiting_contention", "switch_s"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name}={value!r} must not be below 0")

    def transfer_s(self, size_bytes: float, *, messages: int = 1) -> float:
        """Seconds for `size_bytes` in `messages` dependent messages."""
        return self.launch_s + messages * self.latency_s + size_bytes / self.bytes_per_s

    def collective_s(self, size_bytes: float, *, devices: int, rounds: int = 1) -> float:
        """Seconds of a ring collective over a block of `size_bytes` on each of `devices`.

        One round for an all_gather or reduce_scatter, two for an all_reduce.
        """
        sent = rounds * (devices - 1) / devices * size_bytes
        return self.transfer_s(sent, messages=rounds * (devices - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one chunk costs. A single number holds for every chunk; a sequence gives one each."""

    forward_s: float | Sequence[float]
    backward_s: float | Sequence[float]
    """B: both gradients, with recompute if there is any."""
    input_gradient_s: float | Sequence[float] = 0.0
    weight_gradient_s: float | Sequence[float] = 0.0
    embed_s: float = 0.0
    """Added to F of the first chunk, and again to its backward pass."""
    head_s: float = 0.0
    """Head and loss, forward and backward: added to the backward pass of the last chunk."""
    update_s: float = 0.0
    """Optimizer, after everything else."""
    before_s: float = 0.0
    """Exposed work before tick 0, such as gathering embedding and head."""
    after_s: float = 0.0
    """Exposed work before the update, such as reducing the gradients of embedding and head."""
    weight_bytes: float | Sequence[float] = 0.0
    """A chunk's weights in the dtype they are computed with."""
    sent_weight_bytes: float | Sequence[float] | None = None
    """The same on their way; None: they travel in that dtype."""
    gradient_bytes: float | Sequence[float] = 0.0
    activation_bytes: float = 0.0
    residual_bytes: float | Sequence[float] = 0.0
    tap_bytes: float | Sequence[float] = 0.0
    static_bytes: float = 0.0
    """Per device, all step long: parameters and optimizer state at rest, edge copies, workspace.
    Below 0 where a step as it is lowered holds less than the copies that are traced."""
    other_sent_bytes: float = 0.0
    """Sent per device and step outside the schedule's moves (embedding, head, inside tasks)."""
    inside: Mapping[TaskKind, Sequence[tuple[Inside, ...]]] = field(default_factory=dict)
    """Kind of task -> for each chunk what its devices send each other within it; their waits are in
    the task's time and their bytes in `other_sent_bytes`."""
    join_s: float | Sequence[float] = 0.0
    """Before F, B and I: the pieces of a chunk's weights that members of a place join."""
    join_bytes: float | Sequence[float] = 0.0
    """What a member sends for that."""
    cut_s: float | Sequence[float] = 0.0
    """After B and W: the chunk's gradient that they sum, each for its own piece."""
    cut_bytes: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name in _AMOUNTS:
            value = getattr(self, name)
            if value is None:
                continue
            least = min(value, default=0) if hasattr(value, "__len__") else value
            if not least >= 0:
                raise UsageError(f"{name}={least!r} must not be below 0")

    def task_s(self, task: Task, chunks: int) -> float:
        """Seconds of one task."""
        by_kind = {
            TaskKind.FORWARD: self.forward_s,
            TaskKind.BACKWARD: self.backward_s,
            TaskKind.INPUT_GRADIENT: self.input_gradient_s,
            TaskKind.WEIGHT_GRADIENT: self.weight_gradient_s,
        }
        time_s = _of(by_kind[task.kind], task.chunk)
        if task.kind is not TaskKind.WEIGHT_GRADIENT:
            if task.chunk == 0:
                time_s += self.embed_s
            if task.chunk == chunks - 1 and task.kind is not TaskKind.FORWARD:
                time_s += self.head_s
        return time_s

    def around(self, task: Task) -> tuple[float, float, float]:
        """Seconds in which a place's members join pieces before a task and cut its gradient after
        it, and the bytes that each sends for both."""
        joins = task.kind is not TaskKind.WEIGHT_GRADIENT
        cuts = task.kind in (TaskKind.BACKWARD, TaskKind.WEIGHT_GRADIENT)
        before = _of(self.join_s, task.chunk) if joins else 0.0
        after = _of(self.cut_s, task.chunk) if cuts else 0.0
        sent = _of(self.join_bytes, task.chunk) if joins else 0.0
        return before, after, sent + (_of(self.cut_bytes, task.chunk) if cuts else 0.0)

    def block_bytes(self, block: Block) -> float:
        """Bytes of one copy of a block."""
        sizes = {
            Data.WEIGHT: self.weight_bytes,
            Data.GRADIENT: self.gradient_bytes,
            Data.ACTIVATION: self.activation_bytes,
            Data.COTANGENT: self.activation_bytes,
            Data.RESIDUAL: self.residual_bytes,
            Data.TAP: self.tap_bytes,
        }
        return _of(sizes[block.data], block.chunk)

    def moved_bytes(self, block: Block) -> float:
        """Bytes of a block on its way."""
        if block.data is Data.WEIGHT and self.sent_weight_bytes is not None:
            return _of(self.sent_weight_bytes, block.chunk)
        return self.block_bytes(block)


_AMOUNTS = tuple(one.name for one in fields(Costs) if one.name not in ("inside", "static_bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One bar of the timeline."""

    device: int
    stream: str
    """`compute`, `send`, or `inside`: among the devices that compute one's tasks together, and the
    members of a place."""
    start_s: float
    end_s: float
    work: Task | Move | Inside

    @property
    def label(self) -> str:
        """What it is, in short."""
        if isinstance(self.work, Task):
            return f"{self.work.kind}{self.work.chunk},{self.work.microbatch}"
        if isinstance(self.work, Inside):
            return self.work.name
        return str(self.work.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A simulated step."""

    schedule: Schedule
    step_s: float
    busy_s: tuple[float, ...]
    """Compute seconds of each device, as they would be with nothing beside it."""
    sent_bytes: tuple[float, ...]
    """Bytes each device sends, to the devices of other places."""
    inside_bytes: tuple[float, ...]
    """Bytes each device sends to other members of its place."""
    peak_bytes: tuple[float, ...]
    """The most memory each device holds at any tick, static bytes included."""
    memory: tuple[tuple[dict[Data, float], ...], ...] = field(repr=False)
    """memory[device][tick]: bytes by kind of data, static bytes not included."""
    events: tuple[Event, ...] = field(repr=False)
    tick_start_s: tuple[tuple[float, ...], ...] = field(repr=False)
    """tick_start_s[device][tick]: when the device reaches the head of the tick."""

    @property
    def bubble(self) -> float:
        """The share of the step in which the busiest device does not compute."""
        return 1.0 - max(self.busy_s) / self.step_s if self.step_s else 0.0

    @property
    def spans_s(self) -> tuple[tuple[float, float], ...]:
        """For each device, when its first task starts and its last one ends."""
        spans: list[tuple[float, float] | None] = [None] * self.schedule.devices
        for event in self.events:
            if event.stream == "compute":
                start, end = spans[event.device] or (event.start_s, event.end_s)
                spans[event.device] = min(start, event.start_s), max(end, event.end_s)
        return tuple(span or (0.0, 0.0) for span in spans)

    @property
    def inner_bubble(self) -> float:
        """The largest share of its own span in which a device does not compute.

        This is what is left of the bubble where nothing makes all devices end a step together, so
        that one may begin the next step while others finish this one.
        """
        shares = [
            1.0 - busy / (end - start)
            for busy, (start, end) in zip(self.busy_s, self.spans_s, strict=True)
            if end > start
        ]
        return max(shares, default=0.0)


def simulate(
    schedule: Schedule,
    costs: Costs,
    link: Link,
    *,
    lockstep: bool = False,
    eager_sends: bool = False,
    known_trace: Trace | None = None,
) -> Simulation:
    """Runs the schedule against the clock.

    Args:
        schedule: a legal schedule.
        costs: times and sizes of its tasks and blocks.
        link: what joins neighbours; group collectives run as rings over the same link.
        lockstep: start every tick on all devices together; without it a device waits only for
            those it exchanges with.
        eager_sends: let no device wait for a transfer but the one that reads what it brings;
            cannot be combined with `lockstep`.
        known_trace: the schedule's trace, where the caller has it already.

    Raises:
        ScheduleError: if the schedule is not legal.
        ValueError: if both `lockstep` and `eager_sends` are asked for.
    """
    if lockstep and eager_sends:
        raise ValueError("lockstep and eager_sends exclude each other: ask for at most one")
    found = known_trace if known_trace is not None else trace(schedule)
    run = _Run(schedule, costs, link, lockstep=lockstep, eager_sends=eager_sends)
    run.go()
    memory = tuple(alive_by_tick(schedule, costs, found, d) for d in range(schedule.devices))
    peaks = tuple(
        costs.static_bytes + max((sum(tick.values()) for tick in rows), default=0.0)
        for rows in memory
    )
    return Simulation(
        schedule=schedule,
        step_s=run.step_s,
        busy_s=tuple(run.busy_s),
        sent_bytes=tuple(sent + costs.other_sent_bytes for sent in run.sent_bytes),
        inside_bytes=tuple(run.inside_bytes),
        peak_bytes=peaks,
        memory=memory,
        events=tuple(run.events),
        tick_start_s=tuple(tuple(row) for row in run.tick_start_s),
    )


class _Run:
    def __init__(
        self, schedule: Schedule, costs: Costs, link: Link, *, lockstep: bool, eager_sends: bool
    ) -> None:
        p = schedule.devices
        self.schedule, self.costs, self.link = schedule, costs, link
        self.lockstep, self.eager_sends = lockstep, eager_sends
        self.head_s = [costs.before_s] * p
        """When each device has reached the head of the tick at hand."""
        self.send_free_s = [0.0] * p
        self.receive_free_s = [0.0] * p
        self.beside: list[deque[tuple[float, float, float]]] = [deque() for _ in range(p)]
        """(start, end, share by which compute is slowed) of each device's sends and their waits, in
        order, that a task may still run beside."""
        self.ready_s: dict[tuple[Block, int], float] = {}
        self.must_land: dict[int, list[tuple[Move, float]]] = defaultdict(list)
        self.busy_s = [0.0] * p
        self.sent_bytes, self.inside_bytes = [0.0] * p, [0.0] * p
        self.events: list[Event] = []
        self.tick_start_s: list[list[float]] = [[] for _ in range(p)]
        self.step_s = 0.0

    def go(self) -> None:
        schedule = self.schedule
        for block, device in schedule.starts:
            self.ready_s[block, device] = self.costs.before_s
        for tick in range(schedule.ticks):
            arrived = self.must_land.pop(tick, [])
            self.land(arrived)
            if not self.eager_sends:
                self.wait_for(arrived)
            if self.lockstep:
                self.head_s = [max(self.head_s)] * schedule.devices
            for device, start in enumerate(self.head_s):
                self.tick_start_s[device].append(start)
            for move in schedule.moves_by_start[tick]:
                end = self.move(move)
                if move.arrive == tick:
                    self.land([(move, end)])
                    if not self.eager_sends:
                        self.wait_for([(move, end)])
                else:
                    self.must_land[move.arrive].append((move, end))
            for task in schedule.tasks_by_tick[tick]:
                self.task(task)
        self.wait_for([row for rows in self.must_land.values() for row in rows])
        self.step_s = max(self.head_s) + self.costs.after_s + self.costs.update_s

    def wait_for(self, landed: list[tuple[Move, float]]) -> None:
        for move, end in landed:
            for device in self.ends(move):
                self.head_s[device] = max(self.head_s[device], end)

    def ends(self, move: Move) -> range | tuple[int, ...]:
        if move.source == ALL:
            return range(self.schedule.devices)
        return (move.source,) if move.source == move.target else (move.source, move.target)

    def move(self, move: Move) -> float:
        devices = self.ends(move)
        size = self.costs.moved_bytes(move.block)
        if move.kind is MoveKind.COPY:
            self.ready_s[move.landed, move.target] = self.head_s[move.source]
            return self.head_s[move.source]
        waiting = (move.source,) if self.eager_sends and move.source != ALL else devices
        begin = max(self.head_s[device] for device in waiting)
        if move.source == ALL:
            n = self.schedule.devices * self.schedule.sharers
            rounds = 2 if move.kind is MoveKind.ALL_REDUCE else 1
            sent = rounds * (n - 1) / n * size
            duration = self.link.collective_s(size, devices=n, rounds=rounds)
            senders = receivers = devices
        else:
            sent = size
            duration = self.link.transfer_s(size)
            senders, receivers = (move.source,), (move.target,)
        for device in waiting:
            begin = max(begin, self.ready_s.get((move.block, device), 0.0))
        begin = max(
            begin,
            *(self.send_free_s[d] for d in senders),
            # Eager receives from different neighbours do not queue behind each other.
            *(self.receive_free_s[d] for d in receivers if not self.eager_sends),
        )
        end = begin + duration
        for device in senders:
            ready = self.ready_s.get((move.block, device), 0.0)
            opened = max(self.head_s[device], self.send_free_s[device], ready)
            self.beside[device].append((opened, begin, self.link.waiting_contention))
            self.beside[device].append((begin, end, self.link.contention))
            self.send_free_s[device] = end
            self.sent_bytes[device] += sent
            self.events.append(
                Event(
                    device=device,
                    stream="send",
                    start_s=begin,
                    end_s=end,
                    work=move,
                )
            )
        for device in receivers:
            self.receive_free_s[device] = end
        return end

    def computed_s(self, device: int, begin: float, compute_s: float) -> float:
        """When compute that begins then is done, beside all that has left by the tick at hand."""
        return done_s(self.beside[device], begin, compute_s)

    def land(self, landed: list[tuple[Move, float]]) -> None:
        """Makes what has arrived the copy that is read; until then an older one may be."""
        for move, end in landed:
            for device in self.ends(move):
                if move.source == ALL or device == move.target:
                    self.block_ready(move.landed, device, end)

    def block_ready(self, block: Block, device: int, time_s: float) -> None:
        if block.data is Data.GRADIENT:  # a sum is ready when its last part is
            time_s = max(time_s, self.ready_s.get((block, device), 0.0))
        self.ready_s[block, device] = time_s

    def task(self, task: Task) -> None:
        device = task.device
        begin = self.head_s[device]
        for block in task_inputs(self.schedule, task):
            begin = max(begin, self.ready_s.get((block, device), 0.0))
        duration = self.costs.task_s(task, self.schedule.chunks)
        before_s, after_s, inside_bytes = self.costs.around(task)
        self.inside(device, JOINED, begin, before_s)
        begin += before_s
        end = begin + duration
        if self.link.contention or self.link.waiting_contention:
            end = self.computed_s(device, begin, duration)
        self.inside(device, CUT, end, after_s)
        self.inside_bytes[device] += inside_bytes
        computed, end = end, end + after_s
        for block in task_outputs(self.schedule, task):
            self.ready_s[block, device] = end
        if task.kind in (TaskKind.BACKWARD, TaskKind.WEIGHT_GRADIENT):
            self.block_ready(gradient_block(task.chunk), device, end)
        self.head_s[device] = end
        self.busy_s[device] += duration
        self.events.append(
            Event(
                device=device,
                stream="compute",
                start_s=begin,
                end_s=computed,
                work=task,
            )
        )
        within = self.costs.inside.get(task.kind)
        longer = (computed - begin) / duration if duration else 1.0
        for one in within[task.chunk] if within else ():
            self.events.append(
                Event(
                    device=device,
                    stream="inside",
                    start_s=begin + longer * one.start_s,
                    end_s=begin + longer * one.end_s,
                    work=one,
                )
            )

    def inside(self, device: int, name: str, start_s: float, duration_s: float) -> None:
        """What the members of a place send each other before or after a task."""
        if duration_s:
            end_s = start_s + duration_s
            work = Inside(name=name, start_s=0.0, end_s=duration_s, sent_bytes=0.0)
            self.events.append(
                Event(device=device, stream="inside", start_s=start_s, end_s=end_s, work=work)
            )


def done_s(beside: deque[tuple[float, float, float]], begin: float, compute_s: float) -> float:
    """When compute that begins then is done beside sends and their waits, which slow it.

    Args:
        beside: (start, end, by what share) of each, in order; those over by then are dropped.
        begin: seconds.
        compute_s: with nothing beside it.
    """
    while beside and beside[0][1] <= begin:
        beside.popleft()
    now, left = begin, compute_s
    for start, end, share in beside:
        alone = max(0.0, start - now)
        if left <= alone:
            break
        now, left = now + alone, left - alone
        done = (end - now) / (1.0 + share)
        if left <= done:
            return now + left * (1.0 + share)
        now, left = end, left - done
    return now + left


def alive_bytes(schedule: Schedule, costs: Costs, found: Trace) -> tuple[float, ...]:
    """The most that each device has alive of the schedule's data, static bytes not included."""
    return tuple(
        max(
            (sum(tick.values()) for tick in alive_by_tick(schedule, costs, found, device)),
            default=0.0,
        )
        for device in range(schedule.devices)
    )


def alive_by_tick(
    schedule: Schedule, costs: Costs, found: Trace, device: int
) -> tuple[dict[Data, float], ...]:
    """What a device has alive in every tick, by kind of data."""
    change: list[dict[Data, float]] = [defaultdict(float) for _ in range(schedule.ticks + 2)]
    for copy in found.on_device(device):
        size = costs.block_bytes(copy.block)
        change[copy.made_at][copy.block.data] += size
        change[min(copy.last_use, schedule.ticks) + 1][copy.block.data] -= size
    live: dict[Data, float] = defaultdict(float)
    rows = []
    for tick in range(schedule.ticks):
        for data, size in change[tick].items():
            live[data] += size
        rows.append({data: size for data, size in live.items() if size})
    return tuple(rows)


def _of(value: float | Sequence[float], chunk: int) -> float:
    return value if isinstance(value, int | float) else value[chunk]
