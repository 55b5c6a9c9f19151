"""Axes, named once: in what ways a plan splits a step over devices, and the meshes that run it.

`RING` is the mesh axis along which schedules run (weights, activations or shards move on it);
`DATA` holds replicas of whole rings.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxsys.errors import UsageError

RING = "ring"
DATA = "data"

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
                name="shard",
                splits="the batch, and where state is split masters, weights and gradients",
                mesh=RING,
                user="shard",
                costs="gathers and sums of a layer: moves of `strategies.zero`, `data_parallel`",
            ),
            Axis(
                name="features",
                splits="every block's features, and the sequence between blocks",
                mesh=None,
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
        )
    }
)
"""Name -> axis, from the outermost in; a plan has a number of parts for each."""

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


def make_mesh(ring: int, data: int = 1, *, devices: list[Device] | None = None) -> Mesh:
    """A mesh of axes (DATA, RING), sizes (`data`, `ring`), neighbours on the ring adjacent."""
    chosen = request_devices(ring * data) if devices is None else devices
    if len(chosen) != ring * data:
        raise UsageError(f"{len(chosen)} devices cannot form data={data} x ring={ring}")
    grid = np.array(chosen).reshape(data, ring)
    return Mesh(grid, (DATA, RING), axis_types=(AxisType.Auto, AxisType.Auto))


def _divide_cpu(count: int) -> None:
    """Says how many CPU devices there would be; of no effect once JAX has started, nor on GPUs.

    A collective holds a thread of XLA's until all devices have come to it. With one thread a
    device, two that devices meet in a different order would wait for each other for ever.
    """
    if not _backend_started():
        count = min(count, MOST_VIRTUAL_DEVICES)
        jax.config.update("jax_num_cpu_devices", max(count, _virtual_devices()))
        threads = max(os.cpu_count() or 1, THREADS_PER_CPU_DEVICE * count)
        os.environ.setdefault("PJRT_NPROC", str(threads))


def _virtual_devices() -> int:
    return int(getattr(jax.config, "jax_num_cpu_devices", 1))


def _backend_started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()
