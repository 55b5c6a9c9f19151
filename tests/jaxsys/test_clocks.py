"""The clock protocol's bodies without a driver: simulated and observe-only."""

import pytest

from jaxsys.clocks import (
    EnergyCounter,
    GpuClocks,
    ObserveOnly,
    SimulatedClocks,
    check_clock,
)
from jaxsys.errors import UsageError

CLOCKS = (1005, 1095, 1200, 1305, 1410)


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(**changes) -> tuple[SimulatedClocks, Time]:
    time = Time()
    return SimulatedClocks(available_mhz=CLOCKS, now_s=time, **changes), time


def test_both_bodies_are_gpu_clocks():
    clocks, _ = simulated()
    assert isinstance(clocks, GpuClocks)
    assert isinstance(ObserveOnly(clocks, "shared GPU"), GpuClocks)


def test_an_ask_takes_effect_after_the_latency():
    clocks, time = simulated(set_latency_s=0.02)
    clocks.set_clock(1005)
    assert (clocks.asked_mhz(), clocks.actual_mhz()) == (1005, 1410)
    assert clocks.next_change() == (0.02, 1005)
    time.now = 0.019
    assert clocks.actual_mhz() == 1410
    time.now = 0.02
    assert clocks.actual_mhz() == 1005
    assert clocks.next_change() is None


def test_of_waiting_commands_only_the_newest_counts():
    clocks, time = simulated(set_latency_s=0.1)
    for mhz in (1005, 1200, 1305):
        clocks.set_clock(mhz)
    time.now = 0.1
    assert clocks.actual_mhz() == 1005  # was under way
    time.now = 0.2
    assert clocks.actual_mhz() == 1305  # 1200 was never sent


def test_zero_latency_is_at_once():
    clocks, _ = simulated(set_latency_s=0.0)
    clocks.set_clock(1200)
    assert clocks.actual_mhz() == 1200
    clocks.reset()
    assert (clocks.asked_mhz(), clocks.actual_mhz()) == (None, 1410)


def test_a_clamp_shows_in_the_clock_and_in_the_reasons():
    clocks, _ = simulated(set_latency_s=0.0, clamp_mhz=1200)
    clocks.set_clock(1410)
    assert clocks.actual_mhz() == 1200
    assert clocks.throttle_reasons() == {"power_cap"}
    clocks.set_clock(1005)
    assert clocks.throttle_reasons() == frozenset()


def test_energy_adds_up_and_steps_as_asked():
    clocks, time = simulated(counter_step_s=0.1)
    assert clocks.energy_j() == 0.0
    clocks.spend(0.05, 400.0)
    time.now = 0.05
    assert clocks.energy_j() == 0.0  # the counter has not stepped yet
    time.now = 0.1
    assert clocks.energy_j() == pytest.approx(20.0)
    assert clocks.power_w() == 400.0


def test_an_unlisted_clock_is_refused_and_the_nearest_named():
    clocks, _ = simulated()
    with pytest.raises(UsageError, match="1000 is not a clock.*1005..1410.*nearest is 1005"):
        clocks.set_clock(1000)
    with pytest.raises(UsageError, match="lists no clocks"):
        check_clock(1000, ())


def test_observe_only_reads_but_never_sets():
    inner, _ = simulated(set_latency_s=0.0)
    watched = ObserveOnly(inner, "no permission")
    watched.set_clock(1005)
    assert (inner.actual_mhz(), watched.actual_mhz()) == (1410, 1410)
    assert (watched.wished_mhz, watched.ignored_asks, watched.can_set) == (1005, 1, False)
    with pytest.raises(UsageError):
        watched.set_clock(7)


def test_energy_counter_survives_wraps_and_restarts():
    wrapping = EnergyCounter(modulus_mj=1000)
    assert [wrapping.update(r) for r in (900, 950, 20)] == [0.0, 0.05, pytest.approx(0.12)]
    restarted = EnergyCounter()
    assert [restarted.update(r) for r in (900, 950, 20)] == [0.0, 0.05, pytest.approx(0.07)]
    assert restarted.restarts == 1


@pytest.mark.parametrize("bad", [{"available_mhz": ()}, {"set_latency_s": -1.0}])
def test_bad_simulations_are_refused(bad):
    with pytest.raises(UsageError):
        SimulatedClocks(**({"available_mhz": CLOCKS, "now_s": Time()} | bad))
