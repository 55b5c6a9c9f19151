"""What a plan's estimate says, and what every way of making one asks of the plan.

Legend: B plans, M microbatches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxsys.axes import AROUND, BATCH, parts_of_batch, parts_within
from jaxsys.errors import UsageError
from jaxsys.lowering import Recompute
from jaxsys.lowering.tables import Buffers
from jaxsys.planner.axes import split_of_plan
from jaxsys.planner.costs import schedule_costs
from jaxsys.planner.plans import Plan, Residual, State
from jaxsys.planner.problem import Problem, Sizes
from jaxsys.schedule import Costs, Link, Schedule, Trace

POLICY: Mapping[Residual, Recompute] = {
    Residual.KEEP: "none",
    Residual.SELECTIVE: "selective",
    Residual.ATTENTION: "around-attention",
    Residual.RECOMPUTE: "block",
}
"""What backward finds of the forward pass -> the recompute policy that does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What B plans cost, each array [B]."""

    step_s: np.ndarray
    peak_bytes: np.ndarray
    sent_bytes: np.ndarray
    compute_s: np.ndarray

    def potential(self, memory_bytes: float, *, pressure: float = 10.0) -> np.ndarray:
        """Step time T, or 1000 T (1 + pressure * overflow / limit) where memory overflows.

        So every plan that fits is below every plan that does not, and of those that do not, less
        overflow counts as time does.
        """
        overflow = np.maximum(0.0, self.peak_bytes / memory_bytes - 1.0)
        fits = overflow < 1e-9  # sums taken in another order
        return self.step_s * np.where(fits, 1.0, 1000.0 * (1.0 + pressure * overflow))


def microbatches(problem: Sizes, plan: Plan) -> int:
    """M of the plan's schedule: what one replica computes in a step.

    Raises:
        UsageError: if the batch cannot be cut so.
    """
    around = parts_of_batch(plan) * plan.microbatch_size
    if problem.batch % (around * plan.shard):
        beside = " x ".join(AROUND[name].name for name in BATCH)
        raise UsageError(
            f"batch={problem.batch} must be a multiple of {beside} x shard x microbatch_size = "
            f"{around * plan.shard}"
        )
    total = problem.batch // around
    if total % plan.ring:
        raise UsageError(f"ring={plan.ring} does not divide {total} microbatches")
    return total


def schedule_link(problem: Problem, plan: Plan) -> Link:
    """What joins the schedule's devices, and where state is split all over which it lies.

    Within a place the last of `jaxsys.axes.AXES` is nearest; places stand around it, rings around
    all.
    """
    if plan.state is State.SPLIT:
        found = problem.cluster.group(plan.group, parts_within(plan, shards=False))
    else:
        found = problem.cluster.group(plan.schedule_devices, parts_within(plan))
    share = problem.contention
    return found if share is None else replace(found, contention=share, waiting_contention=share)


def plan_costs(
    problem: Problem,
    plan: Plan,
    schedule: Schedule,
    lowered: tuple[Trace, Buffers] | None = None,
) -> Costs:
    """The plan's costs for `simulate`.

    Args:
        problem: what is planned.
        plan: the plan.
        schedule: its schedule.
        lowered: the schedule's trace and buffers, for memory as lowered programs allocate it.
    """
    return schedule_costs(
        problem.work(plan),
        problem.cluster.slowest,
        schedule_link(problem, plan),
        schedule=schedule,
        precision=problem.precision,
        recompute=[POLICY[path.residual] for path in plan.layers],
        split=split_of_plan(problem.cluster, plan),
        lowered=lowered,
        ours=problem.lowered,
    )
