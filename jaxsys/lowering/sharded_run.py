"""One trace of a sharded step, inside `shard_map`: what a device does, tick by tick.

Ticks are written out, or looped over where a schedule's chunks are alike (`alike`): what a chunk
keeps then lies in a row of one array, its weights, where they are kept from B to F, in the row of
the residuals that come between F and B. What reads a row hands the array on, so that the next to
write it comes after, and XLA writes in place. Turns that are alike are a loop either way.

Legend: P devices, C chunks, L layers, N chunks of a group, n elements of a chunk's shard.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxsys.axes import RING
from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.mesh import over, ring_axis
from jaxsys.schedule import MoveKind, Task, TaskKind

from .alike import Alike, Group, Held, Span
from .base import LossAndGradients, add_to
from .eight_bits import EncodedStack, Scale, all_decoded, scales_of, travelling
from .flat import Leaves, cast, flat_model, floats, head_back, is_float, like, pull_back
from .kinds import Shared
from .programs import BlockProgram, Recompute, block_program
from .rows import get_row, put_row, zeros
from .shards import ChunkLayout, Stack

if TYPE_CHECKING:
    from .sharded import ShardedStep


@dataclass(slots=True, kw_only=True)
class _State:
    """What lives from tick to tick."""

    carrier: Leaves
    """What everything in flight is tied to: the running activation or cotangent."""
    scores: PyTree
    """Sums of loss, weight and metrics."""
    edge_gradient: Leaves
    embedded: PyTree | None = None
    """The microbatch whose cotangent has come down to the embedding, not yet read there."""
    weights: dict[int, Leaves] = field(default_factory=dict)
    residuals: dict[int, list[Leaves]] = field(default_factory=dict)
    gradients: dict[int, Leaves] = field(default_factory=dict)
    """Of floats alone, as the sums that are reduced."""
    reduced: dict[int, Leaves] = field(default_factory=dict)
    shelves: dict[str, Leaves] = field(default_factory=dict)
    """What chunks of a group keep, [N, ...] each; named by what it is and the group's first."""
    landing: list[tuple["_Flight", PyTree]] = field(default_factory=list)
    """What is in flight, in the order it has left."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A chunk's weights or sums on their way."""

    kind: MoveKind
    chunk: int
    due: int
    """Ticks until it must have arrived."""


