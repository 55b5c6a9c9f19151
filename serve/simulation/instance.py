"""A simulated instance: the live server's scheduler, turns and governor around a simulated body."""

import random
import zlib
from typing import Protocol

from jaxsys.clocks import SimulatedClocks
from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.meters import Metered, Reading
from jaxsys.serve.energy.policy import ClockPolicy
from jaxsys.serve.energy.shares import Shares
from jaxsys.serve.host_pages import Fetch
from jaxsys.serve.iterations import Completion, Iteration, Role, SchedulerConfig
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.requests import Request
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.simulation.executor import SimExecutor
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.traces import RequestTrace
from jaxsys.serve.turns import Turns


class Replay(Protocol):
    """What a simulated instance needs of the replay that it is part of."""

    config: ClusterConfig
    clock: VirtualClock
    trace: RequestTrace
    clocks_mhz: tuple[int, ...]
    page_bytes: float

    def dispatched(self, instance: "SimInstance", iteration: Iteration) -> None:
        """An iteration is planned and its clock set."""
        ...

    def count_gaps(self, instance: "SimInstance", iteration: Iteration, now_s: float) -> None:
        """Books the time between tokens."""
        ...

    def completed(
        self, instance: "SimInstance", iteration: Iteration, completion: Completion, now_s: float
    ) -> None:
        """Books first tokens, and requests that ended."""
        ...

    def fetch(self, instance: "SimInstance", fetch: Fetch) -> None:
        """Pages come back from the host's memory."""
        ...

    def hand_over(self, instance: "SimInstance", request: Request) -> None:
        """A prompt is computed: its pages go to a decode instance."""
        ...

    def receive(self, instance: "SimInstance") -> None:
        """Reserves pages for who fits."""
        ...


class ReplayMeter:
    """What the replay's device books, at every change of clock."""

    method = "simulated: booked by the replay's device, idle included"

    def __init__(self, executor: SimExecutor) -> None:
        self.executor = executor

    def begin(self, now_s: float) -> None:
        self.executor.idle_until(now_s)

    def iteration(self, load: Load, steps: int, latency_s: float, now_s: float) -> Metered:
        return Metered(latency_s, self.executor.finished_j)

    def idle(self, now_s: float) -> None:
        self.executor.idle_until(now_s)

    def read(self, now_s: float) -> Reading:
        executor = self.executor
        return Reading(executor.busy_j + executor.idle_j, None, executor.idle_j)


