"""From a Schedule to one jitted `shard_map` step."""

from .base import LossAndGradients
from .programs import RECOMPUTE_POLICIES, Recompute
from .sharded import ShardedStep, lower_sharded
from .step import LoweredStep, lower
from .xla import lacks

__all__ = [
    "RECOMPUTE_POLICIES",
    "LossAndGradients",
    "LoweredStep",
    "Recompute",
    "ShardedStep",
    "lacks",
    "lower",
    "lower_sharded",
]
