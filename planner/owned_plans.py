"""Step time and memory of plans whose layers rest on owners: pipelines and rings.

They have few plans each and are simulated as schedules, compiled once (`schedule.quick`). Of many
microbatches as many are run as show what is repeated, and the rest is multiplied.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from jaxsys.axes import DividedAround
from jaxsys.lowering.memory import Around
from jaxsys.lowering.tables import Buffers, buffers_of
from jaxsys.planner.axes import split_of_plan
from jaxsys.planner.costs import block_cost, costs_around, lowered_peak_bytes
from jaxsys.planner.estimates import POLICY, Estimates, microbatches, schedule_link
from jaxsys.planner.orders import staged_schedule
from jaxsys.planner.plans import PATHS, Order, Plan, Residual, State
from jaxsys.planner.problem import Problem
from jaxsys.schedule import Costs, Data, Schedule, Trace, trace
from jaxsys.schedule.least import LeastSchedule
from jaxsys.schedule.quick import QuickMemory, QuickSchedule, Totals
from jaxsys.strategies import strategy_at

COMPILED_TASK, SIMULATED = 30.0, 1.5
"""Microseconds that a task takes, to be compiled and in each simulation."""
BOUNDED = 8_000.0
"""Microseconds of a bound of a step's time."""
COMPILED, WEIGHED = 32, 8
"""Schedules that are kept, compiled to be timed and to be weighed; some MiB each."""
REMEMBERED = 256
"""Of which arrays of ticks, or buffers, are kept; an MiB for 64 devices, less for fewer."""
LEAST = 1.0 - 1e-9
"""Of a bound, what rounding leaves of it."""
FILLED = (2, 3, 5)
"""Microbatches an owner, and two periods more, of schedules in which a middle is looked for that
further ones repeat."""
_RESIDUALS = list(Residual)


