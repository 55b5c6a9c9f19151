"""Whether a plan runs on the trainer, and if not, why: one answer that all who ask share.

    why_not(plan)                     -> None, or the reason in words
    why_not_schedule(schedule, ...)   -> the same of a schedule and a recompute policy
    that_runs(space)                  -> the part of a space that `why_not` has nothing against

`jaxsys plan` searches no further than that where a plan is to be written, `jaxsys train` refuses
plan files by it, and `schedule="auto"` passes over what it names.
"""

from jaxsys.axes import AXES
from jaxsys.lowering.refusal import why_not_lowered
from jaxsys.planner.axes import PLANNED
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.plans import Plan
from jaxsys.planner.space import Space
from jaxsys.schedule import Schedule
from jaxsys.strategies import RECOMPUTES


def why_not(plan: Plan) -> str | None:
    """Why `jaxsys.train` cannot run a plan; None if it can."""
    for axis in AXES.values():
        parts = getattr(plan, axis.name)
        if axis.mesh is None and parts > 1:
            return f"it splits {axis.name} over {parts} devices, which no schedule runs"
    for axis in PLANNED.values():
        refused = axis.why_not(plan)
        if refused is not None:
            return refused
    recompute = RECOMPUTES[plan.placement]
    policies = dict.fromkeys(POLICY[path.residual] for path in plan.layers)
    if len(policies) > 1 and not recompute.by_layer:
        return (
            f"it recomputes by layer ({', '.join(policies)}), which only schedules that shard run"
        )
    return None


def why_not_schedule(schedule: Schedule, recompute: str) -> str | None:
    """Why `jaxsys.train` cannot run a schedule with a recompute policy; None if it can."""
    taken = RECOMPUTES[schedule.placement].policies
    if recompute not in taken:
        return f"recompute {recompute} is none of {', '.join(taken)}"
    return why_not_lowered(schedule)


def that_runs(space: Space) -> Space:
    """The part of a space that `why_not` has nothing against.

    All of a `Space` runs but what is split along an axis that no schedule has.
    """
    for axis in AXES.values():
        if axis.mesh is None:
            space = space.split(axis.name, 1)
    return space
