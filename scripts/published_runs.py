#!/usr/bin/env python
"""Runs that others published, beside what the planner predicts of them.

    scripts/published_runs.py               the table, and results/planner_published.json
    scripts/published_runs.py --only nemo   the runs of one source

`scripts/published_runs.json` holds what was published, where, and how each run was divided.
Nothing is searched: a run's own plan is predicted, from presets alone. `part` says which runs a
constant was fitted to; all others are held out.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.hardware import GIB, LinkSpec, device, link
from jaxsys.model.config import DecoderConfig
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.estimates import POLICY, plan_costs, schedule_link
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import Gradient, LayerPath, Order, Plan, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.workload import decoder_workload
from jaxsys.results import table, write_result
from jaxsys.schedule import simulate

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "scripts" / "published_runs.json"
CHANNELS = 0.2
"""By what share products take longer beside transfers where whoever scheduled them knew what these
take: NCCL's kernels hold up to 24 of 132 multiprocessors. Where XLA guessed, as in steps of
`jaxsys.train`, it is what links have."""
NODE = 8
"""GPUs of a node, in all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="a source's name")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "planner_published.json")
    options = parser.parse_args()
    published = json.loads(RUNS.read_text())
    sources = published["sources"]
    if options.only is not None and options.only not in sources:
        raise UsageError(
            f"no source {options.only!r}{did_you_mean(options.only, sources)}; there are "
            f"{', '.join(sources)}"
        )
    runs = [run for run in published["runs"] if options.only in (None, run["source"])]
    rows = [row_of(run) for run in runs]
    shown = {"source": "", "run": "", "published": ",.0f", "predicted": ",.0f", "error_pct": "+.1f",
             "part": "", "published_gib": ".1f", "predicted_gib": ".1f"}  # fmt: skip
    print(table(rows, shown))
    print("\ntokens/s of a GPU, and GiB; errors are of the rate")
    summary = summary_of(rows)
    for name, value in summary.items():
        print(f"{name}: {value:.1f}")
    for name in dict.fromkeys(run["source"] for run in runs):
        print(f"{name}: {sources[name]}")
    if options.only is None:
        path = write_result(
            options.out,
            benchmark="planner_published",
            kind="simulated",
            config={"sources": sources},
            rows=rows,
            **summary,
        )
        print(f"wrote {path}")


def row_of(run: dict[str, Any]) -> dict[str, Any]:
    """One run, predicted beside published."""
    config, problem, plan = predicted_of(run)
    step_s, compute_s, peak_bytes = estimated(problem, plan, eager=run.get("megatron", False))
    tokens = run["sequences"] * run["sequence_length"] / run["devices"]
    rate, wanted = tokens / step_s, published_rate(run, config)
    row = {
        "source": run["source"],
        "run": run["name"],
        "published": wanted,
        "predicted": rate,
        "error_pct": 100 * (rate / wanted - 1),
        "part": run["part"],
        "step_s": step_s,
        "compute_s": compute_s,
    }
    if "memory_gib" in run:
        row |= {
            "published_gib": run["memory_gib"],
            "predicted_gib": peak_bytes / GIB,
        }
    return row


def estimated(problem: Problem, plan: Plan, *, eager: bool) -> tuple[float, float, float]:
    """Seconds of a step, of which the busiest device computes, and bytes at the peak.

    Stages of Megatron's pipelines wait for what they read and for nothing else, those of a compiled
    step also where what they send must have arrived.
    """
    if plan.owners > 1 and eager:
        schedule = to_schedule(problem, plan)
        costs = plan_costs(problem, plan, schedule)
        found = simulate(schedule, costs, schedule_link(problem, plan), eager_sends=True)
        return found.step_s, max(found.busy_s), max(found.peak_bytes)
    estimates = Evaluator(problem).plan(plan)
    return (
        float(estimates.step_s[0]),
        float(estimates.compute_s[0]),
        float(estimates.peak_bytes[0]),
    )


def published_rate(run: dict[str, Any], config: DecoderConfig) -> float:
    """Tokens/s of a GPU, in whatever the run was published."""
    length, layers, width = run["sequence_length"], config.num_layers, config.hidden_size
    products = 6.0 * (config.parameter_count() - config.vocab_size * width)
    if "tokens_per_s" in run:
        return float(run["tokens_per_s"])
    if "step_s" in run:
        return run["sequences"] * length / run["devices"] / run["step_s"]
    if "tflops_6nd_full" in run:
        whole = 6.0 * config.parameter_count() + 12.0 * layers * width * length
        return 1e12 * run["tflops_6nd_full"] / whole
    return 1e12 * run["tflops"] / (products + 6.0 * layers * width * length)


def predicted_of(run: dict[str, Any]) -> tuple[DecoderConfig, Problem, Plan]:
    """The run as a planning problem, and its plan."""
    config = preset(run["model"])

    def workload_of(size: int) -> Any:
        return decoder_workload(
            run["model"],
            config,
            sequence_length=run["sequence_length"],
            microbatch_size=size,
            loss_chunk_tokens=run.get("loss_chunk_tokens", 2048),
            selective=run.get("selective"),
            features_hidden=float(run.get("megatron", run.get("async_tensor", False))),
        )

    nodes = run["devices"] > NODE
    cluster = Cluster(
        device=device(run["device"]),
        devices=run["devices"],
        link=link(run.get("link", "nvlink")),
        node_devices=NODE if nodes else None,
        node_link=node_link_of(run) if nodes else None,
    )
    problem = Problem(
        workload_of=workload_of,
        cluster=cluster,
        batch=run["sequences"],
        memory_bytes=1e15,
        contention=None if run.get("transfers") == "guessed" else CHANNELS,
        precision=Precision(gradient_bytes={"float32": 4.0, "bfloat16": 2.0}[run["gradients"]]),
        lowered=True,
    )
    return config, problem, plan_of(run, config)


def node_link_of(run: dict[str, Any]) -> LinkSpec:
    """Between nodes: a preset, or InfiniBand of another rate a GPU."""
    if "node_link" in run:
        return link(run["node_link"])
    near, rate = link("ib-200"), run["node_gbit_per_s"]
    return dataclasses.replace(near, name=f"ib-{rate}", bytes_per_s=near.bytes_per_s * rate / 200)


def plan_of(run: dict[str, Any], config: DecoderConfig) -> Plan:
    """What the run did."""
    staged = run.get("stages", 1) > 1
    stays = staged or run.get("zero", 3) < 3
    path = LayerPath(
        weights=Weights.STAY if stays else Weights.REFETCH,
        gradient=Gradient.ONCE,
        residual=next(one for one, policy in POLICY.items() if policy == run["recompute"]),
    )
    axes = ("replicas", "shard", "stages", "chunks", "features", "context")
    return Plan(
        **{name: run[name] for name in axes if name in run},
        context_by=run.get("context_by", "ring"),
        state=State.WHOLE if staged else State.SPLIT,
        order=Order.EARLIEST_BACKWARD if staged else Order.DEPTH_FIRST,
        microbatch_size=run["microbatch_size"],
        layers=(path,) * config.num_layers,
    )


def summary_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of what the predictions are off by."""
    held_out = [abs(row["error_pct"]) for row in rows if row["part"] == "held out"]
    found = {"median_abs_error_pct": statistics.median(abs(row["error_pct"]) for row in rows)}
    if held_out:
        found["median_abs_error_held_out_pct"] = statistics.median(held_out)
    return found


if __name__ == "__main__":
    main()
