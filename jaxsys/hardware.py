"""What devices and links can do, each figure with its source: one row a device, one a link.

Two rates a device: the data sheet's peak, which MFU is counted against, and what products and fused
attention reach in practice, which times are predicted from. `measured` sources are this project's
own runs; `assumed` ones say what they were carried over from, and `jaxsys profile cluster` replaces
them.

Rates follow the clock, and long products do not run at the highest: the power cap holds an H200
at 1455 to 1500 of 1980 MHz (results/device_rates_h200.json). So `product_flops_per_s` is what a
program gets that runs for seconds, and

    product_flops_per_s = clocks.product_flops_per_cycle * clocks.sustained_mhz

`ClockSpec` is how rates and power follow the clock; serving's modelled GPUs
(`jaxsys.serve.energy.gpu_model`) are made from it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.schedule import Link

GIB = 2**30


def gib(size_bytes: float, *, up: bool = False) -> str:
    """A size in GiB, to three significant digits or more; rounded up where it is a limit to set."""
    size = size_bytes / GIB
    shown = f"{size:.3g}" if abs(size) < 100 else f"{size:.1f}"
    if up and float(shown) < size:
        return gib(size_bytes + 10.0 ** min(math.floor(math.log10(size)) - 2, -1) * GIB)
    return f"{shown} GiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSpec:
    """How a device's rates and power follow the clock of its multiprocessors.

    With x = f in GHz, d, c and m the shares of the time in which the device, its matrix units and
    its memory are busy:

        V = 1 + voltage_slope * max(0, x - voltage_floor)
        P = idle + memory * m + (clock + busy * d + compute * c) * x V**2, at most the power cap
    """

    product: str
    """What the maker calls it."""
    min_mhz: int
    max_mhz: int
    step_mhz: int
    sweet_spot_mhz: int
    """Clock of least energy per unit of compute-bound work."""
    sustained_mhz: float
    """The clock at which products of that rate a cycle give `DeviceSpec.product_flops_per_s`."""
    product_flops_per_cycle: float
    """Achieved in bf16 products while serving, whatever the clock."""
    high_bandwidth_bytes: float
    """Memory on the package; programs get `memory_bytes` of it."""
    achieved_bytes_per_s: float
    """Of memory, at or above `memory_knee_mhz`; below it bandwidth falls with the clock."""
    memory_knee_mhz: float
    power_cap_w: float
    idle_w: float
    clock_w: float
    busy_w: float
    compute_w: float
    memory_w: float
    voltage_floor_mhz: float
    """Below this clock the voltage does not fall with it."""
    voltage_slope: float
    """By what share of that floor the voltage rises a GHz above that clock."""
    link_bytes_per_s: float
    """One way, as a collective between GPUs of one machine sees it."""
    extrapolated: bool = False
    """No published clock or power point stands behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator."""

    name: str
    peak_flops_per_s: float
    """Dense bf16 products, the data sheet's figure."""
    product_flops_per_s: float
    """What bf16 products reach in a loop, on numbers that are not alike."""
    attention_flops_per_s: float
    """What fused causal attention reaches, its masked half not counted."""
    memory_bytes: float
    """What a program can allocate."""
    memory_bytes_per_s: float
    fused_attention: bool = True
    """Whether a kernel attends without forming the scores."""
    clocks: ClockSpec | None = None
    """None where nothing is known of how it follows its clock."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its figure comes from."""

    def __post_init__(self) -> None:
        for name in (
            "peak_flops_per_s",
            "product_flops_per_s",
            "attention_flops_per_s",
            "memory_bytes",
            "memory_bytes_per_s",
        ):
            if not getattr(self, name) > 0:
                raise UsageError(f"{self.name}: {name}={getattr(self, name)!r} must be above 0")

    def is_called(self, name: str) -> bool:
        """Whether a driver or JAX means it by `name`, such as "NVIDIA H100 80GB HBM3"."""
        kind = self.name.partition("-")[0].upper()
        return kind in name.upper().replace("-", " ").split()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """What joins a device to its neighbours: a message of n bytes takes latency + n / rate."""

    name: str
    bytes_per_s: float
    """One way, per device, as a program sees it."""
    latency_s: float
    """Of one message."""
    launch_s: float = 7e-6
    """Of starting one collective: kernel launch and synchronisation, whatever the link is."""
    contention: float = 0.0
    """By what share compute takes longer while transfers run."""
    waiting_contention: float = 0.0
    """By what share it does beside a transfer that waits for its other end."""
    switched_bytes_per_s: float | None = None
    """Of collectives of more than two devices, where a switch joins these; None: as of two."""
    switch_s: float | None = None
    """Latency of a collective that this switch runs, whatever the number of devices; None: it runs
    none, and a ring of P devices takes P - 1 messages."""
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "switched_bytes_per_s"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise UsageError(f"{self.name}: {name}={rate!r} must be above 0")
        for name in ("latency_s", "launch_s", "contention", "waiting_contention"):
            if getattr(self, name) < 0:
                raise UsageError(f"{self.name}: {name}={getattr(self, name)!r} must not be below 0")

    @property
    def link(self) -> Link:
        """The link as the schedule simulator takes it."""
        return Link(
            latency_s=self.latency_s,
            bytes_per_s=self.bytes_per_s,
            launch_s=self.launch_s,
            contention=self.contention,
            waiting_contention=self.waiting_contention,
        )

    def faster(self, factor: float) -> "LinkSpec":
        """The link with so many times its rates."""
        switched = self.switched_bytes_per_s
        return replace(
            self,
            bytes_per_s=factor * self.bytes_per_s,
            switched_bytes_per_s=None if switched is None else factor * switched,
        )

    def of_group(self, devices: int) -> Link:
        """The link as a collective of so many devices has it."""
        if devices <= 2 or self.switched_bytes_per_s is None:
            return self.link
        return replace(self.link, bytes_per_s=self.switched_bytes_per_s, switch_s=self.switch_s)