class Run:
    """One trace of the step, inside shard_map: shapes are per device."""

    def __init__(self, lowered: "ShardedStep", specs: Parameters) -> None:
        self.lowered, self.schedule, self.model = lowered, lowered.schedule, lowered.run_model
        self.specs, self.over = specs, over(lowered.shard_axes)
        self.turns = self.schedule.microbatches // self.schedule.devices
        self.half = self.schedule.chunks
        """Ticks of F, and of B, of a microbatch."""
        forms = [
            tuple((self.model.kind_of[layer], lowered.recompute[layer]) for layer in chunk)
            for chunk in lowered.chunk_layers
        ]
        self.alike = Alike(self.schedule, forms, looped=lowered.looped)
        self.ahead: Any = 0
        """How many chunks, in a loop, a device is ahead of the one it is traced for."""
        self.looping: Group | None = None
        """The group that is looped over."""

    def turn_ticks(self, turn: int) -> range:
        """B of a device's microbatch number `turn` and F of the next."""
        return range((2 * turn + 1) * self.half, (2 * turn + 3) * self.half)

    def step(self, parameters: Parameters, batch: PyTree) -> LossAndGradients:
        """blocks [L, ...] in shards, batch leaves [M / P, B, ...]."""
        lowered, schedule = self.lowered, self.schedule
        self.batch = batch = lowered.sequences.own(batch)
        self.edge = lowered.gather_edge(parameters["edge"], self.specs["edge"])
        stacks = self.model.stacks(cast(parameters["blocks"], lowered.compute_dtype))
        self.stacks = {kind: Stack(stack, self.spec_of(kind)) for kind, stack in stacks.items()}
        self.sent = self.encoded_stacks()
        self.parts = [self.parts_of(chunk) for chunk in lowered.chunk_layers]
        self.shards = [
            [p[rows.start : rows.stop] for kind, rows in parts for p in self.stacks[kind].leaves]
            for parts in self.parts
        ]
        self.layouts = [self.laid_out(*pair) for pair in zip(self.parts, self.shards, strict=True)]
        self.sent_layouts = [self.laid_out(parts, self.sent_rows(parts)[0]) for parts in self.parts]
        microbatch = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batch)
        self.flat = flat_model(self.model, self.edge, microbatch)
        self.programs = self.block_programs(microbatch)
        self.rooms = {group: self.room(group) for group in self.alike.groups if group.shelved}
        self.state = _State(
            edge_gradient=lowered.empty_edge_gradient(self.edge),
            scores=(jnp.float32(0), jnp.float32(0), self.flat.empty_metrics()),
            carrier=lowered.in_turn([jnp.zeros((), lowered.compute_dtype)], self.edge),
        )
        # A turn is B of a microbatch and F of the next; before the first comes F, after the last B.
        self.run_ticks(range(self.half), -1)
        turns = [self.turn_ticks(turn) for turn in range(self.turns - 1)]
        steady = self.alike.steady(turns)
        for turn, ticks in enumerate(turns):
            if len(steady) > 1 and turn in steady:
                if turn == steady.start:
                    # What is carried must be there from the first turn on.
                    self.state.reduced = self.nothing_reduced() | self.state.reduced
                    self.make_shelves(self.alike.groups)
                    self.loop(steady)
                continue
            self.run_ticks(ticks, turn)
        # With the sums that land after the last B.
        self.run_ticks(range(self.turn_ticks(self.turns - 1).start, schedule.ticks), self.turns - 1)
        for flight, value in self.state.landing:
            self.land(flight, value)
        self.embed_backward()
        return self.finish(parameters)

    # Loops.

    def scan(self, body: Callable[[jax.Array], None], indices: jax.Array) -> None:
        """Runs `body` with each index; it leaves the state in the form that it finds it in."""
        flights = [flight for flight, _ in self.state.landing]

        def load(carry: dict[str, Any]) -> None:
            for name, value in carry.items():
                setattr(self.state, name, value)
            self.state.landing = list(zip(flights, carry["landing"], strict=True))

        def save() -> dict[str, Any]:
            values = {field.name: getattr(self.state, field.name) for field in fields(self.state)}
            return {**values, "landing": [value for _, value in self.state.landing]}

        def one(carry: dict[str, Any], index: jax.Array) -> tuple[dict[str, Any], None]:
            load(carry)
            body(index)
            assert [flight for flight, _ in self.state.landing] == flights
            return save(), None

        carry, _ = lax.scan(one, save(), indices)
        load(carry)

    def loop(self, turns: range) -> None:
        """Runs turns that are alike as a loop: what is compiled does not grow with their number.

        Chunks that are written out in it are values of their own: while nothing lives in one XLA
        gives its room to others. Between F and B that is the residuals; copies of weights that B
        keeps for F come and go in a turn, in the room of residuals.
        """
        ticks = self.turn_ticks(turns.start)
        self.scan(lambda turn: self.run_ticks(ticks, turn), jnp.arange(turns.start, turns.stop))

    def run_ticks(self, ticks: range, turn: int | jax.Array) -> None:
        """Ticks of the schedule: B on the device's microbatch number `turn`, F on the next."""
        for span in self.alike.spans(ticks):
            tick = span if isinstance(span, int) else span.ticks.start
            task = self.alike.task_at[tick]
            if task is not None:
                self.make_shelves([self.alike.group_of[task.chunk]])
            if isinstance(span, int):
                self.tick(span, turn)
            elif task is not None:
                self.run_span(span, task, turn)

    def tick(self, tick: int, turn: int | jax.Array) -> None:
        """What arrives, what leaves, and the task of one tick."""
        self.land_due()
        for move in self.schedule.moves_by_start[tick]:
            self.start(move.kind, move.block.chunk, tick, move.arrive)
        task = self.alike.task_at[tick]
        if task is not None:
            self.run(task, self.begin(task, turn))
            self.end(task, turn)
        self.pass_tick()

    def land_due(self) -> None:
        """Takes in what must have arrived."""
        landing = self.state.landing
        self.state.landing = [row for row in landing if row[0].due > 0]
        for flight, value in landing:
            if flight.due <= 0:
                self.land(flight, value)

    def pass_tick(self) -> None:
        """What is in flight is a tick nearer."""
        landing = self.state.landing
        self.state.landing = [(replace(f, due=f.due - 1), value) for f, value in landing]

    def start(
        self,
        kind: MoveKind,
        chunk: int,
        tick: int,
        arrive: int,
        *,
        valid: jax.Array | None = None,
        waits: bool = False,
    ) -> None:
        """A move leaves.

        Args:
            kind: gather or reduction.
            chunk: whose.
            tick: in which it leaves.
            arrive: in which it must have arrived; at once if that is now.
            valid: else zeros are on their way in its place.
            waits: it does not land before `land_due`.
        """
        flight = _Flight(kind, chunk, arrive - tick)
        value = self.depart(flight, tick, valid)
        if flight.due > 0 or waits:
            self.state.landing.append((flight, value))
        else:
            self.land(flight, value)

    def run_span(self, span: Span, task: Task, turn: int | jax.Array) -> None:
        """Ticks on chunks of a group, as a loop in which chunks are numbered as in its first."""
        state, first, begin, end = self.state, task.chunk, span.ticks.start, span.ticks.stop
        flights = span.flights(first)
        self.begin(task, turn)
        for move in span.early:
            self.start(move.kind, move.block.chunk, begin, move.arrive, waits=True)
        there, outside = dict(state.landing), state.gradients
        state.landing, state.gradients = [], {}
        for slot, chunk, due in flights:
            flight = _Flight(slot.kind, chunk, due)
            value = there.pop(flight, None) if chunk in span.group.chunks else None
            state.landing.append((flight, self.nothing_sent(first) if value is None else value))
        for flight, value in there.items():  # sums that come home here
            self.land(flight, value)
        if task.kind is TaskKind.BACKWARD and not span.group.sums:
            state.gradients = {first - span.step: zeros(self.gradient_specs(first))}

        def body(index: jax.Array) -> None:
            self.ahead = span.step * index
            self.land_due()
            for slot in span.slots:
                always = len(slot.when) == len(span.ticks)
                valid = None if always else (index >= slot.when.start) & (index < slot.when.stop)
                self.start(slot.kind, first + slot.offset, begin, begin + slot.due, valid=valid)
            self.run(task, self.microbatch(task, turn))
            self.pass_tick()
            self.renumber(-span.step)
            flying = dict(state.landing)
            rows = [_Flight(slot.kind, chunk, due) for slot, chunk, due in flights]
            state.landing = [(flight, flying[flight]) for flight in rows]

        self.looping = span.group
        self.scan(body, jnp.arange(len(span.ticks)))
        self.looping, self.ahead = None, 0
        state.landing = [
            row
            for (slot, _, due), row in zip(flights, state.landing, strict=True)
            if len(span.ticks) - (slot.due - due) in slot.when
        ]
        self.renumber(span.step * len(span.ticks))
        state.gradients = outside | state.gradients
        last = self.alike.task_at[end - 1]
        assert last is not None
        self.end(last, turn)
        for move in span.late:
            self.start(move.kind, move.block.chunk, end, move.arrive, waits=True)

    def renumber(self, step: int) -> None:
        """Adds to the numbers of chunks of what a loop hands on."""
        state = self.state
        state.landing = [(replace(f, chunk=f.chunk + step), value) for f, value in state.landing]
        state.gradients = {chunk + step: sums for chunk, sums in state.gradients.items()}

    def group(self, chunk: int) -> Group:
        """A chunk's group; in a loop numbers may be past those that there are."""
        return self.looping or self.alike.group_of[chunk]

    # What chunks of a group keep.

    def room(self, group: Group) -> Shared:
        """What a row holds of a chunk's residuals, and of its weights while there are none."""
        chunk = group.chunks.start
        layers = self.lowered.chunk_layers[chunk]
        kept = [spec for layer in layers for spec in self.programs[layer].residuals]
        if group.weights is not Held.BETWEEN:
            return Shared({"residuals": kept})
        return Shared({"residuals": kept, "weights": self.layouts[chunk].whole})

    def make_shelves(self, groups: list[Group]) -> None:
        """Rows of what groups keep, zero, where they are not there yet."""
        for group in filter(lambda group: group.shelved, groups):
            chunk = group.chunks.start
            specs = {"room": self.rooms[group].specs, "reduced": self.reduced_specs(chunk)}
            if group.weights is Held.ALWAYS:
                specs["weights"] = self.layouts[chunk].whole
            if group.sums:
                specs["gradients"] = self.gradient_specs(chunk)
            for what, each in specs.items():
                name, rows = f"{what} {chunk}", len(group.chunks)
                if name not in self.state.shelves:
                    self.state.shelves[name] = [
                        jnp.zeros((rows, *spec.shape), spec.dtype) for spec in each
                    ]

    def from_shelf(self, what: str, chunk: int) -> Leaves:
        """A chunk's row."""
        name, row = self.place(what, chunk)
        shelf = self.state.shelves[name]
        values, shelf = lax.optimization_barrier(([get_row(b, row) for b in shelf], shelf))
        self.state.shelves = {**self.state.shelves, name: shelf}
        return values

    def onto_shelf(self, what: str, chunk: int, values: Leaves) -> None:
        """Puts a chunk's row."""
        name, row = self.place(what, chunk)
        pairs = zip(self.state.shelves[name], values, strict=True)
        shelf = [put_row(b, value, row) for b, value in pairs]
        self.state.shelves = {**self.state.shelves, name: shelf}

    def place(self, what: str, chunk: int) -> tuple[str, Any]:
        """Of a chunk: the shelf's name and the row."""
        first = self.group(chunk).chunks.start
        return f"{what} {first}", chunk - first + self.ahead

    def copy_of(self, chunk: int) -> Leaves:
        """A chunk's weights, just come or from their row."""
        there = self.state.weights.get(chunk)
        if there is not None:
            return there
        group = self.alike.group_of[chunk]
        if group.weights is Held.ALWAYS:
            return self.from_shelf("weights", chunk)
        return self.rooms[group].get("weights", self.from_shelf("room", chunk))

    def put_away(self, task: Task) -> None:
        """Drops the weights that a task has read, or puts them where the next will find them."""
        chunk, group = task.chunk, self.alike.group_of[task.chunk]
        last = task.tick in self.alike.last_uses
        if not (last or group.shelved):
            return
        copy = self.state.weights.pop(chunk, None)
        if last or copy is None:
            return
        if group.weights is Held.ALWAYS:
            self.onto_shelf("weights", chunk, copy)
        else:
            self.onto_shelf("room", chunk, self.rooms[group].put("weights", copy))

    def laid_out(self, parts: list[tuple[str, range]], shards: Leaves) -> ChunkLayout:
        """How the shards of a chunk lie in rows."""
        axes = [axis for kind, _ in parts for axis in self.stacks[kind].axes]
        return ChunkLayout(shards, axes, self.lowered.shards)

    def encoded_stacks(self) -> dict[str, EncodedStack]:
        """Shards as they are gathered: matrices that travel so in float8."""
        small = {
            kind: [
                goes and axis is not None
                for goes, axis in zip(
                    travelling(self.model, stack.layer(self.lowered.shards)),
                    stack.axes,
                    strict=True,
                )
            ]
            for kind, stack in self.stacks.items()
        }
        chosen = [
            leaf
            for kind, stack in self.stacks.items()
            for leaf, goes in zip(stack.leaves, small[kind], strict=True)
            if goes
        ]
        if self.model.travels_in_float8 is not None and not chosen:
            raise UsageError(
                f"{self.lowered.shards} devices divide no axis of the matrices that would travel "
                "in float8, which rest whole; leave float8 transfers out, or use fewer devices"
            )
        scales = iter(scales_of(chosen, self.lowered.shard_axes) if chosen else ())
        return {
            kind: EncodedStack(
                stack.leaves, [next(scales) if goes else None for goes in small[kind]]
            )
            for kind, stack in self.stacks.items()
        }

    def sent_rows(
        self, parts: list[tuple[str, range]], first: Any = 0, *, looped: bool = False
    ) -> tuple[Leaves, list[Scale]]:
        """Shards [K, ...] of some rows of stacks as they are sent, and their scales.

        Args:
            parts: kinds, and which rows of their stacks.
            first: in a loop, by how many times its rows each part is further on.
            looped: whether it is one.
        """
        leaves, scales = [], []
        for kind, rows in parts:

            def take(leaf: jax.Array, rows: range = rows) -> jax.Array:
                if not looped:
                    return leaf[rows.start : rows.stop]
                start = rows.start + len(rows) * first
                return lax.dynamic_slice_in_dim(leaf, start, len(rows))

            found = self.sent[kind].rows(take)
            leaves, scales = leaves + found[0], scales + found[1]
        return leaves, scales

    def spec_of(self, kind: str) -> PyTree:
        """The PartitionSpecs of a kind's stack."""
        return self.model.stacks(self.specs["blocks"])[kind]

    def parts_of(self, chunk: range) -> list[tuple[str, range]]:
        """The kinds in a chunk and which rows of their stacks it has: they lie together."""
        rows: dict[str, list[int]] = {}
        for layer in chunk:
            kind, row = self.model.places[layer]
            rows.setdefault(kind, []).append(row)
        return [(kind, range(mine[0], mine[-1] + 1)) for kind, mine in rows.items()]

    def block_programs(self, microbatch: PyTree) -> list[BlockProgram]:
        x = jax.tree.unflatten(self.flat.structure, self.flat.x)
        made: dict[tuple[Recompute, str], BlockProgram] = {}
        pairs = list(zip(self.lowered.recompute, self.model.kind_of, strict=True))
        for policy, kind in dict.fromkeys(pairs):
            layer = self.stacks[kind].layer(self.lowered.shards)
            made[policy, kind] = block_program(self.model, layer, x, microbatch, policy, kind)
        return [made[pair] for pair in pairs]

    def weights_of(self, chunk: int, layer: int, copy: Leaves) -> PyTree:
        """A layer's whole parameters, as the model has them, from its chunk's copy."""
        kind, row = self.model.places[layer]
        start = 0
        for other, rows in self.parts[chunk]:
            stack = self.stacks[other]
            if other == kind:
                whole = copy[start : start + len(stack.leaves)]
                return jax.tree.unflatten(stack.structure, [w[row - rows.start] for w in whole])
            start += len(stack.leaves)
        raise AssertionError(f"chunk {chunk} has no layer {layer}")

    # Moves.

    def tie(self, value: PyTree) -> PyTree:
        """The value, but not before the carrier; what follows on the carrier comes after it."""
        value = self.lowered.in_turn(value, self.state.carrier)
        value, self.state.carrier = lax.optimization_barrier((value, self.state.carrier))
        return value

    def shards_of(self, chunk: int) -> tuple[Leaves, list[Scale]]:
        """A chunk's shards [K, ...] as they are sent, and their scales."""
        if self.looping is None:
            return self.sent_rows(self.parts[chunk])
        start = self.looping.chunks.start
        return self.sent_rows(self.parts[start], chunk - start + self.ahead, looped=True)

    def depart(self, flight: _Flight, tick: int, valid: jax.Array | None) -> PyTree:
        chunk, group, state = flight.chunk, self.group(flight.chunk), self.state
        if flight.kind is MoveKind.ALL_GATHER:
            shards, scales = self.tie(self.shards_of(chunk))
            with jax.named_scope(f"gather_{chunk}_for_tick_{tick + flight.due}"):
                packed = self.sent_layout(chunk).pack(shards)
                rows = _where(valid, lambda: [lax.all_gather(row, self.over) for row in packed])
            self.state.carrier = self.lowered.in_turn(state.carrier, rows)
            return rows, shards, scales
        layout = self.layout(chunk).of_floats
        shelved = group.shelved and group.sums
        sums = self.from_shelf("gradients", chunk) if shelved else state.gradients.pop(chunk)
        gradient = self.tie(sums)

        def reduced() -> Leaves:
            rows = [
                lax.psum_scatter(row, self.over, scatter_dimension=0)
                for row in layout.pack_whole(gradient)
            ]
            return layout.split(rows, gradient)

        with jax.named_scope(f"reduce_{chunk}_in_tick_{tick}"):
            sums = _where(valid, reduced)
        self.state.carrier = self.lowered.in_turn(state.carrier, sums)
        return sums

    def layout(self, chunk: int) -> ChunkLayout:
        """How a chunk's shards lie."""
        return self.layouts[self.group(chunk).chunks.start]

    def sent_layout(self, chunk: int) -> ChunkLayout:
        """How they lie as they are sent."""
        return self.sent_layouts[self.group(chunk).chunks.start]

    def land(self, flight: _Flight, value: PyTree) -> None:
        chunk = flight.chunk
        if flight.kind is MoveKind.ALL_GATHER:
            # One value: XLA would cut what a task reads now and what lives on after it from the
            # rows one by one, and hold both.
            rows, shards, scales = value
            whole = self.sent_layout(chunk).unpack(rows, shards)
            whole = all_decoded(whole, scales, self.layout(chunk).whole)
            self.state.weights[chunk] = lax.optimization_barrier(whole)
            return
        value = self.tie(value)
        value = jax.tree.map(lambda v: v.astype(jnp.float32), value)
        # Added here and now: XLA would put it off, and hold what every reduction has brought.
        if self.group(chunk).shelved:
            there = self.from_shelf("reduced", chunk)
            self.onto_shelf("reduced", chunk, self.tie(jax.tree.map(jnp.add, there, value)))
            return
        reduced = self.state.reduced
        there = reduced.get(chunk)
        reduced[chunk] = self.tie(value if there is None else jax.tree.map(jnp.add, there, value))

    def nothing_sent(self, chunk: int) -> Leaves:
        """Zeros in the place of a chunk's reduced sum on its way."""
        return [jnp.zeros(p.shape, self.lowered.gradient_dtype) for p in floats(self.shards[chunk])]

    def reduced_specs(self, chunk: int) -> Leaves:
        """Shapes and dtypes of a chunk's reduced sums."""
        return [jax.ShapeDtypeStruct(p.shape, jnp.float32) for p in floats(self.shards[chunk])]

    def gradient_specs(self, chunk: int) -> Leaves:
        """Shapes and dtypes of a chunk's sums before they are reduced."""
        dtype = self.lowered.gradient_dtype
        whole = floats(self.layouts[chunk].whole)
        return [jax.ShapeDtypeStruct(spec.shape, dtype) for spec in whole]

    def nothing_reduced(self) -> dict[int, Leaves]:
        """Zeros in the place of the reduced sum of every chunk that is written out."""
        return {
            chunk: zeros(self.reduced_specs(chunk))
            for chunk, group in enumerate(self.alike.group_of)
            if not group.shelved
        }

    # Tasks.

    def microbatch(self, task: Task, turn: int | jax.Array) -> PyTree:
        """What a task of a turn computes on."""
        number = turn + 1 if task.kind is TaskKind.FORWARD else turn
        return jax.tree.map(lambda leaf: leaf[number], self.batch)

    def begin(self, task: Task, turn: int | jax.Array) -> PyTree:
        """What comes before a microbatch's first F and first B: its embedding, its loss.

        Returns the microbatch.
        """
        state, microbatch = self.state, self.microbatch(task, turn)
        if task.kind is TaskKind.FORWARD and task.chunk == 0:
            # The last microbatch is done with before this one begins.
            microbatch = self.tie(microbatch)
            self.embed_backward()
            state.carrier = self.flat.embed(self.edge, microbatch)
        if task.kind is TaskKind.BACKWARD and task.chunk == self.schedule.chunks - 1:
            found, d_edge, dy = head_back(self.flat, self.edge, state.carrier, microbatch)
            # Before blocks are gone back through: sums over all tokens, as of a norm's scale, XLA
            # would put off to the end of the step, and hold all that they are sums of.
            vectors = {place: part for place, part in enumerate(d_edge) if part.ndim < 2}
            vectors, dy = lax.optimization_barrier((vectors, dy))
            self.add_to_edge([vectors.get(place, part) for place, part in enumerate(d_edge)])
            state.scores = jax.tree.map(jnp.add, state.scores, found)
            state.carrier = dy
        return microbatch

    def end(self, task: Task, turn: int | jax.Array) -> None:
        """What comes after its last B."""
        if task.kind is TaskKind.BACKWARD and task.chunk == 0:
            self.state.embedded = self.microbatch(task, turn)

    def run(self, task: Task, microbatch: PyTree) -> None:
        """A task on its chunk."""
        (self.forward if task.kind is TaskKind.FORWARD else self.backward)(task, microbatch)
        self.put_away(task)

    def forward(self, task: Task, microbatch: PyTree) -> None:
        state, chunk = self.state, task.chunk
        x, kept, copy = state.carrier, [], self.copy_of(chunk)
        for layer in self.lowered.chunk_layers[chunk]:
            own = self.weights_of(chunk, layer, copy)
            x, residuals = self.programs[layer].forward(own, x, microbatch, self.number(layer))
            kept.append(residuals)
        self.keep(chunk, kept)
        state.carrier = x

    def number(self, layer: int) -> jax.Array:
        """A layer's index."""
        chunk = next(c for c in self.lowered.chunk_layers if layer in c)
        return jnp.int32(layer + len(chunk) * self.ahead)

    def keep(self, chunk: int, residuals: list[Leaves]) -> None:
        """Puts away a chunk's residuals, those of each layer."""
        group = self.alike.group_of[chunk]
        if not group.shelved:
            self.state.residuals[chunk] = residuals
            return
        flat = [value for layer in residuals for value in layer]
        self.onto_shelf("room", chunk, self.rooms[group].put("residuals", flat))

    def kept(self, chunk: int) -> list[Leaves]:
        """What `keep` was given; not to be asked for again."""
        group = self.alike.group_of[chunk]
        if not group.shelved:
            return self.state.residuals.pop(chunk)
        flat = iter(self.rooms[group].get("residuals", self.from_shelf("room", chunk)))
        layers = self.lowered.chunk_layers[chunk]
        return [[next(flat) for _ in self.programs[layer].residuals] for layer in layers]

    def backward(self, task: Task, microbatch: PyTree) -> None:
        state, chunk = self.state, task.chunk
        dy, copy = state.carrier, self.copy_of(chunk)
        kept = self.kept(chunk)
        parts: dict[str, list[Leaves]] = {kind: [] for kind, _ in self.parts[chunk]}
        for index, layer in reversed(list(enumerate(self.lowered.chunk_layers[chunk]))):
            own = self.weights_of(chunk, layer, copy)
            # Recompute must not begin before the cotangent is there.
            residuals, dy = lax.optimization_barrier((kept[index], dy))
            program, number = self.programs[layer], self.number(layer)
            dw, dy = program.backward(own, residuals, dy, microbatch, number)
            parts[self.model.kind_of[layer]].append(dw)
        gradient = [
            jnp.stack(leaves).astype(self.lowered.gradient_dtype)
            for layers in parts.values()
            for leaves in zip(*layers[::-1], strict=True)
        ]
        group = self.alike.group_of[chunk]
        shelved = group.shelved and group.sums
        if self.alike.adds(task.tick):
            there = self.from_shelf("gradients", chunk) if shelved else state.gradients[chunk]
            gradient = jax.tree.map(jnp.add, there, gradient)
        # The sum is made in its own tick, so that residuals are gone after it.
        gradient, dy = lax.optimization_barrier((gradient, dy))
        if shelved:
            self.onto_shelf("gradients", chunk, gradient)
        else:
            state.gradients[chunk] = gradient
        state.carrier = dy

    def embed_backward(self) -> None:
        """The embedding's gradient, put off until what is tied to its cotangent has started.

        XLA drops what nobody reads from a barrier, and with it the order that it gave.
        """
        microbatch, self.state.embedded = self.state.embedded, None
        if microbatch is None:
            return
        _, vjp = pull_back(lambda e: self.flat.embed(e, microbatch), self.edge)
        self.add_to_edge(vjp(self.state.carrier)[0])

    def add_to_edge(self, part: Leaves) -> None:
        self.state.edge_gradient = add_to(self.state.edge_gradient, part)

    def finish(self, parameters: Parameters) -> LossAndGradients:
        scores = self.lowered.in_turn(self.state.scores, self.state.carrier)
        loss, weight, metrics = self.lowered.over_all(scores)
        totals: dict[str, list[Leaves]] = {kind: [] for kind in self.stacks}
        for group in self.alike.groups:
            first = group.chunks.start
            if group.shelved:
                rows = self.state.shelves[f"reduced {first}"]
                rest = iter([leaf.reshape(-1, *leaf.shape[2:]) for leaf in rows])
            else:
                rest = iter(self.state.reduced[first])
            for kind, _ in self.parts[first]:
                totals[kind].append([next(rest) for _ in floats(self.stacks[kind].leaves)])

        def block(total: jax.Array, at_rest: jax.Array, spec: PartitionSpec) -> jax.Array:
            total = self.lowered.over_others(total.astype(at_rest.dtype), spec)
            return (total if ring_axis(spec) is not None else lax.psum(total, RING)) / weight

        gradients = {}
        for kind, at_rest in self.model.stacks(parameters["blocks"]).items():
            stack = self.stacks[kind]
            whole = [jnp.concatenate(parts) for parts in zip(*totals[kind], strict=True)]
            specs = [s for s, p in zip(stack.specs, stack.leaves, strict=True) if is_float(p)]
            rows = zip(whole, floats(at_rest), specs, strict=True)
            gradients[kind] = like(at_rest, [block(*row) for row in rows])

        return LossAndGradients(
            loss=loss / weight,
            gradients=Parameters(
                edge=self.lowered.reduce_edge(
                    self.state.edge_gradient, parameters["edge"], self.specs["edge"], weight
                ),
                blocks=self.model.blocks(gradients),
            ),
            weight=weight,
            metrics=metrics,
        )


def _where(valid: jax.Array | None, make: Callable[[], Leaves]) -> Leaves:
    """What is made; zeros, and nothing made, where it is not valid."""
    if valid is None:
        return make()
    return lax.cond(valid, make, lambda: zeros(jax.eval_shape(make)))
