"""What the host takes to plan an iteration and queue it on the device, as a profile found it.

    alike     a decode step of the same requests as the one before
    changed   a decode step of other requests, or behind a prompt: their rules travel anew, and XLA
              may have to write the step's CUDA graph again
    piece     one piece of a prompt, and the choice of its token

While a step runs the next is queued behind it, so that this time shows only where it is longer than
the step. A replay draws from what was found, each draw by itself.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.iterations import Iteration

Kind = Literal["alike", "changed", "piece"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POINTS = 101
"""Of a distribution that are kept: its percentiles, least and most among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchTimes:
    """Seconds by kind: percentiles, ascending, evenly apart from the least to the most."""

    alike: tuple[float, ...]
    changed: tuple[float, ...]
    piece: tuple[float, ...]

    def __post_init__(self) -> None:
        for kind in KINDS:
            points = getattr(self, kind)
            if not points or points[0] < 0 or list(points) != sorted(points):
                raise UsageError(f"dispatch times {kind}={points[:3]}... must be ascending seconds")

    @classmethod
    def of(cls, noted_s: Mapping[Kind, Sequence[float]]) -> "DispatchTimes | None":
        """The percentiles of what was noted; None where some kind never came."""
        if not all(noted_s.get(kind) for kind in KINDS):
            return None
        at = np.linspace(0, 100, POINTS)
        return cls(**{kind: tuple(np.percentile(noted_s[kind], at).tolist()) for kind in KINDS})

    def draw(self, kind: Kind, source: random.Random) -> float:
        """Seconds of one dispatch."""
        points = getattr(self, kind)
        place = source.random() * (len(points) - 1)
        below = min(int(place), len(points) - 2) if len(points) > 1 else 0
        above = min(below + 1, len(points) - 1)
        return points[below] + (place - below) * (points[above] - points[below])

    def iteration_s(
        self, iteration: Iteration, before: Iteration | None, source: random.Random
    ) -> float:
        """Seconds of one iteration's dispatch: its pieces one after the other, then its step.

        Args:
            before: the iteration dispatched before it, if there was one.
        """
        took_s = sum(self.draw("piece", source) for _ in iteration.prefills)
        if iteration.decodes:
            took_s += self.draw(kind_of_step(iteration, before), source)
        return took_s


def kind_of_step(iteration: Iteration, before: Iteration | None) -> Kind:
    """Which kind an iteration's decode step is."""
    alike = (
        before is not None
        and not before.prefills
        and not iteration.prefills
        and iteration.decodes == before.decodes
    )
    return "alike" if alike else "changed"
