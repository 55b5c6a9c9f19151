"""Prompts follow their beginnings, as far as their first tokens are in time."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.serve.energy.gpu_model import simulated_gpu
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.prefix_route import PrefixIndex, PrefixRouter
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.kv_cache import block_keys
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.comparison import setting, simulate
from jaxsys.serve.simulation.made_traces import agent_trace
from jaxsys.serve.simulation.policies import policy_named

GPU = simulated_gpu("h100", "llama-3-8b")


@dataclass
class View:
    name: str
    waiting_tokens: int = 0
    waiting_requests: int = 0
    in_flight: int = 0
    batch: int = 0
    kv_tokens: int = 0
    busy_until_s: float | None = None
    clock_mhz: float | None = None
    page_size: int = 64
    page_count: int = 1000


def router(ttft_s=0.6):
    slo = SharedSlo(Slo(ttft_s=ttft_s, reserve=0.0))
    return PrefixRouter(ModelPredictor(GPU), slo, clocks_mhz=GPU.spec.control_mhz)


def request(tokens):
    return Request(
        0, sampling=SamplingParameters(max_tokens=4), arrival_s=0.0, prompt_tokens=tokens
    )


def test_a_turn_goes_where_the_one_before_was_and_a_stranger_to_who_is_free():
    views = [View("a"), View("b"), View("c")]
    routes = router()
    first = list(range(8000))
    views[0].waiting_tokens = 2000
    assert routes.choose(views, request(first)) == 1  # nobody knows it: the earliest
    views[0].waiting_tokens, views[1].waiting_tokens = 0, 1000
    assert routes.choose(views, request([*first, *range(500)])) == 1
    assert routes.choose(views, request(list(range(9000, 17000)))) == 0


def test_a_queue_that_would_make_it_late_sends_it_elsewhere():
    views = [View("a"), View("b")]
    routes = router()
    tokens = list(range(8000))
    assert routes.choose(views, request(tokens)) == 0
    views[0].waiting_tokens, views[0].waiting_requests = 60_000, 4
    assert routes.choose(views, request([*tokens, 1])) == 1
    # Now both hold it; where neither is in time, the earliest.
    views[1].waiting_tokens, views[1].waiting_requests = 90_000, 6
    assert routes.choose(views, request([*tokens, 1, 2])) == 0


def test_an_instance_that_is_new_again_holds_nothing():
    views = [View("a"), View("b")]
    routes = router()
    tokens = list(range(8000))
    assert routes.choose(views, request(tokens)) == 0
    assert routes.choose([View("b")], request([3, 4])) == 0
    views[0].waiting_tokens = 100
    assert routes.choose(views, request(tokens)) == 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), max_size=12))
def test_what_is_held_are_the_latest_blocks(prompts):
    """As an allocator of as many pages would: the least lately used go first, ends before
    beginnings."""
    index, most, latest = PrefixIndex(), 10, []
    for tokens in prompts:
        keys = list(block_keys(tokens, 2))
        held = index.held("a", keys)
        assert held == next((i for i, key in enumerate(keys) if key not in latest), len(keys))
        index.note("a", keys, most=most)
        latest = [*(key for key in latest if key not in keys), *reversed(keys)][-most:]


def test_traces_of_agents_are_as_long_and_as_known_as_asked():
    trace = agent_trace(sessions=60, sessions_per_s=0.1, seed=3)
    assert trace.sessions is not None
    assert len(trace) == pytest.approx(60 * 40, rel=0.15)
    assert trace.prompt_tokens.mean() == pytest.approx(140_000, rel=0.15)
    assert trace.output_tokens.mean() == pytest.approx(440, rel=0.1)
    known = total = 0
    before: dict[int, int] = {}
    for session, prompt in zip(trace.sessions.tolist(), trace.prompt_tokens.tolist(), strict=True):
        assert prompt >= before.get(session, 0)
        known += before.get(session, trace.common_tokens)
        total += prompt
        before[session] = prompt
    assert known / total == pytest.approx(0.95, abs=0.02)


def test_sessions_that_follow_their_pages_are_served_with_less_energy():
    """Four instances in virtual time, by the live scheduler and turns."""
    trace = agent_trace(
        sessions=24,
        sessions_per_s=1.5,
        turns=8,
        prompt_mean=12_000,
        output_mean=60,
        known_share=0.9,
        common_tokens=2000,
        tool_mean_s=3.0,
        seed=1,
    )
    where = setting("h100", "llama-3-8b", prefill=4, decode=2, predictor="model")
    plain, routed = (
        simulate(trace, policy_named(name), where)
        for name in ("ecofreq+energy+fewest", "ecofreq+energy+prefix")
    )
    assert routed.requests == plain.requests
    assert routed.prefix_hits > plain.prefix_hits + 0.1
    assert routed.energy_j_by_role["prefill"] < 0.9 * plain.energy_j_by_role["prefill"]
    assert routed.ttft_attainment(0.6) >= plain.ttft_attainment(0.6)


def test_pages_come_back_from_the_hosts_memory_in_virtual_time():
    """Of one instance whose device holds a session or two, and whose host holds all."""
    trace = agent_trace(
        sessions=8,
        sessions_per_s=2.0,
        turns=5,
        prompt_mean=100_000,
        output_mean=40,
        known_share=0.9,
        common_tokens=8000,
        seed=2,
    )
    where = setting("h100", "llama-3-8b", prefill=1, decode=1, predictor="model")
    with_host = replace(where, cluster=replace(where.cluster, host_pages_gib=400.0))
    plain, hosted = (simulate(trace, policy_named("max"), one) for one in (where, with_host))
    assert hosted.requests == plain.requests
    assert hosted.prefix_hits > plain.prefix_hits + 0.1
    assert hosted.energy_j < plain.energy_j
    assert np.median(hosted.ttft_s) < np.median(plain.ttft_s)
