"""However an instance ends, its GPU's clock goes back at once: the real lease, a fake driver."""

import asyncio
import threading
import time
from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from jaxsys import nvml
from jaxsys.model import preset
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy import governor as governor_module
from jaxsys.serve.energy.governors import Served, real_governor
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler

SERVED = Served(model=preset("llama-3-8b"))


class ToyExecutor:
    """Draws ones; a test says what becomes of the next iteration."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.going = threading.Event()
        self.going.set()

    def dispatch(self, iteration):
        return len(iteration.sampling)

    def collect(self, handle):
        self.going.wait(30)
        if self.fault is not None:
            raise self.fault
        return Sampled([1] * handle, None)

    def release(self):
        return []

    def rebuild(self):
        raise JaxRuntimeError("the device does not answer")


def make(policy="ecofreq") -> Any:
    """An instance that governs the fake GPU, decoding one long request."""
    clocks = nvml.open_clocks(0, control=True, heartbeat_s=0.03, lease_s=0.2)
    governor = real_governor(clocks, "Fake H100", SERVED, SharedSlo(), policy)
    scheduler = Scheduler(
        SchedulerConfig(page_count=2000, max_length=30_000, max_batch=4, decode_buckets=(4,))
    )
    instance = Instance(
        "decode-0",
        scheduler,
        ToyExecutor(),
        governor=governor,
        clock=WallClock(),
        sink=lambda events: None,
    )
    instance.submit(
        Request(
            "r",
            sampling=SamplingParameters(max_tokens=20_000),
            arrival_s=time.monotonic(),
            prompt_tokens=[1, 2, 3],
        )
    )
    return instance


def locked(driver, wanted: bool, timeout_s: float = 20.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while (driver.locked_mhz != 0) != wanted:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.002)
    return True


def stop(instance):
    assert instance.stop(10)


def fail(instance):
    instance.executor.fault = ValueError("a fault of the host")


def device_fault(instance):
    instance.executor.fault = JaxRuntimeError("INTERNAL: a fault of the device")


def retire(instance):
    async def run():
        engine = Engine(clock=WallClock(), max_requests=9)
        engine.add(instance, decodes=False)
        instance.abort("r")
        assert await engine.retire(instance, 5.0)

    asyncio.run(run())


def hang(instance):
    instance.executor.going.clear()


def stopped_while_it_hangs(instance):
    instance.executor.going.clear()
    assert not instance.stop(0.05)


ENDINGS = (stop, fail, device_fault, retire, hang, stopped_while_it_hangs)


def ends(driver, ending, times, monkeypatch, policy="sweet-spot"):
    monkeypatch.setattr(governor_module, "HANG_S", 0.15)
    for _ in range(times):
        instance = make(policy)
        instance.start()
        try:
            assert locked(driver, True)
            ending(instance)
            assert locked(driver, False), f"{ending.__name__}: the clock is still locked"
            time.sleep(0.01)
            assert driver.locked_mhz == 0
        finally:
            instance.executor.going.set()
            instance.stop(10)
        assert driver.locked_mhz == 0
        assert instance.governor.device._lease.helper_pid is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_clock_is_given_back(driver, ending, monkeypatch):
    ends(driver, ending, 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_clock_is_given_back_twenty_times_of_twenty(driver, ending, monkeypatch):
    ends(driver, ending, 20, monkeypatch)


def test_an_instance_that_hung_and_goes_on_has_its_clock_again(driver, monkeypatch):
    monkeypatch.setattr(governor_module, "HANG_S", 0.15)
    instance = make("sweet-spot")
    instance.start()
    try:
        assert locked(driver, True)
        hang(instance)
        assert locked(driver, False)
        instance.executor.going.set()
        assert locked(driver, True) and driver.locked_mhz == 1080
    finally:
        instance.stop(10)
    assert driver.locked_mhz == 0


def test_an_idle_instance_keeps_its_lease(driver, monkeypatch):
    monkeypatch.setattr(governor_module, "HANG_S", 0.6)
    instance = make("sweet-spot")
    instance.start()
    try:
        assert locked(driver, True)
        instance.abort("r")
        deadline_s = time.monotonic() + 1.5
        while time.monotonic() < deadline_s:
            assert driver.locked_mhz == 1080
            time.sleep(0.01)
    finally:
        instance.stop(10)


def test_an_instance_that_never_started_gives_its_clock_back(driver):
    instance = make()
    assert instance.governor.device.can_set
    assert instance.stop(1)
    assert instance.governor.device._lease.helper_pid is None
