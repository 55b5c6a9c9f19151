"""What a lowered step holds on each device, from sizes alone, before anything is compiled.

State at rest, whole copies of the edge's parameters and the sums of their gradients, what the
schedule has alive, and the most that one task holds while it runs. A lowered step keeps a buffer of
slots for each kind of data (`tables`), the arrivals of a tick beside the slots that they land in,
and a chunk's weight gradients before they are added; steps whose parameters rest in shards hold
what is alive, written out or nearly so in loops.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.layered import ALIKE, LayeredModel, PyTree, WithAgain
from jaxsys.schedule import (
    Block,
    Costs,
    Data,
    MoveKind,
    Placement,
    Schedule,
    TaskKind,
    Trace,
    alive_bytes,
)
from jaxsys.schedule.simulate import alive_by_tick

from .apart import RESIDUALS, lie_apart
from .flat import Leaves, flat_of, floats, head_back, read_by_head
from .kinds import Shared
from .liveness import peak_bytes
from .programs import INDEX, MADE_AGAIN, BlockProgram, Recompute, block_program
from .split import split_backward
from .tables import Buffers

Size = Any
"""Bytes: a number, or an array of them, one a case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBytes:
    """What a block keeps and holds under a recompute policy."""

    residual: float
    """Kept from F to B or I."""
    tap: float
    """Kept from I to W."""
    work: float
    """The most that its backward pass holds beside what it is given."""
    split_work: float | None = None
    """The same where it is cut into I and W; None: as much."""
    freeing: float | None = None
    """`work` where what it keeps and the cotangent are gone once they have been read for the last
    time, and not at the end; None: as much."""
    forward: float = 0.0
    """The most that its forward pass holds beside what it is given, keeps and returns."""

    @property
    def most_work(self) -> float:
        """What its backward pass holds, cut or not."""
        return max(self.work, self.split_work or 0.0)

    @property
    def freeing_work(self) -> float:
        """What its backward pass holds beside the whole of what it is given, if it frees that."""
        return self.work if self.freeing is None else self.freeing


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a step holds besides its schedule's data."""

    rest: Size
    """Masters and optimizer state of a device."""
    edge: Size
    """Whole copies of the edge's parameters."""
    edge_sums: Size
    """Sums of their gradients."""
    block: Size
    """The most that a block's backward pass holds beside what it is given."""
    head: Size
    """The most that head and loss hold, forward and backward."""
    split_block: Size = 0.0
    """`block` where backward passes are cut into I and W, if it is more."""
    freeing: Sequence[float] = ()
    """By chunk, `block` of a backward pass that frees what it is given, see `BlockBytes`."""
    forward: Sequence[float] = ()
    """By chunk, the most that a block's forward pass holds beside what it is given and makes."""
    head_sums: Size = 0.0
    """Of the sums of the edge's gradients those of what the head reads."""


