"""Devices, and the meshes that run a step: axes of `jaxsys.axes`, from the outermost in."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxsys.axes import ALWAYS, AROUND, BATCH, DATA, INNER, MESH, RING
from jaxsys.errors import UsageError

MOST_VIRTUAL_DEVICES = 256
"""Into how many a CPU is divided: XLA ends the process when it gets no more threads."""

THREADS_PER_CPU_DEVICE = 3
"""As many as a weight ring has streams."""


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
    ring: int, data: int = 1, *, devices: list[Device] | None = None, **around: int
) -> Mesh:
    """A mesh of the axes `jaxsys.axes.MESH` in their order, the last one's neighbours adjacent.

    Args:
        ring: devices of RING.
        data: of DATA, likewise.
        devices: as many as the product; the default backend's first if not given.
        **around: of any other mesh axis by its name, as `tensor=2`; those of 1 are left out.

    Raises:
        UsageError: if an axis is not known, a number below 1, or devices are missing.
    """
    unknown = around.keys() - AROUND.keys()
    if unknown:
        known = ", ".join(name for name in MESH if name not in ALWAYS)
        raise UsageError(f"mesh axis {min(unknown)!r} is not known; beside ring and data: {known}")
    asked = {DATA: data, RING: ring, **around}
    sizes = {name: asked[name] for name in MESH if name in asked}
    if min(sizes.values()) < 1:
        name, size = min(sizes.items(), key=lambda item: item[1])
        raise UsageError(f"{name}={size} must be at least 1")
    sizes = {name: n for name, n in sizes.items() if n > 1 or name in ALWAYS}
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


def sizes_around(mesh: Mesh) -> dict[str, int]:
    """Axis of `AROUND` -> devices, of those that the mesh has more than one along."""
    return {name: mesh.shape[name] for name in AROUND if mesh.shape.get(name, 1) > 1}


def shard_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which what rests in shards is cut: RING, and those that cut it further."""
    more = (name for name, axis in AROUND.items() if axis.shards)
    return (RING, *(name for name in more if mesh.shape.get(name, 1) > 1))


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
    return tuple(name for name in BATCH if name in mesh.axis_names)


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
