"""Axes, named once: in what ways a plan splits a step over devices, and the meshes that run it.

`RING` is the mesh axis along which schedules run (weights, activations or shards move on it);
`DATA` holds replicas of whole rings. Four more are there where a step is split so: along `TENSOR`
devices share the features of every block, along `CONTEXT` its sequences, along `EXPERT` its
experts, each beside its part of the batch, and along `MEMBER` the chunks of a place of a ring,
likewise.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxsys.errors import UsageError

RING = "ring"
DATA = "data"
TENSOR = "tensor"
EXPERT = "expert"
CONTEXT = "context"
"""Devices that share every sequence in each place of a ring."""
MEMBER = "member"
"""Devices of one place of a ring, a node: each holds and sends a piece of every chunk that is
there, and computes microbatches of its own."""

INNER = (TENSOR, EXPERT)
"""Axes along which a block itself is split, and whose devices run one schedule's tasks together."""

MOST_VIRTUAL_DEVICES = 256
"""Into how many a CPU is divided: XLA ends the process when it gets no more threads."""

THREADS_PER_CPU_DEVICE = 3
"""As many as a weight ring has streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One way to split a step over devices; a plan says into how many parts."""

    name: str
    splits: str
    """What each of its devices has a part of."""
    mesh: str | None
    """The mesh axis that `jaxsys.lowering` runs it on; None: no schedule does."""
    user: str
    """The mesh axis of `jaxsys.planner.plan`, for a step that `jax.jit` partitions."""
    costs: str
    """What it sends, and where that is counted."""

    @property
    def asked(self) -> str:
        """What it is asked for by: an argument of `Trainer`, an option of `jaxsys train`."""
        return {DATA: "replicas", MEMBER: "members"}.get(self.mesh or "", str(self.mesh))


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis(
                name="replicas",
                splits="the batch, around everything else",
                mesh=DATA,
                user="replica",
                costs="gradients, summed once a step: `planner.costs.frame`",
            ),
            Axis(
                name="experts",
                splits="every block's experts, and the batch around the ring",
                mesh=EXPERT,
                user="replica",
                costs="rows to experts and back: `planner.costs.block_cost`; other gradients, "
                "summed once a step: `planner.costs.frame`",
            ),
            Axis(
                name="shard",
                splits="the batch, and where state is split masters, weights and gradients",
                mesh=RING,
                user="shard",
                costs="gathers and sums of a layer: moves of `strategies.zero`, `data_parallel`",
            ),
            Axis(
                name="context",
                splits="every sequence, and where state is split masters, weights and gradients",
                mesh=CONTEXT,
                user="shard",
                costs="keys and values, or heads for tokens: `planner.sharing`; gradients that "
                "are not split, summed once a step: `planner.costs.frame`",
            ),
            Axis(
                name="features",
                splits="every block's features, and the sequence between blocks",
                mesh=TENSOR,
                user="features",
                costs="activations, joined twice a pass: `planner.costs.block_cost`",
            ),
            Axis(
                name="stages",
                splits="the layers, each resting on its devices while activations travel",
                mesh=RING,
                user="shard",
                costs="an activation a hop: moves of `strategies.stages`",
            ),
            Axis(
                name="ring",
                splits="the layers, each resting on its devices while weights travel",
                mesh=RING,
                user="shard",
                costs="a chunk's weights and gradient a hop: moves of `strategies.weipipe`",
            ),
            Axis(
                name="members",
                splits="what rests and travels in each place of a ring, and the batch around it",
                mesh=MEMBER,
                user="shard",
                costs="pieces of a chunk joined and its gradient cut, in every task: "
                "`planner.costs.block_cost`",
            ),
        )
    }
)
"""Name -> axis, from the outermost in; a plan has a number of parts for each."""

AROUND: Mapping[str, Axis] = MappingProxyType(
    {axis.mesh: axis for axis in AXES.values() if axis.mesh not in (None, RING)}
)
"""Mesh axis -> axis, of all that stand around a ring or within its places: a schedule has a number
of parts for each, by its name."""

Device = Any
"""A jax.Device, which type checkers take for a variable."""


def request_devices(count: int, *, allow_virtual: bool = True) -> list[Device]:
    """Returns `count` devices of the default backend.

    Where there is no accelerator and JAX has not started yet, the host CPU is divided into
    `count` virtual devices.

    Raises:
        UsageError: if `count` is not positive, or more devices are asked for than there are.
    """
    if count < 1:
        raise UsageError(f"devices={count} must be at least 1")
    if allow_virtual:
        _divide_cpu(count)
    devices = jax.devices()
    if len(devices) < count:
        raise UsageError(
            f"devices={count}, but {len(devices)} {devices[0].platform} device(s) are present; "
            f"use devices={len(devices)} or fewer"
        )
    return devices[:count]