class OwnedEvaluator:
    """Plans of one problem; what they share is prepared once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.work = 0.0
        """What has been computed, in about microseconds of a quiet core; counted, not measured."""
        self._known: dict[tuple[Plan, tuple[int, ...]], Estimates] = {}
        self._timed: dict[tuple[Plan, tuple[int, ...]], Totals] = {}
        self._compiled: set[tuple[str, Plan, int]] = set()

    def evaluate(self, base: Plan, codes: np.ndarray) -> Estimates:
        """Estimates plans that share all of `base` but their layers, int [B, L] into `PATHS`."""
        rows = [self._estimate(base, tuple(int(c) for c in row)) for row in codes]
        return Estimates(
            **{
                name: np.concatenate([getattr(row, name) for row in rows])
                for name in ("step_s", "peak_bytes", "sent_bytes", "compute_s")
            }
        )

    def step_s(self, plan: Plan) -> float:
        """Seconds of a step; its memory takes longer."""
        return self._times_of(plan).step_s

    def least_step_s(self, plan: Plan) -> float:
        """Seconds that a step does not come below, found much faster than its time."""
        key = _told_apart(plan)
        if key in self._timed:
            return self._timed[key].step_s
        total = microbatches(self.problem, plan)
        few = self._stands_for(plan, total)
        if few is None:
            return 0.0
        ordered, period = _ordered(plan), _period(plan) if few < total else 0
        least = _least(ordered, few, period)
        self._count(("times", ordered, few), least.tasks)
        self.work += BOUNDED
        costs, _ = self._costs(plan, replace(least.shape, microbatches=total))
        link = schedule_link(self.problem, plan)
        return LEAST * least.schedule.step_s(costs, link, microbatches=total)

    def _estimate(self, base: Plan, codes: tuple[int, ...]) -> Estimates:
        plan = replace(base, layers=tuple(PATHS[c] for c in codes))
        key = _told_apart(plan)
        if key not in self._known:
            self._known[key] = self._simulate(plan)
        return self._known[key]

    def _times_of(self, plan: Plan) -> Totals:
        key = _told_apart(plan)
        if key not in self._timed:
            self._timed[key] = self._times(plan)
        return self._timed[key]

    def _simulate(self, plan: Plan) -> Estimates:
        """As many microbatches as fill it, the turns between them and the end multiplied."""
        ways, period = plan.owners, _period(plan)
        total = microbatches(self.problem, plan)
        times = self._times_of(plan)
        # Memory is what it ever is when the last owner has what it ever has.
        enough = min(total, 3 * ways if period > 1 else 2 * ways + 1)
        peak, held = self._peak_bytes(plan, enough)
        if total > enough and held >= enough:
            # Of an order that runs every forward pass first memory grows with the microbatches.
            more = min(total, 3 * ways + 2 * period)
            more -= more % period
            peak, _ = self._peak_bytes(plan, more)
            less, _ = self._peak_bytes(plan, more - period)
            peak += (total - more) / period * (peak - less)
        return Estimates(
            step_s=np.array([times.step_s]),
            peak_bytes=np.array([peak]),
            sent_bytes=np.array([times.sent_bytes + times.inside_bytes]),
            compute_s=np.array([times.busy_s - self._joins_s(plan, total)]),
        )

    def _times(self, plan: Plan) -> Totals:
        """A step, from as many microbatches as show what is repeated."""
        ways, period = plan.owners, _period(plan)
        total = microbatches(self.problem, plan)
        stand_in = self._stands_for(plan, total)
        if stand_in == total:
            return self._totals(plan, total)
        if stand_in is not None:
            return self._totals(plan, stand_in, period=period, stands_for=total)
        # One that repeats itself at several places, as where all forward passes come first.
        few = FILLED[0] * ways + 2 * period
        few += (total - few) % period
        last, before = self._totals(plan, few), self._totals(plan, few - period)
        periods = (total - few) / period
        grown = {
            name: getattr(last, name) + periods * (getattr(last, name) - getattr(before, name))
            for name in ("step_s", "busy_s", "sent_bytes", "inside_bytes")
        }
        return Totals(**grown)

    def _stands_for(self, plan: Plan, total: int) -> int | None:
        """How many microbatches show what a step of `total` does, all of them if that is few.

        None where its middle repeats itself at several places.
        """
        ways, period = plan.owners, _period(plan)
        few = 0
        for filled in FILLED:
            few = filled * ways + 2 * period
            few += (total - few) % period
            if few >= total:
                return total
            if plan.order == Order.ALL_FORWARD:
                return None
            if _has_middle(_ordered(plan), few, period):
                return few
        return None

    def _joins_s(self, plan: Plan, total: int) -> float:
        """What a device waits for others within its tasks in a step, which their times contain."""
        if plan.devices == plan.schedule_devices:
            return 0.0
        workload = self.problem.work(plan)
        split = split_of_plan(self.problem.cluster, plan)
        each = {
            (block, path.residual): block_cost(
                block,
                self.problem.cluster.slowest,
                activation_bytes=workload.activation_bytes,
                precision=self.problem.precision,
                recompute=POLICY[path.residual],
                split=split,
            ).join_s
            for block, path in zip(workload.blocks, plan.layers, strict=True)
        }
        layers = zip(workload.blocks, plan.layers, strict=True)
        # Every device runs F and B of as many layers, whichever they are.
        return total / plan.owners * sum(each[block, path.residual] for block, path in layers)

    def _costs(self, plan: Plan, shape: Schedule) -> tuple[Costs, Around]:
        return costs_around(
            self.problem.work(plan),
            self.problem.cluster.slowest,
            schedule_link(self.problem, plan),
            schedule=shape,
            precision=self.problem.precision,
            recompute=[POLICY[path.residual] for path in plan.layers],
            split=split_of_plan(self.problem.cluster, plan),
        )

    def _totals(
        self, plan: Plan, count: int, *, period: int = 0, stands_for: int | None = None
    ) -> Totals:
        """A step of so many microbatches, or of more that repeat its middle."""
        ordered = _ordered(plan)
        staged = _staged(ordered, count, period)
        self._count(("times", ordered, count), staged.tasks)
        self.work += staged.tasks * SIMULATED
        shape = staged.shape
        if stands_for is not None:
            shape = replace(shape, microbatches=stands_for)
        costs, _ = self._costs(plan, shape)
        link = schedule_link(self.problem, plan)
        return staged.quick.run(costs, link, microbatches=stands_for)

    def _peak_bytes(self, plan: Plan, count: int) -> tuple[float, int]:
        """The most that a device holds of so many microbatches, and residuals of how many."""
        ordered = _ordered(plan)
        held = _held(ordered, count, self.problem.lowered)
        self._count(("memory", ordered, count), held.tasks)
        costs, around = self._costs(plan, held.shape)
        if held.memory is None:
            assert held.buffers is not None
            peak = lowered_peak_bytes(held.shape, held.buffers, costs, around)
        else:
            static = around.rest + around.edge + around.edge_sums + max(around.block, around.head)
            peak = static + held.memory.alive_bytes(costs)
        return peak, held.residuals

    def _count(self, key: tuple[str, Plan, int], tasks: int) -> None:
        """Counts compiling as work once, whether or not it was kept from another search."""
        if key not in self._compiled:
            self._compiled.add(key)
            self.work += tasks * COMPILED_TASK


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staged:
    """A schedule of owners, compiled; its tasks and moves are not kept."""

    shape: Schedule
    quick: QuickSchedule
    tasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What it holds; its trace is not kept."""

    shape: Schedule
    memory: QuickMemory | None
    """Of a program of the user's."""
    buffers: Buffers | None
    """Of a lowered step."""
    residuals: int
    """The most, counted in microbatches, that a device keeps residuals of a chunk of."""
    tasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Least:
    """What no step of a schedule takes less than."""

    shape: Schedule
    schedule: LeastSchedule
    tasks: int


