"""Pictures of a simulated step: a Chrome trace, which Perfetto opens, and a PNG.

Both show each device's compute and its sends against time, and the memory it holds, stacked by
kind of data on top of what is there all step long.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsys.axes import place_of
from jaxsys.files import write_whole

from .inside import Inside
from .schedule import Data, Move, Task, TaskKind
from .simulate import Event, Simulation

if TYPE_CHECKING:  # it takes longer to import than most plans do; only pictures need it
    from matplotlib.axes import Axes

GIB = 2**30
TASK_COLOURS: Mapping[TaskKind, str] = {
    TaskKind.FORWARD: "#4c78a8",
    TaskKind.BACKWARD: "#f58518",
    TaskKind.INPUT_GRADIENT: "#eeca3b",
    TaskKind.WEIGHT_GRADIENT: "#72b7b2",
}
DATA_COLOURS: Mapping[Data, str] = {
    Data.WEIGHT: "#4c78a8",
    Data.GRADIENT: "#e45756",
    Data.ACTIVATION: "#54a24b",
    Data.COTANGENT: "#b79a20",
    Data.RESIDUAL: "#9d755d",
    Data.TAP: "#79706e",
}
TASK_NAMES: Mapping[TaskKind, str] = {
    TaskKind.FORWARD: "forward",
    TaskKind.BACKWARD: "backward",
    TaskKind.INPUT_GRADIENT: "input gradient",
    TaskKind.WEIGHT_GRADIENT: "weight gradient",
}


STREAMS = ("compute", "send", "inside")
"""Threads of a device in a trace, and rows of it in a picture."""
INSIDE_COLOUR = "#b279a2"


def _streams(simulation: Simulation) -> tuple[str, ...]:
    """Those that there are: nothing is sent inside tasks that a device computes alone."""
    some = any(event.stream == "inside" for event in simulation.events)
    return STREAMS if some else STREAMS[:2]


def chrome_trace(simulation: Simulation) -> dict[str, Any]:
    """The step in the Chrome trace event format: one process a device, one thread a stream.

    Times are microseconds, as the format has it; memory is a counter track in GiB by kind of data.
    """
    events: list[dict[str, Any]] = []
    for device in range(simulation.schedule.devices):
        events.append(_name("process_name", device, 0, f"device {device}"))
        for thread, stream in enumerate(_streams(simulation)):
            events.append(_name("thread_name", device, thread, stream))
    for event in simulation.events:
        events.append(
            {
                "name": event.label,
                "cat": event.stream,
                "ph": "X",
                "ts": 1e6 * event.start_s,
                "dur": 1e6 * (event.end_s - event.start_s),
                "pid": event.device,
                "tid": STREAMS.index(event.stream),
                "args": _arguments(event),
            }
        )
    for device, rows in enumerate(simulation.memory):
        for start_s, row in zip(simulation.tick_start_s[device], rows, strict=True):
            held = {str(data): row.get(data, 0.0) / GIB for data in DATA_COLOURS}
            events.append(
                {
                    "name": "memory in GiB",
                    "ph": "C",
                    "ts": 1e6 * start_s,
                    "pid": device,
                    "args": held,
                }
            )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "schedule": simulation.schedule.name,
            "step_s": simulation.step_s,
            "peak_gib": max(simulation.peak_bytes) / GIB,
        },
    }


def write_chrome_trace(simulation: Simulation, path: str | Path) -> None:
    """Writes `chrome_trace` to a file that https://ui.perfetto.dev opens."""
    write_whole(Path(path), json.dumps(chrome_trace(simulation)))


def draw(simulation: Simulation, path: str | Path, *, title: str | None = None) -> None:
    """Writes the timeline and the memory curve of the fullest device as a PNG.

    Args:
        simulation: a simulated step.
        path: where to write it.
        title: the schedule's name and its step time, if not given.
    """
    from matplotlib.figure import Figure

    schedule = simulation.schedule
    figure = Figure(figsize=(12, 2.6 + 0.42 * schedule.devices), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[0.6 + 0.42 * schedule.devices, 1.9])
    timeline = figure.add_subplot(grid[0])
    memory = figure.add_subplot(grid[1], sharex=timeline)
    if title is None:
        title = f"{schedule.name}: {1e3 * simulation.step_s:.4g} ms a step"
    timeline.set_title(title)
    draw_timeline(simulation, timeline)
    draw_memory(simulation, memory)
    timeline.tick_params(labelbottom=False)
    figure.savefig(path, format="png", dpi=110)


