"""Names for plans and schedules that were found without names.

`recognise_schedule` looks at nothing but where blocks of data are and when; `recognise` looks at a
plan's fields, and so also sees split features and replicas around the schedule.
"""

from collections import Counter, defaultdict

from jaxsys.axes import AROUND
from jaxsys.errors import UsageError
from jaxsys.planner.axes import PLANNED, PlannedAxis
from jaxsys.planner.cats import Cat, cats, residents, travels
from jaxsys.planner.plans import Backward, Gradient, Plan, Residual, State, Weights
from jaxsys.schedule import Data, MoveKind, Placement, Schedule, TaskKind, check
from jaxsys.strategies import STRATEGIES, Signs, called, named


def recognise(plan: Plan) -> str:
    """The name of what a plan does over its schedule's devices.

    The axes around them or within each, and recompute, are told by `describe`.
    """
    if plan.schedule_devices == 1:
        return next(filter(None, (axis.code(plan) for axis in _split_along(plan))), "single")
    name = called(plan.choices)
    if name is None:
        raise UsageError(
            f"order={plan.order} with a {plan.backward} backward pass, delay={plan.delay} and "
            f"chunks={plan.chunks} is nothing that runs; no strategy of {', '.join(STRATEGIES)} "
            "has it for its own"
        )
    return name


def divided(plan: Plan) -> list[str]:
    """A plan's name, and how devices are divided between its parts."""
    name = recognise(plan)
    alone = plan.schedule_devices == 1
    parts = [name if alone else f"{name} over {plan.schedule_devices}"]
    for axis in _split_along(plan):
        called_so = alone and axis.code(plan) == name
        parts.append(axis.words(plan, alone=called_so))
        if called_so and plan.state is State.SPLIT:
            parts.append(called(plan.choices) or str(plan.state))
    return parts


def _split_along(plan: Plan) -> list[PlannedAxis]:
    """The axes of more than one part, those within a place first, then rings around it."""
    within = [axis.name for axis in AROUND.values() if axis.within]
    around = [axis.name for axis in AROUND.values() if not axis.within]
    names = (name for name in (*within, *reversed(around)) if getattr(plan, name) > 1)
    return [PLANNED[name] for name in names]


def describe(plan: Plan) -> str:
    """A plan in one line: its name, how devices are divided, and what else it chooses."""
    name, parts = recognise(plan), divided(plan)
    if plan.stages > 1 and plan.backward is Backward.SPLIT and name not in STRATEGIES:
        parts.append(f"{plan.order}, delay {plan.delay}")
    if plan.chunks > 1:
        parts.append(f"{plan.chunks} chunks a stage")
    for residual, words in (
        (Residual.RECOMPUTE, "recompute"),
        (Residual.ATTENTION, "recompute around attention"),
        (Residual.SELECTIVE, "selective recompute"),
    ):
        again = sum(path.residual is residual for path in plan.layers)
        if again == len(plan.layers):
            parts.append(words)
        elif again:
            parts.append(f"{words} in {again} of {len(plan.layers)} layers")
    if len(set(plan.layers)) > 1 and plan.owners == 1:
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
    signs = signs_of(schedule)
    if schedule.devices == 1:
        return "single"
    name = named(signs)
    if name is None:
        raise UsageError(f"schedule {schedule.name} is none of {', '.join(STRATEGIES)}")
    return name


def signs_of(schedule: Schedule) -> Signs:
    """What tells a legal schedule from others."""
    found = cats(schedule, known_trace=check(schedule))
    sharded = schedule.placement is Placement.SHARDED
    weights, gradients = _lives(schedule, found) if sharded else (frozenset(), frozenset())
    beside: dict[tuple[int, int], set[TaskKind]] = defaultdict(set)
    for task in schedule.tasks:
        beside[task.tick, task.device].add(task.kind)
    with_forward = [kinds for kinds in beside.values() if TaskKind.FORWARD in kinds]
    return Signs(
        schedule=schedule,
        weights=weights,
        gradients=gradients,
        weights_travel=travels(found, Data.WEIGHT),
        residuals=residents(found, Data.RESIDUAL, 0),
        taps=residents(found, Data.TAP, schedule.devices - 1),
        pairs=frozenset().union(*with_forward) - {TaskKind.FORWARD},
        split=any(task.kind is TaskKind.INPUT_GRADIENT for task in schedule.tasks),
    )


def _lives(
    schedule: Schedule, found: tuple[Cat, ...]
) -> tuple[frozenset[Weights], frozenset[Gradient]]:
    """How long copies of sharded layers live on a device, and when their gradients are summed."""
    turns = schedule.microbatches // schedule.devices
    forward = {(t.chunk, t.tick) for t in schedule.tasks if t.kind is TaskKind.FORWARD}
    backward = {(t.chunk, t.tick) for t in schedule.tasks if t.kind is TaskKind.BACKWARD}
    sums: dict[int, list[int]] = defaultdict(list)
    for move in schedule.moves:
        if move.kind is MoveKind.REDUCE_SCATTER:
            sums[move.block.chunk].append(move.start)
    weights: set[Weights] = set()
    gradients: set[Gradient] = set()
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
                weights.add(Weights.STAY)
            elif serves["FB"]:
                weights.add(Weights.WITHIN)
            elif serves["BF"]:
                weights.add(Weights.BETWEEN)
            else:
                weights.add(Weights.REFETCH)
        elif cat.block.data is Data.GRADIENT:
            # Right after its B a sum is not deferred, even where the next F is in that tick.
            late = any((chunk, start - 1) not in backward for start in sums[chunk])
            if len(mine) == 1 and turns > 1:
                gradients.add(Gradient.ONCE)
            elif late:
                gradients.add(Gradient.DEFERRED)
            else:
                gradients.add(Gradient.EACH if turns > 1 else Gradient.ONCE)
    return frozenset(weights), frozenset(gradients)
