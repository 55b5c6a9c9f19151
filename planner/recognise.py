"""Names for plans and schedules that were found without names.

`recognise_schedule` looks at nothing but where blocks of data are and when; `recognise` looks at a
plan's fields, and so also sees split features and replicas around the schedule.
"""

from collections import Counter, defaultdict

from jaxsys.planner.cats import cats, is_sharded, residents, travels
from jaxsys.planner.plans import Gradient, Order, Plan, Residual, State, Weights
from jaxsys.schedule import Data, MoveKind, Placement, Schedule, TaskKind, check

STAGED = {
    Order.EARLIEST_BACKWARD: "1f1b",
    Order.SPACED: "1f1b-overlap",
    Order.ALL_FORWARD: "gpipe",
}


def recognise(plan: Plan) -> str:
    """The name of what a plan does over its schedule's devices.

    Features, replicas and recompute are told by `describe`.
    """
    if plan.ring > 1:
        return "weipipe-interleave"
    if plan.stages > 1:
        return STAGED.get(plan.order, "pipeline")
    if plan.shard == 1:
        return "tp-sp" if plan.features > 1 else "single"
    if plan.state is State.WHOLE:
        return "dp"
    return _sharded_name(
        Counter(path.weights for path in plan.layers),
        Counter(path.gradient for path in plan.layers),
    )


def describe(plan: Plan) -> str:
    """A plan in one line: its name, and how devices are divided between its parts."""
    name = recognise(plan)
    parts = [name if plan.devices == 1 or name == "tp-sp" else f"{name} over {_inner(plan)}"]
    if plan.features > 1:
        parts.append(
            f"of {plan.features}" if name == "tp-sp" else f"each of {plan.features} (tp-sp)"
        )
    if plan.replicas > 1:
        parts.append(f"{plan.replicas} times")
    again = sum(path.residual is Residual.RECOMPUTE for path in plan.layers)
    if again == len(plan.layers):
        parts.append("recompute")
    elif again:
        parts.append(f"recompute in {again} of {len(plan.layers)} layers")
    if len(set(plan.layers)) > 1 and plan.stages * plan.ring == 1:
        kept = sum(path.weights is Weights.BETWEEN for path in plan.layers)
        late = sum(path.gradient is Gradient.DEFERRED for path in plan.layers)
        if 0 < kept < len(plan.layers):
            parts.append(f"{kept} layers kept")
        if 0 < late < len(plan.layers):
            parts.append(f"{late} deferred")
    if plan.microbatch_size > 1:
        parts.append(f"microbatch {plan.microbatch_size}")
    return ", ".join(parts)


def recognise_schedule(schedule: Schedule) -> str:
    """The name of what a schedule does, read from where its blocks are."""
    found = cats(schedule, known_trace=check(schedule))
    if schedule.devices == 1:
        return "single"
    if travels(found, Data.WEIGHT) and schedule.placement is Placement.OWNER:
        kinds = {task.kind for task in schedule.tasks}
        if TaskKind.INPUT_GRADIENT in kinds:
            return "weipipe-zero-bubble"
        both = Counter((task.tick, task.device) for task in schedule.tasks)
        return "weipipe-interleave" if max(both.values()) > 1 else "weipipe-naive"
    if schedule.placement is Placement.OWNER:
        held, p, m = residents(found, Data.RESIDUAL, 0), schedule.devices, schedule.microbatches
        if held <= min(p, m):
            return "1f1b"
        return "1f1b-overlap" if held < m else "gpipe"
    if not is_sharded(schedule):
        return "dp"
    turns = schedule.microbatches // schedule.devices
    forward = {(t.chunk, t.tick) for t in schedule.tasks if t.kind is TaskKind.FORWARD}
    backward = {(t.chunk, t.tick) for t in schedule.tasks if t.kind is TaskKind.BACKWARD}
    sums: dict[int, list[int]] = defaultdict(list)
    for move in schedule.moves:
        if move.kind is MoveKind.REDUCE_SCATTER:
            sums[move.block.chunk].append(move.start)
    weights: Counter[Weights] = Counter()
    gradients: Counter[Gradient] = Counter()
    for cat in found:
        chunk = cat.block.chunk
        mine = [event for event in cat.events if 0 in event.devices]
        if cat.block.data is Data.WEIGHT:
            serves = Counter()
            for event in mine:
                ticks = range(event.first_tick, event.last_tick + 1)
                uses = [
                    kind
                    for tick in ticks
                    for kind, when in (("F", forward), ("B", backward))
                    if (chunk, tick) in when
                ]
                serves["".join(uses)] += 1
            if any(len(uses) > 2 for uses in serves) or len(mine) == 1:
                weights[Weights.STAY] += 1
            elif serves["FB"]:
                weights[Weights.WITHIN] += 1
            elif serves["BF"]:
                weights[Weights.BETWEEN] += 1
            else:
                weights[Weights.REFETCH] += 1
        elif cat.block.data is Data.GRADIENT:
            # Right after its B a sum is not deferred, even where the next F is in that tick.
            late = any((chunk, start - 1) not in backward for start in sums[chunk])
            if len(mine) == 1 and turns > 1:
                gradients[Gradient.ONCE] += 1
            elif late:
                gradients[Gradient.DEFERRED] += 1
            else:
                gradients[Gradient.EACH if turns > 1 else Gradient.ONCE] += 1
    return _sharded_name(weights, gradients)


def _sharded_name(weights: Counter[Weights], gradients: Counter[Gradient]) -> str:
    """By the boldest thing that any layer does."""
    if weights[Weights.BETWEEN] or weights[Weights.REFETCH]:
        if gradients[Gradient.DEFERRED]:
            return "zero-4"
        return "zero-3.5" if weights[Weights.BETWEEN] else "zero-3"
    if weights[Weights.WITHIN]:
        return "zero-3-within"
    if gradients[Gradient.DEFERRED]:
        return "zero-2-deferred"
    return "zero-2" if gradients[Gradient.EACH] else "zero-1"


def _inner(plan: Plan) -> int:
    return plan.shard * plan.stages * plan.ring
