"""The virtual-time replay: nothing lost, energy adds up, many steps as one change nothing."""

import dataclasses

import numpy as np
import pytest

from jaxsys.clocks import SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.dispatch_times import DispatchTimes
from jaxsys.serve.energy.ecofreq import EcoFreq
from jaxsys.serve.energy.ecoroute import (
    EnergyRouter,
    QueueRouter,
    RoundRobinRouter,
    StateSpaceRouter,
)
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, simulated_gpu
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.energy.window_control import WindowControl
from jaxsys.serve.hooks import FewestRequestsRouter
from jaxsys.serve.simulation.executor import SimExecutor
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.traces import RequestTrace

GPU = simulated_gpu("h100", "llama-3-8b")
TRACE = synthetic_trace(rate_per_s=12, duration_s=20, seed=5)


def simulate(trace=TRACE, make=None, slo=None, clocks_mhz=None, shares=False, **changes):
    decode_router = changes.pop("decode_router", FewestRequestsRouter())
    shared = SharedSlo(slo)
    make = make or (lambda slo: FixedClock(1980))
    simulator = Simulator(
        trace,
        ClusterConfig(**{"gpu": GPU, **changes}),
        make_policy=lambda role: make(shared),
        clocks_mhz=clocks_mhz,
        shares=shares,
        prefill_router=RoundRobinRouter(),
        decode_router=decode_router,
        sample_every_s=5.0,
    )
    result = simulator.run()
    return result, simulator


def eco(slo):
    return EcoFreq(ModelPredictor(GPU), slo)


def test_every_request_and_token_is_served_and_no_page_stays():
    result, simulator = simulate()
    assert result.requests == len(TRACE) == len(result.ttft_s)
    assert result.output_tokens == TRACE.output_tokens.sum()
    assert result.itl_weight.sum() == (TRACE.output_tokens - 1).sum()
    for instance in simulator.instances:
        instance.scheduler.check()
        assert instance.scheduler.requests == 0
        assert instance.in_flight == 0
        assert instance.kv_tokens == 0


def test_energy_covers_every_instance_all_the_time():
    result, simulator = simulate()
    for instance in simulator.instances:
        executor = instance.executor
        assert executor.busy_s + executor.idle_s == pytest.approx(result.duration_s)
        assert instance.clocks.energy_j() == pytest.approx(executor.busy_j + executor.idle_j)
    idle_s = sum(i.executor.idle_s for i in simulator.instances)
    assert result.idle_j == pytest.approx(idle_s * GPU.idle_power_w(1980), rel=1e-6)
    assert sum(result.energy_j_by_role.values()) == pytest.approx(result.energy_j)


@pytest.mark.parametrize("changes", [{}, {"plan_ahead": True}])
def test_shares_and_idle_time_add_up_to_all_energy(changes):
    """Of every request that ended, when all have."""
    result, simulator = simulate(make=eco, shares=True, **changes)
    assert simulator.shared_j + result.idle_j == pytest.approx(result.energy_j)
    for instance in simulator.instances:
        reading = instance.governor.reading(result.duration_s)
        assert reading.energy_j == pytest.approx(instance.clocks.energy_j())


@pytest.mark.parametrize("make", [None, eco], ids=["fixed", "ecofreq"])
def test_many_steps_as_one_equal_steps_alone(make):
    # On one decode instance: between two, a tie that falls the other way is another history.
    alone, _ = simulate(make=make, max_steps=1, decode_instances=1)
    many, _ = simulate(make=make, max_steps=32, decode_instances=1)
    assert many.energy_j == pytest.approx(alone.energy_j, rel=0.01)
    assert many.ttft_s.mean() == pytest.approx(alone.ttft_s.mean(), rel=1e-3)
    assert np.median(many.tpot_s) == pytest.approx(np.median(alone.tpot_s), rel=0.01)
    assert many.itl_percentile(99) == pytest.approx(alone.itl_percentile(99), rel=0.05)


