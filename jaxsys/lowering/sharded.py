"""Lowers a schedule of the ZeRO family to one step of explicit collectives.

All devices do the same, so that there is nothing to select: ticks and layers are written out, and
turns that are alike are one loop over microbatches. Each gather is one `all_gather` of a chunk's
packed shards, each reduction one `psum_scatter`. What keeps them where the schedule has them is
`optimization_barrier`:

* a gather's shards pass a barrier together with the activation (or cotangent) of the tick it starts
  in. So it cannot start earlier, and two gathers of one chunk are not the same expression, which
  XLA would merge into one whose result it keeps: the merge that silently turns ZeRO-3 into ZeRO-2;
* a reduction starts behind such a barrier too, and its result passes one in the tick by which it
  must have arrived, so that a deferred one does not drift on to the end of the step;
* the next microbatch's input waits for the last one's cotangent: independent microbatches would all
  be alive at once.

XLA:CPU drops barriers before it merges expressions; `base.CPU_COMPILER_OPTIONS` leaves them in.
Weights never outlive their copy: residuals that hold weights alone are made again from the copy
that B has (see `programs`).

Legend: P devices, C chunks, L layers, n elements of a chunk's shard.
"""

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.mesh import RING, batch_axes, over, ring_axis
from jaxsys.schedule import Move, MoveKind, Placement, Schedule, Task, TaskKind, check
from jaxsys.strategies import RECOMPUTES

from .base import Outcome, Step, add_to, check_fit, context_on, is_spec, sharded_spec
from .flat import Leaves, cast, flat_model, floats, head_back, is_float, like, pull_back
from .programs import BlockProgram, Recompute, block_program
from .refusal import why_not_lowered


def lower_sharded(
    schedule: Schedule,
    model: LayeredModel,
    mesh: Mesh,
    *,
    compute_dtype: Any = jnp.float32,
    gradient_dtype: Any = jnp.float32,
    recompute: Recompute | tuple[Recompute, ...] = "block",
    context: ContextSplit | None = None,
) -> "ShardedStep":
    """Checks a schedule whose parameters rest in shards and prepares its step.

    Args:
        schedule: of `Placement.SHARDED`, all devices alike, as `jaxsys.strategies.zero` makes them.
        model: the layered model it runs.
        mesh: axes `DATA` and `RING`, the ring as long as the schedule's devices.
        compute_dtype: dtype of gathered weights and of all compute.
        gradient_dtype: dtype in which gradients are reduced and locally summed.
        recompute: what backward computes again, for all layers or one each.
        context: how sequences lie over the mesh's CONTEXT axis, where it has one.

    Raises:
        ScheduleError: if the schedule is not legal.
        UsageError: if the mesh, the layers or the options do not fit it.
    """
    if schedule.placement is not Placement.SHARDED:
        raise UsageError(
            f"schedule {schedule.name} rests {schedule.placement}; this lowers sharded ones"
        )
    check_fit(schedule, model, mesh)
    policies = (recompute,) * model.layers if isinstance(recompute, str) else tuple(recompute)
    if len(policies) != model.layers:
        raise UsageError(f"{len(policies)} recompute policies for layers={model.layers}")
    taken = RECOMPUTES[schedule.placement].policies
    for policy in policies:
        if policy not in taken:
            legal = ", ".join(taken)
            raise UsageError(f"recompute={policy!r} is not a policy here; use one of {legal}")
    check(schedule)
    refused = why_not_lowered(schedule)
    if refused is not None:
        raise UsageError(refused)
    return ShardedStep(
        schedule=schedule,
        model=model,
        mesh=mesh,
        compute_dtype=jnp.dtype(compute_dtype),
        gradient_dtype=jnp.dtype(gradient_dtype),
        recompute=policies,
        context=context_on(mesh, model, context),
    )


