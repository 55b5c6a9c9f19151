"""Finite domains, relations between them, propagation, and the reason when nothing is left.

A relation lists the value tuples it allows. Propagation removes every value that no allowed tuple
supports, until nothing changes (generalised arc consistency); search over what is left settles
whether any assignment exists. If none does, relations are left out one after another for as long as
the rest still conflicts: what remains is a smallest set of culprits.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from jaxsys.errors import UsageError

Domains = dict[str, tuple[Any, ...]]

RULE = "rule: "
"""How the label of a relation begins that the problem itself asks for."""


class Conflict(UsageError):
    """No plan satisfies all constraints; `culprits` names a smallest set that conflicts."""

    def __init__(self, culprits: Sequence[str]) -> None:
        self.culprits = tuple(culprits)
        listed = "; ".join(f"({i}) {label}" for i, label in enumerate(culprits, 1))
        # Rules are what the problem is: what was asked for can be dropped.
        asked = [f"({i})" for i, label in enumerate(culprits, 1) if not label.startswith(RULE)]
        way = f"Drop {' or '.join(asked)}" if asked else "Change what they are of"
        super().__init__(f"no plan is left: these cannot hold together: {listed}. {way}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Which value tuples some variables may take together."""

    label: str
    """In words, for the user; relations of one label count as one."""
    variables: tuple[str, ...]
    allowed: frozenset[tuple[Any, ...]]


def relation(
    label: str,
    variables: Iterable[str],
    domains: Mapping[str, tuple[Any, ...]],
    allows: Callable[..., bool],
) -> Relation:
    """A relation from a predicate over values in the order of `variables`."""
    names = tuple(variables)
    tuples = product(*(domains[name] for name in names))
    return Relation(
        label=label,
        variables=names,
        allowed=frozenset(values for values in tuples if allows(*values)),
    )


def propagate(
    domains: Domains, relations: Sequence[Relation], *, changed: str | None = None
) -> Domains | None:
    """The domains without unsupported values, or None if one runs empty.

    `changed` names the only variable narrowed since the last propagation, if there was one.
    """
    left = dict(domains)
    by_variable: dict[str, list[Relation]] = {}
    for one in relations:
        for name in one.variables:
            by_variable.setdefault(name, []).append(one)
    queue = list(relations if changed is None else by_variable.get(changed, ()))
    waiting = set(map(id, queue))
    while queue:
        one = queue.pop()
        waiting.discard(id(one))
        for name, found in zip(one.variables, _supported(one, left), strict=True):
            if len(found) == len(left[name]):
                continue
            if not found:
                return None
            left[name] = tuple(value for value in left[name] if value in found)
            for other in by_variable[name]:
                if other is not one and id(other) not in waiting:
                    queue.append(other)
                    waiting.add(id(other))
    return left


def _supported(one: Relation, left: Domains) -> list[set[Any]]:
    """For each variable the values that a tuple of what is left of the domains has."""
    values, codes = _columns(one.allowed, len(one.variables))
    keep = np.ones(len(one.allowed), bool)
    for name, mine, column in zip(one.variables, values, codes, strict=True):
        legal = set(left[name])
        if len(legal) < len(mine) or not legal.issuperset(mine):
            keep &= np.array([value in legal for value in mine], bool)[column]
    found = []
    for mine, column in zip(values, codes, strict=True):
        there = np.bincount(column[keep], minlength=len(mine))
        found.append({value for value, count in zip(mine, there, strict=True) if count})
    return found


@functools.lru_cache(maxsize=256)
def _columns(
    allowed: frozenset[tuple[Any, ...]], count: int
) -> tuple[list[list[Any]], list[np.ndarray]]:
    """For each variable of a relation its values, and which of them each tuple has."""
    values: list[list[Any]] = []
    codes: list[np.ndarray] = []
    rows = list(allowed)
    for place in range(count):
        known: dict[Any, int] = {}
        column = [known.setdefault(row[place], len(known)) for row in rows]
        values.append(list(known))
        codes.append(np.array(column, np.int64))
    return values, codes


