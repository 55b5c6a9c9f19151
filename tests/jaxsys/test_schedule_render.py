"""Pictures hold what the simulation says."""

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from jaxsys.schedule import Costs, Link, simulate
from jaxsys.schedule.render import GIB, chrome_trace, draw, draw_timeline, write_chrome_trace
from jaxsys.strategies.weipipe import interleave
from jaxsys.strategies.zero import zero_4


@pytest.fixture(params=[interleave(4, 8), zero_4(2, 6, chunks=3)], ids=lambda s: s.name)
def simulation(request):
    costs = Costs(
        forward_s=1e-3,
        backward_s=2e-3,
        weight_bytes=1e6,
        gradient_bytes=2e6,
        activation_bytes=1e5,
        residual_bytes=3e6,
        static_bytes=1e7,
    )
    return simulate(request.param, costs, Link(bytes_per_s=1e10))


def test_trace_has_every_event_within_the_step(simulation, tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(simulation, path)
    trace = json.loads(path.read_text())
    assert trace == json.loads(json.dumps(chrome_trace(simulation)))
    bars = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(bars) == len(simulation.events)
    assert max(e["ts"] + e["dur"] for e in bars) <= 1e6 * simulation.step_s * (1 + 1e-9)
    for device in range(simulation.schedule.devices):
        mine = [e for e in bars if e["pid"] == device and e["cat"] == "compute"]
        assert sum(e["dur"] for e in mine) == pytest.approx(1e6 * simulation.busy_s[device])


def test_memory_counter_peaks_where_the_simulation_does(simulation):
    counters = [e for e in chrome_trace(simulation)["traceEvents"] if e["ph"] == "C"]
    for device, peak in enumerate(simulation.peak_bytes):
        held = [sum(e["args"].values()) for e in counters if e["pid"] == device]
        assert max(held) * GIB + 1e7 == pytest.approx(peak)


def test_picture_is_a_png_of_some_size(simulation, tmp_path):
    path = tmp_path / "step.png"
    draw(simulation, path)
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert width > 800
    assert height > 300


def test_every_colour_of_a_timeline_is_in_its_legend():
    schedule = replace(interleave(4, 8), members=2)
    costs = Costs(forward_s=1.0, backward_s=2.0, weight_bytes=1.0, gradient_bytes=1.0, join_s=0.1)
    axes = Figure().subplots()
    draw_timeline(simulate(schedule, costs, Link(bytes_per_s=2.0)), axes)
    legend = axes.get_legend()
    assert legend is not None
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["forward", "backward", "weight sent", "gradient sent", "pieces joined"]
    lines: list[Any] = [handle.get_color() for handle in legend.get_lines()]
    patches: list[Any] = [handle.get_facecolor() for handle in legend.get_patches()]
    shown = {to_hex(colour) for colour in (*lines, *patches)}
    bars: list[Any] = [colour for one in axes.collections for colour in one.get_facecolor()]
    drawn = {to_hex(colour) for colour in bars}
    assert drawn == shown
