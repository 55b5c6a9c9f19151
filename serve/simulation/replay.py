"""Policies by name, replays of them side by side, and `jaxsys replay`.

A policy is a clock policy and a router, each by its name in `jaxsys.serve.energy.registry`:
"ecofreq+energy"; a clock policy's name alone routes plainly. All of a comparison's policies see the
same trace, the same simulated GPUs and the same SLO; savings are stated against the static maximum
clock, with the attainment of both beside them, and energy counts idle instances.
"""

import argparse
import copy
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.files import check_writable
from jaxsys.options import Parser, whole
from jaxsys.results import hardware, versions, write_result
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.gpu_model import (
    ENGINES,
    GPUS,
    SHAPES,
    Load,
    ServedShape,
    SimulatedGpu,
    simulated_gpu,
)
from jaxsys.serve.energy.predictors import ModelPredictor, Predictor
from jaxsys.serve.energy.profile import simulated_profile
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS, Situation
from jaxsys.serve.energy.sleep import SleepConfig
from jaxsys.serve.energy.slo import SharedSlo, Slo, add_targets, targets_of
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.traces import RequestTrace, agent_trace, read_trace, synthetic_trace

SLEEPS = "+sleep"
MOST_REQUESTS = 500_000
MOST_INSTANCES = 4096
CARRIED_SHARE = 1 / 3
"""Of the turns of agents that instances carry, how many are asked for where no rate is given: they
come in bursts, and prompts do not always find what is known of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How clocks are set and requests are routed."""

    clock: str
    """Of `CLOCK_POLICIES`."""
    route: str | None = None
    """Of `ROUTERS`, for decode; None routes plainly: prompts in turn, then the fewest requests."""
    prompts: str | None = None
    """Of `ROUTERS`, for prompts; None goes by `Setting.quick_prefill`."""
    cap_w: float | None = None
    """Power limit of each GPU, where that is what holds its clock down."""
    sleeps: bool = False
    """Whether instances that are not needed sleep."""


POLICIES: dict[str, Policy] = {
    "max": Policy(clock="max"),
    "sweet-spot": Policy(clock="sweet-spot"),
    "window": Policy(clock="window"),
    "ecofreq": Policy(clock="ecofreq"),
    "ecoroute": Policy(clock="max", route="ecoroute"),
    "both": Policy(clock="ecofreq", route="ecoroute"),
    "both-energy": Policy(clock="ecofreq", route="energy"),
    "eco": Policy(clock="ecofreq", route="ecoroute", prompts="gather"),
    "ahead": Policy(clock="ahead", route="energy", prompts="gather"),
    "ahead-sleep": Policy(clock="ahead", route="energy", prompts="gather", sleeps=True),
}
"""Those that have a name of their own. `ecoroute` alone: the published router at the maximum clock.
`both-energy`: EcoFreq with the router of least energy increase; `eco`: EcoFreq with the published
router, and prompts gathered; `ahead`: Ahead with the router of least energy increase, and prompts
gathered; `ahead-sleep`: and instances that are not needed sleep."""


def policy_named(name: str) -> Policy:
    """The policy called `name`, or CLOCK+ROUTER, a clock policy alone, or cap-W: the highest clock
    under a power limit of so many watts. With "+sleep" behind it, instances that are not needed
    sleep.

    Raises:
        UsageError: if a part of it is not known.
    """
    if name in POLICIES:
        return POLICIES[name]
    awake = name.removesuffix(SLEEPS)
    if awake != name:
        return replace(policy_named(awake), sleeps=True)
    if name.startswith("cap-") and name[4:].isdecimal():
        return Policy(clock="max", cap_w=float(name[4:]))
    clock, plus, route = name.partition("+")
    route, also, prompts = route.partition("+")
    if clock not in CLOCK_POLICIES:
        known = dict.fromkeys((*POLICIES, *CLOCK_POLICIES))
        raise UsageError(
            f"policy {name!r} is not known{did_you_mean(name, known)}; use one of "
            f"{', '.join(known)}, CLOCK+ROUTER with a "
            f"router of {', '.join(ROUTERS)}, CLOCK+ROUTER+ROUTER with one for prompts behind, or "
            f"cap-WATTS, each with {SLEEPS} or without"
        )
    for given, named in ((plus, route), (also, prompts)):
        if given:
            ROUTERS.check(named)
    return Policy(clock=clock, route=route if plus else None, prompts=prompts if also else None)


def routers_of(policy: Policy, *, quick: bool = True) -> tuple[str, str]:
    """The routers before prompts and before decode.

    Args:
        quick: whether a policy with a router has one for prompts too.
    """
    prompts = "queue" if policy.route is not None and quick else "round-robin"
    return policy.prompts or prompts, policy.route or "fewest"


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
    _check_limit(cap_w, gpu)
    limited = SimulatedGpu(replace(gpu.spec, power_cap_w=cap_w), gpu.shape, gpu.engine)
    return replace(setting, gpu=limited, cluster=replace(setting.cluster, gpu=limited))


