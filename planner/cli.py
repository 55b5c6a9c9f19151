"""`jaxsys plan`: compare parallel plans for a model on a cluster."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxsys import hardware
from jaxsys.errors import RunError, UsageError
from jaxsys.files import check_writable, write_whole
from jaxsys.hardware import GIB, gib
from jaxsys.lowering.tables import buffers_of
from jaxsys.model.shapes import lies_here, path_of, preset_beside
from jaxsys.options import Parser, whole
from jaxsys.planner import explain, report
from jaxsys.planner.cluster import LARGEST_NODE, Cluster
from jaxsys.planner.command import train_command
from jaxsys.planner.costs import Precision
from jaxsys.planner.estimates import POLICY, plan_costs, schedule_link
from jaxsys.planner.estimates import microbatches as microbatches_of
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.files import plan_file, pods_of
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import (
    USABLE_MEMORY,
    Comparison,
    best_that_runs,
    compare,
    with_found,
)
from jaxsys.planner.plans import PATHS, Plan, Residual
from jaxsys.planner.problem import Problem
from jaxsys.planner.profile import load_profile
from jaxsys.planner.read import read_model
from jaxsys.planner.recognise import describe
from jaxsys.planner.runs import that_runs, why_not
from jaxsys.planner.search import Effort, Found, SearchMoment, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import Workload, decoder_workload
from jaxsys.schedule import Placement, Schedule, Simulation, simulate, trace
from jaxsys.schedule.render import draw, write_chrome_trace
from jaxsys.strategies import for_layers

MOST_DEVICES = 16_384
"""Beyond it the ways to divide devices are too many to be looked through at once."""
MOST_MICROBATCHES = 8 * MOST_DEVICES
EVERY_S = 5.0
"""Between lines of progress where nobody watches a terminal."""
EFFORT = Effort(refine=4, chains=24, steps=60, pairs=8000, restarts=1, tolerance=1e-3)
GLANCE = 1e6
"""How much is searched for the table, of plans that mix or repeat the known strategies."""
MICROSECONDS = 1e6
SAME = 1e-8
"""By what share of a step two may differ that are one plan, summed in another order."""
_said_s = time.monotonic()
"""When a line of progress was last printed, where none is put in place of another."""


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command; returns 0, or raises UsageError or RunError."""
    global _said_s
    _said_s = time.monotonic()
    options = parser(prog).parse_args(argv)
    if options.memory_gib is not None and not options.memory_gib > 0:
        raise UsageError(f"--memory-gib {options.memory_gib:g} must be above 0; inf sets no limit")
    if not 0 < options.search_seconds < math.inf:
        raise UsageError(
            f"--search-seconds {options.search_seconds:g} must be a finite number above 0"
        )
    if options.devices > MOST_DEVICES:
        raise UsageError(
            f"--devices {options.devices} is more than is planned for at once; plan for "
            f"at most {MOST_DEVICES}, and run replicas of that plan"
        )
    config = read_model(options.model)
    measured = None if options.profile is None else load_profile(options.profile)
    if measured is not None and measured.link is None and options.devices > 1:
        raise UsageError(
            f"profile {options.profile} was measured on one device and holds no link; measure "
            "with --devices 2 or more"
        )
    cluster = Cluster(
        device=measured.device if measured else hardware.device(options.device),
        devices=options.devices,
        link=measured.link if measured and measured.link else hardware.link(options.link),
        node_devices=options.node_devices,
        node_link=None if options.node_link is None else hardware.link(options.node_link),
        pod_devices=options.pod_devices,
        pod_link=None if options.pod_link is None else hardware.link(options.pod_link),
    )
    sequence_length = options.sequence_length
    if sequence_length is None:
        sequence_length = min(8192, config.max_positions)
    if sequence_length > config.max_positions:
        raise UsageError(
            f"sequence_length={sequence_length} is past the model's "
            f"max_positions={config.max_positions}"
        )
    # What was asked for is kept; a search is free to choose what was not.
    free = options.microbatches is None and options.microbatch_size is None
    microbatches = 8 * options.devices if options.microbatches is None else options.microbatches
    size = 1 if options.microbatch_size is None else options.microbatch_size
    asked = (options.json, options.plan, options.schedule, options.trace, options.png)
    _refuse_shared([path for path in asked if path is not None])
    precision = Precision(gradient_bytes={"float32": 4.0, "bfloat16": 2.0}[options.gradients])
    memory_bytes = None if options.memory_gib is None else options.memory_gib * GIB

    def workload_of(size: int) -> Workload:
        return decoder_workload(
            options.model,
            config,
            sequence_length=sequence_length,
            microbatch_size=size,
            fused_attention=cluster.device.fused_attention,
        )

    workload = workload_of(size)
    if memory_bytes is None:
        memory_bytes = USABLE_MEMORY * cluster.device.memory_bytes
    problem = Problem(
        workload_of=workload_of,
        cluster=cluster,
        batch=microbatches * size,
        memory_bytes=memory_bytes,
        precision=precision,
        lowered=True,
    )
    evaluator = Evaluator(problem)
    comparison = compare(
        workload,
        cluster,
        microbatches=microbatches,
        microbatch_size=size,
        memory_bytes=memory_bytes,
        evaluator=evaluator,
        progress=_show,
    )
    named = [row.plan for row in comparison.rows if row.plan is not None]
    searching = options.search or options.plan is not None
    if not searching:
        space = that_runs(Space.of(problem, microbatch_sizes=[size]))
        effort = replace(EFFORT, work=GLANCE, descent=False)
        glance = search(space, effort=effort, evaluator=evaluator, known=named, progress=_progress)
        runs = best_that_runs(glance)
        comparison = comparison if runs is None else with_found(comparison, problem, runs)
    _show("")
    beside = preset_beside(options.model)
    if beside is not None:
        print(beside)
    print(
        f"{options.model}: {workload.parameters / 1e9:.2f} B parameters, {workload.layers} layers; "
        f"{cluster}; a step is {microbatches} microbatches of {size} x "
        f"{sequence_length} tokens; limit {gib(comparison.memory_bytes)} per device\n"
    )
    if cluster.node_devices is None and cluster.devices > LARGEST_NODE:
        print(
            f"All {cluster.devices} devices are taken as one node, which is more than there is; "
            "--node-devices and --node-link say where slower links begin\n"
        )
    print(report.table(comparison))
    answer = report.verdict(comparison)
    if not searching:
        print(f"\n{answer}")
    for text in _shared_commands(comparison, problem, options, sequence_length):
        print(text)
    request = {
        # A folder stays one, whatever its name, where it is read.
        "model": path_of(options.model) if lies_here(options.model) else options.model,
        "devices": options.devices,
        "device": cluster.device.name,
        "link": cluster.link.name,
        "node_devices": options.node_devices,
        "node_link": options.node_link,
        **pods_of(cluster),
        "sequence_length": sequence_length,
        "microbatch_size": size,
        "microbatches": microbatches,
        "gradients": options.gradients,
        "dtype": "bfloat16",  # what `Precision` and a workload count by default
    }
    found, best, plan = None, comparison.best, None
    fits, smallest = best is not None, comparison.smallest_memory_bytes
    if searching:
        space = Space.of(problem, microbatch_sizes=None if free else [size])
        found, answer = _search(
            space, evaluator, options.search_seconds, named, to_run=options.plan is not None
        )
        comparison = with_found(comparison, problem, found)
        best = comparison.best
        answer += _beside_found(comparison, found, space)
        print(answer)
        if found.plan.microbatch_size != size:
            print(
                f"\nIt takes microbatches of {found.plan.microbatch_size} sequences, and so "
                f"{problem.batch // found.plan.microbatch_size} of them; --microbatch-size {size} "
                "would keep the table's"
            )
        plan = found.plan
        fits = found.peak_bytes <= comparison.memory_bytes * (1 + 1e-9)
        smallest = min(smallest, found.peak_bytes)
    elif best is not None:
        plan = best.plan
    if not fits:  # and nothing is written
        raise RunError(
            f"no plan fits {gib(comparison.memory_bytes)} per device; the smallest limit "
            f"that would do is {gib(smallest, up=True)}: raise --memory-gib or --devices, or "
            "shorten --sequence-length"
        )
    if plan is not None and options.schedule is not None and options.plan is None:
        _check_said_by_schedule(plan)
    if options.json is not None:
        write_whole(
            options.json,
            json.dumps(report.as_json(comparison, answer, request=request), indent=1) + "\n",
        )
        print(f"wrote {options.json}")
    if options.plan is not None and found is not None:
        found_plan = plan_file(problem, found, request=request)
        write_whole(options.plan, json.dumps(found_plan, indent=1) + "\n")
        print(f"wrote {options.plan}")
    if lies_here(options.model) and (options.plan is not None or options.schedule is not None):
        print(
            f"`jaxsys train --model {options.model}` goes on from the folder's weights: they and "
            "its tokenizer must lie there"
        )
    if any((options.schedule, options.trace, options.png)):
        if plan is not None:
            schedule = to_schedule(problem, plan)
        else:  # of a strategy without a place in the space of plans
            assert best is not None
            schedule = for_layers(
                best.strategy,
                devices=options.devices,
                microbatches=microbatches,
                layers=workload.layers,
            )
            residual = next(one for one in Residual if POLICY[one] == best.recompute)
            layers = (replace(PATHS[0], residual=residual),) * workload.layers
            plan = Plan(shard=options.devices, microbatch_size=size, layers=layers)
        _write_pictures(_simulation(problem, plan, schedule), options)
    if options.schedule is not None and options.plan is not None:
        print(f"{options.schedule} is a part of {options.plan}, to look at: train with the latter")
    elif options.schedule is not None:
        gradients = "" if options.gradients == "float32" else f" --gradients {options.gradients}"
        recompute = POLICY[plan.layers[0].residual] if plan else "block"
        mine = size if plan is None else plan.microbatch_size
        print(
            f"what it does not say: `jaxsys train --model {options.model} --schedule "
            f"{options.schedule} --recompute {recompute} --microbatch-size {mine} "
            f"--sequence-length {sequence_length} --dtype bfloat16{gradients}`"
        )
    return 0


