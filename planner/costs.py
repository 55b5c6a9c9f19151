"""From a workload, a device and a link to what a schedule's tasks and blocks cost.

Products run at the device's achievable rate, fused attention at its own, everything else at memory
speed, sums of gradients over microbatches too. With recompute `block` only a block's input is kept
and the backward pass runs the block's forward again; with `around-attention` all of it but
attention, and with `selective` what is neither a product nor attention. Memory at rest is master
weights and Adam's two moments in float32, 12 bytes per parameter, as owned, sharded or replicated;
copies in motion, gradients and residuals are counted where and while the schedule's trace has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jaxsys.axes import parts_of_block
from jaxsys.errors import UsageError, did_you_mean
from jaxsys.hardware import DeviceSpec
from jaxsys.lowering.memory import Around, BlockBytes, sharded_peak_bytes, tabled_bytes
from jaxsys.lowering.tables import Buffers
from jaxsys.planner.axes import Joined, Split
from jaxsys.planner.sharing import Pass
from jaxsys.planner.workload import PLANNED_RECOMPUTE, BlockWork, Workload
from jaxsys.schedule import (
    Block,
    Costs,
    Data,
    Inside,
    Link,
    Placement,
    Schedule,
    TaskKind,
    Trace,
    alive_bytes,
    check,
)

ATTENTION_BACKWARD = 2.5
"""Products of the fused attention's backward pass over those of its forward pass: 5 to 2."""
UPDATE_PASSES = 7
"""float32 values moved per parameter by Adam: four read (weight, both moments, gradient), three
written."""
SUM_PASSES = 3
"""A microbatch's gradient joins the sum of those before: two read, one written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per parameter of each kind of copy."""

    weight_bytes: float = 2.0
    """Weights in use, and in motion where nothing else is said."""
    sent_weight_bytes: float | None = None
    """Of blocks on their way, on average, as where matrices travel in float8."""
    gradient_bytes: float = 4.0
    """Gradient sums, held and on the wire."""
    rest_bytes: float = 12.0
    """Master weight and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """One block on one device."""

    forward_s: float
    input_gradient_s: float
    """I, recompute included."""
    weight_gradient_s: float
    weight_bytes: float
    sent_weight_bytes: float
    """On their way."""
    gradient_bytes: float
    residual_bytes: float
    """Kept from F to B or I."""
    tap_bytes: float
    """Kept from I to W."""
    work_bytes: float
    """Held only while the block's B runs: what recompute brings back among it."""
    split_work_bytes: float
    """The same where B may be cut into I and W."""
    freeing_bytes: float
    """The same where B is given what it frees as it goes."""
    forward_bytes: float
    """Held only while the block's F runs."""
    sent_bytes: float
    """Sent by F and B together to join split features, experts and sequences."""
    join_s: float = 0.0
    """What F and B together wait for that; within their times."""
    forward_inside: tuple[Inside, ...] = ()
    """What devices that share its sequences send each other in F."""
    backward_inside: tuple[Inside, ...] = ()
    """Likewise in B or I."""
    place_join_s: float = 0.0
    """What the devices of a place that have pieces wait for its weights before each pass, outside
    their times."""
    place_join_sent: float = 0.0
    """Bytes that each sends for it."""
    place_cut_s: float = 0.0
    """Likewise for its gradient, after B or W."""
    place_cut_sent: float = 0.0

    @property
    def backward_s(self) -> float:
        """B, which is I and W in one."""
        return self.input_gradient_s + self.weight_gradient_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a step costs outside the tasks and moves of its blocks."""

    embed_s: float
    head_s: float
    before_s: float
    after_s: float
    update_s: float
    edge_bytes: float
    """Copies of embedding and head, all step long."""
    edge_sum_bytes: float
    """Sums of their gradients, likewise."""
    head_sum_bytes: float
    """Of these the head's."""
    rest_bytes: float
    """Master weights and moments."""
    sent_bytes: float