def devices_ahead(count: int) -> list[Device]:
    """Devices to compile for: GPUs like this machine's first, which need not all be here.

    Programs compiled for them do not run. Without a GPU, this machine's devices.
    """
    _divide_cpu(count)
    if jax.default_backend() != "gpu":
        return request_devices(count)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc("ahead", "cuda", topology=f"1x1x{count}").devices)


def make_mesh(
    ring: int,
    data: int = 1,
    *,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    member: int = 1,
    devices: list[Device] | None = None,
) -> Mesh:
    """A mesh of axes (DATA, EXPERT, RING, CONTEXT, MEMBER, TENSOR), the last one's neighbours
    adjacent.

    Of EXPERT, CONTEXT, MEMBER and TENSOR those alone that have more than one device.
    """
    sizes = {DATA: data, EXPERT: expert, RING: ring, CONTEXT: context}
    sizes |= {MEMBER: member, TENSOR: tensor}
    if min(sizes.values()) < 1:
        name, size = min(sizes.items(), key=lambda item: item[1])
        raise UsageError(f"{name}={size} must be at least 1")
    sizes = {name: n for name, n in sizes.items() if n > 1 or name in (DATA, RING)}
    count = math.prod(sizes.values())
    chosen = request_devices(count) if devices is None else devices
    if len(chosen) != count:
        shape = " x ".join(f"{name}={n}" for name, n in sizes.items())
        raise UsageError(f"{len(chosen)} devices cannot form {shape}")
    grid = np.array(chosen).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def inner_sizes(mesh: Mesh) -> dict[str, int]:
    """Axis of `INNER` -> devices, of those that the mesh has."""
    return {name: mesh.shape[name] for name in INNER if mesh.shape.get(name, 1) > 1}


def context_of(mesh: Mesh) -> int:
    """How many devices share each sequence."""
    return mesh.shape.get(CONTEXT, 1)


def members_of(mesh: Mesh) -> int:
    """How many devices share each place of a ring."""
    return mesh.shape.get(MEMBER, 1)


def shard_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which what rests in shards is cut: RING, CONTEXT, whose devices compute with
    the same weights, and MEMBER, whose devices have pieces of them."""
    return (RING, *(name for name in (CONTEXT, MEMBER) if mesh.shape.get(name, 1) > 1))


def over(axes: tuple[str, ...]) -> Any:
    """Axes as a PartitionSpec and collectives name them: a single one by its name."""
    return axes[0] if len(axes) == 1 else axes


def axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec cuts over."""
    names: set[str] = set()
    for entry in spec:
        names |= set(entry if isinstance(entry, tuple) else () if entry is None else (entry,))
    return names


def ring_axis(spec: PartitionSpec) -> int | None:
    """Along which axis of an array a spec cuts it over RING, alone or with others."""
    for axis, entry in enumerate(spec):
        if RING in (entry if isinstance(entry, tuple) else (entry,)):
            return axis
    return None


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes beside the ring along which the batch is split, from the outermost in."""
    return tuple(name for name in (DATA, EXPERT, MEMBER) if name in mesh.axis_names)


def batch_parts(mesh: Mesh) -> int:
    """D, the rings side by side, each on its part of the batch; a ring of nodes counts as one for
    each member."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def _divide_cpu(count: int) -> None:
    """Says how many CPU devices there would be; of no effect once JAX has started, nor on GPUs."""
    if not _backend_started():
        count = min(count, MOST_VIRTUAL_DEVICES)
        own_cpu_devices(max(count, _virtual_devices()))


def own_cpu_devices(count: int) -> None:
    """Divides this process's CPU into so many devices; before JAX starts, of no effect on GPUs.

    A collective holds a thread of XLA's until all devices have come to it. With one thread a
    device, two that devices meet in a different order would wait for each other for ever.
    """
    jax.config.update("jax_num_cpu_devices", count)
    threads = max(os.cpu_count() or 1, THREADS_PER_CPU_DEVICE * count)
    os.environ.setdefault("PJRT_NPROC", str(threads))


def _virtual_devices() -> int:
    return int(getattr(jax.config, "jax_num_cpu_devices", 1))


def _backend_started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()
