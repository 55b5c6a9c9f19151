"""`jaxsys plan serve`: which deployment serves a demand, and at what energy.

Searched are GPUs an instance, numbers of prefill and decode instances, batch, form of the weights,
and clock policy. A bound from means rules out what cannot do and orders the rest
(`serve.simulation.deployments`); the others are replayed (`serve.simulation.plan_search`).
"""

import argparse
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxsys.errors import RunError, UsageError, did_you_mean
from jaxsys.model.shapes import preset_beside
from jaxsys.options import Parser, whole
from jaxsys.planner.cli import refuse_to_overwrite
from jaxsys.planner.read import read_model
from jaxsys.results import table, write_result
from jaxsys.serve.energy.governors import VALUE_BYTES
from jaxsys.serve.energy.gpu_model import GPUS
from jaxsys.serve.energy.slo import Slo, add_targets, targets_of
from jaxsys.serve.simulation.comparison import Setting, unmeetable
from jaxsys.serve.simulation.deployments import (
    WAYS,
    Bounds,
    Deployment,
    candidates,
    check_model,
    demand_of,
    lengths_summary,
)
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.plan_search import (
    POLICIES_TRIED,
    Judged,
    Search,
    chosen_of,
    frontier,
    halving,
    search,
)
from jaxsys.serve.simulation.plan_start import limit_of, manifest_of
from jaxsys.serve.simulation.policies import check_policies, policy_named
from jaxsys.serve.simulation.replay import MOST_REQUESTS, note_unused, settle_made
from jaxsys.serve.simulation.trace_files import read_trace
from jaxsys.serve.simulation.traces import RequestTrace
from jaxsys.serve.weights import longest_served

MOST_GPUS = 4096

RATE_PER_S = 10.0
"""Of a synthetic load where none is asked for."""


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
    add("--jobs", type=whole(most=256), default=1,
        help="processes that replay, one a core at most (default %(default)s)")  # fmt: skip
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
    began_s, used_s = time.monotonic(), _processor_s()
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
        jobs=options.jobs,
        say=say,
    )
    roomiest = functools.partial(_roomiest, bounds, gpus, ways, options.weights)
    took = {"wall_s": time.monotonic() - began_s, "cpu_s": _processor_s() - used_s}
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


def _processor_s() -> float:
    """Processor time of this process, and of those of it that ended."""
    return sum(os.times()[:4])


def _note(text: str) -> None:
    print(text, file=sys.stderr)
