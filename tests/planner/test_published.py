"""Runs that others published, as the script predicts them."""

import importlib.util
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.model.shapes import preset
from jaxsys.planner.axes import split_of_plan
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision, block_cost
from jaxsys.planner.plans import data_parallel_plan
from jaxsys.planner.workload import decoder_workload, kept_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "published_runs.py"
    spec = importlib.util.spec_from_file_location("published_runs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs() -> list[dict[str, Any]]:
    return json.loads((ROOT / "scripts" / "published_runs.json").read_text())["runs"]


def saved() -> dict[tuple[str, str], dict[str, Any]]:
    result = json.loads((ROOT / "results" / "planner_published.json").read_text())
    return {(row["source"], row["run"]): row for row in result["rows"]}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            run,
            id=f"{run['source']} {run['name']}",
            marks=[pytest.mark.slow] if "stages" in run else [],
        )
        for run in runs()
    ],
)
def test_predictions_are_those_of_the_result_file(script, run):
    row, kept = script.row_of(run), saved()[run["source"], run["name"]]
    assert row["predicted"] == pytest.approx(kept["predicted"], rel=1e-6)
    assert row["published"] == pytest.approx(kept["published"], rel=1e-9)


def test_half_of_what_nothing_was_fitted_to_is_within_ten_percent():
    rows = saved().values()
    held_out = [abs(row["error_pct"]) for row in rows if row["part"] == "held out"]
    assert len(held_out) >= 15 and len(held_out) > 3 * (len(rows) - len(held_out))
    assert statistics.median(held_out) < 10
    assert sorted(held_out)[-2] < 25  # but for torchtitan's 8B over 8 devices with async TP


def cost_of(kept: tuple[str, ...] | None, *, features: int = 1):
    workload = decoder_workload(
        "8b", preset("llama-3-8b"), sequence_length=8192, microbatch_size=1, selective=kept
    )
    cluster = Cluster(device=device("h100"), devices=8, link=link("nvlink"))
    plan = replace(data_parallel_plan(8 // features, 32), features=features)
    return workload, block_cost(
        workload.blocks[0], cluster.device, activation_bytes=workload.activation_bytes,
        precision=Precision(), recompute="selective", split=split_of_plan(cluster, plan),
    )  # fmt: skip


def test_a_recompute_policy_names_what_it_keeps():
    """As torchtitan's: attention, and every other product, stay; the rest is computed again."""
    everything = ("attention", "query", "key", "value", "out", "gate", "up", "down")
    assert set(everything) == set(kept_names(preset("llama-3-8b")))
    _, plain = cost_of(None)
    workload, some = cost_of(("attention", "query", "value", "gate", "down"))
    _, all_kept = cost_of(everything)
    config, tokens = preset("llama-3-8b"), 8192
    # What the block adds to the residual last is never needed again.
    again = config.hidden_size * (1024 + 4096 + config.intermediate_size)
    seconds = 2.0 * again * tokens / device("h100").product_flops_per_s
    assert some.input_gradient_s - all_kept.input_gradient_s == pytest.approx(seconds)
    assert all_kept.input_gradient_s == pytest.approx(plain.input_gradient_s)
    kept = 4096 + (4096 + 64) + 4096 + 1024 + 14336 + 4096  # input, attention, q, v, gate, down
    assert some.residual_bytes == 2.0 * tokens * kept
    assert some.work_bytes > all_kept.work_bytes
    assert workload.model_flops == cost_of(None)[0].model_flops
    # Where features are split, what attention adds to the residual is joined again.
    _, split = cost_of(("attention", "query", "value", "gate", "down"), features=2)
    _, kept_out = cost_of(("attention", "query", "value", "gate", "down", "out"), features=2)
    assert split.join_s == pytest.approx(11 / 10 * kept_out.join_s)


def test_names_that_no_block_makes_are_refused():
    with pytest.raises(UsageError, match=r"'quarry' is nothing that a block of this model makes"):
        cost_of(("quarry",))
