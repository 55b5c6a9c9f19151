"""In which order the owners of layers run their tasks: from a plan's choices to a schedule.

A stage of a pipeline runs some forward passes, then a backward and a forward pass in turn. How many
first, whether the backward pass is split and how far its second half W is put off are choices:

    order              forwards first, stage i of P, v chunks        W behind its I
    earliest-backward  P - i; with v > 1 2 (P - 1 - i) + (v - 1) P + 1   delay x i
    eager-forward      2 (P - i) - 1                                     delay x i
    all-forward        all                                               at once

`spaced` and the rings' orders come from `jaxsys.strategies`, where their ticks are derived.
"""

from collections.abc import Callable

from jaxsys.errors import UsageError
from jaxsys.planner.plans import Backward, Order, Plan
from jaxsys.schedule import Schedule, TaskKind
from jaxsys.strategies.pipeline import one_f_one_b_overlap
from jaxsys.strategies.stages import earliest_ticks, pipeline_schedule
from jaxsys.strategies.weipipe import interleave, naive, wzb1, wzb2, wzb2_paired
from jaxsys.strategies.zero_bubble import zero_bubble_overlap

IN_TURN = (Order.EARLIEST_BACKWARD, Order.EAGER_FORWARD, Order.ALL_FORWARD)
SPACED: dict[Backward, Callable[[int, int], Schedule]] = {
    Backward.WHOLE: one_f_one_b_overlap,
    Backward.SPLIT: zero_bubble_overlap,
}
RINGS: dict[tuple[Order, Backward, int], Callable[[int, int], Schedule]] = {
    (Order.DEPTH_FIRST, Backward.WHOLE, 0): naive,
    (Order.DEPTH_FIRST, Backward.SPLIT, 0): wzb2,
    (Order.DEPTH_FIRST, Backward.SPLIT, 1): wzb2_paired,
    (Order.SIDE_BY_SIDE, Backward.WHOLE, 0): interleave,
    (Order.SIDE_BY_SIDE, Backward.SPLIT, 0): wzb1,
}


def legal_order(
    stages: int, ring: int, order: Order, backward: Backward, delay: int, chunks: int
) -> bool:
    """Whether layers that rest so can be run in this order."""
    if ring > 1:
        return chunks == 1 and (order, backward, delay) in RINGS
    if stages == 1:
        plain = backward is Backward.WHOLE and delay == 0 and chunks == 1
        return plain and order is Order.DEPTH_FIRST
    if chunks > 1 and order is not Order.EARLIEST_BACKWARD:
        return False
    if order in (Order.SPACED, Order.ALL_FORWARD) or backward is Backward.WHOLE:
        return delay == 0 and order in (*IN_TURN, Order.SPACED)
    return order in IN_TURN


def staged_schedule(plan: Plan, microbatches: int) -> Schedule:
    """The schedule of a plan whose layers rest on owners.

    Raises:
        UsageError: if the plan's choices or the microbatches do not go together.
    """
    choices = (plan.order, plan.backward, plan.delay)
    if not legal_order(plan.stages, plan.ring, *choices, plan.chunks):
        raise UsageError(
            f"order={plan.order} with a {plan.backward} backward pass, delay={plan.delay} and "
            f"chunks={plan.chunks} does not run stages={plan.stages}, ring={plan.ring}"
        )
    if plan.ring > 1:
        return RINGS[choices](plan.ring, microbatches)
    if plan.order is Order.SPACED:
        return SPACED[plan.backward](plan.stages, microbatches)
    return _in_turn(plan, microbatches)


def _in_turn(plan: Plan, microbatches: int) -> Schedule:
    p, v, m = plan.stages, plan.chunks, microbatches
    if v > 1 and m % p:
        raise UsageError(f"chunks={v} need microbatches={m} to be a multiple of stages={p}")
    split = plan.backward is Backward.SPLIT
    kind = TaskKind.INPUT_GRADIENT if split else TaskKind.BACKWARD
    orders = []
    for stage in range(p):
        # Microbatches pass a stage's chunks in groups of P (of all M, with one chunk).
        turns = [(turn // p % v, turn // (v * p) * p + turn % p) for turn in range(v * m)]
        down = [(TaskKind.FORWARD, chunk * p + stage, at) for chunk, at in turns[: v * m]]
        up = [((v - 1 - chunk) * p + stage, at) for chunk, at in turns]
        first, lag = _forwards_first(plan, stage, v * m), plan.delay * stage
        # With few microbatches a long lag would leave W for when nothing is left to fill.
        lag = min(lag, stage + max(0, m - p))
        order = down[:first]
        for turn, (chunk, at) in enumerate(up):
            order.append((kind, chunk, at))
            if split and turn >= lag:
                order.append((TaskKind.WEIGHT_GRADIENT, *up[turn - lag]))
            order += down[first + turn : first + turn + 1]
        if split:
            order += [(TaskKind.WEIGHT_GRADIENT, *task) for task in up[max(0, v * m - lag) :]]
        orders.append(order)
    name = f"{plan.order}-{plan.backward}-{plan.delay}-{v}"
    tasks = earliest_ticks(orders, chunks=v * p)
    return pipeline_schedule(name, devices=p, chunks=v * p, microbatches=m, tasks=tasks)


def _forwards_first(plan: Plan, stage: int, everything: int) -> int:
    p, v = plan.stages, plan.chunks
    if plan.order is Order.ALL_FORWARD:
        return everything
    if plan.order is Order.EAGER_FORWARD:
        return min(everything, 2 * (p - stage) - 1)
    return min(everything, p - stage if v == 1 else 2 * (p - 1 - stage) + (v - 1) * p + 1)
