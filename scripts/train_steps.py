"""Whole training steps to be timed: this library's, plain JAX's, and a ring written by hand.

Each is a jitted `step(state, batch) -> (state, loss)`, its state being the parameters and the
optimizer's, beside a jitted function that makes the parameters where they rest.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ring_by_hand import rest_order, ring_loss_and_gradients

from jaxsys.axes import RING
from jaxsys.errors import UsageError
from jaxsys.hardware import GIB
from jaxsys.layered import Layer
from jaxsys.mesh import sizes_around
from jaxsys.train.memory import StepShape, step_bytes
from studies.compiled import program_bytes


def fsdp_step(model, mesh, optimizer, microbatches: int, recompute: str, dtype, unroll: bool):
    """Plain JAX: `jit` with sharded parameters, XLA's partitioner places the collectives.

    `unroll` writes the layers out instead of scanning over them. Activations are kept cut by
    sequence and the edge's weights whole where they are used; else the partitioner cuts products
    over their sum and reduces activations instead.
    """
    if recompute not in ("none", "block"):
        raise UsageError(f"recompute {recompute} is not one that gspmd-fsdp has: none, block")
    (block,) = model.kinds.values()
    block = block if recompute == "none" else jax.checkpoint(block)
    devices = mesh.shape[RING]

    def by_sequence(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(RING)))

    def whole(tree):
        return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))

    def loss_of(parameters, microbatch):
        low = jax.tree.map(lambda p: p.astype(dtype), parameters)
        edge = whole(low["edge"])
        x = by_sequence(model.embed(edge, microbatch))
        x, _ = jax.lax.scan(
            lambda x, w: (by_sequence(block(w[0], x, microbatch, Layer(index=w[1]))), None),
            x,
            (low["blocks"], jnp.arange(model.layers)),
            unroll=unroll,
        )
        # One sequence at a time, or the loss's chunks of tokens would mix the devices' sequences.
        one = jax.tree.map(lambda leaf: leaf[:, None], (x, microbatch))
        loss, weight = jax.vmap(lambda x, m: model.head_loss(edge, x, m))(*one)
        return loss.sum() / weight.sum()

    def step(state, batch):
        parameters, opt = state
        rounds = jax.tree.map(
            lambda b: jax.lax.with_sharding_constraint(
                b.reshape(microbatches // devices, devices * b.shape[1], *b.shape[2:]),
                NamedSharding(mesh, PartitionSpec(None, RING)),
            ),
            batch,
        )

        def accumulate(total, microbatch):
            loss, gradient = jax.value_and_grad(loss_of)(parameters, microbatch)
            return jax.tree.map(jnp.add, total, (loss, gradient)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        (loss, gradient), _ = jax.lax.scan(accumulate, zero, rounds)
        count = microbatches // devices
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, opt = optimizer.update(gradient, opt, parameters)
        return (optax.apply_updates(parameters, updates), opt), loss / count

    def sharding(leaf):
        for axis, size in enumerate(leaf.shape):
            if size % devices == 0 and axis > 0 or leaf.ndim == 1 and size % devices == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, RING))
        return NamedSharding(mesh, PartitionSpec())

    return jax.jit(step, donate_argnums=0), sharding


def xla_step(model, mesh, optimizer, microbatches, recompute, dtype, parameters, *, unroll=False):
    """Plain JAX FSDP and the maker of its parameters."""
    step, sharding = fsdp_step(model, mesh, optimizer, microbatches, recompute, dtype, unroll)
    placed = jax.tree.map(sharding, jax.eval_shape(parameters))
    return step, jax.jit(parameters, out_shardings=placed)


def our_step(lowered, optimizer, parameters, shapes):
    """A schedule's step and the maker of its parameters at rest."""
    rest_shapes = jax.eval_shape(lowered.to_rest, shapes)
    rest = lowered.rest_shardings(rest_shapes)

    def step(state, batch):
        parameters, opt = state
        found = lowered.loss_and_gradients(parameters, batch)
        updates, opt = optimizer.update(found.gradients, opt, parameters)
        return (optax.apply_updates(parameters, updates), opt), found.loss

    make = jax.jit(lambda: lowered.to_rest(parameters()), out_shardings=rest)
    return jax.jit(step, donate_argnums=0, compiler_options=lowered.compiler_options), make


def hand_step(lowered, optimizer, parameters, shapes):
    """The same for the ring written by hand, with all that `lowered` is set to."""
    mesh, layers = lowered.mesh, lowered.model.layers
    run = ring_loss_and_gradients(
        lowered.model,
        mesh,
        microbatches=lowered.schedule.microbatches,
        recompute={"none": False, "block": True}[lowered.recompute],
        compute_dtype=lowered.compute_dtype,
        gradient_dtype=lowered.gradient_dtype,
    )

    def step(state, batch):
        parameters, opt = state
        loss, gradients = run(parameters, batch)
        updates, opt = optimizer.update(gradients, opt, parameters)
        return (optax.apply_updates(parameters, updates), opt), loss

    def rest():
        fresh = parameters()
        order = np.array(rest_order(layers, mesh.shape[RING]))
        blocks = jax.tree.map(lambda leaf: leaf[order], fresh["blocks"])
        return {"edge": fresh["edge"], "blocks": blocks}

    cut = NamedSharding(mesh, PartitionSpec(RING))
    make = jax.jit(rest, out_shardings=jax.tree.map(lambda _: cut, shapes))
    return jax.jit(step, donate_argnums=0, compiler_options=lowered.compiler_options), make