def test_one_request_takes_what_the_model_says():
    trace = RequestTrace(
        name="one",
        arrival_s=np.array([0.0]),
        prompt_tokens=np.array([1000]),
        output_tokens=np.array([11]),
    )
    result, _ = simulate(trace, prefill_instances=1, decode_instances=1)
    prefill = GPU.run(Load(prefill_tokens=1000, prefill_requests=1), 1980)
    assert result.ttft_s[0] == pytest.approx(prefill.time_s)
    step_s = np.mean([GPU.run(Load(batch=1, kv_tokens=1001 + k), 1980).time_s for k in range(10)])
    transfer_s = 0.002 + 1000 * 131_072 / 50e9
    expected_s = prefill.time_s + transfer_s + 10 * step_s
    assert result.duration_s == pytest.approx(expected_s, rel=1e-3)


def test_ecofreq_saves_energy_and_keeps_attainment_in_light_load():
    slo = Slo(ttft_s=0.6, itl_s=0.06)
    static, _ = simulate(slo=slo)
    governed, _ = simulate(make=eco, slo=slo)
    assert governed.energy_j < 0.8 * static.energy_j
    assert governed.ttft_attainment(0.6) >= static.ttft_attainment(0.6) - 0.005
    assert governed.itl_attainment(0.06) >= static.itl_attainment(0.06) - 0.005
    assert min(governed.clock_seconds["decode"]) == GPU.spec.sweet_spot_mhz


@pytest.mark.parametrize("rule", ["state-space", "energy"])
def test_both_routing_rules_serve_everything(rule):
    shared = SharedSlo(Slo())
    predictor = ModelPredictor(GPU)
    clocks = GPU.spec.control_mhz
    router = (
        StateSpaceRouter(predictor, shared, clocks_mhz=clocks)
        if rule == "state-space"
        else EnergyRouter(predictor, shared, clocks_mhz=clocks, idle_power_w=90.0)
    )
    result, _ = simulate(make=eco, decode_router=router, decode_instances=4)
    assert result.requests == len(TRACE)
    assert result.itl_attainment(0.06) > 0.99


def test_window_control_and_queue_router_serve_everything():
    shared = SharedSlo(Slo())
    result = Simulator(
        TRACE,
        ClusterConfig(gpu=GPU),
        make_policy=lambda role: WindowControl(ModelPredictor(GPU), shared),
        prefill_router=QueueRouter(ModelPredictor(GPU), clocks_mhz=(1080, 1980)),
        decode_router=FewestRequestsRouter(),
    ).run()
    assert result.requests == len(TRACE)
    assert len(result.clock_seconds["decode"]) > 1


def test_memory_pressure_preempts_and_still_serves():
    class Small(type(GPU)):
        @property
        def kv_capacity_tokens(self):
            return 6000

    trace = synthetic_trace(
        rate_per_s=30, duration_s=4, seed=2, prompt_mean=300, output_mean=400, most_tokens=1000
    )
    small = Small(GPU.spec, GPU.shape)
    result = Simulator(
        trace,
        ClusterConfig(gpu=small, prefill_instances=1, decode_instances=1),
        make_policy=lambda role: FixedClock(1980),
        prefill_router=RoundRobinRouter(),
        decode_router=RoundRobinRouter(),
    ).run()
    assert result.preemptions > 0
    assert result.output_tokens == trace.output_tokens.sum()


def test_a_watchdog_boosts_inside_the_iteration():
    def under_predicting(slo):
        return EcoFreq(ModelPredictor(GPU, scale=0.2), slo)

    trace = synthetic_trace(rate_per_s=3, duration_s=10, seed=1, prompt_mean=2500)
    result, _ = simulate(trace, make=under_predicting, slo=Slo(ttft_s=0.2), clocks_mhz=(1080, 1980))
    assert result.overruns > 0
    assert result.clock_seconds["prefill"].get(1980, 0.0) > 0


