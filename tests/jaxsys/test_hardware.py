"""Presets are complete, sourced, and refuse what they do not know."""

import dataclasses
import math

import pytest

from jaxsys.errors import UsageError
from jaxsys.hardware import DEVICES, GIB, LINKS, device, device_called, gib, link


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_figure_has_a_source(name: str) -> None:
    spec = device(name)
    figures = {f.name for f in dataclasses.fields(spec)} - {"name", "fused_attention", "sources"}
    assert figures - ({"clocks"} if spec.clocks is None else set()) == set(spec.sources)
    assert spec.name == name
    assert spec.product_flops_per_s <= spec.peak_flops_per_s


@pytest.mark.parametrize("name", [name for name, spec in DEVICES.items() if spec.clocks])
def test_a_device_has_one_product_rate(name: str) -> None:
    """What plans count with is the rate a cycle, which serving counts with, at the clock said."""
    spec = device(name)
    clocks = spec.clocks
    assert clocks is not None and clocks.min_mhz < clocks.sustained_mhz < clocks.max_mhz
    sustained = clocks.product_flops_per_cycle * clocks.sustained_mhz * 1e6
    assert spec.product_flops_per_s == pytest.approx(sustained, rel=0.01)
    assert clocks.achieved_bytes_per_s < spec.memory_bytes_per_s
    assert spec.memory_bytes < clocks.high_bandwidth_bytes


def test_devices_are_known_by_what_drivers_call_them() -> None:
    for called, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
    ):
        found = device_called(called)
        assert found is not None and found.name == name
    assert device_called("NVIDIA T4") is None


@pytest.mark.parametrize("name", LINKS)
def test_every_link_figure_has_a_source(name: str) -> None:
    spec = link(name)
    switched = {"switched_bytes_per_s"} if spec.switched_bytes_per_s else set()
    switched |= {"switch_s"} if spec.switch_s is not None else set()
    assert set(spec.sources) == {"bytes_per_s", "latency_s", "contention"} | switched
    assert spec.of_group(2) == spec.link
    assert spec.of_group(8).bytes_per_s == (spec.switched_bytes_per_s or spec.bytes_per_s)
    fixed = spec.launch_s + spec.latency_s
    assert spec.link.transfer_s(1e9) == pytest.approx(fixed + 1e9 / spec.bytes_per_s)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="h100, h200"):
        device("h1000")
    with pytest.raises(UsageError, match="nvlink, "):
        link("string")


def test_figures_must_be_positive() -> None:
    with pytest.raises(UsageError, match="bytes_per_s=0"):
        dataclasses.replace(link("nvlink"), bytes_per_s=0)
    with pytest.raises(UsageError, match="memory_bytes=-1"):
        dataclasses.replace(device("h100"), memory_bytes=-1)


def test_ring_collectives_take_their_steps_and_their_share_of_bytes() -> None:
    spec = dataclasses.replace(link("nvlink"), bytes_per_s=1e9, latency_s=1e-6, launch_s=1e-5)
    once = spec.link.collective_s(8e9, devices=8)
    assert once == pytest.approx(1e-5 + 7e-6 + 7.0)
    assert spec.link.collective_s(8e9, devices=8, rounds=2) == pytest.approx(2 * once - 1e-5)


def test_sizes_have_three_significant_digits_and_limits_are_not_rounded_down():
    sizes = (0.000512, 0.0444, 7.5, 61.94, 171.62, 1024.0, math.inf)
    assert [gib(size * GIB) for size in sizes] == [
        f"{shown} GiB" for shown in ("0.000512", "0.0444", "7.5", "61.9", "171.6", "1024.0", "inf")
    ]
    for size in (0.00012341, 0.04442, 7.5, 9.9999, 61.94, 99.96, 171.62):
        limit = float(gib(size * GIB, up=True).split()[0])
        assert size <= limit <= 1.01 * size


def test_a_faster_link_is_faster_between_any_number_of_devices() -> None:
    twice = link("nvlink").faster(2)
    assert twice.of_group(2).bytes_per_s == 2 * link("nvlink").of_group(2).bytes_per_s
    assert twice.of_group(8).bytes_per_s == 2 * link("nvlink").of_group(8).bytes_per_s
    assert link("ib-400").faster(2).switched_bytes_per_s is None
