"""Layers that keep the same tokens, and the pages that they share.

Layers of one window keep the same tokens at any moment, so one table of pages serves them all; a
group of them is given pages, and gives those back that its window has left behind. All groups have
as many layers, so that any page can hold the tokens of any group: page p of pool j belongs to the
j-th layer of whichever group holds p. A model whose layers are alike is one group.

Legend: P pages, S tokens a page, L layers.
"""

from dataclasses import dataclass

from jaxsys.model import DecoderConfig
from jaxsys.model.contract import layer_cache

WASTE = 0.1
"""Part of the pools that may stay empty so that there are fewer groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroups:
    """Which layers share tables of pages."""

    windows: tuple[int | None, ...]
    """Tokens that each group's layers see, their own the last of them; None: all before it."""
    depth: int
    """Pools: layers of a group, the last of which may have none."""
    places: tuple[tuple[int, int], ...]
    """Of each layer: its group and its pool."""


def cache_groups(config: DecoderConfig) -> CacheGroups:
    """The groups of a model, those that see all tokens first."""
    by_window: dict[int | None, list[int]] = {}
    for layer in range(config.num_layers):
        window = layer_cache(config, config.kind(layer)).window
        by_window.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in by_window.values()]
    depth = next(
        depth
        for depth in range(max(counts), 0, -1)
        if sum(-(-n // depth) * depth for n in counts) <= (1 + WASTE) * config.num_layers
    )
    windows: list[int | None] = []
    places: dict[int, tuple[int, int]] = {}
    for window in sorted(by_window, key=lambda w: (w is not None, -(w or 0))):
        layers = by_window[window]
        for start in range(0, len(layers), depth):
            for pool, layer in enumerate(layers[start : start + depth]):
                places[layer] = (len(windows), pool)
            windows.append(window)
    return CacheGroups(
        windows=tuple(windows),
        depth=depth,
        places=tuple(places[layer] for layer in range(config.num_layers)),
    )


def first_seen(window: int | None, position: int, page_size: int) -> int:
    """The first block that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def most_held(window: int | None, length: int, ahead: int, page_size: int) -> int:
    """Pages that a group holds at most for `length` tokens, computed up to `ahead` at a time."""
    blocks = -(-length // page_size)
    if window is None:
        return blocks
    return min(blocks, -(-(window - 1 + ahead) // page_size) + 1)
