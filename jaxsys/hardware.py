"""What devices and links can do, each figure with its source.

Two rates a device: the data sheet's peak, which MFU is counted against, and what products and fused
attention reach in practice, which times are predicted from. `measured` sources are this project's
own runs; `assumed` ones say what they were carried over from, and `jaxsys profile cluster` replaces
them.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise UsageError(f"{self.name}: bytes_per_s={self.bytes_per_s!r} must be above 0")
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


_H100_RATES = (
    "measured: a block's products in loops, on random numbers, on an H100 SXM "
    "(results/train_block_h100.json); large ones alone, on equal numbers, reach 780 to 798 TFLOP/s"
)
_H100_ATTENTION = "measured: cuDNN fused attention, likewise"
_SHARE = "assumed: the H100's measured share of its peak"

DEVICES: dict[str, DeviceSpec] = {
    "h100": DeviceSpec(
        name="h100",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12,
        attention_flops_per_s=551e12,
        memory_bytes=79.1 * GIB,
        memory_bytes_per_s=3.35e12,
        sources={
            "peak_flops_per_s": "NVIDIA H100 SXM5 data sheet, bf16 without sparsity",
            "product_flops_per_s": _H100_RATES,
            "attention_flops_per_s": _H100_ATTENTION,
            "memory_bytes": "80 GB HBM3 less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA H100 SXM5 data sheet",
        },
    ),
    "h200": DeviceSpec(
        name="h200",
        peak_flops_per_s=989.4e12,
        product_flops_per_s=661e12,
        attention_flops_per_s=551e12,
        memory_bytes=139.8 * GIB,
        memory_bytes_per_s=4.8e12,
        sources={
            "peak_flops_per_s": "NVIDIA H200 data sheet, bf16 without sparsity",
            "product_flops_per_s": "assumed: as the H100, whose compute die it shares",
            "attention_flops_per_s": "assumed: as the H100, whose compute die it shares",
            "memory_bytes": "141 GB HBM3e less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA H200 data sheet",
        },
    ),
    "a100-80g": DeviceSpec(
        name="a100-80g",
        peak_flops_per_s=312e12,
        product_flops_per_s=208e12,
        attention_flops_per_s=174e12,
        memory_bytes=79.1 * GIB,
        memory_bytes_per_s=2.039e12,
        sources={
            "peak_flops_per_s": "NVIDIA A100 80GB SXM data sheet, bf16 without sparsity",
            "product_flops_per_s": _SHARE,
            "attention_flops_per_s": _SHARE,
            "memory_bytes": "80 GB HBM2e less the driver's share, as nvidia-smi shows it",
            "memory_bytes_per_s": "NVIDIA A100 80GB SXM data sheet",
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
        sources={
            "bytes_per_s": f"{_GATHER}; ppermute of them 225 GB/s, of 512 MiB 290; the data sheet "
            "says 450 GB/s for NVLink 4",
            "latency_s": _NCCL_LATENCY,
            "contention": _CONTENTION,
        },
    ),
    "nvlink-a100": LinkSpec(
        name="nvlink-a100",
        bytes_per_s=133e9,
        latency_s=8e-6,
        contention=2.2,
        waiting_contention=WAITING,
        sources={
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


def link(name: str) -> LinkSpec:
    """The named preset.

    Raises:
        UsageError: if there is none; lists those there are.
    """
    if name not in LINKS:
        near = did_you_mean(name, LINKS)
        raise UsageError(f"link {name!r} is not known{near}; known: {', '.join(LINKS)}")
    return LINKS[name]