def block_cost(
    block: BlockWork,
    device: DeviceSpec,
    *,
    activation_bytes: float,
    precision: Precision,
    recompute: str,
    split: Split | None = None,
    times_alone: bool = False,
) -> BlockCost:
    """Time and bytes of a block on one device, with what the axes of its plan join within it.

    With `times_alone` nothing is said of what it holds.

    Raises:
        UsageError: if the recompute policy is unknown, or what it keeps of this block is.
    """
    if recompute not in PLANNED_RECOMPUTE:
        legal = ", ".join(PLANNED_RECOMPUTE)
        near = did_you_mean(recompute, PLANNED_RECOMPUTE)
        raise UsageError(f"recompute={recompute!r} is not a policy{near}; use one of {legal}")
    split = split or Split()
    memory = BlockBytes(residual=0.0, tap=0.0, work=0.0)
    if not times_alone:
        traced = (axis.traced(block, split.parts_along(axis)) for axis in split.axes)
        memory = block.memory(recompute, activation_bytes, next(filter(None, traced), None))
    ways = parts_of_block(split.parts)
    down = up = Joined()
    for axis in split.axes:
        forth, home = axis.joined(
            block, split, device, activation_bytes=activation_bytes, recompute=recompute
        )
        down, up = down + forth, up + home
    products = block.product_flops / device.product_flops_per_s / ways
    attention = block.attention_flops / device.attention_flops_per_s / ways
    passes = block.elementwise_bytes / device.memory_bytes_per_s / ways
    forward = products + passes + down.time_s
    # All but attention is made again with `around-attention`, and what joins it sent again.
    selective = passes + block.selective_flops / device.product_flops_per_s / ways
    made = {"none": 0.0, "selective": selective, "around-attention": forward, "block": forward}
    again = made[recompute]
    passes_down = 2 if recompute in ("around-attention", "block") else 1
    joined = passes_down * down + up
    there = back = _attended(attention)
    inside = next((axis for axis in split.axes if axis.inside), None)
    if block.shared is not None and inside is not None:
        there, back = (
            inside.attention(block, split, device, time_s, backward=backward)
            for time_s, backward in ((attention, False), (ATTENTION_BACKWARD * attention, True))
        )
        joined += Joined(time_s=there.waits_s + back.waits_s, sent_bytes=there.sent_bytes)
        joined += Joined(sent_bytes=back.sent_bytes)
        if recompute in ("selective", "around-attention"):
            found = inside.attention_again(block, split)
            again += found.time_s
            joined += found
    else:
        back = _attended(ATTENTION_BACKWARD * attention)
    forward += there.time_s
    if recompute == "block" or (recompute == "selective" and block.selective_attention):
        again += there.time_s
        joined += Joined(time_s=there.waits_s, sent_bytes=there.sent_bytes)

    def part(size: float) -> float:
        return size * (block.cut_share / ways + 1.0 - block.cut_share)

    parameters = split.parameters_of(block) / ways
    pieces, weight_bytes = split.pieces, parameters * precision.weight_bytes
    gradient_bytes = parameters * precision.gradient_bytes
    each = precision.sent_weight_bytes
    sent_weight_bytes = (weight_bytes if each is None else parameters * each) / pieces
    whole, cut = split.gathered(weight_bytes), split.gathered(gradient_bytes)
    # What is joined is whole while a product reads it, and its cotangent before it is cut.
    joined_bytes = 2 * activation_bytes if ways > 1 else 0.0
    # Rows as they came, leaves of them, and the gradient in rows as it is summed.
    in_place = 2 * weight_bytes + gradient_bytes if pieces > 1 else 0.0
    weight_bytes, gradient_bytes = weight_bytes / pieces, gradient_bytes / pieces
    return BlockCost(
        forward_s=forward,
        input_gradient_s=products + back.time_s + 2 * passes + up.time_s + again,
        weight_gradient_s=products + SUM_PASSES * gradient_bytes / device.memory_bytes_per_s,
        weight_bytes=weight_bytes,
        sent_weight_bytes=sent_weight_bytes,
        gradient_bytes=gradient_bytes,
        residual_bytes=part(memory.residual),
        tap_bytes=part(memory.tap),
        work_bytes=part(memory.work) + joined_bytes + in_place,
        split_work_bytes=part(memory.most_work) + joined_bytes + in_place,
        freeing_bytes=part(memory.freeing_work) + joined_bytes + in_place,
        forward_bytes=part(memory.forward) + joined_bytes,
        sent_bytes=joined.sent_bytes,
        join_s=joined.time_s,
        # Attention is drawn in the middle of its block, which is about where it is.
        forward_inside=_later(there.inside, (forward - there.time_s) / 2),
        backward_inside=_later(back.inside, again + (products + 2 * passes + up.time_s) / 2),
        place_join_s=whole.time_s,
        place_join_sent=whole.sent_bytes,
        place_cut_s=cut.time_s,
        place_cut_sent=cut.sent_bytes,
    )


