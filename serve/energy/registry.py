"""Clock policies and routers by name: what options and replays may ask for.

A line here is a choice of `jaxsys serve --policy`, `--route` and `jaxsys replay --policy`. Packages
of one's own add theirs with `register_clock_policy` and `register_router`, or, where other
processes are to know them too, as entry points of the groups `jaxsys.clock_policies` and
`jaxsys.routers`, each naming a function like those below.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.serve.energy.ahead import Ahead, AheadConfig
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig
from jaxsys.serve.energy.ecoroute import (
    EnergyRouter,
    QueueRouter,
    RandomRouter,
    RoundRobinRouter,
    StateSpaceRouter,
)
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.gpu_model import SimulatedGpu
from jaxsys.serve.energy.policy import ClockPolicy, OwnRule
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.prefix_route import PrefixRouter
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.energy.window_control import WindowControl
from jaxsys.serve.hooks import FewestRequestsRouter, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a policy or a router is made for."""

    gpu: SimulatedGpu
    """The modelled GPUs of one instance, with the model served."""
    slo: SharedSlo
    clocks_mhz: tuple[int, ...]
    """The clocks to choose among, ascending; the lowest is the sweet spot."""
    top_mhz: int
    """The GPU's highest clock."""
    predictor: Callable[[], Predictor]
    """Made when first asked for: one that learns is dear to make."""
    prefill_budget: int = 8192
    """Prompt tokens an iteration computes: how a queue will be cut."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the policy's own."""


T = TypeVar("T")

GATHER_SHARE = 0.4
"""Of the time that prompts have, what they may wait where others are, with `gather`."""


class Registry(Mapping[str, Callable[[Situation], T]], Generic[T]):
    """What makes each thing of one kind, by name."""

    def __init__(self, what: str, group: str, own: Mapping[str, Callable[[Situation], T]]) -> None:
        """
        Args:
            what: they are called in errors.
            group: of entry points.
        """
        self.what = what
        self.group = group
        self._own = dict(own)
        self._looked = False

    def register(self, name: str, make: Callable[[Situation], T]) -> None:
        """Adds one.

        Raises:
            UsageError: if the name is taken, or is none that a list of names may hold.
        """
        if not name or any(mark in name for mark in ",+ \t\n"):
            raise UsageError(f"{self.what} {name!r} must be a word without comma, plus or space")
        if name in self:
            raise UsageError(f"{self.what} {name!r} is there already; choose another name")
        self._own[name] = make

    def make(self, name: str, situation: Situation) -> T:
        """The one called `name`.

        Raises:
            UsageError: if there is none; lists those there are.
        """
        self.check(name)
        return self[name](situation)

    def check(self, name: str) -> None:
        """Raises UsageError where none is called `name`."""
        if name not in self:
            near = did_you_mean(name, self)
            raise UsageError(
                f"{self.what} {name!r} is not known{near}; use one of {', '.join(self)}"
            )

    def __getitem__(self, name: str) -> Callable[[Situation], T]:
        self._look()
        return self._own[name]

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter(self._own)

    def __len__(self) -> int:
        self._look()
        return len(self._own)

    def _look(self) -> None:
        """Takes in what installed packages offer, once."""
        if self._looked:
            return
        self._looked = True
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                make = point.load()
            except Exception as error:
                raise UsageError(
                    f"{self.what} {point.name!r} of package "
                    f"{point.dist.name if point.dist else '?'} cannot be loaded: {error}"
                ) from error
            self.register(point.name, make)


CLOCK_POLICIES: Registry[ClockPolicy] = Registry(
    "clock policy",
    "jaxsys.clock_policies",
    {
        "max": lambda s: FixedClock(s.top_mhz),
        "sweet-spot": lambda s: FixedClock(s.clocks_mhz[0]),
        "window": lambda s: WindowControl(s.predictor(), s.slo, **s.options),
        "ecofreq": lambda s: EcoFreq(
            s.predictor(),
            s.slo,
            config=EcoFreqConfig(**{"prefill_budget": s.prefill_budget, **s.options}),
        ),
        "ahead": lambda s: Ahead(
            s.predictor(),
            s.slo,
            config=AheadConfig(**{"prefill_budget": s.prefill_budget, **s.options}),
        ),
        "own-rule": lambda s: OwnRule(),
    },
)

ROUTERS: Registry[Router] = Registry(
    "router",
    "jaxsys.routers",
    {
        "fewest": lambda s: FewestRequestsRouter(),
        "round-robin": lambda s: RoundRobinRouter(),
        "random": lambda s: RandomRouter(),
        "queue": lambda s: QueueRouter(s.predictor(), clocks_mhz=s.clocks_mhz, slo=s.slo),
        "gather": lambda s: QueueRouter(
            s.predictor(), clocks_mhz=s.clocks_mhz, slo=s.slo, gather_share=GATHER_SHARE
        ),
        "prefix": lambda s: PrefixRouter(s.predictor(), s.slo, clocks_mhz=s.clocks_mhz),
        "ecoroute": lambda s: StateSpaceRouter(s.predictor(), s.slo, clocks_mhz=s.clocks_mhz),
        "energy": lambda s: EnergyRouter(
            s.predictor(),
            s.slo,
            clocks_mhz=s.clocks_mhz,
            idle_power_w=s.gpu.idle_power_w(s.clocks_mhz[0]),
        ),
    },
)

register_clock_policy = CLOCK_POLICIES.register
register_router = ROUTERS.register
