"""What SmolLM2 says in each form is near what it says in float32."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_quality.py"

BOUNDS = {
    "float32+int8": 0.4,
    "float32+fp8": 4.0,
    "int8": 1.5,
    "fp8": 6.0,
    "fp8+int8 both": 8.0,
    "int4": 35.0,
}
"""Percent of perplexity, at most: some three times what more tokens give."""


@pytest.mark.slow
def test_perplexity_in_each_form_is_within_bounds(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    out = tmp_path / "quality.json"
    command = ["bench", "--windows", "1", "--length", "256", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--forms", "float32", *BOUNDS])
    assert bench.main() == 0
    exact, *rows = json.loads(out.read_text())["rows"]
    assert exact["tokens"] == 256 and 5 < exact["perplexity"] < 40
    for row in rows:
        assert abs(row["over_float32_pct"]) < BOUNDS[row["form"]], row["form"]
    sizes = {row["form"]: row["weights_mib"] for row in rows}
    assert sizes["int4"] < sizes["int8"] == pytest.approx(sizes["fp8"], rel=0.01)
