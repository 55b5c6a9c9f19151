"""What a strategy says of itself. A family's file holds its strategies and nothing else knows them.

    LIFO = Strategy(
        name="lifo",
        build=lifo,                       # (devices, microbatches) -> Schedule
        placement=Placement.OWNER,        # what rests where
        place=Place(axis="stages", order="last-first"),
    )
    jaxsys.strategies.register(LIFO)      # or an entry point of the group "jaxsys.strategies"

With that it trains, stands in the planner's table, is searched for and is called by its name. A
family whose choices make more plans than have names adds a `Region`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from jaxsys.errors import UsageError
from jaxsys.schedule import Placement, Schedule, ScheduleError, TaskKind

from .choices import Choices, Gradient, Place, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputes:
    """What the backward pass of a placement's programs may compute again."""

    policies: tuple[str, ...]
    by_layer: bool
    """Whether each layer may have a policy of its own."""


_OF_BLOCKS = ("none", "selective", "around-attention", "block")

RECOMPUTES: Mapping[Placement, Recomputes] = MappingProxyType(
    {
        Placement.OWNER: Recomputes(policies=(*_OF_BLOCKS, "chunk"), by_layer=False),
        Placement.REPLICATED: Recomputes(policies=(*_OF_BLOCKS, "chunk"), by_layer=False),
        # Layers are written out there, and each has programs of its own.
        Placement.SHARDED: Recomputes(policies=_OF_BLOCKS, by_layer=True),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What tells schedules apart: where their blocks are, and when. Names are not looked at."""

    schedule: Schedule
    weights: frozenset[Weights]
    """How long copies live, of layers that rest in shards."""
    gradients: frozenset[Gradient]
    weights_travel: bool
    """Of layers that rest on owners."""
    residuals: int
    """The most that the first device holds at once."""
    taps: int
    """Likewise the last device: its lag of W behind I, and the one at hand."""
    pairs: frozenset[TaskKind]
    """Kinds that run beside an F, on one device in one tick."""
    split: bool
    """Whether a backward pass is two tasks."""

    @property
    def owned(self) -> bool:
        """Whether each chunk rests whole on one device."""
        return self.schedule.placement is Placement.OWNER

    @property
    def staged(self) -> bool:
        """Whether activations travel between owners."""
        return self.owned and not self.weights_travel

    @property
    def fewest(self) -> int:
        """What the first stage of a pipeline cannot hold less of."""
        return min(self.schedule.devices, self.schedule.microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to run a step, for any number of devices."""

    name: str
    build: Callable[..., Schedule]
    """(devices, microbatches, **options) -> its schedule."""
    placement: Placement
    """What rests where: chunks on owners, whole on every device, or in shards over all."""
    place: Place | None = None
    """Where it lies in the space of plans; None: it is compared and trained, and not searched."""
    recognises: Callable[[Signs], bool] | None = None
    """Whether a schedule with these signs is one of its own; by building it anew, if not given."""
    chunks_per_device: int = 1
    """Of one whose chunks rest on owners."""
    even_microbatches: bool = False
    """Whether every device takes as many microbatches: their number is a multiple of devices."""
    layers_are_chunks: bool = False
    """Whether its `chunks` are the model's layers unless told otherwise, one each."""
    offered: bool = False
    """Whether it is named as a way out where another does not fit the memory."""

    @property
    def recompute(self) -> Recomputes:
        """What its backward pass may compute again."""
        return RECOMPUTES[self.placement]

    @property
    def options(self) -> tuple[str, ...]:
        """What `build` takes beside devices and microbatches."""
        return tuple(inspect.signature(self.build).parameters)[2:]

    def defaults(self, *, devices: int, layers: int) -> dict[str, int]:
        """Options for a model of so many layers, as it is planned and as it is trained.

        What is replicated on one device is in one piece: there is nothing to overlap.
        """
        whole = devices == 1 and self.placement is Placement.REPLICATED
        return {"chunks": layers} if self.layers_are_chunks and not whole else {}

    def chunks(self, *, devices: int, layers: int) -> int:
        """Into how many chunks it cuts a model's layers by default."""
        if self.placement is Placement.OWNER:
            return self.chunks_per_device * devices
        return self.defaults(devices=devices, layers=layers).get("chunks", 1)

    def schedule(self, choices: Choices, microbatches: int) -> Schedule:
        """Its schedule at its place."""
        return self.build(choices.devices, microbatches)

    def made(self, schedule: Schedule) -> bool:
        """Whether building it for the schedule's sizes gives the same tasks and moves."""
        own: dict[str, Any] = {"chunks": schedule.chunks} if "chunks" in self.options else {}
        if schedule.placement is not self.placement:
            return False
        try:
            mine = self.build(schedule.devices, schedule.microbatches, **own)
        except (UsageError, ScheduleError):
            return False
        return set(mine.tasks) == set(schedule.tasks) and set(mine.moves) == set(schedule.moves)


class Region(Protocol):
    """Choices that belong together, more than have strategies of their own."""

    def covers(self, choices: Choices) -> bool:
        """Whether these choices are in it."""
        ...

    def called(self, choices: Choices) -> str:
        """What plans of these choices are called."""
        ...

    def recognised(self, signs: Signs) -> str | None:
        """What a schedule of these signs is called, if it is one of the region's."""
        ...


class StagedRegion(Region, Protocol):
    """One whose choices make a schedule, whatever the layers do."""

    def schedule(self, choices: Choices, microbatches: int) -> Schedule:
        """The schedule of these choices."""
        ...
