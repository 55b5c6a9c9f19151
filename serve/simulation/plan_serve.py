"""`jaxsys plan serve`: which deployment serves a demand, and at what energy.

Searched are GPUs an instance, numbers of prefill and decode instances, batch, form of the weights,
and clock policy. A bound from means rules out what cannot do and orders the rest
(`serve.simulation.deployments`); the judge is the replay of the trace on the modelled GPUs, with
the server's own scheduler. Deployments are judged the smallest first, each at the highest clock;
only one that keeps the targets there is replayed under the other policies, since none of them
attains more than a clock that is always the highest.
"""

import argparse
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxsys import __version__
from jaxsys.errors import RunError, UsageError, did_you_mean
from jaxsys.model.config import DecoderConfig
from jaxsys.model.shapes import find_preset, lies_here, preset_beside
from jaxsys.options import Parser, whole
from jaxsys.planner.cli import refuse_to_overwrite
from jaxsys.planner.read import read_model
from jaxsys.results import table, write_result
from jaxsys.serve.energy.governors import VALUE_BYTES
from jaxsys.serve.energy.gpu_model import GPUS
from jaxsys.serve.energy.slo import Slo, add_targets, targets_of
from jaxsys.serve.settings import SERVE
from jaxsys.serve.simulation.deployments import (
    WAYS,
    Bound,
    Bounds,
    Deployment,
    candidates,
    check_model,
    demand_of,
    lengths_summary,
)
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.replay import (
    MOST_REQUESTS,
    Setting,
    check_policies,
    figures,
    note_unused,
    policy_named,
    routers_of,
    settle_made,
    simulate,
    unmeetable,
)
from jaxsys.serve.simulation.traces import RequestTrace, read_trace, synthetic_trace
from jaxsys.serve.weights import longest_served

POLICIES_TRIED = ("max", "ahead", "sweet-spot")
MOST_GPUS = 4096
RATE_PER_S = 10.0
"""Of a synthetic load where none is asked for."""
DTYPES = ("float32", "bfloat16")
"""Forms of weights that `serve --dtype` takes; the others are those of `--quantise`."""
NODE_GPUS = 8
"""Of one machine; instances beyond it are processes of a cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A deployment under a policy, replayed."""

    deployment: Deployment
    policy: str
    bound: Bound
    ttft_attainment_pct: float
    itl_attainment_pct: float
    ttft_p99_ms: float
    itl_p99_ms: float
    energy_j_per_token: float

    @property
    def attainment_pct(self) -> float:
        """The lesser of the two."""
        return min(self.ttft_attainment_pct, self.itl_attainment_pct)

    def row(self) -> dict[str, Any]:
        """Flat, named figures."""
        one = self.deployment
        return {
            "gpus": one.gpus,
            "gpu": one.gpu,
            "tensor_parallel": one.tensor_parallel,
            "prefill": one.prefill,
            "decode": one.decode,
            "max_batch": one.max_batch,
            "weights": one.weights,
            "policy": self.policy,
            "energy_j_per_token": self.energy_j_per_token,
            "bound_j_per_token": self.bound.energy_j_per_token,
            "ttft_attainment_pct": self.ttft_attainment_pct,
            "itl_attainment_pct": self.itl_attainment_pct,
            "ttft_p99_ms": self.ttft_p99_ms,
            "itl_p99_ms": self.itl_p99_ms,
        }


