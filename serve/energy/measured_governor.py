"""EcoFreq over a real GPU: its clock governed or only watched, its energy read, never modelled.

The driver's energy counter steps about every 0.1 s, coarser than an iteration, so a request's share
of an iteration is the power last read times the iteration's latency; the instance's total is the
counter itself. The two agree over seconds, not over single requests.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.serve.energy.ecofreq import EcoFreq, GovernorRecord, ModelPredictor, share_energy
from jaxsys.serve.energy.gpu_model import GPUS, GpuSpec, ServedShape, SimulatedGpu
from jaxsys.serve.energy.slo import SharedSlo

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration


class MeasuredGovernor:
    """Reads a GPU's energy; chooses its clock too, where the GPU is one whose costs are known."""

    def __init__(self, clocks: GpuClocks, shape: ServedShape, slo: SharedSlo) -> None:
        self.clocks = clocks
        spec = spec_of(clocks.name)
        self.inner: EcoFreq | None = None
        if spec is not None and all(mhz in clocks.available_mhz for mhz in spec.control_mhz):
            predictor = ModelPredictor(SimulatedGpu(spec, shape))
            self.inner = EcoFreq(clocks, predictor, slo, clocks_mhz=spec.control_mhz)
        setting = "set" if clocks.can_set else f"not set ({clocks.reason})"
        self.method = (
            f"measured: {clocks.name}'s energy counter; a request's share by power and iteration "
            f"time; clock {setting}"
        )

    @property
    def record(self) -> GovernorRecord | None:
        return None if self.inner is None else self.inner.record

    @property
    def clock_mhz(self) -> float | None:
        """The clock asked for, or the one the GPU runs at where none is set."""
        asked_mhz = self.clocks.asked_mhz()
        return self.clocks.actual_mhz() if asked_mhz is None else asked_mhz

    def energy_j(self) -> float | None:
        """Energy since the clocks were opened; None where the GPU has no counter."""
        return self.clocks.energy_j()

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        if self.inner is not None and self.clocks.can_set:
            self.inner.before_iteration(iteration, waiting, now_s)

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        power_w = self.clocks.power_w()
        if power_w is not None:
            share_energy(iteration, power_w * latency_s)
        if self.inner is not None and self.clocks.can_set:
            self.inner.after_iteration(iteration, latency_s, now_s)


def spec_of(name: str) -> GpuSpec | None:
    """The preset for what a GPU calls itself, e.g. "NVIDIA H100 80GB HBM3"."""
    for key, spec in GPUS.items():
        if key.partition("-")[0].upper() in name.upper().replace("-", " ").split():
            return spec
    return None
