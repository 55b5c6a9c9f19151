"""One trace of a lowered step, inside `shard_map`: what a device carries and does, tick by tick.

A tick starts the permutes of what it holds, runs its tasks from its row of the tables, and takes
the arrivals in at its end: a transfer has no other dependency, so XLA can start it before and
finish it after the tick's compute. Backward runs before forward within a tick, so that a
residual slot it frees can be written again at once.

Legend: P devices, C chunks, K layers a chunk, V = C / P chunks at rest on a device, T ticks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.axes import RING
from jaxsys.layered import Parameters, PyTree
from jaxsys.schedule import Data, MoveKind, Placement, TaskKind

from .apart import RESIDUALS, TAPS, in_slot, lie_apart
from .base import LossAndGradients, Step, add_to, is_spec
from .bodies import BufferKey, GroupSignature, Segment, TaskSignature, TickSignature
from .eight_bits import EncodedRows
from .flat import Leaves, cast, flat_model, floats, head_back, is_float, like, pull_back
from .kinds import Choice, RestOrder
from .packing import Packing
from .place import WITHIN, SharedPlace, devices_of_place, shared_place
from .programs import ChunkProgram, Recompute, SplitChunkProgram, chunk_program
from .tables import Tables

Buffer = Any
"""A buffer's value: a pytree; with more than one slot its leaves have a leading slot axis."""