def draw_timeline(simulation: Simulation, axes: "Axes") -> None:
    """Draws compute (thick) and sends (thin, below it) of each device against milliseconds.

    What devices that compute a task together send each other is drawn on it, and what the members
    of a place send each other before and after it beside it.
    """
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    schedule = simulation.schedule
    bars: dict[tuple[int, str, str], list[tuple[float, float]]] = {}
    used: set[TaskKind] = set()
    sent: set[Data] = set()
    for event in simulation.events:
        if isinstance(event.work, Task):
            used.add(event.work.kind)
            colour = TASK_COLOURS[event.work.kind]
        elif isinstance(event.work, Move):
            sent.add(event.work.block.data)
            colour = DATA_COLOURS[event.work.block.data]
        else:
            colour = INSIDE_COLOUR
        key = (event.device, event.stream, colour)
        bars.setdefault(key, []).append((1e3 * event.start_s, 1e3 * (event.end_s - event.start_s)))
    for (device, stream, colour), spans in bars.items():
        place = {
            "compute": (device - 0.38, 0.5),
            "send": (device + 0.15, 0.22),
            "inside": (device - 0.12, 0.22),
        }[stream]
        axes.broken_barh(spans, place, facecolors=colour, edgecolors="white", linewidth=0.2)
    one = place_of(schedule)
    axes.set_xlim(0, 1e3 * simulation.step_s)
    axes.set_ylim(schedule.devices - 0.45, -0.55)
    axes.set_yticks(range(schedule.devices), [f"{one} {d}" for d in range(schedule.devices)])
    handles: list[Artist] = [
        Patch(color=colour, label=TASK_NAMES[kind])
        for kind, colour in TASK_COLOURS.items()
        if kind in used
    ]
    # As thin as their bars, which may have a task's colour.
    handles += [
        Line2D([], [], color=colour, linewidth=3, label=f"{data} sent")
        for data, colour in DATA_COLOURS.items()
        if data in sent
    ]
    if names := sorted({e.work.name for e in simulation.events if isinstance(e.work, Inside)}):
        handles.append(Patch(color=INSIDE_COLOUR, label=" and ".join(names)))
    axes.legend(handles=handles, loc="upper right", ncols=4, fontsize="small")


def draw_memory(simulation: Simulation, axes: "Axes") -> None:
    """Draws the fullest device's memory against milliseconds, stacked by kind of data."""
    peaks = simulation.peak_bytes
    device = peaks.index(max(peaks))
    rows = simulation.memory[device]
    static = peaks[device] - max((sum(row.values()) for row in rows), default=0.0)
    times = [1e3 * start for start in simulation.tick_start_s[device]]
    times.append(1e3 * simulation.step_s)
    kinds = [data for data in DATA_COLOURS if any(row.get(data) for row in rows)]
    series = [[row.get(data, 0.0) / GIB for row in rows] for data in kinds]
    # A step curve holds each tick's value until the next begins.
    stack = [[static / GIB] * len(times)] + [[*values, values[-1]] for values in series if values]
    axes.stackplot(
        times,
        *stack,
        step="post",
        labels=["at rest", *(str(kind) for kind in kinds)],
        colors=["#bab0ac", *(DATA_COLOURS[kind] for kind in kinds)],
    )
    axes.axhline(peaks[device] / GIB, color="black", linewidth=0.6, linestyle="--")
    axes.set_xlabel("ms")
    axes.set_ylabel(f"GiB, device {device}")
    axes.legend(loc="upper right", ncols=4, fontsize="small")


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _arguments(event: Event) -> dict[str, Any]:
    work = event.work
    if isinstance(work, Task):
        return {
            "kind": TASK_NAMES[work.kind],
            "chunk": work.chunk,
            "microbatch": work.microbatch,
            "tick": work.tick,
        }
    if isinstance(work, Move):
        return {
            "kind": str(work.kind),
            "block": str(work.block),
            "start_tick": work.start,
            "arrive_tick": work.arrive,
        }
    return {"sent_mib": work.sent_bytes / 2**20}
