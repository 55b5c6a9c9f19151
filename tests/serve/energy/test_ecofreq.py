"""The clock governor's decisions, on a simulated GPU in virtual time."""

import dataclasses
import math
import random
import time
from typing import Any

import pytest

from jaxsys.clocks import SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.gpu_model import Load, run_many, simulated_gpu
from jaxsys.serve.energy.meters import CounterMeter
from jaxsys.serve.energy.predictors import ModelPredictor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.iterations import Iteration, PrefillPiece
from jaxsys.serve.requests import Request, SamplingParameters

GPU = simulated_gpu("a100-80g", "llama-3-8b")
CLOCKS = GPU.spec.control_mhz


def request(length: int = 100, arrival_s: float = 0.0) -> Request:
    return Request(
        f"r{arrival_s}-{length}",
        sampling=SamplingParameters(max_tokens=10),
        arrival_s=arrival_s,
        prompt_length=length,
    )


def iteration(prompts=(), batch: int = 0, kv_tokens: int = 0, steps: int = 1) -> Iteration:
    pieces = tuple(PrefillPiece(r, 0, r.prompt_length, 0, True) for r in prompts)
    decodes = tuple(request() for _ in range(batch))
    tokens = sum(r.prompt_length for r in prompts)
    return Iteration(1, pieces, decodes, (), tokens, 0, kv_tokens, batch, steps)


class Bench:
    """A governor with a time that tests move."""

    def __init__(self, slo: Slo | None = None, *, latency_s: float = 0.0, **config) -> None:
        self.now = 0.0
        self.slo = SharedSlo(slo or Slo(reserve=0.0))
        self.clocks = SimulatedClocks(
            available_mhz=GPU.spec.available_mhz, now_s=lambda: self.now, set_latency_s=latency_s
        )
        defaults = {"minimum_dwell_s": 0.0, "hysteresis": 0.0, "growth_guard": 0.0}
        self.policy: Any = EcoFreq(
            ModelPredictor(GPU),
            self.slo,
            config=EcoFreqConfig(**{**defaults, **config}),  # type: ignore[arg-type]
        )
        self.governor: Any = Governor(
            self.policy,
            self.clocks,
            CounterMeter(self.clocks),
            choices_mhz=CLOCKS,
            now_s=lambda: self.now,
        )
        self.governor.start(float("-inf"))

    def decide(self, work: Iteration, waiting=()) -> Any:
        self.governor.before_iteration(work, waiting, self.now)
        return self.governor.clock_mhz

    def finish(self, work: Iteration, latency_s: float) -> None:
        self.now += latency_s
        self.governor.after_iteration(work, latency_s, self.now)


def decode_s(batch: int, kv_tokens: int, mhz: int) -> float:
    return GPU.run(Load(batch=batch, kv_tokens=kv_tokens), mhz).time_s


def test_light_decode_runs_at_the_sweet_spot():
    assert Bench().decide(iteration(batch=8, kv_tokens=2000)) == CLOCKS[0]


def test_decode_takes_the_lowest_clock_that_keeps_the_itl():
    batch, kv = 300, 90_000
    for level in range(1, len(CLOCKS)):
        slower, faster = (decode_s(batch, kv, CLOCKS[k]) for k in (level - 1, level))
        bench = Bench(Slo(itl_s=(slower + faster) / 2, reserve=0.0))
        assert bench.decide(iteration(batch=batch, kv_tokens=kv)) == CLOCKS[level]


def test_a_step_that_guesses_may_take_longer_since_it_yields_more_tokens():
    """The bound is on the time a token; rows that are guessed cost as rows of a batch do."""
    batch, kv = 100, 50_000
    plain = iteration(batch=batch, kv_tokens=kv)
    drafts = ((1, 2, 3),) * batch
    rows = Load(batch=batch, kv_tokens=kv, drafted=3 * batch)
    slowest_s = GPU.run(rows, CLOCKS[0]).time_s
    assert slowest_s > decode_s(batch, kv, CLOCKS[0])
    guessed = {gain: dataclasses.replace(plain, drafts=drafts, gain=gain) for gain in (1.0, 2.0)}
    bench = Bench(Slo(itl_s=slowest_s / 1.9, reserve=0.0))
    assert bench.decide(guessed[2.0]) == CLOCKS[0]
    assert Bench(Slo(itl_s=slowest_s / 1.9, reserve=0.0)).decide(guessed[1.0]) == CLOCKS[-1]
    one, many = run_many(GPU, [rows], CLOCKS[:1])[0], GPU.run(rows, CLOCKS[0]).time_s
    assert one[0, 0] == pytest.approx(many)


