"""`schedule="auto"`: asks the planner, and takes the fastest strategy that fits and can be run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxsys import hardware
from jaxsys.axes import parts_around, parts_within
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.lowering import Recompute
from jaxsys.lowering.eight_bits import encoded_bytes
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.function_workload import layered_workload
from jaxsys.planner.named import compare
from jaxsys.planner.workload import Workload
from jaxsys.schedule import Schedule
from jaxsys.strategies import for_layers
from jaxsys.train.flops import preset_of
from jaxsys.train.memory import in_dtype
from jaxsys.train.options import Compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the planner would take."""

    schedule: Schedule
    recompute: Recompute
    around: Mapping[str, int]
    """Mesh axis -> devices along it, of those that share each of its places."""
    reason: str
    """In words: what was predicted, and what would be faster but cannot be run."""


NODE_LINK = "ib-400"
"""Between nodes, where devices are on several: a name of `jaxsys.hardware.LINKS`."""


def _joined(cluster: Cluster) -> str:
    text = f"{cluster.device.name} over {cluster.link.name}"
    if cluster.node_link is None:
        return text
    return f"{text}, {cluster.node_link.name} between nodes of {cluster.node_devices}"


def devices_of_a_node(devices: list[Any]) -> int | None:
    """How many of the devices, which are neighbours in this order, each node has.

    A process is on one node; another one's devices are on the next unless their numbers on the host
    go on where the last one's ended. None where all are on one node, or nodes have unlike parts.
    """
    lengths: list[int] = []
    last: tuple[Any, Any] | None = None
    for one in devices:
        here = getattr(one, "local_hardware_id", None), getattr(one, "process_index", 0)
        counted = last is not None and None not in (last[0], here[0])
        if last is not None and (last[1] == here[1] or (counted and last[0] < here[0])):
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = here
    return lengths[0] if len(lengths) > 1 and len(set(lengths)) == 1 else None


def choose(
    workload: Workload,
    devices: list[Any],
    *,
    microbatches: int,
    link: str | None = None,
    memory_gib: float | None = None,
    weight_bytes: float = 2.0,
    sent_weight_bytes: float | None = None,
    gradient_bytes: float = 4.0,
    recompute: Recompute | None = None,
) -> Choice:
    """Compares all known strategies for a ring of these devices.

    Args:
        workload: the model and its microbatch; `jaxsys.planner.workload` makes a decoder's.
        devices: of one ring, all alike.
        microbatches: of one ring and step.
        link: between neighbours, a name of `jaxsys.hardware.LINKS`; NVLink between GPUs and the
            host's memory between CPU devices if not given.
        memory_gib: the limit per device; most of the device's memory if not given.
        weight_bytes: of a parameter in compute.
        sent_weight_bytes: of a block's on its way, as many if not given.
        gradient_bytes: of a parameter's gradient, summed and sent.
        recompute: the only policy to choose from, if there is one.

    Raises:
        UsageError: if the devices have no preset, or nothing fits.
    """
    cluster = _cluster(devices, link)
    precision = Precision(
        weight_bytes=weight_bytes,
        sent_weight_bytes=sent_weight_bytes,
        gradient_bytes=gradient_bytes,
    )
    return _fastest(workload, cluster, microbatches, memory_gib, precision, recompute)


def choose_layered(
    model: LayeredModel,
    parameters: Parameters,
    microbatch: PyTree,
    devices: list[Any],
    *,
    microbatches: int,
    memory_gib: float | None,
    compute: Compute,
    recompute: Recompute | None,
    shared: bool = True,
) -> Choice:
    """The same for any layered model.

    Args:
        model: the model.
        parameters: shapes, in layer order.
        microbatch: shapes, [B, ...].
        devices: of one ring, all alike.
        microbatches: of one ring and step.
        memory_gib: the limit per device.
        compute: the dtypes.
        recompute: the only policy to choose from, if there is one.
        shared: whether devices of a node may share a place of a ring.

    Raises:
        UsageError: if the devices have no preset, or nothing fits.
    """
    cluster = _cluster(devices, None)
    precision = Precision(
        weight_bytes=float(jnp.dtype(compute.compute_dtype).itemsize),
        gradient_bytes=float(jnp.dtype(compute.gradient_dtype).itemsize),
        sent_weight_bytes=sent_bytes_each(model, parameters, compute.compute_dtype),
    )
    workload = layered_workload(model, parameters, microbatch, cluster)
    return _fastest(
        workload, cluster, microbatches, memory_gib, precision, recompute, shared=shared
    )


