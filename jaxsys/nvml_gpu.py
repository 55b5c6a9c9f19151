"""One NVIDIA GPU through its driver's management library (nvidia-ml-py), read and locked directly.

Reading needs no rights; locking a clock needs root or CAP_SYS_ADMIN, and outlives the process.
"""

from collections.abc import Callable
from typing import Any

import pynvml

from jaxsys.clocks import (
    ClockError,
    ClockPermissionError,
    EnergyCounter,
    GpuLostError,
    check_clock,
)
from jaxsys.errors import RunError, UsageError

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
