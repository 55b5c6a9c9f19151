"""Cutting an iteration of many decode steps short keeps every count right."""

import pytest

from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler


def running(max_tokens: int = 20) -> tuple[Scheduler, list[Request]]:
    config = SchedulerConfig(
        page_count=64, page_size=4, max_batch=4, decode_buckets=(4,), prefix_caching=False
    )
    scheduler = Scheduler(config)
    requests = [
        Request(
            i, sampling=SamplingParameters(max_tokens=max_tokens), arrival_s=0.0, prompt_length=5
        )
        for i in range(3)
    ]
    for request in requests:
        scheduler.add(request)
    first = scheduler.next_iteration(0.0)
    assert first is not None
    scheduler.complete(first, 1.0)
    return scheduler, requests


def test_a_cut_iteration_yields_only_the_steps_left():
    scheduler, requests = running()
    long = scheduler.next_iteration(1.0, max_steps=8)
    assert long is not None and long.steps == 8
    short = scheduler.shorten(long, 3)
    scheduler.check()
    scheduler.complete(short, 2.0)
    scheduler.check()
    assert [request.generated for request in requests] == [4, 4, 4]
    now_s = 2.0
    while (iteration := scheduler.next_iteration(now_s, max_steps=8)) is not None:
        now_s += 1.0
        scheduler.complete(iteration, now_s)
        scheduler.check()
    assert [request.generated for request in requests] == [20, 20, 20]


def test_a_request_that_ended_meanwhile_is_left_alone():
    scheduler, requests = running()
    long = scheduler.next_iteration(1.0, max_steps=8)
    assert long is not None
    scheduler.abort(requests[0], 1.5)
    scheduler.complete(scheduler.shorten(long, 2), 2.0)
    scheduler.check()
    assert [request.generated for request in requests] == [1, 3, 3]


def test_only_the_newest_iteration_can_be_cut_and_only_shorter():
    scheduler, _ = running()
    long = scheduler.next_iteration(1.0, max_steps=4)
    assert long is not None
    for steps in (0, 5):
        with pytest.raises(ValueError, match="from 1 to 4"):
            scheduler.shorten(long, steps)
    scheduler.complete(long, 2.0)
    with pytest.raises(ValueError, match="not the newest"):
        scheduler.shorten(long, 2)
