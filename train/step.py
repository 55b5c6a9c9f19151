"""One jitted training step: gradients by the schedule, clipping, the optimizer, all in place.

The state is donated. A batch whose loss or gradient norm is not finite leaves parameters and
optimizer as they were and is counted; under the policy "stop" nothing is updated after it either,
so that the loop, which reads results one step late, can stop with the last good state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.layered import PyTree
from jaxsys.train.rules import RuleAtRest
from jaxsys.train.state import LoweredStep, TrainState

NonFinite = Literal["stop", "skip"]


class StepResult(NamedTuple):
    """What one step reports; float32 and int32 scalars, still on the devices."""

    loss: jax.Array
    gradient_norm: jax.Array
    skipped: jax.Array
    """Batches skipped so far, this one included."""
    metrics: dict[str, jax.Array]
    """Sums over the batch of what the model returns beside its loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How gradients become updates."""

    clip_norm: float | None = None
    """Gradients are scaled down to this global norm; None leaves them."""
    non_finite: NonFinite = "stop"


def global_norm(tree: PyTree) -> jax.Array:
    """The root of the sum of squares of all leaves, float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def make_step(
    lowered: LoweredStep,
    rule: RuleAtRest,
    shardings: TrainState,
    options: StepOptions,
) -> Callable[[TrainState, PyTree], tuple[TrainState, StepResult]]:
    """The jitted step (state, batch) -> (state, result); the state is donated."""

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, StepResult]:
        loss, gradients, _, metrics = lowered.loss_and_gradients(state.parameters, batch)
        norm = global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if options.clip_norm is not None:
            scale = jnp.minimum(1.0, options.clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        parameters, optimizer_state = rule.update(gradients, state.optimizer, state.parameters)
        apply = finite if options.non_finite == "skip" else finite & (state.skipped == 0)

        def choose(new: Any, old: Any) -> Any:
            return jnp.where(apply, new, old)

        skipped = state.skipped + (~finite).astype(jnp.int32)
        new = TrainState(
            parameters=jax.tree.map(choose, parameters, state.parameters),
            optimizer=jax.tree.map(choose, optimizer_state, state.optimizer),
            step=state.step + 1,
            skipped=skipped,
        )
        new = jax.lax.with_sharding_constraint(new, shardings)
        return new, StepResult(loss=loss, gradient_norm=norm, skipped=skipped, metrics=metrics)

    # Only steps whose streams must travel at once ask for more than XLA's defaults.
    return jax.jit(step, donate_argnums=0, compiler_options=lowered.compiler_options)