def _beside_found(comparison: Comparison, found: Found, space: Space) -> str:
    """In words a row of the table that is better than what a search found, and why that has it
    not; nothing where there is none, or both are one plan."""
    best = comparison.best
    if best is None or best.found or not best.step_s < found.step_s * (1 - SAME):
        return ""
    text = (
        f" Of the table {best.strategy} (recompute {best.recompute}) takes "
        f"{report.seconds(best.step_s)}"
    )
    if best.not_run is not None:
        return f"{text}, but is not run by `jaxsys train`: {best.not_run}."
    if best.plan is None:
        return f"{text}, but is no plan: `jaxsys train --schedule {best.strategy}`."
    outside = space.why_not(best.plan)
    return f"{text}." if outside is None else f"{text}, but was not searched: {outside}."


def _shared_commands(
    comparison: Comparison, problem: Problem, options: argparse.Namespace, sequence_length: int
) -> list[str]:
    """How the rows are run whose devices share sequences, features or experts, a line for each
    that fits."""
    lines = []
    for row in comparison.rows:
        if row.plan is None or not row.plan.joint or not row.fits or row.found:
            continue
        command = train_command(
            row.plan,
            model=options.model,
            sequence_length=sequence_length,
            microbatches=microbatches_of(problem, row.plan),
            gradients=options.gradients,
        )
        if command is not None:
            lines.append(f"{row.strategy}: `{command}`")
    return ["", *lines] if lines else []


