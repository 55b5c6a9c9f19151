#!/usr/bin/env python
"""Draws how a sequence lies over devices, and which computes what when: docs/long-context.png.

Read off `jaxsys.context.ContextSplit` itself: who holds which tokens, and in which visit of a ring
a block of scores is computed.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from jaxsys.context import ContextSplit
from jaxsys.context.split import order_of

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


def owners(split: ContextSplit) -> np.ndarray:
    """The device of each of the 2 P pieces."""
    pieces = 2 * split.parts
    order = np.array(order_of(split, pieces)).reshape(split.parts, 2)
    found = np.zeros(pieces, int)
    for device, mine in enumerate(order):
        found[mine] = device
    return found


def draw_pieces(axes: Any, split: ContextSplit, title: str) -> None:
    """A sequence's pieces in their colours."""
    for piece, device in enumerate(owners(split)):
        axes.barh(0, 1, left=piece, color=COLOURS[device], edgecolor="white")
        axes.text(piece + 0.5, 0, str(device), ha="center", va="center", color="white")
    axes.set(title=title, xlim=(0, 2 * split.parts), yticks=[], xticks=range(2 * split.parts + 1))
    axes.spines[:].set_visible(False)


def draw_visits(axes: Any, split: ContextSplit) -> None:
    """The causal square in blocks of pieces: colour the device, number the visit."""
    pieces, of = 2 * split.parts, owners(split)
    for query in range(pieces):
        for key in range(query + 1):
            device, source = of[query], of[key]
            visit = (device - source) % split.parts
            square = Rectangle(
                (key, query), 1, 1, facecolor=COLOURS[device], edgecolor="white", alpha=0.85
            )
            axes.add_patch(square)
            axes.text(key + 0.5, query + 0.5, str(visit), ha="center", va="center", color="white")
    axes.set(
        title="Whose queries (colour), in which visit (number)",
        xlabel="piece of keys",
        ylabel="piece of queries",
        xlim=(0, pieces),
        ylim=(pieces, 0),
        aspect="equal",
    )


def draw_work(axes: Any, split: ContextSplit) -> None:
    """Blocks that each device computes in each visit; a block on the diagonal is half of one."""
    of = owners(split)
    work = np.zeros((split.parts, split.parts))
    for query in range(2 * split.parts):
        for key in range(query + 1):
            visit = (of[query] - of[key]) % split.parts
            work[of[query], visit] += 0.5 if key == query else 1.0
    for device, row in enumerate(work):
        left = 0.0
        for visit, blocks in enumerate(row):
            axes.barh(device, blocks, left=left, color=COLOURS[device], edgecolor="white")
            axes.text(
                left + blocks / 2, device, str(visit), ha="center", va="center", color="white"
            )
            left += blocks
    axes.set(
        title="Work of each device by visit",
        xlabel="blocks of scores",
        ylabel="device",
        yticks=range(split.parts),
    )
    axes.invert_yaxis()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/plot_context.py", description=__doc__)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/long-context.png"))
    options = parser.parse_args()
    ring = ContextSplit(parts=options.devices, by="ring")
    rows = [("A ring, or a gather: an early and a late piece each", ring)]
    rows += [("All exchange heads (ulysses)", ContextSplit(parts=options.devices, by="ulysses"))]
    if options.devices == 4:
        mixed = ContextSplit(parts=4, by="mixed", exchange=2)
        rows += [("Pairs exchange heads, in a ring of pairs (mixed)", mixed)]
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, 2, height_ratios=[*[1] * len(rows), 7])
    for number, (title, split) in enumerate(rows):
        draw_pieces(figure.add_subplot(grid[number, :]), split, title)
    draw_visits(figure.add_subplot(grid[-1, 0]), ring)
    draw_work(figure.add_subplot(grid[-1, 1]), ring)
    figure.savefig(options.out, dpi=110)
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