_H100_RATES = (
    "measured: a block's products in loops, on random numbers, on an H100 SXM "
    "(results/train_block_h100.json); large ones alone, on equal numbers, reach 780 to 798 TFLOP/s"
)
_H100_ATTENTION = "measured: cuDNN fused attention, likewise"
_SHARE = "assumed: the H100's measured share of its peak"

_HOPPER_CLOCKS: dict[str, Any] = {
    "min_mhz": 345,
    "max_mhz": 1980,
    "step_mhz": 15,
    "sweet_spot_mhz": 1080,
    "sustained_mhz": 1454.0,
    "product_flops_per_cycle": 454_600,
    "memory_knee_mhz": 900.0,
    "power_cap_w": 700.0,
    "idle_w": 78.7,
    "clock_w": 17.9,
    "busy_w": 98.3,
    "compute_w": 228.0,
    "voltage_floor_mhz": 1120.0,
    "voltage_slope": 0.255,
    "link_bytes_per_s": 199e9,
}
"""Clocks as nvidia-smi lists them. The rest was fitted together, to 31 timed iterations each of an
H100 and an H200 at default clocks (the profiles of results/energy_live_h100.json and
energy_live_h200.json, power by the counter), to DualScale's H100 table of power by clock
(Llama-3-70B prefill, TP2 rows), to three prompts of results/serve_gpu.json and to the H200's long
products at the power cap (results/device_rates_h200.json: 421,000 to 457,000 FLOP a cycle at 1455
to 1500 MHz); docs/energy.md says what was held out. 454,600 FLOP a cycle are 84 % of 132
multiprocessors x 4096. Below the knee memory is assumed to starve."""


_CAPPED_AT_500_W = 0.666
"""The share of its rates that a Hopper GPU keeps at 500 of 700 W: fitted to torchtitan's 8B on
eight (results/planner_published.json). Its power curve, which was fitted at 1080 MHz and above,
would leave it 0.77 of its clock."""