def _check_said_by_schedule(plan: Plan) -> None:
    """Raises UsageError where a schedule's file and a command beside it say not all of a plan."""
    refused = why_not(plan)
    if refused is not None:
        raise UsageError(
            f"the winner is not run by `jaxsys train`: {refused}; nothing was written: name --plan "
            "FILE instead of --schedule, which searches among plans that are"
        )
    if len({path.residual for path in plan.layers}) > 1:
        raise UsageError(
            "the winner is more than a schedule, with recompute by layer: nothing was written; "
            "name --plan FILE instead of --schedule, and `jaxsys train --schedule FILE` runs all "
            "of it"
        )


def _search(
    space: Space, evaluator: Evaluator, seconds: float, known: Sequence[Plan], *, to_run: bool
) -> tuple[Found, str]:
    """Searches with a line of progress, and prints the best of each name.

    Returns what to take, and why in a sentence or two.
    """
    problem = space.problem
    if to_run:
        space = that_runs(space)
    effort = replace(EFFORT, work=seconds * MICROSECONDS)
    result = search(space, effort=effort, evaluator=evaluator, known=known, progress=_progress)
    _show("")
    print(
        f"\nsearched {result.evaluated} plans in {result.elapsed_s:.1f} s from data parallelism; "
        "the best of each name:"
    )
    print(explain.table(result, problem.memory_bytes))
    print()
    return (best_that_runs(result) if to_run else None) or result.best, explain.reasons(
        problem, result
    )


