"""The live run beside the simulator: the whole command, on a CPU with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

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