ENGINE = {
    "prefill_instances": 1,
    "decode_instances": 0,
    "max_prefill_tokens": 2048,
    "max_batch": 64,
    "piece_buckets": (32, 128, 512, 2048),
    "decode_buckets": (1, 2, 4, 8, 16, 32, 64),
    "plan_ahead": True,
}
"""One instance for both, as this project's engine runs it."""


def test_one_instance_for_both_serves_everything():
    trace = synthetic_trace(rate_per_s=6, duration_s=20, seed=6, prompt_mean=900)
    result, simulator = simulate(trace, **ENGINE)
    assert len(result.ttft_s) == len(trace)
    assert result.output_tokens == trace.output_tokens.sum()
    assert result.itl_weight.sum() == (trace.output_tokens - 1).sum()
    assert result.energy_j_by_role.keys() == {"both"}
    (instance,) = simulator.instances
    instance.scheduler.check()
    assert instance.scheduler.requests == 0
    assert instance.executor.busy_s + instance.executor.idle_s == pytest.approx(result.duration_s)


def test_the_engine_pads_each_piece_and_serves_newcomers_an_iteration_later():
    """Request 0 decodes; 1 comes within a step, waits for it and the one planned behind it."""
    trace = RequestTrace(
        name="two",
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([100, 700]),
        output_tokens=np.array([300, 2]),
    )
    result, _ = simulate(trace, **ENGINE)
    assert result.ttft_s[0] == pytest.approx(GPU.run(Load(128, 1), 1980).time_s)
    piece_s = GPU.run(Load(2048, 1), 1980).time_s
    step_s = GPU.run(Load(batch=1, kv_tokens=250, bucket=1), 1980).time_s
    assert piece_s + 2 * step_s < result.ttft_s[1] < piece_s + 3 * step_s
    at_once, _ = simulate(trace, **(ENGINE | {"plan_ahead": False}))
    assert piece_s + step_s < at_once.ttft_s[1] < piece_s + 2 * step_s
    # What the host takes to dispatch hides behind what runs, where something does.
    hidden, _ = simulate(trace, **ENGINE, dispatch_s=0.003)
    assert hidden.ttft_s[0] == pytest.approx(result.ttft_s[0] + 0.003)
    assert piece_s + 2 * step_s < hidden.ttft_s[1] < piece_s + 3 * step_s
    assert hidden.itl_s.max() == pytest.approx(result.itl_s.max(), rel=0.01)
    # A host that plans anew only when the step in flight is nearly done knows of 1 a step earlier.
    busy, _ = simulate(trace, **ENGINE, plan_after_s=0.98 * step_s)
    assert piece_s + step_s < busy.ttft_s[1] < piece_s + 2 * step_s
    assert busy.ttft_s[0] == result.ttft_s[0]
    # The token that 0 drew beside that prompt waited for it.
    assert result.itl_s.max() == pytest.approx(piece_s + step_s, rel=0.01)


def same_s(seconds: float) -> DispatchTimes:
    """Dispatching that always takes the same time."""
    return DispatchTimes(alike=(seconds,), changed=(seconds,), piece=(seconds,))