def _told_apart(plan: Plan) -> tuple[Plan, tuple[int, ...]]:
    """What makes a difference to a plan whose layers rest on owners."""
    return replace(plan, layers=()), tuple(_RESIDUALS.index(p.residual) for p in plan.layers)


def _period(plan: Plan) -> int:
    """Microbatches after which the schedule of stages or a ring repeats itself."""
    known = strategy_at(plan.choices)
    even = plan.ring > 1 or plan.chunks > 1 or (known is not None and known.even_microbatches)
    return plan.owners if even else 1


def _ordered(plan: Plan) -> Plan:
    """What of a plan its schedule depends on."""
    alone = {one.name: one.default for one in fields(DividedAround)}
    return replace(plan, layers=(), state=State.WHOLE, microbatch_size=1, **alone)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for cycles of objects: a schedule's are many, and none of them is in one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@lru_cache(maxsize=COMPILED)
@_uncollected()
def _staged(ordered: Plan, count: int, period: int) -> _Staged:
    schedule = staged_schedule(ordered, count)
    return _Staged(
        shape=replace(schedule, tasks=(), moves=(), starts=()),
        quick=QuickSchedule(schedule, period=period),
        tasks=len(schedule.tasks),
    )


@lru_cache(maxsize=REMEMBERED)
def _least(ordered: Plan, count: int, period: int) -> _Least:
    staged = _staged(ordered, count, period)
    return _Least(shape=staged.shape, schedule=LeastSchedule(staged.quick), tasks=staged.tasks)


@lru_cache(maxsize=16 * REMEMBERED)
def _has_middle(ordered: Plan, count: int, period: int) -> bool:
    return _staged(ordered, count, period).quick.middle is not None


def _held(ordered: Plan, count: int, lowered: bool) -> _Held:
    return (_in_buffers if lowered else _alive)(ordered, count)


@lru_cache(maxsize=REMEMBERED)
@_uncollected()
def _in_buffers(ordered: Plan, count: int) -> _Held:
    schedule = staged_schedule(ordered, count)
    found = trace(schedule)
    return _held_of(schedule, found, buffers=buffers_of(schedule, found))


@lru_cache(maxsize=WEIGHED)
@_uncollected()
def _alive(ordered: Plan, count: int) -> _Held:
    schedule = staged_schedule(ordered, count)
    found = trace(schedule)
    return _held_of(schedule, found, memory=QuickMemory(schedule, found))


def _held_of(
    schedule: Schedule,
    found: Trace,
    *,
    memory: QuickMemory | None = None,
    buffers: Buffers | None = None,
) -> _Held:
    lanes: Counter[tuple[int, int, int]] = Counter()
    for copy in found.copies:
        if copy.block.data is Data.RESIDUAL:
            lanes[copy.device, copy.block.chunk, copy.born] += 1
            lanes[copy.device, copy.block.chunk, copy.last_use + 1] -= 1
    most, live, at = 0, 0, (-1, -1)
    for (device, chunk, _), change in sorted(lanes.items()):
        live = change + (live if (device, chunk) == at else 0)
        most, at = max(most, live), (device, chunk)
    return _Held(
        shape=replace(schedule, tasks=(), moves=(), starts=()),
        memory=memory,
        buffers=buffers,
        residuals=most,
        tasks=len(schedule.tasks),
    )