def solutions(
    domains: Domains, relations: Sequence[Relation], variables: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Every assignment of `variables` that the relations among them allow.

    Relations are joined one after another, those with most variables bound already first; what
    relations to other variables leave of the domains is taken into account by propagation.
    """
    left = propagate(domains, relations)
    if left is None:
        return
    wanted = set(variables)
    rest = [one for one in relations if wanted.issuperset(one.variables)]
    bound: list[str] = []
    rows: list[tuple[Any, ...]] = [()]
    while rest:
        rest.sort(
            key=lambda one: (sum(name not in bound for name in one.variables), len(one.allowed))
        )
        rows, bound = _join(rows, bound, rest.pop(0), left)
    for name in variables:
        if name not in bound:
            rows = [(*row, value) for row in rows for value in left[name]]
            bound = [*bound, name]
    places = [bound.index(name) for name in variables]
    for row in sorted(
        rows,
        key=lambda row: [left[n].index(row[p]) for n, p in zip(variables, places, strict=True)],
    ):
        yield {name: row[place] for name, place in zip(variables, places, strict=True)}


def _join(
    rows: list[tuple[Any, ...]], bound: list[str], one: Relation, domains: Domains
) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Rows over `bound` extended by all that a relation allows beside them."""
    shared = [i for i, name in enumerate(one.variables) if name in bound]
    new = [i for i, name in enumerate(one.variables) if name not in bound]
    legal = [set(domains[name]) for name in one.variables]
    index: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for values in one.allowed:
        if all(value in allowed for value, allowed in zip(values, legal, strict=True)):
            key = tuple(values[i] for i in shared)
            index.setdefault(key, []).append(tuple(values[i] for i in new))
    places = [bound.index(one.variables[i]) for i in shared]
    joined = [
        (*row, *values) for row in rows for values in index.get(tuple(row[p] for p in places), ())
    ]
    return joined, [*bound, *(one.variables[i] for i in new)]


def satisfiable(domains: Domains, relations: Sequence[Relation]) -> bool:
    """Whether any assignment of all variables satisfies all relations."""
    left = propagate(domains, relations)
    if left is None:
        return False
    left, relations = without_copies(left, relations)
    return _satisfiable(left, relations)


def without_copies(
    domains: Domains, relations: Sequence[Relation]
) -> tuple[Domains, Sequence[Relation]]:
    """What is left where of indexed variables that are all alike one index stands for all.

    `weights[3]` and its like are as `weights[0]` if they have its domains and, of relations to
    what has no index, its relations: what satisfies the one satisfies the others. Indices that a
    relation ties together all stay.
    """
    shapes: dict[int, set[Any]] = {}
    names: dict[int, list[str]] = {}
    for name in domains:
        base, index = _indexed(name)
        if index is not None:
            names.setdefault(index, []).append(name)
            shapes.setdefault(index, set()).add((base, domains[name]))
    for one in relations:
        places = [_indexed(name) for name in one.variables]
        mine = {index for _, index in places if index is not None}
        if len(mine) > 1:
            return domains, relations
        for index in mine:
            bases = tuple((base, at is None) for base, at in places)
            shapes[index].add((bases, one.allowed))
    kept: dict[frozenset[Any], int] = {}
    for index, shape in shapes.items():
        kept.setdefault(frozenset(shape), index)
    gone = {name for index in names.keys() - {*kept.values()} for name in names[index]}
    return (
        {name: values for name, values in domains.items() if name not in gone},
        [one for one in relations if gone.isdisjoint(one.variables)],
    )


def _indexed(name: str) -> tuple[str, int | None]:
    """`weights[3]` -> weights, 3."""
    base, bracket, rest = name.partition("[")
    return base, int(rest[:-1]) if bracket else None


def _satisfiable(left: Domains, relations: Sequence[Relation]) -> bool:
    name = next((name for name in left if len(left[name]) > 1), None)
    if name is None:
        return True
    for value in left[name]:
        narrowed = propagate({**left, name: (value,)}, relations, changed=name)
        if narrowed is not None and _satisfiable(narrowed, relations):
            return True
    return False


def culprits(domains: Domains, relations: Sequence[Relation]) -> list[str]:
    """Labels of a smallest set of relations that cannot hold together.

    Smallest in the sense that dropping any one of them resolves the conflict.
    """
    labels = list(dict.fromkeys(one.label for one in relations))
    needed = labels[:]
    # Built-in rules come first in the list and are dropped first, so that what the user wrote and
    # the few rules it runs into are what remains.
    for label in labels:
        rest = [name for name in needed if name != label]
        if not satisfiable(domains, [one for one in relations if one.label in rest]):
            needed = rest
    return needed
