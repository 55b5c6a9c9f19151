"""The demo's picture: nothing of it is cut off or written over."""

import importlib.util
from pathlib import Path

from matplotlib.figure import Figure

SCRIPT = Path(__file__).parents[2] / "scripts/demo_report.py"
STRATEGIES = ("zero-3", "found: zero-3.5 over 8, 2 times", "weipipe-interleave")


def load():
    spec = importlib.util.spec_from_file_location("demo_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_titles_and_labels_lie_in_the_picture_and_apart(tmp_path, monkeypatch):
    demo = load()
    drawn: list[Figure] = []
    monkeypatch.setattr(demo.plt, "close", drawn.append)
    plan = {"rows": [{"strategy": s, "fits": True, "step_s": 5.0} for s in STRATEGIES]}
    run = {"kind": "run", "schedule": "weipipe-interleave", "mesh": {"ring": 4}, "device": "cpu"}
    steps = [{"kind": "step", "step": n, "loss": 5.0 / n} for n in range(1, 61)]
    answers = [{"question": question, "answer": "word " * 60} for question in demo.QUESTIONS]
    attained = {"ttft_attainment_pct": 100.0, "itl_attainment_pct": 100.0}
    policies = [
        {"policy": name, "energy_j_per_token": 0.94, **attained} for name in ("max", "both")
    ]
    energy = {"policies": policies, "saving_pct": 41.0}
    assert demo.draw(tmp_path, plan, [run, *steps], answers, energy).stat().st_size > 10_000
    figure = drawn[0]
    whole, renderer = figure.bbox.padded(-5), figure.canvas.get_renderer()  # type: ignore
    titles = [axis.title.get_window_extent(renderer) for axis in figure.axes]
    texts = [axis.get_tightbbox(renderer) for axis in figure.axes]
    for box in titles + texts:
        assert box is not None
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1, "cut off at a side"
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1, "cut off above or below"
    for row in ((0, 1), (2, 3)):
        left, right = (texts[n] for n in row)
        assert left is not None and right is not None and left.x1 < right.x0