DEVICES: dict[str, DeviceSpec] = {
    "h100": DeviceSpec(
        name="h100",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12,
        attention_flops_per_s=551e12,
        memory_bytes=79.1 * GIB,
        memory_bytes_per_s=3.35e12,
        clocks=ClockSpec(
            product="H100-SXM5-80GB",
            high_bandwidth_bytes=80 * GIB,
            achieved_bytes_per_s=3.08e12,
            memory_w=99.0,
            **_HOPPER_CLOCKS,
        ),
        sources={
            "peak_flops_per_s": "NVIDIA H100 SXM5 data sheet, bf16 without sparsity",
            "product_flops_per_s": _H100_RATES,
            "attention_flops_per_s": _H100_ATTENTION,
            "memory_bytes": "80 GB HBM3 less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA H100 SXM5 data sheet",
            "clocks": "as said at _HOPPER_CLOCKS, achieved_bytes_per_s and memory_w too",
        },
    ),
    "h200": DeviceSpec(
        name="h200",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12,
        attention_flops_per_s=551e12,
        memory_bytes=139.8 * GIB,
        memory_bytes_per_s=4.8e12,
        clocks=ClockSpec(
            product="H200-SXM-141GB",
            high_bandwidth_bytes=141 * GIB,
            achieved_bytes_per_s=4.32e12,
            memory_w=175.0,
            **_HOPPER_CLOCKS,
        ),
        sources={
            "peak_flops_per_s": "NVIDIA H200 data sheet, bf16 without sparsity",
            "product_flops_per_s": "as the H100, whose compute die it shares; measured, products "
            "alone: 625 to 665 TFLOP/s by shape (results/device_rates_h200.json)",
            "attention_flops_per_s": "assumed: as the H100, whose compute die it shares",
            "memory_bytes": "141 GB HBM3e less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA H200 data sheet",
            "clocks": "as said at _HOPPER_CLOCKS, achieved_bytes_per_s and memory_w too; how power "
            "follows the clock: the H100's",
        },
    ),
    "gh200": DeviceSpec(
        name="gh200",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12,
        attention_flops_per_s=551e12,
        memory_bytes=88.5 * GIB,
        memory_bytes_per_s=4.0e12,
        clocks=ClockSpec(
            product="GH200-96GB",
            high_bandwidth_bytes=96e9,
            achieved_bytes_per_s=3.68e12,
            memory_w=120.0,
            extrapolated=True,
            **_HOPPER_CLOCKS,
        ),
        sources={
            "peak_flops_per_s": "NVIDIA GH200 data sheet, bf16 without sparsity",
            "product_flops_per_s": "assumed: as the H100, whose compute die it shares",
            "attention_flops_per_s": "assumed: as the H100, whose compute die it shares",
            "memory_bytes": "assumed: 96 GB HBM3 less a driver's share",
            "memory_bytes_per_s": "NVIDIA GH200 data sheet, 96 GB HBM3",
            "clocks": "the H100's; achieved_bytes_per_s: assumed, the H100's share of the data "
            "sheet; memory_w: assumed, between the H100's and the H200's by bandwidth; 700 W are "
            "the GPU's share, without the Grace CPU",
        },
    ),
    "a100-80g": DeviceSpec(
        name="a100-80g",
        peak_flops_per_s=312e12,
        product_flops_per_s=235e12,
        attention_flops_per_s=196e12,
        memory_bytes=79.1 * GIB,
        memory_bytes_per_s=2.039e12,
        clocks=ClockSpec(
            product="A100-SXM4-80GB",
            min_mhz=210,
            max_mhz=1410,
            step_mhz=15,
            sweet_spot_mhz=1005,
            sustained_mhz=1180.5,
            product_flops_per_cycle=221_184 * 0.90,
            high_bandwidth_bytes=80 * GIB,
            achieved_bytes_per_s=1.85e12,
            memory_knee_mhz=700.0,
            power_cap_w=400.0,
            idle_w=40.2,
            clock_w=30.0,
            busy_w=44.9,
            compute_w=40.0,
            memory_w=150.0,
            voltage_floor_mhz=1005.0,
            voltage_slope=1.0,
            link_bytes_per_s=133e9,
        ),
        sources={
            "peak_flops_per_s": "NVIDIA A100 80GB SXM data sheet, bf16 without sparsity",
            "product_flops_per_s": "fitted: Llama 2 7B on 128 of them, compiled, as IBM and Meta "
            "published it (results/planner_published.json)",
            "attention_flops_per_s": "assumed: what it is of products on an H100",
            "memory_bytes": "80 GB HBM2e less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA A100 80GB SXM data sheet",
            "clocks": "clocks: VoltanaLLM; 90 % of 108 multiprocessors x 2048 FLOP a cycle and "
            "power: fitted to VoltanaLLM's static runs (scripts/studies/calibration.py); "
            "sustained_mhz: assumed, where these give the product rate above; "
            "achieved_bytes_per_s: assumed, the H100's share of the data sheet; link_bytes_per_s: "
            "assumed, as the links' row; voltage floor: the published sweet spot (throttLL'eM says "
            "some 1050 MHz)",
        },
    ),
    "cpu": DeviceSpec(
        name="cpu",
        peak_flops_per_s=110e9,
        product_flops_per_s=50e9,
        attention_flops_per_s=10e9,
        memory_bytes=4 * GIB,
        memory_bytes_per_s=10e9,
        fused_attention=False,
        sources={
            "peak_flops_per_s": "measured: a float32 product of 1024 x 1024 on two server cores, "
            "108 GFLOP/s",
            "product_flops_per_s": "assumed: half of that, two virtual devices sharing the cores",
            "attention_flops_per_s": "assumed: XLA's unfused attention, bound by memory",
            "memory_bytes": "assumed: a share of a small machine",
            "memory_bytes_per_s": "assumed: one DDR4 channel or a share of it",
        },
    ),
    "h100-96g-500w": DeviceSpec(
        name="h100-96g-500w",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12 * _CAPPED_AT_500_W,
        attention_flops_per_s=551e12 * _CAPPED_AT_500_W,
        memory_bytes=95.0 * GIB,
        memory_bytes_per_s=2.4e12,
        clocks=ClockSpec(
            product="H100-SXM5-96GB-HBM2e",
            high_bandwidth_bytes=96 * GIB,
            achieved_bytes_per_s=2.2e12,
            memory_w=99.0,
            extrapolated=True,
            **(
                _HOPPER_CLOCKS
                | {
                    "power_cap_w": 500.0,
                    "sustained_mhz": _HOPPER_CLOCKS["sustained_mhz"] * _CAPPED_AT_500_W,
                }
            ),
        ),
        sources={
            "peak_flops_per_s": "NVIDIA H100 SXM5 data sheet, at 700 W",
            "product_flops_per_s": "the H100's, times what torchtitan's 8B on eight such GPUs was "
            "fitted to",
            "attention_flops_per_s": "likewise",
            "memory_bytes": "assumed: 96 GB HBM2e less a driver's share",
            "memory_bytes_per_s": "torchtitan's benchmark report of December 2024",
            "clocks": "the H100's with a cap of 500 W; achieved_bytes_per_s: assumed, the H100's "
            "share of the data sheet",
        },
    ),
}

