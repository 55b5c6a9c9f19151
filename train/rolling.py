"""What of a traced function belongs to which layer of which leaf, and which layers are alike.

See `rolled` for what it is for. Nothing is computed here: the analysis is of the jaxpr alone.
"""

import graphlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxsys.lowering.jaxprs import is_literal
from jaxsys.train.alike import canonical, kind
from jaxsys.train.state import Names

MOST_CLASSES = 4
"""Of unlike layers of one stack: each class is computed for all rows, and its own are kept."""

SMALL = 4
"""Elements of what may be spread over a whole leaf in place: a scalar, or a random key's words."""

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
    convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
    integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real rem
    round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)
"""Primitives that treat every element by itself, wherever it lies."""


class Source(NamedTuple):
    """Where a leaf of the traced function is found, or goes to."""

    key: Names
    """Of the array at rest."""
    leaf: Names | None = None
    """The stacked parameter it follows; its rows are that one's. None: a plain array."""
    layer: int | None = None
    """Which layer of the stack; None: all of it, in layer order."""


class Owner(NamedTuple):
    leaf: Names
    layer: int | None


_SHARED, _SPREAD = "shared", "spread"


@dataclass(slots=True)
class Body:
    """What one owner computes, in names of its own, so that layers can be compared."""

    signature: Hashable
    equations: list[Any]
    wiring: list[list[tuple[Any, ...]]]
    """An entry for each input of each equation, see `Analysis._body`."""
    constants: list[Any]
    """Values of literals, by number."""
    shared: list[Any]
    """Variables read from outside, by number."""
    outputs: dict[Names, tuple[Any, ...]]
    """Key -> the entry that is written there."""
    exports: dict[Any, tuple[Any, ...]]
    """Variable that others read -> its entry."""


@dataclass(slots=True)
class Class:
    """Layers of one stack whose bodies are alike."""

    owners: list[Owner] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)


