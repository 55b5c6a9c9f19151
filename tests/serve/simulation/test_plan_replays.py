"""Replays by several processes: what is begun beside what, and that answers are the same."""

import multiprocessing
from concurrent.futures import Future
from typing import Any

import pytest

from jaxsys.model.shapes import preset
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.simulation.deployments import Bounds, candidates, demand_of
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.plan_replays import Replays, replays
from jaxsys.serve.simulation.plan_search import search


class Pool:
    """Begins what it is given, and ends it when told."""

    def __init__(self) -> None:
        self.begun: dict[Any, Future] = {}

    def submit(self, work: Any, key: Any) -> Future:
        assert key not in self.begun  # nothing is computed twice
        self.begun[key] = future = Future()
        if key == self.asked:
            future.set_result(key.upper())
        return future

    asked: Any = None


def test_what_is_likely_runs_beside_what_is_asked_for():
    pool = Pool()
    two: Any = Replays(str.lower, pool, 2)  # type: ignore[arg-type]
    pool.asked = "a"
    assert two.get("a", ["b", "c", "d"]) == "A"
    # "a" has ended at once here, so that two more have begun.
    assert set(pool.begun) == {"a", "b", "c"}
    pool.begun["b"].set_result("B")
    pool.asked = None
    assert two.get("b", ["c", "d", "e"]) == "B"
    assert set(pool.begun) == {"a", "b", "c", "d"}  # "c" runs still, one more has room
    pool.begun["c"].set_result("C")
    assert two.get("c") == "C"


def test_one_process_answers_what_is_asked_and_no_more():
    asked = []
    with replays(lambda key: asked.append(key) or key, 1) as alone:
        assert alone.get("a", ["b", "c"]) == "a"
    assert asked == ["a"]


@pytest.mark.slow
def test_two_processes_find_what_one_does():
    config = preset("Llama-3-8B")
    trace = synthetic_trace(rate_per_s=25, duration_s=6, seed=1, prompt_mean=300)
    bounds = Bounds(config, demand_of(trace), Slo(reserve=0.02))
    known = list(candidates(bounds, {"h100": 4}, ways=(1, 2), weights=["bfloat16"], batches=[128]))
    one, two = (
        search(config, trace, bounds, known, target_pct=99.0, most=6, jobs=jobs) for jobs in (1, 2)
    )
    assert len(one.judged) == 6 and one == two
    assert not multiprocessing.active_children()
