"""The sweep of an engine, on a device that sleeps behind a host that takes its time."""

import time
import types
from typing import Any

import pytest

from jaxsys.serve.energy.engine_sweep import EngineSweep
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.executor import Outcome
from jaxsys.serve.scheduler import Scheduler, SchedulerConfig

HOST_S, PIECE_S = 0.02, 0.06


class SleepingExecutor:
    free_s = 0.0

    def dispatch(self, iteration):
        time.sleep(HOST_S)
        self.free_s = max(self.free_s, time.perf_counter()) + PIECE_S * len(iteration.prefills)
        return self.free_s, len(iteration.sampling)

    def collect(self, handle):
        time.sleep(max(0.0, handle[0] - time.perf_counter()))
        return Outcome([1] * handle[1], None)


def test_prompts_are_timed_without_what_hides_behind_others():
    config = SchedulerConfig(page_count=60, max_batch=4, decode_buckets=(4,), max_length=512,
                             max_prefill_tokens=128, prefix_caching=False)  # fmt: skip
    instance: Any = types.SimpleNamespace(scheduler=Scheduler(config), executor=SleepingExecutor())
    sweep = EngineSweep(instance, 100)
    short, pair = Load(64, 1), Load(64, 2)
    later = Load(prefill_tokens=64, prefill_requests=1, cached_tokens=128)
    for load, least_s in ((short, PIECE_S), (pair, 2 * PIECE_S), (later, PIECE_S)):
        # Late sleepers only lengthen it; the host's time on top would be a third.
        assert sweep.sample(load, 0).time_s == pytest.approx(least_s, rel=0.2)
        assert not instance.scheduler.requests
    assert sweep.alone_s(short) == pytest.approx(HOST_S + PIECE_S, rel=0.2)
