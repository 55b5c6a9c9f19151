"""`plan`: how to spread any JAX training step over a cluster.

    found = jaxsys.planner.plan(loss_fn, params, batch, cluster=cluster, memory_gib=70)
    mesh = found.mesh()
    params = jax.device_put(params, found.parameter_shardings(mesh))
    batch = jax.device_put(batch, found.batch_shardings(mesh))
    step = jax.jit(train_step)          # XLA puts in the collectives that the shardings ask for

`loss_fn(params, batch)` is traced, never run: its products, bytes and residuals are read from the
jaxpr, its repeated layers found where a scan takes stacked parameters apart, or where a subtree of
the parameters is there several times. For a `LayeredModel` the search has every trajectory to
choose from, and the plan comes with the `Schedule` that `jaxsys.train` runs. Plain `jax.jit` keeps
no copy from one microbatch to the next, so there the whole batch is one microbatch a device.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxsys.axes import parts_of_block
from jaxsys.errors import UsageError
from jaxsys.hardware import GIB, gib
from jaxsys.layered import LayeredModel, microbatch_keys
from jaxsys.planner import explain
from jaxsys.planner.applied import LayerLeaf, Promise, promise_of, spaces_of, wrapped
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.costs import Precision
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.feature_axes import feature_split
from jaxsys.planner.function_program import FunctionProgram, gathers
from jaxsys.planner.function_workload import as_lowered, function_workload, layered_loss
from jaxsys.planner.jaxpr_costs import (
    function_cost,
    shapes_of,
    trace_loss,
)
from jaxsys.planner.layers import Layers, find_layers, leaves_of, matrices_of
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import USABLE_MEMORY
from jaxsys.planner.plans import PATHS, Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.runs import that_runs
from jaxsys.planner.search import Effort, Found, Result, SearchMoment, search
from jaxsys.planner.shardings import (
    REPLICA,
    SHARD,
    axis_sizes,
    layer_leaves,
    shardings_on,
    specs_of,
)
from jaxsys.planner.space import Space
from jaxsys.planner.workload import Workload
from jaxsys.schedule import Schedule

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan for a JAX function."""

    plan: Plan
    found: Found
    problem: Problem = field(repr=False)
    result: Result = field(repr=False)
    layers: Layers
    parameter_specs: PyTree = field(repr=False)
    optimizer_specs: PyTree = field(repr=False)
    """For state that is shaped like the parameters, such as Adam's moments."""
    batch_specs: PyTree = field(repr=False)
    layer_leaves: tuple[LayerLeaf, ...] = field(repr=False)
    """Of one layer's parameters, as it uses them."""
    schedule: Schedule | None = field(repr=False)
    """What `jaxsys.train` runs; None for functions that are no `LayeredModel`."""

    @property
    def name(self) -> str:
        """The strategy the plan amounts to."""
        return recognise(self.plan)

    @property
    def recompute(self) -> str:
        """What the plan counts on being computed again of a function's layers: none or block."""
        policies = {POLICY[path.residual] for path in self.plan.layers}
        return policies.pop() if len(policies) == 1 else "by layer"

    @property
    def gathers(self) -> bool:
        """Whether the plan counts on layers gathering weights that rest in shards."""
        return gathers(self.plan)

    def checkpoint(
        self, layer: Callable[..., Any], mesh: Mesh | None = None, *, weights: int = -1
    ) -> Callable[..., Any]:
        """A function of one layer as the plan counts it: in `jax.checkpoint`, or as it is.

        Wrap what a scan runs, or what is called once a layer. Of a `LayeredModel` nothing is to be
        wrapped: its steps compute again what the plan says.

        Args:
            layer: the function.
            mesh: `Planned.mesh`'s; needed where weights rest in shards, which the layer then
                gathers for its forward and again for its backward pass.
            weights: which argument its weights are; the last.

        Raises:
            UsageError: if the mesh is needed and not given; when called, if the argument does not
                hold a layer's weights.
        """
        return wrapped(
            layer,
            self.layer_leaves,
            mesh,
            gathers=self.gathers,
            again=self.recompute == "block",
            weights=weights,
        )

    @property
    def promise(self) -> Promise:
        """What a step sends and holds where what the plan counts on is applied."""
        return promise_of(self.problem, self.plan, self.found.peak_bytes)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh of axes replica, shard and features, neighbours in features nearest."""
        chosen = jax.devices() if devices is None else devices
        sizes = axis_sizes(self.plan)
        wanted = math.prod(sizes.values())
        if len(chosen) < wanted:
            raise UsageError(f"the plan is for {wanted} devices; {len(chosen)} are present")
        grid = np.array(chosen[:wanted]).reshape(tuple(sizes.values()))
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def parameter_shardings(self, mesh: Mesh) -> PyTree:
        """NamedShardings of the parameters."""
        return shardings_on(mesh, self.parameter_specs)

    def optimizer_shardings(self, mesh: Mesh) -> PyTree:
        """NamedShardings of one parameter-shaped part of the optimizer's state."""
        return shardings_on(mesh, self.optimizer_specs)

    def batch_shardings(self, mesh: Mesh) -> PyTree:
        """NamedShardings of a batch."""
        return shardings_on(mesh, self.batch_specs)

    def __str__(self) -> str:
        doubts = () if self.problem.program is None else self.promise.doubts
        lines = (
            f"{describe(self.plan)}; layers: {self.layers.where}",
            *(f"promised: {doubt}" for doubt in doubts),
            explain.table(self.result, self.problem.memory_bytes),
            explain.reasons(self.problem, self.result),
        )
        return "\n".join(lines)


