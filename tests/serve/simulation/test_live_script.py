"""The live run beside the simulator: the whole command, on a CPU with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("instances", ["colocated", "1P1D"])
def test_the_command_serves_measures_and_predicts(tmp_path, instances):
    out = tmp_path / "live.json"
    line = [sys.executable, str(ROOT / "scripts/bench_energy_live.py"), "--model", "tiny"]
    line += ["--duration", "4", "--rate", "4", "--instances", instances, "--out", str(out)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    rows = {row["figure"]: row for row in result["rows"]}
    for figure in ("ttft_p50_ms", "itl_mean_ms", "itl_p99_ms"):
        assert rows[figure]["measured"] > 0 and rows[figure]["predicted"] > 0
        assert rows[figure]["prediction_error_pct"] is not None
    assert rows["output_tokens"]["measured"] == rows["output_tokens"]["predicted"]
    # No GPU here: energy is modelled by the server, and nothing predicts it.
    assert rows["energy_j_per_token"]["measured"] > 0
    assert rows["energy_j_per_token"]["predicted"] is None
    assert result["energy"].startswith("modelled")
    assert not result["failures"]
    assert all(row["decide_wall_p99_us"] > 0 for row in result["decisions"])
    assert result["profile"]["samples"]
    # The same simulator says the same of the record.
    line = [sys.executable, str(ROOT / "scripts/bench_energy_live.py"), "--again", str(out)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(out.read_text())
    assert all(row["again"] == row["predicted"] for row in again["rows"])
    assert again["hardware"] == result["hardware"] and again["ttft_s"] == result["ttft_s"]


@pytest.mark.slow
def test_loads_are_predicted_served_and_noted_part_by_part(tmp_path):
    out = tmp_path / "loads.json"
    line = [sys.executable, str(ROOT / "scripts/bench_energy_loads.py"), "run", "--model", "tiny"]
    line += ["--seconds", "2", "--load-seconds", "0.05", "--out", str(out)]
    line += ["--short-switch-interval"]
    line += ["--predicted", str(tmp_path / "predicted.json"), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 27
    assert set(result["short_switch_interval"]) == set(result["measured"])
    for row in result["rows"]:
        if row["figure"] != "energy_j_per_token":  # nothing reads energy on a CPU
            assert row["measured"] > 0 and row["predicted"] > 0 and row["profiled"] > 0
    for name, measured in result["measured"].items():
        server = np.load(tmp_path / "logs" / f"{name}.npz")
        client = np.load(tmp_path / "logs" / f"{name} client.npz")
        assert measured["held_up"]["compile_events"] == 0
        # Each token of each request was at the front before the client had it.
        assert len(server["token_s"]) == client["tokens"].sum() == measured["output_tokens"]
        ends = np.cumsum(client["tokens"])
        for request, end, count in zip(client["name"], ends, client["tokens"], strict=True):
            at_front_s = server["token_s"][server["token_of"] == request]
            assert len(at_front_s) == count
            assert (client["came_s"][end - count : end] > at_front_s).all()
        # Every step of the decode instance, in order: planned, dispatched, waited for, ended.
        column = {name: place for place, name in enumerate(server["columns"])}
        steps = server["decode-0"]
        assert steps[:, column["batch"]].sum() == measured["output_tokens"] - len(client["tokens"])
        order = ("turn_s", "dispatch_s", "dispatched_s", "turned_s", "collect_s", "collected_s")
        times_s = steps[:, [column[name] for name in (*order, "sunk_s", "ended_s")]]
        assert (np.diff(times_s, axis=1) >= 0).all()
    # What was noted before the loads is enough to predict them again.
    assert result["found_before"]["lone_served_s"] > 0 and result["profile"]["dispatch_s"]
    line = [sys.executable, str(ROOT / "scripts/bench_energy_loads.py"), "again", "--model", "tiny"]
    line += ["--seconds", "2", "--out", str(out), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(out.read_text())
    assert all(row["again"] > 0 for row in again["rows"] if row["profiled"] is not None)
    assert [row["profiled"] for row in again["rows"]] == [row["profiled"] for row in result["rows"]]
