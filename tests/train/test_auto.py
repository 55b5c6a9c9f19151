"""`schedule="auto"` takes the planner's fastest strategy that fits and can be run."""

from types import SimpleNamespace

import pytest

from jaxsys import hardware, strategies
from jaxsys.errors import UsageError
from jaxsys.model import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.named import compare
from jaxsys.planner.workload import llama_workload
from jaxsys.train import auto

WORKLOAD = llama_workload(
    "llama-3-8b", preset("llama-3-8b"), sequence_length=8192, microbatch_size=1
)
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


def test_takes_the_fastest_that_fits_and_runs():
    choice = auto.choose(WORKLOAD, [H100] * 8, microbatches=64)
    cluster = Cluster(device=hardware.device("h100"), devices=8, link=hardware.link("nvlink"))
    rows = compare(WORKLOAD, cluster, microbatches=64).rows
    able = [row for row in rows if row.fits and row.strategy in strategies.NAMES]
    best = min(able, key=lambda row: row.step_s)
    assert choice.schedule.name == best.strategy and choice.recompute == best.recompute
    assert (choice.schedule.devices, choice.schedule.microbatches) == (8, 64)
    assert best.strategy in choice.reason and "predicted" in choice.reason


def test_says_so_when_nothing_fits_or_the_device_is_unknown():
    with pytest.raises(UsageError, match="no strategy fits"):
        auto.choose(WORKLOAD, [H100], microbatches=2)
    other = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X")
    with pytest.raises(UsageError, match="no preset for AMD Instinct MI300X; name a schedule"):
        auto.choose(WORKLOAD, [other] * 8, microbatches=64)
