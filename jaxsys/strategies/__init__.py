"""Every strategy by name: a function of devices and microbatches that returns a Schedule."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxsys.errors import UsageError
from jaxsys.schedule import Schedule

from .data_parallel import data_parallel
from .pipeline import gpipe, interleaved_one_f_one_b, one_f_one_b, one_f_one_b_overlap
from .weipipe import interleave, naive, wzb1, wzb2, wzb2_paired
from .zero import zero_1, zero_2, zero_3, zero_3_5, zero_4
from .zero_bubble import zero_bubble_h1, zero_bubble_h2, zero_bubble_overlap

STRATEGIES: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "dp": data_parallel,
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "1f1b-overlap": one_f_one_b_overlap,
        "1f1b-interleaved": interleaved_one_f_one_b,
        "zb-h1": zero_bubble_h1,
        "zb-h2": zero_bubble_h2,
        "zb-overlap": zero_bubble_overlap,
        "zero-1": zero_1,
        "zero-2": zero_2,
        "zero-3": zero_3,
        "zero-3.5": zero_3_5,
        "zero-4": zero_4,
        "weipipe-naive": naive,
        "weipipe-interleave": interleave,
        "weipipe-wzb1": wzb1,
        "weipipe-wzb2": wzb2,
        "weipipe-wzb2-paired": wzb2_paired,
    }
)
"""Name -> generator; its first two arguments are devices and microbatches."""

NAMES = tuple(STRATEGIES)
"""The names `build` knows."""


def build(name: str, *, devices: int, microbatches: int, **options: int) -> Schedule:
    """Makes a schedule by its strategy's name.

    Args:
        name: one of `NAMES`.
        devices: P, the devices of the ring or pipeline.
        microbatches: M, over all of them.
        **options: what this strategy takes beside these, such as `chunks` for `dp`.

    Raises:
        UsageError: if the name or an option is unknown, or P or M not legal for the strategy.
    """
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}; use one of {', '.join(NAMES)}")
    generator = STRATEGIES[name]
    known = list(inspect.signature(generator).parameters)[2:]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"strategy {name!r} has no option {option!r}; {takes}")
    return generator(devices, microbatches, **options)