@dataclass(frozen=True, kw_only=True)
class TabledStep(Step):
    """A schedule with the tables that its devices follow."""

    recompute: Recompute
    unroll: bool
    tables: Tables
    travel_dtype: Any
    """In which sums of gradients go from device to device; they are added in `gradient_dtype`."""

    @property
    def chunk_layers(self) -> int:
        """K, the layers of a chunk; the last chunk may hold fewer and is padded."""
        return -(-self.model.layers // self.schedule.chunks)

    @cached_property
    def rest_order(self) -> RestOrder:
        """Where each layer rests: on its chunk's owner, or everywhere."""
        chunks = np.arange(self.schedule.chunks)[None]
        if self.schedule.placement is Placement.OWNER:
            chunks = self.tables.local_chunks
        return RestOrder(self.model, chunks, self.chunk_layers)


@dataclass(slots=True, kw_only=True)
class _State:
    """What a device carries from tick to tick."""

    buffers: dict[BufferKey, Buffer]
    edge_gradient: Leaves
    reduced: Leaves | None
    """Sums over all devices, leaves [C, K, ...] (Placement.REPLICATED)."""
    scores: PyTree
    """Sums of loss, weight and metrics."""


jax.tree_util.register_dataclass(
    _State,
    data_fields=["buffers", "edge_gradient", "reduced", "scores"],
    meta_fields=[],
)


class Run:
    """One trace of the step, inside shard_map: shapes below are per device."""

    def __init__(self, lowered: TabledStep, specs: Parameters) -> None:
        self.lowered, self.specs = lowered, specs
        self.schedule, self.model, self.tables = lowered.schedule, lowered.run_model, lowered.tables
        self.edge: PyTree
        self.batch: PyTree
        self.program: ChunkProgram
        self.packing: Packing | None = None
        self.encoding: EncodedRows | None = None
        """Of weights that travel in float8."""
        self.chunk: PyTree
        """Shapes and dtypes of a chunk's weights as tasks read them."""

    def step(self, rows: jax.Array, parameters: Parameters, batch: PyTree):
        """rows [1, T, columns], blocks [V K, ...], batch [M or M / P, B, ...]."""
        lowered, moves = self.lowered, self.schedule.moves
        self.batch = batch = lowered.sequences.own(batch)
        self.edge = lowered.gather_edge(parameters["edge"], self.specs["edge"])
        model = self.model
        stacks = model.stacks(cast(parameters["blocks"], lowered.compute_dtype))
        rows_of = lowered.rest_order.rows
        stacks = {
            kind: jax.tree.map(lambda p, n=rows_of[kind]: p.reshape(-1, n, *p.shape[1:]), stack)
            for kind, stack in stacks.items()
        }
        layers = {
            kind: jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[2:], p.dtype), stack)
            for kind, stack in stacks.items()
        }
        travel = any(m.kind is MoveKind.PERMUTE and m.block.data is Data.WEIGHT for m in moves)
        first, *others = layers.values()
        if travel or any(other != first for other in others):
            self.packing = packing = Packing(layers, place=self.place)
            model = packing.packed(model)
            packed = {kind: packing.pack(kind, stack) for kind, stack in stacks.items()}
            if travel and model.travels_in_float8 is not None:
                self.encoding = EncodedRows(model, layers, packing)
                pieces = WITHIN if devices_of_place(lowered.mesh) > 1 else ()
                sent = self.encoding.encode(stacks, pieces)
            else:
                sent = packed
            stacks = packed
        else:
            sent = stacks
        own = lowered.rest_order.by_position(sent)
        self.chunk = chunk = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct((lowered.chunk_layers, *p.shape[2:]), p.dtype),
            next(iter(stacks.values())),
        )
        microbatch = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batch)
        self.flat = flat_model(self.model, self.edge, microbatch)
        self.program = chunk_program(
            model,
            chunk,
            jax.tree.unflatten(self.flat.structure, self.flat.x),
            microbatch,
            recompute=lowered.recompute,
            padded=lowered.chunk_layers * self.schedule.chunks != self.model.layers,
            unroll=lowered.unroll,
            split=any(t.kind is TaskKind.INPUT_GRADIENT for t in self.schedule.tasks),
        )
        state = self.initial_state(own, chunk)
        for segment in self.tables.segments:
            state = self.run_segment(segment, rows[0], state)
        return self.finish(state, parameters)

    @property
    def place(self) -> "SharedPlace | None":
        """How the devices of a place share a layer; None where each place is one device."""
        stacks = self.model.stacks(self.specs["blocks"])
        specs = {kind: jax.tree.leaves(stack, is_leaf=is_spec) for kind, stack in stacks.items()}
        return shared_place(self.lowered.mesh, specs, self.lowered.gradient_dtype)

    def initial_state(self, own: PyTree, chunk: PyTree) -> _State:
        lowered, slots = self.lowered, self.tables.slots
        gradient = [jax.ShapeDtypeStruct(w.shape, lowered.gradient_dtype) for w in floats(chunk)]
        shapes: dict[Data, PyTree] = {
            Data.WEIGHT: jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), own),
            Data.GRADIENT: gradient,
            Data.ACTIVATION: self.flat.x,
            Data.COTANGENT: self.flat.cotangents,
        }
        buffers: dict[BufferKey, Buffer] = {}
        for key, count in slots.items():
            data, _ = key
            if data in (Data.RESIDUAL, Data.TAP):
                of = self.program.empty_residuals if key == RESIDUALS else self.halves.empty_taps
                apart = key in self.apart
                buffers[key] = tuple(of(1) for _ in range(count)) if apart else of(count)
            elif key in self.tables.start_slots:
                buffers[key] = self.starting_weights(key, count, own)
            else:
                lead = () if count == 1 else (count,)
                buffers[key] = jax.tree.map(
                    lambda s, lead=lead: jnp.zeros((*lead, *s.shape), s.dtype), shapes[data]
                )
        reduced: Leaves | None = None
        if self.schedule.placement is Placement.REPLICATED:
            reduced = jax.tree.map(
                lambda g: jnp.zeros((self.schedule.chunks, *g.shape), jnp.float32), gradient
            )
        return _State(
            buffers=buffers,
            edge_gradient=lowered.empty_edge_gradient(self.edge),
            reduced=reduced,
            scores=(jnp.float32(0), jnp.float32(0), self.flat.empty_metrics()),
        )

    @cached_property
    def apart(self) -> frozenset[BufferKey]:
        """The buffers whose slots are values of their own."""
        if not self.lowered.unroll:
            return frozenset()
        return lie_apart(self.tables.slots, self.schedule.chunks)

    def starting_weights(self, key: BufferKey, count: int, own: PyTree) -> Buffer:
        """The chunks at rest, put into the slots in which they start."""
        table = self.tables.start_slots[key]
        places = table.shape[1]
        if count == places and (table == np.arange(places)).all():
            return own if count > 1 else jax.tree.map(lambda p: p[0], own)
        device = lax.axis_index(RING)
        buffer = jax.tree.map(lambda p: jnp.zeros((count, *p.shape[1:]), p.dtype), own)
        for place in range(places):
            slot = jnp.asarray(table[:, place])[device]
            value = jax.tree.map(lambda p, i=place: p[i], own)
            buffer = _write(buffer, max(count, 2), jnp.maximum(slot, 0), value, slot >= 0)
        return buffer if count > 1 else jax.tree.map(lambda b: b[0], buffer)

    def run_segment(self, segment: Segment, rows: jax.Array, state: _State) -> _State:
        length = len(segment.period)
        stop = segment.start + length * segment.repeats
        chosen = rows[segment.start : stop].reshape(segment.repeats, length, -1)

        def period(state: _State, rows: jax.Array):
            for position, signature in enumerate(segment.period):
                state = self.tick(signature, rows[position], state)
            return state, None

        if segment.repeats > 1:
            return lax.scan(period, state, chosen)[0]
        if not self.apart:
            return period(state, chosen[0])[0]

        # Once round a loop whose end the compiler does not know: what a loop carries stays in its
        # place, and in a straight line branches copied the slots that they only hand on.
        def once(carried):
            return carried[0] + 1, period(carried[1], chosen[0])[0]

        end = lax.optimization_barrier(jnp.int32(1))
        return lax.while_loop(lambda carried: carried[0] < end, once, (jnp.int32(0), state))[1]

    def tick(self, signature: TickSignature, row: jax.Array, state: _State) -> _State:
        cell = _Cells(self.tables.columns, row)
        flights = []
        for group in signature.groups:
            if group.exposed:
                state = self.land(group, self.depart(group, cell, state), cell, state)
        for group in signature.groups:
            if not group.exposed:
                flights.append((group, self.depart(group, cell, state)))
        contributions = []
        tasks = {task.kind: task for task in signature.tasks}
        if TaskKind.WEIGHT_GRADIENT in tasks:
            state, gradient = self.weight_gradient(tasks[TaskKind.WEIGHT_GRADIENT], cell, state)
            contributions.append((TaskKind.WEIGHT_GRADIENT, gradient))
        if TaskKind.INPUT_GRADIENT in tasks:
            state, _ = self.backward(tasks[TaskKind.INPUT_GRADIENT], cell, state)
        if TaskKind.BACKWARD in tasks:
            state, gradient = self.backward(tasks[TaskKind.BACKWARD], cell, state)
            contributions.append((TaskKind.BACKWARD, gradient))
        if TaskKind.FORWARD in tasks:
            state = self.forward(tasks[TaskKind.FORWARD], cell, state)
        for group, arrived in flights:
            state = self.land(group, arrived, cell, state)
        for kind, gradient in contributions:
            state = self.contribute(kind, gradient, cell, state)
        return state

    def depart(self, group: GroupSignature, cell: "_Cells", state: _State) -> PyTree:
        key = group.source
        value = _read(state.buffers[key], self.tables.slots[key], cell[f"{group.name}.send"])
        if group.kind is MoveKind.PERMUTE:
            if key[0] is Data.GRADIENT:
                value = cast(value, self.lowered.travel_dtype)
            return jax.tree.map(lambda v: lax.ppermute(v, RING, sorted(group.pairs)), value)
        if group.kind is MoveKind.ALL_REDUCE:
            return jax.tree.map(lambda v: lax.psum(v.astype(jnp.float32), RING), value)
        return value

    def land(self, group: GroupSignature, arrived: PyTree, cell: "_Cells", state: _State) -> _State:
        slot = cell[f"{group.name}.receive"]
        if group.kind is MoveKind.ALL_REDUCE:
            count = self.schedule.chunks
            there = _read(state.reduced, max(count, 2), slot)
            total = jax.tree.map(jnp.add, there, arrived)
            return _replace(state, reduced=_write(state.reduced, max(count, 2), slot, total, None))
        key = group.target
        if key[0] is Data.GRADIENT:
            arrived = cast(arrived, self.lowered.gradient_dtype)
        count = self.tables.slots[key]
        valid = cell[f"{group.name}.valid"] == 1
        if group.merge:
            there = _read(state.buffers[key], count, slot)
            arrived = jax.tree.map(jnp.add, there, arrived)
        landed = _write(state.buffers[key], count, slot, arrived, None if group.everyone else valid)
        return _replace(state, buffers={**state.buffers, key: landed})

    def forward(self, task: TaskSignature, cell: "_Cells", state: _State) -> _State:
        lane = (Data.WEIGHT, self.schedule.forward_lane)
        kind = task.kind
        activation = (Data.ACTIVATION, "")
        slots = self.tables.slots

        def run(buffers: dict[BufferKey, Buffer]) -> dict[BufferKey, Buffer]:
            chunk = cell[f"{kind}.chunk"]
            sent = _read(state.buffers[lane], slots[lane], cell[f"{kind}.in.weight"])
            weights = self.as_read(sent, chunk)
            microbatch = self.microbatch(cell[f"{kind}.microbatch"])

            def embed():
                return self.flat.embed(self.edge, microbatch)

            def carried():
                slot = cell[f"{kind}.in.activation"]
                return _read(buffers[activation], slots[activation], slot)

            x = _choose(task.first, chunk == 0, embed, carried)
            first_layer = chunk * self.lowered.chunk_layers
            y, kept = in_slot(
                buffers[RESIDUALS],
                cell[f"{kind}.out.residual"],
                lambda kept, slot: self.program.forward(
                    weights, x, microbatch, kept, slot, first_layer
                ),
                apart=RESIDUALS in self.apart,
            )
            slot = cell[f"{kind}.out.activation"]
            made = _write(buffers[activation], slots[activation], slot, y, None)
            return {activation: made, RESIDUALS: kept}

        mine = {key: state.buffers[key] for key in (activation, RESIDUALS)}
        if not task.everyone:
            mine = lax.cond(cell[f"{kind}.valid"] == 1, run, lambda buffers: buffers, mine)
        else:
            mine = run(mine)
        return _replace(state, buffers={**state.buffers, **mine})

    def as_read(self, sent: PyTree, chunk: jax.Array) -> PyTree:
        """A chunk's weights as they have come, as its task reads them."""
        if self.encoding is None:
            return sent
        choice = Choice(self.model, self.lowered.chunk_layers, unroll=False)
        return self.encoding.decode(sent, choice, chunk * self.lowered.chunk_layers)

    def backward(self, task: TaskSignature, cell: "_Cells", state: _State):
        """B, or I: both start at the head or at a cotangent and end at the embedding or at one.

        Returns the state and, of B, the weight gradient.
        """
        kind = task.kind
        whole = kind is TaskKind.BACKWARD
        lane = (Data.WEIGHT, self.schedule.backward_lane)
        activation, cotangent = (Data.ACTIVATION, ""), (Data.COTANGENT, "")
        slots = self.tables.slots

        def run(edge_gradient: Leaves, scores: PyTree, made: PyTree):
            cotangents, taps, kept = made
            sent = _read(state.buffers[lane], slots[lane], cell[f"{kind}.in.weight"])
            weights = self.as_read(sent, cell[f"{kind}.chunk"])
            microbatch = self.microbatch(cell[f"{kind}.microbatch"])
            chunk = cell[f"{kind}.chunk"]

            def head():
                slot = cell[f"{kind}.in.activation"]
                x = _read(state.buffers[activation], slots[activation], slot)
                found, d_edge, dx = head_back(self.flat, self.edge, x, microbatch)
                total = jax.tree.map(jnp.add, scores, found)
                return dx, add_to(edge_gradient, d_edge), total

            def carried():
                dy = _read(cotangents, slots[cotangent], cell[f"{kind}.in.cotangent"])
                return dy, edge_gradient, scores

            dy, edge_gradient, scores = _choose(
                task.last, chunk == self.schedule.chunks - 1, head, carried
            )
            first_layer = chunk * self.lowered.chunk_layers

            def from_kept(kept: Buffer, slot: Any):
                arguments = weights, kept, slot, dy, microbatch, first_layer
                if whole:
                    gradient, dx, kept = self.program.backward(*arguments)
                    return (gradient, dx, taps), kept

                def into_taps(taps: Buffer, slot: Any):
                    dx, handed_on, taps = self.halves.input_gradient(*arguments, taps, slot)
                    return (dx, handed_on), taps

                slot = cell[f"{kind}.out.tap"]
                (dx, kept), tapped = in_slot(taps, slot, into_taps, apart=TAPS in self.apart)
                return (None, dx, tapped), kept

            slot = cell[f"{kind}.in.residual"]
            (gradient, dx, taps), kept = in_slot(
                kept, slot, from_kept, apart=RESIDUALS in self.apart
            )

            def embed():
                _, vjp = pull_back(lambda e: self.flat.embed(e, microbatch), self.edge)
                return add_to(edge_gradient, vjp(dx)[0])

            edge_gradient = _choose(task.first, chunk == 0, embed, lambda: edge_gradient)
            if task.first != "always":
                slot = cell[f"{kind}.out.cotangent"]
                valid = None if task.first == "never" else chunk != 0
                cotangents = _write(cotangents, slots[cotangent], slot, dx, valid)
            return edge_gradient, scores, (cotangents, taps, kept), gradient

        made = (state.buffers.get(cotangent), state.buffers.get(TAPS), state.buffers[RESIDUALS])
        carried = (state.edge_gradient, state.scores, made)
        if task.everyone:
            outcome = run(*carried)
        else:

            def skip(*carried):
                return (*carried, self.no_gradient(self.chunk) if whole else None)

            outcome = lax.cond(cell[f"{kind}.valid"] == 1, run, skip, *carried)
        # The residuals are read by now: forward may write the slot that this frees.
        outcome = lax.optimization_barrier(outcome)
        edge_gradient, scores, (cotangents, taps, kept), gradient = outcome
        written = {RESIDUALS: kept, cotangent: cotangents, TAPS: taps}
        buffers = {**state.buffers, **{k: v for k, v in written.items() if v is not None}}
        state = _replace(state, buffers=buffers, edge_gradient=edge_gradient, scores=scores)
        return state, gradient

    @property
    def halves(self) -> SplitChunkProgram:
        assert self.program.split is not None, "the schedule has I and W tasks"
        return self.program.split

    def weight_gradient(self, task: TaskSignature, cell: "_Cells", state: _State):
        """W: the weight gradient from what I kept."""
        kind = task.kind

        def run(taps: Buffer) -> tuple[PyTree, Buffer]:
            first_layer = cell[f"{kind}.chunk"] * self.lowered.chunk_layers
            return in_slot(
                taps,
                cell[f"{kind}.in.tap"],
                lambda taps, slot: self.halves.weight_gradient(taps, slot, first_layer),
                apart=TAPS in self.apart,
            )

        taps = state.buffers[TAPS]
        if task.everyone:
            outcome = run(taps)
        else:
            shapes, _ = jax.eval_shape(run, taps)

            def skip(taps: Buffer) -> tuple[PyTree, Buffer]:
                return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), taps

            outcome = lax.cond(cell[f"{kind}.valid"] == 1, run, skip, taps)
        # The taps are read by now: I may write the slot that this frees.
        gradient, taps = lax.optimization_barrier(outcome)
        return _replace(state, buffers={**state.buffers, TAPS: taps}), gradient

    def no_gradient(self, weights: PyTree) -> PyTree:
        """What `backward` of the program returns for these weights, zero."""
        if not self.lowered.unroll:
            return [jnp.zeros_like(w) for w in floats(weights)]
        layer = [jnp.zeros(w.shape[1:], w.dtype) for w in floats(weights)]
        return [layer] * self.lowered.chunk_layers

    def contribute(self, kind: TaskKind, gradient: PyTree, cell: "_Cells", state: _State) -> _State:
        """Adds a task's weight gradient to the accumulator that is here at the end of the tick."""
        key = (Data.GRADIENT, "")
        count = self.tables.slots[key]
        slot = cell[f"{kind}.out.gradient"]
        fresh = cell[f"{kind}.fresh"] == 1
        there = _read(state.buffers[key], count, slot)

        def added(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(fresh, jnp.zeros_like(old), old) + new.astype(old.dtype)

        if self.lowered.unroll:  # in place, layer by layer: stacking them first is a second pass
            total = there
            for layer, part in enumerate(gradient):
                total = jax.tree.map(
                    lambda sums, new, i=layer: lax.dynamic_update_index_in_dim(
                        sums, added(sums[i], new), i, 0
                    ),
                    total,
                    part,
                )
        else:
            total = jax.tree.map(added, there, gradient)
        buffers = {**state.buffers, key: _write(state.buffers[key], count, slot, total, None)}
        return _replace(state, buffers=buffers)

    def microbatch(self, index: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), self.batch
        )

    def finish(self, state: _State, parameters: Parameters) -> LossAndGradients:
        loss, weight, metrics = self.lowered.over_all(state.scores)
        if self.schedule.placement is Placement.REPLICATED:
            sums = state.reduced
        else:
            key = (Data.GRADIENT, "")
            count, table = self.tables.slots[key], self.tables.final_slots
            device = lax.axis_index(RING)
            parts = [
                _read(state.buffers[key], count, jnp.asarray(table[:, place])[device])
                for place in range(table.shape[1])
            ]
            sums = jax.tree.map(lambda *p: jnp.stack(p), *parts)
        assert sums is not None, "replicated chunks are summed over all devices"
        by_kind = self.lowered.rest_order.by_kind(sums)
        if self.packing is not None:
            unpack = self.packing.unpack_gradient
            by_kind = {kind: unpack(kind, rows) for kind, rows in by_kind.items()}

        def block_gradient(total: jax.Array, at_rest: jax.Array, spec: Any) -> jax.Array:
            total = total.reshape(at_rest.shape).astype(at_rest.dtype)
            return self.lowered.over_others(total, spec, done=WITHIN) / weight

        def of_kind(kind: str, stack: PyTree) -> PyTree:
            specs = jax.tree.leaves(self.model.stacks(self.specs["blocks"])[kind], is_leaf=is_spec)
            pairs = zip(jax.tree.leaves(stack), specs, strict=True)
            learned = [spec for leaf, spec in pairs if is_float(leaf)]
            rows = zip(by_kind[kind], floats(stack), learned, strict=True)
            return like(stack, [block_gradient(*row) for row in rows])

        stacks = {
            kind: of_kind(kind, stack)
            for kind, stack in self.model.stacks(parameters["blocks"]).items()
        }
        return LossAndGradients(
            loss=loss / weight,
            gradients=Parameters(
                edge=self.lowered.reduce_edge(
                    state.edge_gradient, parameters["edge"], self.specs["edge"], weight
                ),
                blocks=self.model.blocks(stacks),
            ),
            weight=weight,
            metrics=metrics,
        )