def tree_bytes(tree: PyTree, dtype: Any = None) -> float:
    """Bytes of a tree of arrays or shapes, in a dtype of their own or another."""
    return float(
        sum(
            leaf.size * (leaf.dtype if dtype is None else jnp.dtype(dtype)).itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def block_bytes(
    model: LayeredModel,
    layer: PyTree,
    x: PyTree,
    microbatch: PyTree,
    policy: Recompute,
    *,
    split: bool,
    kind: str = ALIKE,
) -> BlockBytes:
    """Traces one block.

    Args:
        model: whose `block` is traced.
        layer: shapes and dtypes of one block's parameters.
        x: of a block's input.
        microbatch: of one microbatch.
        policy: what backward computes again; of `chunk` what a block's own part is.
        split: whether backward may be cut into I and W; there are no taps otherwise.
        kind: of the block.
    """
    found = _traced(model, layer, x, microbatch, policy, split, kind)
    block, held = model.kinds[kind], found.bytes
    if not (split and policy in MADE_AGAIN and isinstance(block, WithAgain) and block.differ(x)):
        return held
    whole = _traced(model, layer, x, microbatch, policy, False, kind).bytes
    return replace(whole, residual=held.residual, tap=held.tap, split_work=held.work)


def longest_block_bytes(
    model: LayeredModel,
    layers: Mapping[str, PyTree],
    x: PyTree,
    microbatch: PyTree,
    policy: Recompute,
    *,
    split: bool,
) -> BlockBytes:
    """What a step with buffers keeps of a block whatever its kind, which its room must do for.

    Args:
        model: whose blocks are traced.
        layers: kind -> shapes and dtypes of one block's parameters.
        x: of a block's input.
        microbatch: of one microbatch.
        policy: what backward computes again.
        split: whether backward is cut into I and W.
    """
    found = {
        kind: _traced(model, layer, x, microbatch, policy, split, kind)
        for kind, layer in layers.items()
    }
    return BlockBytes(
        residual=tree_bytes(Shared({kind: each.residuals for kind, each in found.items()}).specs),
        tap=tree_bytes(Shared({kind: each.taps for kind, each in found.items()}).specs),
        work=max(each.bytes.work for each in found.values()),
    )


def longest_layer_bytes(layers: Mapping[str, PyTree]) -> tuple[float, float]:
    """Bytes of a layer of any kind, as a step with buffers lays it out, and of its floats."""
    rows = Counter()
    for layer in layers.values():
        mine = Counter()
        for leaf in jax.tree.leaves(layer):
            mine[leaf.dtype] += leaf.size * leaf.dtype.itemsize
        rows |= mine
    whole = float(sum(rows.values()))
    return whole, float(sum(n for dtype, n in rows.items() if jnp.issubdtype(dtype, jnp.floating)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """What a block keeps, leaf by leaf, and holds."""

    residuals: Leaves
    taps: Leaves
    bytes: BlockBytes


def _traced(
    model: LayeredModel,
    layer: PyTree,
    x: PyTree,
    microbatch: PyTree,
    policy: Recompute,
    split: bool,
    kind: str,
) -> _Traced:
    inner: Recompute = "none" if policy == "chunk" else policy
    found: BlockProgram = block_program(model, layer, x, microbatch, inner, kind, split=split)
    backward = found.backward, layer, found.residuals, floats(x), microbatch, INDEX
    taps = split_backward(*backward).taps if split else []
    leaves = jax.tree.leaves(x)
    made = found.forward, layer, leaves, microbatch, INDEX
    returned = tree_bytes(jax.eval_shape(*made))
    return _Traced(
        residuals=found.residuals,
        taps=taps,
        bytes=BlockBytes(
            residual=tree_bytes(found.residuals),
            tap=tree_bytes(taps),
            work=peak_bytes(*backward),
            freeing=peak_bytes(*backward, freed=(1, 2)),  # residuals and the cotangent
            forward=max(0.0, peak_bytes(*made) - returned),
        ),
    )


def head_bytes(model: LayeredModel, edge: PyTree, x: PyTree, microbatch: PyTree) -> float:
    """The most that head and loss hold with their gradients; arguments are shapes and dtypes."""

    flat = flat_of(model, x)
    return peak_bytes(lambda e, v, m: head_back(flat, e, v, m)[1:], edge, flat.x, microbatch)


def head_sum_bytes(
    model: LayeredModel, edge: PyTree, x: PyTree, microbatch: PyTree, dtype: Any
) -> float:
    """Of the edge's floats those that head and loss read, in the dtype that sums have."""
    flat = flat_of(model, x)
    read = read_by_head(flat, edge, flat.x, microbatch)
    return tree_bytes([leaf for leaf, mine in zip(floats(edge), read, strict=True) if mine], dtype)


def tabled_bytes(
    schedule: Schedule,
    buffers: Buffers,
    size: Mapping[Data, Size],
    around: Around,
    *,
    sent_weight: Size | None = None,
    unroll: bool = False,
) -> Size:
    """The most that a device holds of a step with buffers.

    Args:
        schedule: whose parameters rest whole, on owners or everywhere.
        buffers: `tables.buffers_of` it.
        size: kind of data -> bytes of the largest chunk's.
        around: what else there is.
        sent_weight: bytes of the largest chunk's weights as they travel and lie in buffers, where
            tasks read them in another form.
        unroll: a chunk's layers are written out.
    """
    weight, read = size[Data.WEIGHT], 0.0
    if sent_weight is not None:
        size, read = {**size, Data.WEIGHT: sent_weight}, weight
    slots = sum(count * size[data] for (data, _), count in buffers.slots.items())
    apart = lie_apart(buffers.slots, schedule.chunks) if unroll else ()
    if unroll and buffers.slots[RESIDUALS] > 1 and RESIDUALS not in apart:
        slots += size[Data.RESIDUAL]  # a slot's layers are leaves of their own, copied in and out
    if RESIDUALS in apart and buffers.slots[RESIDUALS] > 2:
        # Branches that hand more than one on: compiled, a pipeline of two stages takes half a slot.
        slots += size[Data.RESIDUAL] / 2
    if schedule.placement is Placement.REPLICATED and schedule.chunks > 1:
        slots += schedule.chunks * size[Data.GRADIENT]  # of all chunks, summed over the devices
    if schedule.devices == schedule.microbatches == 1:
        slots -= size[Data.GRADIENT]  # nothing is summed, the update takes what backward made
    # A loop over layers stacks a chunk's weight gradients onto zeros of the same size.
    gradients = weight * (1 if unroll else 2)
    block = around.block
    if any(data is Data.TAP and count for (data, _), count in buffers.slots.items()):
        block = np.maximum(block, around.split_block)
    in_block = gradients + _in_flight(buffers, size) + block
    # The loss comes before, and arrivals after it; its branch returns sums beside those it was
    # given, and the zeros are there all step long.
    in_head = weight + around.edge_sums + around.head
    task = read + np.maximum(in_block, in_head)
    return around.rest + around.edge + around.edge_sums + slots + task


def _in_flight(buffers: Buffers, size: Mapping[Data, Size]) -> Size:
    """What arrives in a tick, and what is read out of or put into buffers of several slots."""
    several = {key for key, count in buffers.slots.items() if count > 1}
    arrivals: Size = 0.0
    for groups in buffers.groups:
        moved = sum(
            size[group.source[0]] * (2 if group.source in several else 1)
            for group in groups
            if group.kind is MoveKind.PERMUTE
        )
        arrivals = np.maximum(arrivals, moved)
    return arrivals + sum(size[key[0]] for key in several if key[0] in (Data.WEIGHT, Data.GRADIENT))


def sharded_peak_bytes(
    schedule: Schedule,
    costs: Costs,
    around: Around,
    found: Trace,
    *,
    group: int | None = None,
    looped: bool = False,
) -> float:
    """The most that a device holds where parameters rest in shards.

    Args:
        schedule: whose parameters rest in shards.
        costs: bytes of its data.
        around: what else there is.
        found: the schedule's trace.
        group: devices that shards are of, where several stand for one of the schedule's.
        looped: chunks that are alike are a loop, whose reduced sums have their room all along.
    """
    group = group or schedule.devices
    turns = schedule.microbatches // schedule.devices
    growing = schedule.microbatches == schedule.devices and not looped
    counts = Counter((move.kind, move.block.chunk) for move in schedule.moves)
    shards = sum(
        shard_bytes(
            costs.block_bytes(Block(data=Data.WEIGHT, chunk=chunk)),
            costs.block_bytes(Block(data=Data.GRADIENT, chunk=chunk)),
            gathers=counts[MoveKind.ALL_GATHER, chunk],
            sums=not growing and counts[MoveKind.REDUCE_SCATTER, chunk] == turns,
            devices=group,
        )
        for chunk in range(schedule.chunks)
    )
    if growing:
        alive = max(
            _single_turn(schedule, costs, around, found, device, group)
            for device in range(schedule.devices)
        )
        return around.rest + shards + alive
    alive = max(alive_bytes(schedule, costs, found))
    task = around.edge + around.edge_sums + max(around.block, around.head)
    return around.rest + shards + task + alive


def _single_turn(
    schedule: Schedule, costs: Costs, around: Around, found: Trace, device: int, group: int
) -> float:
    """The most that a device holds beside what rests, where it has a single microbatch.

    Every sum is reduced once, when residuals of later chunks are gone. Copies of the edge's weights
    are gone when blocks are gone back through, and of its sums those of the head alone are there.
    A backward pass frees what it is given as it goes; what it makes, the gradient and the
    cotangent, is among what it holds.
    """
    rows = [sum(tick.values()) for tick in alive_by_tick(schedule, costs, found, device)]
    rows += [0.0] * (schedule.ticks - len(rows))
    made = [0.0] * len(rows)
    for copy in found.on_device(device):
        size = costs.block_bytes(copy.block)
        if copy.block.data in (Data.COTANGENT, Data.GRADIENT) and copy.made_at < len(rows):
            made[copy.made_at] += size
        if copy.block.data is Data.GRADIENT:
            for tick in range(copy.made_at + 1, len(rows)):
                rows[tick] += size / group
    most = [0.0]
    for task in schedule.tasks:
        if task.device != device:
            continue
        tick, chunk = task.tick, task.chunk
        if task.kind is TaskKind.FORWARD:
            inside = rows[tick] + around.edge + around.forward[chunk]
        else:
            held = rows[tick] - made[tick]
            inside = held + around.head_sums + max(made[tick], around.freeing[chunk])
            if chunk == schedule.chunks - 1:
                inside = max(inside, held + around.edge + around.head)
            if chunk == 0:
                inside = max(inside, rows[tick] + around.edge_sums)
        most.append(inside)
    return max(most)


def shard_bytes(
    weight_bytes: float,
    gradient_bytes: float,
    *,
    gathers: int,
    sums: bool,
    devices: int,
) -> float:
    """What a sharded chunk holds all step long beside its state, which no copy stands for.

    Weights that are gathered again and again come from a shard cast once; a single gather casts as
    it goes. Sums that are reduced in every turn need a shard (`sums`), but a gradient that is
    summed locally all step long gives its room to its shard when it is reduced.
    """
    held = weight_bytes / devices if gathers > 1 else 0.0
    return held + (gradient_bytes / devices if sums else 0.0)