@dataclasses.dataclass(slots=True, kw_only=True)
class Ready:
    """A compiled step, and how to make what it starts from."""

    compiled: Any
    make: Callable[[], Any]
    optimizer: Any
    batch: dict
    compile_s: float
    flops_per_token: float
    """Model FLOPs a token and device, by as many sequences as a device has microbatches."""
    state: Any = None

    def start(self) -> None:
        """Makes the parameters and the optimizer's state, if they are not there."""
        if self.state is None:
            # Finished first: on CPU the collectives of two programs lock each other.
            rest = jax.block_until_ready(self.make())
            self.state = (rest, self.optimizer.init(rest))  # in a jit it would not be sharded


def compile_step(step, make, optimizer, batch, flops_per_token: float) -> Ready:
    """Compiles a step from the shapes of what it takes: nothing is made yet."""
    rest = make.eval_shape()
    start = time.perf_counter()
    compiled = step.lower((rest, state_shapes(optimizer, rest)), batch).compile()
    return Ready(
        compiled=compiled,
        make=make,
        optimizer=optimizer,
        batch=batch,
        compile_s=time.perf_counter() - start,
        flops_per_token=flops_per_token,
    )


def time_step(ready: Ready, repeats: int, link: str | None = None) -> dict:
    """Runs a step and reads memory; with a network `link`, what left by it in a step."""
    ready.start()
    state, ready.state = ready.state, None
    batch, compiled = ready.batch, ready.compiled
    tokens = batch["inputs"].shape[1] * batch["inputs"].shape[2]
    samples: list[float] = []
    loss: Any = None
    before = sent_bytes(link)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, loss = compiled(state, batch)
        loss.block_until_ready()
        samples.append(time.perf_counter() - start)
    # What follows must not send while this is still sending: processes would meet in other orders.
    ready.state = jax.block_until_ready(state)
    sent = None if link is None else (sent_bytes(link) - before) / len(samples)
    step_s = float(np.median(samples[1:]))
    analysis = compiled.memory_analysis()
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return {
        "step_s": round(step_s, 4),
        "model_tflops_per_gpu": round(1e-12 * ready.flops_per_token * tokens / step_s, 1),
        "tokens_per_s_per_gpu": round(
            tokens * batch["inputs"].shape[0] / len(jax.devices()) / step_s, 1
        ),
        "temp_gib": round(analysis.temp_size_in_bytes / 2**30, 2) if analysis else None,
        "argument_gib": round(analysis.argument_size_in_bytes / 2**30, 2) if analysis else None,
        # The allocator's peak so far: this configuration's, where it is the largest until now.
        "peak_so_far_gib": round(peak / 2**30, 2) if peak else None,
        "compile_s": round(ready.compile_s, 1),
        "loss": round(float(loss), 4),  # after all these steps
        "steps": len(samples),
        **({} if sent is None else {"sent_bytes": round(sent)}),
    }


def sent_bytes(link: str | None) -> int:
    """What has left this host by a network link since it came up."""
    if link is None:
        return 0
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text())


def memory_of(ready: Ready) -> dict:
    """What XLA gives the program on each device."""
    analysis = ready.compiled.memory_analysis()
    return {
        "compiled_gib": round(program_bytes(ready.compiled) / GIB, 2),
        "temp_gib": round(analysis.temp_size_in_bytes / GIB, 2),
        "argument_gib": round(analysis.argument_size_in_bytes / GIB, 2),
        "compile_s": round(ready.compile_s, 1),
    }


def state_shapes(optimizer, rest):
    """Shapes of the optimizer's state, each moment sharded as its parameter."""
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, like: like, jax.eval_shape(optimizer.init, rest), rest
    )


def predicted_bytes(lowered, shapes, state, batch) -> float:
    """What jaxsys.train would predict of a step before it compiles it."""
    return step_bytes(
        StepShape(
            schedule=lowered.schedule,
            model=lowered.model,
            parameters=shapes,
            state_bytes=sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state)),
            microbatch=jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batch),
            compute_dtype=lowered.compute_dtype,
            gradient_dtype=lowered.gradient_dtype,
            recompute=lowered.recompute,
            unroll=getattr(lowered, "unroll", False),  # sharded steps are on GPUs
            context=lowered.context,
            sizes=sizes_around(lowered.mesh),
        )
    )
