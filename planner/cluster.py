"""Devices and the links between them, in one or two levels.

Devices are numbered node by node. A group of w devices, s apart, that spans nodes runs a collective
in two levels, first inside the node and then, with what is left for each device to move, between
nodes:  t = ring(w_in, size) + ring(w_out, size / w_in).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

from jaxsys.errors import UsageError
from jaxsys.hardware import DeviceSpec, LinkSpec
from jaxsys.schedule import Link

STRAGGLING = 0.0057
"""By what share a step takes longer with each doubling of nodes: all wait for the slowest.

torchtitan's benchmark report of December 2024, Llama 3.1 8B, FSDP on 8 and on 128 H100s, where
transfers hide: 5,762 to 5,605, compiled 6,667 to 6,514, in float8 8,532 to 8,380 tokens/s a GPU, so
1.8 to 2.7 % over four doublings. What the network itself loses as it grows is in it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLink(Link):
    """What joins a group's neighbours, and how its collectives run.

    Latency and rate are those of the slowest hop between neighbours.
    """

    inside: Link
    inside_devices: int
    between: Link
    between_devices: int

    def collective_s(self, size_bytes: float, *, devices: int, rounds: int = 1) -> float:
        """Seconds of a two-level ring collective over the group."""
        if devices == 1:  # alone there is nothing to send
            return 0.0
        if devices != self.inside_devices * self.between_devices:
            raise ValueError(
                f"a group of {self.inside_devices} x {self.between_devices} devices cannot run a "
                f"collective over {devices}"
            )
        time_s = self.launch_s
        for link, ways, size in (
            (self.inside, self.inside_devices, size_bytes),
            (self.between, self.between_devices, size_bytes / self.inside_devices),
        ):
            steps = rounds * (ways - 1)
            time_s += steps * link.latency_s + steps / ways * size / link.bytes_per_s
        return time_s


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """N equal devices."""

    device: DeviceSpec
    devices: int
    link: LinkSpec
    """Inside a node."""
    node_devices: int | None = None
    """Devices of a node; all of them, if not given."""
    node_link: LinkSpec | None = None
    """Between nodes, per device."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise UsageError(f"devices={self.devices} must be at least 1")
        if (self.node_devices is None) != (self.node_link is None):
            raise UsageError("a cluster of nodes needs both node_devices and node_link")
        if self.node_devices is not None and self.node_devices < 1:
            raise UsageError(f"node_devices={self.node_devices} must be at least 1")
        if self.node_devices is not None and self.devices % self.node_devices:
            raise UsageError(
                f"node_devices={self.node_devices} does not divide devices={self.devices}"
            )

    def __str__(self) -> str:
        text = f"{self.devices} x {self.device.name} over {self.link.name}"
        if self.node_link is None:
            return text
        return f"{text}, {self.node_link.name} between nodes of {self.node_devices}"

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.devices // (self.node_devices or self.devices)

    @functools.cached_property
    def slowest(self) -> DeviceSpec:
        """The device that the others wait for in every step: slower, the more nodes there are."""
        if self.nodes == 1:
            return self.device
        longer = 1.0 + STRAGGLING * math.log2(self.nodes)
        rates = ("product_flops_per_s", "attention_flops_per_s", "memory_bytes_per_s")
        slow = {name: getattr(self.device, name) / longer for name in rates}
        return dataclasses.replace(self.device, **slow)

    def group(self, ways: int, stride: int = 1) -> GroupLink:
        """The link of groups of `ways` devices, `stride` apart."""
        inside = self.link.link
        node = self.node_devices or self.devices
        within = max(1, min(ways, node // stride))
        while ways % within:  # a group that nodes cut unevenly uses a common divisor of both
            within -= 1
        between = self.node_link.link if self.node_link is not None else inside
        spans = ways > within
        slow = between if spans else inside
        return GroupLink(
            latency_s=slow.latency_s,
            bytes_per_s=slow.bytes_per_s,
            launch_s=slow.launch_s,
            contention=max(inside.contention if within > 1 else 0.0, slow.contention),
            waiting_contention=slow.waiting_contention,
            inside=inside,
            inside_devices=within,
            between=between,
            between_devices=ways // within,
        )

    def scaled(self, *, link_bytes_per_s: float) -> "Cluster":
        """The same cluster with another rate inside its nodes."""
        return dataclasses.replace(
            self, link=dataclasses.replace(self.link, bytes_per_s=link_bytes_per_s)
        )