class Analysis:
    def __init__(
        self,
        jaxpr: Any,
        inputs: Sequence[Source],
        outputs: Sequence[Source],
        rows: Mapping[Names, tuple[np.ndarray, int]],
        rolled: set[Names],
    ) -> None:
        self.jaxpr, self.inputs, self.outputs, self.rows = jaxpr, inputs, outputs, rows
        self.rolled = rolled
        self.unrollable: set[Names] = set()
        self.source = dict(zip(jaxpr.invars, inputs, strict=True))
        self.owner: dict[Any, Any] = {}
        self.maker: dict[Any, tuple[int, int]] = {}
        self._assign()
        self.exports: dict[Owner, dict[Any, None]] = defaultdict(dict)
        self.needed: set[tuple[Any, int]] = set()
        self.mine: dict[Owner, dict[Names, Any]] = defaultdict(dict)
        self.apart: list[tuple[Source, Any]] = []
        self._demand()
        self.classes: dict[Names, list[Class]] = {}
        self.order: list[Any] = []
        if not self.unrollable:
            self._classify()
        if not self.unrollable:
            self._sort()

    def _assign(self) -> None:
        for variable, source in self.source.items():
            leaf = source.leaf if source.leaf in self.rolled else None
            self.owner[variable] = _SHARED if leaf is None else Owner(leaf, source.layer)
        for variable in self.jaxpr.constvars:
            self.owner[variable] = _SHARED
        for index, equation in enumerate(self.jaxpr.eqns):
            read = [v for v in equation.invars if not is_literal(v)]
            owners = {self.owner[v] for v in read}
            owned = {o for o in owners if isinstance(o, Owner)}
            if equation.effects or len(owned) > 1:
                owner: Any = _SHARED
            elif owned:
                owner = owned.pop()
            elif _SPREAD in owners or self._spreads(equation, read):
                owner = _SPREAD
            else:
                owner = _SHARED
            for place, variable in enumerate(equation.outvars):
                self.owner[variable] = owner
                self.maker[variable] = index, place

    @staticmethod
    def _spreads(equation: Any, read: list[Any]) -> bool:
        return all(v.aval.size <= SMALL for v in read) and any(
            v.aval.size > SMALL or (not read and v.aval.shape) for v in equation.outvars
        )

    def _demand(self) -> None:
        for variable, source in zip(self.jaxpr.outvars, self.outputs, strict=True):
            place = Owner(source.leaf, source.layer) if source.leaf in self.rolled else None
            owner = _SPREAD if is_literal(variable) else self.owner[variable]
            if place is not None and owner in (place, _SPREAD):
                self.mine[place][source.key] = variable
                self._require(variable, place)
            else:
                self.apart.append((source, variable))
                self._require(variable, None)
        for index, equation in enumerate(self.jaxpr.eqns):
            if equation.effects:
                self._require_equation(index, None)

    def _require(self, variable: Any, context: Owner | None) -> None:
        waiting = [(variable, context)]
        while waiting:
            variable, context = waiting.pop()
            if is_literal(variable):
                continue
            owner = self.owner[variable]
            if isinstance(owner, Owner):
                if context != owner:
                    self.exports[owner][variable] = None
                context = owner
            elif owner is _SHARED:
                context = None
            made = self.maker.get(variable)
            if made is None or (context, made[0]) in self.needed:
                continue
            self.needed.add((context, made[0]))
            waiting += [(v, context) for v in self.jaxpr.eqns[made[0]].invars]

    def _require_equation(self, index: int, context: Owner | None) -> None:
        self.needed.add((context, index))
        for variable in self.jaxpr.eqns[index].invars:
            self._require(variable, context)

    def _classify(self) -> None:
        by_owner: dict[Owner, list[int]] = defaultdict(list)
        for context, index in self.needed:
            if context is not None:
                by_owner[context].append(index)
        owners = dict.fromkeys([*by_owner, *self.mine, *self.exports])
        found: dict[Names, dict[Hashable, Class]] = defaultdict(dict)
        for owner in sorted(owners, key=lambda o: (o.leaf, -1 if o.layer is None else o.layer)):
            body = self._body(owner, sorted(by_owner[owner]))
            if owner.layer is None and not self._in_place(owner, body):
                self.unrollable.add(owner.leaf)
            alike = found[owner.leaf].setdefault(body.signature, Class())
            alike.owners.append(owner)
            alike.bodies.append(body)
        for leaf, classes in found.items():
            self.classes[leaf] = list(classes.values())
            padded = self.rows[leaf][1] > sum(len(c.owners) for c in self.classes[leaf])
            loops = any(
                equation.primitive.name == "while"
                for c in self.classes[leaf]
                for equation in c.bodies[0].equations
            )
            # A loop until something holds might not end on rows that hold nothing.
            if len(self.classes[leaf]) > MOST_CLASSES or (
                loops and (padded or len(self.classes[leaf]) > 1)
            ):
                self.unrollable.add(leaf)

    def _body(self, owner: Owner, indices: list[int]) -> Body:
        equations = [self.jaxpr.eqns[i] for i in indices]
        local: dict[Any, tuple[int, int]] = {}
        constants: list[Any] = []
        shared: dict[Any, int] = {}
        signature: list[Hashable] = []

        def entry(variable: Any) -> tuple[Any, ...]:
            if is_literal(variable):
                constants.append(variable.val)
                return ("constant", len(constants) - 1)
            if variable in local:
                return ("local", *local[variable])
            if self.owner[variable] == owner:
                return ("input", self.source[variable].key)
            return ("shared", shared.setdefault(variable, len(shared)))

        wiring = []
        for number, equation in enumerate(equations):
            wiring.append([entry(v) for v in equation.invars])
            local.update({v: (number, place) for place, v in enumerate(equation.outvars)})
            signature.append(
                (
                    equation.primitive.name,
                    canonical(equation.params),
                    tuple(wiring[-1]),
                    tuple(kind(v) for v in (*equation.invars, *equation.outvars)),
                )
            )
        outputs = {key: entry(v) for key, v in self.mine[owner].items()}
        # In the order in which they were made, which is the same for like layers.
        order = sorted(self.exports[owner], key=lambda v: self.maker.get(v, (-1, 0)))
        exports = {v: entry(v) for v in order}
        kinds = [kind(v) for v in self.mine[owner].values()]
        return Body(
            signature=(
                tuple(signature),
                tuple(sorted(outputs.items())),
                tuple(kinds),
                tuple(exports.values()),
                tuple(kind(v) for v in shared),
            ),
            equations=equations,
            wiring=wiring,
            constants=constants,
            shared=list(shared),
            outputs=outputs,
            exports=exports,
        )

    def _in_place(self, owner: Owner, body: Body) -> bool:
        """Whether a whole stack's equations do the same in whatever order its rows lie."""
        order, count = self.rows[owner.leaf]
        if np.array_equal(order, np.arange(count)):
            return True
        if len(order) != count or body.exports:
            return False
        shape = self._stack_shape(owner)
        for equation in body.equations:
            spread = equation.primitive.name == "broadcast_in_dim" and all(
                not v.aval.shape for v in equation.invars
            )
            if not spread and equation.primitive.name not in ELEMENTWISE:
                return False
            variables = (*equation.invars, *equation.outvars)
            if any(v.aval.shape not in ((), shape) for v in variables):
                return False
        return all(v.aval.shape == shape for v in self.mine[owner].values())

    def _stack_shape(self, owner: Owner) -> tuple[int, ...]:
        shapes = {v.aval.shape for v, s in self.source.items() if (s.leaf, s.layer) == owner}
        return shapes.pop() if len(shapes) == 1 else (-1,)

    def _sort(self) -> None:
        """An order in which every node finds what it reads; nodes are equations run once."""
        home: dict[Owner, tuple[Names, int, Body]] = {}
        for leaf, classes in self.classes.items():
            for number, alike in enumerate(classes):
                for owner, body in zip(alike.owners, alike.bodies, strict=True):
                    home[owner] = (leaf, number, body)
        self.home = home

        def node_of(variable: Any) -> Any:
            if is_literal(variable):
                return None
            owner = self.owner[variable]
            if isinstance(owner, Owner):
                leaf, number, body = home[owner]
                what, *where = body.exports[variable]
                return (leaf, number, where[0]) if what == "local" else None
            made = self.maker.get(variable)
            return None if made is None else (None, 0, made[0])

        graph: dict[Any, set[Any]] = {}
        for context, index in self.needed:
            if context is None:
                reads = self.jaxpr.eqns[index].invars
                graph[None, 0, index] = {node_of(v) for v in reads} - {None}
        for leaf, classes in self.classes.items():
            for number, alike in enumerate(classes):
                for place, wires in enumerate(alike.bodies[0].wiring):
                    needs: set[Any] = set()
                    for what, *where in wires:
                        if what == "local":
                            needs.add((leaf, number, where[0]))
                        elif what == "shared":
                            needs |= {node_of(body.shared[where[0]]) for body in alike.bodies}
                    graph[leaf, number, place] = needs - {None}
        try:
            self.order = list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            # One layer waits for another: they cannot be run at once.
            self.unrollable |= {node[0] for node in error.args[1] if node[0] is not None}