def plan(
    loss_fn: Callable[..., Any] | LayeredModel,
    params: PyTree,
    batch: PyTree,
    *,
    cluster: Cluster,
    memory_gib: float | None = None,
    precision: Precision | None = None,
    narrow: Callable[[Space], Space] | None = None,
    effort: Effort | None = None,
    recompute: bool = False,
    progress: Callable[[SearchMoment], None] | None = None,
) -> Planned:
    """Plans a training step for a cluster.

    Args:
        loss_fn: `loss_fn(params, batch)` -> scalar loss or (loss, auxiliary); or a `LayeredModel`.
        params: its parameters, as arrays or shapes.
        batch: one step's batch as arrays or shapes, examples along every leaf's leading axis; for a
            `LayeredModel` one example a microbatch, [M, B, ...].
        cluster: the devices and links.
        memory_gib: the limit per device; most of the device's memory, if not given.
        precision: bytes per parameter of weights, gradients and state. If not given, those of the
            parameters' dtype: of a function all, Adam's two moments too; of a `LayeredModel` the
            weights in use, 2 where every parameter has two bytes and else 4, beside float32
            gradients and state. The trainer computes in that dtype:
            `Precision(weight_bytes=2)` plans bfloat16 for float32 parameters.
        narrow: takes plans away from the space before it is searched.
        effort: how hard to search.
        recompute: the layers of `loss_fn` may be computed again in the backward pass, and rest in
            shards that they gather, which is for its author to do: wrap the layer's function in
            `Planned.checkpoint`. Neither is counted on otherwise. A `LayeredModel`'s steps do it
            themselves.
        progress: called as the search goes on.

    Raises:
        UsageError: if the function does not trace, no split of its shapes is legal, or nothing fits
            the memory limit (says the smallest that something would).
        Conflict: if `narrow` leaves nothing; says what conflicts.
    """
    layered = isinstance(loss_fn, LayeredModel)
    if isinstance(loss_fn, LayeredModel) and not callable(loss_fn.block):
        raise UsageError(
            f"blocks are of kinds {', '.join(map(repr, loss_fn.block))}; a search takes "
            "blocks that are alike: give the trainer a schedule by name instead"
        )
    if isinstance(loss_fn, LayeredModel):
        batch = _with_keys(loss_fn, batch)
    function = layered_loss(loss_fn) if isinstance(loss_fn, LayeredModel) else loss_fn
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves_of(params)):
        raise UsageError("params hold no floating-point array: there is nothing to train")
    examples = _examples(batch)
    closed = trace_loss(function, params, batch)
    count = len(jax.tree.leaves(params))
    layers = find_layers(params, function_cost(closed), count)
    if memory_gib is not None and not memory_gib > 0:
        raise UsageError(f"memory_gib={memory_gib} must be above 0")
    limit = USABLE_MEMORY * cluster.device.memory_bytes if memory_gib is None else memory_gib * GIB

    def workload_of(size: int) -> Workload:
        rows = _rows(batch, size)
        found = function_workload(function, params, rows, size, layers, cluster)
        if isinstance(loss_fn, LayeredModel):
            return as_lowered(found, loss_fn, params, rows)
        return found

    problem = Problem(
        workload_of=workload_of,
        cluster=cluster,
        batch=examples,
        memory_bytes=limit,
        precision=precision or (_trained_precision if layered else _own_precision)(params),
        lowered=layered,
        program=None if layered else FunctionProgram(closed, params, batch, layers).of,
    )
    sizes = [1] if layered else [n for n in range(1, examples + 1) if examples % n == 0]
    space = Space.of(problem, microbatch_sizes=sizes)
    effort = effort or Effort(refine=2, chains=16, steps=40, restarts=1, tolerance=1e-3)
    if not layered:
        space = space.domain("turns", 1).domain("stages", 1).domain("ring", 1)
        space = space.domain("lookahead", 1)
        # One sharding stands for all layers, and one policy of recompute.
        effort = dataclasses.replace(effort, refine=0)
    spaces = [space] if layered else spaces_of(space)
    if narrow is not None:
        spaces = [narrow(one) for one in spaces]
    if layered:
        spaces = [_that_runs(one) for one in spaces]
    tried = spaces if layered or recompute else spaces[:1]
    results = _searched(tried, effort, progress)
    result = min(results, key=lambda one: one.best.rank)
    if not result.fits:
        raise UsageError(_nothing_fits(limit, tried, spaces))
    best = result.best.plan
    cuts: Mapping[int, int] = {}
    if parts_of_block(best) > 1:
        leaves = jax.tree.leaves(shapes_of(params))
        matrices = matrices_of(leaves, layers)
        cuts = feature_split(closed, matrices, parts_of_block(best), parameters=count).axes
    specs, state_specs = specs_of(params, layers, best, cuts)
    return Planned(
        plan=best,
        found=result.best,
        problem=problem,
        result=result,
        layers=layers,
        parameter_specs=specs,
        optimizer_specs=state_specs,
        layer_leaves=layer_leaves(params, layers, cuts),
        batch_specs=jax.tree.map(
            lambda leaf: PartitionSpec((REPLICA, SHARD)) if np.ndim(leaf) or leaf.shape else None,
            shapes_of(batch),
        ),
        schedule=to_schedule(problem, best) if layered else None,
    )