# Every link's launch_s: PyTorch's AutoParallel takes 7 us as the floor of a kernel launch.

_NCCL_LATENCY = "assumed: the usual start-up of one NCCL step inside a machine"
_GATHER = "measured: all_gather of up to 256 MiB between two H100s, one way"
_CONTENTION = (
    "measured: products beside such a gather of g seconds take c g / (1 + c) longer "
    "(profiles in results/planner_measure_gpu2_*.json)"
)
WAITING = 0.3
"""Of NCCL's kernels, which take multiprocessors while they wait: a layer's kernels take 1.1 to 1.5
times as long beside one, measured in a ring over NVLink (results/ring_trace_h100.json); weighed by
their times, and assumed over other links."""
_AS_NVLINK = "assumed: as NVLink between H100s"
_AS_HOST = "assumed: as between H100s through host memory"
_AS_SOCKETS = "assumed: as between H100s over sockets"

LINKS: dict[str, LinkSpec] = {
    "nvlink": LinkSpec(
        name="nvlink",
        bytes_per_s=199e9,
        latency_s=8e-6,
        contention=2.2,
        waiting_contention=WAITING,
        switched_bytes_per_s=362e9,
        switch_s=23e-6,
        sources={
            "bytes_per_s": f"{_GATHER}; ppermute of them 225 GB/s, of 512 MiB 290; the data sheet "
            "says 450 GB/s for NVLink 4",
            "switched_bytes_per_s": "NCCL's all-reduce of 64 MiB over the eight H100s of a DGX, a "
            "sample of github.com/NVIDIA/dgxc-benchmarking (nccl/README.md); of 256 MiB 422",
            "latency_s": _NCCL_LATENCY,
            "switch_s": "NCCL's own model of NVLink SHARP inside a machine (github.com/NVIDIA/nccl "
            "at b647562, src/graph/tuning.cc: `hwLat` of NVLS), and 5/6 of a ring's rate",
            "contention": _CONTENTION,
        },
    ),
    "nvlink-a100": LinkSpec(
        name="nvlink-a100",
        bytes_per_s=133e9,
        latency_s=8e-6,
        contention=2.2,
        waiting_contention=WAITING,
        switched_bytes_per_s=241e9,
        sources={
            "switched_bytes_per_s": "assumed: the share of NVLink 4's that eight H100s reach",
            "bytes_per_s": "assumed: NVLink 3's 300 GB/s times NVLink 4's measured share",
            "latency_s": _NCCL_LATENCY,
            "contention": _AS_NVLINK,
        },
    ),
    "host-memory": LinkSpec(
        name="host-memory",
        bytes_per_s=24e9,
        latency_s=15e-6,
        contention=1.9,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": f"{_GATHER}, with peer access off; as a PCIe 4 x16 slot",
            "latency_s": "assumed: two copies instead of one",
            "contention": _CONTENTION,
        },
    ),
    "sockets": LinkSpec(
        name="sockets",
        bytes_per_s=2.7e9,
        latency_s=50e-6,
        contention=3.7,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": f"{_GATHER}, over NCCL's sockets; ppermute of them 2 GB/s",
            "latency_s": "assumed: a TCP round trip inside a machine",
            "contention": _CONTENTION,
        },
    ),
    "ib-400": LinkSpec(
        name="ib-400",
        bytes_per_s=45e9,
        latency_s=12e-6,
        contention=1.9,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": "assumed: 90 % of 400 Gb/s, one adapter a device",
            "latency_s": "assumed: one NCCL step over InfiniBand",
            "contention": _AS_HOST,
        },
    ),
    "ib-200": LinkSpec(
        name="ib-200",
        bytes_per_s=22.5e9,
        latency_s=12e-6,
        contention=1.9,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": "assumed: 90 % of 200 Gb/s, one adapter a device",
            "latency_s": "assumed: one NCCL step over InfiniBand",
            "contention": _AS_HOST,
        },
    ),
    "tcpx-100g": LinkSpec(
        name="tcpx-100g",
        bytes_per_s=8.0e9,
        latency_s=30e-6,
        contention=1.9,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": "fitted: what MaxText's Llama 2 7B loses from one A3 node of Google "
            "Cloud to two (results/planner_published.json); four adapters of 200 Gb/s for eight "
            "GPUs have 12.5 GB/s a GPU",
            "latency_s": "assumed: as TCP in one rack",
            "contention": _AS_HOST,
        },
    ),
    "ethernet-100g": LinkSpec(
        name="ethernet-100g",
        bytes_per_s=11.7e9,
        latency_s=30e-6,
        contention=3.7,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": "assumed: TCP's 94 % of 100 Gb/s",
            "latency_s": "assumed: a TCP round trip in one rack",
            "contention": _AS_SOCKETS,
        },
    ),
    "ethernet-10g": LinkSpec(
        name="ethernet-10g",
        bytes_per_s=1.17e9,
        latency_s=50e-6,
        contention=3.7,
        waiting_contention=WAITING,
        sources={
            "bytes_per_s": "assumed: TCP's 94 % of 10 Gb/s",
            "latency_s": "assumed: a TCP round trip in one rack",
            "contention": _AS_SOCKETS,
        },
    ),
}


