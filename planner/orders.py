"""In which order the owners of layers run their tasks: from a plan's choices to a schedule.

What can be chosen is what the strategies of `jaxsys.strategies` and their regions cover: `in_turn`
for stages that run some forward passes first, `spaced` and the rings' orders where their ticks are
derived, and what strategies from elsewhere have for their own.
"""

from jaxsys.errors import UsageError
from jaxsys.planner.plans import Backward, Order, Plan
from jaxsys.schedule import Schedule
from jaxsys.strategies import Choices, called, staged_at


def legal_order(
    stages: int, ring: int, order: str, backward: Backward, delay: int, chunks: int
) -> bool:
    """Whether layers that rest so can be run in this order."""
    if stages * ring == 1:
        plain = backward is Backward.WHOLE and delay == 0 and chunks == 1
        return plain and order == Order.DEPTH_FIRST
    choices = Choices(
        axis="ring" if ring > 1 else "stages",
        devices=stages * ring,
        order=order,
        backward=backward,
        delay=delay,
        chunks=chunks,
    )
    return called(choices) is not None


def staged_schedule(plan: Plan, microbatches: int) -> Schedule:
    """The schedule of a plan whose layers rest on owners.

    Raises:
        UsageError: if the plan's choices or the microbatches do not go together.
    """
    found = staged_at(plan.choices, microbatches) if plan.owners > 1 else None
    if found is None:
        raise UsageError(
            f"order={plan.order} with a {plan.backward} backward pass, delay={plan.delay} and "
            f"chunks={plan.chunks} does not run stages={plan.stages}, ring={plan.ring}"
        )
    return found
