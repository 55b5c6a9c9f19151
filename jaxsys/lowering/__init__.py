"""From a Schedule to one jitted `shard_map` step."""

from .programs import RECOMPUTE_POLICIES, Recompute
from .step import LoweredStep, lower

__all__ = ["RECOMPUTE_POLICIES", "LoweredStep", "Recompute", "lower"]
