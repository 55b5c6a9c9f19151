"""One jitted training step: gradients by the schedule, clipping, the optimizer, all in place.

The state is donated. A batch whose loss or gradient norm is not finite leaves parameters and
optimizer as they were and is counted; under the policy "stop" nothing is updated after it either,
so that the loop, which reads results one step late, can stop with the last good state.

A step of one's own is a function of the same parts:

    def step(parts, state, batch):
        loss, gradients, _, metrics = parts.loss_and_gradients(state.parameters, batch)
        gradients = jax.tree.map(lambda g: g / (1 + loss), gradients)
        parameters, optimizer = parts.update(gradients, state.optimizer, state.parameters)
        return parts.finish(state, parameters, optimizer, loss, gradients, metrics)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.lowering import LossAndGradients
from jaxsys.train.rules import RuleAtRest
from jaxsys.train.state import AveragedState, RunnableStep, State

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
class Updates:
    """How gradients become updates."""

    clip_norm: float | None = None
    """Gradients are scaled down to this global norm; None leaves them."""
    non_finite: NonFinite = "stop"
    """What a loss or gradient that is not finite does: "stop" the run, or "skip" that batch."""
    average_decay: float | Callable[[jax.Array], Any] | None = None
    """Keeps average = decay * average + (1 - decay) * parameters, after every step; a number, or a
    function of the steps before. None keeps none."""
    custom_step: "CustomStep | None" = None
    """A step of one's own, traced like the usual one; see this module's head."""

    def __post_init__(self) -> None:
        """Raises UsageError if a value is none of those it may be."""
        if self.non_finite not in ("stop", "skip"):
            raise UsageError(f"non_finite={self.non_finite!r} must be 'stop' or 'skip'")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"clip_norm={self.clip_norm} must be above 0")
        decay = self.average_decay
        if not (decay is None or callable(decay) or 0 <= decay < 1):
            raise UsageError(f"average_decay={decay} must be at least 0 and below 1")

    @property
    def settings(self) -> dict[str, Any]:
        """What of this a resumed run must not change unasked."""
        decay = self.average_decay
        kept = {} if decay is None else {"average_decay": "varies" if callable(decay) else decay}
        return {"clip_norm": self.clip_norm, **kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """What steps are made of; to be called while a step is traced.

    Parameters, gradients and optimizer state are as they rest: blocks stacked in the schedule's
    order, perhaps with rows that hold no layer. What must see layers as the model has them (masks,
    norms) is an optax transformation's work: `update` runs it on the user's own tree.
    """

    loss_and_gradients: Callable[[Parameters, PyTree], LossAndGradients]
    """(parameters, batch) -> the schedule's loss, gradients, weight and metrics."""
    update: Callable[[Parameters, PyTree, Parameters], tuple[Parameters, PyTree]]
    """(gradients, optimizer state, parameters) -> the optimizer's parameters and state."""
    options: Updates

    def clip(self, gradients: Parameters) -> Parameters:
        """The gradients, scaled down to `clip_norm` if that is set."""
        if self.options.clip_norm is None:
            return gradients
        norm = global_norm(gradients)
        scale = jnp.minimum(1.0, self.options.clip_norm / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype) if _trains(g) else g, gradients)

    def finish(
        self,
        state: State,
        parameters: Parameters,
        optimizer: PyTree,
        loss: jax.Array,
        gradients: Parameters,
        metrics: dict[str, jax.Array] | None = None,
    ) -> tuple[State, StepResult]:
        """The state after the step, or as it was where the loss or the gradients are not finite."""
        norm = global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skips = self.options.non_finite == "skip"
        apply = finite if skips else finite & (state.skipped == 0)

        def choose(new: Any, old: Any) -> Any:
            return jnp.where(apply, new, old)

        skipped = state.skipped + (~finite).astype(jnp.int32)
        new = state._replace(
            parameters=jax.tree.map(choose, parameters, state.parameters),
            optimizer=jax.tree.map(choose, optimizer, state.optimizer),
            step=state.step + 1,
            skipped=skipped,
        )
        if isinstance(state, AveragedState):
            average = self._average(state, parameters)
            new = new._replace(average=jax.tree.map(choose, average, state.average))
        result = StepResult(
            loss=jnp.float32(loss), gradient_norm=norm, skipped=skipped, metrics=metrics or {}
        )
        return new, result

    def _average(self, state: AveragedState, parameters: Parameters) -> Parameters:
        decay: Any = self.options.average_decay
        kept: Any = decay(state.step) if callable(decay) else decay

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            return kept * old + (1 - kept) * new if _trains(new) else new

        return jax.tree.map(mix, state.average, parameters)


CustomStep = Callable[[StepParts, State, PyTree], tuple[State, StepResult]]
"""(parts, state, batch) -> (state, result)."""


def global_norm(tree: PyTree) -> jax.Array:
    """The root of the sum of squares of all leaves that are numbers to train, float32."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _trains(leaf)]
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def usual_step(parts: StepParts, state: State, batch: PyTree) -> tuple[State, StepResult]:
    """Gradients, clipping, the optimizer."""
    loss, gradients, _, metrics = parts.loss_and_gradients(state.parameters, batch)
    clipped = parts.clip(gradients)
    parameters, optimizer = parts.update(clipped, state.optimizer, state.parameters)
    return parts.finish(state, parameters, optimizer, loss, gradients, metrics)


def make_step(
    lowered: RunnableStep, rule: RuleAtRest, shardings: State, options: Updates
) -> Callable[[State, PyTree], tuple[State, StepResult]]:
    """The jitted step (state, batch) -> (state, result); the state is donated."""
    parts = StepParts(
        loss_and_gradients=lowered.loss_and_gradients, update=rule.update, options=options
    )
    body = options.custom_step or usual_step

    def step(state: State, batch: PyTree) -> tuple[State, StepResult]:
        new, result = body(parts, state, batch)
        if options.custom_step is not None:
            _check_own(state, new, result)
        return jax.lax.with_sharding_constraint(new, shardings), result

    # Only steps whose streams must travel at once ask for more than XLA's defaults.
    return jax.jit(step, donate_argnums=0, compiler_options=lowered.compiler_options)


def _trains(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _check_own(state: Any, new: Any, result: Any) -> None:
    """Raises UsageError unless a custom step returned a state like the one given, and a result."""
    if not isinstance(result, StepResult):
        raise UsageError(
            f"the custom step returns {type(result).__name__} beside the state; return what "
            "`parts.finish` does"
        )
    if jax.tree.structure(state) != jax.tree.structure(new):
        raise UsageError("the custom step returns a state of another structure than it was given")
    for (path, old), leaf in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True
    ):
        if (old.shape, old.dtype) != (leaf.shape, leaf.dtype):
            raise UsageError(
                f"the custom step returns {jax.tree_util.keystr(path)} as {leaf.dtype}"
                f"{list(leaf.shape)}; it was {old.dtype}{list(old.shape)}"
            )