@dataclass(frozen=True, kw_only=True)
class ShardedStep(Step):
    """A sharded schedule ready to run; the same surface as `LoweredStep`."""

    recompute: tuple[Recompute, ...]

    @cached_property
    def chunk_layers(self) -> tuple[range, ...]:
        """The layers of each chunk, as even as possible."""
        small, extra = divmod(self.model.layers, self.schedule.chunks)
        ends = np.cumsum([small + (c < extra) for c in range(self.schedule.chunks)])
        return tuple(range(int(e) - small - (c < extra), int(e)) for c, e in enumerate(ends))

    def to_rest(self, parameters: Parameters) -> Parameters:
        """Places parameters on the mesh; layers keep their order."""
        self.check_layers(parameters)
        return jax.device_put(parameters, self.rest_shardings(parameters))

    def from_rest(self, parameters: Parameters) -> Parameters:
        """The parameters in layer order, which is the order they rest in."""
        return parameters

    def loss_and_gradients(self, parameters: Parameters, batch: PyTree) -> Outcome:
        """The step's loss, gradients and metrics; trace it inside a jit of your own.

        Args:
            parameters: at rest, see `to_rest`.
            batch: leaves [D M, B, ...].

        Raises:
            UsageError: if the batch does not hold D M microbatches.
        """
        self.check_batch(batch)
        total = self.replicas * self.schedule.microbatches
        # Device d of a replica computes microbatches d, d + P, ...: bring them side by side.
        order = np.arange(total).reshape(self.replicas, -1, self.schedule.devices)
        order = order.transpose(0, 2, 1).reshape(-1)
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=0), batch)
        specs = self.rest_specs(parameters)
        step = jax.shard_map(
            _Run(self, specs).step,
            mesh=self.mesh,
            in_specs=(specs, self.sequences.specs(batch, (*batch_axes(self.mesh), RING))),
            out_specs=self.outcome_specs(specs),
            # Third-party kernels and split residuals carry no varying-axes types.
            check_vma=False,
        )
        return step(parameters, batch)

    def rest_specs(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs: every leaf over the ring and those that share its sequences, blocks along
        an axis behind their layers'."""
        parts, axes, cuts = self.shards, self.shard_axes, self.cuts(parameters)

        def spec(leaf: Any, cut: PartitionSpec, first: int) -> PartitionSpec:
            return sharded_spec(leaf.shape, parts, first_axis=first, cut=cut, axes=axes)

        return Parameters(
            edge=jax.tree.map(lambda p, c: spec(p, c, 0), parameters["edge"], cuts["edge"]),
            blocks=jax.tree.map(lambda p, c: spec(p, c, 1), parameters["blocks"], cuts["blocks"]),
        )


class _Stack:
    """The shards of all blocks of a kind, [layers of the kind, ...] each."""

    def __init__(self, shards: PyTree, specs: PyTree) -> None:
        self.leaves, self.structure = jax.tree.flatten(shards)
        self.specs = _spec_leaves(specs)
        self.axes = [ring_axis(spec) for spec in self.specs]

    def layer(self, devices: int) -> PyTree:
        """Shapes and dtypes of one layer's whole parameters."""
        found = []
        for leaf, axis in zip(self.leaves, self.axes, strict=True):
            shape = list(leaf.shape)
            if axis is not None:
                shape[axis] *= devices
            found.append(jax.ShapeDtypeStruct(shape[1:], leaf.dtype))
        return jax.tree.unflatten(self.structure, found)


class _ChunkLayout:
    """How a chunk's shards lie in rows, and how whole leaves come back from P of each.

    There is a row for each dtype. Leaves that no axis divides rest whole: they are not sent, and
    their gradient is summed over the ring once, at the end.
    """

    def __init__(self, shards: Leaves, axes: list[int | None], devices: int) -> None:
        """`shards`: leaves [K, ...] of one device; `axes`: along which each is cut."""
        self.axes, self.devices = axes, devices
        self.shapes = [leaf.shape for leaf in shards]
        sent = {
            leaf.dtype: None for leaf, axis in zip(shards, axes, strict=True) if axis is not None
        }
        self.dtypes = list(sent)
        self.rows = [
            -1 if a is None else self.dtypes.index(s.dtype)
            for s, a in zip(shards, axes, strict=True)
        ]

    def pack(self, shards: Leaves) -> Leaves:
        """Shards of the chunk -> [n] each."""
        return [
            jnp.concatenate(
                [leaf.reshape(-1) for leaf, at in zip(shards, self.rows, strict=True) if at == row]
            )
            for row in range(len(self.dtypes))
        ]

    def unpack(self, rows: Leaves, own: Leaves) -> Leaves:
        """[P, n] each and the chunk's own shards -> whole leaves [K, ...]."""
        found, starts = [], [0] * len(rows)
        for leaf, shape, axis, at in zip(own, self.shapes, self.axes, self.rows, strict=True):
            if axis is None:
                found.append(leaf)
                continue
            size = math.prod(shape)
            part = rows[at][:, starts[at] : starts[at] + size].reshape(self.devices, *shape)
            starts[at] += size
            merged = (*shape[:axis], self.devices * shape[axis], *shape[axis + 1 :])
            found.append(jnp.moveaxis(part, 0, axis).reshape(merged))
        return found

    def pack_whole(self, whole: Leaves) -> Leaves:
        """Whole leaves [K, ...] -> [P, n] each: row p is what belongs to device p."""
        parts: list[Leaves] = [[] for _ in self.dtypes]
        for leaf, shape, axis, at in zip(whole, self.shapes, self.axes, self.rows, strict=True):
            if axis is not None:
                cut = (*shape[:axis], self.devices, shape[axis], *shape[axis + 1 :])
                rows = jnp.moveaxis(leaf.reshape(cut), axis, 0)
                parts[at].append(rows.reshape(self.devices, -1))
        return [jnp.concatenate(part, axis=1) for part in parts]

    def split(self, rows: Leaves, whole: Leaves) -> Leaves:
        """[n] each -> shards [K, ...]; leaves that rest whole are taken from `whole`."""
        found, starts = [], [0] * len(rows)
        for leaf, shape, axis, at in zip(whole, self.shapes, self.axes, self.rows, strict=True):
            if axis is None:
                found.append(leaf)
                continue
            size = math.prod(shape)
            found.append(rows[at][starts[at] : starts[at] + size].reshape(shape))
            starts[at] += size
        return found


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
    landing: list[tuple[int, Move, PyTree]] = field(default_factory=list)
    """What is in flight: ticks until it must have arrived, counted from the turn's first."""


class _Run:
    """One trace of the step, inside shard_map: shapes are per device."""

    def __init__(self, lowered: ShardedStep, specs: Parameters) -> None:
        self.lowered, self.schedule, self.model = lowered, lowered.schedule, lowered.run_model
        self.specs, self.over = specs, over(lowered.shard_axes)
        self.turns = self.schedule.microbatches // self.schedule.devices
        self.half = self.schedule.chunks
        """Ticks of F, and of B, of a microbatch."""

    def turn_ticks(self, turn: int) -> range:
        """B of a device's microbatch number `turn` and F of the next."""
        return range((2 * turn + 1) * self.half, (2 * turn + 3) * self.half)

    def step(self, parameters: Parameters, batch: PyTree) -> Outcome:
        """blocks [L, ...] in shards, batch leaves [M / P, B, ...]."""
        lowered, schedule = self.lowered, self.schedule
        self.batch = batch = lowered.sequences.own(batch)
        self.edge = lowered.gather_edge(parameters["edge"], self.specs["edge"])
        stacks = self.model.stacks(cast(parameters["blocks"], lowered.compute_dtype))
        self.stacks = {kind: _Stack(stack, self.spec_of(kind)) for kind, stack in stacks.items()}
        self.parts = [self.parts_of(chunk) for chunk in lowered.chunk_layers]
        self.shards = [
            [p[rows.start : rows.stop] for kind, rows in parts for p in self.stacks[kind].leaves]
            for parts in self.parts
        ]
        self.layouts, self.gradient_layouts = [], []
        for parts, shards in zip(self.parts, self.shards, strict=True):
            axes = [axis for kind, _ in parts for axis in self.stacks[kind].axes]
            learned = [axis for axis, p in zip(axes, shards, strict=True) if is_float(p)]
            self.layouts.append(_ChunkLayout(shards, axes, lowered.shards))
            self.gradient_layouts.append(_ChunkLayout(floats(shards), learned, lowered.shards))
        microbatch = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batch)
        self.flat = flat_model(self.model, self.edge, microbatch)
        self.programs = self.block_programs(microbatch)
        self.state = _State(
            edge_gradient=lowered.empty_edge_gradient(self.edge),
            scores=(jnp.float32(0), jnp.float32(0), self.flat.empty_metrics()),
            carrier=[jnp.zeros((), lowered.compute_dtype)],
        )
        # A turn is B of a microbatch and F of the next; before the first comes F, after the last B.
        self.run_ticks(range(self.half), -1)
        steady = self.steady_turns
        for turn in range(self.turns - 1):
            if len(steady) > 1 and turn in steady:
                if turn == steady.start:
                    # What is carried must be there from the first turn on.
                    self.state.reduced = self.nothing_reduced() | self.state.reduced
                    self.loop(steady)
                continue
            self.run_ticks(self.turn_ticks(turn), turn)
        # With the sums that land after the last B.
        self.run_ticks(range(self.turn_ticks(self.turns - 1).start, schedule.ticks), self.turns - 1)
        for _, move, value in self.state.landing:
            self.land(move, value)
        self.embed_backward()
        return self.finish(parameters)

    @cached_property
    def steady_turns(self) -> range:
        """The longest run of turns that gather, use and reduce alike."""
        turns = self.turns - 1
        events = [self.events(turn) for turn in range(turns)]
        best = range(0)
        for start in range(turns):
            stop = start + 1
            while stop < turns and events[stop] == events[start]:
                stop += 1
            best = max(best, range(start, stop), key=len)
        return best

    def events(self, turn: int) -> list[tuple[Any, ...]]:
        """A turn's moves, the last uses of copies of weights, and the sums it begins with.

        Moves that are in flight when it begins count too. Tasks are alike in all turns.
        """
        ticks = self.turn_ticks(turn)
        moves = [
            (move.kind, move.block.chunk, move.start - ticks.start, move.arrive - ticks.start)
            for move in self.schedule.moves
            if move.start in ticks or move.start < ticks.start <= move.arrive
        ]
        last = [(tick - ticks.start, chunk) for (tick, chunk), is_last in self.last_uses.items()
                if is_last and tick in ticks]  # fmt: skip
        reduced = {
            move.block.chunk
            for move in self.schedule.moves
            if move.kind is MoveKind.REDUCE_SCATTER and move.start < ticks.start
        }
        sums = [("sum", c) for c in range(self.schedule.chunks) if turn and c not in reduced]
        return [*moves, *sorted(last), *sums]

    def loop(self, turns: range) -> None:
        """Runs turns that are alike as a loop: what is compiled does not grow with their number.

        Chunks stay written out: what lives on from turn to turn is a value of its own for each, and
        while nothing lives in it XLA gives its room to others. Between F and B that is the
        residuals; copies of weights that B keeps for F come and go in a turn, in the room of
        residuals.
        """
        state = self.state
        landing = [(due, move) for due, move, _ in state.landing]
        template = self.turn_ticks(turns.start)

        def load(carry: dict[str, Any]) -> None:
            for name, value in carry.items():
                setattr(state, name, value)
            state.landing = [(*row, v) for row, v in zip(landing, carry["landing"], strict=True)]

        def save() -> dict[str, Any]:
            values = {field.name: getattr(state, field.name) for field in fields(state)}
            return {**values, "landing": [value for _, _, value in state.landing]}

        def body(carry: dict[str, Any], turn: jax.Array) -> tuple[dict[str, Any], None]:
            load(carry)
            self.run_ticks(template, turn)
            return save(), None

        carry, _ = lax.scan(body, save(), jnp.arange(turns.start, turns.stop))
        load(carry)

    def run_ticks(self, ticks: range, turn: int | jax.Array) -> None:
        """Ticks of the schedule: B on the device's microbatch number `turn`, F on the next."""
        state = self.state
        for tick in ticks:
            offset = tick - ticks.start
            due = [row for row in state.landing if row[0] == offset]
            state.landing = [row for row in state.landing if row[0] != offset]
            for _, move, value in due:
                self.land(move, value)
            for move in self.schedule.moves_by_start[tick]:
                value = self.depart(move)
                if move.arrive == tick:
                    self.land(move, value)
                else:
                    state.landing.append((move.arrive - ticks.start, move, value))
            for task in self.schedule.tasks_by_tick[tick]:
                if task.device == 0:
                    self.run(task, turn)
            self.drop(tick)
        state.landing = [(due - len(ticks), move, value) for due, move, value in state.landing]

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

    def weights_of(self, chunk: int, layer: int) -> PyTree:
        """A layer's whole parameters, as the model has them, from its chunk's."""
        kind, row = self.model.places[layer]
        start = 0
        for other, rows in self.parts[chunk]:
            stack = self.stacks[other]
            if other == kind:
                whole = self.state.weights[chunk][start : start + len(stack.leaves)]
                return jax.tree.unflatten(stack.structure, [w[row - rows.start] for w in whole])
            start += len(stack.leaves)
        raise AssertionError(f"chunk {chunk} has no layer {layer}")

    @cached_property
    def last_uses(self) -> dict[tuple[int, int], bool]:
        """(tick, chunk) -> whether the copy of the weights read there is not read again."""
        events: dict[int, list[tuple[int, int, str]]] = {}
        for task in self.schedule.tasks:
            if task.device == 0:
                events.setdefault(task.chunk, []).append((task.tick, 1, "use"))
        for move in self.schedule.moves:
            if move.kind is MoveKind.ALL_GATHER:
                events.setdefault(move.block.chunk, []).append((move.arrive, 0, "new"))
        last: dict[tuple[int, int], bool] = {}
        for chunk, rows in events.items():
            rows.sort()
            for index, (tick, _, kind) in enumerate(rows):
                if kind == "use":
                    last[tick, chunk] = index + 1 == len(rows) or rows[index + 1][2] == "new"
        return last

    def drop(self, tick: int) -> None:
        for chunk in list(self.state.weights):
            if self.last_uses.get((tick, chunk)):
                del self.state.weights[chunk]

    # Moves.

    def tie(self, value: PyTree) -> PyTree:
        """The value, but not before the carrier; what follows on the carrier comes after it."""
        value, self.state.carrier = lax.optimization_barrier((value, self.state.carrier))
        return value

    def depart(self, move: Move) -> PyTree:
        chunk = move.block.chunk
        if move.kind is MoveKind.ALL_GATHER:
            shards = self.tie(self.shards[chunk])
            with jax.named_scope(f"gather_{chunk}_for_tick_{move.arrive}"):
                rows = [lax.all_gather(row, self.over) for row in self.layouts[chunk].pack(shards)]
            return rows, shards
        layout = self.gradient_layouts[chunk]
        gradient = self.tie(self.state.gradients.pop(chunk))
        with jax.named_scope(f"reduce_{chunk}_in_tick_{move.start}"):
            rows = [
                lax.psum_scatter(row, self.over, scatter_dimension=0)
                for row in layout.pack_whole(gradient)
            ]
        return layout.split(rows, gradient)

    def land(self, move: Move, value: PyTree) -> None:
        chunk = move.block.chunk
        if move.kind is MoveKind.ALL_GATHER:
            # One value: XLA would cut what a task reads now and what lives on after it from the
            # rows one by one, and hold both.
            self.state.weights[chunk] = lax.optimization_barrier(self.layouts[chunk].unpack(*value))
            return
        value = self.tie(value)
        value = jax.tree.map(lambda v: v.astype(jnp.float32), value)
        reduced = self.state.reduced
        there = reduced.get(chunk)
        # Added here and now: XLA would put it off, and hold what every reduction has brought.
        reduced[chunk] = self.tie(value if there is None else jax.tree.map(jnp.add, there, value))

    def nothing_reduced(self) -> dict[int, Leaves]:
        """Zeros in the place of every chunk's reduced sum."""

        return {
            chunk: [jnp.zeros(leaf.shape, jnp.float32) for leaf in floats(shards)]
            for chunk, shards in enumerate(self.shards)
        }

    # Tasks.

    def run(self, task: Task, turn: int | jax.Array) -> None:
        forward = task.kind is TaskKind.FORWARD
        microbatch = jax.tree.map(lambda leaf: leaf[turn + 1 if forward else turn], self.batch)
        (self.forward if forward else self.backward)(task.chunk, microbatch)

    def forward(self, chunk: int, microbatch: PyTree) -> None:
        state = self.state
        if chunk == 0:
            # The last microbatch is done with before this one begins.
            microbatch = self.tie(microbatch)
            self.embed_backward()
            state.carrier = self.flat.embed(self.edge, microbatch)
        x, kept = state.carrier, []
        for layer in self.lowered.chunk_layers[chunk]:
            own = self.weights_of(chunk, layer)
            x, residuals = self.programs[layer].forward(own, x, microbatch, jnp.int32(layer))
            kept.append(residuals)
        state.residuals[chunk] = kept
        state.carrier = x

    def backward(self, chunk: int, microbatch: PyTree) -> None:
        state = self.state
        dy = state.carrier
        if chunk == self.schedule.chunks - 1:
            found, d_edge, dy = head_back(self.flat, self.edge, dy, microbatch)
            self.add_to_edge(d_edge)
            state.scores = jax.tree.map(jnp.add, state.scores, found)
        kept = state.residuals.pop(chunk)
        parts: dict[str, list[Leaves]] = {kind: [] for kind, _ in self.parts[chunk]}
        for index, layer in reversed(list(enumerate(self.lowered.chunk_layers[chunk]))):
            own = self.weights_of(chunk, layer)
            # Recompute must not begin before the cotangent is there.
            residuals, dy = lax.optimization_barrier((kept[index], dy))
            program, number = self.programs[layer], jnp.int32(layer)
            dw, dy = program.backward(own, residuals, dy, microbatch, number)
            parts[self.model.kind_of[layer]].append(dw)
        gradient = [
            jnp.stack(leaves).astype(self.lowered.gradient_dtype)
            for layers in parts.values()
            for leaves in zip(*layers[::-1], strict=True)
        ]
        there = state.gradients.get(chunk)
        if there is not None:
            gradient = jax.tree.map(jnp.add, there, gradient)
        # The sum is made in its own tick, so that residuals are gone after it.
        gradient, dy = lax.optimization_barrier((gradient, dy))
        state.gradients[chunk] = gradient
        state.carrier = dy
        if chunk == 0:
            state.embedded = microbatch

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

    def finish(self, parameters: Parameters) -> Outcome:
        loss, weight, metrics = self.lowered.over_all(self.state.scores)
        totals: dict[str, list[Leaves]] = {kind: [] for kind in self.stacks}
        for chunk, parts in enumerate(self.parts):
            rest = iter(self.state.reduced[chunk])
            for kind, _ in parts:
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

        return Outcome(
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


def _spec_leaves(specs: PyTree) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=is_spec)
