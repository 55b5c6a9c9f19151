"""What devices and links do in a step: collectives, rates at a model's shapes, and contention.

All of it is timed within programs (`timing`), on every device at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.axes import RING
from jaxsys.model.attention import attend
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import abstract_parameters, bind_block
from jaxsys.planner.timing import kernel_seconds

COLLECTIVES = ("ppermute", "all_gather", "psum_scatter", "psum")
LONGEST_GATHER_S = 0.01
"""Of the gather beside which products are timed."""
MOST_PRODUCTS = 64
KERNELS = 5
"""What `measure_device` measures."""


Done = Callable[[str], None]
"""Told what has just been measured."""


def measure_collectives(
    mesh: Mesh, *, sizes_bytes: Sequence[int], repeats: int = 10, done: Done = lambda _: None
) -> dict[str, list[tuple[int, float]]]:
    """Collective -> (bytes of the block, median seconds), over the mesh's ring."""
    devices = mesh.shape[RING]
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    bodies: dict[str, Callable[[jax.Array], jax.Array]] = {
        "ppermute": lambda x: lax.ppermute(x, RING, pairs),
        "all_gather": lambda x: lax.all_gather(x, RING, tiled=True),
        "psum_scatter": lambda x: lax.psum_scatter(x, RING, tiled=True),
        "psum": lambda x: lax.psum(x, RING),
    }
    found: dict[str, list[tuple[int, float]]] = {}
    for kind in COLLECTIVES:
        rows: list[tuple[int, float]] = []
        for size in sizes_bytes:
            elements = max(devices, size // 4 // devices * devices)
            local = elements // devices if kind == "all_gather" else elements
            seconds = kernel_seconds(
                bodies[kind],
                mesh,
                _blocks(mesh, local),
                repeats=repeats,
                about_s=rows[-1][1] if rows else 1e-3,
            )
            rows.append((4 * elements, seconds))
            done(f"{kind} of {4 * elements} bytes")
        found[kind] = rows
    return found


def _blocks(mesh: Mesh, elements: int) -> jax.Array:
    """float32 [devices, elements]."""
    blocks = np.ones((mesh.shape[RING], elements), np.float32)
    return jax.device_put(blocks, NamedSharding(mesh, PartitionSpec(RING)))


def product_widths(config: DecoderConfig) -> tuple[int, ...]:
    """What a block's products lead to from the model's width, and back from."""
    heads, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return heads, shared, config.intermediate_size


def products(x: jax.Array, matrices: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """A chain of the block's products: x [tokens, width] there and back through each pair."""
    for there, back in matrices:
        x = (x @ there) @ back
    return x


def random_inputs(config: DecoderConfig, mesh: Mesh, *, tokens: int, dtype: Any) -> dict[str, Any]:
    """What kernels are timed on, leaves [devices, ...].

    Random numbers, as in a step: products of numbers all alike need less power, and at a GPU's
    limit of power that makes them faster.
    """
    width, devices = config.hidden_size, mesh.shape[RING]
    layer = abstract_parameters(replace(config, num_layers=1))["blocks"]
    weights = {
        "matrices": [(_of(width, n), _of(n, width)) for n in product_widths(config)],
        "layer": jax.tree.map(lambda leaf: _of(*leaf.shape[1:]), layer),
    }
    others = {
        "x": _of(tokens, width),
        "q": _of(1, tokens, config.num_heads, config.head_dim),
        "k": _of(1, tokens, config.num_kv_heads, config.head_dim),
        "v": _of(1, tokens, config.num_kv_heads, config.head_dim),
    }
    leaves, structure = jax.tree.flatten(weights | others)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def make() -> dict[str, Any]:
        parts = jnp.split(jax.random.normal(jax.random.key(0), (ends[-1],)), ends[:-1])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        made = jax.tree.unflatten(structure, shaped)
        for name in weights:
            made[name] = jax.tree.map(lambda w: w / math.sqrt(w.shape[0]), made[name])
        # Beyond what a device caches; to memory numbers are all alike.
        made["passed"] = jnp.ones((4, tokens, config.intermediate_size))
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf.astype(dtype), (devices, *leaf.shape)), made
        )

    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec(RING)))()


