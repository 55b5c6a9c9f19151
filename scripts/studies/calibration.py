"""The published experiment that the A100 preset is fitted to, and lines of it that were kept back.

VoltanaLLM (arXiv 2509.04827) measured A100-80G as 2P2D under its SGLang 0.4.7, Poisson arrivals for
120 s, at static 1410 and 1005 MHz: lines of a model and a data set over the rate. Of the engine's
mechanisms those that its code shows are modelled (`ENGINES["sglang-0.4.7"]`): a first token leaves
the decode instance, whose loop takes a request in between two steps, and no request is taken in
unless 512 tokens of cache stay free for each that decodes. So first tokens come late when decoding
is behind, which prompts of 80 tokens alone would never explain.

Fitted, to both clocks of the two Llama-3.1-8B lines together: one set of engine and GPU constants,
and one length distribution a data set (the samples are not published; ShareGPT's mean prompt is).
The bounds are the code's 45 ms, and ten times it, with its margin of 35 %. Nothing else of a line
is known to `run_static`: another model is predicted from its shape.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import (
    ServedShape,
    SimulatedGpu,
    engine_spec,
    gpu_spec,
    served_shape,
)
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.simulation.comparison import Setting, simulate
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.policies import Policy
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.traces import RequestTrace

SLO = Slo(ttft_s=0.6, itl_s=0.06, reserve=0.05)
RUN_S = 120.0
CLOCKS_MHZ = (1410, 1005)
STATIC = {
    1410: Policy(clock="max", route="round-robin", prompts="random"),
    1005: Policy(clock="sweet-spot", route="round-robin", prompts="random"),
}
"""As the published balancer sends requests where its own router does not: prompts to any instance
at random whatever the policy (`select_pair` of its `echo_lb.py`), decode in turn (`--policy rr` of
its `router.sh`; its authors set EcoRoute beside round robin)."""
PERCENTS = (50, 90, 99)
READABLE_PCT = (20.0, 98.0)
"""Attainments between which a prediction in points says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lognormal lengths of a data set's first turns, as the experiment drew them."""

    prompt_mean: float
    prompt_sigma: float
    output_mean: float
    output_sigma: float
    most_tokens: int


DATASETS: dict[str, Lengths] = {
    "lmsys": Lengths(
        prompt_mean=75, prompt_sigma=1.1, output_mean=150, output_sigma=1.2, most_tokens=2000
    ),
    "sharegpt": Lengths(
        prompt_mean=250, prompt_sigma=1.0, output_mean=173, output_sigma=1.45, most_tokens=2000
    ),
}
"""Fitted; ShareGPT's mean prompt is the published code's own figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants of engine and GPU as a fit to one line alone has them."""

    engine: Mapping[str, float]
    """Fields of `EngineSpec`."""
    gpu: Mapping[str, float]
    """Fields of `GpuSpec`."""


OTHER_LINE_FITS: dict[str, Fit] = {
    # Fitted to LMSYS alone, which does not tell how many steps a first token waits.
    "sharegpt": Fit(
        engine={
            "host_s": 0.0056,
            "request_s": 0.00043,
            "kv_bytes_per_cycle": 614.0,
            "activation_values": 13.6,
            "first_token_steps": 0.0,
        },
        gpu={
            "flops_per_cycle": 221_184 * 0.867,
            "idle_w": 35.0,
            "clock_w": 30.0,
            "busy_w": 42.8,
            "compute_w": 40.0,
            "memory_w": 145.0,
            "voltage_slope": 1.0,
        },
    ),
    # Fitted to ShareGPT alone.
    "lmsys": Fit(
        engine={
            "host_s": 0.0076,
            "request_s": 0.00066,
            "kv_bytes_per_cycle": 636.0,
            "activation_values": 5.0,
            "first_token_steps": 3.86,
        },
        gpu={
            "flops_per_cycle": 221_184 * 0.875,
            "idle_w": 35.0,
            "clock_w": 30.0,
            "busy_w": 44.6,
            "compute_w": 40.0,
            "memory_w": 150.0,
            "voltage_slope": 1.0,
        },
    ),
}
"""By the data set that each is to predict: what a fit to the other line gives. Lengths are the data
set's own, as in `DATASETS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One published line: a model on a data set."""

    model: str
    dataset: str
    table: str
    """File of its digitised figures."""


