"""What a loss function costs, read from its jaxpr; or a layered model, as it is lowered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.axes import AXES, CUT
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, inside_parts, part_shapes, parts_of
from jaxsys.lowering.flat import flat_model
from jaxsys.lowering.memory import head_sum_bytes
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.feature_axes import feature_split
from jaxsys.planner.jaxpr_costs import (
    function_cost,
    shapes_of,
    trace_loss,
    trace_residuals,
    variable_bytes,
)
from jaxsys.planner.layers import Layers, feature_ways, find_layers, matrices_of, why_whole
from jaxsys.planner.workload import BlockWork, EdgeWork, Joins, Workload, traced_memory

PyTree = Any


def layered_loss(model: LayeredModel) -> Callable[[PyTree, PyTree], jax.Array]:
    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        def one(microbatch: PyTree) -> tuple[jax.Array, jax.Array]:
            flat = flat_model(model, params["edge"], microbatch)
            step = lambda x, layer: (flat.block(layer[0], x, microbatch, layer[1]), None)  # noqa: E731
            blocks = params["blocks"], jnp.arange(model.layers)
            x, _ = jax.lax.scan(step, flat.embed(params["edge"], microbatch), blocks)
            loss, weight, _ = flat.head(params["edge"], x, microbatch)
            return loss, weight

        losses, weights = jax.lax.map(one, batch)
        return losses.sum() / weights.sum()

    return loss


def function_workload(
    function: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    size: int,
    layers: Layers,
    cluster: Cluster,
) -> Workload:
    leaves = jax.tree.leaves(shapes_of(params))
    closed = trace_loss(function, params, batch)
    cost = function_cost(closed)
    residuals = trace_residuals(function, params, batch)
    kept = float(sum(variable_bytes(v) for v in residuals.jaxpr.outvars))
    inside = set(layers.leaves)
    in_blocks = float(sum(leaves[i].size for i in inside))
    weight_bytes = float(sum(leaves[i].size * leaves[i].dtype.itemsize for i in inside))
    in_edge = float(sum(leaf.size for i, leaf in enumerate(leaves) if i not in inside))
    edge_flops = sum(
        f for i, f in cost.flops_by_input.items() if i < len(leaves) and i not in inside
    )
    block_flops = max(0.0, cost.product_flops - edge_flops) / layers.count
    # Memory traffic and residuals go with the products, for want of a better key.
    share = 1.0 - edge_flops / cost.product_flops if cost.product_flops else 1.0
    passed = cost.carry_bytes.get(layers.count, 0.0) if layers.stacked else 0.0
    ways = feature_ways(leaves, layers, cluster.devices)
    joins, cut_share = None, 1.0
    matrices = matrices_of(leaves, layers)
    split = feature_split(closed, matrices, ways[:2][-1], parameters=len(leaves))
    unshared = None
    if len(ways) == 1:
        unshared = why_whole(leaves, layers, cluster.devices)
    elif not split.axes:  # of kernels of convolutions, for one, nothing is cut
        ways, unshared = (1,), "no product of its layers has an axis that can be followed and cut"
    if len(ways) > 1:
        again = feature_split(residuals, matrices, ways[1], parameters=len(leaves), axes=split.axes)
        # What is cut is of layers: beside them there may be as much, such as an encoder's.
        of_layers = share * kept
        cut_share = min(1.0, again.cut_bytes / of_layers) if of_layers else 1.0
        joins = Joins(
            forward_bytes=split.forward_bytes / layers.count,
            forward_times=split.forward_joins / layers.count,
            backward_bytes=split.backward_bytes / layers.count,
            backward_times=split.backward_joins / layers.count,
        )
    block = BlockWork(
        parameters=in_blocks / layers.count,
        product_flops=block_flops,
        elementwise_bytes=share * cost.elementwise_bytes / layers.count,
        residual_bytes=share * kept / layers.count,
        # Its weights, copied out of their stack, and its gradients, before they are in theirs.
        work_bytes=2 * weight_bytes / layers.count if layers.stacked else 0.0,
        joins=joins,
        cut_share=cut_share,
    )
    return Workload(
        name=getattr(function, "__name__", "loss"),
        blocks=(block,) * layers.count,
        edge=EdgeWork(
            parameters=in_edge,
            forward_flops=0.0,
            backward_flops=3 * edge_flops,
            workspace_bytes=(1.0 - share) * kept,
        ),
        activation_bytes=passed or block.residual_bytes / 10,
        tokens=size,
        model_flops=3 * cost.product_flops,
        ways={axis.name: ways for axis in CUT},
        unshared={} if unshared is None else {axis.name: unshared for axis in CUT},
        splits_between=False,
    )


def layered_workload(
    model: LayeredModel, params: PyTree, microbatch: PyTree, cluster: Cluster
) -> Workload:
    """A layered model's work on one microbatch of these arrays or shapes, [B, ...]."""
    if not callable(model.block):
        return _workload_of_kinds(model, params, microbatch, cluster)
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shapes_of(microbatch)
    )
    function = layered_loss(model)
    cost = function_cost(trace_loss(function, params, rows))
    layers = find_layers(params, cost, len(jax.tree.leaves(params)))
    found = function_workload(function, params, rows, 1, layers, cluster)
    return as_lowered(found, model, params, rows)