def _of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def measure_device(
    config: DecoderConfig,
    mesh: Mesh,
    inputs: Mapping[str, Any],
    *,
    repeats: int = 5,
    done: Done = lambda _: None,
) -> dict[str, float]:
    """Rates at a model's shapes, and its block's own times, all devices of the mesh at work.

    What devices share (host cores, a power budget) is then shared as it is in a step.

    Args:
        config: the model.
        mesh: the devices.
        inputs: `random_inputs`.
        repeats: of each program.
        done: told what has been measured, `KERNELS` times.
    """

    def seconds(
        what: str, run: Callable[..., Any], *names: str, about_s: float | None = None
    ) -> float:
        arguments = [inputs[name] for name in names]
        found = kernel_seconds(run, mesh, *arguments, repeats=repeats, about_s=about_s)
        done(what)
        return found

    def block(layer: Any, x: jax.Array) -> jax.Array:
        return bind_block(replace(config, num_layers=1), layer)(x[None])

    def both(layer: Any, x: jax.Array) -> Any:
        y, vjp = jax.vjp(block, layer, x)
        return vjp(y)

    tokens, width = inputs["x"].shape[1:]
    heads = config.num_heads * config.head_dim
    passed = inputs["passed"]
    products_s = seconds("products", products, "x", "matrices")
    attention_s = seconds("attention", attend, "q", "k", "v")
    pass_s = seconds("a pass over memory", lambda x: x + 1, "passed")
    forward_s = seconds("a block forward", block, "layer", "x", about_s=2 * products_s)
    both_s = seconds("a block forward and backward", both, "layer", "x", about_s=3 * forward_s)
    return {
        "products_s": products_s,
        "product_flops_per_s": 4.0 * tokens * width * sum(product_widths(config)) / products_s,
        "attention_flops_per_s": 2.0 * tokens * tokens * heads / attention_s,
        "memory_bytes_per_s": 2.0 * passed.nbytes / mesh.shape[RING] / pass_s,
        "block_forward_s": forward_s,
        "block_both_s": both_s,
    }


def measure_contention(
    mesh: Mesh,
    inputs: Mapping[str, Any],
    *,
    products_s: float,
    gathers: Sequence[tuple[int, float]],
    repeats: int = 10,
) -> float:
    """By what share products take longer beside a gather; large where they do not overlap at all.

    Products are made at least twice as long as the gather, so that all of the gather is beside
    them: the excess over products alone is then c g / (1 + g), c being the gather's own time.

    Args:
        mesh: the devices.
        inputs: `random_inputs`.
        products_s: of `products` on them.
        gathers: (bytes, seconds) of `all_gather`.
        repeats: of each program.
    """
    few = [row for row in gathers if row[1] <= LONGEST_GATHER_S] or gathers[:1]
    size, gather_s = few[-1]
    count = min(MOST_PRODUCTS, int(2 * gather_s / products_s) + 1)

    def chain(x: jax.Array, matrices: Any) -> jax.Array:
        for _ in range(count):
            x = products(x, matrices)
        return x

    def both(x: jax.Array, matrices: Any, block: jax.Array) -> Any:
        return chain(x, matrices), lax.all_gather(block, RING, tiled=True)

    block = _blocks(mesh, size // 4 // mesh.shape[RING])
    arguments = (inputs["x"], inputs["matrices"])
    alone_s = kernel_seconds(chain, mesh, *arguments, repeats=repeats, about_s=count * products_s)
    about_s = alone_s + gather_s
    both_s = kernel_seconds(both, mesh, *arguments, block, repeats=repeats, about_s=about_s)
    share = min(0.99, max(0.0, (both_s - alone_s) / gather_s))
    return share / (1.0 - share)