def test_an_impossible_slo_is_served_at_the_maximum_and_counted():
    bench = Bench(Slo(itl_s=0.001))
    assert bench.decide(iteration(batch=8, kv_tokens=100)) == CLOCKS[-1]
    assert bench.governor.record.infeasible == 1


def test_prefill_counts_the_time_already_waited():
    work = iteration([request(3000)])
    need_s = GPU.run(Load(prefill_tokens=3000, prefill_requests=1), CLOCKS[0]).time_s
    slo = Slo(ttft_s=need_s * 1.05, reserve=0.0)
    assert Bench(slo).decide(work) == CLOCKS[0]
    late = Bench(slo)
    late.now = need_s * 0.15  # the same prompt has waited: the lowest clock no longer suffices
    assert late.decide(work) > CLOCKS[0]


def test_prefill_counts_every_queued_request():
    work = iteration([request(1000)])
    batch_s = GPU.run(Load(prefill_tokens=1000, prefill_requests=1), CLOCKS[0]).time_s
    slo = Slo(ttft_s=6.9 * batch_s, reserve=0.0)
    assert Bench(slo).decide(work) == CLOCKS[0]
    queue = [request(1000) for _ in range(6)]  # seven batches: the last would come too late
    assert Bench(slo, prefill_budget=1000).decide(work, queue) > CLOCKS[0]


def test_the_rest_of_a_long_prompt_counts():
    long = request(16_000)
    first = PrefillPiece(long, 0, 4000, 0, last=False)
    work = Iteration(1, (first,), (), (), 4000, 0, 0, 0, 1)
    whole_s = GPU.run(Load(prefill_tokens=4000, prefill_requests=1), CLOCKS[0]).time_s
    whole_s += GPU.run(Load(prefill_tokens=12_000, prefill_requests=1), CLOCKS[0]).time_s
    assert Bench(Slo(ttft_s=1.01 * whole_s, reserve=0.0)).decide(work) == CLOCKS[0]
    assert Bench(Slo(ttft_s=0.9 * whole_s, reserve=0.0)).decide(work) > CLOCKS[0]


def test_prompts_beyond_saving_do_not_bind():
    fresh = [request(50, arrival_s=1.0) for _ in range(19)]
    late = request(50, arrival_s=0.0)
    bench = Bench(Slo(ttft_s=0.6, reserve=0.0), worth=4.0, broken_worth=4.0)
    bench.now = 1.0  # the late one is over its bound already
    assert bench.decide(iteration([late, *fresh])) == CLOCKS[0]
    assert bench.governor.record.infeasible == 1


def test_a_first_token_in_time_is_bought_at_what_it_is_worth():
    work = iteration([request(50) for _ in range(20)])
    load = Load(prefill_tokens=1000, prefill_requests=20)
    # In time only at the highest clock, whose iteration takes 1.5 times the lowest's energy.
    bound_s = (GPU.run(load, CLOCKS[-1]).time_s + GPU.run(load, CLOCKS[-2]).time_s) / 2
    slo = Slo(ttft_s=bound_s, reserve=0.0)
    low_j, high_j = (GPU.run(load, mhz).energy_j for mhz in (CLOCKS[0], CLOCKS[-1]))
    fair = (high_j - low_j) / low_j  # of all twenty together
    assert Bench(slo, worth=1.01 * fair, broken_worth=1.01 * fair).decide(work) == CLOCKS[-1]
    assert Bench(slo, worth=0.99 * fair, broken_worth=0.99 * fair).decide(work) < CLOCKS[-1]


def test_a_backlog_is_drained_as_far_as_those_to_come_are_worth_it():
    now = 10.0
    # Prompts come as fast as they can be served, and all at hand are late whatever is done.
    queue = [request(4000, arrival_s=7.0 + 0.2 * k) for k in range(12)]
    clocks = {}
    for worth in (0.0, 12.0):
        bench = Bench(Slo(ttft_s=0.6, reserve=0.0), worth=worth, broken_worth=worth)
        bench.now = now
        clocks[worth] = bench.decide(iteration([request(4000, arrival_s=7.0)]), queue)
    assert clocks[0.0] == CLOCKS[0] and clocks[12.0] == CLOCKS[-1]


