"""The known strategies, each simulated on the user's model and cluster, side by side.

Every row is the plan at a strategy's place, estimated as a search estimates plans: its schedule's
recursion, a steady period of it multiplied. A strategy without a place is simulated task by task.
The fastest recompute policy that fits memory is shown, or the leanest where none fits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxsys.axes import AROUND, AXES, Axis
from jaxsys.errors import UsageError
from jaxsys.lowering.tables import buffers_of
from jaxsys.planner.axes import PLANNED
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, schedule_costs
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.plans import Gradient, LayerPath, Plan, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import divided
from jaxsys.planner.runs import why_not, why_not_schedule
from jaxsys.planner.search import Found, Result
from jaxsys.planner.workload import Workload
from jaxsys.schedule import Placement, Schedule, ScheduleError, simulate, trace
from jaxsys.strategies import STRATEGIES, Place, Strategy, for_layers
from jaxsys.strategies.data_parallel import check_microbatches

MOST_TASKS = 200_000
"""Of a schedule that is simulated task by task."""
SHARED_WITH = ("zero-1", "zero-3")
"""What goes on around devices that share a task in a comparison's rows; a search looks at
everything."""
USABLE_MEMORY = 0.92
"""The share of a device's memory that a step may take by default; the rest is for the runtime,
collectives' buffers and fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One strategy's prediction."""

    strategy: str
    recompute: str
    chunks: int
    step_s: float
    compute_s: float
    """What the busiest device computes."""
    memory_bytes: float
    """The most that any device holds."""
    sent_bytes: float
    """The most that any device sends in a step."""
    tokens_per_s: float
    mfu: float
    fits: bool
    plan: Plan | None = None
    """What it does, if it has a place in the space of plans."""
    found: bool = False
    """Whether a search found it."""
    not_run: str | None = None
    """Why `jaxsys.train` cannot run it, if so."""

    @property
    def waits_s(self) -> float:
        """What of a step the busiest device's own compute is not."""
        return max(0.0, self.step_s - self.compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows, and the one to take."""

    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...]
    """Strategies that are not legal here, with the reason."""
    memory_bytes: float
    """The limit."""

    @property
    def best(self) -> Row | None:
        """The fastest row that fits; of equals, but for rounding, one with a strategy's name."""
        fitting = [row for row in self.rows if row.fits]
        rank = lambda row: (float(f"{row.step_s:.9g}"), row.found)  # noqa: E731
        return min(fitting, key=rank) if fitting else None

    @property
    def smallest_memory_bytes(self) -> float:
        """The least memory any strategy needs."""
        return min(row.memory_bytes for row in self.rows)


def compare(
    workload: Workload,
    cluster: Cluster,
    *,
    microbatches: int,
    microbatch_size: int = 1,
    memory_bytes: float | None = None,
    precision: Precision | None = None,
    recompute: str | None = None,
    evaluator: Evaluator | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Simulates every known strategy.

    Args:
        workload: the model and its microbatch.
        cluster: what runs it.
        microbatches: M of a step, over all devices.
        microbatch_size: sequences of each, as the rows' plans say it.
        memory_bytes: the limit per device; `USABLE_MEMORY` of the device's if not given.
        precision: bytes per parameter.
        recompute: the policy; of each strategy the best, if not given.
        evaluator: of the same problem; keeps what it has prepared for a search after this.
        progress: told, in a few words, which strategy is next.

    Raises:
        UsageError: if microbatches are not positive, or no strategy is legal.
    """
    if microbatches < 1:
        raise UsageError(f"microbatches={microbatches} must be at least 1")
    if memory_bytes is None:
        memory_bytes = USABLE_MEMORY * cluster.device.memory_bytes
    if not memory_bytes > 0:
        raise UsageError(f"memory of {memory_bytes / 2**30:.3g} GiB must be above 0")
    if evaluator is None:
        problem = Problem(
            workload_of=lambda _: workload,
            cluster=cluster,
            batch=microbatches * microbatch_size,
            memory_bytes=memory_bytes,
            precision=precision or Precision(),
            lowered=True,
        )
        evaluator = Evaluator(problem)
    policies = workload.recompute_policies if recompute is None else (recompute,)
    rows, refused = [], []
    for number, name in enumerate(STRATEGIES, 1):
        progress(f"simulating {name} ({number} of {len(STRATEGIES)})")
        for within in _shared_places(STRATEGIES[name], cluster):
            called = ", ".join((name, *(f"{AXES[a].place}s of {n}" for a, n in within.items())))
            try:
                row = _row(
                    evaluator, STRATEGIES[name], microbatches, microbatch_size, policies, within
                )
            except (UsageError, ScheduleError) as error:
                refused.append((called, str(error)))
            else:
                rows.append(replace(row, strategy=called))
    for axis in (one for one in reversed(tuple(AROUND.values())) if one.joint):
        progress(f"sharing {axis.name}")
        rows += _shared_rows(evaluator, axis, microbatches, microbatch_size, policies)
    if not rows:
        names_of: dict[str, list[str]] = {}  # a rule is said once, however many it refuses
        for name, why in refused:
            names_of.setdefault(why, []).append(name)
        rules = (f"{', '.join(names)}: {why}" for why, names in names_of.items())
        raise UsageError(f"no strategy is legal here: {'; '.join(rules)}")
    return Comparison(rows=tuple(rows), refused=tuple(refused), memory_bytes=memory_bytes)


def _shared_places(strategy: Strategy, cluster: Cluster) -> list[dict[str, int]]:
    """Over how many devices of a place a strategy is shown beside one: axis -> devices."""
    ring = strategy.place is not None and strategy.place.axis == "ring"
    axes = PLANNED.values()
    return [{}, *({axis.name: n} for axis in axes for n in axis.parts_in_rows(cluster, ring=ring))]


def _row(
    evaluator: Evaluator,
    strategy: Strategy,
    microbatches: int,
    microbatch_size: int,
    policies: Sequence[str],
    within: Mapping[str, int],
) -> Row:
    """The fastest recompute policy that fits, or the leanest where none does.

    Raises:
        UsageError: if the strategy is not legal here.
    """
    problem = evaluator.problem
    every = problem.cluster.devices
    workload, devices = problem.workload(microbatch_size), every // math.prod(within.values())
    chunks = strategy.chunks(devices=devices, layers=workload.layers)
    if chunks > workload.layers:
        raise UsageError(f"chunks={chunks} are more than layers={workload.layers}")
    if strategy.even_microbatches:
        check_microbatches(every, microbatches)
    sharded = strategy.placement is Placement.SHARDED
    shape = workload.uncut(devices) if sharded else None
    if shape is not None:
        raise UsageError(
            f"devices={devices} divide no axis of a matrix {list(shape)}, which would rest whole "
            "on each"
        )
    place = strategy.place
    if place is not None and (place.axis == "shard" or devices > 1):
        plans = [
            plan_at(place, policy, devices, workload.layers, microbatch_size) for policy in policies
        ]
        estimates = _planned(evaluator, [replace(plan, **within) for plan in plans])
    else:
        made = for_layers(
            strategy.name, devices=devices, microbatches=microbatches, layers=workload.layers
        )
        estimates = _simulated(problem, made, microbatch_size, policies)
    return _row_of(problem, strategy.name, chunks, estimates, microbatches, microbatch_size)


def _shared_rows(
    evaluator: Evaluator,
    axis: Axis,
    microbatches: int,
    microbatch_size: int,
    policies: Sequence[str],
) -> list[Row]:
    """The best number of devices along an axis, in each way that they share a task."""
    problem = evaluator.problem
    workload, devices = problem.workload(microbatch_size), problem.cluster.devices
    best: dict[str, list[_Estimate]] = {}
    divisors = (parts for parts in range(2, devices + 1) if devices % parts == 0)
    planned = PLANNED[axis.name]
    for way, shared in (one for n in divisors for one in planned.ways_to_share(workload, n)):
        parts = shared[axis.name]
        around = devices // parts
        if microbatches % (around * (parts if axis.batch else 1)):
            continue
        for name in SHARED_WITH:
            place = STRATEGIES[name].place
            assert place is not None
            over = around * parts if axis.shards else around
            if over == 1 or workload.uncut(over) is not None:
                continue
            plans = [
                replace(plan_at(place, policy, around, workload.layers, microbatch_size), **shared)
                for policy in policies
            ]
            best.setdefault(way, []).extend(_planned(evaluator, plans))
    return [
        _row_of(problem, None, workload.layers, estimates, microbatches, microbatch_size)
        for estimates in best.values()
    ]


def _row_of(
    problem: Problem,
    name: str | None,
    chunks: int,
    estimates: Sequence["_Estimate"],
    microbatches: int,
    microbatch_size: int,
) -> Row:
    """The fastest of a row's estimates that fits; without a name it is called by its plan."""
    workload, devices = problem.workload(microbatch_size), problem.cluster.devices
    fitting = [one for one in estimates if one.peak_bytes <= problem.memory_bytes]
    best = (
        min(fitting, key=lambda one: one.step_s)
        if fitting
        else min(estimates, key=lambda one: one.peak_bytes)
    )
    if name is None:
        assert best.plan is not None
        name = ", ".join(divided(best.plan))
    flops = workload.model_flops * microbatches
    peak_flops = devices * problem.cluster.device.peak_flops_per_s
    return Row(
        strategy=name,
        recompute=best.recompute,
        chunks=chunks,
        step_s=best.step_s,
        compute_s=best.compute_s,
        memory_bytes=best.peak_bytes,
        sent_bytes=best.sent_bytes,
        tokens_per_s=workload.tokens * microbatches / best.step_s,
        mfu=flops / (best.step_s * peak_flops),
        fits=bool(fitting),
        plan=best.plan,
        not_run=best.not_run,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimate:
    """A strategy with one recompute policy."""

    recompute: str
    plan: Plan | None
    not_run: str | None
    step_s: float
    compute_s: float
    peak_bytes: float
    sent_bytes: float


def _planned(evaluator: Evaluator, plans: Sequence[Plan]) -> list[_Estimate]:
    """Of plans that differ in their layers alone."""
    found = evaluator.evaluate(plans[0], np.array([plan.codes for plan in plans]))
    return [
        _Estimate(
            recompute=POLICY[plan.layers[0].residual],
            plan=plan,
            not_run=why_not(plan),
            step_s=float(found.step_s[index]),
            compute_s=float(found.compute_s[index]),
            peak_bytes=float(found.peak_bytes[index]),
            sent_bytes=float(found.sent_bytes[index]),
        )
        for index, plan in enumerate(plans)
    ]


def _simulated(
    problem: Problem, schedule: Schedule, microbatch_size: int, policies: Sequence[str]
) -> list[_Estimate]:
    """Task by task, of a strategy that has no place in the space of plans."""
    if len(schedule.tasks) > MOST_TASKS:
        raise UsageError(
            f"{schedule.name} has no place in the space of plans and {len(schedule.tasks)} tasks; "
            f"at most {MOST_TASKS} are simulated one by one"
        )
    workload, device = problem.workload(microbatch_size), problem.cluster.slowest
    link = problem.cluster.group(schedule.devices)
    found = trace(schedule)
    sharded = schedule.placement is Placement.SHARDED
    lowered = None if sharded else (found, buffers_of(schedule, found))
    estimates = []
    for recompute in policies:
        costs = schedule_costs(
            workload,
            device,
            link,
            schedule=schedule,
            precision=problem.precision,
            recompute=recompute,
            lowered=lowered,
        )
        result = simulate(schedule, costs, link, known_trace=found)
        estimates.append(
            _Estimate(
                recompute=recompute,
                plan=None,
                not_run=why_not_schedule(schedule, recompute),
                step_s=result.step_s,
                compute_s=max(result.busy_s),
                peak_bytes=max(result.peak_bytes),
                sent_bytes=max(result.sent_bytes),
            )
        )
    return estimates


def plan_at(place: Place, recompute: str, devices: int, layers: int, microbatch_size: int) -> Plan:
    """The plan of a strategy's place on so many devices, all layers alike."""
    residual = next(one for one, policy in POLICY.items() if policy == recompute)
    path = LayerPath(weights=place.weights, gradient=place.gradient, residual=residual)
    plain = LayerPath(weights=Weights.STAY, gradient=Gradient.ONCE, residual=residual)
    owned = place.axis != "shard"
    ways: Any = {place.axis: devices}
    return Plan(
        **ways,
        microbatch_size=microbatch_size,
        state=place.state,
        order=place.order,
        backward=place.backward,
        delay=place.delay,
        chunks=place.chunks,
        layers=((plain if owned else path),) * layers,
    )


def best_that_runs(result: Result) -> Found | None:
    """The best plan found that `jaxsys.train` runs."""
    return next((found for found in result.by_base if why_not(found.plan) is None), None)


def with_found(comparison: Comparison, problem: Problem, found: Found) -> Comparison:
    """The comparison with one more row: what a search found, by the name it is recognised by."""
    plan, cluster = found.plan, problem.cluster
    workload, total = problem.workload(plan.microbatch_size), problem.batch // plan.microbatch_size
    policies = {POLICY[path.residual] for path in plan.layers}
    step_flops = workload.model_flops * total / found.step_s
    parts = plan.owners * plan.chunks
    row = Row(
        strategy=f"found: {', '.join(divided(plan))}",
        recompute=policies.pop() if len(policies) == 1 else "by layer",
        chunks=parts if parts > 1 else len(plan.layers),
        step_s=found.step_s,
        compute_s=found.compute_s,
        memory_bytes=found.peak_bytes,
        sent_bytes=found.sent_bytes,
        tokens_per_s=workload.tokens * total / found.step_s,
        mfu=step_flops / (cluster.devices * cluster.device.peak_flops_per_s),
        fits=found.peak_bytes <= comparison.memory_bytes * (1 + 1e-9),
        plan=plan,
        found=True,
    )
    return replace(comparison, rows=(*comparison.rows, row))
