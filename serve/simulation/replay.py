"""`jaxsys replay`: a request trace on simulated GPUs, under energy policies."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.files import check_writable
from jaxsys.options import Parser, whole
from jaxsys.results import hardware, versions, write_result
from jaxsys.serve.energy.gpu_model import ENGINES, GPUS, SHAPES, Load, ServedShape, SimulatedGpu
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS
from jaxsys.serve.energy.slo import add_targets, targets_of
from jaxsys.serve.simulation.comparison import (
    Setting,
    compare,
    record,
    setting,
    table,
    unmeetable,
)
from jaxsys.serve.simulation.made_traces import agent_trace, synthetic_trace
from jaxsys.serve.simulation.policies import POLICIES, SLEEPS, check_policies
from jaxsys.serve.simulation.trace_files import read_trace
from jaxsys.serve.simulation.traces import RequestTrace

MOST_REQUESTS = 500_000

MOST_INSTANCES = 4096

CARRIED_SHARE = 1 / 3
"""Of the turns of agents that instances carry, how many are asked for where no rate is given: they
come in bursts, and prompts do not always find what is known of them."""


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