def _searched(
    spaces: Sequence[Space], effort: Effort, progress: Callable[[SearchMoment], None] | None
) -> list[Result]:
    """What searches find, of the spaces in which there is anything.

    Raises:
        Conflict: if there is nothing in any.
    """
    results, conflicts = [], []
    for one in spaces:
        try:
            results.append(search(one, effort=effort, progress=progress))
        except Conflict as conflict:
            conflicts.append(conflict)
    if not results:
        raise conflicts[0]
    return results


def _own_precision(params: PyTree) -> Precision:
    """What `jax.jit` makes of parameters: gradients and moments in their dtype, no other copy."""
    leaves = [leaf for leaf in leaves_of(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / sum(x.size for x in leaves)
    return Precision(weight_bytes=size, gradient_bytes=size, rest_bytes=2 * size)


def _trained_precision(params: PyTree) -> Precision:
    """What a trainer makes of parameters: masters are float32, weights in use of their dtype."""
    sizes = {x.dtype.itemsize for x in leaves_of(params) if jnp.issubdtype(x.dtype, jnp.floating)}
    return Precision(weight_bytes=2.0 if sizes == {2} else 4.0)


def _nothing_fits(limit: float, tried: Sequence[Space], spaces: Sequence[Space]) -> str:
    """What to say, with what computing layers again would do where that was not allowed."""
    least = min(_smallest(one) for one in tried)
    text = (
        f"nothing fits {gib(limit)} per device; the smallest limit that would do is "
        f"{gib(least, up=True)}: raise memory_gib, add devices or shrink the batch"
    )
    if len(tried) < len(spaces) and (less := min(_smallest(one) for one in spaces)) < least:
        text += f"; with layers computed again (recompute=True) {gib(less, up=True)} would do"
    return text


def _examples(batch: PyTree) -> int:
    sizes = {leaf.shape[0] for leaf in leaves_of(batch) if leaf.shape}
    if len(sizes) != 1:
        shown = ", ".join(map(str, sorted(sizes))) or "none"
        raise UsageError(f"leading axes of the batch are {shown}; all must be the same, examples")
    return sizes.pop()


def _rows(batch: PyTree, size: int) -> PyTree:
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype) if leaf.shape else leaf
        ),
        shapes_of(batch),
    )


def _that_runs(space: Space) -> Space:
    """The part that the trainer runs, or all of it where what is asked for leaves none of that."""
    runs = that_runs(space)
    try:
        _ = runs.left
    except Conflict:
        return space
    return runs


def _with_keys(model: LayeredModel, batch: PyTree) -> PyTree:
    """The batch with keys where the model draws and it has none; the trainer puts them there."""
    if model.draws is None or not isinstance(batch, Mapping) or model.draws in batch:
        return batch
    count = _examples(batch)
    keys = jax.eval_shape(lambda: jax.random.key_data(microbatch_keys(jax.random.key(0), count)))
    return {**batch, model.draws: keys}


def _smallest(space: Space) -> float:
    """The least memory of any plan whose layers all go one way; infinite if there is none."""
    evaluator = Evaluator(space.problem)
    least = float("inf")
    try:
        _ = space.left
    except Conflict:
        return least
    for base in space.bases():
        options = space.codes_of(base)
        if options is None:
            continue
        shared = set.intersection(*(set(map(int, layer)) for layer in options))
        rows = np.array([[code] * len(options) for code in sorted(shared)])
        if len(rows):
            base = dataclasses.replace(base, layers=(PATHS[rows[0][0]],) * len(options))
            least = min(least, float(evaluator.evaluate(base, rows).peak_bytes.min()))
    return least