FITTED: tuple[Line, ...] = (
    Line(model="llama-3-8b", dataset="lmsys", table="voltanallm_llama8b_lmsys.csv"),
    Line(model="llama-3-8b", dataset="sharegpt", table="voltanallm_llama8b_sharegpt.csv"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One published rate; None where the plot could not be read."""

    rate_per_s: float
    energy_j: dict[str, float | None]
    """By "1410", "1005" and "governed"."""
    ttft_attainment_pct: dict[str, float | None]
    itl_attainment_pct: dict[str, float | None]

    @property
    def saving_pct(self) -> float | None:
        """The published controller's saving against 1410 MHz."""
        top, governed = self.energy_j["1410"], self.energy_j["governed"]
        return None if top is None or governed is None else 100 * (1 - governed / top)

    @property
    def headroom_pct(self) -> float | None:
        """Its saving as a share of what static 1005 MHz saves."""
        low, saving = self.energy_j["1005"], self.saving_pct
        if low is None or saving is None:
            return None
        top = self.energy_j["1410"]
        assert top is not None
        return saving / (1 - low / top)

    @property
    def ttft_lost_points(self) -> float | None:
        """By how much fewer first tokens than 1410 MHz the published controller had in time."""
        top, governed = self.ttft_attainment_pct["1410"], self.ttft_attainment_pct["governed"]
        return None if top is None or governed is None else top - governed


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

    def shares(values: dict[str, float | None]) -> dict[str, float | None]:
        # Markers read a little above the axis are at it.
        return {k: None if v is None else min(v, 100.0) for k, v in values.items()}

    points = []
    for rate, metrics in sorted(by_rate.items()):
        energy = metrics.get("energy", empty)
        points.append(
            Point(
                rate_per_s=rate,
                energy_j={k: None if v is None else v * 1e5 for k, v in energy.items()},
                ttft_attainment_pct=shares(metrics.get("ttft_attain", empty)),
                itl_attainment_pct=shares(metrics.get("itl_attain", empty)),
            )
        )
    return points


def unpublished(rate_per_s: float) -> Point:
    """A rate of which nothing is known."""
    empty: dict[str, float | None] = {"1410": None, "1005": None, "governed": None}
    return Point(
        rate_per_s=rate_per_s, energy_j=empty, ttft_attainment_pct=empty, itl_attainment_pct=empty
    )


def dataset_trace(
    dataset: str, rate_per_s: float, seed: int = 0, *, cv: float = 1.0, duration_s: float = RUN_S
) -> RequestTrace:
    """Arrivals of a data set's lengths; gaps are gamma with coefficient of variation `cv`."""
    if dataset not in DATASETS:
        raise UsageError(f"dataset={dataset!r} is not known; use one of {', '.join(DATASETS)}")
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise UsageError(f"rate={rate_per_s} must be positive")
    lengths = DATASETS[dataset]
    return synthetic_trace(
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        seed=seed,
        prompt_mean=lengths.prompt_mean,
        prompt_sigma=lengths.prompt_sigma,
        output_mean=lengths.output_mean,
        output_sigma=lengths.output_sigma,
        most_tokens=lengths.most_tokens,
        cv=cv,
        name=f"{dataset}-like",
    )


def scenario(
    model: str | ServedShape = "llama-3-8b",
    *,
    slo: Slo = SLO,
    fit: Fit | None = None,
    **changes: object,
) -> Setting:
    """The published installation with a model, governed between its two published clocks.

    Args:
        fit: other constants than the presets'.
        changes: fields of `Setting` or `ClusterConfig`.
    """
    shape = served_shape(model) if isinstance(model, str) else model
    spec, engine = gpu_spec("a100-80g"), engine_spec("sglang-0.4.7")
    if fit is not None:
        spec, engine = replace(spec, **fit.gpu), replace(engine, **fit.engine)
    gpu = SimulatedGpu(spec, shape, engine)
    own = {k: changes.pop(k) for k in list(changes) if k in Setting.__slots__}
    return Setting(
        **{
            "gpu": gpu,
            "cluster": ClusterConfig(
                gpu=gpu,
                prefill_instances=2,
                decode_instances=2,
                max_batch=2048,
                **changes,  # type: ignore[arg-type]
            ),
            "slo": slo,
            "clocks_mhz": tuple(sorted(CLOCKS_MHZ)),
            **own,
        }
    )


def run_static(
    dataset: str,
    rate_per_s: float,
    clock_mhz: int,
    seed: int = 0,
    *,
    model: str | ServedShape = "llama-3-8b",
    slo: Slo = SLO,
    fit: Fit | None = None,
) -> ReplayResult:
    """One published static run: 1410 or 1005 MHz."""
    if clock_mhz not in STATIC:
        raise UsageError(f"clock_mhz={clock_mhz} was not published; use 1410 or 1005")
    trace = dataset_trace(dataset, rate_per_s, seed)
    return simulate(trace, STATIC[clock_mhz], scenario(model, slo=slo, fit=fit))


def static_rows(
    line: Line,
    points: Sequence[Point],
    *,
    seeds: Sequence[int] = (3,),
    model: str | ServedShape | None = None,
    slo: Slo = SLO,
    fit: Fit | None = None,
) -> list[dict[str, float | None]]:
    """Each rate at each clock: predicted, published where it is, and the error."""
    rows = []
    for point in points:
        for clock in CLOCKS_MHZ:
            runs = [
                run_static(
                    line.dataset,
                    point.rate_per_s,
                    clock,
                    seed,
                    model=model or line.model,
                    slo=slo,
                    fit=fit,
                )
                for seed in seeds
            ]
            found: dict[str, float | None] = {
                "energy_j": float(np.mean([run.energy_j for run in runs])),
                "ttft_attainment_pct": 100
                * float(np.mean([run.ttft_attainment(slo.ttft_s) for run in runs])),
                "itl_attainment_pct": 100
                * float(np.mean([run.itl_attainment(slo.itl_s) for run in runs])),
            }
            row = {"rate_per_s": point.rate_per_s, "clock_mhz": float(clock), **found}
            for percent in PERCENTS:  # so that other bounds than `slo` may be judged
                row[f"ttft_p{percent}_ms"] = 1e3 * float(
                    np.mean([np.percentile(run.ttft_s, percent) for run in runs])
                )
                row[f"itl_p{percent}_ms"] = 1e3 * float(
                    np.mean([run.itl_percentile(percent) for run in runs])
                )
            for key, value in found.items():
                known = getattr(point, key)[str(clock)]
                row[f"published_{key}"] = known
                error = None
                if known is not None and value is not None:
                    error = 100 * (value / known - 1) if key == "energy_j" else value - known
                row[f"{key}_error"] = error
            rows.append(row)
    return rows


def errors_of(rows: Sequence[dict[str, float | None]]) -> dict[str, float | int | None]:
    """What matters of a line: energy, the ratio of the two clocks, attainments where readable."""
    found: dict[str, float | int | None] = {}
    energy = [abs(row["energy_j_error"]) for row in rows if row["energy_j_error"] is not None]
    found["energy_points"] = len(energy)
    found["energy_error_median_pct"] = float(np.median(energy)) if energy else None
    found["energy_error_worst_pct"] = max(energy, default=None)
    ratios = []
    by_rate: dict[float | None, list[dict[str, float | None]]] = {}
    for row in rows:
        by_rate.setdefault(row["rate_per_s"], []).append(row)
    for pair in by_rate.values():
        energies = {row["clock_mhz"]: row for row in pair}
        low, top = energies.get(1005.0), energies.get(1410.0)
        if low is None or top is None:
            continue
        values = [r[k] for k in ("energy_j", "published_energy_j") for r in (low, top)]
        if None not in values:
            a, b, c, d = values  # type: ignore[misc]
            ratios.append(100 * (a / b / (c / d) - 1))  # type: ignore[operator]
    found["ratio_points"] = len(ratios)
    found["ratio_error_median_pct"] = float(np.median(np.abs(ratios))) if ratios else None
    found["ratio_error_worst_pct"] = max(map(abs, ratios), default=None)
    low_pct, high_pct = READABLE_PCT
    for key in ("ttft_attainment_pct", "itl_attainment_pct"):
        misses = [
            abs(row[f"{key}_error"] or 0.0)
            for row in rows
            if row[f"published_{key}"] is not None
            and low_pct <= (row[f"published_{key}"] or 0.0) <= high_pct
        ]
        name = key.removesuffix("_attainment_pct")
        found[f"{name}_points"] = len(misses)
        found[f"{name}_error_median_points"] = float(np.median(misses)) if misses else None
        found[f"{name}_error_worst_points"] = max(misses, default=None)
        found[f"{name}_within_10_points"] = sum(miss <= 10 for miss in misses)
    return found
