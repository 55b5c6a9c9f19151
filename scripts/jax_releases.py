"""What the installed release of JAX makes of the programs that rings, gathers and plans lean on.

    python scripts/jax_releases.py --devices 4 --out results/jax_releases_cpu_0.12.0.1.json

Run with each release, on a CPU or on GPUs; prints one JSON of named figures, counted in compiled
programs or computed, none of them timed. docs/RESULTS.md sets the releases side by side.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys import strategies
from jaxsys.errors import RunError
from jaxsys.lowering import lower
from jaxsys.lowering.xla import CPU_COMPILER_OPTIONS, EARLY_START, gpu_compiler_options
from jaxsys.mesh import make_mesh, request_devices
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.results import versions, write_result
from studies.compiled import parse

WIDTH = 64


def figures(devices: int) -> dict[str, Any]:
    """Figure -> its value, or the first line of the error where there is none."""
    asked: dict[str, Callable[[], Any]] = {
        "barrier: products of two equal ones": functools.partial(barrier, {}),
        "barrier: likewise with our options": functools.partial(barrier, options(devices)),
        "disabled pass of an unknown name": unknown_pass,
        "recompute: products of a gradient": lambda: gradient(plain)[0],
        "recompute: likewise under jax.checkpoint": lambda: gradient(jax.checkpoint(plain))[0],
        "residuals: temporary KiB, plain": lambda: gradient(plain)[1],
        "residuals: temporary KiB, jax.checkpoint": lambda: gradient(jax.checkpoint(plain))[1],
        "residuals: temporary KiB, in a scan": lambda: scanned(plain),
        "residuals: temporary KiB, scan of checkpoints": lambda: scanned(jax.checkpoint(plain)),
        "scan: parameters of its equation": scan_parameters,
        "donation: KiB of a state written in place": donated,
        "donation: likewise beside another dtype": functools.partial(donated, jnp.bfloat16),
        "int4: bytes of 1024 on the device": lambda: jnp.zeros(
            1024, jnp.int4
        ).on_device_size_in_bytes(),
    }
    if devices > 1:
        asked |= {
            "ring: permute over ('b', 'a') of mesh ('a', 'b')": permute_order,
            "gather: what its gradient is": functools.partial(gather_gradient, devices),
            "scan of a ring: copies a turn": functools.partial(ring_copies, devices),
            "step weipipe-interleave": functools.partial(step, "weipipe-interleave", devices),
            "step 1f1b": functools.partial(step, "1f1b", devices),
            "step zero-3": functools.partial(step, "zero-3", devices),
        }
    if jax.default_backend() == "gpu":
        asked["early start of transfers"] = functools.partial(early_start, devices)
    return {name: attempt(figure) for name, figure in asked.items()}


def attempt(figure: Callable[[], Any]) -> Any:
    try:
        return figure()
    except Exception as error:  # noqa: BLE001 - what a release refuses is what is asked
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def options(devices: int) -> dict[str, Any]:
    if jax.default_backend() == "cpu":
        return dict(CPU_COMPILER_OPTIONS)
    return gpu_compiler_options(make_mesh(devices))


def products(text: str) -> int:
    """Products of a compiled program, on a CPU or by a GPU's libraries."""
    return len(re.findall(r" dot\(|custom_call_target=\"__cublas", text))


def barrier(compiler_options: dict[str, Any]) -> int:
    def twice(a: jax.Array) -> jax.Array:
        first = a @ a
        a, first = lax.optimization_barrier((a, first))
        return first + a @ a

    lowered = jax.jit(twice).lower(jax.ShapeDtypeStruct((256, 256), jnp.float32))
    return products(lowered.compile(compiler_options=compiler_options).as_text() or "")


def unknown_pass() -> str:
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), jnp.float32))
    lowered.compile(compiler_options={"xla_disable_hlo_passes": "no-such-pass"})
    return "accepted"


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def gradient(block: Callable) -> tuple[int, float]:
    """(products, temporary KiB) of the gradient of four blocks in a row, written out."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = block(x, w)
        return x.sum()

    value = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    program = jax.jit(jax.grad(loss)).lower(value, value).compile()
    return products(program.as_text() or ""), temporary_kib(program)


def scanned(block: Callable) -> float:
    """Temporary KiB of the gradient of eight blocks in a scan."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (block(x, w), None), x, w)[0].sum()

    weights = jax.ShapeDtypeStruct((8, WIDTH, WIDTH), jnp.float32)
    value = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    return temporary_kib(jax.jit(jax.grad(loss)).lower(weights, value).compile())


def scan_parameters() -> str:
    jaxpr = jax.make_jaxpr(lambda x: lax.scan(lambda c, y: (c + y, None), 0.0, x))(jnp.ones(3))
    found = next(e for e in jaxpr.eqns if e.primitive.name == "scan").params
    known = ("num_consts", "num_carry", "ft_in", "ft_out")
    return ", ".join([*(name for name in known if name in found), type(found["jaxpr"]).__name__])