def test_dispatching_hides_behind_the_step_at_work_unless_it_is_longer():
    trace = synthetic_trace(rate_per_s=6, duration_s=10, seed=6, prompt_mean=300)
    result, _ = simulate(trace, **ENGINE)
    at_once, _ = simulate(trace, **ENGINE, dispatch_times=same_s(0.0))
    assert (at_once.itl_s == result.itl_s).all() and (at_once.ttft_s == result.ttft_s).all()
    assert at_once.energy_j == result.energy_j
    one = RequestTrace(
        name="one",
        arrival_s=np.array([0.0]),
        prompt_tokens=np.array([100]),
        output_tokens=np.array([100]),
    )
    step_s = GPU.run(Load(batch=1, kv_tokens=150, bucket=1), 1980).time_s
    quick, _ = simulate(one, **ENGINE, dispatch_times=same_s(0.5 * step_s))
    assert np.median(quick.itl_s) == pytest.approx(step_s, rel=0.01)
    # Slower than a step: the host plans, dispatches, hears of the step before, and plans anew.
    slow, simulator = simulate(
        one, **ENGINE, dispatch_times=same_s(3 * step_s), plan_after_s=0.1 * step_s
    )
    assert np.median(slow.itl_s) == pytest.approx(3.1 * step_s, rel=1e-6)
    (instance,) = simulator.instances
    # The device idles meanwhile, and all of its time is booked.
    assert instance.executor.busy_s == pytest.approx(quick.busy_s_by_role["both"])
    assert instance.executor.busy_s + instance.executor.idle_s == pytest.approx(slow.duration_s)


def test_a_first_piece_begins_while_the_rest_is_dispatched():
    trace = RequestTrace(
        name="one",
        arrival_s=np.array([0.0]),
        prompt_tokens=np.array([1000]),
        output_tokens=np.array([2]),
    )
    result, _ = simulate(trace, **ENGINE, dispatch_s=0.002, dispatch_times=same_s(0.005))
    piece_s = GPU.run(Load(2048, 1), 1980).time_s
    assert piece_s > 0.005
    assert result.ttft_s[0] == pytest.approx(0.002 + piece_s)


def test_drawn_dispatch_times_are_the_same_in_every_replay():
    times = DispatchTimes(alike=(0.001, 0.02), changed=(0.004, 0.03), piece=(0.003, 0.01))
    trace = synthetic_trace(rate_per_s=6, duration_s=10, seed=6, prompt_mean=300)
    first, _ = simulate(trace, **ENGINE, dispatch_times=times)
    again, _ = simulate(trace, **ENGINE, dispatch_times=times)
    assert (first.itl_s == again.itl_s).all() and first.energy_j == again.energy_j
    assert len(np.unique(first.itl_s)) > 100
    assert first.output_tokens == trace.output_tokens.sum()


def test_a_hand_over_takes_time_and_holds_up_both_instances():
    """Request 0 decodes; 1 comes later, 2 while 1 is computed."""
    trace = RequestTrace(
        name="three",
        arrival_s=np.array([0.0, 1.0, 1.01]),
        prompt_tokens=np.array([100, 700, 700]),
        output_tokens=np.array([300, 2, 2]),
    )
    apart = ENGINE | {"decode_instances": 1, "link_bytes_per_s": np.inf, "hand_over_s": 0.02}
    result, _ = simulate(trace, **apart)
    step_s = GPU.run(Load(batch=1, kv_tokens=250, bucket=1), 1980).time_s
    # Beside 0, each waits for the pages, what is left of a step, and the one planned behind it.
    first_gaps_s = np.sort(result.itl_s)[-2:]
    assert 0.02 + 2 * step_s < first_gaps_s[0] < first_gaps_s[1] < 0.02 + 3.1 * step_s
    assert result.itl_weight.sum() == 301
    held_up, _ = simulate(trace, **apart, landing_s=0.004)
    assert held_up.duration_s == pytest.approx(result.duration_s + 2 * 0.004)
    assert held_up.ttft_s == pytest.approx(result.ttft_s)
    sending, _ = simulate(trace, **apart, hand_out_s=0.005)
    assert sending.ttft_s == pytest.approx(result.ttft_s + [0, 0, 0.005])
    assert sending.duration_s == pytest.approx(result.duration_s)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 1},
        {"plan_ahead": True},
        {"plan_ahead": True, "dispatch_times": same_s(0.01)},
    ],
)
def test_gaps_between_tokens_add_up_to_the_time_from_first_to_last(changes):
    outputs = np.full(len(TRACE), 60)
    trace = dataclasses.replace(TRACE, output_tokens=outputs)
    result, _ = simulate(trace, hand_over_s=0.01, **changes)
    assert result.itl_s @ result.itl_weight == pytest.approx(59 * result.tpot_s.sum(), rel=1e-9)


