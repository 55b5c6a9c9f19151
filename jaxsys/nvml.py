"""GPU clocks, power and energy as governors see them: read without waiting, and set as a lease.

A locked clock outlives the process that locked it. So this process never sets one: a helper
(`jaxsys.nvml_lease`) holds the lock, and gives it back when this process exits, crashes, is killed
or stops sending heartbeats.

Nothing is set unless `control=True`. Where control is asked for but cannot be had (no permission,
MIG, vGPU, unknown clocks), the GPU is observed only, and `reason` says why in one line.

`jaxsys clocks show` and `jaxsys clocks reset` are the command line of it.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pynvml

from jaxsys.clocks import ClockError, GpuClocks, GroupClocks, ObserveOnly, check_clock
from jaxsys.errors import RunError
from jaxsys.nvml_gpu import NvmlGpu, start_nvml
from jaxsys.nvml_lease import Lease
from jaxsys.options import Parser

logger = logging.getLogger(__name__)


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
        self._closed = False
        self._closing = threading.Lock()
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
        lease = self._lease
        return lease is not None and not (self._lost or self._closed or lease.fault)

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

    def heed(self, alive: Callable[[], bool]) -> None:
        if self._lease is not None:
            self._lease.alive = alive

    def close(self) -> None:
        """Gives the clock back, then stops reading. A second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._asked_mhz = None
        if self._lease is not None:
            self._lease.close()
        self._stop.set()
        self._thread.join(timeout=5.0)
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


def open_group(gpus: Sequence[int | str], *, control: bool = False) -> GpuClocks:
    """The GPUs of one instance as one: governed where all of them can be, else observed.

    Raises:
        RunError: where there is no driver.
        UsageError: where there is no such GPU.
    """
    if len(gpus) == 1:
        return open_clocks(gpus[0], control=control)
    members: list[GpuClocks] = []
    try:
        for gpu in gpus:
            members.append(open_clocks(gpu, control=control))
        group = GroupClocks(members)
        if not control or group.can_set:
            return group
        # One that keeps its own clock would hold the others up: then none is set.
        reason = group.reason
        group.close()
        members = []
        for gpu in gpus:
            members.append(open_clocks(gpu))
        return ObserveOnly(GroupClocks(members), reason)
    except BaseException:
        for member in members:
            member.close()
        raise


# --- command line -----------------------------------------------------------------------------


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys clocks show|reset`."""
    parser = Parser(prog=prog, description="Read or reset GPU clocks.")
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