def _workload_of_kinds(
    model: LayeredModel, params: PyTree, microbatch: PyTree, cluster: Cluster
) -> Workload:
    """The same of a model whose blocks are of kinds: two of each kind are traced by themselves."""
    found: dict[str, Workload] = {}
    for kind, stack in model.stacks(params["blocks"]).items():
        alone = LayeredModel(
            embed=model.embed, block=model.kinds[kind], head_loss=model.head_loss, layers=2
        )
        pair = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), stack
        )
        whole = {"edge": params["edge"], "blocks": pair}
        found[kind] = layered_workload(alone, whole, microbatch, cluster)
    first = next(iter(found.values()))
    blocks = tuple(found[kind].blocks[0] for kind in model.kind_of)

    def model_flops(blocks: Sequence[BlockWork]) -> float:
        return 3 * sum(block.product_flops for block in blocks)

    return dataclasses.replace(
        first,
        blocks=blocks,
        activation_bytes=max(one.activation_bytes for one in found.values()),
        model_flops=first.model_flops - model_flops(first.blocks) + model_flops(blocks),
        ways={
            axis: tuple(n for n in counts if all(n in one.ways[axis] for one in found.values()))
            for axis, counts in first.ways.items()
        },
        unshared={}
        if model.in_parts is None
        else dict.fromkeys(first.ways, "blocks of several kinds are planned for one device each"),
    )


def as_lowered(workload: Workload, model: LayeredModel, params: PyTree, rows: PyTree) -> Workload:
    """The workload with what the programs of `jaxsys.lowering` keep and hold; rows [1, B, ...]."""
    microbatch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
    shapes = shapes_of(params)
    traced, head = traced_memory(model, shapes, microbatch)
    x = jax.eval_shape(model.embed, shapes["edge"], microbatch)
    head_floats = head_sum_bytes(model, shapes["edge"], x, microbatch, jnp.float32) / 4
    refused = {
        axis: {n: _why_not_split(model, shapes, microbatch, {AXES[axis].mesh: n}) for n in counts}
        for axis, counts in workload.ways.items()
    }
    first = {axis: next(filter(None, why.values()), None) for axis, why in refused.items()}
    own = {axis: why for axis, why in first.items() if why}
    return dataclasses.replace(
        workload,
        ways={
            axis: tuple(n for n, why in counts.items() if why is None)
            for axis, counts in refused.items()
        },
        unshared={**workload.unshared, **own} if model.in_parts is not None else {},
        splits_between=True,
        blocks=tuple(
            dataclasses.replace(
                block, traced=traced[index if model.pattern else 0], joins=None, cut_share=1.0
            )
            for index, block in enumerate(workload.blocks)
        ),
        edge=dataclasses.replace(workload.edge, workspace_bytes=head, head_parameters=head_floats),
    )


def _why_not_split(
    model: LayeredModel, params: PyTree, microbatch: PyTree, asked: Any
) -> str | None:
    """Why the trainer does not split such a model over so many devices along mesh axes."""
    sizes = {axis: count for axis, count in asked.items() if count > 1}
    try:
        parts = parts_of(model, sizes)
        if parts is not None:
            edge = part_shapes(params, parts, sizes)["edge"]
            inside_parts(sizes, lambda: jax.eval_shape(parts.model.embed, edge, microbatch))
    except UsageError as refused:
        return str(refused).rpartition(";")[0]  # what may be asked for instead is left out
    return None