class _Cells:
    """A device's table row by column name; what a device has no entry for reads as 0."""

    def __init__(self, columns: dict[str, int], row: jax.Array) -> None:
        self.columns, self.row = columns, row

    def __getitem__(self, name: str) -> jax.Array:
        return self.row[self.columns[name]] if name in self.columns else jnp.int32(0)


def _choose(share: str, condition: jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`yes` or `no` by a condition that may be known for all devices."""
    if share == "always":
        return yes()
    if share == "never":
        return no()
    return lax.cond(condition, yes, no)


def _read(buffer: Buffer, slots: int, slot: jax.Array) -> PyTree:
    if slots == 1:
        return buffer
    return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, slot, 0, keepdims=False), buffer)


def _write(
    buffer: Buffer, slots: int, slot: jax.Array, value: PyTree, valid: jax.Array | None
) -> Buffer:
    if valid is not None:
        there = _read(buffer, slots, slot)
        value = jax.tree.map(lambda new, old: jnp.where(valid, new, old), value, there)
    if slots == 1:
        return value
    return jax.tree.map(lambda b, v: lax.dynamic_update_index_in_dim(b, v, slot, 0), buffer, value)


def _replace(state: _State, **changes: Any) -> _State:
    fields = {name: getattr(state, name) for name in _State.__slots__}
    return _State(**{**fields, **changes})
