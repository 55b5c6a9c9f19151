#!/usr/bin/env python
"""What the planner finds, how fast, and how well it predicts.

    scripts/bench_planner.py regimes    each known strategy, found in the setting where it is best
    scripts/bench_planner.py map        the best plan by link, tokens and memory, as a picture
    scripts/bench_planner.py zero       ZeRO-3.5 and ZeRO-4 against a prefetching ZeRO-3 and ZeRO-2
    scripts/bench_planner.py memory     what ZeRO-3.5 and ZeRO-4 hold below ZeRO-2, and where
    scripts/bench_planner.py sweep      every plan of Llama-3-8B on 64 devices
    scripts/bench_planner.py size       what `jaxsys plan` itself takes, by model and devices
    scripts/bench_planner.py measure    predicted against measured steps on this machine's devices

All but `measure` need no accelerator, and all but it and `size` are simulated. `measure` profiles
the machine on its first call and keeps what it has measured, so that it may be called again until
no plan is left. JSON goes to results/planner_*.json, and pictures are drawn from that JSON alone.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxsys.errors import RunError, UsageError
from jaxsys.hardware import device, link
from jaxsys.model.config import DecoderConfig
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.plans import Gradient, LayerPath, Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.search import Effort, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.results import read_result, table, write_result
from studies import planner_cells as measure
from studies.planner_regimes import limited, ratio_problem, regimes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
GIB = 2**30
QUICK = Effort(refine=1, chains=8, steps=16, pairs=1000, restarts=1, tolerance=2e-3)
MAP_LINKS_GB_PER_S = (2, 12, 25, 50, 290)
MAP_TOKENS = (1024, 4096, 16384)
MAP_MEMORY_GIB = (72, 24)
MAP_EFFORT = Effort(refine=1, chains=4, steps=4, pairs=100, restarts=1, tolerance=5e-3)
GRADIENT_BYTES = 2.0
SIZES = (
    "--model llama-3-8b --devices 8",
    "--model llama-3-8b --devices 64",
    "--model llama-3-8b --devices 512",
    "--model llama-3-8b --devices 1024",
    "--model llama-3-70b --devices 64",
    "--model llama-3-70b --devices 256",
    "--model llama-3-70b --devices 1024",
    "--model llama-3.1-405b --devices 16384",
    "--model llama-3.1-405b --devices 16384 --pod-devices 2048 --pod-link ib-200",
    "--model llama-3-70b --devices 256 --search",
)
"""What is planned for, on nodes of eight where there is more than one."""


def run_regimes() -> None:
    rows = []
    for regime in regimes():
        start = time.process_time()
        result = search(Space.of(regime.problem, microbatch_sizes=[1]), effort=QUICK)
        found = result.best
        other = next(f for f in result.by_base if recognise(f.plan) != regime.name)
        rows.append(
            {
                "expected": regime.name,
                "found": recognise(found.plan),
                "next": recognise(other.plan),
                "next_slower_pct": 100 * (other.potential / found.potential - 1),
                "plans_evaluated": result.evaluated,
                "cpu_s": time.process_time() - start,
                "plan": describe(found.plan),
                "reason": regime.reason,
            }
        )
    write_result(
        RESULTS / "planner_regimes.json",
        benchmark="planner_regimes",
        kind="simulated",
        config={"effort": dataclasses.asdict(QUICK)},
        rows=rows,
    )
    columns = {"expected": "", "found": "", "next": "", "next_slower_pct": ".1f", "cpu_s": ".1f"}
    print(table(rows, columns))
    wrong = [row["expected"] for row in rows if row["expected"] != row["found"]]
    if wrong:
        raise RunError(f"not found where expected: {', '.join(wrong)}")


def run_size(only: str) -> None:
    """Each in a process of its own: processor seconds, which a busy machine hardly changes, wall
    seconds and load beside them, and the most memory it held. Cases not run keep their rows."""
    rows = []
    for case in SIZES:
        if not re.search(only, case):
            continue
        nodes = [] if case.endswith(" 8") else ["--node-devices", "8", "--node-link", "ib-400"]
        command = [sys.executable, "-m", "jaxsys.cli", "plan", *case.split(), *nodes]
        load, start = os.getloadavg()[0], time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise RunError(f"{' '.join(command)} failed")
        rows.append(
            {
                "plan": " ".join([*case.split(), *nodes]),
                "cpu_s": used.ru_utime + used.ru_stime,
                "wall_s": time.monotonic() - start,
                "load": load,
                "peak_gib": used.ru_maxrss * 1024 / GIB,
                "answer": next(line for line in said.splitlines() if " a step, of which " in line),
            }
        )
        print(f"{rows[-1]['cpu_s']:.1f} s  {case}", file=sys.stderr, flush=True)
    path = RESULTS / "planner_size.json"
    named = {row["plan"] for row in rows}
    before = read_result(path)["rows"] if path.exists() else []
    rows += [row for row in before if row["plan"] not in named]
    write_result(path, benchmark="planner_size", kind="measured", config={}, rows=rows)
    columns = {"plan": "", "cpu_s": ".1f", "wall_s": ".1f", "load": ".0f", "peak_gib": ".2f"}
    print(table(rows, columns))


def run_map(model: str) -> None:
    config = preset(model)
    rows = []
    start = time.monotonic()
    for memory in MAP_MEMORY_GIB:
        for tokens in MAP_TOKENS:
            for rate in MAP_LINKS_GB_PER_S:
                wire = dataclasses.replace(
                    link("nvlink"), name="wire", bytes_per_s=1e9 * rate, switched_bytes_per_s=None,
                )  # fmt: skip
                problem = llama_problem(model, config, tokens, memory, wire, devices=8, turns=8)
                space = Space.of(problem, microbatch_sizes=[1]).domain("lookahead", 1)
                result = search(space, effort=MAP_EFFORT)
                rows.append(
                    {
                        "memory_gib": memory,
                        "tokens_per_microbatch": tokens,
                        "link_gb_per_s": rate,
                        "strategy": recognise(result.best.plan),
                        "features": result.best.plan.features,
                        "fits": result.fits,
                        "step_s": result.best.step_s,
                        "plan": describe(result.best.plan),
                    }
                )
            done = len(rows)
            print(f"{done} cells, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    path = write_result(
        RESULTS / "planner_map.json",
        benchmark="planner_map",
        kind="simulated",
        config={"model": model, "devices": 8, "device": "h100", "microbatches_per_device": 8},
        rows=rows,
    )
    draw_map(path)


def llama_problem(
    model: str, config: DecoderConfig, tokens: int, memory_gib: float, wire: Any, **sizes: int
) -> Problem:
    return Problem(
        workload_of=lambda size: decoder_workload(
            model, config, sequence_length=tokens, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=sizes["devices"], link=wire),
        batch=sizes["devices"] * sizes["turns"],
        memory_bytes=memory_gib * GIB,
        lowered=True,
    )


def draw_map(path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    result = read_result(path)
    rows = result["rows"]
    names = sorted({row["strategy"] for row in rows})
    palette = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2",
               "#ff9da6", "#9d755d", "#bab0ac"]  # fmt: skip
    colour = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    memories = sorted({row["memory_gib"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.6 * len(memories), 4.2), layout="constrained")
    for axes, memory in zip(
        figure.subplots(1, len(memories), squeeze=False)[0], memories, strict=True
    ):
        mine = [row for row in rows if row["memory_gib"] == memory]
        links = sorted({row["link_gb_per_s"] for row in mine})
        lengths = sorted({row["tokens_per_microbatch"] for row in mine})
        for row in mine:
            x, y = links.index(row["link_gb_per_s"]), lengths.index(row["tokens_per_microbatch"])
            shade = colour[row["strategy"]] if row["fits"] else "white"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white"))
            text = f"x{row['features']}" if row["features"] > 1 else ""
            axes.text(x + 0.5, y + 0.5, text if row["fits"] else "-", ha="center", va="center")
        axes.set_xlim(0, len(links))
        axes.set_ylim(0, len(lengths))
        axes.set_xticks([i + 0.5 for i in range(len(links))], [str(n) for n in links])
        axes.set_yticks([i + 0.5 for i in range(len(lengths))], [str(n) for n in lengths])
        axes.set_title(f"{memory} GiB per device")
        axes.set_xlabel("link, GB/s")
        axes.set_ylabel("tokens of a microbatch")
    config = result["config"]
    figure.suptitle(
        f"Best plan of {config['model']} on {config['devices']} x {config['device']}, "
        f"{config['microbatches_per_device']} microbatches each (xN: features split N ways)"
    )
    handles = [Patch(color=colour[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(names)))
    figure.savefig(ROOT / "docs" / "planner_map.png", dpi=110)


def run_zero() -> None:
    """Steady gain by the ratio of gather to forward time, 16 microbatches, keep and defer all."""
    rows = []
    for ratio in (0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 3.0):
        problem = ratio_problem(ratio=ratio, residuals=4.0, turns=16, layers=32, latency_s=0.0)
        row: dict[str, Any] = {"gather_over_forward": ratio}
        peaks = {}
        for name, weights, gradient in (
            ("zero_2", Weights.STAY, Gradient.EACH),
            ("zero_3", Weights.REFETCH, Gradient.EACH),
            ("zero_3_5", Weights.BETWEEN, Gradient.EACH),
            ("zero_4", Weights.BETWEEN, Gradient.DEFERRED),
        ):
            path = LayerPath(weights=weights, gradient=gradient, residual=Residual.KEEP)
            plans = [
                Plan(shard=8, state=State.SPLIT, lookahead=ahead, layers=(path,) * 32)
                for ahead in (1, 2, 4)
            ]
            tried = [Evaluator(problem).plan(plan) for plan in plans]
            estimates = min(tried, key=lambda e: e.step_s[0])  # each as well as it can prefetch
            row[f"{name}_step_s"] = float(estimates.step_s[0])
            peaks[name] = float(estimates.peak_bytes[0])
        tuned = limited(
            problem,
            lambda s: (
                s.domain("shard", 8).copy("refetch").reduce("each").domain("residual", "keep")
            ),
            1.05,
        )
        space = Space.of(tuned, microbatch_sizes=[1]).domain("shard", 8)
        space = space.domain("residual", "keep").domain("state", "split")
        best = search(space, effort=dataclasses.replace(QUICK, refine=3)).best
        row |= {
            "zero_3_5_speedup_over_zero_3": row["zero_3_step_s"] / row["zero_3_5_step_s"],
            "zero_4_speedup_over_zero_3": row["zero_3_step_s"] / row["zero_4_step_s"],
            "found_speedup_over_zero_3": row["zero_3_step_s"] / best.step_s,
            "found": describe(best.plan),
            "zero_4_speedup_over_zero_2": row["zero_2_step_s"] / row["zero_4_step_s"],
            "zero_4_memory_below_zero_2_pct": 100 * (1 - peaks["zero_4"] / peaks["zero_2"]),
        }
        rows.append(row)
    path = write_result(
        RESULTS / "planner_zero.json",
        benchmark="planner_zero",
        kind="simulated",
        config={"layers": 32, "microbatches_per_device": 16, "residuals_over_weights": 4.0,
                "backward_over_forward": 2.0, "memory_over_zero_3": 1.05,
                "gradient_bytes": GRADIENT_BYTES},
        rows=rows,
    )  # fmt: skip
    shown = {key: ".3f" for key in rows[0] if "speedup" in key or "over_forward" in key}
    print(table(rows, {**shown, "found": ""}))
    draw_zero(path)


def draw_zero(path: Path) -> None:
    from matplotlib.figure import Figure

    rows = read_result(path)["rows"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    x = [row["gather_over_forward"] for row in rows]
    for key, label in (
        ("zero_3_5_speedup_over_zero_3", "ZeRO-3.5, all kept"),
        ("zero_4_speedup_over_zero_3", "ZeRO-4, all kept and deferred"),
        ("found_speedup_over_zero_3", "found, in ZeRO-3's memory and 5 % more"),
    ):
        axes.plot(x, [row[key] for row in rows], marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("gather time over forward time of a layer")
    axes.set_ylabel("speed over a prefetching ZeRO-3")
    axes.set_title("16 microbatches a device, predicted")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.02))
    figure.savefig(ROOT / "docs" / "planner_zero.png", dpi=110)


def run_memory() -> None:
    """Peak memory under ZeRO-2's, by residuals, devices and when ZeRO-2 sums its gradients.

    32 layers, 16 microbatches, bf16 weights, Adam in float32 (12 bytes a parameter).
    """
    rows = []
    for devices, gradient_bytes in itertools.product((8, 64), (2.0, 4.0)):
        for residuals in (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0):
            problem = ratio_problem(
                ratio=1.4, residuals=residuals, turns=16, layers=32, devices=devices, latency_s=0.0
            )
            problem = dataclasses.replace(
                problem, precision=Precision(gradient_bytes=gradient_bytes)
            )

            def peak(weights: Weights, gradient: Gradient, bottom: int = 32) -> float:
                path = LayerPath(weights=weights, gradient=gradient, residual=Residual.KEEP)
                plain = dataclasses.replace(path, weights=Weights.REFETCH, gradient=Gradient.EACH)
                layers = (path,) * bottom + (plain,) * (32 - bottom)
                plan = Plan(shard=devices, state=State.SPLIT, layers=layers)  # noqa: B023
                return float(Evaluator(problem).plan(plan).peak_bytes[0])  # noqa: B023

            each, once = peak(Weights.STAY, Gradient.EACH), peak(Weights.STAY, Gradient.ONCE)
            kept = min(32, int(32 * residuals))
            row: dict[str, Any] = {
                "devices": devices,
                "gradient_bytes": gradient_bytes,
                "residuals_over_weights": residuals,
            }
            for name, mine in (
                ("zero_3_5_all", peak(Weights.BETWEEN, Gradient.EACH)),
                ("zero_4_all", peak(Weights.BETWEEN, Gradient.DEFERRED)),
                ("zero_3_5_within", peak(Weights.BETWEEN, Gradient.EACH, kept)),
            ):
                row[f"{name}_below_zero_2_pct"] = 100 * (1 - mine / each)
                row[f"{name}_below_zero_2_local_sums_pct"] = 100 * (1 - mine / once)
            rows.append({**row, "layers_kept_within": kept})
    path = write_result(
        RESULTS / "planner_memory.json",
        benchmark="planner_memory",
        kind="simulated",
        config={"layers": 32, "microbatches_per_device": 16, "weight_bytes": 2,
                "state_bytes": 12},
        rows=rows,
    )  # fmt: skip
    print(table(rows, {key: ".1f" for key in rows[0]}))
    draw_memory(path)


def draw_memory(path: Path) -> None:
    from matplotlib.figure import Figure

    rows = read_result(path)["rows"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    groups = sorted({(row["gradient_bytes"], row["devices"]) for row in rows})
    for axes, (size, devices) in zip(
        figure.subplots(2, 2, sharex=True, sharey=True).flat, groups, strict=True
    ):
        mine = [r for r in rows if (r["gradient_bytes"], r["devices"]) == (size, devices)]
        x = [row["residuals_over_weights"] for row in mine]
        for key, label in (
            ("zero_3_5_all", "ZeRO-3.5, all kept"),
            ("zero_4_all", "ZeRO-4, all kept and deferred"),
            ("zero_3_5_within", "ZeRO-3.5, as many kept as ZeRO-3's peak allows"),
        ):
            each = [row[f"{key}_below_zero_2_pct"] for row in mine]
            once = [row[f"{key}_below_zero_2_local_sums_pct"] for row in mine]
            (line,) = axes.plot(x, each, marker="o", label=label)
            axes.plot(x, once, marker="o", linestyle="--", color=line.get_color())
        axes.axhline(36.6, color="grey", linewidth=0.8, label="36.6 %")
        axes.set_title(f"{devices} devices, gradients of {size:g} bytes")
        axes.set_ylim(-40, 90)
    for axes in figure.axes[2:]:
        axes.set_xlabel("residuals over weights of a layer")
    for axes in figure.axes[::2]:
        axes.set_ylabel("memory below ZeRO-2, %")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        title="solid: ZeRO-2 that reduces every microbatch; dashed: that sums locally (ZeRO-1)",
        loc="outside lower center",
        ncols=2,
    )
    figure.savefig(ROOT / "docs" / "planner_memory.png", dpi=110)


def run_sweep(devices: int) -> None:
    config = preset("llama-3-8b")
    cluster = Cluster(
        device=device("h100"),
        devices=devices,
        link=link("nvlink"),
        node_devices=8,
        node_link=link("ib-400"),
    )
    problem = Problem(
        workload_of=lambda size: decoder_workload(
            "llama-3-8b", config, sequence_length=8192, microbatch_size=size
        ),
        cluster=cluster,
        batch=4 * devices,
        memory_bytes=0.92 * cluster.device.memory_bytes,
        lowered=True,
    )
    start, cpu = time.monotonic(), time.process_time()

    def progress(moment: Any) -> None:
        print(
            f"{moment.elapsed_s:6.1f} s  {moment.phase:>8} {moment.done}/{moment.total}  "
            f"{moment.best.step_s:.4f} s  {describe(moment.best.plan)}",
            file=sys.stderr,
            flush=True,
        )

    space = Space.of(problem)
    result = search(space, effort=Effort(refine=4, restarts=1, tolerance=1e-3), progress=progress)
    rows = [
        {
            "strategy": recognise(found.plan),
            "step_s": found.step_s,
            "peak_gib": found.peak_bytes / GIB,
            "plan": describe(found.plan),
        }
        for found in result.by_base[:12]
    ]
    write_result(
        RESULTS / "planner_sweep.json",
        benchmark="planner_sweep",
        kind="simulated",
        config={"model": "llama-3-8b", "devices": devices, "cluster": str(cluster),
                "sequences": problem.batch, "sequence_length": 8192},
        rows=rows,
        wall_s=time.monotonic() - start,
        cpu_s=time.process_time() - cpu,
        common_parts=len(list(space.bases())),
        ruled_out_by_bound=result.skipped,
        plans_evaluated=result.evaluated,
        history=[
            {"elapsed_s": m.elapsed_s, "step_s": m.best.step_s, "plan": describe(m.best.plan)}
            for m in result.history
        ],
    )  # fmt: skip
    print(table(rows, {"strategy": "", "step_s": ".4f", "peak_gib": ".1f", "plan": ""}))
    print(f"{time.monotonic() - start:.0f} s wall, {time.process_time() - cpu:.0f} s CPU")


def run_measure(options: argparse.Namespace) -> None:
    """Steps of many plans, predicted and then run, on this machine's devices."""
    os.environ.update(measure.LINKS[options.link])  # NCCL reads them when JAX starts
    from jaxsys.mesh import devices_ahead, make_mesh, request_devices
    from jaxsys.planner.profile import build_profile, profile_of

    devices = options.devices or 2
    ahead = options.compile_only
    chosen = devices_ahead(devices) if ahead else request_devices(devices)
    on_cpu = chosen[0].platform == "cpu"
    name = f"{'cpu' if on_cpu else 'gpu'}{devices}"
    if ahead:
        name += "_ahead"
    elif devices > 1 and not on_cpu:
        name += f"_{options.link}"
    path = (options.out or RESULTS) / f"planner_measure_{name}.json"
    model = "byte-llama" if on_cpu else "llama-3-8b"
    lengths = options.tokens
    if lengths is None:
        lengths = [128] if on_cpu else [1024, 4096] if devices > 1 else [1024, 4096, 16384]
    config = dataclasses.replace(preset(model), num_layers=2 if on_cpu else 4)
    if not on_cpu:
        config = dataclasses.replace(config, vocab_size=32000)
    before = read_result(path) if path.exists() else {}
    rows: list[dict[str, Any]] = before.get("rows", [])
    value, first = before.get("profile"), before.get("first_profile")
    if options.profile_again:
        if not rows:
            raise UsageError(f"{path} has no steps to predict again; run without --profile-again")
        lengths = sorted({row["tokens"] for row in rows})
        first, value = first or value, None
    if value is None and not ahead:
        value = build_profile(
            model,
            preset(model),
            devices=devices,
            tokens=max(lengths),
            repeats=options.repeats,
            largest_bytes=(2**22 if on_cpu else 2**28),
        )
    near = link("nvlink")  # of one device, or of a program that does not run: of no effect
    if value is None:
        cluster = Cluster(device=device("h100"), devices=devices, link=near)
    else:
        profile = profile_of(value, source=path.name)
        cluster = Cluster(device=profile.device, devices=devices, link=profile.link or near)
    mesh = make_mesh(devices, devices=chosen)

    def save(rows: list[dict[str, Any]]) -> None:
        write_result(
            path,
            benchmark="planner_measure",
            kind="measured",
            config={"compile_only": ahead, "link": options.link,
                    "nccl": measure.LINKS[options.link], "devices": devices,
                    "model": model, "layers": config.num_layers, "vocabulary": config.vocab_size},
            rows=rows,
            summary=measure.summary(rows),
            profile=value,
            **({"first_profile": first} if first else {}),
        )  # fmt: skip
        times = {} if ahead else {"measured_s": ".4f", "predicted_s": ".4f"}
        shown = {"cell": "", **times, "measured_gib": ".3f", "predicted_gib": ".3f",
                 "compile_s": ".1f"}  # fmt: skip
        print(table(rows[-1:], shown).splitlines()[-1], file=sys.stderr, flush=True)

    if options.profile_again:
        rows = measure.predicted_again(rows, config, cluster)
        save(rows)
        print(json.dumps(measure.summary(rows), indent=1))
        return

    wanted = [
        cell
        for cell in measure.cells(devices, config.num_layers, tuple(lengths), options.gradients)
        if re.search(options.only, cell.name)
    ]

    def compile_one(cell: measure.Cell) -> measure.Compiled:
        return measure.compile_cell(cell, config, cluster, mesh)

    ready: dict[str, measure.Compiled] = {}
    if options.jobs > 1:
        ready = measure.compile_cells(measure.unmeasured(wanted, rows), compile_one, options.jobs)

    def run(cell: measure.Cell) -> dict[str, Any]:
        compiled = ready.pop(cell.name, None) or compile_one(cell)
        return compiled.row if ahead else measure.run_cell(compiled, repeats=options.repeats)

    left = measure.measure(wanted, rows, run, seconds=options.seconds, save=save)
    print(json.dumps(measure.summary(rows), indent=1))
    print(f"{len(rows)} cells in {path}, {left} left" + (": call again" if left else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of the planner.")
    add = parser.add_argument
    add("what", choices=("regimes", "map", "zero", "memory", "sweep", "size", "measure"))
    add("--model", default="llama-3-8b", help="of the map")
    add("--devices", type=int, help="of the sweep (64) or of measure (2)")
    add("--link", default="direct", choices=tuple(measure.LINKS), help="between GPUs, for measure")
    add("--compile-only", action="store_true", help="measure: memory alone, of GPUs not here too")
    add(
        "--profile-again",
        action="store_true",
        help="measure: a new profile, and what it predicts for the steps measured before",
    )
    add("--seconds", type=float, default=420, help="measure starts no further plan after this long")
    add("--repeats", type=int, default=5)
    add("--tokens", type=int, nargs="+", help="of a microbatch, for measure")
    add(
        "--gradients",
        default="float32",
        choices=("float32", "bfloat16"),
        help="measure: in what they are summed and sent",
    )
    add(
        "--only", default="", metavar="REGEX", help="measure, size: plans whose name has this in it"
    )
    add("--jobs", type=int, default=1, help="measure: compile so many at a time, before timing")
    add("--out", type=Path, help="of measure; results/ if not given")
    options = parser.parse_args()
    runs = {
        "regimes": run_regimes,
        "map": lambda: run_map(options.model),
        "zero": run_zero,
        "sweep": lambda: run_sweep(options.devices or 64),
        "memory": run_memory,
        "size": lambda: run_size(options.only),
        "measure": lambda: run_measure(options),
    }
    try:
        runs[options.what]()
    except (UsageError, RunError) as error:
        print(f"bench_planner: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


if __name__ == "__main__":
    main()
