"""The policy that looks ahead: what arrives is estimated, played on, and planned for."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ahead import Ahead, AheadConfig, Arrivals
from jaxsys.serve.energy.eco_prompts import ToCome
from jaxsys.serve.energy.gpu_model import Load, simulated_gpu
from jaxsys.serve.energy.offered import Offered
from jaxsys.serve.energy.policy import Clocks, Queue
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.iterations import PrefillPiece
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.made_traces import lognormal_lengths, poisson_arrivals

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


@pytest.mark.parametrize("cv", [1.0, 2.0])
def test_bursts_are_told_from_even_arrivals(cv):
    arrivals = Arrivals()
    for moment in poisson_arrivals(3000, 40.0, seed=5, cv=cv):
        arrivals.see(float(moment), 300)
    assert arrivals.variation == pytest.approx(cv, rel=0.35)
    assert Arrivals().variation == 1.0


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


def batches(per_s: float, lengths, *, until_s: float, step_s: float = 0.03):
    """Requests that join evenly and write so many tokens, one a step: moment and batch."""
    running: list[tuple[Request, int]] = []
    joined = 0
    for step in range(int(until_s / step_s)):
        now_s = step * step_s
        while joined < now_s * per_s:
            running.append((prompt(now_s, 100).request, lengths[joined]))
            joined += 1
        for request, _ in running:
            request.generated += 1
        yield now_s, [request for request, _ in running]
        running = [(r, length) for r, length in running if r.generated < length]


def test_what_is_offered_is_found_before_the_long_answers_have_ended():
    lengths = lognormal_lengths(4000, 150, 1.2, seed=4, most=2000)
    offered = Offered()
    seen = [offered.see(batch, now_s) for now_s, batch in batches(40, lengths, until_s=20)]
    assert len(seen) == 666
    found = offered.estimate(20.0)
    assert found is not None
    assert offered.joins_per_s(20.0) == pytest.approx(40, rel=0.02)
    joined = lengths[: offered._joined]
    assert found[0] == pytest.approx(40 * joined.mean(), rel=0.15)
    # The mean of those that have ended would be far too short.
    ended = offered._wrote[: offered._joined][offered._ended[: offered._joined]]
    assert ended.mean() < 0.75 * joined.mean()
    # A sequence met at random: the prompt, and half of what weighs by length.
    met = 100 + (joined.astype(float) ** 2).sum() / 2 / joined.sum()
    assert found[1] == pytest.approx(met, rel=0.25)
    # Nobody comes any more.
    offered.see([], 60.0)
    assert offered.joins_per_s(60.0) == 0
    assert Offered().estimate(5.0) is None


def test_lengths_that_are_all_alike_are_found_exactly():
    offered = Offered()
    for now_s, batch in batches(20, [50] * 1000, until_s=30):
        offered.see(batch, now_s)
    found = offered.estimate(30.0)
    assert found is not None
    assert found[0] / offered.joins_per_s(30.0) == pytest.approx(50, rel=0.02)
    assert found[1] == pytest.approx(125, rel=0.02)


@pytest.mark.parametrize(("share", "clock"), [(0.7, CLOCKS[0]), (1.2, CLOCKS[-1])])
def test_decode_takes_the_highest_clock_where_more_is_asked_for_than_it_can_write(share, clock):
    """Long before the batch is as large as it will be."""
    context, slo = 100 + 50, SharedSlo(Slo(itl_s=0.03, reserve=0.0))
    within = [
        batch / GPU.run(Load(batch=batch, kv_tokens=batch * context), CLOCKS[-1]).time_s
        for batch in range(1, 1024)
        if GPU.run(Load(batch=batch, kv_tokens=batch * context), CLOCKS[-1]).time_s <= 0.03
    ]
    per_s = share * max(within) / 100
    policy = Ahead(ModelPredictor(GPU), slo)
    *_, (now_s, batch) = [
        (now_s, policy.offered.see(batch, now_s) or batch)
        for now_s, batch in batches(per_s, [100] * 4000, until_s=6, step_s=0.02)
    ]
    part = batch[: int(0.6 * len(batch))]
    policy.offered.see(part, now_s)
    load = Load(batch=len(part), kv_tokens=context * len(part))
    assert GPU.run(load, CLOCKS[0]).time_s < 0.8 * 0.03
    assert ask(policy, load, Queue(decodes=part), now_s) == clock
    assert (policy.pressure > 1) == (share > 1)


def test_settings_are_checked():
    with pytest.raises(UsageError, match="horizon_s=-1"):
        AheadConfig(horizon_s=-1)
    with pytest.raises(UsageError, match="growth_guard"):
        AheadConfig(growth_guard=-1)
    with pytest.raises(UsageError, match="full_share=0"):
        AheadConfig(full_share=0.0)
