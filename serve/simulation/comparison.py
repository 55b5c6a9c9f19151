"""Replays of policies side by side.

All of a comparison's policies see the same trace, the same simulated GPUs and the same SLO; savings
are stated against the static maximum clock, with the attainment of both beside them, and energy
counts idle instances.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, simulated_gpu
from jaxsys.serve.energy.predictors import ModelPredictor, Predictor
from jaxsys.serve.energy.profile import simulated_profile
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS, Situation
from jaxsys.serve.energy.sleep import SleepConfig
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.policies import (
    Policy,
    check_limit,
    check_policies,
    policy_named,
    routers_of,
)
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.traces import RequestTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything a comparison holds fixed."""

    gpu: SimulatedGpu
    cluster: ClusterConfig
    slo: Slo
    clocks_mhz: tuple[int, ...]
    """The governed clocks; the lowest is the sweet spot."""
    predictor: Literal["model", "ecopred"] = "ecopred"
    predictor_scale: float = 1.0
    """Multiplies predicted times: an error put in on purpose. "ecopred" may learn it away."""
    clock_options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the clock policy's own."""
    quick_prefill: bool = True
    """Route prompts to the earliest predicted first token instead of in turn (policies with a
    router only)."""


def setting(
    gpu: str = "a100-80g",
    model: str = "llama-3-8b",
    *,
    prefill: int = 2,
    decode: int = 2,
    engine: str = "jaxsys",
    slo: Slo | None = None,
    clocks_mhz: Sequence[int] | None = None,
    **changes: Any,
) -> Setting:
    """A setting from names, with any field of `Setting` or `ClusterConfig` changed."""
    simulated = simulated_gpu(gpu, model, engine)
    own = {k: changes.pop(k) for k in list(changes) if k in Setting.__slots__}
    return Setting(
        gpu=simulated,
        cluster=ClusterConfig(
            gpu=simulated, prefill_instances=prefill, decode_instances=decode, **changes
        ),
        slo=slo or Slo(),
        clocks_mhz=tuple(clocks_mhz or simulated.spec.control_mhz),
        **own,
    )


def make_predictor(setting: Setting) -> Predictor:
    """The setting's predictor: exact, or trained on a noisy sweep of the simulated GPU."""
    if setting.predictor == "model":
        return ModelPredictor(setting.gpu, scale=setting.predictor_scale)
    clocks = sorted({*setting.clocks_mhz, setting.gpu.spec.max_mhz})
    profile = simulated_profile(setting.gpu, clocks_mhz=clocks, noise=0.02)
    if setting.predictor_scale != 1.0:
        samples = [replace(s, time_s=s.time_s * setting.predictor_scale) for s in profile.samples]
        profile = replace(profile, samples=samples)
    return EcoPred(profile)


def simulate(
    trace: RequestTrace,
    policy: Policy,
    setting: Setting,
    *,
    predictor: Callable[[], Predictor] | None = None,
    sample_every_s: float | None = None,
) -> ReplayResult:
    """Replays `trace` under one policy.

    Args:
        predictor: makes the setting's, fresh; trained here where None.
    """
    if policy.cap_w is not None:
        setting = _capped(setting, policy.cap_w)
    if policy.sleeps and setting.cluster.sleep is None:
        setting = replace(setting, cluster=replace(setting.cluster, sleep=SleepConfig()))
    slo = SharedSlo(setting.slo)
    # One for all: the instances are alike, and each learns from the others' iterations.
    one_predictor = functools.cache(predictor or functools.partial(make_predictor, setting))
    situation = Situation(
        gpu=setting.gpu,
        slo=slo,
        clocks_mhz=tuple(sorted(setting.clocks_mhz)),
        top_mhz=setting.gpu.spec.max_mhz,
        predictor=one_predictor,
        prefill_budget=setting.cluster.max_prefill_tokens,
        options=setting.clock_options,
    )
    prompts, decode = routers_of(policy, quick=setting.quick_prefill)
    return Simulator(
        trace,
        setting.cluster,
        make_policy=lambda role: CLOCK_POLICIES.make(policy.clock, situation),
        clocks_mhz=situation.clocks_mhz,
        prefill_router=ROUTERS.make(prompts, situation),
        decode_router=ROUTERS.make(decode, situation),
        sample_every_s=sample_every_s,
        slo=slo,
    ).run()


def _capped(setting: Setting, cap_w: float) -> Setting:
    """The setting with GPUs whose power is limited: the driver lowers the clock until it holds."""
    gpu = setting.gpu
    check_limit(cap_w, gpu)
    limited = SimulatedGpu(replace(gpu.spec, power_cap_w=cap_w), gpu.shape, gpu.engine)
    return replace(setting, gpu=limited, cluster=replace(setting.cluster, gpu=limited))


def figures(result: ReplayResult, slo: Slo) -> dict[str, float]:
    """Flat, named figures of one replay."""
    return {
        "energy_j": result.energy_j,
        "energy_j_per_token": result.energy_per_token_j,
        "energy_j_per_request": result.energy_per_request_j,
        "idle_energy_pct": 100 * result.idle_j / result.energy_j,
        "ttft_attainment_pct": 100 * result.ttft_attainment(slo.ttft_s),
        "itl_attainment_pct": 100 * result.itl_attainment(slo.itl_s),
        "tpot_attainment_pct": 100 * result.tpot_attainment(slo.itl_s),
        "ttft_p50_ms": 1e3 * float(np.percentile(result.ttft_s, 50)),
        "ttft_p99_ms": 1e3 * float(np.percentile(result.ttft_s, 99)),
        "itl_p50_ms": 1e3 * result.itl_percentile(50),
        "itl_p99_ms": 1e3 * result.itl_percentile(99),
        "duration_s": result.duration_s,
        "requests": result.requests,
        "output_tokens": result.output_tokens,
        "clock_changes": result.clock_changes,
        "infeasible_decisions": result.infeasible,
        "overruns": result.overruns,
        "preemptions": result.preemptions,
        "asleep_instance_s": result.asleep_s,
        "wakes": result.wakes,
        "prefix_hit_pct": 100 * result.prefix_hits,
        "wall_s": result.wall_s,
    }


