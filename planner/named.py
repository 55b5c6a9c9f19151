"""The known strategies, each simulated on the user's model and cluster, side by side.

Every row is a real Schedule run through `jaxsys.schedule.simulate`; for each strategy the fastest
recompute policy that fits memory is shown, or the leanest where none fits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxsys.errors import UsageError
from jaxsys.hardware import DeviceSpec
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, schedule_costs
from jaxsys.planner.workload import Workload
from jaxsys.schedule import Link, Schedule, ScheduleError, Simulation, simulate, trace
from jaxsys.strategies import zero
from jaxsys.strategies.data_parallel import data_parallel
from jaxsys.strategies.pipeline import one_f_one_b, one_f_one_b_overlap
from jaxsys.strategies.weipipe import interleave

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
    note: str = ""
    simulation: Simulation | None = field(default=None, repr=False, compare=False)


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
        """The fastest row that fits."""
        fitting = [row for row in self.rows if row.fits]
        return min(fitting, key=lambda row: row.step_s) if fitting else None

    @property
    def smallest_memory_bytes(self) -> float:
        """The least memory any strategy needs."""
        return min(row.memory_bytes for row in self.rows)


Generator = Callable[[], Schedule]


def strategies(workload: Workload, devices: int, microbatches: int) -> dict[str, Generator]:
    """Name -> how to make its schedule here; making it raises UsageError where it is not legal."""
    layers = workload.layers

    def staged(make: Callable[[int, int], Schedule]) -> Generator:
        def generate() -> Schedule:
            if layers % devices:
                legal = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
                raise UsageError(f"devices={devices} must divide layers={layers}; use {legal}")
            return make(devices, microbatches)

        return generate

    def sharded(make: Callable[..., Schedule]) -> Generator:
        return lambda: make(devices, microbatches, chunks=layers)

    def kept(make: Callable[..., Schedule], keep: frozenset[int]) -> Generator:
        return lambda: make(devices, microbatches, chunks=layers, keep=keep)

    every = frozenset(range(layers))
    return {
        "dp": lambda: data_parallel(devices, microbatches, chunks=layers),
        "zero-1": sharded(zero.zero_1),
        "zero-2": sharded(zero.zero_2),
        "zero-3": sharded(zero.zero_3),
        "zero-3.5": kept(zero.zero_3_5, every),
        "zero-4": kept(zero.zero_4, every),
        "1f1b": staged(one_f_one_b),
        "1f1b-overlap": staged(one_f_one_b_overlap),
        "weipipe-interleave": staged(interleave),
    }


def compare(
    workload: Workload,
    cluster: Cluster,
    *,
    microbatches: int,
    memory_bytes: float | None = None,
    precision: Precision | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Simulates every known strategy.

    Args:
        workload: the model and its microbatch.
        cluster: what runs it.
        microbatches: M of a step, over all devices.
        memory_bytes: the limit per device; `USABLE_MEMORY` of the device's if not given.
        precision: bytes per parameter.
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
    generators = strategies(workload, devices, microbatches)
    for number, (name, generate) in enumerate(generators.items(), 1):
        progress(f"simulating {name} ({number} of {len(generators)})")
        try:
            schedule = generate()
        except (UsageError, ScheduleError) as error:
            refused.append((name, str(error)))
            continue
        rows.append(_best_policy(name, schedule, workload, device, link, memory_bytes, precision))
    if not rows:
        raise UsageError("; ".join(f"{name}: {why}" for name, why in refused))
    return Comparison(rows=tuple(rows), refused=tuple(refused), memory_bytes=memory_bytes)


def _best_policy(
    name: str,
    schedule: Schedule,
    workload: Workload,
    device: DeviceSpec,
    link: Link,
    memory_bytes: float,
    precision: Precision,
) -> Row:
    found = trace(schedule)
    rows = []
    for recompute in workload.recompute_policies:
        costs = schedule_costs(
            workload,
            device,
            link,
            schedule=schedule,
            precision=precision,
            recompute=recompute,
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
                simulation=result,
            )
        )
    fitting = [row for row in rows if row.fits]
    if fitting:
        return min(fitting, key=lambda row: row.step_s)
    return min(rows, key=lambda row: row.memory_bytes)
