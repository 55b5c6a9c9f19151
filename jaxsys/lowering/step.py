"""Lowers a schedule to one `jax.shard_map` that returns loss and gradients.

`lower` checks schedule, model and mesh against each other; the `LoweredStep` it returns says how
parameters rest (whole chunks on their owners, in owner order), puts them there and back into layer
order, and runs the step. What happens inside is in `run`.

Legend: P devices, C chunks, K = ceil(L / C) layers a chunk.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.mesh import DATA, RING
from jaxsys.schedule import Placement, Schedule, check

from .base import Outcome, check_fit, sharded_spec
from .programs import RECOMPUTE_POLICIES, Recompute
from .run import Run, TabledStep
from .sharded import ShardedStep, lower_sharded
from .tables import build_tables


def lower(
    schedule: Schedule,
    model: LayeredModel,
    mesh: Mesh,
    *,
    compute_dtype: Any = jnp.float32,
    gradient_dtype: Any = jnp.float32,
    recompute: Recompute = "block",
    unroll: bool = False,
) -> "LoweredStep | ShardedStep":
    """Checks a schedule and prepares its step.

    Args:
        schedule: any schedule whose moves take at most one tick.
        model: the layered model it runs.
        mesh: axes `DATA` and `RING`, the ring as long as the schedule's devices.
        compute_dtype: dtype of the travelling weights and of all compute.
        gradient_dtype: dtype in which gradients are summed and travel.
        recompute: what backward computes again, see `programs.Recompute`.
        unroll: write a chunk's layers out instead of looping over them; sharded schedules always
            are.

    Raises:
        ScheduleError: if the schedule is not legal.
        UsageError: if the mesh, the layers or the options do not fit it.
    """
    if schedule.placement is Placement.SHARDED:
        return lower_sharded(
            schedule,
            model,
            mesh,
            compute_dtype=compute_dtype,
            gradient_dtype=gradient_dtype,
            recompute=recompute,
        )
    check_fit(schedule, model, mesh)
    if recompute not in RECOMPUTE_POLICIES:
        legal = ", ".join(RECOMPUTE_POLICIES)
        raise UsageError(f"recompute={recompute!r} is not a policy; use one of {legal}")
    return LoweredStep(
        schedule=schedule,
        model=model,
        mesh=mesh,
        compute_dtype=jnp.dtype(compute_dtype),
        gradient_dtype=jnp.dtype(gradient_dtype),
        recompute=recompute,
        unroll=unroll,
        tables=build_tables(schedule, check(schedule)),
    )


@dataclass(frozen=True, kw_only=True)
class LoweredStep(TabledStep):
    """A schedule ready to run. Made by `lower`."""

    @cached_property
    def rest_chunks(self) -> np.ndarray:
        """The chunks in the order they rest: position -> chunk."""
        if self.schedule.placement is Placement.OWNER:
            return self.tables.local_chunks.reshape(-1)
        return np.arange(self.schedule.chunks)

    def to_rest(self, parameters: Parameters) -> Parameters:
        """Layer order [L, ...] -> order at rest [C K, ...], placed on the mesh."""
        self.check_layers(parameters)
        layers = self.model.layers
        order = self._layer_order()

        def place(parameters: Parameters) -> Parameters:
            def rest(leaf: jax.Array) -> jax.Array:
                spare = order.size - layers
                padded = jnp.pad(leaf, [(0, spare)] + [(0, 0)] * (leaf.ndim - 1)) if spare else leaf
                return jnp.take(padded, order, axis=0)

            return Parameters(
                edge=parameters["edge"], blocks=jax.tree.map(rest, parameters["blocks"])
            )

        shapes = jax.eval_shape(place, parameters)
        return jax.jit(place, out_shardings=self.rest_shardings(shapes))(parameters)

    def from_rest(self, parameters: Parameters) -> Parameters:
        """Order at rest [C K, ...] -> layer order [L, ...]."""
        back = np.argsort(self._layer_order())[: self.model.layers]

        def unplace(parameters: Parameters) -> Parameters:
            blocks = jax.tree.map(lambda leaf: jnp.take(leaf, back, axis=0), parameters["blocks"])
            return Parameters(edge=parameters["edge"], blocks=blocks)

        return jax.jit(unplace)(parameters)

    def loss_and_gradients(self, parameters: Parameters, batch: PyTree) -> Outcome:
        """The step's loss, gradients and metrics; trace it inside a jit of your own.

        Args:
            parameters: at rest, see `to_rest`.
            batch: leaves [D M, B, ...].

        Raises:
            UsageError: if the batch does not hold D M microbatches.
        """
        self.check_batch(batch)
        order = self.tables.microbatch_order
        if order is not None:
            everywhere = np.concatenate(
                [order + r * self.schedule.microbatches for r in range(self.replicas)]
            )
            batch = jax.tree.map(lambda leaf: jnp.take(leaf, everywhere, axis=0), batch)
            batch_spec = PartitionSpec((DATA, RING))
        else:
            batch_spec = PartitionSpec(DATA)
        specs = self.rest_specs(parameters)
        run = Run(self, specs)
        step = jax.shard_map(
            run.step,
            mesh=self.mesh,
            in_specs=(PartitionSpec(RING), specs, batch_spec),
            out_specs=self.outcome_specs(specs),
            # Third-party kernels and split residuals carry no varying-axes types.
            check_vma=False,
        )
        return step(jnp.asarray(self.tables.rows), parameters, batch)

    def _layer_order(self) -> np.ndarray:
        k = self.chunk_layers
        return (self.rest_chunks[:, None] * k + np.arange(k)[None, :]).reshape(-1)

    def rest_specs(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs: blocks by owner along their stacked axis, or whole on every device."""
        ring = self.schedule.devices
        replicated = self.schedule.placement is Placement.REPLICATED
        blocks = PartitionSpec() if replicated else PartitionSpec(RING)

        def edge(leaf: Any) -> PartitionSpec:
            return PartitionSpec() if replicated else sharded_spec(leaf.shape, ring)

        return Parameters(
            edge=jax.tree.map(edge, parameters["edge"]),
            blocks=jax.tree.map(lambda _: blocks, parameters["blocks"]),
        )
