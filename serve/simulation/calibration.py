"""The published experiment that the A100 preset is fitted to, and how well it is met.

VoltanaLLM (arXiv 2509.04827) measured four A100-80G, 2 prefill and 2 decode instances of
Llama-3.1-8B, prompts and outputs of LMSYS-Chat-1M, Poisson arrivals for 120 s, at static 1410 and
1005 MHz. Its length sample, its SLO and its engine's overheads are not published with it, so these
were fitted, once, to both clocks at all rates together:

    prompt lengths lognormal, mean 46, sigma 0.94   output lengths lognormal, mean 168, sigma 0.715
    TTFT <= 600 ms, ITL <= 60 ms (the code's 45 ms, and ten times it, with its 35 % margin: 61, 608)
    A100 preset: matrix efficiency, host, turn, request and sequence times, four power constants

Fitting is not predicting: what the fit never saw is the governed run, which
`jaxsys.serve.simulation.replay` simulates and the study compares with the published governed
figures.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from jaxsys.errors import UsageError
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.simulation.replay import POLICIES, Setting, setting, simulate
from jaxsys.serve.simulation.simulator import ReplayResult
from jaxsys.serve.simulation.traces import Trace, synthetic_trace

SLO = Slo(ttft_s=0.6, itl_s=0.06, reserve=0.05)
RUN_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One published rate; None where the plot could not be read."""

    rate_per_s: float
    energy_j: dict[str, float | None]
    """By "1410", "1005" and "governed"."""
    ttft_attainment_pct: dict[str, float | None]

    @property
    def saving_pct(self) -> float | None:
        """The published controller's saving against 1410 MHz."""
        top, governed = self.energy_j["1410"], self.energy_j["governed"]
        return None if top is None or governed is None else 100 * (1 - governed / top)


def published(path: str | Path) -> list[Point]:
    """Reads the digitised figures (read off a plot, within about 1 %)."""
    columns = {"1410": "sglang_1410MHz", "1005": "sglang_1005MHz", "governed": "voltanallm"}
    by_rate: dict[float, dict[str, dict[str, float | None]]] = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                values = {k: float(row[c]) if row[c] else None for k, c in columns.items()}
                by_rate.setdefault(float(row["rps"]), {})[row["metric"]] = values
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} is not the published figures' table: {error}") from None
    empty: dict[str, float | None] = dict.fromkeys(columns)
    points = []
    for rate, metrics in sorted(by_rate.items()):
        energy = metrics.get("energy", empty)
        points.append(
            Point(
                rate_per_s=rate,
                energy_j={k: None if v is None else v * 1e5 for k, v in energy.items()},
                ttft_attainment_pct=metrics.get("ttft_attain", empty),
            )
        )
    return points


def lmsys_trace(rate_per_s: float, seed: int = 0) -> Trace:
    """Poisson arrivals of the fitted length distribution for 120 s."""
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise UsageError(f"rate={rate_per_s} must be positive")
    return synthetic_trace(
        rate_per_s=rate_per_s,
        duration_s=RUN_S,
        seed=seed,
        prompt_mean=46,
        prompt_sigma=0.94,
        output_mean=168,
        output_sigma=0.715,
        most_tokens=2300,
        name="lmsys-like",
    )


def scenario(**changes: object) -> Setting:
    """The published installation, governed between its two published clocks."""
    return setting(
        "a100-80g",
        "llama-3-8b",
        prefill=2,
        decode=2,
        slo=SLO,
        clocks_mhz=(1005, 1410),
        max_batch=2048,
        **changes,
    )


def run_static(rate_per_s: float, clock_mhz: int, seed: int = 0) -> ReplayResult:
    """One published static run: 1410 or 1005 MHz."""
    names = {1410: "max", 1005: "sweet-spot"}
    if clock_mhz not in names:
        raise UsageError(f"clock_mhz={clock_mhz} was not published; use 1410 or 1005")
    return simulate(lmsys_trace(rate_per_s, seed), POLICIES[names[clock_mhz]], scenario())
