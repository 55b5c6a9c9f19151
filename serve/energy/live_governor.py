"""EcoFreq on a real GPU: governed through NVML, or observed where nothing may be set.

Energy is the GPU's own counter, idle time included; a request's part of it is the power read while
its iterations ran, shared by tokens, because the counter steps only every 100 ms. Predictions begin
from a profile of this GPU and model, or else from the modelled GPU of the same kind, and follow
what is observed (`EcoPred`).
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig, GovernorRecord, share_energy
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu
from jaxsys.serve.energy.profile import Fingerprint, Profile, simulated_profile, spread_over_clocks
from jaxsys.serve.energy.slo import SharedSlo

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration

logger = logging.getLogger(__name__)

LOOK_S = 0.005
"""How often the watchdog looks up: no iteration is late sooner than `EcoFreqConfig.watchdog_s`."""
QUIET_S = 0.5
"""Time without a deadline after which it sleeps until there is one."""


class Watchdog:
    """Calls `alarm` from a thread of its own once a deadline passes unless it is moved or lifted.

    While there is work the thread looks up every `LOOK_S`, so setting a deadline wakes nobody. One
    set nearer than that may ring so much late.
    """

    def __init__(self, alarm: Callable[[], None], *, now_s: Callable[[], float]) -> None:
        self._alarm = alarm
        self._now_s = now_s
        self._deadline_s: float | None = None
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="clock-watchdog", daemon=True)
        self._thread.start()

    def expect(self, deadline_s: float) -> None:
        """Something must be done by `deadline_s`."""
        self._deadline_s = deadline_s
        if not self._wake.is_set():  # first after a long quiet
            self._wake.set()

    def lift(self) -> None:
        """It was done."""
        self._deadline_s = None

    def close(self) -> None:
        """Ends the thread."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        quiet_s = 0.0
        while not self._stopped:
            deadline_s = self._deadline_s
            if deadline_s is None:
                quiet_s += LOOK_S
                if quiet_s > QUIET_S:
                    self._wake.clear()
                    if self._deadline_s is None and not self._stopped:
                        self._wake.wait()
                    quiet_s = 0.0
                else:
                    time.sleep(LOOK_S)
                continue
            quiet_s = 0.0
            left_s = deadline_s - self._now_s()
            if left_s > 0:
                time.sleep(min(left_s, LOOK_S))
            elif self._deadline_s == deadline_s:  # neither moved nor lifted meanwhile
                self._deadline_s = None
                self._alarm()


class LiveGovernor:
    """EcoFreq for an instance on a real GPU. Call it from the instance's thread alone."""

    def __init__(
        self,
        clocks: GpuClocks,
        gpu: SimulatedGpu,
        slo: SharedSlo,
        *,
        profile: Profile | None = None,
        fingerprint: Fingerprint | None = None,
        config: EcoFreqConfig | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            gpu: the modelled GPU of this kind with the served model: sweet spot, clocks, and what
                predictions begin from where there is no profile.
            profile: measured here; refused where its fingerprint is not `fingerprint`.

        Raises:
            UsageError: if the profile is of another GPU, model or engine.
        """
        if profile is not None and fingerprint is not None:
            fingerprint.check(profile.fingerprint)
        chosen = control_clocks(clocks.available_mhz, gpu)
        source = simulated_profile(gpu, clocks_mhz=chosen)
        if profile is not None:
            source = spread_over_clocks(profile, gpu, chosen)
        predictor = EcoPred(source, clocks_mhz=chosen, background=True)
        self.clocks = clocks
        self.inner = EcoFreq(clocks, predictor, slo, clocks_mhz=chosen, config=config)
        self.method = (
            "measured: the GPU's energy counter (steps of about 100 ms), idle included; requests "
            "share the power read during their iterations by tokens"
        )
        if not clocks.can_set:
            self.method += f"; clocks are observed, not set: {clocks.reason}"
        self._now_s = now_s
        self._first_j = clocks.energy_j()
        self._ended_s = now_s()
        self._working = 0
        # Where no clock can be set there is nothing to boost.
        self._watchdog = Watchdog(self._late, now_s=now_s) if clocks.can_set else None
        warn_unmeetable(gpu, slo)

    @property
    def record(self) -> GovernorRecord:
        return self.inner.record

    @property
    def clock_mhz(self) -> int:
        """The clock the governor wants; the GPU runs at it only where clocks can be set."""
        return self.inner.clock_mhz

    def energy_j(self) -> float | None:
        """Energy since the governor was made; None where the GPU has no counter."""
        if not self._working:
            self.inner.on_idle(self._now_s(), self._ended_s)
        now_j = self.clocks.energy_j()
        if now_j is None:
            return None
        if self._first_j is None:
            self._first_j = now_j
        return now_j - self._first_j

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        self.inner.before_iteration(iteration, waiting, now_s)
        self._working += 1
        if self._watchdog is not None and self._working == 1:
            self._watchdog.expect(now_s + self.inner.patience_s(max(1, iteration.steps)))

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        if self._watchdog is not None:
            self._watchdog.lift()
        self._working -= 1
        self._ended_s = now_s
        self.inner.after_iteration(iteration, latency_s, now_s)
        power_w = self.clocks.power_w()
        if power_w is not None:
            share_energy(iteration, power_w * latency_s)
        if self._watchdog is not None and self._working:  # the next one began when this one ended
            self._watchdog.expect(now_s + self.inner.patience_s(1))

    def close(self) -> None:
        """Ends the watchdog and gives the clock back."""
        if self._watchdog is not None:
            self._watchdog.close()
        self.clocks.close()

    def _late(self) -> None:
        # On the watchdog's thread: only the clock is touched, which takes asks from any thread.
        # The overrun itself is counted when the iteration ends.
        if self.clocks.can_set:
            self.clocks.set_clock(self.inner.top_mhz)


def control_clocks(available_mhz: tuple[int, ...], gpu: SimulatedGpu) -> tuple[int, ...]:
    """The modelled GPU's control clocks, each moved to the nearest the real one lists."""
    if not available_mhz:
        return gpu.spec.control_mhz
    if available_mhz[-1] < gpu.spec.sweet_spot_mhz:
        raise UsageError(
            f"this GPU's clocks end at {available_mhz[-1]} MHz, below the sweet spot of "
            f"{gpu.spec.name} ({gpu.spec.sweet_spot_mhz} MHz); choose the preset of its kind"
        )
    nearest = {
        min(available_mhz, key=lambda mhz, want=want: abs(mhz - want))
        for want in gpu.spec.control_mhz
    }
    return tuple(sorted(nearest | {available_mhz[-1]}))


def warn_unmeetable(gpu: SimulatedGpu, slo: SharedSlo) -> None:
    """Says once, at the start, which bound a lone short request breaks at the maximum clock."""
    top_mhz = gpu.spec.max_mhz
    for name, bound_s, what, load in (
        ("ITL", slo.current.itl_s, "one sequence", Load(batch=1, kv_tokens=1)),
        ("TTFT", slo.current.ttft_s, "one token", Load(prefill_tokens=1, prefill_requests=1)),
    ):
        alone_s = gpu.run(load, top_mhz).time_s
        if alone_s > bound_s:
            logger.warning(
                "%s of %.1f ms cannot be met: %s alone takes about %.1f ms at %d MHz of %s; "
                "served at the maximum clock",
                name,
                bound_s * 1e3,
                what,
                alone_s * 1e3,
                top_mhz,
                gpu.spec.name,
            )
