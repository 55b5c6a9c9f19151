"""docs/RESULTS.md is what its result files say, and none of them is left out."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsys.results import write_result

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/RESULTS.md"


@pytest.fixture
def report(monkeypatch):
    """The modules of scripts/report."""
    monkeypatch.syspath_prepend(ROOT / "scripts/report")
    names = ("headline", "tables", "headlines", "page")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_the_page_is_up_to_date(report):
    fresh = report["page"].render(report["headlines"].HEADLINES, ROOT, PAGE)
    assert PAGE.read_text() == fresh, "run scripts/reproduce --report-only"


def test_every_result_file_is_on_the_page():
    text = PAGE.read_text()
    files = sorted((ROOT / "results").glob("*.json"))
    assert files
    assert [path.name for path in files if path.name not in text] == []


def test_figures_of_a_new_result_appear_and_say_their_hardware(report, tmp_path):
    row = {
        "devices": 2,
        "link": "host",
        "shape": "1b",
        "sequence_length": 4096,
        "recompute": "none",
        "planners_choice": False,
    }
    path = write_result(
        tmp_path / "results/gpus_2.json",
        benchmark="gpus",
        kind="measured",
        config={},
        rows=[
            row
            | {"schedule": "1f1b-overlap", "step_s": 1.5, "model_tflops_per_gpu": 321.4}
            | {"temp_gib": 20.0, "argument_gib": 5.25, "predicted_gib": 24.0},
            row | {"schedule": "weipipe-interleave", "step_s": 1.0, "planners_choice": True},
            row | {"schedule": "gspmd-fsdp", "failed": "RESOURCE_EXHAUSTED: no room"},
        ],
    )
    record = json.loads(path.read_text())
    record["hardware"]["gpus"] = ["NVIDIA H100, 80 GB"] * 2
    path.write_text(json.dumps(record))
    text = report["page"].render(report["headlines"].HEADLINES, tmp_path, tmp_path / "docs/X.md")
    sections = dict(re.findall(r"^### (.*?)\n(.*?)(?=^###? )", text, re.MULTILINE | re.DOTALL))
    shown = sections["WeiPipe against 1F1B and FSDP on GPUs"]
    rows = [line.split(" | ")[4:] for line in shown.splitlines() if "H100 | host |" in line]
    assert rows == [
        ["`weipipe-interleave`", "none", "-", "1.000", "1.00", *["-"] * 4, "planner's choice |"],
        ["`1f1b-overlap`", "none", "-", "1.500", "1.50", "321.4", "-", "25.2", "24.0", " |"],
        ["`gspmd-fsdp`", "none", "-", "out of memory", *["-"] * 5, " |"],
    ]
    assert "2 x NVIDIA H100" in shown
    unmade = sections["What the lowering costs on one GPU"]
    assert "**Not run yet**: needs a GPU." in unmade


def test_a_slow_network_is_compared_with_its_ring(report, tmp_path):
    """Each rate and ratio has its own ring; without one, or without a time, nothing is compared."""
    rows = [
        {"mbit_per_s": None, "gs_over_18hlp": 0.5, "schedule": "weipipe-interleave", "step_s": 1.0},
        {"mbit_per_s": 20.0, "gs_over_18hlp": 0.5, "schedule": "weipipe-interleave", "step_s": 4.0},
        {"mbit_per_s": 20.0, "gs_over_18hlp": 0.5, "schedule": "1f1b-overlap", "step_s": 5.0,
         "predicted_s": 5.5},
        {"mbit_per_s": 20.0, "gs_over_18hlp": 2.0, "schedule": "1f1b-overlap", "step_s": 9.0},
        {"mbit_per_s": 20.0, "gs_over_18hlp": 0.5, "schedule": "gspmd-fsdp", "failed": "lost"},
    ]  # fmt: skip
    config = {"hosts": 4, "cpu_share": 0.4, "hidden": 64, "sequence_length": 288}
    path = tmp_path / "network_wan.json"
    write_result(path, benchmark="network", kind="measured", config=config, rows=rows)
    (headline,) = (h for h in report["headlines"].HEADLINES if "network*.json" in h.files)
    shown = headline.show(headline.results(tmp_path)).splitlines()
    assert shown[-5:] == [
        "| no limit | 0.50 | `weipipe-interleave` | 1.000 | 1.00 | - |",
        "| 20 | 0.50 | `weipipe-interleave` | 4.000 | 1.00 | - |",
        "| 20 | 0.50 | `1f1b-overlap` | 5.000 | 1.25 | 5.500 |",
        "| 20 | 2.00 | `1f1b-overlap` | 9.000 | - | - |",
        "| 20 | 0.50 | `gspmd-fsdp` | lost | - | - |",
    ]


def test_measured_and_simulated_are_apart(report):
    text = PAGE.read_text().split("\n## Other result files\n")[0]
    measured, simulated = text.split("\n## Simulated\n")
    for headline in report["headlines"].HEADLINES:
        own, other = measured, simulated
        if headline.kind == "simulated":
            own, other = other, own
        assert f"\n### {headline.title}\n" in own and f"\n### {headline.title}\n" not in other
    for path in (ROOT / "results").glob("*.json"):
        kind = json.loads(path.read_text())["kind"]
        assert path.name not in (measured if kind == "simulated" else simulated)


def test_a_run_is_made_once_and_resumed(tmp_path, monkeypatch, capsys, report):
    """What is done is not done again; what failed is, and a machine without GPUs says so."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "scripts/report/__main__.py")
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    run = report["headline"].Run
    calls = []

    def call(line, **_):
        calls.append(line[1:])
        return subprocess.CompletedProcess(line, returncode=int(len(calls) == 2))

    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr(main, "NOTES", tmp_path / "out")
    monkeypatch.setattr(main.subprocess, "run", call)
    monkeypatch.setattr(main, "hardware", lambda: {"gpus": []})
    monkeypatch.setattr(main, "HEADLINES", ())
    wanted = [
        run(name="works", commands=("scripts/works --out {gpu}",)),
        run(name="fails", commands=("scripts/fails", "jaxsys plan")),
        run(name="gpu", gpus=2, commands=("scripts/never",)),
    ]
    monkeypatch.setattr(main, "runs", lambda: wanted)
    monkeypatch.setattr(sys, "argv", ["reproduce"])
    assert main.main() == 1
    assert calls == [
        [str(tmp_path / "scripts/works"), "--out", "cpu"],
        [str(tmp_path / "scripts/fails")],
    ]
    assert "gpu: needs 2 GPUs, has 0" in capsys.readouterr().out
    assert main.main() == 0
    assert calls[2:] == [[str(tmp_path / "scripts/fails")], ["-m", "jaxsys.cli", "plan"]]
    assert main.main() == 0 and len(calls) == 4
