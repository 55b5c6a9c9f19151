"""From a plan to the schedule that runs it."""

from dataclasses import fields, replace
from typing import Any

from jaxsys.axes import DividedAround
from jaxsys.errors import UsageError
from jaxsys.planner.estimates import microbatches
from jaxsys.planner.orders import staged_schedule
from jaxsys.planner.plans import Gradient, Plan, State, Weights
from jaxsys.planner.problem import Sizes
from jaxsys.planner.recognise import recognise
from jaxsys.schedule import Schedule
from jaxsys.strategies import for_layers
from jaxsys.strategies.zero import trajectory


def to_schedule(problem: Sizes, plan: Plan) -> Schedule:
    """The schedule of one replica; it says over how many devices features and sequences are split
    inside its tasks and what travels there, and how many replicas stand around it.

    Raises:
        UsageError: if the plan does not fit the problem.
    """
    if len(plan.layers) != problem.layers:
        raise UsageError(
            f"the plan is for {len(plan.layers)} layers, the model has {problem.layers}"
        )
    total = microbatches(problem, plan)
    around: Any = {one.name: getattr(plan, one.name) for one in fields(DividedAround)}
    if plan.owners > 1:
        return replace(staged_schedule(plan, total), name=recognise(plan), **around)
    layers = range(len(plan.layers))
    if plan.state is State.WHOLE:
        made = for_layers("dp", devices=plan.shard, microbatches=total, layers=len(plan.layers))
        return replace(made, **around)

    def where(field: str, *values: object) -> list[int]:
        return [i for i in layers if getattr(plan.layers[i], field) in values]

    found = trajectory(
        plan.shard,
        total,
        chunks=len(plan.layers),
        keep_within=where("weights", Weights.STAY, Weights.WITHIN),
        keep_between=where("weights", Weights.STAY, Weights.BETWEEN),
        defer=where("gradient", Gradient.DEFERRED),
        accumulate=where("gradient", Gradient.ONCE),
        lookahead=plan.lookahead,
    )
    return replace(found, name=recognise(plan), **around)
