"""GPU clocks, power and energy through NVIDIA's management library (nvidia-ml-py).

Reading needs no rights; setting needs root or CAP_SYS_ADMIN, and a lock outlives the process that
set it. So this process never sets: a helper (`jaxsys.nvml_lease`) holds the lock as a lease and
gives it back when this process exits, crashes, is killed or stops sending heartbeats.

Nothing is set unless `control=True`. Where control is asked for but cannot be had (no permission,
MIG, vGPU, unknown clocks), the GPU is observed only, and `reason` says why in one line.

`jaxsys clocks show` and `jaxsys clocks reset` are the command line of it.
"""

import argparse
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pynvml

from jaxsys.clocks import (
    ClockError,
    ClockPermissionError,
    EnergyCounter,
    GpuClocks,
    GpuLostError,
    ObserveOnly,
    check_clock,
)
from jaxsys.errors import RunError, UsageError
from jaxsys.nvml_lease import Lease

logger = logging.getLogger(__name__)

THROTTLE_REASONS = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware_slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware_thermal",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power_brake",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
}
"""Reasons that lower the clock. Idleness and the lock itself are states, not throttling."""


def _code(error: pynvml.NVMLError) -> int:
    # The binding sets `value` in __new__, where type checkers do not look.
    return int(getattr(error, "value", pynvml.NVML_ERROR_UNKNOWN))


def typed_error(error: pynvml.NVMLError, what: str) -> ClockError:
    """The error of this project for an NVML error code."""
    code = _code(error)
    text = f"{what}: {error}"
    if code == pynvml.NVML_ERROR_NO_PERMISSION:
        return ClockPermissionError(f"{text}; setting clocks needs root or CAP_SYS_ADMIN")
    if code in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED):
        return GpuLostError(f"{text}; the GPU must be reset or the machine restarted")
    return ClockError(text)


def start_nvml() -> None:
    """Loads the driver's library; counted, so call `pynvml.nvmlShutdown` as often.

    Raises:
        RunError: where there is no NVIDIA driver.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise RunError(f"NVML cannot start: {error}; is an NVIDIA driver installed?") from None


class NvmlGpu:
    """One GPU, read directly: each method is one driver call (0.01 to 20 ms)."""

    def __init__(self, gpu: int | str) -> None:
        """
        Args:
            gpu: index or UUID.
        """
        start_nvml()
        try:
            if isinstance(gpu, int):
                count = pynvml.nvmlDeviceGetCount()
                if not 0 <= gpu < count:
                    raise UsageError(f"gpu={gpu} does not exist; this machine has {count} GPU(s)")
                self._handle: Any = pynvml.nvmlDeviceGetHandleByIndex(gpu)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
            self.name = str(pynvml.nvmlDeviceGetName(self._handle))
            self.uuid = str(pynvml.nvmlDeviceGetUUID(self._handle))
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            if _code(error) in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                raise UsageError(f"gpu={gpu!r} does not exist on this machine") from None
            raise typed_error(error, f"gpu {gpu}") from None
        except UsageError:
            pynvml.nvmlShutdown()
            raise
        self.available_mhz = self._supported_clocks()
        self._counter = EnergyCounter()
        self._closed = False

    def _supported_clocks(self) -> tuple[int, ...]:
        memory = self._read(pynvml.nvmlDeviceGetSupportedMemoryClocks, self._handle)
        if not memory:
            return ()
        clocks = self._read(pynvml.nvmlDeviceGetSupportedGraphicsClocks, self._handle, max(memory))
        return tuple(sorted(set(clocks or ())))

    def _read(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """One reading; None where this GPU does not offer it."""
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            if _code(error) in (
                pynvml.NVML_ERROR_NOT_SUPPORTED,
                pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                pynvml.NVML_ERROR_NO_PERMISSION,
            ):
                return None
            raise typed_error(error, self.name) from None

    def why_no_control(self) -> str:
        """Why clocks cannot be set here, permission aside; empty where they can."""
        mig = self._read(pynvml.nvmlDeviceGetMigMode, self._handle)
        if mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            return "MIG is enabled: the clock belongs to all its slices"
        mode = self._read(pynvml.nvmlDeviceGetVirtualizationMode, self._handle)
        if mode == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
            return "this is a vGPU: the clock belongs to the host"
        if not self.available_mhz:
            return "the driver lists no clocks for this GPU"
        return ""

    def actual_mhz(self) -> int | None:
        return self._read(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM)

    def power_w(self) -> float | None:
        """On recent GPUs a one-second average."""
        milliwatts = self._read(pynvml.nvmlDeviceGetPowerUsage, self._handle)
        return None if milliwatts is None else milliwatts / 1000.0

    def energy_j(self) -> float | None:
        """Steps about every 100 ms: differences over less than seconds mean little."""
        millijoules = self._read(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else self._counter.update(int(millijoules))

    def power_limit_w(self) -> float | None:
        milliwatts = self._read(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)
        return None if milliwatts is None else milliwatts / 1000.0

    def throttle_reasons(self) -> frozenset[str]:
        bits = self._read(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle)
        if bits is None:  # drivers before 535 know the older name
            bits = self._read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._handle)
        return frozenset(name for bit, name in THROTTLE_REASONS.items() if (bits or 0) & bit)

    def lock(self, clock_mhz: int) -> None:
        """Locks the SM clock. It stays locked when the process ends: use a lease instead."""
        check_clock(clock_mhz, self.available_mhz)
        try:
            pynvml.nvmlDeviceSetGpuLockedClocks(self._handle, clock_mhz, clock_mhz)
        except pynvml.NVMLError as error:
            raise typed_error(error, f"{self.name}: locking {clock_mhz} MHz") from None

    def unlock(self) -> None:
        """Returns the clock to the GPU's own rule."""
        try:
            pynvml.nvmlDeviceResetGpuLockedClocks(self._handle)
        except pynvml.NVMLError as error:
            raise typed_error(error, f"{self.name}: resetting the clock") from None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            pynvml.nvmlShutdown()