def _simulation(problem: Problem, plan: Plan, schedule: Schedule) -> Simulation:
    found = trace(schedule)
    sharded = schedule.placement is Placement.SHARDED
    lowered = None if sharded else (found, buffers_of(schedule, found))
    costs = plan_costs(problem, plan, schedule, lowered)
    return simulate(schedule, costs, schedule_link(problem, plan), known_trace=found)


def _progress(moment: SearchMoment) -> None:
    _show(
        f"{moment.elapsed_s:5.1f} s  {moment.phase} {moment.done}/{moment.total}  "
        f"{moment.evaluated} plans  best {report.seconds(moment.best.step_s)}  "
        f"{describe(moment.best.plan)}"
    )


def _show(progress: str) -> None:
    """Puts one line of progress in place of the last, or now and then one below it.

    The latter where standard error is no terminal: a log gets a line every few seconds.
    """
    global _said_s
    if sys.stderr.isatty():
        print(f"\r{progress[:118]:<118}\r", end="", file=sys.stderr, flush=True)
    elif progress and time.monotonic() - _said_s > EVERY_S:
        _said_s = time.monotonic()
        print(progress, file=sys.stderr, flush=True)


def _write_pictures(simulation: Simulation, options: argparse.Namespace) -> None:
    if options.schedule is not None:
        write_whole(options.schedule, simulation.schedule.to_json() + "\n")
        print(f"wrote {options.schedule}")
    if options.trace is not None:
        write_chrome_trace(simulation, options.trace)
        print(f"wrote {options.trace}: open it at https://ui.perfetto.dev")
    if options.png is not None:
        draw(simulation, options.png)
        print(f"wrote {options.png}")


def _refuse_shared(paths: Sequence[Path]) -> None:
    """Raises UsageError if a file cannot be written, or two would be written to one place."""
    for number, path in enumerate(paths):
        refuse_to_overwrite(path)
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UsageError(f"{path} is named for two files; name another for each")


def refuse_to_overwrite(path: Path) -> None:
    """Raises UsageError if a file cannot be written there, before any work is done."""
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten; remove it or name another file")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist")
    check_writable(path.parent)


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys plan`."""
    result = Parser(prog=prog, description="Compare parallel plans for a model on a cluster.")
    add = result.add_argument
    add("--model", required=True, help="a Hugging Face folder, or a preset's name")
    add("--devices", type=whole(), required=True, help="how many devices")
    add("--link", default="nvlink", help=f"one of {', '.join(hardware.LINKS)}")
    add("--device", default="h100", help=f"one of {', '.join(hardware.DEVICES)}")
    add(
        "--sequence-length",
        type=whole(),
        help="tokens of a sequence (default: 8192 or the model's)",
    )
    add(
        "--microbatch-size",
        type=whole(),
        help="sequences of a microbatch (default: 1; a search chooses from 1, 2, 4 and 8 for the "
        "same batch if neither this nor --microbatches is given)",
    )
    add(
        "--microbatches",
        type=whole(most=MOST_MICROBATCHES),
        help="of a step, over all devices (default: 8 per device)",
    )
    add(
        "--memory-gib",
        type=float,
        help="limit per device; inf: none (default: 92 %% of the device's)",
    )
    add(
        "--gradients",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype in which gradients are summed and sent (default: float32)",
    )
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of `jaxsys profile cluster`: device and link as measured, instead of presets",
    )
    add("--node-devices", type=whole(), help="devices of a node (default: all in one)")
    add("--node-link", help="link between nodes, per device")
    add(
        "--pod-devices",
        type=whole(),
        help="devices of a pod, such as a row of nodes, beyond which links are slower "
        "(default: all in one)",
    )
    add("--pod-link", help="link between pods, per device")
    add("--search", action="store_true", help="search all plans, not the known strategies alone")
    add(
        "--search-seconds",
        type=float,
        default=150.0,
        help="search as much as a quiet core does in so long; counted, not timed (default: 150)",
    )
    add("--json", type=Path, help="write the comparison to this file")
    add("--plan", type=Path, help="search, and write the best plan for `jaxsys train --schedule`")
    add(
        "--schedule",
        type=Path,
        help="write the winner's schedule, with what stands around it, for `jaxsys train "
        "--schedule`; recompute by layer needs --plan",
    )
    add("--trace", type=Path, help="write the winner's timeline as a Perfetto trace")
    add("--png", type=Path, help="draw the winner's timeline and memory")
    return result
