"""Every strategy by name, those of this package and those that others add.

A package adds one with `register`, or declares it as an entry point, so that the commands know it:

    [project.entry-points."jaxsys.strategies"]
    lifo = "my_package.lifo:LIFO"
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.schedule import Schedule

from . import data_parallel, keeping, pipeline, weipipe, zero, zero_bubble
from .choices import Choices
from .in_turn import InTurn
from .strategy import Region, Signs, StagedRegion, Strategy

GROUP = "jaxsys.strategies"
"""Of entry points, each a `Strategy`."""

_BUILT_IN = (
    *data_parallel.STRATEGIES,
    *pipeline.STRATEGIES,
    *zero_bubble.STRATEGIES,
    *zero.STRATEGIES,
    *weipipe.STRATEGIES,
    *keeping.STRATEGIES,
)
_STAGED: tuple[StagedRegion, ...] = (InTurn(),)
_REGIONS: tuple[Region, ...] = (*_STAGED, zero.Trajectories())


class Registry(Mapping[str, Strategy]):
    """Name -> strategy. Reads as a mapping; `register` adds to it."""

    def __init__(self, strategies: tuple[Strategy, ...]) -> None:
        self._known: dict[str, Strategy] = {one.name: one for one in strategies}
        self._declared: bool = False

    def __getitem__(self, name: str) -> Strategy:
        self._load_declared()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._load_declared()
        return iter(tuple(self._known))

    def __len__(self) -> int:
        self._load_declared()
        return len(self._known)

    def add(self, strategy: Strategy) -> None:
        """See `register`."""
        self._load_declared()
        known = self._known.get(strategy.name)
        if known is not None and known != strategy:
            raise UsageError(f"there is a strategy {strategy.name!r} already; name it otherwise")
        self._known[strategy.name] = strategy

    def remove(self, name: str) -> None:
        """See `unregister`."""
        if name in {one.name for one in _BUILT_IN}:
            raise UsageError(f"strategy {name!r} is part of jaxsys and stays")
        self._known.pop(name, None)

    def _load_declared(self) -> None:
        if self._declared:
            return
        self._declared = True
        for point in entry_points(group=GROUP):
            try:
                strategy = point.load()
            except Exception as error:  # whatever another package's import raises
                raise UsageError(
                    f"strategy {point.name!r} of {point.value} does not load: {error}; repair or "
                    "uninstall the package that declares it"
                ) from error
            if not isinstance(strategy, Strategy):
                raise UsageError(f"entry point {point.value} of {GROUP!r} is no Strategy")
            self.add(strategy)


STRATEGIES = Registry(_BUILT_IN)
"""Name -> strategy, those that were registered included."""
NAMES = tuple(one.name for one in _BUILT_IN)
"""The names that come with jaxsys."""


def register(strategy: Strategy) -> None:
    """Adds a strategy, so that it trains, is planned and recognised, and is a choice of commands.

    Raises:
        UsageError: if its name is taken by another.
    """
    STRATEGIES.add(strategy)


def unregister(name: str) -> None:
    """Takes a strategy out again that was registered.

    Raises:
        UsageError: if it is one of jaxsys' own.
    """
    STRATEGIES.remove(name)


def find(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        UsageError: if there is none.
    """
    if name not in STRATEGIES:
        raise UsageError(
            f"unknown strategy {name!r}{did_you_mean(name, STRATEGIES)}; use one of "
            f"{', '.join(STRATEGIES)}"
        )
    return STRATEGIES[name]


_NEEDED: Any = object()


def build(
    name: str, *, devices: int = _NEEDED, microbatches: int = _NEEDED, **options: int
) -> Schedule:
    """Makes a schedule by its strategy's name.

    Args:
        name: one of `STRATEGIES`.
        devices: P, the devices of the ring or pipeline.
        microbatches: M, over all of them.
        **options: what this strategy takes beside these, such as `chunks` for `dp`.

    Raises:
        UsageError: if the name or an option is unknown, or P or M not legal for the strategy.
    """
    strategy = find(name)
    known = strategy.options
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            near = did_you_mean(option, ("devices", "microbatches", *known))
            raise UsageError(f"strategy {name!r} has no option {option!r}{near}; {takes}")
    for needed, value in (("devices", devices), ("microbatches", microbatches)):
        if value is _NEEDED:
            raise UsageError(f"strategy {name!r} needs {needed}; give a number of them")
    return strategy.build(devices, microbatches, **options)


def for_layers(name: str, *, devices: int, microbatches: int, layers: int) -> Schedule:
    """Makes a strategy's schedule for a model, in the chunks it is planned and trained with.

    Raises:
        UsageError: if the name is unknown, or P or M not legal for the strategy.
    """
    options = find(name).defaults(devices=devices, layers=layers)
    return build(name, devices=devices, microbatches=microbatches, **options)


def strategy_at(choices: Choices) -> Strategy | None:
    """The strategy whose place this is."""
    for strategy in STRATEGIES.values():
        if strategy.place is not None and strategy.place.covers(choices):
            return strategy
    return None


def called(choices: Choices) -> str | None:
    """What plans of these choices are called; None if nothing runs them."""
    strategy = strategy_at(choices)
    if strategy is not None:
        return strategy.name
    return next((region.called(choices) for region in _REGIONS if region.covers(choices)), None)


def staged_at(choices: Choices, microbatches: int) -> Schedule | None:
    """The schedule of layers that rest on owners; None if nothing runs these choices.

    Raises:
        UsageError: if the microbatches are not legal for it.
    """
    for one in (strategy_at(choices), *_STAGED):
        if one is not None and (isinstance(one, Strategy) or one.covers(choices)):
            return one.schedule(choices, microbatches)
    return None


def named(signs: Signs) -> str | None:
    """The name of a schedule with these signs."""
    for strategy in STRATEGIES.values():
        if strategy.recognises is None and strategy.made(signs.schedule):
            return strategy.name
    for strategy in STRATEGIES.values():
        if strategy.recognises is not None and strategy.recognises(signs):
            return strategy.name
    return next((name for region in _REGIONS if (name := region.recognised(signs))), None)


def orders() -> tuple[str, ...]:
    """The orders of tasks that strategies from elsewhere have for their own."""
    return tuple(
        dict.fromkeys(
            one.place.order
            for one in STRATEGIES.values()
            if one.place is not None and one not in _BUILT_IN
        )
    )
