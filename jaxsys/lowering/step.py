"""Lowers a schedule to one `jax.shard_map` that returns loss and gradients.

`lower` checks schedule, model and mesh against each other; the `LoweredStep` it returns says how
parameters rest (whole chunks on their owners, in owner order), puts them there and back into layer
order, and runs the step. What happens inside is in `run`.

Legend: P devices, C chunks, K = ceil(L / C) layers a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import RING
from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError, did_you_mean
from jaxsys.layered import LayeredModel, Parameters, PyTree, with_totals
from jaxsys.mesh import batch_axes
from jaxsys.schedule import Data, MoveKind, Placement, Schedule, check

from .base import LossAndGradients, check_fit, context_on, sharded_spec, spec_of
from .place import THROUGHOUT, WITHIN, devices_of_place
from .programs import RECOMPUTE_POLICIES, Recompute
from .refusal import why_not_cut, why_not_in_float8, why_not_shared_places
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
    travel_dtype: Any = None,
    context: ContextSplit | None = None,
) -> "LoweredStep | ShardedStep":
    """Checks a schedule and prepares its step.

    Args:
        schedule: any schedule whose moves take at most one tick.
        model: the layered model it runs.
        mesh: axes `DATA` and `RING`, the ring as long as the schedule's devices; and those
            of `jaxsys.axes.AROUND` that devices are shared by.
        compute_dtype: dtype of the travelling weights and of all compute.
        gradient_dtype: dtype in which gradients are summed and travel.
        recompute: what backward computes again, see `programs.Recompute`.
        unroll: write a chunk's layers out instead of looping over them; sharded schedules always
            are on GPUs.
        travel_dtype: dtype in which sums of gradients are sent around a ring, `gradient_dtype` if
            not given: bfloat16 halves what is sent, each addition is still in `gradient_dtype`.
        context: how sequences lie over devices that share them, where the mesh has such; round a
            ring if not given.

    Raises:
        ScheduleError: if the schedule is not legal.
        UsageError: if the mesh, the layers or the options do not fit it, or weights are to travel
            in float8 and none travel.
    """
    if travel_dtype is not None and not any(
        move.kind is MoveKind.PERMUTE and move.block.data is Data.GRADIENT
        for move in schedule.moves
    ):
        raise UsageError(
            f"travel_dtype={jnp.dtype(travel_dtype)}, but no gradients go around a ring in "
            f"schedule {schedule.name}; leave it out, or use a ring such as weipipe-interleave"
        )
    refused = why_not_shared_places(schedule) if devices_of_place(mesh) > 1 else None
    if refused is not None:
        raise UsageError(refused)
    if model.travels_in_float8 is not None:
        refused = why_not_in_float8(schedule, compute_dtype)
        if refused is not None:
            raise UsageError(refused)
    if schedule.placement is Placement.SHARDED:
        return lower_sharded(
            schedule,
            model,
            mesh,
            compute_dtype=compute_dtype,
            gradient_dtype=gradient_dtype,
            recompute=recompute,
            unroll=unroll,
            context=context,
        )
    split = context_on(mesh, model, schedule, context)
    refused = why_not_cut(schedule, split)
    if refused is not None:
        raise UsageError(refused)
    check_fit(schedule, model, mesh)
    if recompute not in RECOMPUTE_POLICIES:
        legal = ", ".join(RECOMPUTE_POLICIES)
        near = did_you_mean(str(recompute), RECOMPUTE_POLICIES)
        raise UsageError(f"recompute={recompute!r} is not a policy{near}; use one of {legal}")
    return LoweredStep(
        schedule=schedule,
        model=model,
        mesh=mesh,
        compute_dtype=jnp.dtype(compute_dtype),
        gradient_dtype=jnp.dtype(gradient_dtype),
        travel_dtype=jnp.dtype(gradient_dtype if travel_dtype is None else travel_dtype),
        recompute=recompute,
        unroll=unroll,
        context=split,
        tables=build_tables(schedule, check(schedule)),
    )


@dataclass(frozen=True, kw_only=True)
class LoweredStep(TabledStep):
    """A schedule ready to run. Made by `lower`."""

    def to_rest(self, parameters: Parameters) -> Parameters:
        """Layer order [L, ...] -> order at rest [C K, ...], placed on the mesh; by kind."""
        self.check_layers(parameters)

        shapes = jax.eval_shape(self.in_rest_order, parameters)
        place = jax.jit(self.in_rest_order, out_shardings=self.rest_shardings(shapes))
        return place(parameters)

    def in_rest_order(self, parameters: Parameters) -> Parameters:
        """The same order, placed nowhere."""
        return self._moved(parameters, self.rest_order.to_rest)

    def from_rest(self, parameters: Parameters) -> Parameters:
        """Order at rest [C K, ...] -> layer order [L, ...]; by kind."""
        return jax.jit(lambda p: self._moved(p, self.rest_order.from_rest))(parameters)

    def _moved(
        self, parameters: Parameters, move: Callable[[str, jax.Array], jax.Array]
    ) -> Parameters:
        stacks = {
            kind: jax.tree.map(lambda leaf, k=kind: move(k, leaf), stack)
            for kind, stack in self.model.stacks(parameters["blocks"]).items()
        }
        return Parameters(edge=parameters["edge"], blocks=self.model.blocks(stacks))

    def loss_and_gradients(self, parameters: Parameters, batch: PyTree) -> LossAndGradients:
        """The step's loss, gradients and metrics; trace it inside a jit of your own.

        Args:
            parameters: at rest, see `to_rest`.
            batch: leaves [D M, B, ...].

        Raises:
            UsageError: if the batch does not hold D M microbatches.
        """
        self.check_batch(batch)
        batch = with_totals(self.model, batch)
        order = self.tables.microbatch_order
        if order is not None:
            everywhere = np.concatenate(
                [order + r * self.schedule.microbatches for r in range(self.replicas)]
            )
            batch = jax.tree.map(lambda leaf: jnp.take(leaf, everywhere, axis=0), batch)
            rows = (*batch_axes(self.mesh), RING)
        else:
            rows = batch_axes(self.mesh)
        specs = self.rest_specs(parameters)
        run = Run(self, specs)
        step = jax.shard_map(
            run.step,
            mesh=self.mesh,
            in_specs=(PartitionSpec(RING), specs, self.sequences.specs(batch, rows)),
            out_specs=self.outcome_specs(specs),
            # Third-party kernels and split residuals carry no varying-axes types.
            check_vma=False,
        )
        return step(jnp.asarray(self.tables.rows), parameters, batch)

    def rest_specs(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs: blocks by owner along their stacked axis, or whole on every device.

        The devices of a place have parts of what it owns, along an axis behind the layers'.
        """
        ring, each = self.schedule.devices, devices_of_place(self.mesh)
        replicated = self.schedule.placement is Placement.REPLICATED
        axes = THROUGHOUT if each > 1 else (RING,)
        cuts = self.cuts(parameters)

        def edge(leaf: Any, cut: PartitionSpec) -> PartitionSpec:
            if replicated:
                return spec_of([*cut])
            return sharded_spec(leaf.shape, ring * each, cut=cut, axes=axes)

        def block(leaf: Any, cut: PartitionSpec) -> PartitionSpec:
            if each > 1:
                cut = sharded_spec(leaf.shape[1:], each, cut=cut, axes=WITHIN)
            return spec_of([None if replicated else RING, *cut])

        return Parameters(
            edge=jax.tree.map(edge, parameters["edge"], cuts["edge"]),
            blocks=jax.tree.map(block, parameters["blocks"], cuts["blocks"]),
        )