def compare(
    trace: RequestTrace,
    setting: Setting,
    policies: Sequence[str],
    *,
    sample_every_s: float | None = None,
    trained: Callable[[], Predictor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Replays every policy, the static maximum always first, and states savings against it.

    Args:
        trained: gives the setting's predictor, which is left as it is; trained here where None.
    """
    check_policies(policies, [setting.gpu])
    names = ["max", *(name for name in policies if name != "max")]
    rows: dict[str, dict[str, Any]] = {}
    learnt = trained or functools.cache(functools.partial(make_predictor, setting))
    for name in names:
        result = simulate(
            trace,
            policy_named(name),
            setting,
            predictor=lambda: copy.deepcopy(learnt()),  # each policy learns for itself
            sample_every_s=sample_every_s,
        )
        row: dict[str, Any] = dict(figures(result, setting.slo))
        base = rows.get("max", row)
        row["energy_saving_pct"] = 100 * (1 - row["energy_j"] / base["energy_j"])
        row["clock_seconds"] = {
            role: {str(mhz): round(seconds, 3) for mhz, seconds in histogram.items()}
            for role, histogram in result.clock_seconds.items()
        }
        if result.series:
            row["series"] = result.series
        rows[name] = row
    return rows


def unmeetable(trace: RequestTrace, setting: Setting) -> list[str]:
    """Bounds that no clock can meet even for one request alone; empty if all can be met."""
    gpu, slo = setting.gpu, setting.slo
    longest = int(np.max(trace.prompt_tokens))
    median = int(np.median(trace.prompt_tokens))
    complaints = []
    alone_s = gpu.run(Load(batch=1, kv_tokens=median), gpu.spec.max_mhz).time_s
    if alone_s > slo.itl_s:
        complaints.append(
            f"ITL of {slo.itl_s * 1e3:.0f} ms cannot be met: one sequence alone takes "
            f"{alone_s * 1e3:.1f} ms at {gpu.spec.max_mhz} MHz; served at the maximum clock"
        )
    for length, what in ((median, "the median prompt"), (longest, "the longest prompt")):
        need_s = gpu.run(Load(prefill_tokens=length, prefill_requests=1), gpu.spec.max_mhz).time_s
        if need_s > slo.ttft_s:
            complaints.append(
                f"TTFT of {slo.ttft_s * 1e3:.0f} ms cannot be met for {what} ({length} tokens): "
                f"it takes {need_s * 1e3:.0f} ms alone at {gpu.spec.max_mhz} MHz; served at the "
                f"maximum clock"
            )
            break
    return complaints


def record(
    rows: dict[str, dict[str, Any]], setting: Setting, trace: RequestTrace, *, too_long: int = 0
) -> dict[str, Any]:
    """The result file's content, as `jaxsys.results.write_result` takes it.

    Args:
        too_long: requests that were left out of `trace`.
    """
    best = max(
        (n for n in rows if n != "max"), key=lambda n: rows[n]["energy_saving_pct"], default="max"
    )
    flat = [
        {"policy": name, **{k: v for k, v in row.items() if not isinstance(v, dict)}}
        for name, row in rows.items()
    ]
    return {
        "benchmark": "replay",
        "kind": "simulated",
        "config": {
            "simulated_gpu": setting.gpu.spec.name,
            "extrapolated": setting.gpu.spec.extrapolated,
            "gpus_per_instance": setting.gpu.gpus,
            "model": setting.gpu.shape.name,
            "prefill_instances": setting.cluster.prefill_instances,
            "decode_instances": setting.cluster.decode_instances,
            "slo_ttft_ms": setting.slo.ttft_s * 1e3,
            "slo_itl_ms": setting.slo.itl_s * 1e3,
            "slo_reserve": setting.slo.reserve,
            "clocks_mhz": list(setting.clocks_mhz),
            "set_latency_ms": setting.cluster.set_latency_s * 1e3,
            "predictor": setting.predictor,
            "trace": trace.name,
            "requests": len(trace),
            "requests_too_long": too_long,
            "rate_per_s": trace.rate_per_s if math.isfinite(trace.rate_per_s) else None,
        },
        "rows": flat,
        "energy_saving_pct": rows[best]["energy_saving_pct"],
        "best_policy": best,
        "policies": rows,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The comparison as text."""
    head = (
        f"{'policy':<12}{'J/token':>9}{'J/request':>11}{'saving':>9}{'TTFT ok':>9}{'ITL ok':>8}"
        f"{'TTFT p99':>10}{'ITL p99':>9}{'idle':>7}"
    )
    hits = any(row["prefix_hit_pct"] for row in rows.values())
    head += f"{'hits':>8}" if hits else ""
    lines = [head, "-" * len(head)]
    for name, row in rows.items():
        lines.append(
            f"{name:<12}{row['energy_j_per_token']:>9.3f}{row['energy_j_per_request']:>11.1f}"
            f"{row['energy_saving_pct']:>8.1f}%{row['ttft_attainment_pct']:>8.1f}%"
            f"{row['itl_attainment_pct']:>7.1f}%{row['ttft_p99_ms']:>8.0f}ms"
            f"{row['itl_p99_ms']:>7.1f}ms{row['idle_energy_pct']:>6.1f}%"
            + (f"{row['prefix_hit_pct']:>7.1f}%" if hits else "")
        )
    return "\n".join(lines)
