"""The live governor over fake clocks: what it measures, what it sets, and its watchdog."""

import threading
import time

import pytest

from jaxsys.clocks import ObserveOnly, SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import simulated_gpu
from jaxsys.serve.energy.live_governor import (
    LiveGovernor,
    Watchdog,
    control_clocks,
    warn_unmeetable,
)
from jaxsys.serve.energy.profile import Fingerprint, simulated_profile
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Iteration

GPU = simulated_gpu("h100", "llama-3-8b")
PROFILE = simulated_profile(GPU, max_batch=64, max_prefill_tokens=512)


def iteration(index: int = 1, batch: int = 4) -> Iteration:
    decodes = tuple(
        Request(i, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=10)
        for i in range(batch)
    )
    return Iteration(index, (), decodes, (), 0, 0, 100 * batch, batch, 1)


@pytest.fixture
def make():
    made = []

    def build(wrap=lambda clocks: clocks, fingerprint=None) -> LiveGovernor:
        clocks = SimulatedClocks(
            available_mhz=GPU.spec.available_mhz, now_s=time.monotonic, set_latency_s=0.0
        )
        governor = LiveGovernor(
            wrap(clocks), GPU, SharedSlo(Slo()), profile=PROFILE, fingerprint=fingerprint
        )
        made.append(governor)
        return governor

    yield build
    for governor in made:
        governor.close()


def test_energy_is_the_counter_and_requests_share_the_power(make):
    governor = make()
    work = iteration()
    governor.before_iteration(work, (), time.monotonic())
    governor.clocks.spend(0.5, 400.0)
    governor.after_iteration(work, 0.02, time.monotonic())
    assert governor.energy_j() == pytest.approx(200.0)
    assert [r.timing.energy_j for r in work.decodes] == [pytest.approx(400 * 0.02 / 4)] * 4
    assert governor.method.startswith("measured") and "not set" not in governor.method


def test_observed_only_it_says_so_and_sets_nothing(make):
    governor = make(wrap=lambda clocks: ObserveOnly(clocks, "no permission"))
    work = iteration()
    governor.before_iteration(work, (), time.monotonic())
    assert governor.clock_mhz == 1080  # what it would have set
    assert governor.clocks.actual_mhz() == 1980
    assert "observed, not set: no permission" in governor.method
    governor.after_iteration(work, 0.02, time.monotonic())


def test_no_counter_is_none(make):
    class Blind(ObserveOnly):
        def energy_j(self):
            return None

        def power_w(self):
            return None

    governor = make(wrap=lambda clocks: Blind(clocks, "blind"))
    work = iteration()
    governor.before_iteration(work, (), time.monotonic())
    governor.after_iteration(work, 0.02, time.monotonic())
    assert governor.energy_j() is None
    assert work.decodes[0].timing.energy_j is None


def test_the_watchdog_boosts_while_the_iteration_still_runs(make):
    governor = make()
    governor.before_iteration(iteration(), (), time.monotonic())
    assert governor.clocks.actual_mhz() == 1080
    deadline = time.monotonic() + 10
    while governor.clocks.actual_mhz() != 1980 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert governor.clocks.actual_mhz() == 1980


def test_iterations_planned_ahead_are_matched_with_their_own_predictions(make):
    governor = make()
    small, large = iteration(1, batch=1), iteration(2, batch=60)
    governor.before_iteration(small, (), 0.0)
    small_s = governor.inner.predicted_s
    governor.before_iteration(large, (), 0.0)
    assert governor.inner.predicted_s > small_s
    seen = []
    governor.inner.predictor.observe = lambda load, *rest: seen.append(load.batch)
    governor.after_iteration(small, small_s, 0.0)
    governor.after_iteration(large, 0.01, 0.0)
    assert seen == [1, 60]
    assert governor.record.overruns == 0


def test_idle_falls_to_the_lowest_governed_clock(make):
    governor = make()
    governor._ended_s = time.monotonic() - 1.0
    governor.energy_j()
    assert governor.clocks.asked_mhz() == 1080


def test_a_profile_from_elsewhere_is_refused(make):
    with pytest.raises(UsageError, match="engine='simulated' instead of 'jaxsys'"):
        make(fingerprint=Fingerprint(gpu=GPU.spec.name, model="llama-3-8b", engine="jaxsys"))


def test_control_clocks_are_ones_the_gpu_lists():
    assert control_clocks((1005, 1095, 1410, 1990), GPU) == (1095, 1410, 1990)
    assert control_clocks((), GPU) == GPU.spec.control_mhz
    with pytest.raises(UsageError, match="end at 900 MHz, below the sweet spot"):
        control_clocks((300, 900), GPU)


def test_an_itl_no_clock_can_meet_is_said(caplog):
    warn_unmeetable(GPU, SharedSlo(Slo(itl_s=0.001)))
    assert "ITL of 1.0 ms cannot be met" in caplog.text
    caplog.clear()
    warn_unmeetable(GPU, SharedSlo(Slo()))
    assert not caplog.records


def test_a_lifted_or_moved_deadline_raises_no_alarm():
    rung = threading.Event()
    watchdog = Watchdog(rung.set, now_s=time.monotonic)
    watchdog.expect(time.monotonic() + 0.02)
    watchdog.lift()
    assert not rung.wait(0.1)
    watchdog.expect(time.monotonic() + 0.02)
    assert rung.wait(10)
    watchdog.close()