class NvmlClocks:
    """`GpuClocks` over a real GPU: readings come from a polling thread, setting from a lease.

    So neither costs the caller more than microseconds. Where the GPU is lost, readings become
    None, `can_set` False and `reason` says so; nothing is raised into the caller's loop.
    """

    def __init__(
        self,
        gpu: NvmlGpu,
        lease: Lease | None = None,
        *,
        poll_s: float = 0.05,
    ) -> None:
        self._gpu = gpu
        self._lease = lease
        self.reason = "" if lease is not None else "clock control was not asked for"
        self._asked_mhz: int | None = None
        self._readings: dict[str, Any] = {}
        self._lost = False
        self._stop = threading.Event()
        self._poll()
        self._thread = threading.Thread(
            target=self._poll_until_stopped, args=(poll_s,), name="nvml-poll", daemon=True
        )
        self._thread.start()

    @property
    def name(self) -> str:
        return self._gpu.name

    @property
    def available_mhz(self) -> tuple[int, ...]:
        return self._gpu.available_mhz

    @property
    def can_set(self) -> bool:
        return self._lease is not None and not self._lost and not self._lease.fault

    def set_clock(self, clock_mhz: int) -> None:
        check_clock(clock_mhz, self.available_mhz)
        if self._lease is None or not self.can_set:
            return
        self._asked_mhz = clock_mhz
        self._lease.set_clock(clock_mhz)

    def asked_mhz(self) -> int | None:
        return self._asked_mhz if self.can_set else None

    def actual_mhz(self) -> int | None:
        return self._readings.get("actual_mhz")

    def power_w(self) -> float | None:
        return self._readings.get("power_w")

    def energy_j(self) -> float | None:
        return self._readings.get("energy_j")

    def throttle_reasons(self) -> frozenset[str]:
        return self._readings.get("throttle_reasons", frozenset())

    def reset(self) -> None:
        self._asked_mhz = None
        if self._lease is not None:
            self._lease.reset()

    def close(self) -> None:
        """Gives the lease back and stops reading."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        if self._lease is not None:
            self._lease.close()
        self._gpu.close()

    def _poll(self) -> None:
        gpu = self._gpu
        try:
            self._readings = {
                "actual_mhz": gpu.actual_mhz(),
                "power_w": gpu.power_w(),
                "energy_j": gpu.energy_j(),
                "throttle_reasons": gpu.throttle_reasons(),
            }
        except ClockError as error:
            self._readings = {}
            if not self._lost:
                self._lost = True
                self.reason = str(error)
                logger.error("%s; its clock is no longer governed", error)
        if self._lease is not None and self._lease.fault and not self._lost:
            self.reason = self._lease.fault

    def _poll_until_stopped(self, poll_s: float) -> None:
        while not self._stop.wait(poll_s):
            self._poll()


def open_clocks(
    gpu: int | str = 0,
    *,
    control: bool = False,
    alive: Callable[[], bool] | None = None,
    heartbeat_s: float = 0.5,
    lease_s: float = 2.0,
) -> GpuClocks:
    """The best body for a real GPU: governed through a lease where possible, else observed.

    Args:
        gpu: index or UUID.
        control: the user's explicit wish that clocks be set.
        alive: asked before each heartbeat; the lease lapses while it says False.
        lease_s: silence after which the helper gives the clock back.

    Raises:
        RunError: where there is no driver.
        UsageError: where there is no such GPU.
    """
    device = NvmlGpu(gpu)
    if not control:
        return NvmlClocks(device)
    reason = device.why_no_control()
    if not reason:
        lease = Lease(device.uuid, alive=alive, heartbeat_s=heartbeat_s, lease_s=lease_s)
        reason = lease.start()
        if not reason:
            return NvmlClocks(device, lease)
    logger.warning("%s: clocks are observed, not set: %s", device.name, reason)
    return ObserveOnly(NvmlClocks(device), reason)


# --- command line -----------------------------------------------------------------------------


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys clocks show|reset`."""
    parser = argparse.ArgumentParser(prog=prog, description="Read or reset GPU clocks.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="clocks, power and energy of each GPU")
    reset = commands.add_parser("reset", help="return locked clocks to the GPU's own rule")
    for command in (show, reset):
        command.add_argument("--gpu", help="index or UUID; all GPUs if not given")
    arguments = parser.parse_args(argv)
    start_nvml()
    try:
        chosen: list[int | str]
        if arguments.gpu is None:
            chosen = list(range(pynvml.nvmlDeviceGetCount()))
        else:
            chosen = [int(arguments.gpu) if arguments.gpu.isdigit() else arguments.gpu]
        if not chosen:
            raise RunError("the driver sees no GPU")
        for gpu in chosen:
            device = NvmlGpu(gpu)
            try:
                print(describe(device) if arguments.command == "show" else _unlock(device))
            finally:
                device.close()
    finally:
        pynvml.nvmlShutdown()
    return 0


def describe(device: NvmlGpu) -> str:
    """A few lines on one GPU."""
    clocks = device.available_mhz
    span = f"{clocks[0]}..{clocks[-1]} MHz, {len(clocks)} steps" if clocks else "none listed"
    power_w, limit_w, energy = device.power_w(), device.power_limit_w(), device.energy_j()
    unread = "not offered by this GPU"
    return "\n".join(
        [
            f"{device.name}  {device.uuid}",
            f"  SM clock   {_shown(device.actual_mhz(), 'MHz') or unread}",
            f"  settable   {span}",
            f"  control    {device.why_no_control() or 'possible, given root or CAP_SYS_ADMIN'}",
            f"  power      {_shown(power_w, 'W') or unread} of {_shown(limit_w, 'W') or '?'}",
            f"  energy     {'counter present' if energy is not None else unread}",
            f"  throttled  {', '.join(sorted(device.throttle_reasons())) or 'no'}",
        ]
    )


def _shown(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.0f} {unit}"


def _unlock(device: NvmlGpu) -> str:
    device.unlock()
    return f"{device.name}  {device.uuid}: clock returned to the GPU's own rule"
