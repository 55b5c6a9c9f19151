"""The latency promises: time to first token (TTFT) and inter-token latency (ITL).

One `SharedSlo` is held by the governors and the router alike, so they cannot disagree, and a live
change reaches both at their next decision.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxsys.errors import UsageError

AFTER_STEP = 0.02
"""How much of one first token's wait is believed ..."""
AFTER_DEVIATIONS = 2.0
"""... and for how many mean deviations above the mean there is to be time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Upper bounds promised to users, and the reserve kept below them when planning."""

    ttft_s: float = 0.6
    itl_s: float = 0.06
    reserve: float = 0.05
    """Share of each bound that decisions leave unused: 0.05 plans for 95 % of it. Larger is safer
    and dearer."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}={value} must be a positive number of seconds")
        if not 0 <= self.reserve < 1:
            raise UsageError(f"reserve={self.reserve} must be from 0 to below 1")

    @property
    def planned_ttft_s(self) -> float:
        """The TTFT that decisions aim for."""
        return self.ttft_s * (1 - self.reserve)

    @property
    def planned_itl_s(self) -> float:
        """The ITL that decisions aim for."""
        return self.itl_s * (1 - self.reserve)


MOST_MS = {"--ttft-ms": 300_000, "--itl-ms": 60_000}
"""Longest targets that commands take; the shortest is 1 ms, since seconds are below that."""


def add_targets(add: Callable[..., object]) -> None:
    """The targets as options of a command, under one name and in one unit for all commands.

    Args:
        add: `add_argument` of a parser or a group.
    """
    bounds = Slo()
    for option, default_s, what, old in (
        ("--ttft-ms", bounds.ttft_s, "to the first token", "--ttft-slo"),
        ("--itl-ms", bounds.itl_s, "between tokens", "--itl-slo"),
    ):
        add(
            option,
            type=_milliseconds(option),
            default=1e3 * default_s,
            metavar="MS",
            help=f"milliseconds {what} to aim for (default {1e3 * default_s:g})",
        )
        add(old, type=_renamed(option), help=argparse.SUPPRESS)


def targets_of(arguments: argparse.Namespace) -> Slo:
    """What `add_targets` was given."""
    return Slo(ttft_s=arguments.ttft_ms / 1e3, itl_s=arguments.itl_ms / 1e3)


def _milliseconds(option: str) -> Callable[[str], float]:
    most = MOST_MS[option]

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 1 <= value <= most:
            meant = f"; {text} seconds are {option} {1e3 * value:g}" if 0 < value < 1 else ""
            raise argparse.ArgumentTypeError(f"{text} must be from 1 to {most} milliseconds{meant}")
        return value

    return convert


def _renamed(option: str) -> Callable[[str], float]:
    def refuse(text: str) -> float:
        try:
            meant = f"{1e3 * float(text):g}"
        except ValueError:
            meant = "MS"
        raise argparse.ArgumentTypeError(f"{text} must be in milliseconds: give {option} {meant}")

    return refuse


class SharedSlo:
    """The SLO in force. Readers take `current` anew at each decision."""

    __slots__ = ("_deviation_s", "_mean_s", "changes", "current")

    def __init__(self, slo: Slo | None = None) -> None:
        self.current = slo or Slo()
        self.changes = 0
        self._mean_s = self._deviation_s = 0.0

    @property
    def after_s(self) -> float:
        """What passes between a prompt's end and its first token, for nearly all of them. At most
        half of the TTFT: what waits longer there waits for no prompt's clock."""
        after_s = self._mean_s + AFTER_DEVIATIONS * self._deviation_s
        return min(after_s, self.current.ttft_s / 2)

    @property
    def planned_prompt_s(self) -> float:
        """Of the TTFT that decisions aim for, what waiting for and computing a prompt may take."""
        return self.current.planned_ttft_s - self.after_s

    def first_token_came(self, after_s: float) -> None:
        """A first token came so long after its prompt was computed: where another instance sends
        it, it waits for that one's step."""
        # Mean and deviation as TCP keeps them of round trips (Jacobson, 1988).
        self._deviation_s += AFTER_STEP * (abs(after_s - self._mean_s) - self._deviation_s)
        self._mean_s += AFTER_STEP * (after_s - self._mean_s)

    def change(self, slo: Slo) -> None:
        """Puts another SLO in force; rebinding one reference is atomic for threads."""
        self.current = slo
        self.changes += 1
