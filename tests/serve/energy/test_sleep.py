"""Who sleeps and who is woken: spares, rest, and a replay that loses nothing by it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.sleep import Change, SleepConfig, Sleeper
from jaxsys.serve.simulation.comparison import setting, simulate
from jaxsys.serve.simulation.policies import policy_named
from jaxsys.serve.simulation.traces import RequestTrace


def some(*in_flight, asleep=(), waking=()) -> list[Any]:
    return [
        SimpleNamespace(in_flight=count, asleep=i in asleep, waking=i in waking)
        for i, count in enumerate(in_flight)
    ]


def test_the_last_idle_ones_sleep_after_a_while_and_a_spare_stays_awake():
    sleeper = Sleeper(SleepConfig(after_s=10.0, spare=0.5))
    assert sleeper.look(some(4, 0, 0, 0), 0.0) == Change([], [])
    assert sleeper.look(some(4, 0, 1, 0), 6.0) == Change([], [])  # the third has worked since
    assert sleeper.look(some(4, 0, 0, 0), 9.0) == Change([], [])
    assert sleeper.look(some(4, 0, 0, 0), 10.0) == Change([3, 1], [])
    assert sleeper.look(some(4, 0, 0, 0, asleep=(1, 3)), 30.0) == Change([], [])


def test_one_is_woken_as_soon_as_a_spare_is_missing_and_not_twice():
    sleeper = Sleeper(SleepConfig(after_s=10.0, spare=0.5))
    assert sleeper.look(some(1, 1, 0, 0, asleep=(2, 3)), 0.0) == Change([], [2])
    waking = some(1, 1, 0, 0, asleep=(2, 3), waking=(2,))
    assert sleeper.look(waking, 1.0) == Change([], [])
    assert sleeper.look(some(1, 1, 1, 0, asleep=(3,)), 2.0) == Change([], [3])
    # With nobody at work one still waits for whoever comes.
    assert sleeper.look(some(0), 100.0) == Change([], [])


def test_settings_are_checked():
    with pytest.raises(UsageError, match="wake_s=-1"):
        SleepConfig(wake_s=-1)
    with pytest.raises(UsageError, match="look_s=0"):
        SleepConfig(look_s=0)
    assert policy_named("max+sleep").sleeps and not policy_named("max").sleeps
    assert policy_named("ecofreq+energy+sleep").route == "energy"


def test_a_replay_saves_idle_energy_counts_the_wakes_and_loses_no_attainment():
    """Four minutes of little, then one of much."""
    moments = np.concatenate([np.arange(0.0, 240.0, 2.0), 240.0 + np.arange(0.0, 60.0, 0.05)])
    trace = RequestTrace(
        name="steps",
        arrival_s=moments,
        prompt_tokens=np.full(len(moments), 400),
        output_tokens=np.full(len(moments), 40),
    )
    config = SleepConfig(after_s=30.0, wake_s=20.0)
    chosen = setting("h100", prefill=4, decode=4, predictor="model", sleep=config)
    awake = simulate(trace, policy_named("sweet-spot+energy"), setting("h100", prefill=4, decode=4))
    slept = simulate(trace, policy_named("sweet-spot+energy+sleep"), chosen)
    assert awake.asleep_s == 0 and awake.wakes == 0
    # Of each four, two or three sleep for some 200 of 300 s.
    assert 600 < slept.asleep_s < 6 * 300 and slept.wakes >= 1
    for bound_s in (0.2, 0.6):
        assert slept.ttft_attainment(bound_s) >= awake.ttft_attainment(bound_s) - 0.002
    idle_w = chosen.gpu.idle_power_w(chosen.clocks_mhz[0])
    spared_j = slept.asleep_s * (idle_w - chosen.gpu.asleep_power_w)
    woken_w = chosen.gpu.idle_power_w(chosen.gpu.spec.max_mhz) - idle_w
    expected_j = awake.energy_j - spared_j + slept.wakes * config.wake_s * woken_w
    assert slept.energy_j == pytest.approx(expected_j, rel=0.01)
