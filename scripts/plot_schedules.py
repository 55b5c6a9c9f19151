#!/usr/bin/env python
"""Draws every schedule of docs/schedules.md from its simulation.

scripts/plot_schedules.py [--to docs/schedules] [--devices 4] [--microbatches 8]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxsys.schedule import Costs, Data, Link, Task, TaskKind, check, simulate
from jaxsys.schedule.render import TASK_COLOURS, TASK_NAMES, draw_timeline
from jaxsys.strategies import NAMES, build

COSTS = Costs(forward_s=1.0, backward_s=2.0, input_gradient_s=1.0, weight_gradient_s=1.0)
SPECIAL = {
    "weipipe-wzb2-paired": Costs(
        forward_s=1.0, backward_s=3.0, input_gradient_s=2.0, weight_gradient_s=1.0
    )
}
"""Drawn with the times it is made for."""
NODES = "weipipe-keep"
"""Drawn on nodes as well."""
MPMD = ("1f1b", "1f1b-interleaved", "zb-h1", "zb-h2")
"""Drawn with sends that do not block, as published; the others with all devices in step."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw every schedule from its simulation.")
    parser.add_argument("--to", default="docs/schedules", help="folder for the PNG files")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    arguments = parser.parse_args()
    folder = Path(arguments.to)
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if name.startswith(("gpipe", "1f1b", "zb-", "weipipe")):
            draw(name, arguments.devices, arguments.microbatches, folder / f"{name}.png")
            print(folder / f"{name}.png")
    draw_nodes(arguments.devices, arguments.microbatches, folder / "nodes.png")
    print(folder / "nodes.png")


def draw_nodes(nodes: int, microbatches: int, path: Path) -> None:
    """A ring of nodes, with what members send each other and what goes from node to node."""
    schedule = replace(build(NODES, devices=nodes, microbatches=microbatches), members=2)
    costs = replace(
        COSTS,
        weight_bytes=0.5,  # a member's piece
        gradient_bytes=0.5,
        join_s=0.1,
        join_bytes=0.5,
        cut_s=0.1,
        cut_bytes=0.5,
    )
    result = simulate(schedule, costs, Link(bytes_per_s=0.5))
    figure = Figure(figsize=(11, 1.2 + 0.5 * nodes), layout="constrained")
    timeline = figure.subplots()
    draw_timeline(result, timeline)
    timeline.set_title(
        f"{NODES} on {nodes} nodes of 2, M={microbatches} on each member: {result.step_s:.1f} time "
        f"units; a member sends {sum(result.sent_bytes) / nodes:.1f} chunks to the next node (thin "
        f"bars), {sum(result.inside_bytes) / nodes:.0f} inside",
        fontsize=10,
    )
    timeline.xaxis.set_major_formatter(lambda thousandths, _: f"{thousandths / 1000:g}")
    timeline.set_xlabel("time units")
    legend = timeline.get_legend()  # below, where it covers nothing
    assert legend is not None
    legend.set_loc("upper right")
    legend.set_bbox_to_anchor((1.0, -0.2))
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def draw(name: str, devices: int, microbatches: int, path: Path) -> None:
    """One schedule: what each device runs when, and what the first and last device hold."""
    schedule = build(name, devices=devices, microbatches=microbatches)
    found = check(schedule)
    eager = name in MPMD
    result = simulate(
        schedule,
        SPECIAL.get(name, COSTS),
        Link(),
        lockstep=not eager,
        eager_sends=eager,
        known_trace=found,
    )
    # A chunk of an interleaved pipeline takes 1/v of a stage's time.
    scale = devices / schedule.chunks
    end = result.step_s * scale
    figure = Figure(figsize=(11, 1.5 + 0.42 * devices), layout="constrained")
    timeline, held = figure.subplots(
        2, 1, sharex=True, height_ratios=[0.42 * devices, 0.9], squeeze=True
    )
    used = set()
    for event in result.events:
        if isinstance(event.work, Task):
            task = event.work
            used.add(task.kind)
            box(timeline, task, event.start_s * scale, event.end_s * scale, schedule.chunks)
    timeline.set_xlim(0, end)
    timeline.set_ylim(devices - 0.5, -0.5)
    timeline.set_yticks(range(devices), [f"device {d}" for d in range(devices)])
    mode = "sends do not block" if eager else "devices in step"
    timeline.set_title(
        f"{name}, P={devices}, M={microbatches}, {mode}: {end:g} time units, "
        f"bubble {100 * result.bubble:.1f} %, inside the spans {100 * result.inner_bubble:.1f} %",
        fontsize=10,
    )
    timeline.legend(
        handles=[Patch(color=TASK_COLOURS[k], label=TASK_NAMES[k]) for k in TaskKind if k in used],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8,
        frameon=False,
    )
    for device, style in ((0, "-"), (devices - 1, "--")):
        counts = [0] * schedule.ticks
        for copy in found.on_device(device):
            if copy.block.data in (Data.RESIDUAL, Data.TAP):
                for tick in range(copy.born, copy.last_use + 1):
                    counts[tick] += 1
        times = [start * scale for start in result.tick_start_s[device]]
        shown = [count * scale for count in counts]
        held.step(
            [*times, end],
            [*shown, shown[-1]],
            where="post",
            linestyle=style,
            color="black",
            linewidth=1,
            label=f"device {device}: at most {max(shown):g}",
        )
    held.set_ylim(0, None)
    held.set_ylabel("held", fontsize=8)
    held.set_xlabel("time units; numbers are microbatches, lighter boxes are later chunks")
    held.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    for axes in (timeline, held):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def box(axes, task: Task, start: float, end: float, chunks: int) -> None:
    """One task: its microbatch's number, lighter for later chunks."""
    shade = 1.0 - 0.55 * task.chunk / max(1, chunks - 1)
    axes.add_patch(
        Rectangle(
            (start, task.device - 0.4),
            end - start,
            0.8,
            facecolor=TASK_COLOURS[task.kind],
            alpha=shade,
            edgecolor="white",
            linewidth=0.8,
        )
    )
    axes.text(
        (start + end) / 2, task.device, str(task.microbatch), ha="center", va="center", fontsize=7
    )


if __name__ == "__main__":
    sys.exit(main())