def _attended(time_s: float) -> Pass:
    """A pass through attention of whole sequences."""
    return Pass(time_s=time_s, waits_s=0.0, sent_bytes=0.0, inside=())


def _later(inside: Sequence[Inside], by_s: float) -> tuple[Inside, ...]:
    return tuple(replace(one, start_s=one.start_s + by_s, end_s=one.end_s + by_s) for one in inside)


def frame(
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    *,
    devices: int,
    placement: Placement,
    precision: Precision,
    split: Split | None = None,
) -> Frame:
    """What a schedule over `devices` costs outside its blocks.

    `devices` are all over which what is split lies. Embedding and head rest in shards over them
    unless everything is replicated; they are gathered before the first task, and their gradient is
    reduced before the update. Copies add their gradients up after that.
    """
    split = split or Split()
    cut, pieces = parts_of_block(split.parts), split.pieces
    edge_ways = cut if workload.splits_between else 1
    edge_parameters = workload.edge.parameters / edge_ways
    # What is an axis' own is split along it, and fewer devices have copies of it.
    own = {
        axis.name: sum(axis.own_parameters(block) for block in workload.blocks)
        for axis in split.axes
        if axis.owns
    }
    in_blocks = workload.parameters - workload.edge.parameters - sum(own.values())
    mine = {name: size / cut / getattr(split.parts, name) for name, size in own.items()}
    common = in_blocks / cut + edge_parameters
    parameters = common + sum(mine.values())
    replicated = placement is Placement.REPLICATED
    share = 1 if replicated else devices * pieces
    weight, gradient = precision.weight_bytes, precision.gradient_bytes
    before = after = sent = 0.0
    if pieces > 1 and edge_parameters:
        # Between places each device sends its own pieces, inside them all are joined.
        for size, joined in ((gradient, False), (weight, True)):
            inside, piece = edge_parameters * size, edge_parameters * size / pieces
            among = split.gathered(inside)
            time_s = link.collective_s(piece, devices=devices) + among.time_s
            sent += piece * (devices - 1) / devices + among.sent_bytes
            before, after = (before + time_s, after) if joined else (before, after + time_s)
    elif devices > 1 and edge_parameters:
        rounds = 2 if replicated else 1
        after += link.collective_s(edge_parameters * gradient, devices=devices, rounds=rounds)
        sent += rounds * edge_parameters * gradient * (devices - 1) / devices
        if not replicated:
            before += link.collective_s(edge_parameters * weight, devices=devices)
            sent += edge_parameters * weight * (devices - 1) / devices
    for size, copies in (
        (common / share, split.copies),
        *((size / share, split.own_copies[name]) for name, size in mine.items()),
    ):
        count = copies.count
        if count > 1 and size:
            after += copies.link.collective_s(size * gradient, devices=count, rounds=2)
            sent += 2 * (count - 1) / count * size * gradient
    flops_per_s = device.product_flops_per_s * edge_ways
    return Frame(
        embed_s=workload.edge.forward_flops / flops_per_s,
        head_s=workload.edge.backward_flops / flops_per_s
        + SUM_PASSES * edge_parameters * gradient / device.memory_bytes_per_s,
        before_s=before,
        after_s=after,
        update_s=UPDATE_PASSES * 4 * parameters / share / device.memory_bytes_per_s,
        edge_bytes=edge_parameters * weight,
        edge_sum_bytes=edge_parameters * gradient,
        head_sum_bytes=workload.edge.read_by_head / edge_ways * gradient,
        rest_bytes=precision.rest_bytes * parameters / share,
        sent_bytes=sent,
    )


