"""What layers of decoders are made of, where it is more than a number: kinds, experts, latents.

Legend: E experts, F feed-forward width.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxsys.errors import UsageError
from jaxsys.model.rope import RopeScaling

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
RouterKind = Literal["softmax", "chosen_softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Rotary settings of one kind of layer, where they are not the model's."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """What one kind of layer does otherwise than another."""

    name: str = "block"
    window: int | None = None
    """Keys a query sees, its own the last of them; None: all before it."""
    rotary: bool = True
    """Whether its heads are turned by position."""
    positions: Positions | None = None
    """Its own rotary settings; the model's if None."""
    experts: bool = False
    """Whether its feed-forward is the model's `experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A feed-forward of many, of which each token uses a few; without capacities.

    A router scores every expert for a token; the `active` best are summed, weighted by their
    scores. Scores are a softmax over all experts, a softmax over the chosen ones, or sigmoids.
    """

    count: int
    """E."""
    active: int
    """Experts a token uses."""
    intermediate_size: int
    """F of each."""
    router: RouterKind = "softmax"
    renormalise: bool = False
    """Whether the weights of the chosen sum to 1."""
    scale: float = 1.0
    """What the weights are multiplied by at last."""
    correction: bool = False
    """Whether a learned bias takes part in choosing, though not in weighing."""
    groups: int = 1
    """Experts are chosen from the best `active_groups` of so many groups."""
    active_groups: int = 1
    group_worth: int = 2
    """A group is worth the sum of so many of its best experts; 0: groups do not count."""
    bias: bool = False
    """Of the router and of every expert's products."""
    clamp: float | None = None
    """A bound on gate (from above) and up (both ways): (up + 1) gate sigmoid(slope gate)."""
    slope: float = 1.702
    """Of the sigmoid in a clamped unit."""
    shared_size: int = 0
    """F of the expert that every token uses; 0: none."""
    shared_gate: bool = False
    """Whether a sigmoid weighs the shared expert."""
    balance: float = 0.0
    """Weight in training of the loss that keeps experts evenly used (Switch, 2101.03961)."""

    def __post_init__(self) -> None:
        for name in ("count", "active", "intermediate_size", "groups", "active_groups"):
            check_size(f"experts {name}", getattr(self, name))
        if self.shared_size != 0:
            check_size("experts shared_size", self.shared_size)
        if self.active > self.count:
            raise UsageError(f"active={self.active} experts of count={self.count} cannot be chosen")
        if self.count % self.groups or self.active_groups > self.groups:
            raise UsageError(
                f"groups={self.groups} must divide count={self.count} experts and be at least "
                f"active_groups={self.active_groups}"
            )
        if self.group_worth not in (0, 1, 2):
            raise UsageError(f"group_worth={self.group_worth} must be 0, 1 or 2")
        in_groups = self.active_groups * (self.count // self.groups)
        if self.group_worth and self.active > in_groups:
            raise UsageError(
                f"active={self.active} experts are more than those of active_groups="
                f"{self.active_groups}"
            )
        if self.groups > 1 and self.count // self.groups < self.group_worth:
            raise UsageError(f"groups={self.groups} of count={self.count} hold less than 2 experts")
        check_choice("router", self.router, RouterKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads from one narrow vector a token.

    DeepSeek-V2, 2405.04434. A head's query and key are `plain_dim` channels without positions and
    `rotary_dim` that turn; the latter key is shared by all heads.
    """

    query_rank: int | None
    """Width that queries are squeezed through; None: they are not."""
    rank: int
    """Width of the latent vector."""
    plain_dim: int
    rotary_dim: int
    value_dim: int
    epsilon: float = 1e-6
    """Of the norms of the narrow vectors."""

    def __post_init__(self) -> None:
        for name in ("rank", "plain_dim", "rotary_dim", "value_dim"):
            check_size(f"latent {name}", getattr(self, name))
        if self.query_rank is not None:
            check_size("latent query_rank", self.query_rank)


def check_size(name: str, value: Any) -> None:
    """Raises UsageError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}={value!r} must be a whole number of at least 1")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises UsageError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise UsageError(f"{name}={value!r} is not known; known: {', '.join(get_args(choices))}")
