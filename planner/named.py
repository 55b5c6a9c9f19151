"""The known strategies, each simulated on the user's model and cluster, side by side.

Every row is a real Schedule run through `jaxsys.schedule.simulate`; for each strategy the fastest
recompute policy that fits memory is shown, or the leanest where none fits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jaxsys.errors import UsageError
from jaxsys.hardware import DeviceSpec
from jaxsys.lowering.tables import buffers_of
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, schedule_costs
from jaxsys.planner.evaluate import POLICY
from jaxsys.planner.plans import Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import recognise
from jaxsys.planner.runs import why_not, why_not_schedule
from jaxsys.planner.search import Found, Result
from jaxsys.planner.workload import Workload
from jaxsys.schedule import (
    Link,
    Placement,
    Schedule,
    ScheduleError,
    Simulation,
    simulate,
    trace,
)
from jaxsys.strategies import STRATEGIES, for_layers

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
    """Of a row that a search found."""
    not_run: str | None = None
    """Why `jaxsys.train` cannot run it, if so."""
    simulation: Simulation | None = field(default=None, repr=False, compare=False)

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
        rank = lambda row: (float(f"{row.step_s:.9g}"), row.plan is not None)  # noqa: E731
        return min(fitting, key=rank) if fitting else None

    @property
    def smallest_memory_bytes(self) -> float:
        """The least memory any strategy needs."""
        return min(row.memory_bytes for row in self.rows)


Generator = Callable[[], Schedule]


def generators(workload: Workload, devices: int, microbatches: int) -> dict[str, Generator]:
    """Name -> how to make its schedule here; making it raises UsageError where it is not legal."""

    def generator(name: str) -> Generator:
        def generate() -> Schedule:
            sharded = STRATEGIES[name].placement is Placement.SHARDED
            shape = workload.uncut(devices) if sharded else None
            if shape is not None:
                raise UsageError(
                    f"devices={devices} divide no axis of a matrix {list(shape)}, which would rest "
                    "whole on each"
                )
            layers = workload.layers
            schedule = for_layers(name, devices=devices, microbatches=microbatches, layers=layers)
            if schedule.chunks > layers:
                raise UsageError(f"chunks={schedule.chunks} are more than layers={layers}")
            return schedule

        return generate

    return {name: generator(name) for name in STRATEGIES}


def compare(
    workload: Workload,
    cluster: Cluster,
    *,
    microbatches: int,
    memory_bytes: float | None = None,
    precision: Precision | None = None,
    recompute: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Simulates every known strategy.

    Args:
        workload: the model and its microbatch.
        cluster: what runs it.
        microbatches: M of a step, over all devices.
        memory_bytes: the limit per device; `USABLE_MEMORY` of the device's if not given.
        precision: bytes per parameter.
        recompute: the policy; of each strategy the best, if not given.
        progress: told, in a few words, which strategy is next.

    Raises:
        UsageError: if microbatches are not positive, or no strategy is legal.
    """
    if microbatches < 1:
        raise UsageError(f"microbatches={microbatches} must be at least 1")
    device, devices = cluster.device, cluster.devices
    link = cluster.group(devices)
    if memory_bytes is None:
        memory_bytes = USABLE_MEMORY * device.memory_bytes
    if not memory_bytes > 0:
        raise UsageError(f"memory of {memory_bytes / 2**30:.3g} GiB must be above 0")
    precision = precision or Precision()
    rows, refused = [], []
    found = generators(workload, devices, microbatches)
    for number, (name, generate) in enumerate(found.items(), 1):
        progress(f"simulating {name} ({number} of {len(found)})")
        try:
            schedule = generate()
        except (UsageError, ScheduleError) as error:
            refused.append((name, str(error)))
            continue
        policies = workload.recompute_policies if recompute is None else (recompute,)
        rows.append(
            _best_policy(name, schedule, workload, device, link, memory_bytes, precision, policies)
        )
    if not rows:
        names_of: dict[str, list[str]] = {}  # a rule is said once, however many it refuses
        for name, why in refused:
            names_of.setdefault(why, []).append(name)
        rules = (f"{', '.join(names)}: {why}" for why, names in names_of.items())
        raise UsageError(f"no strategy is legal here: {'; '.join(rules)}")
    return Comparison(rows=tuple(rows), refused=tuple(refused), memory_bytes=memory_bytes)


def _best_policy(
    name: str,
    schedule: Schedule,
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    memory_bytes: float,
    precision: Precision,
    policies: Sequence[str],
) -> Row:
    found = trace(schedule)
    sharded = schedule.placement is Placement.SHARDED
    lowered = None if sharded else (found, buffers_of(schedule, found))
    rows = []
    for recompute in policies:
        costs = schedule_costs(
            workload,
            device,
            link,
            schedule=schedule,
            precision=precision,
            recompute=recompute,
            lowered=lowered,
        )
        result = simulate(schedule, costs, link, known_trace=found)
        flops = workload.model_flops * schedule.microbatches
        peak = max(result.peak_bytes)
        rows.append(
            Row(
                strategy=name,
                recompute=recompute,
                chunks=schedule.chunks,
                step_s=result.step_s,
                compute_s=max(result.busy_s),
                memory_bytes=peak,
                sent_bytes=max(result.sent_bytes),
                tokens_per_s=workload.tokens * schedule.microbatches / result.step_s,
                mfu=flops / (result.step_s * schedule.devices * device.peak_flops_per_s),
                fits=peak <= memory_bytes,
                not_run=why_not_schedule(schedule, recompute),
                simulation=result,
            )
        )
    fitting = [row for row in rows if row.fits]
    if fitting:
        return min(fitting, key=lambda row: row.step_s)
    return min(rows, key=lambda row: row.memory_bytes)


def best_that_runs(result: Result) -> Found | None:
    """The best plan found that `jaxsys.train` runs."""
    return next((found for found in result.by_base if why_not(found.plan) is None), None)


def with_found(comparison: Comparison, problem: Problem, result: Result) -> Comparison:
    """The comparison with one more row: what a search found, by the name it is recognised by."""
    found = best_that_runs(result)
    if found is None:
        return comparison
    plan, cluster = found.plan, problem.cluster
    workload, total = problem.workload(plan.microbatch_size), problem.batch // plan.microbatch_size
    policies = {POLICY[path.residual] for path in plan.layers}
    step_flops = workload.model_flops * total / found.step_s
    parts = plan.owners * plan.chunks
    times = f", {plan.replicas} times" if plan.replicas > 1 else ""
    row = Row(
        strategy=f"found: {recognise(plan)} over {plan.devices // plan.replicas}{times}",
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
    )
    return replace(comparison, rows=(*comparison.rows, row))
