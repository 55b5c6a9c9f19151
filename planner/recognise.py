"""Names for plans and schedules that were found without names.

`recognise_schedule` looks at nothing but where blocks of data are and when; `recognise` looks at a
plan's fields, and so also sees split features and replicas around the schedule.
"""

from collections import Counter, defaultdict

from jaxsys.planner.cats import Cat, cats, is_sharded, residents, travels
from jaxsys.planner.plans import Backward, Gradient, Order, Plan, Residual, State, Weights
from jaxsys.schedule import Data, MoveKind, Placement, Schedule, TaskKind, check

WHOLE_BACKWARD = {
    Order.EARLIEST_BACKWARD: "1f1b",
    Order.EAGER_FORWARD: "1f1b-eager",
    Order.SPACED: "1f1b-overlap",
    Order.ALL_FORWARD: "gpipe",
}
SPLIT_BACKWARD = {
    (Order.EARLIEST_BACKWARD, 1): "zb-h1",
    (Order.EAGER_FORWARD, 2): "zb-h2",
    (Order.SPACED, 0): "zb-overlap",
}
RING = {
    (Order.DEPTH_FIRST, Backward.WHOLE, 0): "weipipe-naive",
    (Order.DEPTH_FIRST, Backward.SPLIT, 0): "weipipe-wzb2",
    (Order.DEPTH_FIRST, Backward.SPLIT, 1): "weipipe-wzb2-paired",
    (Order.SIDE_BY_SIDE, Backward.WHOLE, 0): "weipipe-interleave",
    (Order.SIDE_BY_SIDE, Backward.SPLIT, 0): "weipipe-wzb1",
}


def recognise(plan: Plan) -> str:
    """The name of what a plan does over its schedule's devices.

    Features, replicas and recompute are told by `describe`.
    """
    if plan.ring > 1:
        return RING[plan.order, plan.backward, plan.delay]
    if plan.stages > 1 and plan.backward is Backward.WHOLE:
        return WHOLE_BACKWARD[plan.order] + ("-interleaved" if plan.chunks > 1 else "")
    if plan.stages > 1:
        if plan.chunks > 1:
            return "zero-bubble-interleaved"
        return SPLIT_BACKWARD.get((plan.order, plan.delay), "zero-bubble")
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
    if name.startswith("zero-bubble"):
        parts.append(f"{plan.order}, delay {plan.delay}")
    if plan.chunks > 1:
        parts.append(f"{plan.chunks} chunks a stage")
    for residual, words in (
        (Residual.RECOMPUTE, "recompute"),
        (Residual.SELECTIVE, "selective recompute"),
    ):
        again = sum(path.residual is residual for path in plan.layers)
        if again == len(plan.layers):
            parts.append(words)
        elif again:
            parts.append(f"{words} in {again} of {len(plan.layers)} layers")
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
    if schedule.placement is Placement.OWNER:
        return _owned_name(schedule, found)
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


def _owned_name(schedule: Schedule, found: tuple[Cat, ...]) -> str:
    """Of layers that rest on owners: by what travels, runs in one tick, and waits where."""
    p, m = schedule.devices, schedule.microbatches
    split = any(task.kind is TaskKind.INPUT_GRADIENT for task in schedule.tasks)
    held = residents(found, Data.RESIDUAL, 0)
    if travels(found, Data.WEIGHT):
        beside: dict[tuple[int, int], set[TaskKind]] = defaultdict(set)
        for task in schedule.tasks:
            beside[task.tick, task.device].add(task.kind)
        pairs = [kinds for kinds in beside.values() if TaskKind.FORWARD in kinds and len(kinds) > 1]
        if not split:
            return "weipipe-interleave" if pairs else "weipipe-naive"
        if any(TaskKind.INPUT_GRADIENT in kinds for kinds in pairs):
            return "weipipe-wzb1"
        return "weipipe-wzb2-paired" if pairs else "weipipe-wzb2"
    if schedule.chunks > p:
        return "zero-bubble-interleaved" if split else "1f1b-interleaved"
    if split:
        taps = residents(found, Data.TAP, p - 1)  # the last stage's lag, and the one at hand
        if held <= min(p, m):
            return "zb-h1" if taps == min(p, m) else "zero-bubble"
        if held == min(2 * p - 1, m):
            return {2 * p - 1: "zb-h2", p: "zb-overlap"}.get(taps, "zero-bubble")
        return "zero-bubble"
    if held <= min(p, m):
        return "1f1b"
    if held == m:
        return "gpipe"
    first = {task.tick for task in schedule.tasks if task.kind is TaskKind.FORWARD}
    back = {task.tick for task in schedule.tasks if task.kind is TaskKind.BACKWARD}
    return "1f1b-eager" if first & back else "1f1b-overlap"


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
