"""The energy counter as a curve: steps of 100 ms must not end up in the answer."""

import time

import pytest

from jaxsys.serve.energy.energy_log import EnergyLog


def test_energy_between_two_moments_is_told_finer_than_the_counter_steps():
    began_s = time.perf_counter()

    def read_j() -> float:  # 500 W, shown every 100 ms
        return 500.0 * (int((time.perf_counter() - began_s) * 10) / 10)

    log = EnergyLog(read_j)
    try:
        time.sleep(0.25)
        start_s = time.perf_counter()
        time.sleep(0.35)
        end_s = time.perf_counter()
        energy_j = log.between(start_s, end_s)
        # Steps are seen when they are read, every 10 ms and now and then later on a busy machine.
        assert energy_j == pytest.approx(500 * (end_s - start_s), rel=0.2)
        assert log.between(began_s - 1, end_s) is None  # before it was watched
    finally:
        log.close()


def test_a_counter_that_is_not_there_or_stands_still_says_nothing():
    for read_j in (lambda: None, lambda: 7.0):
        log = EnergyLog(read_j)
        now_s = time.perf_counter()
        assert log.between(now_s - 0.1, now_s - 0.9) is None
        log.close()
