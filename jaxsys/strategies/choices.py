"""The words a plan is made of: what may be chosen for a block of data, and the points they span.

A `Choices` is what a plan says of the devices of one schedule, recompute left aside. A strategy's
`Place` says which choices are its own, so that a planner looks for it and calls it by its name.
"""

from dataclasses import dataclass
from enum import StrEnum


class Weights(StrEnum):
    """How long a copy of a layer's weights lives."""

    STAY = "stay"
    WITHIN = "within"
    BETWEEN = "between"
    REFETCH = "refetch"


class Gradient(StrEnum):
    """When a layer's gradient is summed over devices."""

    ONCE = "once"
    EACH = "each"
    DEFERRED = "deferred"


class State(StrEnum):
    """Where master weights and optimizer state rest."""

    WHOLE = "whole"
    SPLIT = "split"


class Order(StrEnum):
    """In which order a device runs its tasks; a strategy from elsewhere may name one of its own."""

    DEPTH_FIRST = "depth-first"
    """A microbatch forward and back, then the next."""
    SIDE_BY_SIDE = "side-by-side"
    """One microbatch forward beside another's way back."""
    KEPT = "kept"
    """Likewise, in a ring whose weights and sums of gradients stay from turn to turn."""
    KEPT_WEIGHTS = "kept-weights"
    """Likewise, where weights stay and sums travel."""
    EARLIEST_BACKWARD = "earliest-backward"
    """A backward pass as soon as one can run."""
    EAGER_FORWARD = "eager-forward"
    """Likewise, after nearly twice as many forward passes."""
    SPACED = "spaced"
    """A backward pass a tick late, so that every hop travels under compute."""
    ALL_FORWARD = "all-forward"
    """Every forward pass first."""


class Backward(StrEnum):
    """Whether a backward pass is one task."""

    WHOLE = "whole"
    SPLIT = "split"
    """Two: I makes dL/dx, and W makes dL/dw of what I left, now or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a plan chooses for the devices of one schedule."""

    axis: str
    """The one of `jaxsys.axes.AXES` that splits them: shard, stages or ring."""
    devices: int
    state: State = State.WHOLE
    weights: frozenset[Weights] = frozenset({Weights.STAY})
    """Over all layers."""
    gradients: frozenset[Gradient] = frozenset({Gradient.ONCE})
    order: str = Order.DEPTH_FIRST
    backward: Backward = Backward.WHOLE
    delay: int = 0
    chunks: int = 1
    """Runs of layers that each stage owns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a strategy lies in the space of plans: one point, for any number of devices."""

    axis: str
    state: State = State.WHOLE
    weights: Weights = Weights.STAY
    gradient: Gradient = Gradient.ONCE
    order: str = Order.DEPTH_FIRST
    backward: Backward = Backward.WHOLE
    delay: int = 0
    chunks: int = 1

    def covers(self, choices: Choices) -> bool:
        """Whether these are its choices, in all layers."""
        return (
            choices.axis == self.axis
            and choices.order == self.order
            and choices.backward is self.backward
            and choices.delay == self.delay
            and choices.chunks == self.chunks
            and choices.state is self.state
            and choices.weights == {self.weights}
            and choices.gradients == {self.gradient}
        )