def judge(
    config: DecoderConfig, deployment: Deployment, bounds: Bounds, trace: RequestTrace, policy: str
) -> Judged:
    """Replays `trace` on a deployment under one policy."""
    gpu = bounds.gpu(deployment.gpu, deployment.tensor_parallel, deployment.weights)
    if gpu is None:
        raise UsageError(f"the model does not fit {deployment.label}")
    setting = Setting(
        gpu=gpu,
        cluster=ClusterConfig(
            gpu=gpu,
            prefill_instances=deployment.prefill,
            decode_instances=deployment.decode,
            max_batch=deployment.max_batch,
            max_prefill_tokens=bounds.prefill_budget,
        ),
        slo=bounds.slo,
        clocks_mhz=gpu.spec.control_mhz,
        predictor="model",
    )
    found = figures(simulate(trace, policy_named(policy), setting), bounds.slo)
    return Judged(
        deployment=deployment,
        policy=policy,
        bound=bounds.of(deployment),
        ttft_attainment_pct=found["ttft_attainment_pct"],
        itl_attainment_pct=found["itl_attainment_pct"],
        ttft_p99_ms=found["ttft_p99_ms"],
        itl_p99_ms=found["itl_p99_ms"],
        energy_j_per_token=found["energy_j_per_token"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search found."""

    judged: list[Judged]
    passed: int
    """Deployments that the bound let pass."""
    cut_short: bool
    """Time was up, or replays were, before all of them were judged."""


def search(
    config: DecoderConfig,
    trace: RequestTrace,
    bounds: Bounds,
    known: Sequence[tuple[Deployment, Bound]],
    *,
    target_pct: float,
    policies: Sequence[str] = POLICIES_TRIED,
    most: int = 40,
    seconds: float = 240.0,
    say: Callable[[Judged], None] = lambda found: None,
) -> Search:
    """Judges deployments, the smallest and least energetic first, within a budget.

    Args:
        target_pct: attainment to be kept.
        most: replays.
        say: is given each as it is judged.
    """
    judged: list[Judged] = []
    ends_s = time.monotonic() + seconds
    cut_short = False
    ordered = sorted(known, key=lambda one: (one[0].gpus, one[1].energy_j_per_token))
    for deployment, bound in ordered:
        # As many GPUs that keep the target are better spent on a deployment of less energy.
        best_j = min(
            (
                one.energy_j_per_token
                for one in judged
                if one.deployment.gpus <= deployment.gpus and one.attainment_pct >= target_pct
            ),
            default=math.inf,
        )
        if bound.energy_j_per_token >= best_j:
            continue
        for policy in policies:
            if len(judged) >= most or time.monotonic() > ends_s:
                cut_short = True
                break
            found = judge(config, deployment, bounds, trace, policy)
            judged.append(found)
            say(found)
            if policy == policies[0] and found.attainment_pct < target_pct:
                break
        if cut_short:
            break
    return Search(judged=judged, passed=len(ordered), cut_short=cut_short)


def frontier(judged: Sequence[Judged]) -> list[Judged]:
    """Those than which none has as few GPUs, as little energy a token and as much attainment."""

    def figures_of(one: Judged) -> tuple[float, float, float]:
        return one.deployment.gpus, one.energy_j_per_token, -one.attainment_pct

    kept = []
    for one in judged:
        mine = figures_of(one)
        if not any(
            all(a <= b for a, b in zip(figures_of(other), mine, strict=True))
            and figures_of(other) != mine
            for other in judged
        ):
            kept.append(one)
    return sorted(kept, key=figures_of)


def chosen_of(judged: Sequence[Judged], target_pct: float) -> Judged | None:
    """Of those that keep the target the one of the fewest GPUs, then of the least energy."""
    keeping = [one for one in judged if one.attainment_pct >= target_pct]
    return min(keeping, key=lambda o: (o.deployment.gpus, o.energy_j_per_token), default=None)


def halving(
    chosen: Judged,
    judged: Sequence[Judged],
    bounds: Bounds,
    *,
    longest: int,
    roomiest: Callable[[int], int | None],
) -> list[str]:
    """What it would take to halve the cost, the energy, and the share that comes too late.

    Args:
        longest: tokens of a request.
        roomiest: the most tokens that an instance of at most so many GPUs holds, 0 where the model
            does not fit, None where no instance so small was asked for.
    """
    lines = []
    gpus = chosen.deployment.gpus
    fewer = [one for one in judged if 2 * one.deployment.gpus <= gpus]
    best = max(fewer, key=lambda one: one.attainment_pct, default=None)
    if best is not None:
        lines.append(
            f"half the cost: {best.deployment.label} under {best.policy} attains "
            f"{best.attainment_pct:.1f} %"
        )
    elif gpus < 2:
        lines.append("half the cost: it is one GPU")
    elif (room := roomiest(gpus // 2)) is None:
        lines.append("half the cost: no instance so small is allowed (--tensor-parallel)")
    elif room < longest:
        held = f"{room} tokens of a request of {longest}" if room else "not even the weights"
        lines.append(
            f"half the cost: memory is the reason; an instance of {gpus // 2} GPUs at most holds "
            f"{held}"
        )
    else:
        share = min(1.0, bounds.least_rate(chosen.deployment) / 2)
        lines.append(
            f"half the cost: no deployment of {gpus // 2} GPUs passes the bound; they would serve "
            f"about {100 * share:.0f} % of the rate"
        )
    least = min(judged, key=lambda one: one.energy_j_per_token)
    half_j = chosen.energy_j_per_token / 2
    if least.energy_j_per_token <= half_j:
        lines.append(
            f"half the energy: {least.deployment.label} under {least.policy}, at "
            f"{least.energy_j_per_token:.3f} J a token and {least.attainment_pct:.1f} %"
        )
    else:
        lines.append(
            f"half the energy: none of {len(judged)} replays; the least is "
            f"{least.energy_j_per_token:.3f} J a token, {least.deployment.label} under "
            f"{least.policy}, and this deployment's bound {chosen.bound.energy_j_per_token:.3f}"
        )
    late_pct = 100 - chosen.attainment_pct
    if late_pct < 0.05:
        lines.append("half the late: next to nothing is late")
        return lines
    better = [one for one in judged if 100 - one.attainment_pct <= late_pct / 2]
    cheapest = min(
        better, key=lambda one: (one.deployment.gpus, one.energy_j_per_token), default=None
    )
    if cheapest is None:
        lines.append(f"half the late ({late_pct:.1f} %): none of {len(judged)} replays")
    else:
        lines.append(
            f"half the late ({late_pct:.1f} %): {cheapest.deployment.label} under "
            f"{cheapest.policy}, {cheapest.energy_j_per_token:.3f} J a token"
        )
    return lines


def placeholder_of(model: str) -> str | None:
    """What stands for the folder of a preset's weights in a command; None for a folder."""
    return None if lies_here(model) else f"FOLDER_OF_{find_preset(model) or model}"


def limit_of(one: Judged) -> dict[str, Any] | None:
    """The power limit that the operator must set, as the server sets none; None without one."""
    cap_w = policy_named(one.policy).cap_w
    if cap_w is None:
        return None
    return {
        "watts_each": cap_w,
        "gpu": one.deployment.gpu,
        "gpus": one.deployment.gpus,
        "set_by": "the operator, before the server starts",
        "command": ["nvidia-smi", "-pl", f"{cap_w:.0f}"],
    }


def options_of(model: str, one: Judged, slo: Slo, longest: int) -> dict[str, str | int | float]:
    """The options of `jaxsys serve` that start a deployment as it was replayed; a power limit is
    none of them: see `limit_of`.

    Args:
        longest: tokens of a request, prompt and output.
    """
    deployment, policy = one.deployment, policy_named(one.policy)
    options: dict[str, str | int | float] = {
        "model": placeholder_of(model) or str(Path(model).absolute()),
        "prefill": deployment.prefill,
        "decode": deployment.decode,
        "max-batch": deployment.max_batch,
        "max-length": longest,
        # As many again may wait, and be read, as are written at once.
        "max-requests": max(
            256, 2 * deployment.max_batch * (deployment.prefill + deployment.decode)
        ),
    }
    if deployment.tensor_parallel > 1:
        options["tensor-parallel"] = deployment.tensor_parallel
    options["dtype" if deployment.weights in DTYPES else "quantise"] = deployment.weights
    options |= {"ttft-ms": 1e3 * slo.ttft_s, "itl-ms": 1e3 * slo.itl_s}
    options |= {"gpu": deployment.gpu, "policy": policy.clock}
    options |= {"route-prompts": routers_of(policy)[0], "route": routers_of(policy)[1]}
    options["clocks"] = "control"
    if deployment.gpus > NODE_GPUS:
        options["cluster"] = "auto"
    return options


def command_of(model: str, one: Judged, slo: Slo, longest: int) -> list[str]:
    """The words that start a deployment."""
    words = ["jaxsys", "serve"]
    for name, value in options_of(model, one, slo, longest).items():
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def manifest_of(model: str, one: Judged, slo: Slo, longest: int) -> dict[str, Any]:
    """What an orchestrator needs to start it: instances by role, and the server's options, which
    `jaxsys serve --settings` reads off it."""
    deployment = one.deployment
    roles = {"prefill": deployment.prefill, "decode": deployment.decode}
    if not deployment.decode:
        roles = {"both": deployment.prefill}
    limit, placeholder = limit_of(one), placeholder_of(model)
    return {
        "jaxsys": __version__,
        "model": model,
        **({} if placeholder is None else {"weights_needed": placeholder}),
        **({} if limit is None else {"power_limit": limit}),
        "instances": [
            {"role": role, "count": count, "gpu": deployment.gpu,
             "gpus_each": deployment.tensor_parallel}
            for role, count in roles.items()
        ],
        SERVE: options_of(model, one, slo, longest),
        "command": command_of(model, one, slo, longest),
        "predicted": one.row(),
    }  # fmt: skip


# --- command line -----------------------------------------------------------------------------


def parse_gpus(text: str) -> dict[str, int]:
    """{"h100": 8} from "h100=8"; several kinds are apart by commas, one of which is chosen."""
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, equals, count = part.strip().partition("=")
        if kind not in GPUS:
            near = did_you_mean(kind, GPUS)
            raise UsageError(f"gpus: {kind!r} is not modelled{near}; use one of {', '.join(GPUS)}")
        if not equals or not count.isdigit() or not 1 <= int(count) <= MOST_GPUS:
            raise UsageError(f"gpus={part!r} must read like h100=8, from 1 to {MOST_GPUS}")
        if kind in found:
            raise UsageError(f"gpus={text!r} names {kind} twice")
        found[kind] = int(count)
    return found


def listed(known: Sequence[str] | None = None) -> Callable[[str], list[str]]:
    """A type of options: names or numbers apart by commas."""

    def convert(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in names:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} must be of {', '.join(known)}")
            if known is None and not (name.isdecimal() and int(name) > 0):
                raise argparse.ArgumentTypeError(f"{name!r} must be a whole number, at least 1")
        if not names:
            raise argparse.ArgumentTypeError("must name at least one")
        return names if known else list(dict.fromkeys(str(int(name)) for name in names))

    return convert


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys plan serve`."""
    result = Parser(
        prog=prog,
        description="Search deployments of a model on simulated GPUs: cost, energy, attainment.",
    )
    add = result.add_argument
    add("model", help="a preset such as Llama-3-8B, or a folder with a config.json")
    add("--gpus", default="h100=8", metavar="KIND=N,...",
        help=f"how many there are, of {', '.join(GPUS)} (default %(default)s)")  # fmt: skip
    add("--trace", type=Path, help="a file as `jaxsys replay` takes it (default: a synthetic one)")
    add("--rate", type=float, dest="rate_per_s", metavar="RATE",
        help="mean requests a second (default: the trace's own, or 10)")  # fmt: skip
    add("--duration", type=float, dest="duration_s", default=60.0, metavar="S",
        help="seconds of arrivals to replay (default %(default)s)")  # fmt: skip
    add("--prompt-mean", type=float, help="tokens, without --trace (default 250)")
    add("--output-mean", type=float, help="tokens, without --trace (default 215)")
    add("--cv", type=float, help="burstiness, without --trace; 1 is Poisson")
    add("--seed", type=whole(0), help="without --trace (default 0)")
    add_targets(add)
    add("--attainment", type=float, default=99.0, dest="attainment_pct", metavar="PERCENT",
        help="of first tokens and of tokens, within them (default %(default)s)")  # fmt: skip
    add("--tensor-parallel", type=listed(), dest="ways", help="to try (default 1,2,4,8)")
    add("--weights", type=listed(tuple(VALUE_BYTES)), default=["bfloat16"],
        help=f"forms to try, of {', '.join(VALUE_BYTES)} (default bfloat16)")  # fmt: skip
    add("--max-batch", type=listed(), default=["128", "512"], help="to try (default 128,512)")
    add("--policy", type=lambda text: list(dict.fromkeys(name.strip() for name in text.split(","))),
        default=list(POLICIES_TRIED),
        help=f"clock policies to try, as `jaxsys replay` takes them (default "
        f"{','.join(POLICIES_TRIED)})")  # fmt: skip
    add("--replays", type=whole(), default=40, help="at most (default %(default)s)")
    add("--seconds", type=float, default=240.0, help="of replaying, at most (default %(default)s)")
    add("--json", action="store_true", help="print the record instead of the table")
    add("--manifest", type=Path, help="file for the chosen deployment's instances and command")
    add("--out", type=Path, help="result file")
    return result


def read_demand(options: argparse.Namespace) -> RequestTrace:
    """The trace asked for."""
    settle_made(options, {"prompt_mean": 250.0, "output_mean": 215.0, "cv": 1.0, "seed": 0})
    if options.trace is not None:
        trace = read_trace(options.trace)
        if options.rate_per_s is not None:
            trace = trace.at_rate(options.rate_per_s)
        whole = trace
        trace = trace.between(0.0, min(options.duration_s, whole.duration_s + 1e-9))
        if math.isfinite(whole.rate_per_s) and not math.isfinite(trace.rate_per_s):
            raise UsageError(
                f"duration_s={options.duration_s:g} leaves {len(trace)} of trace {whole.name}'s "
                f"{len(whole)} requests, all at one moment, and so no rate; it lasts "
                f"{whole.duration_s:g} s: raise it"
            )
    else:
        rate_per_s = RATE_PER_S if options.rate_per_s is None else options.rate_per_s
        if rate_per_s * options.duration_s > MOST_REQUESTS:
            raise UsageError(
                f"{rate_per_s * options.duration_s:,.0f} requests are too many to be replayed for "
                "each deployment; lower --duration"
            )
        trace = synthetic_trace(
            rate_per_s=rate_per_s,
            duration_s=options.duration_s,
            seed=options.seed,
            prompt_mean=options.prompt_mean,
            output_mean=options.output_mean,
            cv=options.cv,
        )
    if not math.isfinite(trace.rate_per_s):
        raise UsageError(
            f"trace {trace.name} has all its requests at one moment, and so no rate; a demand is "
            "needed that lasts"
        )
    return trace


def within_positions(trace: RequestTrace, positions: int) -> RequestTrace:
    """Without the requests that have more tokens than the model has positions: its server refuses
    each of them.

    Raises:
        UsageError: if that is most of them, or what is left has no rate; what would be planned for
            is not what was asked.
    """
    kept = int((trace.prompt_tokens + trace.output_tokens <= positions).sum())
    too_long = len(trace) - kept
    if not too_long:
        return trace
    what = (
        f"{too_long} of {len(trace)} requests of trace {trace.name} are longer than the model's "
        f"{positions} positions"
    )
    if 2 * kept < len(trace):
        raise UsageError(
            f"{what}, and its server would refuse them; ask for shorter ones (--prompt-mean and "
            "--output-mean, or another --trace), or plan for a model that has more positions"
        )
    found = trace.clipped(positions)
    if not math.isfinite(found.rate_per_s):
        raise UsageError(
            f"{what}, and the others come all at one moment, so that there is no rate; a demand is "
            "needed that lasts"
        )
    _note(f"{what} and left out, as its server refuses them; planned for are the other {kept}")
    return found


def main(argv: Sequence[str], prog: str) -> int:
    """`jaxsys plan serve`."""
    options = parser(prog).parse_args(argv)
    for name in ("rate_per_s", "duration_s", "seconds"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name}={value:g} must be a finite positive number")
    if not 0 < options.attainment_pct <= 100:
        raise UsageError(f"attainment_pct={options.attainment_pct:g} must be above 0, at most 100")
    gpus = parse_gpus(options.gpus)
    for path in (options.out, options.manifest):
        if path is not None:
            refuse_to_overwrite(path)
    check_policies(options.policy)
    for name in options.policy:
        if policy_named(name).sleeps:
            raise UsageError(
                f"policy {name!r} puts instances to sleep, which `jaxsys serve` does not do; plan "
                "without, and try it with `jaxsys replay`"
            )
    config = read_model(options.model)
    ways = check_model(config, [int(w) for w in options.ways] if options.ways else WAYS)
    asked = read_demand(options)
    note_unused(asked)
    trace = within_positions(asked, longest_served(config))
    slo = targets_of(options)
    bounds = Bounds(config, demand_of(trace), slo)
    modelled = [
        bounds.gpu(kind, way, form) for kind in gpus for way in ways for form in VALUE_BYTES
    ]
    check_policies(options.policy, [gpu for gpu in modelled if gpu is not None])
    began_s, used_s = time.monotonic(), time.process_time()
    known = list(
        candidates(
            bounds,
            gpus,
            ways=ways,
            weights=options.weights,
            batches=[int(b) for b in options.max_batch],
        )
    )
    _note(f"{lengths_summary(trace)}; {options.attainment_pct:g} % within {1e3 * slo.ttft_s:g} ms "
          f"to the first token and {1e3 * slo.itl_s:g} ms between tokens")  # fmt: skip
    asked_per_s = options.rate_per_s
    if asked_per_s is None and options.trace is None:
        asked_per_s = RATE_PER_S
    if asked_per_s is not None and abs(asked.rate_per_s / asked_per_s - 1) > 0.1:
        _note(
            f"the load replayed has {asked.rate_per_s:.3g} requests a second, not {asked_per_s:g}: "
            f"{len(asked)} are few; a longer --duration comes nearer"
        )
    if not known:
        raise RunError(_why_none(bounds, gpus, ways, options, trace))
    longest = trace.longest
    fitting = [one for one in known if _capacity(bounds, one[0]) >= longest]
    if not fitting:
        least = max(_capacity(bounds, one[0]) for one in known)
        raise RunError(
            f"a request of {longest} tokens fits no deployment, the roomiest of which holds "
            f"{least}; allow more GPUs an instance (--tensor-parallel)"
        )
    _note(f"{len(fitting)} deployments pass the bound ({time.monotonic() - began_s:.1f} s)")

    def say(one: Judged) -> None:
        _note(
            f"  {one.deployment.gpus:>3} GPUs  {one.deployment.label}, {one.policy}: "
            f"{one.energy_j_per_token:.3f} J a token, {one.attainment_pct:.1f} %"
        )

    found = search(
        config,
        trace,
        bounds,
        fitting,
        target_pct=options.attainment_pct,
        policies=["max", *(name for name in options.policy if name != "max")],
        most=options.replays,
        seconds=options.seconds,
        say=say,
    )
    roomiest = functools.partial(_roomiest, bounds, gpus, ways, options.weights)
    took = {"wall_s": time.monotonic() - began_s, "cpu_s": time.process_time() - used_s}
    too_long = len(asked) - len(trace)
    return report(options, found, bounds, trace, slo, roomiest, took, too_long=too_long)


def report(
    options: argparse.Namespace,
    found: Search,
    bounds: Bounds,
    trace: RequestTrace,
    slo: Slo,
    roomiest: Callable[[int], int | None],
    took: dict[str, float],
    *,
    too_long: int = 0,
) -> int:
    """Prints what was found, and writes it; 1 where nothing keeps the targets.

    Args:
        too_long: requests that were left out of `trace`.
        took: bound and replays together, by the wall and by the processor.
    """
    best = frontier(found.judged)
    chosen = chosen_of(found.judged, options.attainment_pct)
    longest = trace.longest
    content: dict[str, Any] = {
        "config": {
            "model": options.model,
            "gpus": options.gpus,
            "trace": trace.name,
            "requests": len(trace),
            "requests_too_long": too_long,
            "rate_per_s": trace.rate_per_s,
            "slo_ttft_ms": 1e3 * slo.ttft_s,
            "slo_itl_ms": 1e3 * slo.itl_s,
            "attainment_pct": options.attainment_pct,
        },
        "rows": [one.row() | {"frontier": one in best} for one in found.judged],
        "passed_the_bound": found.passed,
        "replays": len(found.judged),
        "cut_short": found.cut_short,
        **{f"search_{name}": value for name, value in took.items()},
        "chosen": None if chosen is None else manifest_of(options.model, chosen, slo, longest),
        "halving": []
        if chosen is None
        else halving(chosen, found.judged, bounds, longest=longest, roomiest=roomiest),
    }
    if options.out is not None:
        write_result(options.out, benchmark="plan_serve", kind="simulated", **content)
    if options.json:
        print(json.dumps(content))
    else:
        beside = preset_beside(options.model)
        if beside is not None:
            print(beside)
        formats = {"gpus": "", "deployment": "", "policy": "", "J a token": ".3f",
                   "TTFT ok %": ".1f", "ITL ok %": ".1f", "keeps": ""}  # fmt: skip
        rows = [
            {"gpus": one.deployment.gpus, "deployment": one.deployment.label,
             "policy": one.policy, "J a token": one.energy_j_per_token,
             "TTFT ok %": one.ttft_attainment_pct, "ITL ok %": one.itl_attainment_pct,
             "keeps": "yes" if one.attainment_pct >= options.attainment_pct else "no"}
            for one in best
        ]  # fmt: skip
        print(table(rows, formats))
        said = ", cut short: more would be judged with --replays or --seconds"
        print(
            f"\nsimulated; {len(found.judged)} replays of {found.passed} deployments that pass "
            f"the bound{said if found.cut_short else ''}"
        )
    if chosen is None:
        raise RunError(
            f"none of {len(found.judged)} replays keeps {options.attainment_pct:g} %; allow more "
            "GPUs, longer bounds, or a lower --attainment"
        )
    if options.manifest is not None:
        options.manifest.write_text(json.dumps(content["chosen"], indent=1) + "\n")
    if not options.json:
        for line in content["halving"]:
            print(line)
        print()
        needed, limit = content["chosen"].get("weights_needed"), limit_of(chosen)
        if needed is not None:
            print(f"weights are needed: {needed} stands for the folder that has them")
        if limit is not None:
            print(
                f"the server sets no power limit; set {limit['watts_each']:.0f} W on each of the "
                f"{limit['gpus']} {limit['gpu']} first: {shlex.join(limit['command'])}"
            )
        print(shlex.join(content["chosen"]["command"]))
        if options.manifest is not None:
            print(f"or: jaxsys serve --settings {options.manifest}", end="")
            print("" if needed is None else " --model FOLDER")
    return 0


def _capacity(bounds: Bounds, deployment: Deployment) -> int:
    gpu = bounds.gpu(deployment.gpu, deployment.tensor_parallel, deployment.weights)
    return 0 if gpu is None else gpu.kv_capacity_tokens


def _roomiest(
    bounds: Bounds, kinds: Iterable[str], ways: Sequence[int], forms: Sequence[str], most: int
) -> int | None:
    """The most tokens that an instance of at most `most` GPUs holds; None where none is tried."""
    held = [
        0 if gpu is None else gpu.kv_capacity_tokens
        for gpu in (
            bounds.gpu(kind, way, form)
            for kind in kinds
            for way in ways
            for form in forms
            if way <= most
        )
    ]
    return max(held, default=None)


def _why_none(
    bounds: Bounds,
    gpus: dict[str, int],
    ways: Sequence[int],
    options: argparse.Namespace,
    trace: RequestTrace,
) -> str:
    """Why the bound lets nothing pass: bounds that no clock keeps, or what it would take."""
    reasons = []
    for kind, most in gpus.items():
        sizes = [way for way in ways if way <= most]
        if not sizes:
            reasons.append(f"{most} {kind} are fewer than the {min(ways)} of an instance")
        elif not _roomiest(bounds, [kind], sizes, options.weights, most):
            reasons.append(_does_not_fit(bounds, kind, most, max(sizes), options.weights))
            continue
        for tensor_parallel in sizes:
            form = next((f for f in options.weights if bounds.gpu(kind, tensor_parallel, f)), None)
            gpu = None if form is None else bounds.gpu(kind, tensor_parallel, form)
            if form is None or gpu is None:
                continue
            setting = Setting(
                gpu=gpu,
                cluster=ClusterConfig(gpu=gpu),
                slo=replace(bounds.slo),
                clocks_mhz=gpu.spec.control_mhz,
            )
            complaints = unmeetable(trace, setting)
            one = Deployment(gpu=kind, tensor_parallel=tensor_parallel,
                             prefill=most // tensor_parallel, decode=0,
                             max_batch=max(int(b) for b in options.max_batch),
                             weights=form)  # fmt: skip
            why = complaints[0] if complaints else bounds.of(one).why_not
            if why is not None:
                share = bounds.least_rate(one)
                more = f" (they serve about {100 * share:.0f} % of the rate)" if share else ""
                reasons.append(f"on {one.label}: {why}{more}")
    return "no deployment can do: " + ("; ".join(reasons[:3]) or "too few GPUs")


def _does_not_fit(bounds: Bounds, kind: str, most: int, way: int, forms: Sequence[str]) -> str:
    """That the model does not fit an instance of `way` of `most` GPUs, and in which form it
    would."""
    of = "" if way == most else f", the most of {most} that one instance takes"
    context = max(1, round(bounds.demand.context))  # weights beside which nothing fits are no help
    fit = [f for f in VALUE_BYTES if (_roomiest(bounds, [kind], [way], [f], way) or 0) >= context]
    would = f"; with --weights {' or '.join(fit)} it would" if fit else ""
    return f"the model does not fit {way} {kind}{of}, in {' or '.join(forms)}{would}"


def _note(text: str) -> None:
    print(text, file=sys.stderr)