def schedule_costs(
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    *,
    schedule: Schedule,
    precision: Precision,
    recompute: str | Sequence[str],
    split: Split | None = None,
    lowered: tuple[Trace, Buffers] | None = None,
    ours: bool = True,
) -> Costs:
    """What a schedule needs for `simulate`.

    Args:
        workload: the model and its microbatch.
        device: what runs it.
        link: what joins the schedule's devices.
        schedule: the schedule.
        precision: bytes per parameter.
        recompute: one policy for all layers, or one for each.
        split: what stands around the schedule's devices and inside each.
        lowered: the schedule's trace and buffers; with them, static bytes are such that the peak is
            what `jaxsys.lowering` allocates, buffers that are not full at that moment included.
        ours: whether `jaxsys.lowering` makes the steps, and not a program of the user's.

    Raises:
        UsageError: if there are more chunks than layers, or a policy is unknown.
    """
    costs, held = costs_around(
        workload,
        device,
        link,
        schedule=schedule,
        precision=precision,
        recompute=recompute,
        split=split,
    )
    if schedule.placement is Placement.SHARDED:
        found = check(schedule)
        group = schedule.devices * schedule.sharers
        looped = not (ours and device.fused_attention)
        peak = sharded_peak_bytes(schedule, costs, held, found, group=group, looped=looped)
        static = peak - max(alive_bytes(schedule, costs, found))
    elif lowered is None:
        static = held.rest + held.edge + held.edge_sums + max(held.block, held.head)
    else:
        found, buffers = lowered
        peak = lowered_peak_bytes(schedule, buffers, costs, held)
        static = peak - max(alive_bytes(schedule, costs, found))
    return replace(costs, static_bytes=static)


def head_held_bytes(workload: Workload, ways: int) -> float:
    """What head and loss hold where so many devices share the vocabulary.

    Of the last block's output and its cotangent each then has the whole for a while.
    """
    whole = 2 * workload.activation_bytes if ways > 1 else 0.0
    return workload.edge.held_bytes / ways + whole


def lowered_peak_bytes(schedule: Schedule, buffers: Buffers, costs: Costs, around: Around) -> float:
    """The most that a device holds as `jaxsys.lowering` allocates it, where nothing is sharded."""
    size = {
        data: max(costs.block_bytes(Block(data=data, chunk=c)) for c in range(schedule.chunks))
        for data in Data
    }
    sent = max(costs.moved_bytes(Block(data=Data.WEIGHT, chunk=c)) for c in range(schedule.chunks))
    apart = None if costs.sent_weight_bytes is None else sent
    return float(tabled_bytes(schedule, buffers, size, around, sent_weight=apart))