def sent_bytes_each(
    model: LayeredModel, parameters: Parameters, compute_dtype: Any
) -> float | None:
    """Bytes of a block's parameter on its way, on average; None where they are those of compute."""
    if model.travels_in_float8 is None:
        return None
    sent = count = 0.0
    for kind, stack in model.stacks(in_dtype(parameters["blocks"], compute_dtype)).items():
        layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), stack)
        layers = model.kind_of.count(kind)
        sent += layers * encoded_bytes(model, layer)
        count += layers * sum(leaf.size for leaf in jax.tree.leaves(layer))
    return sent / count


def _cluster(devices: list[Any], link: str | None) -> Cluster:
    name = preset_of(devices[0])
    if name is None:
        raise UsageError(
            f"schedule 'auto' has no preset for {devices[0].device_kind}; name a schedule, "
            f"or plan for another device with `jaxsys plan` ({', '.join(hardware.DEVICES)})"
        )
    between = link or ("host-memory" if devices[0].platform == "cpu" else "nvlink")
    node = devices_of_a_node(devices)
    return Cluster(
        device=hardware.device(name),
        devices=len(devices),
        link=hardware.link(between),
        node_devices=node,
        node_link=None if node is None else hardware.link(NODE_LINK),
    )


def _fastest(
    workload: Workload,
    cluster: Cluster,
    microbatches: int,
    memory_gib: float | None,
    precision: Precision,
    recompute: Recompute | None,
    *,
    shared: bool = True,
) -> Choice:
    found = compare(
        workload,
        cluster,
        microbatches=microbatches,
        memory_bytes=None if memory_gib is None else memory_gib * hardware.GIB,
        precision=precision,
        recompute=recompute,
    )
    # Of devices that need each other within a task the caller has no layout.
    able = [row for row in found.rows if row.plan is None or not row.plan.joint]
    able = [row for row in able if shared or row.plan is None or parts_within(row.plan) == 1]
    fitting = sorted((row for row in able if row.fits), key=lambda row: row.step_s)
    runnable = [row for row in fitting if row.not_run is None]
    if not runnable:
        only = "" if recompute is None else f" with recompute {recompute}"
        least = hardware.gib(min(row.memory_bytes for row in able))
        raise UsageError(
            f"no strategy{only} fits {hardware.gib(found.memory_bytes)} a device; the least that "
            f"any needs is {least}: use more devices or shorter sequences"
        )
    best = runnable[0]
    reason = (
        f"auto took {best.strategy}, recompute {best.recompute}: predicted "
        f"{best.step_s:.3g} s a step and {hardware.gib(best.memory_bytes)} a device "
        f"({_joined(cluster)})"
    )
    if fitting[0] is not best:
        other = fitting[0]
        reason += (
            f"; {other.strategy} would take {other.step_s:.3g} s but is not run: {other.not_run}"
        )
    name = best.strategy.partition(",")[0]  # of a ring, without the number of a place's devices
    around = {} if best.plan is None else parts_around(best.plan)
    each = math.prod(around.values())
    return Choice(
        schedule=for_layers(
            name,
            devices=cluster.devices // each,
            microbatches=microbatches // each,
            layers=workload.layers,
        ),
        around={axis: count for axis, count in around.items() if count > 1},
        recompute=cast(Recompute, best.recompute),
        reason=reason,
    )
