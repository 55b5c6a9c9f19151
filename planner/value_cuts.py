"""Along which axes every value of a program is cut, read from its jaxpr.

Inputs are cut by some mesh axes: a batch along its examples, matrices along features. What follows
from that is followed through the operations, as a partitioner does: a product keeps the cuts of
the axes that it keeps, and one along what it sums over leaves a partial sum on each device, which
is added up at once. So the gradient of weights that a whole batch shares is one sum for each use,
in a loop one in every turn. Where an operation needs whole what is cut, it is gathered.

What is made of constants alone (masks, noise, zeros) is cut as its readers are.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core

from jaxsys.lowering.jaxprs import bytes_of, inlined, is_literal
from jaxsys.planner.feature_axes import through
from jaxsys.planner.jaxpr_costs import rank

Cut = tuple[str | None, ...]
"""For each axis of a value what cuts it."""
LOOPS = ("scan", "while", "cond")
SAME_PLACE = frozenset(
    {"copy", "optimization_barrier", "stop_gradient", "name", "reduce_precision"}
)


@dataclass(slots=True, kw_only=True)
class Cuts:
    """What is known of a program's values, its loops' bodies included."""

    parts: Mapping[str, int]
    """Into how many parts each label cuts."""
    joined: frozenset[str] = frozenset()
    """Labels along which a value is gathered where it meets one of its shape that is whole."""
    of: dict[Any, Cut] = field(default_factory=dict)
    """Variable -> its cut, where there is one."""
    sums: set[Any] = field(default_factory=set)
    """Variables that are partial sums where they are made, and added up at once."""
    gathered: dict[int, dict[Any, float]] = field(default_factory=dict)
    """Identity of an equation -> what it reads whole that is cut, and its bytes."""
    torn: set[str] = field(default_factory=set)
    """Labels along which a value is cut and taken apart: a compiler may move pieces instead."""
    bodies: dict[int, list[core.Jaxpr]] = field(default_factory=dict)
    """Identity of an equation -> the jaxprs that it runs, calls written out."""

    def bytes_of(self, variable: Any) -> float:
        """What a device has of a value."""
        ways = math.prod(self.parts[label] for label in self.of.get(variable, ()) if label)
        return bytes_of(variable) / ways


def cuts_of(
    jaxpr: core.Jaxpr,
    given: Sequence[Cut],
    parts: Mapping[str, int],
    joined: Collection[str] = (),
) -> Cuts:
    """Follows cuts through a program.

    Args:
        jaxpr: with its calls written out.
        given: of its inputs.
        parts: label -> into how many parts it cuts.
        joined: labels along which a value is gathered where it meets one of its shape that is
            whole; along others both are then cut.
    """
    found = Cuts(parts=parts, joined=frozenset(joined))
    _Walk(found).run(jaxpr, given, [False] * len(given))
    return found


def alive(jaxpr: core.Jaxpr) -> list[Any]:
    """The equations on which results depend."""
    needed = {v for v in jaxpr.outvars if not is_literal(v)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(v in needed for v in equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if not is_literal(v))
    return kept[::-1]


class _Walk:
    def __init__(self, found: Cuts) -> None:
        self.found, self.parts = found, found.parts
        self.free: set[Any] = set()

    def cut(self, variable: Any) -> Cut:
        if is_literal(variable):
            return ()
        found = self.found.of.get(variable)
        return (None,) * variable.aval.ndim if found is None else found

    def put(self, variable: Any, cut: Sequence[str | None]) -> None:
        """Notes a cut, but of what its parts do not divide, and of a second axis by one label."""
        kept: list[str | None] = []
        for size, label in zip(variable.aval.shape, cut, strict=True):
            fits = label is not None and label not in kept and size % self.parts[label] == 0
            kept.append(label if fits else None)
        if any(kept):
            self.found.of[variable] = tuple(kept)
        else:
            self.found.of.pop(variable, None)

    def run(
        self, jaxpr: core.Jaxpr, given: Sequence[Cut], free: Sequence[bool]
    ) -> tuple[list[Cut], list[bool]]:
        for variable, cut, alone in zip(jaxpr.invars, given, free, strict=True):
            self.put(variable, cut)
            if alone:
                self.free.add(variable)
        self.free.update(jaxpr.constvars)
        equations = alive(jaxpr)
        for equation in equations:
            if all(is_literal(v) or v in self.free for v in equation.invars):
                self.free.update(equation.outvars)
            self.equation(equation)
        self.push_back(equations)
        return [self.cut(v) for v in jaxpr.outvars], [
            is_literal(v) or v in self.free for v in jaxpr.outvars
        ]

    def push_back(self, equations: Sequence[Any]) -> None:
        """Values of constants alone are cut as what is made of them and others."""
        wanted: dict[Any, Cut] = {}
        for equation in reversed(equations):
            for variable in equation.outvars:
                if variable in self.free and variable in wanted and not any(self.cut(variable)):
                    self.put(variable, wanted[variable])
            out = equation.outvars[0]
            cut = self.cut(out)
            if not any(cut):
                continue
            name = equation.primitive.name
            for variable in equation.invars:
                if is_literal(variable) or variable not in self.free:
                    continue
                if variable.aval.shape == out.aval.shape and name not in LOOPS:
                    wanted.setdefault(variable, cut)
                elif name == "broadcast_in_dim":
                    places = equation.params["broadcast_dimensions"]
                    wanted.setdefault(variable, tuple(cut[a] for a in places))

    def equation(self, equation: Any) -> None:
        name = equation.primitive.name
        rule = getattr(self, f"_{name.replace('-', '_')}", None)
        if name.startswith(("reduce_", "arg")) and "axes" in equation.params:
            rule = self._reduce
        elif name.startswith("scatter"):
            rule = self._scatter
        elif name.startswith("cum"):
            rule = self._along
        (rule or self._alike)(equation)

    def partial(self, variable: Any) -> None:
        self.found.sums.add(variable)

    def whole(self, equation: Any, variable: Any, axis: int) -> None:
        """An operation reads whole along an axis what is cut along it."""
        label = self.cut(variable)[axis]
        if label is not None:
            size = self.found.bytes_of(variable) * self.parts[label]
            self.found.gathered.setdefault(id(equation), {})[variable] = size

    def _alike(self, equation: Any) -> None:
        """Results have the axes of the operands of their shape."""
        for position, out in enumerate(equation.outvars):
            if equation.primitive.name == "optimization_barrier":
                self.put(out, self.cut(equation.invars[position]))
                continue
            shape = out.aval.shape
            cut: list[str | None] = [None] * len(shape)
            alike = [v for v in equation.invars if not is_literal(v) and rank(v) == len(shape)]
            for variable in alike:
                for axis, label in enumerate(self.cut(variable)):
                    kept = variable.aval.shape[axis] == shape[axis]
                    if not (label and kept and cut[axis] is None and label not in cut):
                        continue
                    if label in self.found.joined and any(
                        label not in self.cut(v) and v not in self.free and v.aval.shape == shape
                        for v in alike
                    ):
                        self.whole(equation, variable, axis)
                    else:
                        cut[axis] = label
            self.put(out, cut)

    def _along(self, equation: Any) -> None:
        """What goes along an axis needs it whole."""
        axis = equation.params.get("axis", equation.params.get("dimension"))
        for variable in equation.invars:
            if not is_literal(variable) and axis is not None and variable.aval.ndim:
                self.whole(equation, variable, axis)
        for out, variable in zip(equation.outvars, equation.invars, strict=False):
            cut = list(self.cut(variable)) or [None] * out.aval.ndim
            if axis is not None:
                cut[axis] = None
            self.put(out, cut)

    def _sort(self, equation: Any) -> None:
        self._along(equation)

    def _split(self, equation: Any) -> None:
        self._tear(equation.invars[0], equation.params["axis"])
        self._along_results(equation, equation.params["axis"])

    def _tear(self, variable: Any, axis: int) -> None:
        label = self.cut(variable)[axis]
        if label is not None:
            self.found.torn.add(label)

    def _along_results(self, equation: Any, axis: int) -> None:
        cut = list(self.cut(equation.invars[0]))
        self.whole(equation, equation.invars[0], axis)
        cut[axis] = None
        for out in equation.outvars:
            self.put(out, cut)

    def _top_k(self, equation: Any) -> None:
        cut = self.cut(equation.invars[0])
        for out in equation.outvars:
            self.put(out, (*cut[:-1], None))

    def _reduce(self, equation: Any) -> None:
        axes = equation.params["axes"]
        for out, variable in zip(equation.outvars, equation.invars, strict=False):
            cut = self.cut(variable)
            self.put(out, [label for a, label in enumerate(cut) if a not in axes])
            if any(cut[a] for a in axes if a < len(cut)):
                self.partial(out)

    def _transpose(self, equation: Any) -> None:
        cut = self.cut(equation.invars[0])
        self.put(equation.outvars[0], [cut[a] for a in equation.params["permutation"]])

    def _broadcast_in_dim(self, equation: Any) -> None:
        out, variable = equation.outvars[0], equation.invars[0]
        cut: list[str | None] = [None] * out.aval.ndim
        if not is_literal(variable):
            places = equation.params["broadcast_dimensions"]
            for label, place, size in zip(
                self.cut(variable), places, variable.aval.shape, strict=True
            ):
                if size == out.aval.shape[place]:
                    cut[place] = label
        self.put(out, cut)

    def _reshape(self, equation: Any) -> None:
        out, variable = equation.outvars[0], equation.invars[0]
        cut: list[str | None] = [None] * out.aval.ndim
        if not is_literal(variable):
            for axis, label in enumerate(self.cut(variable)):
                if label is None:
                    continue
                place = through(variable.aval.shape, out.aval.shape, axis, self.parts[label])
                if place is None:
                    self.whole(equation, variable, axis)
                else:
                    cut[place] = label
        self.put(out, cut)

    _squeeze = _expand_dims = _reshape

    def _slice(self, equation: Any) -> None:
        self._alike(equation)
        variable, out = equation.invars[0], equation.outvars[0]
        if is_literal(variable):
            return
        for axis, (old, new) in enumerate(zip(variable.aval.shape, out.aval.shape, strict=True)):
            if old != new:
                self._tear(variable, axis)
                self.whole(equation, variable, axis)

    _dynamic_slice = _slice

    def _concatenate(self, equation: Any) -> None:
        out, axis = equation.outvars[0], equation.params["dimension"]
        cut: list[str | None] = [None] * out.aval.ndim
        for variable in equation.invars:
            for place, label in enumerate(self.cut(variable)):
                if place == axis:
                    self.whole(equation, variable, axis)
                elif label and cut[place] is None and label not in cut:
                    cut[place] = label
        self.put(out, cut)

    def _pad(self, equation: Any) -> None:
        variable, out = equation.invars[0], equation.outvars[0]
        cut = list(self.cut(variable)) or [None] * out.aval.ndim
        for axis, (low, high, inside) in enumerate(equation.params["padding_config"]):
            if (low, high, inside) != (0, 0, 0) and cut[axis]:
                self.whole(equation, variable, axis)
                cut[axis] = None
        self.put(out, cut)

    def _iota(self, equation: Any) -> None:
        self.put(equation.outvars[0], (None,) * equation.outvars[0].aval.ndim)

    def _dot_general(self, equation: Any) -> None:
        contract, batch = equation.params["dimension_numbers"]
        out, sides = equation.outvars[0], [self.cut(v) for v in equation.invars[:2]]
        cut: list[str | None] = []
        for left, right in zip(*batch, strict=True):
            cut.append(sides[0][left] or sides[1][right])
        summed = {
            label
            for axes, side in zip(contract, sides, strict=True)
            for label in (side[a] for a in axes)
            if label and label not in cut
        }
        for which, side in enumerate(sides):
            for axis, label in enumerate(side):
                if axis in contract[which] or axis in batch[which]:
                    continue
                if label and (label in cut or label in summed):
                    self.whole(equation, equation.invars[which], axis)
                    label = None
                cut.append(label)
        self.put(out, cut)
        if summed:
            self.partial(out)

    def _conv_general_dilated(self, equation: Any) -> None:
        numbers = equation.params["dimension_numbers"]
        left, right = (self.cut(v) for v in equation.invars[:2])
        out = equation.outvars[0]
        cut: list[str | None] = [None] * out.aval.ndim
        grouped = equation.params.get("batch_group_count", 1) > 1
        summed = {left[numbers.lhs_spec[1]], right[numbers.rhs_spec[1]]} - {None}
        for label, place in (
            (left[numbers.lhs_spec[0]], numbers.out_spec[0]),
            (right[numbers.rhs_spec[0]], numbers.out_spec[1]),
        ):
            if label and grouped and place == numbers.out_spec[0]:
                summed.add(label)
            elif label and label not in cut and label not in summed:
                cut[place] = label
        for which, spec in ((0, numbers.lhs_spec), (1, numbers.rhs_spec)):
            for axis in spec[2:]:
                self.whole(equation, equation.invars[which], axis)
        self.put(out, cut)
        if summed:
            self.partial(out)

    def _gather(self, equation: Any) -> None:
        numbers, out = equation.params["dimension_numbers"], equation.outvars[0]
        operand, places = equation.invars[:2]
        sizes = equation.params["slice_sizes"]
        index_cut = self.cut(places)[: places.aval.ndim - 1]
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [a for a in range(operand.aval.ndim) if a not in gone]
        cut: list[str | None] = [None] * out.aval.ndim
        for place, label in zip(
            (a for a in range(out.aval.ndim) if a not in numbers.offset_dims),
            index_cut,
            strict=True,
        ):
            cut[place] = label
        mine = self.cut(operand)
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            if mine[axis] and sizes[axis] == operand.aval.shape[axis] and mine[axis] not in cut:
                cut[place] = mine[axis]
            else:
                self.whole(equation, operand, axis)
        self.put(out, cut)

    def _scatter(self, equation: Any) -> None:
        numbers, out = equation.params["dimension_numbers"], equation.outvars[0]
        operand, places, updates = equation.invars[:3]
        beside = tuple(getattr(numbers, "operand_batching_dims", ()))
        index_beside = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
        gone = {*numbers.inserted_window_dims, *beside}
        kept = [a for a in range(operand.aval.ndim) if a not in gone]
        cut, mine = list(self.cut(operand)), self.cut(updates)
        index_cut = self.cut(places)
        used = set()
        for axis, place in zip(beside, index_beside, strict=True):
            if index_cut[place]:
                cut[axis] = index_cut[place]
                used.add(index_cut[place])
        for axis, place in zip(kept, numbers.update_window_dims, strict=True):
            if mine[place] and updates.aval.shape[place] == operand.aval.shape[axis]:
                cut[axis] = mine[place]
        spread = [a for a in range(updates.aval.ndim) if a not in numbers.update_window_dims]
        summed = {mine[a] for a in spread} | set(index_cut[:-1])
        self.put(out, cut)
        if summed - used - {None} - set(cut):
            self.partial(out)

    def inside(self, equation: Any, *names: str) -> list[core.Jaxpr]:
        key = id(equation)
        if key not in self.found.bodies:
            given = [equation.params[name] for name in names]
            flat = [b for one in given for b in (one if isinstance(one, tuple | list) else (one,))]
            self.found.bodies[key] = [
                inlined(b if isinstance(b, core.ClosedJaxpr) else core.ClosedJaxpr(b, ())).jaxpr
                for b in flat
            ]
        return self.found.bodies[key]

    def frees(self, variables: Sequence[Any]) -> list[bool]:
        return [is_literal(v) or v in self.free for v in variables]

    def cuts(self, variables: Sequence[Any]) -> list[Cut]:
        return [self.cut(v) or (None,) * v.aval.ndim for v in variables]

    def _scan(self, equation: Any) -> None:
        (body,) = self.inside(equation, "jaxpr")
        consts, carried = scan_counts(equation, body)
        given, free = self.cuts(equation.invars), self.frees(equation.invars)
        for index in range(consts + carried, len(given)):  # taken apart along the leading axis
            if given[index]:
                self.whole(equation, equation.invars[index], 0)
            given[index] = given[index][1:]
        made: list[Cut] = []
        for _ in range(3):
            made, is_free = self.run(body, given, free)
            for index in range(carried):
                old, new = given[consts + index], made[index]
                given[consts + index] = tuple(
                    a or (b if b not in old else None) for a, b in zip(old, new, strict=True)
                )
                free[consts + index] &= is_free[index]
        for index, out in enumerate(equation.outvars):
            cut = made[index] or (None,) * rank(body.outvars[index])
            self.put(out, given[consts + index] if index < carried else (None, *cut))

    def _while(self, equation: Any) -> None:
        tested, body = self.inside(equation, "cond_jaxpr", "body_jaxpr")
        asked = equation.params["cond_nconsts"]
        given = self.cuts(equation.invars)
        free = self.frees(equation.invars)
        fixed = equation.params["body_nconsts"]
        made, _ = self.run(body, given[asked:], free[asked:])
        state = asked + fixed
        self.run(tested, [*given[:asked], *given[state:]], [*free[:asked], *free[state:]])
        for out, cut in zip(equation.outvars, made, strict=True):
            self.put(out, cut or (None,) * out.aval.ndim)

    def _cond(self, equation: Any) -> None:
        given, free = self.cuts(equation.invars[1:]), self.frees(equation.invars[1:])
        for body in self.inside(equation, "branches"):
            made, _ = self.run(body, given, free)
            for out, cut in zip(equation.outvars, made, strict=True):
                self.put(out, cut or (None,) * out.aval.ndim)


def scan_counts(equation: Any, body: core.Jaxpr) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried.

    Each JAX says it in another way; shapes tell alike: what is taken apart or stacked has one axis
    more outside the body than in it.
    """
    whole = sum(
        rank(mine) == rank(theirs)
        for mine, theirs in zip(body.invars, equation.invars, strict=True)
    )
    carried = sum(
        rank(mine) == rank(theirs)
        for mine, theirs in zip(body.outvars, equation.outvars, strict=True)
    )
    return whole - carried, carried


def jaxpr_of(function: Any, *arguments: Any) -> core.Jaxpr:
    """A function's jaxpr with its calls written out."""
    return inlined(jax.make_jaxpr(function)(*arguments)).jaxpr