def donated(other: Any = jnp.float32) -> float:
    """KiB of outputs that take the place of a donated 64 KiB of weights and 64 KiB of moments."""
    state = {
        "weights": jax.ShapeDtypeStruct((128, 128), jnp.float32),
        "moments": jax.ShapeDtypeStruct((128, 128), other),
    }

    def update(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        moments = 0.9 * state["moments"].astype(jnp.float32) + state["weights"]
        return {"weights": state["weights"] - moments, "moments": moments.astype(other)}

    program = jax.jit(update, donate_argnums=0).lower(state).compile()
    analysis = program.memory_analysis()
    if analysis is None:
        raise RunError("this backend does not say what memory a program takes")
    return analysis.alias_size_in_bytes / 1024


def permute_order() -> str:
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("a", "b"))
    if len(jax.devices()) >= 4:
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    count = mesh.devices.size

    def around(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = lax.axis_index(("b", "a"))[None]
        return own, lax.ppermute(own, ("b", "a"), [(i, (i + 1) % count) for i in range(count)])

    spec = PartitionSpec(("a", "b"))
    run = jax.jit(jax.shard_map(around, mesh=mesh, in_specs=spec, out_specs=(spec, spec)))
    own, received = (x.tolist() for x in run(jnp.arange(float(count))))
    right = received == [(i - 1) % count for i in own]
    return "as axis_index counts" if right else "in the mesh's order, unlike axis_index"


def gather_gradient(devices: int) -> str:
    """The collectives of the gradient of a loss behind an all_gather of weights."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("a",))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        whole = lax.all_gather(w, "a", axis=0, tiled=True)
        return lax.psum((x @ whole).sum(), "a")

    specs = PartitionSpec("a"), PartitionSpec("a")
    run = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    value = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    program = jax.jit(jax.grad(run)).lower(value, value).compile()
    return counted(program.as_text() or "")


def ring_copies(devices: int) -> str:
    """Copies and collectives in the loop of a scan that uses weights and passes them on."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("a",))
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def around(w: jax.Array, x: jax.Array) -> jax.Array:
        def turn(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
            w, x = carry
            return (lax.ppermute(w, "a", ring), jnp.tanh(x @ w)), None

        return lax.scan(turn, (w, x), None, length=devices)[0][1]

    spec = PartitionSpec("a")
    run = jax.shard_map(around, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    value = jax.ShapeDtypeStruct((devices * WIDTH, WIDTH), jnp.float32)
    text = jax.jit(run).lower(value, value).compile().as_text() or ""
    inside = [c for c in parse(text).values() if any(True for _ in c.collectives())]
    copies = sum(i.operation == "copy" for c in inside for i in c.instructions)
    return f"{copies} beside {counted(text)}"


def step(name: str, devices: int) -> str:
    """Temporary memory and collectives of one of our own steps."""
    config = preset("tiny")
    schedule = strategies.build(name, devices=devices, microbatches=2 * devices)
    lowered = lower(schedule, layered(config), make_mesh(devices))
    parameters = lowered.to_rest(initial_parameters(config))
    batch = {
        part: jnp.zeros((2 * devices, 1, 64), jnp.int32) for part in ("inputs", "targets")
    }  # fmt: skip
    run = jax.jit(lowered.loss_and_gradients, compiler_options=lowered.compiler_options)
    program = run.lower(parameters, batch).compile()
    return f"{temporary_kib(program):.0f} KiB temporary; {counted(program.as_text() or '')}"


def early_start(devices: int) -> str:
    """Whether the option is known, and where a transfer starts in a row of eight products."""
    if devices < 2:
        return "accepted" if EARLY_START in gpu_compiler_options(make_mesh(1)) else "unknown"
    mesh = make_mesh(devices)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names[-1]))
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def run(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = lax.ppermute(w, mesh.axis_names[-1], ring)
        for _ in range(8):
            x = x @ w[0]
        return x, there

    specs = (spread.spec, spread.spec)
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs))
    x = jax.ShapeDtypeStruct((devices * 2048, 2048), jnp.bfloat16, sharding=spread)
    w = jax.ShapeDtypeStruct((devices, 2048, 2048), jnp.bfloat16, sharding=spread)
    found = []
    for name, chosen in (
        ("without", {"xla_gpu_enable_latency_hiding_scheduler": True}),
        ("with our options", gpu_compiler_options(mesh)),
    ):
        options_here: dict[str, str | bool] = {**chosen}
        text = mapped.lower(x, w).compile(compiler_options=options_here).as_text() or ""
        lines = text[text.index("ENTRY") :].splitlines()
        marks = [
            "start" if "collective-permute-start(" in line else "product"
            for line in lines
            if "collective-permute-start(" in line or "__cublas" in line or " gemm" in line
        ]
        before = marks.index("start") if "start" in marks else None
        found.append(f"{name}, {before} of {marks.count('product')} products before it")
    return "; ".join(found)


def counted(text: str) -> str:
    """How many collectives of each kind a program's text holds."""
    counts: dict[str, int] = {}
    for computation in parse(text).values():
        for instruction in computation.collectives():
            kind = instruction.operation.removesuffix("-start")
            counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"


def temporary_kib(program: Any) -> float:
    return program.memory_analysis().temp_size_in_bytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--out", help="a result file to write besides")
    arguments = parser.parse_args()
    request_devices(arguments.devices)
    found = figures(arguments.devices)
    print(json.dumps({"versions": versions(), "figures": found}, indent=1))
    if arguments.out is not None:
        write_result(
            arguments.out,
            benchmark="jax_releases",
            kind="measured",
            config={"devices": arguments.devices, "backend": jax.default_backend()},
            rows=[{"figure": name, "value": value} for name, value in found.items()],
        )


if __name__ == "__main__":
    main()
