"""Strategies: how a step may be run, each in its family's file, all of them by name.

A `Strategy` builds its schedule and says what rests where, where it lies in the space of plans, how
it is recognised, which recompute it takes and in which chunks it runs.
"""

from .choices import Backward, Choices, Gradient, Order, Place, State, Weights
from .registry import (
    NAMES,
    STRATEGIES,
    build,
    called,
    find,
    for_layers,
    named,
    orders,
    register,
    staged_at,
    strategy_at,
    unregister,
)
from .strategy import RECOMPUTES, Recomputes, Region, Signs, StagedRegion, Strategy

__all__ = [
    "NAMES",
    "RECOMPUTES",
    "STRATEGIES",
    "Backward",
    "Choices",
    "Gradient",
    "Order",
    "Place",
    "Recomputes",
    "Region",
    "Signs",
    "StagedRegion",
    "State",
    "Strategy",
    "Weights",
    "build",
    "called",
    "find",
    "for_layers",
    "named",
    "orders",
    "register",
    "staged_at",
    "strategy_at",
    "unregister",
]
