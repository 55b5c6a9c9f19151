"""One sequence on many devices: how it is cut, and attention over the parts."""

from . import blocks
from .agreed import agreed_split, with_split
from .attention import attend_over
from .split import WAYS, ContextSplit, Way, said_by, splits_of

__all__ = [
    "WAYS",
    "ContextSplit",
    "Way",
    "agreed_split",
    "attend_over",
    "blocks",
    "said_by",
    "splits_of",
    "with_split",
]
