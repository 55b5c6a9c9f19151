"""What answers a policy's what-ifs: a learned predictor (`ecopred`), or a modelled GPU itself."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, run_many

Answers = Sequence[Sequence[float]] | np.ndarray
"""Numbers indexed [load][clock]."""


class Predictor(Protocol):
    """Answers what-ifs: how long, and at what power."""

    def what_if(self, loads: Sequence[Load], clocks_mhz: Sequence[int]) -> tuple[Answers, Answers]:
        """Seconds and watts, each indexed [load][clock], from one batched evaluation."""
        ...

    def observe(self, load: Load, clock_mhz: float, time_s: float, power_w: float | None) -> None:
        """Learns from what really happened."""
        ...

    def close(self) -> None:
        """Ends what it runs of its own."""
        ...


class ModelPredictor:
    """A predictor that asks a `SimulatedGpu`: exact in simulation, and free of training.

    `scale` multiplies its times, for studies of prediction error.
    """

    def __init__(self, gpu: SimulatedGpu, *, scale: float = 1.0) -> None:
        self.gpu = gpu
        self.scale = scale

    def what_if(
        self, loads: Sequence[Load], clocks_mhz: Sequence[int]
    ) -> tuple[list[list[float]], list[list[float]]]:
        if len(loads) * len(clocks_mhz) > 12:  # where arrays begin to pay
            time_s, power_w = run_many(self.gpu, loads, clocks_mhz)
            return (time_s * self.scale).tolist(), power_w.tolist()
        times: list[list[float]] = []
        powers: list[list[float]] = []
        for load in loads:
            outcomes = [self.gpu.run(load, mhz) for mhz in clocks_mhz]
            times.append([outcome.time_s * self.scale for outcome in outcomes])
            powers.append([outcome.power_w for outcome in outcomes])
        return times, powers

    def observe(self, load: Load, clock_mhz: float, time_s: float, power_w: float | None) -> None:
        return

    def close(self) -> None:
        return
