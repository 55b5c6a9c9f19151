"""Clock control through the real nvidia-ml-py against a fake driver with injected faults."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxsys import cli, nvml
from jaxsys.clocks import (
    ClockError,
    ClockPermissionError,
    EnergyCounter,
    GpuClocks,
    GpuLostError,
    ObserveOnly,
)
from jaxsys.errors import UsageError

NO_PERMISSION, LOST, NOT_SUPPORTED = 4, 15, 3


def wait_until(condition, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def clocks(driver):
    opened = nvml.open_clocks(0, control=True, heartbeat_s=0.05, lease_s=0.5)
    yield opened
    opened.close()


# --- readings ---------------------------------------------------------------------------------


def test_readings_in_si_units(driver):
    driver.power_mw, driver.reasons = 350_500, 0x4 | 0x1
    clocks = nvml.open_clocks("GPU-fake-0001")
    try:
        assert isinstance(clocks, GpuClocks)
        assert clocks.name == "Fake H100"
        assert clocks.available_mhz[0] == 345 and clocks.available_mhz[-1] == 1980
        assert (clocks.actual_mhz(), clocks.power_w()) == (1980, 350.5)
        assert clocks.throttle_reasons() == {"power_cap"}
        assert not clocks.can_set and "not asked" in clocks.reason
        clocks.set_clock(1080)  # without control nothing reaches the driver
        assert driver.sets == driver.resets == 0
    finally:
        clocks.close()


def test_a_missing_counter_is_none_not_zero(driver):
    driver.energy_error = NOT_SUPPORTED
    gpu = nvml.NvmlGpu(0)
    assert gpu.energy_j() is None and gpu.power_w() == 400.0
    gpu.close()


def test_drivers_with_the_older_name_for_reasons(driver):
    driver.legacy, driver.reasons = 1, 0x40
    gpu = nvml.NvmlGpu(0)
    assert gpu.throttle_reasons() == {"hardware_thermal"}
    gpu.close()


def test_a_counter_that_steps_every_100_ms_and_wraps(driver):
    driver.energy_step_ms = 100
    driver.energy_modulus_mj = 60_000  # at 400 W wraps every 150 ms
    gpu = nvml.NvmlGpu(0)
    gpu._counter = EnergyCounter(modulus_mj=60_000)
    seen = [gpu.energy_j() or 0.0]
    start = time.monotonic()
    while time.monotonic() - start < 0.6:
        seen.append(gpu.energy_j() or 0.0)
        time.sleep(0.005)
    assert seen == sorted(seen)
    assert len(set(seen)) <= 9  # steps, not a slope
    assert seen[-1] == pytest.approx(400 * 0.6, abs=400 * 0.11)
    gpu.close()


def test_no_driver_no_gpu(driver):
    with pytest.raises(UsageError, match=r"gpu=7 does not exist; this machine has 1"):
        nvml.NvmlGpu(7)
    with pytest.raises(UsageError, match="'GPU-nothing' does not exist"):
        nvml.NvmlGpu("GPU-nothing")
    driver.init_error = 9
    with pytest.raises(RuntimeError, match="NVML cannot start"):
        nvml.NvmlGpu(0)


def test_errors_are_typed(driver):
    gpu = nvml.NvmlGpu(0)
    driver.set_error = NO_PERMISSION
    with pytest.raises(ClockPermissionError, match="CAP_SYS_ADMIN"):
        gpu.lock(1080)
    driver.set_error = 999
    with pytest.raises(ClockError, match="locking 1080"):
        gpu.lock(1080)
    driver.read_error = LOST
    with pytest.raises(GpuLostError, match="must be reset"):
        gpu.actual_mhz()
    with pytest.raises(UsageError, match="1081 is not a clock"):
        gpu.lock(1081)
    gpu.close()


# --- control ----------------------------------------------------------------------------------


def test_set_and_reset_through_the_helper(driver, clocks):
    assert clocks.can_set and clocks.reason == ""
    clocks.set_clock(1080)
    assert wait_until(lambda: driver.locked_mhz == 1080)
    assert clocks.asked_mhz() == 1080
    assert wait_until(lambda: clocks.actual_mhz() == 1080)
    clocks.reset()
    assert wait_until(lambda: driver.locked_mhz == 0)
    assert clocks.asked_mhz() is None
    with pytest.raises(UsageError, match="nearest is 1080"):
        clocks.set_clock(1081)


@pytest.mark.parametrize("delay_ms", [3, 20, 200])
def test_slow_sets_never_delay_the_caller_and_only_the_newest_counts(driver, clocks, delay_ms):
    driver.set_delay_us = delay_ms * 1000
    times = []
    for step in range(60):
        start = time.thread_time()
        clocks.set_clock(1080 + 15 * step)
        times.append(time.thread_time() - start)
    assert sorted(times)[len(times) // 2] < 0.5e-3
    assert wait_until(lambda: driver.locked_mhz == 1080 + 15 * 59)
    if delay_ms == 200:
        assert driver.sets < 30  # most were overtaken while one was under way


def test_a_clamped_clock_shows(driver, clocks):
    driver.clamp_mhz, driver.reasons = 1200, 0x20
    clocks.set_clock(1980)
    assert wait_until(lambda: clocks.actual_mhz() == 1200)
    assert clocks.asked_mhz() == 1980
    assert clocks.throttle_reasons() == {"thermal"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"set_error": NO_PERMISSION}, "CAP_SYS_ADMIN"),
        ({"set_error": NOT_SUPPORTED}, "resetting the clock"),
        ({"mig": 1}, "MIG is enabled"),
        ({"vgpu": 1}, "vGPU"),
        ({"no_clocks": 1}, "lists no clocks"),
    ],
)
def test_where_control_cannot_be_had_the_gpu_is_observed(driver, caplog, fault, reason):
    for name, value in fault.items():
        setattr(driver, name, value)
    clocks = nvml.open_clocks(0, control=True)
    try:
        assert isinstance(clocks, ObserveOnly)
        assert reason in clocks.reason and not clocks.can_set
        assert clocks.actual_mhz() == 1980
        assert driver.sets == 0
        warnings = [record for record in caplog.records if "observed, not set" in record.message]
        assert len(warnings) == 1 and "\n" not in warnings[0].message
    finally:
        clocks.close()


def test_a_lost_gpu_ends_control_without_an_exception(driver, clocks):
    clocks.set_clock(1080)
    assert wait_until(lambda: driver.locked_mhz == 1080)
    driver.read_error = driver.set_error = LOST
    assert wait_until(lambda: not clocks.can_set)
    assert clocks.actual_mhz() is None and clocks.power_w() is None
    assert "lost" in clocks.reason.lower()
    clocks.set_clock(1095)  # ignored, not raised


# --- the lease --------------------------------------------------------------------------------

SERVER = """
import sys, time
from jaxsys import nvml
clocks = nvml.open_clocks(0, control=True, heartbeat_s=0.05, lease_s={lease_s})
assert clocks.can_set, clocks.reason
clocks.set_clock(1080)
print("locked", flush=True)
{then}
"""


def start_server(then: str, lease_s: float = 30.0) -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(then=then, lease_s=lease_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None and server.stdout.readline() == b"locked\n"
    return server


@pytest.mark.parametrize("ending", ["exit", "exception", "os._exit", "SIGTERM", "SIGKILL"])
def test_the_clock_is_given_back_however_the_server_ends(driver, ending):
    then = {
        "exit": "time.sleep(0.3)",
        "exception": "time.sleep(0.3); raise ValueError",
        "os._exit": "import os; time.sleep(0.3); os._exit(1)",
    }.get(ending, "time.sleep(60)")
    server = start_server(then)
    assert wait_until(lambda: driver.locked_mhz == 1080)
    if ending.startswith("SIG"):
        server.send_signal(getattr(signal, ending))
    server.communicate(timeout=30)
    assert wait_until(lambda: driver.locked_mhz == 0)
    assert driver.resets >= 2  # at the start, and at the end


def test_the_clock_is_given_back_when_the_heartbeat_stops(driver):
    server = start_server("time.sleep(60)", lease_s=0.5)
    try:
        assert wait_until(lambda: driver.locked_mhz == 1080)
        server.send_signal(signal.SIGSTOP)  # hangs: the pipe stays open, nothing comes
        assert wait_until(lambda: driver.locked_mhz == 0)
    finally:
        server.kill()
        server.communicate(timeout=30)


def test_a_server_that_makes_no_progress_loses_the_lease_and_gets_it_back(driver):
    working = True
    clocks = nvml.open_clocks(0, control=True, alive=lambda: working, heartbeat_s=0.02, lease_s=0.2)
    try:
        clocks.set_clock(1080)
        assert wait_until(lambda: driver.locked_mhz == 1080)
        working = False
        assert wait_until(lambda: driver.locked_mhz == 0)
        working = True  # as it was, without being asked again
        assert wait_until(lambda: driver.locked_mhz == 1080)
        clocks.set_clock(1095)
        assert wait_until(lambda: driver.locked_mhz == 1095)
        clocks.reset()
        assert wait_until(lambda: driver.locked_mhz == 0)
        working = False
        time.sleep(0.3)
        working = True
        time.sleep(0.1)
        assert driver.locked_mhz == 0
    finally:
        clocks.close()
    assert driver.locked_mhz == 0


def test_a_killed_helper_leaves_no_lock_and_one_clear_line(driver, clocks, caplog):
    clocks.set_clock(1080)
    assert wait_until(lambda: driver.locked_mhz == 1080)
    os.kill(clocks._lease.helper_pid, signal.SIGKILL)
    assert wait_until(lambda: driver.locked_mhz == 0)
    assert wait_until(lambda: not clocks.can_set)
    clocks.set_clock(1095)
    assert driver.locked_mhz == 0
    lines = [record for record in caplog.records if "no longer set" in record.message]
    assert len(lines) == 1


def test_the_helper_survives_a_terminal_interrupt(driver, clocks):
    clocks.set_clock(1080)
    assert wait_until(lambda: driver.locked_mhz == 1080)
    os.kill(clocks._lease.helper_pid, signal.SIGINT)
    clocks.set_clock(1095)
    assert wait_until(lambda: driver.locked_mhz == 1095)


# --- command line -----------------------------------------------------------------------------


def test_clocks_show(driver, capsys):
    driver.reasons = 0x4
    assert cli.main(["clocks", "show"]) == 0
    out = capsys.readouterr().out
    assert "Fake H100" in out and "345..1980 MHz" in out and "400 W of 700 W" in out
    assert "power_cap" in out
    assert driver.sets == driver.resets == 0


def test_clocks_reset(driver, capsys):
    driver.locked_mhz = 1080
    assert cli.main(["clocks", "reset", "--gpu", "0"]) == 0
    assert driver.locked_mhz == 0
    assert "own rule" in capsys.readouterr().out
    driver.set_error = NO_PERMISSION
    assert cli.main(["clocks", "reset"]) == 1
    assert "CAP_SYS_ADMIN" in capsys.readouterr().err
    assert cli.main(["clocks", "reset", "--gpu", "GPU-x"]) == 2