def test_a_decode_clock_must_bear_a_larger_batch():
    batch, kv = 300, 90_000
    grown = Load(batch=int(batch * 1.1) + 1, kv_tokens=int(kv * 1.1))
    bound_s = GPU.run(grown, CLOCKS[2]).time_s
    for share, level in ((1.01, 2), (0.99, 3)):
        bench = Bench(Slo(itl_s=bound_s * share, reserve=0.0), growth_guard=0.1)
        assert bench.decide(iteration(batch=batch, kv_tokens=kv)) == CLOCKS[level]


def test_a_growing_batch_is_met_ahead():
    slo = Slo(itl_s=decode_s(230, 69_000, CLOCKS[0]), reserve=0.0)
    steady, growing = Bench(slo, growth_s=5.0), Bench(slo, growth_s=5.0)
    for step in range(11):
        steady.now = growing.now = 1.0 + step
        steady.decide(iteration(batch=200, kv_tokens=60_000))
        growing.decide(iteration(batch=100 + 10 * step, kv_tokens=300 * (100 + 10 * step)))
    assert steady.governor.clock_mhz == CLOCKS[0]  # the same batch now, but not the same course
    assert growing.governor.clock_mhz > CLOCKS[0]


def test_a_batch_that_will_outgrow_every_clock_is_met_at_the_highest():
    """The bound is one that 260 sequences keep at the highest clock alone, and 200 at a lower."""
    slo = Slo(itl_s=decode_s(260, 78_000, CLOCKS[-1]), reserve=0.0)
    foreseen, blind = Bench(slo, growth_s=0.0), Bench(slo, growth_s=0.0, saturation_s=0.0)
    steady = Bench(slo, growth_s=0.0)
    for step in range(11):
        batch = 100 + 10 * step
        for bench, size in ((foreseen, batch), (blind, batch), (steady, 200)):
            bench.now = 1.0 + step
            bench.decide(iteration(batch=size, kv_tokens=300 * size))
    assert foreseen.governor.clock_mhz == CLOCKS[-1]
    assert blind.governor.clock_mhz == steady.governor.clock_mhz < CLOCKS[-1]


def test_raising_is_immediate_and_lowering_waits_for_the_dwell():
    bench = Bench(Slo(itl_s=0.045, reserve=0.0), minimum_dwell_s=0.1)
    bench.now = 1.0
    light, heavy = iteration(batch=8, kv_tokens=1000), iteration(batch=500, kv_tokens=150_000)
    assert bench.decide(light) == CLOCKS[0]
    assert bench.decide(heavy) == CLOCKS[-1]
    bench.now = 1.05
    assert bench.decide(light) == CLOCKS[-1]
    bench.now = 1.11
    assert bench.decide(light) == CLOCKS[0]


def test_hysteresis_keeps_a_clock_that_barely_fits_lower():
    batch, kv = 300, 90_000
    bound_s = decode_s(batch, kv, CLOCKS[0]) * 1.01
    steady = Bench(Slo(itl_s=bound_s, reserve=0.0), hysteresis=0.03)
    assert steady.decide(iteration(batch=batch, kv_tokens=kv)) > CLOCKS[0]  # began at the top
    eager = Bench(Slo(itl_s=bound_s, reserve=0.0), hysteresis=0.0)
    assert eager.decide(iteration(batch=batch, kv_tokens=kv)) == CLOCKS[0]


def test_the_watchdog_boosts_after_an_overrun_and_lets_go():
    bench = Bench(watchdog_hold=2)
    work = iteration(batch=8, kv_tokens=1000)
    assert bench.decide(work) == CLOCKS[0]
    bench.finish(work, bench.policy.predicted_s + 0.02)
    assert bench.governor.record.overruns == 1
    asked = []
    for _ in range(3):
        asked.append(bench.decide(work))
        bench.finish(work, bench.policy.predicted_s)
    assert asked == [CLOCKS[-1], CLOCKS[-1], CLOCKS[0]]


