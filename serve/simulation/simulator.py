"""Replays a trace on N prefill and M decode instances in virtual time.

The brain is the live server's: its `Scheduler`, its `Turns`, its `Governor` around any clock
policy, its routers. Only the bodies differ: `SimExecutor` says how long an iteration takes and what
it draws. One heap of events drives all.

Where nothing can interrupt it, a decode instance plans many steps as one iteration; a newcomer cuts
that iteration at the next step's end, so times come out as if each step had been planned alone
(the governor then decides once for those steps; `max_steps=1` decides for every one).
"""

import bisect
import heapq
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import ClockPolicy
from jaxsys.serve.energy.sleep import Sleeper
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.hooks import InstanceView, Router
from jaxsys.serve.host_pages import Fetch
from jaxsys.serve.iterations import Completion, Iteration, Role
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.instance import SimInstance
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.traces import RequestTrace

MOST_PAGES = 1 << 32
"""Of a prompt: apart by so many lie the identities of two sessions' pages."""


class Simulator:
    """One replay: build it, `run()` it once."""

    def __init__(
        self,
        trace: RequestTrace,
        config: ClusterConfig,
        *,
        make_policy: Callable[[Role], ClockPolicy],
        clocks_mhz: Sequence[int] | None = None,
        prefill_router: Router,
        decode_router: Router,
        sample_every_s: float | None = None,
        shares: bool = False,
        slo: SharedSlo | None = None,
    ) -> None:
        """
        Args:
            make_policy: makes the clock policy of one instance.
            clocks_mhz: the clocks that policies choose among; the GPU's control clocks where None.
            sample_every_s: record power, batch and clock over time at this interval.
            shares: whether each request is given its share of the energy (`timing.energy_j`).
            slo: of policies and routers, which is told how late first tokens follow their prompts.
        """
        self._slo = slo
        self.trace = trace
        self.config = config
        self.clocks_mhz = tuple(clocks_mhz or config.gpu.spec.control_mhz)
        self.clock = VirtualClock()
        self.page_bytes = config.gpu.shape.kv_bytes(config.page_size)
        self.shared_j = 0.0
        """Energy of the requests that ended, where shares are given."""

        def some(role: Role, count: int) -> list[SimInstance]:
            return [
                SimInstance(f"{role}{i}", role, self, make_policy(role), shares=shares)
                for i in range(count)
            ]

        self.prefill = some(
            "prefill" if config.decode_instances else "both", config.prefill_instances
        )
        self.decode = some("decode", config.decode_instances)
        self.instances = [*self.prefill, *self.decode]
        self._roles: dict[str, list[SimInstance]] = {self.prefill[0].role: self.prefill}
        if self.decode:
            self._roles["decode"] = self.decode
        for instance in self.instances:
            instance.turns.start()
            instance.governor.start(0.0)
            # What a policy begins with has settled before the trace begins.
            instance.clocks.set_latency_s = 0.0
            asked = instance.clocks.asked_mhz()
            if asked is not None:
                instance.clocks.reset()
                instance.clocks.set_clock(asked)
            instance.clocks.actual_mhz()
            instance.clocks.set_latency_s = config.set_latency_s
        self._prefill_router = prefill_router
        self._decode_router = decode_router
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._sequence = 0
        self._left = 0
        self._next_arrival = 0
        self._kv_bytes = config.gpu.shape.kv_bytes
        self._ttft = array("d")
        self._tpot = array("d")
        self._itl = array("d")
        self._itl_weight = array("d")
        self._output_tokens = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._end_s = 0.0
        self._sample_every_s = sample_every_s
        self._series: dict[str, list[float]] = defaultdict(list)
        self._sampled_j = 0.0
        self._first_token_steps = config.gpu.engine.first_token_steps if self.decode else None
        self._sleepers: list[tuple[Sleeper, list[SimInstance]]] = []
        if config.sleep is not None:
            self._sleepers = [(Sleeper(config.sleep), group) for group in self._roles.values()]
        self._asleep = 0
        self._asleep_s = 0.0
        self._wakes = 0

    def run(self) -> ReplayResult:
        """Replays the whole trace and waits for its last token."""
        began_s = time.perf_counter()
        trace, config = self.trace, self.config
        capacity = config.gpu.kv_capacity_tokens
        longest = int(np.max(trace.prompt_tokens + trace.output_tokens))
        if longest > capacity:
            raise UsageError(
                f"trace {trace.name} has a request of {longest} tokens; {capacity} fit beside "
                f"{config.gpu.shape.name} on {config.gpu.gpus} x {config.gpu.spec.name}"
            )
        self._left = len(trace)
        self._arrivals = trace.arrival_s.tolist()
        self._order, self._following = _turns_of(trace)
        self._prompts = trace.prompt_tokens.tolist()
        self._outputs = trace.output_tokens.tolist()
        self._push(self._arrivals[self._order[0]], self._arrive)
        for instance in self.instances:  # those that never get work must fall idle too
            self._await_idle(instance, 0.0)
        if self._sample_every_s:
            self._push(self._sample_every_s, self._sample)
        if config.sleep is not None:
            self._push(config.sleep.look_s, self._look)
        events, clock = self._events, self.clock
        while events and self._left:
            now_s, _, action, arguments = heapq.heappop(events)
            clock.advance_to(now_s)
            action(now_s, *arguments)
        self._end_s = clock.now_s()
        for instance in self.instances:
            instance.executor.idle_until(self._end_s)
        return self._result(time.perf_counter() - began_s)

    # --- events -------------------------------------------------------------------------------

    def _push(self, at_s: float, action: Callable[..., None], *arguments: object) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, action, arguments))

    def _arrive(self, now_s: float) -> None:
        index = self._order[self._next_arrival]
        self._next_arrival += 1
        if self._next_arrival < len(self._order):
            self._push(self._arrivals[self._order[self._next_arrival]], self._arrive)
        self._ask(now_s, index)

    def _ask(self, now_s: float, index: int) -> None:
        """A request of the trace arrives."""
        request = Request(
            index,
            sampling=SamplingParameters(max_tokens=self._outputs[index]),
            arrival_s=now_s,
            prompt_length=self._prompts[index],
            block_hashes=self._blocks(index),
        )
        instance = self._route(self._prefill_router, self.prefill, request)
        instance.scheduler.add(request)
        instance.in_flight += 1
        request.note = instance
        self._turn(instance, now_s)

    def _blocks(self, index: int) -> list[int] | None:
        """Identities of a prompt's full pages: those of its session's earlier prompts, and on."""
        if self.trace.sessions is None:
            return None
        size = self.config.page_size
        count = self._prompts[index] // size
        common = min(count, self.trace.common_tokens // size)
        first = int(self.trace.sessions[index]) * MOST_PAGES
        # What all sessions begin with is nobody's.
        return [*range(-MOST_PAGES, common - MOST_PAGES), *range(first + common, first + count)]

    def _route(self, router: Router, instances: list[SimInstance], request: Request) -> SimInstance:
        if self._asleep:
            instances = [one for one in instances if not one.asleep]
        views: Sequence[InstanceView] = instances
        return instances[router.choose(views, request)]

    def _turn(self, instance: SimInstance, now_s: float) -> None:
        """The loop of an instance goes on, unless it waits for something."""
        if instance.waits:
            return
        turns = instance.turns
        while True:
            if turns.turn() is not None:
                instance.waits = True  # for the device
                return
            if turns.iteration is not None:  # and another may be planned behind it
                # There are no tokens to hand on first.
                self._plan_at(instance, self._began_s(instance))
                return
            if turns.stuck:
                instance.held_up_s = 0.0
                self._await_idle(instance, now_s)
                return

    def _began_s(self, instance: SimInstance) -> float:
        return max(instance.executor.began_s, self.clock.now_s(), instance.host_until_s)

    def _plan_at(self, instance: SimInstance, at_s: float) -> None:
        instance.waits = True  # for its host
        self._push(at_s, self._plan, instance, instance.plans)

    def _plan(self, now_s: float, instance: SimInstance, plans: int) -> None:
        if plans == instance.plans:
            instance.waits = False
            self._turn(instance, now_s)

    def dispatched(self, instance: SimInstance, iteration: Iteration) -> None:
        """An iteration is planned and its clock set."""
        now_s = self.clock.now_s()
        self._keep_host(instance, iteration, now_s)
        if instance.iteration is None:
            self._begin(instance, iteration, self._device_from_s(instance, iteration, now_s))
            return
        instance.queued = iteration
        instance.queued_s = now_s
        if instance.clocks.next_change() is not None:  # it comes while another runs
            self._replan(instance, instance.executor.reclock(now_s))

    def _keep_host(self, instance: SimInstance, iteration: Iteration, now_s: float) -> None:
        """The host is at work until it has dispatched an iteration."""
        times = self.config.dispatch_times
        if times is not None and self.config.plan_ahead:
            took_s = times.iteration_s(iteration, instance.dispatched, instance.host_random)
            instance.host_until_s = now_s + took_s
            instance.dispatched = iteration

    def _device_from_s(self, instance: SimInstance, iteration: Iteration, now_s: float) -> float:
        """When the device may begin an iteration that was planned at `now_s`: a prompt's first
        piece does not wait until all is dispatched."""
        if not self.config.plan_ahead:
            return now_s
        if self.config.dispatch_times is None or iteration.prefills:
            return now_s + self.config.dispatch_s
        return instance.host_until_s

    def _begin(self, instance: SimInstance, iteration: Iteration, now_s: float) -> None:
        """The device begins an iteration."""
        held_up_s, instance.held_up_s = instance.held_up_s, 0.0
        # Tokens of the iteration before may have come later than that.
        instance.started_s = max(now_s, self.clock.now_s())
        now_s += held_up_s
        steps = iteration.steps
        load, after = self._loads(iteration)
        end_s = instance.executor.begin(load, steps, now_s, after=after)
        instance.iteration = iteration
        instance.version += 1
        self._push(max(end_s, self.clock.now_s()), self._end, instance, instance.version)
        alarm_s = now_s + instance.governor.patience_s(steps)
        if alarm_s < end_s:
            self._push(alarm_s, self._overrun, instance, instance.version)

    def _loads(self, iteration: Iteration) -> tuple[Load, tuple[Load, ...]]:
        """The iteration's work: one step, and those behind it where pieces are steps apart."""
        batch, buckets = len(iteration.decodes), self.config.piece_buckets
        # The steps' mean, so that many steps as one take their exact time.
        kv_tokens = iteration.kv_tokens + batch * (iteration.steps - 1) // 2
        bucket = iteration.bucket if self.config.decode_buckets else 0
        if not buckets:
            cached = sum(piece.start for piece in iteration.prefills)
            prompts = len(iteration.prefills)
            return Load(iteration.prefill_tokens, prompts, cached, batch, kv_tokens, bucket), ()
        loads = [
            Load(buckets[bisect.bisect_left(buckets, piece.length)], 1, piece.start)
            for piece in iteration.prefills
        ]
        if batch:
            loads.append(Load(batch=batch, kv_tokens=kv_tokens, bucket=bucket))
        return loads[0], tuple(loads[1:])

    def _await_idle(self, instance: SimInstance, now_s: float) -> None:
        instance.version += 1
        wait_s = instance.governor.idle_after_s
        if wait_s is not None:
            self._push(now_s + wait_s, self._idle, instance, instance.version, now_s)

    def _overrun(self, now_s: float, instance: SimInstance, version: int) -> None:
        if version != instance.version or instance.iteration is None:
            return
        instance.governor.late(now_s)
        self._replan(instance, instance.executor.reclock(now_s))

    def _replan(self, instance: SimInstance, end_s: float) -> None:
        instance.version += 1
        self._push(end_s, self._end, instance, instance.version)

    def _idle(self, now_s: float, instance: SimInstance, version: int, since_s: float) -> None:
        if version == instance.version and instance.iteration is None:
            instance.governor.idle(now_s, since_s)

    def _end(self, now_s: float, instance: SimInstance, version: int) -> None:
        if version != instance.version or instance.iteration is None:
            return
        if now_s < instance.host_until_s:  # the host hears of it when it has dispatched the next
            self._push(instance.host_until_s, self._end, instance, version)
            return
        instance.iteration = None
        ended_s = instance.executor.end_s
        instance.executor.finish()
        instance.turns.end(None)
        if instance.scheduler.incoming:
            self.receive(instance)
        instance.waits = False
        instance.plans += 1
        queued, instance.queued = instance.queued, None
        if queued is None:
            self._turn(instance, now_s)
        else:
            from_s = now_s
            if self.config.dispatch_times is not None:
                ready_s = self._device_from_s(instance, queued, instance.queued_s)
                from_s = max(ended_s, ready_s)
            self._begin(instance, queued, from_s)
            # The host hands tokens on before it plans anew.
            self._plan_at(instance, now_s + self.config.plan_after_s)

    def count_gaps(self, instance: SimInstance, iteration: Iteration, now_s: float) -> None:
        """Books the time between tokens: the step's own, and for newcomers their wait too."""
        steps, batch = iteration.steps, len(iteration.decodes)
        step_s = (now_s - instance.started_s) / steps
        # Who came while this ran is in a later iteration.
        decoding = set(map(id, iteration.decodes))
        newcomers = [one for one in instance.newcomers if id(one) in decoding]
        instance.newcomers = [one for one in instance.newcomers if id(one) not in decoding]
        fresh = len(newcomers)
        if batch * steps > fresh:
            self._itl.append(step_s)
            self._itl_weight.append(batch * steps - fresh)
        for request in newcomers:
            last_s = request.timing.last_token_s
            waited_s = instance.started_s - last_s if last_s is not None else 0.0
            if self._first_token_steps is not None:
                first_s = instance.started_s + self._first_token_steps * step_s
                self._ttft.append(first_s - request.timing.arrival_s)
                if last_s is not None and self._slo is not None:
                    self._slo.first_token_came(first_s - last_s)
                waited_s = 0.0
            self._itl.append(waited_s + step_s)
            self._itl_weight.append(1.0)

    def completed(
        self, instance: SimInstance, iteration: Iteration, completion: Completion, now_s: float
    ) -> None:
        """Books first tokens, and requests that ended."""
        for piece in iteration.prefills:
            timing = piece.request.timing
            if piece.last and timing.first_token_s == now_s:
                self._prompt_tokens += piece.request.prompt_length
                self._cached_tokens += piece.request.cached_tokens
            if self._first_token_steps is not None and piece.request.sampling.max_tokens > 1:
                continue  # it leaves the decode instance
            # A preempted request computed again has its first token already.
            if instance.role != "decode" and timing.first_token_s == now_s:
                self._ttft.append(now_s - timing.arrival_s)
        if instance.role == "decode":
            instance.kv_tokens += len(iteration.decodes) * iteration.steps
        for request in completion.finished:
            self._finished(instance, request)

    def _finished(self, instance: SimInstance, request: Request) -> None:
        instance.in_flight -= 1
        self._left -= 1
        following = self._following.get(int(request.request_id))
        if following is not None and self.trace.gap_s is not None:
            gap_s = float(self.trace.gap_s[following])
            self._push(self.clock.now_s() + gap_s, self._ask, following)
        self._output_tokens += request.generated
        timing = request.timing
        self.shared_j += timing.energy_j or 0.0
        if instance.role == "decode":
            instance.kv_tokens -= request.prompt_length + request.generated
        if (
            request.generated > 1
            and timing.last_token_s is not None
            and timing.first_token_s is not None
        ):
            self._tpot.append(
                (timing.last_token_s - timing.first_token_s) / (request.generated - 1)
            )

    def hand_over(self, instance: SimInstance, request: Request) -> None:
        """A prompt is computed: its pages go to a decode instance."""
        twin = request.handed_over()
        twin.note = (instance, request)
        target = self._route(self._decode_router, self.decode, twin)
        target.scheduler.add_incoming(twin)
        target.in_flight += 1
        target.kv_tokens += twin.prompt_length + twin.generated
        self.receive(target)
        if instance.queued is None:
            instance.held_up_s += self.config.hand_out_s

    def fetch(self, instance: SimInstance, fetch: Fetch) -> None:
        """Pages come back from the host's memory, one request's after the other's."""
        config = self.config
        moved = self._kv_bytes(len(fetch.pages) * config.page_size)
        begins_s = max(self.clock.now_s(), instance.host_free_s)
        instance.host_free_s = begins_s + moved / config.host_bytes_per_s
        self._push(instance.host_free_s, self._fetched, instance, fetch.request)

    def _fetched(self, now_s: float, instance: SimInstance, request: Request) -> None:
        instance.scheduler.start_fetched(request)
        self._turn(instance, now_s)

    def receive(self, instance: SimInstance) -> None:
        """Reserves pages for who fits; their contents arrive a transfer later."""
        now_s = self.clock.now_s()
        for request in instance.scheduler.reserve_incoming():
            transfer_s = self.config.hand_over_s + (
                self._kv_bytes(request.prompt_length) / self.config.link_bytes_per_s
            )
            self._push(now_s + transfer_s, self._received, instance, request)

    def _received(self, now_s: float, instance: SimInstance, twin: Request) -> None:
        source, original = twin.note  # type: ignore[misc]
        source.scheduler.release_handed_over(original)
        source.in_flight -= 1
        self._turn(source, now_s)  # pages came free
        instance.scheduler.start_received(twin)
        instance.newcomers.append(twin)
        iteration = instance.iteration
        if iteration is None:
            self._turn(instance, now_s)
            return
        instance.held_up_s += self.config.landing_s
        if iteration.steps > 1:
            done = instance.executor.steps_done(now_s)
            steps = max(1, int(done) + 1)
            if steps < iteration.steps:
                shorter = instance.scheduler.shorten(iteration, steps)
                instance.iteration = instance.turns.in_flight[0].iteration = shorter
                self._replan(instance, instance.executor.cut_after(steps, now_s))

    def _look(self, now_s: float) -> None:
        """Puts instances to sleep and wakes others."""
        sleep = self.config.sleep
        assert sleep is not None
        gpu = self.config.gpu
        for sleeper, group in self._sleepers:
            change = sleeper.look(group, now_s)
            for one in (group[index] for index in change.to_sleep):
                one.asleep = True
                self._asleep += 1
                one.scheduler.allocator.forget()  # kept prefixes go with the weights
                one.executor.rest(gpu.asleep_power_w, now_s)
                self._asleep_s -= now_s
            for one in (group[index] for index in change.to_wake):
                one.waking = True
                self._wakes += 1
                # Loading and starting keep the clock up.
                one.executor.rest(gpu.idle_power_w(gpu.spec.max_mhz), now_s)
                self._asleep_s += now_s
                self._push(now_s + sleep.wake_s, self._woken, one)
        self._push(now_s + sleep.look_s, self._look)

    def _woken(self, now_s: float, instance: SimInstance) -> None:
        instance.executor.rest(None, now_s)
        instance.asleep = instance.waking = False
        self._asleep -= 1
        self._await_idle(instance, now_s)

    def _sample(self, now_s: float) -> None:
        every_s = self._sample_every_s or 1.0
        total_j = 0.0
        for instance in self.instances:
            if instance.iteration is None:
                instance.executor.idle_until(now_s)
            total_j += instance.clocks.energy_j()
        series = self._series
        series["time_s"].append(now_s)
        series["power_w"].append((total_j - self._sampled_j) / every_s)
        self._sampled_j = total_j
        for role, group in self._roles.items():
            clocks = [instance.clocks.actual_mhz() for instance in group]
            series[f"{role}_clock_mhz"].append(sum(clocks) / len(clocks))
        series["decode_batch"].append(
            sum(instance.batch for instance in self.decode or self.prefill)
        )
        self._push(now_s + every_s, self._sample)

    def _result(self, wall_s: float) -> ReplayResult:
        roles = self._roles
        clock_seconds: dict[str, dict[int, float]] = {}
        for role, group in roles.items():
            merged: defaultdict[int, float] = defaultdict(float)
            for instance in group:
                for mhz, seconds in instance.executor.seconds_at_mhz.items():
                    merged[mhz] += seconds
            clock_seconds[role] = dict(sorted(merged.items()))
        executors = [instance.executor for instance in self.instances]
        sleeping = sum(one.asleep and not one.waking for one in self.instances)
        records = [instance.governor.record for instance in self.instances]
        return ReplayResult(
            requests=len(self.trace),
            output_tokens=self._output_tokens,
            duration_s=self._end_s,
            energy_j=sum(e.busy_j + e.idle_j for e in executors),
            energy_j_by_role={
                role: sum(i.executor.busy_j + i.executor.idle_j for i in group)
                for role, group in roles.items()
            },
            idle_j=sum(e.idle_j for e in executors),
            busy_s_by_role={
                role: sum(i.executor.busy_s for i in group) for role, group in roles.items()
            },
            ttft_s=np.array(self._ttft),
            tpot_s=np.array(self._tpot),
            itl_s=np.array(self._itl),
            itl_weight=np.array(self._itl_weight),
            clock_seconds=clock_seconds,
            decisions=sum(r.decisions for r in records),
            infeasible=sum(r.infeasible for r in records),
            overruns=sum(r.overruns + r.alarms for r in records),
            clock_changes=sum(instance.clocks.changes for instance in self.instances),
            preemptions=sum(instance.scheduler.preemptions for instance in self.instances),
            asleep_s=self._asleep_s + sleeping * self._end_s,
            wakes=self._wakes,
            wall_s=wall_s,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            series=dict(self._series),
        )


def _turns_of(trace: RequestTrace) -> tuple[list[int], dict[int, int]]:
    """The requests that arrive by themselves, and whom each of the others follows."""
    if trace.gap_s is None or trace.sessions is None:
        return list(range(len(trace))), {}
    order, following, latest = [], {}, {}
    for index, session in enumerate(trace.sessions.tolist()):
        if session in latest:
            following[latest[session]] = index
        else:
            order.append(index)
        latest[session] = index
    return order, following
