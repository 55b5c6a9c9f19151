"""Where each leaf of a user's parameters belongs: to one block, to a stack of blocks, or outside.

Blocks are named by a path into the parameters, with dots (or the slashes of Haiku) between names:

    "layer_"            layer_0, layer_1, ...
    "transformer.h"     a list or numbered children: transformer/h/0, ...
    "decoder.layers"    one module whose parameters are stacked for a scan
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A leaf of integers or booleans, or no array: a constant of the model, trained by nobody."""

    names: Names


@dataclass(frozen=True, slots=True)
class Edge:
    """A leaf outside the blocks."""

    names: Names


@dataclass(frozen=True, slots=True)
class InBlock:
    """A leaf of block `number` of a group."""

    group: int
    number: int
    names: Names


@dataclass(frozen=True, slots=True)
class Stack:
    """A leaf of all blocks of a group, stacked."""

    group: int
    names: Names


Place = Fixed | Edge | InBlock | Stack


def places(
    parameters: Any, blocks: Sequence[str], aliases: Mapping[Names, Sequence[Names]] | None = None
) -> list[Place]:
    """The place of each leaf, in the order of `jax.tree.leaves`.

    Args:
        parameters: the user's tree.
        blocks: one path a group of blocks.
        aliases: other paths by which a leaf is reached. One that several blocks hold is theirs
            together, and so outside of all.

    Raises:
        UsageError: if a path finds no blocks, or blocks in several places.
    """
    flat = jax.tree_util.tree_flatten_with_path(parameters)[0]
    own = [names_of(path) for path, _ in flat]
    rows = [(index, names) for index, names in enumerate(own)]
    for index, names in enumerate(own):
        rows += [(index, other) for other in (aliases or {}).get(names, ()) if other != names]
    found: dict[int, set[Place]] = {}
    for group, path in enumerate(blocks):
        for row, place in _group([names for _, names in rows], path, group).items():
            found.setdefault(rows[row][0], set()).add(place)
    result: list[Place] = []
    for index, (_, leaf) in enumerate(flat):
        here = found.get(index, set())
        if not trains(leaf):
            result.append(Fixed(own[index]))
        elif len(here) == 1:
            result.append(here.pop())
        else:
            result.append(Edge(own[index]))
    return result


def is_array(leaf: Any) -> bool:
    """Whether a leaf has shape and dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def trains(leaf: Any) -> bool:
    """Whether a leaf is a parameter."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def names_of(path: tuple[Any, ...]) -> Names:
    """A tree path as plain names; Haiku's joined names taken apart."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return tuple(name for key in keys for name in key.split("/"))


def nested(leaves: dict[Names, Any]) -> dict[str, Any]:
    """Named leaves as nested dicts."""
    tree: dict[str, Any] = {}
    for names, leaf in leaves.items():
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = leaf
    return tree


def leaf_of(tree: Any, names: Names) -> Any:
    """The leaf of nested dicts at a path."""
    for name in names:
        tree = tree[name]
    return tree


def _group(names: Sequence[Names], path: str, group: int) -> dict[int, Place]:
    *prefix, last = re.split(r"[./]", path)
    exact = _below(names, tuple(prefix), last, group)
    if exact:
        return exact
    # Not there: perhaps deeper, in one place alone.
    lead = len(prefix)
    starts = {leaf[:cut] for leaf in names for cut in range(1, len(leaf) - lead)}
    deeper = {}
    for start in sorted(starts):
        if start[len(start) - lead :] == tuple(prefix) and (
            found := _below(names, start, last, group)
        ):
            deeper[start] = found
    if len(deeper) == 1:
        return next(iter(deeper.values()))
    if deeper:
        ways = ", ".join(".".join((*start, last)) for start in deeper)
        raise UsageError(f"blocks={path!r} is found in several places; say which: {ways}")
    here = sorted({leaf[0] for leaf in names})
    raise UsageError(
        f"no parameters named {path}0, {path}1, ..., nor {path}; the model has {', '.join(here)}"
    )


def _below(names: Sequence[Names], prefix: Names, last: str, group: int) -> dict[int, Place]:
    """Leaves of blocks named `last` right under a prefix."""
    lead = len(prefix)
    inside = {
        index: leaf[lead:]
        for index, leaf in enumerate(names)
        if leaf[:lead] == prefix and len(leaf) > lead + 1
    }
    numbered = re.compile(re.escape(last) + r"_?(\d+)")
    matches = {i: m for i, leaf in inside.items() if (m := numbered.fullmatch(leaf[0]))}
    bare = {i: leaf for i, leaf in inside.items() if leaf[0] == last}
    if matches:
        found: dict[int, Place] = {
            i: InBlock(group, int(m[1]), inside[i][1:]) for i, m in matches.items()
        }
        # Haiku numbers from the second on: layer, layer_1, layer_2.
        if bare and all(int(m[1]) > 0 for m in matches.values()):
            found |= {i: InBlock(group, 0, leaf[1:]) for i, leaf in bare.items()}
        return found
    if bare and all(leaf[1].isdigit() and len(leaf) > 2 for leaf in bare.values()):
        return {i: InBlock(group, int(leaf[1]), leaf[2:]) for i, leaf in bare.items()}
    return {i: Stack(group, leaf[1:]) for i, leaf in bare.items()}
