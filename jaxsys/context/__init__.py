"""One sequence on many devices: how it is cut, and attention over the parts."""

from . import blocks
from .attention import attend_over
from .split import WAYS, ContextSplit, Way

__all__ = ["WAYS", "ContextSplit", "Way", "attend_over", "blocks"]
