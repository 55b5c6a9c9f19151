"""Devices and the links between them, in up to three levels: nodes, and pods of nodes.

Devices are numbered node by node. A group of w devices, s apart, that spans nodes runs a collective
in two levels, inside nodes and, with what is left for each device to move, between them. Both send
at once, piece by piece, so that the slower one tells the time: of a block of S bytes

    t = latencies + max((w_in - 1) / w_in S / B_in, (w_out - 1) / w_out S / w_in / B_out)

and likewise between pods.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

from jaxsys.errors import UsageError
from jaxsys.hardware import DeviceSpec, LinkSpec
from jaxsys.schedule import Link

LARGEST_NODE = 72
"""Devices of the largest group that one fast link joins: NVIDIA's GB200 NVL72."""

SWITCHED_RATE = 5 / 6
"""Of a collective that a switch runs, over a ring's: NCCL's own model, see `hardware.LINKS`."""

STRAGGLING = 0.0057
"""By what share a step takes longer with each doubling of nodes: all wait for the slowest.

torchtitan's benchmark report of December 2024, Llama 3.1 8B, FSDP on 8 and on 128 H100s, where
transfers hide: 5,762 to 5,605, compiled 6,667 to 6,514, in float8 8,532 to 8,380 tokens/s a GPU, so
1.8 to 2.7 % over four doublings. What the network itself loses as it grows is in it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLink(Link):
    """What joins a group's neighbours, and how its collectives run.

    Latency and rate are those of the slowest hop between neighbours, as a transfer has them.
    """

    levels: tuple[tuple[Link, int], ...]
    """What joins devices of a node, nodes and pods, and how many of the group it joins each."""

    def collective_s(self, size_bytes: float, *, devices: int, rounds: int = 1) -> float:
        """Seconds of a collective over the group, all of its levels at once.

        Devices that a switch joins go round a ring or have the switch do it, whichever is sooner.
        """
        if devices == 1:  # alone there is nothing to send
            return 0.0
        if devices != math.prod(ways for _, ways in self.levels):
            raise ValueError(
                f"a group of {' x '.join(str(ways) for _, ways in self.levels)} devices cannot run "
                f"a collective over {devices}"
            )
        latencies_s = sending_s = 0.0
        (first, here), *_ = self.levels
        whole = size_bytes
        for link, ways in self.levels:
            steps = rounds * (ways - 1)
            latencies_s += steps * link.latency_s
            sending_s = max(sending_s, steps / ways * size_bytes / link.bytes_per_s)
            size_bytes /= ways
        ring_s = latencies_s + sending_s
        steps = rounds * (here - 1)
        if first.switch_s is None or first.switch_s >= steps * first.latency_s:
            return self.launch_s + ring_s
        switched_s = steps / here * whole / (SWITCHED_RATE * first.bytes_per_s)
        sooner_s = latencies_s - steps * first.latency_s + first.switch_s
        return self.launch_s + min(ring_s, sooner_s + max(sending_s, switched_s))


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
    pod_devices: int | None = None
    """Devices of a pod: a row of nodes, or a building, in which all are joined by `node_link`."""
    pod_link: LinkSpec | None = None
    """Between pods, per device."""

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
        if (self.pod_devices is None) != (self.pod_link is None):
            raise UsageError("a cluster of pods needs both pod_devices and pod_link")
        if self.pod_devices is None:
            return
        if self.node_devices is None:
            raise UsageError(
                f"pod_devices={self.pod_devices} are whole nodes: give node_devices and node_link, "
                "or node_devices and node_link alone where there is one slower level"
            )
        node = self.node_devices
        if self.pod_devices < 1 or self.pod_devices % node or self.devices % self.pod_devices:
            raise UsageError(
                f"pod_devices={self.pod_devices} must divide devices={self.devices} and be whole "
                f"nodes of {node}"
            )

    def __str__(self) -> str:
        text = f"{self.devices} x {self.device.name} over {self.link.name}"
        if self.node_link is None:
            return text
        text += f", {self.node_link.name} between nodes of {self.node_devices}"
        if self.pod_link is None:
            return text
        return f"{text}, {self.pod_link.name} between pods of {self.pod_devices}"

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
        node = self.node_devices or self.devices
        within = self._part(ways, node // stride)
        levels = [(self.link.of_group(within), within)]
        if self.pod_devices is not None and self.pod_link is not None:
            here = self._part(ways // within, self.pod_devices // max(node, stride))
            levels += [(self._between_nodes, here)]
            levels += [(self.pod_link.link, ways // within // here)]
        else:
            levels += [(self._between_nodes, ways // within)]
        used = [link for link, count in levels if count > 1]
        slow = used[-1] if used else self.link.link
        if used and slow is levels[0][0]:
            slow = self.link.link
        return GroupLink(
            latency_s=slow.latency_s,
            bytes_per_s=slow.bytes_per_s,
            launch_s=slow.launch_s,
            contention=max((link.contention for link in used), default=slow.contention),
            waiting_contention=slow.waiting_contention,
            levels=tuple(levels),
        )

    @property
    def _between_nodes(self) -> Link:
        return self.link.link if self.node_link is None else self.node_link.link

    @staticmethod
    def _part(ways: int, room: int) -> int:
        """How many of a group have room together; one that is cut unevenly uses a divisor."""
        within = max(1, min(ways, room))
        while ways % within:
            within -= 1
        return within

    def scaled(self, *, link_bytes_per_s: float) -> "Cluster":
        """The same cluster with another rate inside its nodes."""
        return dataclasses.replace(
            self, link=self.link.faster(link_bytes_per_s / self.link.bytes_per_s)
        )
