"""Single iterations of a real instance, outside its loop but run as its loop would run them.

Iterations are dispatched one ahead, so that host work which hides behind the device is not counted
as latency; of a prompt the last piece is timed, once the pieces before it are done. Power is the
energy counter's rise over as many repetitions as it takes the counter to say something. So many
long prompts in a row meet the GPU's power cap, which slows them; those of a server come one by one.
Their time is therefore that of single prompts after a rest, and their power is such that time and
power give the energy measured.
"""

import dataclasses
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from jaxsys.errors import RunError
from jaxsys.serve.energy.dispatch_times import DispatchTimes, Kind, kind_of_step
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.profile import Sample
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import Iteration
from jaxsys.serve.requests import Request, SamplingParameters

MOST_STEPS = 256
"""Decode steps of one measurement: each lengthens every sequence by a token."""

WARM_UP = 4
"""Steps before a measurement counts: the first may still load something."""


REST_S = 0.1
"""Pause before a prompt that is timed by itself, in which the power that is capped falls."""


def steps_needed(repeats: int) -> int:
    """Tokens that a sequence must have room for beside its context, to be timed."""
    return WARM_UP + repeats + 6


class EngineSweep:
    """Times iterations of an instance whose loop does not run."""

    def __init__(
        self,
        instance: Instance,
        vocabulary: int,
        *,
        repeats: int = 3,
        least_s: float = 0.0,
        energy_j: Callable[[float, float], float | None] = lambda start_s, end_s: None,
    ) -> None:
        """
        Args:
            instance: of role "both", not started.
            repeats: least number of timings of a load; their median is kept.
            least_s: least time a load is repeated for, so that its energy can be told.
            energy_j: joules between two `time.perf_counter` times, None where unknown.
        """
        self.scheduler = instance.scheduler
        self.executor = instance.executor
        self.vocabulary = vocabulary
        self.repeats = repeats
        self.least_s = least_s
        self.energy_j = energy_j
        self._count = 0
        self._dispatch_s: defaultdict[Kind, list[float]] = defaultdict(list)
        self._before: Iteration | None = None

    @property
    def dispatch(self) -> DispatchTimes | None:
        """What planning and dispatching took so far; None where some kind has not come yet."""
        return DispatchTimes.of(self._dispatch_s)

    def sample(self, load: Load, clock_mhz: int) -> Sample:
        """Median seconds and mean watts of an iteration of this load.

        The sample's load holds the KV tokens that really were attended to.
        """
        if load.prefill_tokens:
            return self._prompts(load, clock_mhz)
        return self._decodes(load, clock_mhz)

    def alone_s(self, load: Load) -> float:
        """Median seconds of prompts with nothing in flight before them, from plan to token."""
        times_s, _ = self._time_prompts(load, depth=1)
        return statistics.median(times_s)

    def _prompts(self, load: Load, clock_mhz: int) -> Sample:
        config = self.scheduler.config
        length = (load.prefill_tokens + load.cached_tokens) // load.prefill_requests
        pages = load.prefill_requests * (length // config.page_size + 1)
        # Those in flight hold their pages while the next are planned.
        fits = 2 * load.prefill_requests <= config.max_batch and 2 * pages <= config.page_count
        times_s, power_w = self._time_prompts(load, depth=2 if fits else 1)
        time_s = statistics.median(times_s)
        if self.least_s and fits:
            in_a_row_s, time_s = time_s, self._single_s(load)
            if power_w is not None:
                power_w *= in_a_row_s / time_s
        # With earlier pieces in between, the energy is not the last one's alone.
        if load.cached_tokens:
            power_w = None
        return Sample(load, clock_mhz, time_s, power_w)

    def _single_s(self, load: Load) -> float:
        """Median seconds of iterations that end prompts which come one by one: each after a rest,
        behind one short prompt, while which runs the host gets it ready."""
        count = load.prefill_requests
        length = (load.prefill_tokens + load.cached_tokens) // count
        times_s: list[float] = []
        for _ in range(self.repeats):
            time.sleep(REST_S)
            self._add(1, most_tokens=1)
            in_flight = deque([self._dispatch(0.0, note=True)])
            for _ in range(count):
                self._add(length, most_tokens=1)
            last_s = ended_s = 0.0
            while in_flight:
                if self.scheduler.waiting or self.scheduler.prefilling:
                    in_flight.append(self._dispatch(ended_s))
                done_s = self._collect(in_flight)
                last_s, ended_s = done_s - ended_s, done_s
            times_s.append(last_s)
        return statistics.median(times_s)

    def _time_prompts(self, load: Load, *, depth: int) -> tuple[list[float], float | None]:
        """Seconds of the iterations that end prompts, `depth` dispatched at once; and watts."""
        count = load.prefill_requests
        length = (load.prefill_tokens + load.cached_tokens) // count
        times_s: list[float] = []
        in_flight: deque = deque()
        ends: deque[bool] = deque()
        began_s = ended_s = time.perf_counter()
        # The first still has its host work to itself.
        while len(times_s) <= self.repeats or ended_s - began_s < self.least_s:
            if not (self.scheduler.waiting or self.scheduler.prefilling):
                for _ in range(count):
                    self._add(length, most_tokens=1)
            if not in_flight:
                ended_s = time.perf_counter()
            in_flight.append(self._dispatch(ended_s))
            ends.append(not (self.scheduler.waiting or self.scheduler.prefilling))
            if len(in_flight) < depth:
                continue
            done_s = self._collect(in_flight)
            if ends.popleft():
                times_s.append(done_s - ended_s)
                if len(times_s) == 1:
                    began_s = done_s
            ended_s = done_s
        power_w = self._power_w(began_s, ended_s)
        while in_flight or self.scheduler.prefilling:
            if not in_flight:
                in_flight.append(self._dispatch(ended_s))
            self._collect(in_flight)
        return times_s[1:], power_w

    def _decodes(self, load: Load, clock_mhz: int) -> Sample:
        context = max(1, load.kv_tokens // load.batch)
        room = self.scheduler.config.max_length - context
        requests = [self._add(context, most_tokens=room) for _ in range(load.batch)]
        while self.scheduler.waiting or self.scheduler.prefilling:
            self._collect(deque([self._dispatch(0.0, note=True)]))
        if len(self.scheduler.running) != load.batch:
            raise RunError(f"{load} does not fit: {len(self.scheduler.running)} sequences run")
        in_flight: deque = deque()
        times_s: list[float] = []
        kv_tokens: list[int] = []
        began_s = ended_s = time.perf_counter()
        # Those that came first have decoded since.
        most = min(MOST_STEPS, room - max(r.generated for r in requests) - 2)
        for step in range(most):
            planned = self._plan(ended_s, note=True)
            if planned is None:
                break
            iteration = planned[0]
            in_flight.append(planned)
            if len(in_flight) < 2:
                continue
            done_s = self._collect(in_flight)
            if step <= WARM_UP:
                began_s = done_s
            else:
                times_s.append(done_s - ended_s)
                kv_tokens.append(iteration.kv_tokens)
            ended_s = done_s
            if len(times_s) >= self.repeats and ended_s - began_s >= self.least_s:
                break
        while in_flight:
            self._collect(in_flight)
        for request in requests:
            self.scheduler.abort(request, ended_s)
        if not times_s:
            raise RunError(f"{load} leaves no room to decode; lengthen max_length={room + context}")
        real = dataclasses.replace(load, kv_tokens=round(statistics.mean(kv_tokens)))
        power_w = self._power_w(began_s, ended_s)
        return Sample(real, clock_mhz, statistics.median(times_s), power_w)

    def _power_w(self, start_s: float, end_s: float) -> float | None:
        energy_j = self.energy_j(start_s, end_s) if end_s - start_s >= 0.3 else None
        return None if energy_j is None else energy_j / (end_s - start_s)

    def _add(self, length: int, *, most_tokens: int) -> Request:
        self._count += 1
        request = Request(
            self._count,
            sampling=SamplingParameters(max_tokens=most_tokens, temperature=0.0),
            arrival_s=0.0,
            prompt_tokens=[(7 * k + self._count) % self.vocabulary for k in range(length)],
        )
        self.scheduler.add(request)
        return request

    def _dispatch(self, now_s: float, *, note: bool = False) -> tuple[Iteration, Any]:
        planned = self._plan(now_s, note=note)
        if planned is None:
            raise RunError("the sweep found nothing to compute; use smaller loads")
        return planned

    def _plan(self, now_s: float, *, note: bool) -> tuple[Iteration, Any] | None:
        """Plans and dispatches an iteration, if there is one.

        Args:
            note: whether what it takes is noted: where so much is in flight that the device's queue
                is full, it is the device that is waited for.
        """
        began_s = time.perf_counter()
        iteration = self.scheduler.next_iteration(now_s)
        if iteration is None:
            return None
        handle = self.executor.dispatch(iteration)
        took_s = time.perf_counter() - began_s
        if note and not iteration.decodes:
            count = len(iteration.prefills)
            self._dispatch_s["piece"] += [took_s / count] * count
        elif note and not iteration.prefills:
            self._dispatch_s[kind_of_step(iteration, self._before)].append(took_s)
        self._before = iteration
        return iteration, handle

    def _collect(self, in_flight: deque) -> float:
        """Completes the oldest iteration; returns when its tokens were known."""
        iteration, handle = in_flight.popleft()
        tokens = self.executor.collect(handle).tokens
        now_s = time.perf_counter()
        self.scheduler.complete(iteration, now_s, tokens)
        return now_s
