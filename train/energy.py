"""Energy of the GPUs that this process trains on, from NVML, where there is one."""

import os
import time
from collections.abc import Sequence
from typing import Any

from jaxsys.errors import RunError, UsageError
from jaxsys.nvml import NvmlGpu

LEAST_INTERVAL_S = 1.0
"""NVML's counter steps, and a reading may take milliseconds: not more often than this."""


class EnergyMeter:
    """Joules since the start, over this process's GPUs.

    Attributes:
        reason: why there is no reading; "" where there is.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        self.reason = ""
        self._gpus: list[NvmlGpu] = []
        self._last: tuple[float, float] | None = None
        self._start_j: float | None = None
        if not devices or devices[0].platform != "gpu":
            self.reason = "no GPU whose energy could be read"
            return
        try:
            self._gpus = [NvmlGpu(_nvml_name(device.local_hardware_id)) for device in devices]
        except (RunError, UsageError) as error:
            self.reason = str(error)
            return
        self._start_j = self._total()
        if self._start_j is None:
            self.reason = f"{self._gpus[0].name} has no energy counter"

    def restart(self) -> None:
        """Counts from now on."""
        if self._start_j is not None:
            self._start_j, self._last = self._total(), None

    def read_j(self) -> float | None:
        """Joules since the start, at most `LEAST_INTERVAL_S` old; None where unknown."""
        if self._start_j is None:
            return None
        now = time.monotonic()
        if self._last is None or now - self._last[0] >= LEAST_INTERVAL_S:
            total = self._total()
            if total is None:
                return None
            self._last = (now, total - self._start_j)
        return self._last[1]

    def close(self) -> None:
        """Lets go of the driver."""
        for gpu in self._gpus:
            gpu.close()

    def _total(self) -> float | None:
        readings = [gpu.energy_j() for gpu in self._gpus]
        known = [reading for reading in readings if reading is not None]
        return sum(known) if len(known) == len(readings) else None


def _nvml_name(local: int) -> int | str:
    """The NVML index or UUID of the process's n-th visible GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if local < len(visible) and visible[local].strip():
        entry = visible[local].strip()
        return int(entry) if entry.isdigit() else entry
    return local
