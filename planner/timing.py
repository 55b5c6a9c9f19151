"""Seconds of a kernel as a step runs it: many times in one program, on every device at once.

Starting a program takes some tenths of a millisecond, and more or less from one time to the next:
as long as the kernels themselves. A step starts its kernels far ahead of the device, so that is no
part of their time. Programs are compiled as steps are, so that what overlaps there overlaps here.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import RING
from jaxsys.lowering.xla import (
    CPU_COMPILER_OPTIONS,
    gpu_compiler_options,
    products_beside_a_barrier,
)

PROGRAM_S = 0.05
"""How long a program is to run, so that starting it hardly counts."""
MOST_TIMES = 256
LIFTING_PASSES = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
"""Of XLA:CPU, what lifts out of a loop."""


def kernel_seconds(
    run: Callable[..., Any],
    mesh: Mesh,
    *arguments: Any,
    repeats: int,
    about_s: float | None = None,
) -> float:
    """Seconds that `run` takes within a program.

    Args:
        run: what one device runs on its part; each of its results is computed in full.
        mesh: the devices, all of which run it at once.
        arguments: leaves [devices, ...].
        repeats: of the program; the median counts.
        about_s: a guess at the result; measured if not given.
    """

    def program_s(times: int) -> float:
        program = everywhere(repeated(run, times), mesh)
        return median_seconds(program, *arguments, repeats=repeats)

    if about_s is None:
        about_s = program_s(1)
    times = min(MOST_TIMES, max(1, int(PROGRAM_S / about_s)))
    return program_s(times) / times


def repeated(run: Callable[..., Any], times: int) -> Callable[..., jax.Array]:
    """`run` so often, one after the other; a number that rests on every result."""

    def loop(*arguments: Any) -> jax.Array:
        def once(_: Any, found: jax.Array) -> jax.Array:
            # Barriers: else equal runs are one, and of a result only what is read is computed.
            now, found = lax.optimization_barrier((arguments, found))
            results = jax.tree.leaves(lax.optimization_barrier(run(*now)))
            return found + sum(leaf.reshape(-1)[0].astype(jnp.float32) for leaf in results)

        return lax.fori_loop(0, times, once, jnp.float32(0))

    return loop


def everywhere(run: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`run` on every device at once, on its part of arguments [devices, ...]."""

    def on_one(*arguments: Any) -> Any:
        result = run(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], result)

    spec = PartitionSpec(RING)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        jax.shard_map(on_one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
        compiler_options=_cpu_options() if on_cpu else gpu_compiler_options(mesh),
    )


@functools.cache
def _cpu_options() -> dict[str, Any]:
    """XLA options under which every turn of a loop computes its results, and in full.

    JAX 0.11 and later keep barriers for as long as it matters here, and lift out of loops what does
    not change in them, unless those passes are switched off.
    """
    if products_beside_a_barrier({}) == 2:
        return {"xla_disable_hlo_passes": LIFTING_PASSES}
    return dict(CPU_COMPILER_OPTIONS)


def median_seconds(run: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Median wall seconds of a compiled function, after one run to compile it."""
    jax.block_until_ready(run(*arguments))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
