"""The policy that looks ahead: what arrives is estimated, played on, and planned for."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ahead import Ahead, AheadConfig, Arrivals
from jaxsys.serve.energy.eco_prompts import ToCome
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig
from jaxsys.serve.energy.gpu_model import Load, simulated_gpu
from jaxsys.serve.energy.policy import Clocks, Queue
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.iterations import PrefillPiece
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.traces import poisson_arrivals

GPU = simulated_gpu("a100-80g", "llama-3-8b")
CLOCKS = GPU.spec.control_mhz


NOBODY = Queue()


def ask(policy, load: Load, queue: Queue = NOBODY, now_s: float = 0.0) -> int:
    return policy.choose(load, queue, Clocks(choices_mhz=CLOCKS, mhz=CLOCKS[-1], now_s=now_s))


def prompt(arrival_s: float, length: int) -> PrefillPiece:
    request = Request(
        f"{arrival_s}",
        sampling=SamplingParameters(max_tokens=5),
        arrival_s=arrival_s,
        prompt_length=length,
    )
    return PrefillPiece(request, 0, length, 0, True)


@pytest.mark.parametrize("rate", [2.0, 40.0])
def test_the_rate_and_length_of_arrivals_are_found(rate):
    arrivals = Arrivals()
    moments = poisson_arrivals(int(60 * rate), rate, seed=3)
    for moment in moments:
        arrivals.see(float(moment), 300)
        arrivals.see(float(moment), 300)  # seen again in the queue: counted once
    now_s = float(moments[-1])
    assert arrivals.rate_per_s(now_s) == pytest.approx(rate, rel=0.5)
    assert arrivals.tokens == pytest.approx(300)
    assert arrivals.rate_per_s(now_s + 60) < 0.01 * rate  # nobody comes any more
    assert Arrivals().rate_per_s(5.0) == 0.0


def test_played_on_arrivals_are_late_where_a_clock_cannot_keep_up():
    # 20 a second; 60 ms each in a row is too much, 10 ms is not.
    to_come = ToCome(20.0, 2.0, one_s=[0.07, 0.02], more_s=[0.06, 0.01], power_w=[100.0, 200.0])
    slow_j, slow_late = to_come.played_on(0, 0.5, 0.3)
    fast_j, fast_late = to_come.played_on(1, 0.1, 0.3)
    assert slow_late > 10 and fast_late == 0
    assert 0 < fast_j < 200.0 * 2.0 and 0 < slow_j <= 100.0 * 2.0
    # Less than one while another runs: it idles in between.
    rare = ToCome(0.5, 4.0, one_s=[0.1], more_s=[0.1], power_w=[100.0])
    energy_j, late = rare.played_on(0, 0.0, 0.3)
    assert energy_j == pytest.approx(100.0 * 0.1 * 2) and late == 0


def served(policy, *, per_s: float, length: int) -> int:
    """The clock for one prompt, after twenty seconds of arrivals like it."""
    pieces = [prompt(k / per_s, length) for k in range(int(20 * per_s))]
    for piece in pieces[:-1]:
        policy.arrivals.see(piece.request.timing.arrival_s, length)
    now_s = pieces[-1].request.timing.arrival_s
    load = Load(prefill_tokens=length, prefill_requests=1)
    return ask(policy, load, Queue(pieces=pieces[-1:]), now_s)


def test_prompts_to_come_keep_the_clock_up_before_a_backlog_is_there():
    """At a rate that the sweet spot cannot serve in time, the lone prompt at hand binds nothing."""
    alone_s = [GPU.run(Load(prefill_tokens=2000, prefill_requests=1), mhz).time_s for mhz in CLOCKS]
    rate = 0.97 / alone_s[-1]
    slo = SharedSlo(Slo(ttft_s=4 * alone_s[-1], reserve=0.0))
    looking = Ahead(ModelPredictor(GPU), slo)
    blind = Ahead(ModelPredictor(GPU), slo, config=AheadConfig(horizon_s=0.0))
    assert served(looking, per_s=rate, length=2000) > CLOCKS[0]
    assert served(blind, per_s=rate, length=2000) == CLOCKS[0]
    # Where there is time for all of them it does not.
    calm = Ahead(ModelPredictor(GPU), slo)
    assert served(calm, per_s=0.2 * rate, length=2000) == CLOCKS[0]


def test_decode_is_planned_for_the_batch_that_is_to_come():
    slo = SharedSlo(Slo(itl_s=0.03, reserve=0.0))
    batch = max(
        b
        for b in range(1, 1024)
        if GPU.run(Load(batch=b, kv_tokens=200 * b), CLOCKS[0]).time_s <= 0.03 / 1.15
    )
    load = Load(batch=batch, kv_tokens=200 * batch)
    ecofreq = EcoFreq(ModelPredictor(GPU), slo, config=EcoFreqConfig(growth_s=0, saturation_s=0))
    ahead = Ahead(ModelPredictor(GPU), slo, config=AheadConfig(growth_s=0, saturation_s=0))
    assert ask(ecofreq, load) == CLOCKS[0] < ask(ahead, load)


def test_settings_are_checked():
    with pytest.raises(UsageError, match="horizon_s=-1"):
        AheadConfig(horizon_s=-1)
    with pytest.raises(UsageError, match="growth_guard"):
        AheadConfig(growth_guard=-1)