def free_host_bytes() -> float | None:
    """Bytes a program can still allocate on this host; None where nothing tells.

    What Linux calls available, or what a container's limit leaves if that is less; elsewhere all of
    the host's memory.
    """
    meminfo = _read_counters(Path("/proc/meminfo"))
    if "MemAvailable:" not in meminfo:
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            return None
    free = 1024.0 * meminfo["MemAvailable:"]
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "anon"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
    ):
        try:
            allowed = float((Path(folder) / limit).read_text())  # "max" where there is none
        except (OSError, ValueError):
            continue
        free = min(free, allowed - _read_counters(Path(folder) / "memory.stat").get(used, 0))
    return max(free, 0.0)


def _read_counters(path: Path) -> dict[str, int]:
    """The first two words of each line; empty if the file is not there."""
    try:
        rows = [line.split()[:2] for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def device(name: str) -> DeviceSpec:
    """The named preset.

    Raises:
        UsageError: if there is none; lists those there are.
    """
    if name not in DEVICES:
        near = did_you_mean(name, DEVICES)
        raise UsageError(f"device {name!r} is not known{near}; known: {', '.join(DEVICES)}")
    return DEVICES[name]


def device_called(name: str) -> DeviceSpec | None:
    """The preset of what a driver or JAX calls `name`; None where there is none."""
    return next((spec for spec in DEVICES.values() if spec.is_called(name)), None)


def link(name: str) -> LinkSpec:
    """The named preset.

    Raises:
        UsageError: if there is none; lists those there are.
    """
    if name not in LINKS:
        near = did_you_mean(name, LINKS)
        raise UsageError(f"link {name!r} is not known{near}; known: {', '.join(LINKS)}")
    return LINKS[name]