def _check_limit(cap_w: float, gpu: SimulatedGpu) -> None:
    """Raises UsageError for a power limit that a GPU cannot have."""
    idle_w = gpu.idle_power_w(gpu.spec.min_mhz) / gpu.gpus
    if not idle_w < cap_w <= gpu.spec.power_cap_w:
        raise UsageError(
            f"policy cap-{cap_w:.0f}: a limit of {cap_w:.0f} W must lie above the {idle_w:.0f} W "
            f"that {gpu.spec.name} idles at and be at most its {gpu.spec.power_cap_w:.0f} W"
        )


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


def check_policies(names: Sequence[str], gpus: Sequence[SimulatedGpu] = ()) -> None:
    """Raises UsageError for a policy's name that is not known, or a power limit that one of `gpus`
    cannot have."""
    for name in names:
        cap_w = policy_named(name).cap_w
        if cap_w is not None:
            for gpu in gpus:
                _check_limit(cap_w, gpu)


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


# --- command line -----------------------------------------------------------------------------


def parse_instances(text: str) -> tuple[int, int]:
    """(2, 2) from "2P2D"."""
    prefill, p, rest = text.upper().partition("P")
    decode, d, tail = rest.partition("D")
    if not (p and d and not tail and prefill.isdigit() and decode.isdigit()):
        raise UsageError(f"instances={text!r} must read like 2P2D or 32P32D")
    if int(prefill) < 1 or int(decode) < 1:
        raise UsageError(f"instances={text!r} needs at least one of each")
    if int(prefill) + int(decode) > MOST_INSTANCES:
        raise UsageError(f"instances={text!r} are too many; {MOST_INSTANCES} at most are simulated")
    return int(prefill), int(decode)


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys replay`."""
    result = Parser(
        prog=prog, description="Replay a request trace on simulated GPUs under energy policies."
    )
    add = result.add_argument
    add(
        "--trace",
        type=Path,
        help="CSV or JSON lines (Azure, Mooncake, BurstGPT or plain; default: a synthetic one)",
    )
    add(
        "--policy",
        default="max,sweet-spot,window,ecofreq,ecoroute,both,both-energy,ahead",
        help=f"comma-separated, of: {', '.join(dict.fromkeys((*POLICIES, *CLOCK_POLICIES)))}, or "
        f"CLOCK+ROUTER, such as window+energy, with a router of {', '.join(ROUTERS)}, and perhaps "
        f"one for prompts behind it: ecofreq+energy+prefix; with {SLEEPS} behind it, instances "
        f"that are not needed sleep (default: %(default)s)",
    )
    add("--gpu", default="h100", help=f"of: {', '.join(GPUS)} (default %(default)s)")
    add("--model", default="llama-3-8b", help=f"of: {', '.join(SHAPES)} (default %(default)s)")
    add("--engine", default="jaxsys", help=f"of: {', '.join(ENGINES)} (default %(default)s)")
    add("--instances", default="2P2D", help="such as 32P32D (default %(default)s)")
    add(
        "--rate",
        type=float,
        dest="rate_per_s",
        metavar="RATE",
        help="mean requests a second (default: the trace's own, or 10)",
    )
    add(
        "--duration",
        type=float,
        dest="duration_s",
        metavar="S",
        help="seconds of arrivals to replay (default: the whole trace, or 120)",
    )
    add_targets(add)
    add(
        "--predictor",
        choices=("ecopred", "model"),
        default="ecopred",
        help="learnt from a noisy profile, or exact (default %(default)s)",
    )
    add(
        "--host-pages-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="host memory of each instance that reads prompts, for pages that its GPU has no room "
        "to keep (default: none)",
    )
    add("--out", type=Path, help="folder for replay.json and plots")
    add("--json", action="store_true", help="print the record instead of the table")
    synthetic = result.add_argument_group("without --trace")
    add = synthetic.add_argument
    add("--prompt-mean", type=float, help="tokens (default 250)")
    add("--output-mean", type=float, help="tokens (default 215)")
    add("--cv", type=float, help="burstiness; 1, the default, is Poisson")
    add("--seed", type=whole(0), help="default 0")
    agents = result.add_argument_group("sessions of agents, without --trace")
    agents.add_argument(
        "--agents",
        type=whole(most=100_000),
        metavar="SESSIONS",
        help="so many sessions of some --turns turns, each prompt longer by what came since; "
        "--rate is of turns (default: a third of what the instances carry), --prompt-mean 140000 "
        "and --output-mean 440 unless given",
    )
    agents.add_argument("--turns", type=whole(most=10_000), help="default 40")
    agents.add_argument(
        "--known-share", type=float, help="of a prompt, from the turn before (default 0.96)"
    )
    agents.add_argument(
        "--common-tokens", type=whole(0), help="that all sessions begin with (default 16000)"
    )
    return result


OF_AGENTS = {"turns": 40, "known_share": 0.96, "common_tokens": 16_000}
"""Option -> its value where it is not given, of those that sessions of agents alone have."""
GENERATED = {"agents": None, "prompt_mean": None, "output_mean": None, "cv": 1.0, "seed": 0}
"""Likewise of all traffic that is made and not read."""


def settle_made(arguments: argparse.Namespace, usual: Mapping[str, Any]) -> None:
    """Fills in what is not given of traffic that is made.

    Args:
        arguments: `trace`, and the options.
        usual: option -> its value where it is not given.

    Raises:
        UsageError: if one is given beside a trace, of which it says nothing.
    """
    for name, value in usual.items():
        given = getattr(arguments, name)
        if given is None:
            setattr(arguments, name, value)
        elif arguments.trace is not None:
            raise UsageError(
                f"{name}={given} is of traffic that is made, and --trace {arguments.trace} is "
                "replayed as it is; leave one of them out"
            )


def _check_agents(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options of agents without agents, or of requests without."""
    for name in OF_AGENTS:
        given = getattr(arguments, name)
        if given is not None and arguments.agents is None and arguments.trace is None:
            raise UsageError(
                f"{name}={given} is of sessions of agents; say how many with --agents, or leave "
                "it out"
            )
    if arguments.cv is not None and arguments.agents is not None:
        raise UsageError(
            f"cv={arguments.cv:g} is of requests that know nothing of each other, not of --agents; "
            "leave one of them out"
        )


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys replay`."""
    arguments = parser(prog).parse_args(argv)
    for name in ("rate_per_s", "duration_s"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name}={value:g} must be a finite positive number")
    if not (math.isfinite(arguments.host_pages_gib) and arguments.host_pages_gib >= 0):
        raise UsageError(f"--host-pages-gib {arguments.host_pages_gib:g} must be 0 or more")
    policies = [name.strip() for name in arguments.policy.split(",") if name.strip()]
    check_policies(policies)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; name a folder")
    if arguments.out is not None:
        check_writable(arguments.out)
    _check_agents(arguments)
    settle_made(arguments, GENERATED | OF_AGENTS)
    prefill, decode = parse_instances(arguments.instances)
    slo = targets_of(arguments)
    chosen = setting(
        arguments.gpu,
        arguments.model,
        prefill=prefill,
        decode=decode,
        engine=arguments.engine,
        slo=slo,
        predictor=arguments.predictor,
        host_pages_gib=arguments.host_pages_gib,
    )
    check_policies(policies, [chosen.gpu])
    if arguments.trace is not None:
        trace = read_trace(arguments.trace)
        if arguments.rate_per_s is not None:
            trace = trace.at_rate(arguments.rate_per_s)
        if arguments.duration_s is not None:
            trace = trace.between(0.0, arguments.duration_s)
    elif arguments.agents is not None:
        trace = _agents(arguments, chosen, prefill, decode)
    else:
        rate_per_s = 10.0 if arguments.rate_per_s is None else arguments.rate_per_s
        duration_s = 120.0 if arguments.duration_s is None else arguments.duration_s
        _check_count(rate_per_s * duration_s)  # before they are drawn
        trace = synthetic_trace(
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            seed=arguments.seed,
            prompt_mean=250.0 if arguments.prompt_mean is None else arguments.prompt_mean,
            output_mean=215.0 if arguments.output_mean is None else arguments.output_mean,
            cv=arguments.cv,
        )
    _check_count(len(trace))
    note_unused(trace)
    given = len(trace)
    trace = _within_positions(trace, chosen.gpu.shape, made=arguments.agents is not None)
    left, most = len(trace), chosen.gpu.kv_capacity_tokens
    trace = trace.clipped(most)
    if left > len(trace):
        _note(f"{left - len(trace)} of {given} requests are longer than {most} tokens and left out")
    too_long = given - len(trace)
    for complaint in unmeetable(trace, chosen):
        _note(f"warning: {complaint}")
    _note(
        f"{len(trace)} requests over {trace.duration_s:.0f} s on {arguments.instances} simulated "
        f"{chosen.gpu.spec.name} x {chosen.gpu.gpus}, {chosen.gpu.shape.name}; all figures are "
        f"simulated, idle energy included"
    )
    rows = compare(
        trace,
        chosen,
        policies,
        sample_every_s=max(1.0, trace.duration_s / 200) if arguments.out else None,
    )
    content = record(rows, chosen, trace, too_long=too_long)
    if arguments.json:
        print(json.dumps(content | {"hardware": hardware(), "versions": versions()}))
    else:
        print(table(rows))
    if arguments.out is not None:
        from jaxsys.serve.simulation.replay_plots import draw

        path = write_result(arguments.out / "replay.json", **content)
        for drawn in draw(path):
            _note(f"wrote {drawn}")
    return 0


def note_unused(trace: RequestTrace) -> None:
    """Says what a file knows of its prompts and no replay uses."""
    if trace.unused is not None:
        _note(
            f"{trace.unused} of trace {trace.name} is not used: its prompts are replayed as if "
            "they shared nothing"
        )


def _within_positions(trace: RequestTrace, shape: ServedShape, *, made: bool) -> RequestTrace:
    """Without the requests that have more tokens than the model has positions: its server would
    refuse them.

    Args:
        made: sessions of agents, which are longer than most models' positions and of which only
            what they cost is asked. They are left as they are, and that is said.
    """
    most, given = shape.max_positions, len(trace)
    if most is None or trace.longest <= most:
        return trace
    if made:
        longer = int((trace.prompt_tokens + trace.output_tokens > most).sum())
        _note(
            f"{longer} of {given} requests are longer than the {most} positions of {shape.name}, "
            "whose server would refuse them; they are replayed as if it had been trained for them"
        )
        return trace
    kept = trace.clipped(most, f"positions of {shape.name}")
    _note(
        f"{given - len(kept)} of {given} requests are longer than the {most} positions of "
        f"{shape.name} and left out, as its server would refuse them"
    )
    return kept


def carried_turns_per_s(
    gpu: SimulatedGpu,
    prefill: int,
    decode: int,
    *,
    prompt_tokens: float,
    output_tokens: float,
    known_share: float,
    piece_tokens: int,
) -> float:
    """Turns of agents a second that instances carry at the maximum clock.

    A turn computes what was not known of its prompt, in pieces over all before them, and is then
    decoded beside as many others as memory has room for; whichever of the two is slower counts.

    Args:
        decode: instances that decode; with 0 the `prefill` ones do both.
        piece_tokens: of a prompt that are computed at once.
    """
    clock_mhz, fresh = gpu.spec.max_mhz, max(1, round((1 - known_share) * prompt_tokens))
    known = round(prompt_tokens) - fresh
    reading_s = 0.0
    for start in range(0, fresh, piece_tokens):
        piece = min(piece_tokens, fresh - start)
        reading_s += gpu.run(Load(piece, 1, known + start), clock_mhz).time_s
    length = round(prompt_tokens + output_tokens)
    together = max(1, gpu.kv_capacity_tokens // length)
    step_s = gpu.run(Load(batch=together, kv_tokens=together * length), clock_mhz).time_s
    writing_s = output_tokens * step_s / together
    if not decode:
        return prefill / (reading_s + writing_s)
    return min(prefill / reading_s, decode / writing_s)


def _agents(
    arguments: argparse.Namespace, chosen: Setting, prefill: int, decode: int
) -> RequestTrace:
    """Sessions of agents as the options say."""
    _check_count(arguments.agents * arguments.turns)
    prompt_mean = 140_000.0 if arguments.prompt_mean is None else arguments.prompt_mean
    output_mean = 440.0 if arguments.output_mean is None else arguments.output_mean
    rate_per_s = arguments.rate_per_s
    if rate_per_s is None and 0 < arguments.known_share < 1 <= min(prompt_mean, output_mean):
        carried = carried_turns_per_s(
            chosen.gpu,
            prefill,
            decode,
            prompt_tokens=prompt_mean,
            output_tokens=output_mean,
            known_share=arguments.known_share,
            piece_tokens=chosen.cluster.max_prefill_tokens,
        )
        rate_per_s = CARRIED_SHARE * carried
        _note(
            f"--rate {rate_per_s:.2g} turns a second: {100 * CARRIED_SHARE:.0f} % of what "
            f"{arguments.instances} carry at the maximum clock where each prompt finds what is "
            "known of it"
        )
    trace = agent_trace(
        sessions=arguments.agents,
        sessions_per_s=(rate_per_s or 1.0) / arguments.turns,
        seed=arguments.seed,
        turns=arguments.turns,
        prompt_mean=prompt_mean,
        output_mean=output_mean,
        known_share=arguments.known_share,
        common_tokens=arguments.common_tokens,
    )
    return trace if arguments.duration_s is None else trace.between(0.0, arguments.duration_s)


def _check_count(requests: float) -> None:
    """Raises UsageError for more requests than can be replayed in hours."""
    if requests > MOST_REQUESTS:
        raise UsageError(
            f"{requests:,.0f} requests are too many: every token of every one is simulated, so "
            f"at most {MOST_REQUESTS:,} are replayed; lower --rate or --duration"
        )


def _note(text: str) -> None:
    print(text, file=sys.stderr)
