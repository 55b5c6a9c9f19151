"""The sweep of an engine, on a device that sleeps behind a host that takes its time."""

import time
import types
from typing import Any

import numpy as np
import pytest

from jaxsys.serve.energy.engine_sweep import EngineSweep
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.scheduler import Scheduler

HOST_S, PIECE_S = 0.02, 0.06


class SleepingExecutor:
    """With `capped_s`, a device slowed by half once it has been busy for longer than that."""

    def __init__(self, capped_s: float = float("inf")) -> None:
        self.capped_s = capped_s
        self.free_s = self.busy_from_s = 0.0

    def dispatch(self, iteration):
        time.sleep(HOST_S)
        now_s = time.perf_counter()
        if now_s > self.free_s + 0.01:
            self.free_s = self.busy_from_s = now_s
        slow = 1.5 if self.free_s - self.busy_from_s > self.capped_s else 1.0
        self.free_s += slow * PIECE_S * len(iteration.prefills)
        return self.free_s, len(iteration.sampling)

    def collect(self, handle):
        time.sleep(max(0.0, handle[0] - time.perf_counter()))
        return Sampled([1] * handle[1], None)


def an_instance(executor: SleepingExecutor) -> Any:
    config = SchedulerConfig(page_count=60, max_batch=4, decode_buckets=(4,), max_length=512,
                             max_prefill_tokens=128, prefix_caching=False)  # fmt: skip
    return types.SimpleNamespace(scheduler=Scheduler(config), executor=executor)


def test_prompts_are_timed_without_what_hides_behind_others():
    instance = an_instance(SleepingExecutor())
    sweep = EngineSweep(instance, 100)
    short, pair = Load(64, 1), Load(64, 2)
    later = Load(prefill_tokens=64, prefill_requests=1, cached_tokens=128)
    for load, least_s in ((short, PIECE_S), (pair, 2 * PIECE_S), (later, PIECE_S)):
        # Late sleepers only lengthen it; the host's time on top would be a third.
        assert sweep.sample(load, 0).time_s == pytest.approx(least_s, rel=0.2)
        assert not instance.scheduler.requests
    assert sweep.alone_s(short) == pytest.approx(HOST_S + PIECE_S, rel=0.2)


def test_prompts_are_timed_one_by_one_where_many_in_a_row_are_slowed():
    instance = an_instance(SleepingExecutor(capped_s=2.5 * PIECE_S))
    sweep = EngineSweep(
        instance, 100, least_s=6 * PIECE_S, energy_j=lambda start_s, end_s: 100 * (end_s - start_s)
    )
    sample = sweep.sample(Load(64, 1), 0)
    assert sample.time_s == pytest.approx(PIECE_S, rel=0.2)
    # The energy of one is as it was measured, many in a row.
    assert sample.power_w is not None
    assert sample.power_w * sample.time_s == pytest.approx(100 * 1.5 * PIECE_S, rel=0.2)
    assert not instance.scheduler.requests


def test_a_sweep_notes_what_dispatching_takes():
    instance = an_instance(SleepingExecutor())
    sweep = EngineSweep(instance, 100)
    assert sweep.dispatch is None
    sweep.sample(Load(batch=1, kv_tokens=64, bucket=4), 0)
    times = sweep.dispatch
    assert times is not None
    for seconds in (times.alike, times.changed, times.piece):
        assert np.median(seconds) == pytest.approx(HOST_S, rel=0.2)