def test_executor_splits_an_iteration_where_the_clock_changes():
    now = 0.0
    clocks = SimulatedClocks(
        available_mhz=GPU.spec.available_mhz, now_s=lambda: now, set_latency_s=0.01
    )
    executor = SimExecutor(GPU, clocks)
    load = Load(prefill_tokens=8000, prefill_requests=4)
    fast, slow = GPU.run(load, 1980), GPU.run(load, 1080)
    clocks.set_clock(1080)
    end_s = executor.begin(load, 1, now)
    share = 0.01 / fast.time_s
    assert end_s == pytest.approx(0.01 + (1 - share) * slow.time_s)
    now = end_s
    assert executor.finish() == pytest.approx(
        0.01 * fast.power_w + (1 - share) * slow.time_s * slow.power_w
    )
    assert executor.seconds_at_mhz[1980] == pytest.approx(0.01)


def test_noise_changes_times_but_not_the_work():
    exact, _ = simulate()
    noisy, _ = simulate(time_noise=0.05)
    assert noisy.output_tokens == exact.output_tokens
    assert noisy.energy_j != exact.energy_j
    assert noisy.energy_j == pytest.approx(exact.energy_j, rel=0.02)
    again, _ = simulate(time_noise=0.05)
    assert again.energy_j == noisy.energy_j  # the same every time


def test_what_cannot_be_replayed_is_refused():
    long = RequestTrace(
        name="long",
        arrival_s=np.array([0.0]),
        prompt_tokens=np.array([10**6]),
        output_tokens=np.array([5]),
    )
    with pytest.raises(UsageError, match=r"1000005 tokens.*fit"):
        simulate(long)
    with pytest.raises(UsageError, match="decode_instances=-1"):
        ClusterConfig(gpu=GPU, decode_instances=-1)
    with pytest.raises(UsageError, match="must reach max_prefill_tokens=8192"):
        ClusterConfig(gpu=GPU, piece_buckets=(32, 128))


def test_turns_of_a_session_are_served_from_the_prefix_cache():
    """The prompts of one conversation share their beginning; without its name nothing is known."""
    count = 24
    conversation = RequestTrace(
        name="turns",
        arrival_s=np.arange(count) * 0.5,
        prompt_tokens=np.repeat(np.arange(1, 7), 4) * 1000,
        output_tokens=np.full(count, 10),
        sessions=np.tile(np.arange(4), 6),
    )
    apart = dataclasses.replace(conversation, sessions=None)
    (with_names, _), (without, _) = (
        simulate(trace, prefill_instances=1, decode_instances=1) for trace in (conversation, apart)
    )
    busy = [result.busy_s_by_role["prefill"] for result in (with_names, without)]
    # All but the thousand new tokens of a turn are there: 1/1, 1/2, ... 1/6 of the work.
    assert busy[0] < 0.4 * busy[1]
    assert np.median(with_names.ttft_s) < 0.5 * np.median(without.ttft_s)


def test_a_first_token_may_leave_the_decode_instance():
    """As some engines have it: then it waits for that one's steps, and for memory there."""
    engine = dataclasses.replace(GPU.engine, first_token_steps=2.0)
    late = SimulatedGpu(GPU.spec, GPU.shape, engine)
    (early, _), (later, _) = (
        simulate(
            gpu=gpu,
            trace=TRACE.head(20),
            prefill_instances=1,
            decode_instances=1,
        )
        for gpu in (GPU, late)
    )
    assert len(later.ttft_s) == len(early.ttft_s) == 20
    step_s = GPU.run(Load(batch=1, kv_tokens=100), 1980).time_s
    assert later.ttft_s.mean() > early.ttft_s.mean() + 2 * step_s
