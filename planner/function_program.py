"""What steps of a function of the user's send and hold, plan by plan, read from their jaxprs."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from jaxsys.axes import parts_of_batch, parts_of_block
from jaxsys.planner.feature_axes import feature_split
from jaxsys.planner.jaxpr_costs import shapes_of
from jaxsys.planner.layer_calls import loops_in_layers, runs_again, with_layers
from jaxsys.planner.layers import Layers, matrices_of
from jaxsys.planner.plans import Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.program import GATHERED, ProgramBytes, program_bytes
from jaxsys.planner.value_cuts import Cut, cuts_of, jaxpr_of

PyTree = Any
EXAMPLES = "examples"
"""The label of what a batch is cut along."""
FEATURES = "features"
"""Of what matrices are."""
TORN = (
    "what is sent and held may be low, or high: what a matrix makes whose columns are cut in "
    "{features} is taken apart along them (queries, keys and values in one, or gates), and XLA "
    "moves pieces between devices in its own ways; split such a matrix in one for each"
)
LOOPS = (
    "what is held may be low, by up to a fifth: layers have loops of their own, as over time, and "
    "of what those take apart and stack XLA makes copies as it orders its work"
)
ONE_RUN = (
    "what is sent and held may be high: layers run more than once with the same weights, and each "
    "run is counted, of which XLA keeps one where they are of the same"
)


def gathers(plan: Plan) -> bool:
    """Whether layers gather weights that rest in shards."""
    return plan.group > 1 and any(path.weights is not Weights.STAY for path in plan.layers)


def again(plan: Plan) -> bool:
    """Whether layers are computed again in the backward pass."""
    return any(path.residual is not Residual.KEEP for path in plan.layers)


def all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Everything is kept but what was gathered, under its name or before it had one."""
    if primitive.name == "name":
        return parameters["name"] != GATHERED
    return primitive.name != "sharding_constraint"


class FunctionProgram:
    """One step of `jax.value_and_grad` of a loss, cut and wrapped as plans have it."""

    def __init__(
        self, closed: core.ClosedJaxpr, params: PyTree, batch: PyTree, layers: Layers
    ) -> None:
        """Takes the traced loss, its arguments' shapes, and the repeated part."""
        self.closed, self.params, self.layers = closed, shapes_of(params), layers
        self.leaves = jax.tree.leaves(self.params)
        self.rows = jax.tree.leaves(shapes_of(batch))
        self._jaxpr = lru_cache(maxsize=None)(self._traced)
        self._axes = lru_cache(maxsize=None)(self._split)
        self._bytes = lru_cache(maxsize=None)(self._counted)

    @cached_property
    def _loops(self) -> bool:
        return loops_in_layers(self.closed, self.layers, len(self.leaves))

    @cached_property
    def _runs_again(self) -> bool:
        return runs_again(self.closed, self.layers, len(self.leaves))

    def of(self, plan: Plan) -> ProgramBytes:
        """What a step of a plan sends and holds; parameters and batch are arguments."""
        cut_state = plan.state is State.SPLIT and plan.shard > 1
        around = parts_of_batch(plan) * plan.shard, parts_of_block(plan)
        around = (*around, plan.shard if cut_state else 1)
        found = self._bytes(again(plan), gathers(plan), *around)
        if self._loops and (again(plan) or gathers(plan)):
            # Loops that are computed again run as early as the others, and what is gathered for
            # them is there all along.
            early = self._bytes(False, False, *around).held + found.gathered
            found = replace(found, held=max(found.held, early))
        return found

    def _counted(
        self, recompute: bool, gather: bool, examples: int, features: int, shards: int
    ) -> ProgramBytes:
        jaxpr = self._jaxpr(recompute, gather)
        axes = self._axes(features)
        given: list[Cut] = []
        for index, leaf in enumerate(self.leaves):
            given.append(
                tuple(FEATURES if axes.get(index) == a else None for a in range(len(leaf.shape)))
            )
        for leaf in self.rows:
            rest = len(leaf.shape) - 1
            given.append((EXAMPLES, *(None,) * rest) if leaf.shape and examples > 1 else
                         (None,) * len(leaf.shape))  # fmt: skip
        cuts = cuts_of(jaxpr, given, {EXAMPLES: examples, FEATURES: features}, {FEATURES})
        results = [8.0]
        for index, leaf in enumerate(self.leaves):
            size = leaf.size * leaf.dtype.itemsize
            ways = features if index in axes else 1
            free = [n for a, n in enumerate(leaf.shape) if axes.get(index) != a]
            if self.layers.stacked and index in set(self.layers.leaves):
                free = free[1:]  # layers are not cut apart
            results.append(size / ways / (shards if any(n % shards == 0 for n in free) else 1))
        found = program_bytes(jaxpr, cuts, results[-len(jaxpr.outvars) :])
        doubts = [LOOPS] if self._loops else []
        if FEATURES in cuts.torn:
            doubts.append(TORN.format(features=features))
        if self._runs_again and (gather or features > 1):
            doubts.append(ONE_RUN)
        return replace(found, doubts=tuple(doubts))

    def _split(self, features: int) -> dict[int, int]:
        if features == 1:
            return {}
        matrices = matrices_of(self.leaves, self.layers)
        return feature_split(self.closed, matrices, features, parameters=len(self.leaves)).axes

    def _traced(self, recompute: bool, gather: bool) -> core.Jaxpr:
        wrap = partial(_wrapped, recompute=recompute, gather=gather)
        if recompute or gather:
            loss = with_layers(self.closed, self.layers, len(self.leaves), wrap)
        else:
            loss = lambda *arguments: core.jaxpr_as_fun(self.closed)(*arguments)[0]  # noqa: E731

        def step(weights: list[Any], rows: list[Any]) -> Any:
            return jax.value_and_grad(lambda w: loss(*w, *rows), allow_int=True)(weights)

        return jaxpr_of(step, self.leaves, self.rows)


def _wrapped(layer: Callable[..., Any], *, recompute: bool, gather: bool) -> Callable[..., Any]:
    if not gather:
        return jax.checkpoint(layer)

    def gathered(own: list[Any], rest: Any) -> Any:
        return layer([checkpoint_name(weight, GATHERED) for weight in own], rest)

    return jax.checkpoint(gathered, policy=None if recompute else all_but_gathered)


def resting_bytes(problem: Problem, plan: Plan) -> float:
    """Parameters and optimizer's state of a device.

    Embedding, head and whatever is no layer's rests whole on all devices.
    """
    workload, precision = problem.workload(plan.microbatch_size), problem.precision
    edge = workload.edge.parameters
    blocks = (workload.parameters - edge) / parts_of_block(plan)
    resting = precision.rest_bytes * (blocks + edge) / plan.group
    return resting + precision.weight_bytes * (blocks / (plan.group if gathers(plan) else 1) + edge)
