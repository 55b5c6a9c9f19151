"""Lowers a schedule of the ZeRO family to one step of explicit collectives.

All devices do the same, so that there is nothing to select: ticks and layers are written out or, on
CPU devices, loops over chunks that are alike (`sharded_run`), and turns that are alike are one loop
over microbatches. Each gather is one `all_gather` of a chunk's
packed shards, each reduction one `psum_scatter`. What keeps them where the schedule has them is
`optimization_barrier`:

* a gather's shards pass a barrier together with the activation (or cotangent) of the tick it starts
  in. So it cannot start earlier, and two gathers of one chunk are not the same expression, which
  XLA would merge into one whose result it keeps: the merge that silently turns ZeRO-3 into ZeRO-2;
* a reduction starts behind such a barrier too, and its result passes one in the tick by which it
  must have arrived, so that a deferred one does not drift on to the end of the step;
* the next microbatch's input waits for the last one's cotangent: independent microbatches would all
  be alive at once.

XLA:CPU drops barriers before it merges expressions; `xla.CPU_COMPILER_OPTIONS` leaves them in.
Weights never outlive their copy: residuals that hold weights alone are made again from the copy
that B has (see `programs`).

Legend: P devices, C chunks, L layers, n elements of a chunk's shard.
"""

from dataclasses import dataclass
from functools import cached_property
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
from jaxsys.schedule import Placement, Schedule, check
from jaxsys.strategies import RECOMPUTES

from .base import LossAndGradients, Step, check_fit, context_on, sharded_spec
from .programs import Recompute
from .refusal import why_not_lowered
from .sharded_run import Run


def lower_sharded(
    schedule: Schedule,
    model: LayeredModel,
    mesh: Mesh,
    *,
    compute_dtype: Any = jnp.float32,
    gradient_dtype: Any = jnp.float32,
    recompute: Recompute | tuple[Recompute, ...] = "block",
    unroll: bool = False,
    context: ContextSplit | None = None,
) -> "ShardedStep":
    """Checks a schedule whose parameters rest in shards and prepares its step.

    Args:
        schedule: of `Placement.SHARDED`, all devices alike, as `jaxsys.strategies.zero` makes them.
        model: the layered model it runs.
        mesh: axes `DATA` and `RING`, the ring as long as the schedule's devices.
        compute_dtype: dtype of gathered weights and of all compute.
        gradient_dtype: dtype in which gradients are reduced and locally summed.
        recompute: what backward computes again, for all layers or one each.
        unroll: write all chunks out on CPU devices too, where those that are alike are a loop.
        context: how sequences lie over the mesh's CONTEXT axis, where it has one.

    Raises:
        ScheduleError: if the schedule is not legal.
        UsageError: if the mesh, the layers or the options do not fit it.
    """
    if schedule.placement is not Placement.SHARDED:
        raise UsageError(
            f"schedule {schedule.name} rests {schedule.placement}; this lowers sharded ones"
        )
    check_fit(schedule, model, mesh)
    policies = (recompute,) * model.layers if isinstance(recompute, str) else tuple(recompute)
    if len(policies) != model.layers:
        raise UsageError(f"{len(policies)} recompute policies for layers={model.layers}")
    taken = RECOMPUTES[schedule.placement].policies
    for policy in policies:
        if policy not in taken:
            legal = ", ".join(taken)
            near = did_you_mean(str(policy), taken)
            raise UsageError(f"recompute={policy!r} is not a policy here{near}; use one of {legal}")
    check(schedule)
    refused = why_not_lowered(schedule)
    if refused is not None:
        raise UsageError(refused)
    return ShardedStep(
        schedule=schedule,
        model=model,
        mesh=mesh,
        compute_dtype=jnp.dtype(compute_dtype),
        gradient_dtype=jnp.dtype(gradient_dtype),
        recompute=policies,
        # Written out, steps are faster on GPUs; devices of a CPU are there to see them soon.
        looped=not unroll and mesh.devices.flat[0].platform == "cpu",
        context=context_on(mesh, model, schedule, context),
    )


@dataclass(frozen=True, kw_only=True)
class ShardedStep(Step):
    """A sharded schedule ready to run; the same surface as `LoweredStep`."""

    recompute: tuple[Recompute, ...]
    looped: bool = False
    """Chunks that are alike are a loop, and not written out."""

    @cached_property
    def chunk_layers(self) -> tuple[range, ...]:
        """The layers of each chunk, as even as possible."""
        small, extra = divmod(self.model.layers, self.schedule.chunks)
        ends = np.cumsum([small + (c < extra) for c in range(self.schedule.chunks)])
        return tuple(range(int(e) - small - (c < extra), int(e)) for c, e in enumerate(ends))

    def to_rest(self, parameters: Parameters) -> Parameters:
        """Places parameters on the mesh; layers keep their order."""
        self.check_layers(parameters)
        return jax.device_put(parameters, self.rest_shardings(parameters))

    def in_rest_order(self, parameters: Parameters) -> Parameters:
        """The same order, placed nowhere."""
        return parameters

    def from_rest(self, parameters: Parameters) -> Parameters:
        """The parameters in layer order, which is the order they rest in."""
        return parameters

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
        total = self.replicas * self.schedule.microbatches
        # Device d of a replica computes microbatches d, d + P, ...: bring them side by side.
        order = np.arange(total).reshape(self.replicas, -1, self.schedule.devices)
        order = order.transpose(0, 2, 1).reshape(-1)
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=0), batch)
        specs = self.rest_specs(parameters)
        step = jax.shard_map(
            Run(self, specs).step,
            mesh=self.mesh,
            in_specs=(specs, self.sequences.specs(batch, (*batch_axes(self.mesh), RING))),
            out_specs=self.outcome_specs(specs),
            # Third-party kernels and split residuals carry no varying-axes types.
            check_vma=False,
        )
        return step(parameters, batch)

    def rest_specs(self, parameters: Parameters) -> Parameters:
        """PartitionSpecs: every leaf over the ring and those that share its sequences, blocks along
        an axis behind their layers'."""
        parts, axes, cuts = self.shards, self.shard_axes, self.cuts(parameters)

        def spec(leaf: Any, cut: PartitionSpec, first: int) -> PartitionSpec:
            return sharded_spec(leaf.shape, parts, first_axis=first, cut=cut, axes=axes)

        return Parameters(
            edge=jax.tree.map(lambda p, c: spec(p, c, 0), parameters["edge"], cuts["edge"]),
            blocks=jax.tree.map(lambda p, c: spec(p, c, 1), parameters["blocks"], cuts["blocks"]),
        )
