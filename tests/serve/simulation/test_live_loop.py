"""The simulator's engine against the live loop: the same requests through a real instance.

The executor's device is a clock: what is dispatched ends as long after the work before as the
simulated GPU takes, and `collect` sleeps until then.
"""

import bisect
import time
from typing import Any

import numpy as np
import pytest

from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.gpu_model import Load, Outcome, SimulatedGpu, simulated_gpu
from jaxsys.serve.hooks import FewestRequestsRouter, NoGovernor
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.simulator import Simulator

PIECES = (32, 128, 512, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class SlowGpu(SimulatedGpu):
    """Steps of tens of milliseconds, beside which the host's own time is nothing."""

    def run(self, load: Load, clock_mhz: float) -> Outcome:
        time_s = 0.0
        if load.prefill_requests:
            time_s += 0.01 + 1e-4 * load.prefill_tokens
        if load.batch:
            time_s += 0.02 + 0.001 * load.bucket
        return Outcome(time_s, 300.0, clock_mhz, False)


class SleepingExecutor:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu
        self._free_s = 0.0

    def dispatch(self, iteration):
        loads = [Load(PIECES[bisect.bisect_left(PIECES, p.length)], 1) for p in iteration.prefills]
        if iteration.decodes:
            loads.append(Load(batch=len(iteration.decodes), bucket=iteration.bucket))
        work_s = sum(self.gpu.run(load, 0).time_s for load in loads)
        self._free_s = max(self._free_s, time.monotonic()) + work_s
        return self._free_s, len(iteration.sampling)

    def collect(self, handle):
        ends_s, count = handle
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return Sampled([1] * count, None)

    def release(self):
        return []

    def rebuild(self):
        raise AssertionError("no device, no fault")


@pytest.mark.slow
def test_the_live_loop_takes_what_the_simulator_says():
    known = simulated_gpu("h100", "llama-3-8b")
    gpu = SlowGpu(known.spec, known.shape)
    trace = synthetic_trace(rate_per_s=1.6, duration_s=20, seed=3, prompt_mean=900,
                            prompt_sigma=0.7, output_mean=60, most_tokens=3000)  # fmt: skip
    sizes: Any = {"max_batch": 64, "max_prefill_tokens": 2048, "page_size": 64}
    scheduler = Scheduler(
        SchedulerConfig(page_count=1500, max_length=8192, decode_buckets=BATCHES,
                        prefix_caching=False, **sizes)
    )  # fmt: skip
    seen_s: dict[int, list[float]] = {}

    def sink(events):
        for event in events:
            seen_s.setdefault(event.request.request_id, []).append(event.time_s)

    instance = Instance("both", scheduler, SleepingExecutor(gpu), governor=NoGovernor(),
                        clock=WallClock(), sink=sink)  # fmt: skip
    instance.start()
    began_s = time.monotonic()
    rows = zip(
        trace.arrival_s, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
    )
    for number, (arrival_s, prompt, output) in enumerate(rows):
        time.sleep(max(0.0, began_s + arrival_s - time.monotonic()))
        sampling = SamplingParameters(max_tokens=output, temperature=0.0)
        instance.submit(Request(number, sampling=sampling, arrival_s=began_s + arrival_s,
                                prompt_tokens=[number % 97] * prompt))  # fmt: skip
    while instance.requests and time.monotonic() - began_s < 60:
        time.sleep(0.05)
    assert instance.stop(5.0)
    assert sum(map(len, seen_s.values())) == trace.output_tokens.sum()
    simulated = Simulator(
        trace,
        ClusterConfig(gpu=gpu, prefill_instances=1, decode_instances=0, piece_buckets=PIECES,
                      decode_buckets=BATCHES, plan_ahead=True, **sizes),
        make_policy=lambda role: FixedClock(gpu.spec.max_mhz),
        prefill_router=FewestRequestsRouter(),
        decode_router=FewestRequestsRouter(),
    ).run()  # fmt: skip
    ttft_s = [seen_s[k][0] - began_s - trace.arrival_s[k] for k in range(len(trace))]
    gaps_s = np.concatenate([np.diff(times_s) for times_s in seen_s.values()])
    # Sleeping is late by a millisecond or two where others use the processor.
    assert np.mean(ttft_s) == pytest.approx(simulated.ttft_s.mean(), rel=0.05)
    assert np.percentile(ttft_s, 90) == pytest.approx(np.percentile(simulated.ttft_s, 90), rel=0.05)
    assert np.median(gaps_s) == pytest.approx(simulated.itl_percentile(50), rel=0.05)
    assert np.percentile(gaps_s, 99) == pytest.approx(simulated.itl_percentile(99), rel=0.05)
    mean_s = np.average(simulated.itl_s, weights=simulated.itl_weight)
    assert gaps_s.mean() == pytest.approx(mean_s, rel=0.05)