class SimInstance:
    """One simulated instance: its turns, and what they work with. Is an `InstanceView`."""

    def __init__(
        self, name: str, role: Role, simulator: Replay, policy: ClockPolicy, *, shares: bool
    ) -> None:
        self.name = name
        self.role: Role = role
        self.simulator = simulator
        config, clock = simulator.config, simulator.clock
        spec = config.gpu.spec
        self.clocks = SimulatedClocks(
            available_mhz=spec.available_mhz,
            now_s=clock.now_s,
            name=f"{spec.name} {name}",
            set_latency_s=config.set_latency_s,
        )
        self.executor = SimExecutor(
            config.gpu,
            self.clocks,
            time_noise=config.time_noise,
            seed=zlib.crc32(name.encode()),
        )
        self.governor = Governor(
            policy,
            self.clocks,
            ReplayMeter(self.executor),
            choices_mhz=simulator.clocks_mhz,
            shares=Shares(spec, config.gpu.shape) if shares else None,
            now_s=clock.now_s,
        )
        capacity = config.gpu.kv_capacity_tokens
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_count=capacity // config.page_size,
                page_size=config.page_size,
                max_batch=config.max_batch,
                max_prefill_tokens=config.max_prefill_tokens,
                max_length=capacity,
                decode_buckets=config.decode_buckets or (config.max_batch,),
                role=role,
                prefix_caching=simulator.trace.sessions is not None,
                reserved_tokens=config.gpu.engine.reserved_tokens,
                pair_cost=config.gpu.pair_cost,
                host_pages=0
                if role == "decode"
                else int(config.host_pages_gib * 2**30 / simulator.page_bytes),
            )
        )
        self.turns = Turns(
            self.scheduler,
            self.governor,
            clock,
            self,
            depth=2 if config.plan_ahead else 1,
            max_steps=config.max_steps if role == "decode" and not config.plan_ahead else 1,
        )
        if role != "both":
            self.turns.transfer = SimTransfer(self)
        self.in_flight = 0
        self.kv_tokens = 0
        self.iteration: Iteration | None = None
        """On the device."""
        self.queued: Iteration | None = None
        """Dispatched behind it."""
        self.queued_s = 0.0
        self.waits = False
        """Whether its loop waits for the device, or is busy itself, so that who comes must wait."""
        self.version = 0
        """Counts changes of the end in flight: an event of an older version is stale."""
        self.plans = 0
        """Likewise of turns to come."""
        self.newcomers: list[Request] = []
        self.started_s = 0.0
        """Since when who decodes in the iteration in flight waits for a token."""
        self.dispatched: Iteration | None = None
        """Last."""
        self.host_until_s = 0.0
        """When its host has dispatched that."""
        self.host_random = random.Random(zlib.crc32(f"{name} host".encode()))
        self.asleep = False
        """Whether it takes no requests: it sleeps, or wakes and is not up yet."""
        self.waking = False
        self.held_up_s = 0.0
        """By how much pages that come or go put off the next iteration."""
        self.host_free_s = 0.0
        """When the way from the host's memory is free."""

    @property
    def page_size(self) -> int:
        return self.scheduler.config.page_size

    @property
    def page_count(self) -> int:
        return self.scheduler.config.page_count

    @property
    def batch(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting_tokens(self) -> int:
        return self.scheduler.waiting_tokens

    @property
    def waiting_requests(self) -> int:
        """Prompts that wait or are partly computed."""
        return len(self.scheduler.waiting) + len(self.scheduler.prefilling)

    @property
    def clock_mhz(self) -> float | None:
        return self.governor.clock_mhz

    @property
    def busy_until_s(self) -> float | None:
        """When the iteration in flight ends; None where idle. For queueing predictions."""
        if self.iteration is None:
            return None
        return max(self.executor.end_s, self.host_until_s)

    # --- of its turns -------------------------------------------------------------------------

    def fetch(self, fetch: Fetch) -> None:
        """Has pages come back from the host's memory."""
        self.simulator.fetch(self, fetch)

    def dispatch(self, iteration: Iteration) -> None:
        """Begins it, or has it begin when the one on the device has ended."""
        self.scheduler.saved(iteration.saves)
        self.simulator.dispatched(self, iteration)

    def ended(
        self, iteration: Iteration, outcome: Sampled | None, latency_s: float, now_s: float
    ) -> None:
        """Books the gaps between its tokens."""
        if iteration.decodes:
            self.simulator.count_gaps(self, iteration, now_s)

    def completed(
        self, iteration: Iteration, outcome: Sampled | None, completion: Completion, now_s: float
    ) -> None:
        """Books first tokens and requests that ended."""
        self.simulator.completed(self, iteration, completion, now_s)


class SimTransfer:
    """A simulated instance's part in handing requests over."""

    def __init__(self, instance: SimInstance) -> None:
        self.instance = instance

    def planned(self, iteration: Iteration) -> None:
        return

    def completed(self, completion: Completion) -> None:
        for request in completion.handed_over:
            self.instance.simulator.hand_over(self.instance, request)

    def between(self) -> None:
        if self.instance.scheduler.incoming:
            self.instance.simulator.receive(self.instance)

    def aborted(self, request: Request) -> None:
        return

    def take(self, message: object) -> None:
        raise TypeError(f"a replay sends no messages, such as {message!r}")