def costs_around(
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    *,
    schedule: Schedule,
    precision: Precision,
    recompute: str | Sequence[str],
    split: Split | None = None,
) -> tuple[Costs, Around]:
    """What `schedule_costs` is made of: costs without static bytes, and what makes those up.

    Of the schedule only its sizes and placement are read.
    """
    split = split or Split()
    devices, placement = schedule.devices, schedule.placement
    policies = [recompute] * workload.layers if isinstance(recompute, str) else recompute
    pairs = list(zip(workload.blocks, policies, strict=True))
    # By what they are and not by their value, which takes longer to hash than to cost.
    different = {(id(block), policy): (block, policy) for block, policy in pairs}
    costs = {
        key: block_cost(
            block,
            device,
            activation_bytes=workload.activation_bytes,
            precision=precision,
            recompute=policy,
            split=split,
        )
        for key, (block, policy) in different.items()
    }
    blocks = [costs[id(block), policy] for block, policy in pairs]
    # Layers of a stage or ring are stacked in chunks of one length, at rest and in motion; those
    # that the last chunks lack take room and no time.
    alike = placement is not Placement.SHARDED
    parts = (full_chunks if alike else cut)(workload.layers, schedule.chunks)
    spare = len(parts[0]) if alike else 0

    def total(field: str) -> tuple[float, ...]:
        found = [[getattr(blocks[i], field) for i in part] for part in parts]
        largest = max(getattr(cost, field) for cost in blocks)
        empty = largest if field.endswith("_bytes") else 0.0
        return tuple(sum(row) + empty * max(0, spare - len(row)) for row in found)

    def inside(field: str) -> tuple[tuple[Inside, ...], ...]:
        """What a chunk's layers send within a task, one layer after another."""
        found = []
        for part in parts:
            row: tuple[Inside, ...] = ()
            at_s = 0.0
            for layer in part if field == "forward" else reversed(part):
                cost = blocks[layer]
                row += _later(getattr(cost, f"{field}_inside"), at_s)
                at_s += cost.forward_s if field == "forward" else cost.input_gradient_s
            found.append(row)
        return tuple(found)

    around = frame(
        workload,
        device,
        link,
        devices=devices * schedule.sharers,
        placement=placement,
        precision=precision,
        split=split,
    )
    rest = around.rest_bytes
    padding = spare * len(parts) - workload.layers if placement is Placement.OWNER else 0
    if padding > 0:
        largest = max(block.parameters for block in workload.blocks)
        owners = parts_of_block(split.parts) * split.pieces * devices
        rest += precision.rest_bytes * padding * largest / owners
    # Every device runs F and B of as many layers, whichever they are.
    passes = schedule.microbatches * workload.layers / devices
    joined = sum(cost.sent_bytes for cost in blocks) / workload.layers * passes
    between = parts_of_block(split.parts) if workload.splits_between else 1
    costs_of_step = Costs(
        forward_s=total("forward_s"),
        backward_s=total("backward_s"),
        input_gradient_s=total("input_gradient_s"),
        weight_gradient_s=total("weight_gradient_s"),
        embed_s=around.embed_s,
        head_s=around.head_s,
        update_s=around.update_s,
        before_s=around.before_s,
        after_s=around.after_s,
        weight_bytes=total("weight_bytes"),
        sent_weight_bytes=(
            None if precision.sent_weight_bytes is None else total("sent_weight_bytes")
        ),
        gradient_bytes=total("gradient_bytes"),
        activation_bytes=workload.activation_bytes / between,
        residual_bytes=total("residual_bytes"),
        tap_bytes=total("tap_bytes"),
        other_sent_bytes=around.sent_bytes + joined,
        inside={
            TaskKind.FORWARD: inside("forward"),
            TaskKind.BACKWARD: inside("backward"),
            TaskKind.INPUT_GRADIENT: inside("backward"),
        }
        if any(cost.forward_inside for cost in blocks)
        else {},
        join_s=total("place_join_s"),
        join_bytes=total("place_join_sent"),
        cut_s=total("place_cut_s"),
        cut_bytes=total("place_cut_sent"),
    )
    held = Around(
        rest=rest,
        edge=around.edge_bytes,
        edge_sums=around.edge_sum_bytes,
        block=max(cost.work_bytes for cost in blocks),
        head=head_held_bytes(workload, between),
        split_block=max(cost.split_work_bytes for cost in blocks),
        freeing=[max((blocks[i].freeing_bytes for i in part), default=0.0) for part in parts],
        forward=[max((blocks[i].forward_bytes for i in part), default=0.0) for part in parts],
        head_sums=around.head_sum_bytes,
    )
    return costs_of_step, held


def full_chunks(layers: int, chunks: int) -> list[Sequence[int]]:
    """Layer numbers of each chunk where all but the last are as long as any, as stages run them.

    Raises:
        UsageError: if there are more chunks than layers.
    """
    length = max(len(part) for part in cut(layers, chunks))
    return [range(min(layers, c * length), min(layers, (c + 1) * length)) for c in range(chunks)]


def cut(layers: int, chunks: int) -> list[Sequence[int]]:
    """Layer numbers of each chunk, as even as possible, the longer chunks first.

    Raises:
        UsageError: if a chunk would be empty.
    """
    if not 1 <= chunks <= layers:
        raise UsageError(f"chunks={chunks} must be from 1 to layers={layers}")
    small, extra = divmod(layers, chunks)
    edges = [0]
    for chunk in range(chunks):
        edges.append(edges[-1] + small + (chunk < extra))
    return [range(low, high) for low, high in pairwise(edges)]
