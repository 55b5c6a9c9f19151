"""From a workload, a device and a link to what a schedule's tasks and blocks cost.

Products run at the device's achievable rate, fused attention at its own, everything else at memory
speed. With recompute `block` only a block's input is kept and the backward pass runs the block's
forward again. Memory at rest is master weights and Adam's two moments in float32, 12 bytes per
parameter, as owned, sharded or replicated; copies in motion, gradients and residuals are counted
where and while the schedule's trace has them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxsys.errors import UsageError
from jaxsys.hardware import DeviceSpec
from jaxsys.planner.workload import BlockWork, Workload
from jaxsys.schedule import Costs, Link, MoveKind, Placement, Schedule

RECOMPUTE_POLICIES = ("none", "block")
ATTENTION_BACKWARD = 2.5
"""Products of the fused attention's backward pass over those of its forward pass: 5 to 2."""
UPDATE_PASSES = 7
"""float32 values moved per parameter by Adam: four read (weight, both moments, gradient), three
written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per parameter of each kind of copy."""

    weight_bytes: float = 2.0
    """Weights in motion and in use."""
    gradient_bytes: float = 4.0
    """Gradient sums, held and on the wire."""
    rest_bytes: float = 12.0
    """Master weight and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """One block on one device."""

    forward_s: float
    backward_s: float
    """Recompute included."""
    weight_bytes: float
    gradient_bytes: float
    residual_bytes: float
    """Kept from F to B."""
    work_bytes: float
    """Held only while the block's B runs: what recompute brings back."""


def block_cost(
    block: BlockWork,
    device: DeviceSpec,
    *,
    activation_bytes: float,
    precision: Precision,
    recompute: str,
    feature_ways: int = 1,
) -> BlockCost:
    """Time and bytes of a block whose features are split over `feature_ways` devices.

    Raises:
        UsageError: if the recompute policy is unknown.
    """
    if recompute not in RECOMPUTE_POLICIES:
        legal = ", ".join(RECOMPUTE_POLICIES)
        raise UsageError(f"recompute={recompute!r} is not a policy; use one of {legal}")
    products = block.product_flops / device.product_flops_per_s / feature_ways
    attention = block.attention_flops / device.attention_flops_per_s / feature_ways
    passes = block.elementwise_bytes / device.memory_bytes_per_s / feature_ways
    forward = products + attention + passes
    backward = 2 * products + ATTENTION_BACKWARD * attention + 2 * passes
    again = recompute == "block"
    parameters = block.parameters / feature_ways
    residual = block.residual_bytes / feature_ways
    return BlockCost(
        forward_s=forward,
        backward_s=backward + (forward if again else 0.0),
        weight_bytes=parameters * precision.weight_bytes,
        gradient_bytes=parameters * precision.gradient_bytes,
        residual_bytes=activation_bytes / feature_ways if again else residual,
        work_bytes=residual if again else 0.0,
    )


def schedule_costs(
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    *,
    schedule: Schedule,
    precision: Precision,
    recompute: str,
) -> Costs:
    """What a schedule needs for `simulate`.

    Embedding and head rest in shards over all devices unless everything is replicated; they are
    gathered before the first task, and their gradient is reduced before the update.

    Raises:
        UsageError: if there are more chunks than layers, or the policy is unknown.
    """
    devices, placement = schedule.devices, schedule.placement
    costs = [
        block_cost(
            block,
            device,
            activation_bytes=workload.activation_bytes,
            precision=precision,
            recompute=recompute,
        )
        for block in workload.blocks
    ]
    parts = cut(workload.layers, schedule.chunks)

    def total(field: str) -> tuple[float, ...]:
        return tuple(sum(getattr(costs[i], field) for i in part) for part in parts)

    edge = workload.edge
    parameters = workload.parameters
    share = 1 if placement is Placement.REPLICATED else devices
    static = precision.rest_bytes * parameters / share
    if placement is Placement.SHARDED:
        reductions = Counter(
            move.block.chunk for move in schedule.moves if move.kind is MoveKind.REDUCE_SCATTER
        )
        gathers = Counter(
            move.block.chunk for move in schedule.moves if move.kind is MoveKind.ALL_GATHER
        )
        for chunk, size in enumerate(total("weight_bytes")):
            # Gathered again and again from a shard cast once; a single gather casts as it goes.
            if gathers[chunk] > 1:
                static += size / share
        for chunk, size in enumerate(total("gradient_bytes")):
            # Reduced sums, which no copy of the trace stands for. A gradient that is summed locally
            # all step long gives its room to its shard when it is reduced.
            if reductions[chunk] == schedule.microbatches // devices:
                static += size / share
    static += edge.parameters * (precision.weight_bytes + precision.gradient_bytes)
    static += max(edge.workspace_bytes, max(cost.work_bytes for cost in costs))
    ring = (devices - 1) / devices
    gathered = ring * edge.parameters * precision.weight_bytes
    reduced = ring * edge.parameters * precision.gradient_bytes
    if placement is Placement.REPLICATED:
        gathered, reduced = 0.0, 2 * reduced
    return Costs(
        forward_s=total("forward_s"),
        backward_s=total("backward_s"),
        embed_s=edge.forward_flops / device.product_flops_per_s,
        head_s=edge.backward_flops / device.product_flops_per_s,
        update_s=UPDATE_PASSES * 4 * parameters / share / device.memory_bytes_per_s,
        before_s=link.transfer_s(gathered, messages=devices - 1) if gathered else 0.0,
        after_s=link.transfer_s(reduced, messages=devices - 1) if reduced else 0.0,
        weight_bytes=total("weight_bytes"),
        gradient_bytes=total("gradient_bytes"),
        activation_bytes=workload.activation_bytes,
        residual_bytes=total("residual_bytes"),
        static_bytes=static,
        other_sent_bytes=gathered + reduced,
    )


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
