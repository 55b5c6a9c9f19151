"""What XLA is asked for where a step is compiled, tried on small programs before it is leaned on.

Options are taken by name and a release may know a name and do something else, so that what they do
is looked at: whether barriers stay, whether permutes bring what was sent.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxsys.axes import RING

GPU_COMPILER_OPTIONS: dict[str, Any] = {
    # XLA keeps one collective in flight unless told otherwise, so that of a ring's three streams
    # only one would travel under a tick's compute.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}
CPU_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_disable_hlo_passes": "cse_barrier_expander,optimization-barrier-expander,"
    "optimization_barrier_expander"
}
"""Barriers stay to the end. XLA:CPU drops them before it merges expressions and decides what to
copy: it would copy all of a buffer of residuals that one task reads and the next one writes."""

EARLY_START = "xla_gpu_experimental_collective_start_as_early_as_possible"
"""Without it XLA starts a transfer so late that its guess of the time just hides it: a neighbour
then waits for this device's compute and not for its data, and a slow link is not hidden."""


PEER_COPIES = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
"""Permutes are copies by peer access, which take no multiprocessors from the compute beside them;
what `XLA_FLAGS` calls `peer`."""


@functools.cache
def gpu_compiler_options(mesh: Mesh, axis: str = RING) -> dict[str, Any]:
    """XLA options for steps on GPUs: those that their compiler knows and that give right values.

    Args:
        mesh: what the step runs on.
        axis: of the mesh, along which the step's permutes go.
    """
    devices = list(mesh.devices.flat)
    here = [device for device in devices if device.process_index == jax.process_index()]
    device = (here or devices)[0]  # a process compiles for its own; none is, of GPUs elsewhere
    value = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    options = dict(GPU_COMPILER_OPTIONS)
    try:
        jax.jit(lambda x: x).lower(value).compile(compiler_options={EARLY_START: True})
        options[EARLY_START] = True
    except jax.errors.JaxRuntimeError:
        pass
    # Peers are of one host, and only devices that are here can show what arrives.
    together = len(here) == len(devices) and _are_here(devices)
    if mesh.shape[axis] > 1 and together and peer_access_is_allowed():
        options |= PEER_COPIES if permutes_rightly(mesh, options | PEER_COPIES, axis) else {}
    return options


def _are_here(devices: list[Any]) -> bool:
    """Whether devices can run programs, and are not only compiled for."""
    try:
        local = jax.local_devices(backend=devices[0].platform)
    except RuntimeError:  # no such device here at all
        return False
    return all(any(device is other for other in local) for device in devices)


def peer_access_is_allowed() -> bool:
    """Whether NCCL's settings leave copies between GPUs by peer access.

    XLA's own peer copies do not read them: with `NCCL_P2P_DISABLE=1`, set where peer access is
    broken or a slower link is to be tried, they would take NVLink all the same (measured on two
    H200s: a ring's step through sockets in 1.39 s, where NCCL takes 13 s).
    """
    disabled = os.environ.get("NCCL_P2P_DISABLE", "0").strip() not in ("", "0")
    return not disabled and os.environ.get("NCCL_P2P_LEVEL", "").strip().upper() not in ("LOC", "0")


def permutes_rightly(mesh: Mesh, compiler_options: Mapping[str, Any], axis: str = RING) -> bool:
    """Whether rings along an axis compiled with these options take them, and bring what was sent.

    Three turns of an odd and a large array in two dtypes, so that what arrives is sent on.
    """
    ring = mesh.shape[axis]
    onward = [(device, (device + 1) % ring) for device in range(ring)]

    def turn(values: list[jax.Array]) -> list[jax.Array]:
        for _ in range(3):
            values = [lax.ppermute(value, axis, onward) for value in values]
        return values

    cut = PartitionSpec(axis)
    run = jax.shard_map(turn, mesh=mesh, in_specs=(cut,), out_specs=cut, check_vma=False)
    random = np.random.default_rng(0)
    sent = [
        jax.device_put(random.normal(size=(ring, size)).astype(dtype), NamedSharding(mesh, cut))
        for size, dtype in ((1021, jnp.float32), (2**20, jnp.bfloat16))
    ]
    try:
        found = jax.jit(run, compiler_options=dict(compiler_options))(sent)
        pairs = zip(jax.device_get(sent), jax.device_get(found), strict=True)
        return all(np.array_equal(np.roll(before, 3, axis=0), after) for before, after in pairs)
    except jax.errors.JaxRuntimeError:
        return False


@functools.cache
def lacks(mesh: Mesh) -> tuple[str, ...]:
    """What the installed JAX does not do of what steps lean on, each in a sentence.

    Asked of a compiled program and not of a version: a pass that is switched off by a name that the
    compiler does not know is accepted all the same.
    """
    if mesh.devices.flat[0].platform == "cpu":
        if products_beside_a_barrier(CPU_COMPILER_OPTIONS) != 1:
            return ()
        lack = (
            "merges equal products across barriers on a CPU: what a plan computes again is kept "
            "instead, and steps hold more memory than planned"
        )
        return (f"JAX {jax.__version__} {lack}",)
    options, found = gpu_compiler_options(mesh), []
    if EARLY_START not in options:
        found.append(
            "does not start transfers early: a neighbour may wait for compute beside which its "
            "data would have travelled"
        )
    if mesh.shape[RING] > 1 and not PEER_COPIES.items() <= options.items():
        why = "" if peer_access_is_allowed() else " (NCCL's settings turn peer access off)"
        found.append(
            f"does not send by peer copies between these devices{why}: a ring's transfers take "
            "multiprocessors from its compute"
        )
    return tuple(f"JAX {jax.__version__} {lack}" for lack in found)


def products_beside_a_barrier(compiler_options: Mapping[str, Any]) -> int:
    """How many of two equal products, of which the second lies behind a barrier, a CPU computes."""

    def twice(a: jax.Array) -> jax.Array:
        first = a @ a
        a, first = lax.optimization_barrier((a, first))
        return first + a @ a

    here = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    value = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=here)
    text = jax.jit(twice).lower(value).compile(compiler_options=dict(compiler_options)).as_text()
    return len(re.findall(r"= f32\[32,32\]\S* dot\(", text or ""))
