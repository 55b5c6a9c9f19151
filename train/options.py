"""What a run may be told besides its model, optimizer and schedule: small values with defaults.

`Trainer` and `fit` take them whole, or any of their fields by name: `Trainer(..., clip_norm=1.0)`
is `Trainer(..., updates=Updates(clip_norm=1.0))`, `fit(..., folder="runs/first")` is
`fit(..., saving=Saving(folder="runs/first"))`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.hardware import GIB
from jaxsys.layered import PyTree
from jaxsys.lowering import Recompute
from jaxsys.train.memory import Limit, limit_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """In what numbers a step computes, and what it computes twice."""

    compute_dtype: DTypeLike = jnp.float32
    """Of weights in use and activations."""
    gradient_dtype: DTypeLike = jnp.float32
    """Of gradient sums on their way."""
    recompute: Recompute | tuple[Recompute, ...] = "block"
    """What the backward pass computes again; by layer where the schedule shards."""
    unroll: bool = False
    """Write a chunk's layers out instead of looping over them: steps that keep residuals are
    faster, compiling takes longer (one body a layer). ZeRO's always are on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a step may need on a device.

    A step that is predicted to need more is refused before anything is compiled.
    """

    memory_gib: float | None = None
    """What the device has, if not given (of CPU devices each its part of what the host has free);
    `math.inf` goes on whatever is predicted."""
    microbatch: PyTree | None = field(default=None, repr=False)
    """Arrays or shapes of one, [B, ...]. With it what does not fit is refused before parameters are
    made, and not at the first batch; and `schedule="auto"` chooses then."""

    def __post_init__(self) -> None:
        """Raises UsageError if the limit is none."""
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise UsageError(f"memory_gib={self.memory_gib} must be above 0")

    def limit(self, device: Any) -> Limit:
        """In bytes."""
        return limit_of(device) if self.memory_gib is None else Limit(bytes=self.memory_gib * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is remembered of a run, and said of its speed."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the trajectory depends on; compared when a run is resumed."""
    flops_per_token: float | None = None
    """For MFU, see `jaxsys.train.flops`."""
    seed: int = 0
    """Of the keys that a model that draws random numbers (dropout) finds in its batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Where a run is kept, and whether it goes on from there."""

    folder: str | Path | None = None
    """For checkpoints, metrics.jsonl, event and profile files; None keeps nothing."""
    resume: bool = False
    """Go on from the last good checkpoint in `folder`, if there is one."""
    accept_changes: bool = False
    """Resume although settings differ."""
    save_every: int | None = None
    """Steps between checkpoints; one is made at the end in any case."""
    keep: int = 3
    """How many checkpoints stay."""
    wait_s: float = 0.0
    """How long to wait for another run to let go of `folder`."""

    def __post_init__(self) -> None:
        """Raises UsageError if a value is none."""
        _check_above_zero(save_every=self.save_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """What a run tells of itself."""

    held_out: Sequence[PyTree] = field(default=(), repr=False)
    """Batches whose mean loss is reported, of any cut."""
    held_out_every: int | None = None
    """Steps between such reports; once at the end if not given."""
    tokens_per_step: int | None = None
    """For rates; the size of `inputs` if not given."""
    progress: bool = True
    """Whether anything is printed."""
    tensorboard: bool = False
    """Write event files too (needs tensorboardX)."""
    profile: bool = False
    """Write an xprof trace of a few steps into `folder`/profile."""

    def __post_init__(self) -> None:
        """Raises UsageError if a value is none."""
        _check_above_zero(held_out_every=self.held_out_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What ends a run before its last step."""

    stop_at: int | None = None
    """Stop after this step, with a checkpoint."""
    hang_timeout_s: float | None = None
    """Leave the process when a step takes longer."""
    lost_after_s: float = 15.0
    """In a run of many processes, how long one may be silent."""

    def __post_init__(self) -> None:
        """Raises UsageError if a value is none."""
        _check_above_zero(
            stop_at=self.stop_at,
            hang_timeout_s=self.hang_timeout_s,
            lost_after_s=self.lost_after_s,
        )


def _check_above_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UsageError(f"{name}={value} must be above 0")


def with_fields(
    groups: tuple[T, ...], named: Mapping[str, Any], *, beside: Iterable[str] = ()
) -> tuple[T, ...]:
    """The groups with fields given by name put into those that have them.

    Args:
        groups: dataclasses.
        named: field -> value.
        beside: what else is taken by name, and has been.

    Raises:
        UsageError: if no group has such a field.
    """
    left = dict(named)
    found = []
    for group in groups:
        own = {f.name for f in fields(group)} & left.keys()  # type: ignore[arg-type]
        found.append(replace(group, **{name: left.pop(name) for name in own}))  # type: ignore[type-var]
    if left:
        known = ", ".join([*beside, *(f.name for group in groups for f in fields(group))])  # type: ignore[arg-type]
        raise TypeError(f"unknown options {', '.join(left)}; there are {known}")
    return tuple(found)