def late_share(deviation: float, *, bias: float = 1.0, **config) -> tuple[float, int]:
    """Share of late steps where the lowest clock is expected to keep the ITL by 3 %, after 1000
    steps; and the last clock."""
    work, draw = iteration(batch=300, kv_tokens=90_000), random.Random(0)
    itl_s = 1.03 * decode_s(300, 90_000, CLOCKS[0])
    bench = Bench(Slo(itl_s=itl_s, reserve=0.01), growth_s=0.0, saturation_s=0.0, **config)
    late = 0
    for step in range(5000):
        mhz = bench.decide(work)
        real_s = decode_s(300, 90_000, mhz) * bias * math.exp(draw.gauss(0.0, deviation))
        bench.finish(work, real_s)
        late += step >= 1000 and real_s > itl_s
    return late / 4000, bench.governor.clock_mhz


def test_steps_that_take_longer_than_predicted_make_room_for_themselves():
    assert late_share(0.0) == (0.0, CLOCKS[0])
    assert late_share(0.02)[0] < 0.002
    assert late_share(0.0, bias=1.06)[0] < 0.002  # every step is late at the lowest clock
    assert late_share(0.02, late_steps=0.0)[0] > 0.05


def test_a_live_slo_change_counts_at_the_next_decision():
    bench = Bench()
    work = iteration(batch=300, kv_tokens=90_000)
    assert bench.decide(work) == CLOCKS[0]
    bench.slo.change(Slo(itl_s=decode_s(300, 90_000, CLOCKS[-1]) * 1.001, reserve=0.0))
    assert bench.decide(work) == CLOCKS[-1]


def test_idle_falls_to_the_idle_clock_after_a_while():
    bench = Bench(idle_after_s=0.5, idle_mhz=210)
    bench.governor.idle(10.4, 10.0)
    assert bench.clocks.asked_mhz() != 210
    bench.governor.reading(10.5)  # reading changes nothing
    assert bench.clocks.asked_mhz() != 210
    bench.governor.idle(10.5, 10.0)
    assert bench.clocks.asked_mhz() == 210
    assert bench.decide(iteration(batch=1, kv_tokens=10)) == CLOCKS[0]
    assert bench.clocks.asked_mhz() == CLOCKS[0]


def test_the_predictor_learns_at_the_clock_that_really_ran():
    seen = []

    class Learning(ModelPredictor):
        def observe(self, load, clock_mhz, time_s, power_w):
            seen.append((load.batch, clock_mhz, time_s))

    bench = Bench()
    bench.clocks.clamp_mhz = 900
    bench.policy.predictor = Learning(GPU)
    work = iteration(batch=8, kv_tokens=1000, steps=4)
    bench.decide(work)
    bench.clocks.spend(0.1, 300.0)
    bench.finish(work, 0.08)
    assert seen == [(8, 900, 0.02)]
    assert bench.governor.record.clamped == 1


def test_unlisted_clocks_are_refused():
    clocks = SimulatedClocks(available_mhz=(1005, 1410), now_s=lambda: 0.0)
    policy = EcoFreq(ModelPredictor(GPU), SharedSlo())
    for choices, message in (((1005, 1200), r"1200.*not clocks"), ((), "empty")):
        with pytest.raises(UsageError, match=message):
            Governor(policy, clocks, CounterMeter(clocks), choices_mhz=choices)


def test_a_decision_takes_under_half_a_millisecond():
    bench = Bench(prefill_budget=2000)
    work = iteration([request(2000)], batch=64, kv_tokens=30_000)
    queue = [request(500) for _ in range(40)]
    times = []
    for _ in range(300):
        start = time.perf_counter()
        bench.decide(work, queue)
        times.append(time.perf_counter() - start)
        bench.finish(work, 0.01)
    times.sort()
    # The median, so that a busy test machine does not decide; the benchmark reports p99.
    assert times[len(times) // 2] < 0.5e-3


@pytest.mark.parametrize(
    "bad", [{"hysteresis": 1.0}, {"minimum_dwell_s": -1.0}, {"queue_chunks": 0}]
)
def test_bad_configs_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        EcoFreqConfig(**bad)


@pytest.mark.parametrize("bad", [{"ttft_s": 0.0}, {"itl_s": float("nan")}, {"reserve": 1.0}])
def test_bad_slos_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Slo(**bad)
