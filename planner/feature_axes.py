"""Along which axis split features cut each matrix of a model, read from its jaxpr.

A product of whole activations and a matrix is cut along what it makes (by columns); one of
activations that are cut already along what it sums over (by rows), and its result, a partial sum on
each device, is added up once. So `up` is cut along its outputs and `down` along its inputs;
queries, keys and values by heads, and the matrix behind attention by the same heads. That is one
sum forward a pair, and backward one for each product by columns, of the cotangent of what it read.
It is the order of Megatron-LM (Shoeybi et al., 2019), found by following the cut through the
operations between the products.

What cannot be followed is taken to be joined again there, so that what is counted is an upper
bound of what must be sent.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend import core

from jaxsys.planner.jaxpr_costs import opened, rank, variable_bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a value in the walk."""

    cut: int | None = None
    """The axis along which each device has a part."""
    leaf: int | None = None
    """The parameter it is, cast or reshaped at most."""
    axes: tuple[int | None, ...] = ()
    """For each of its axes the parameter's own, where it is one."""
    free: bool = False
    """Made of constants and broadcasts, which a device may cut for itself."""


@dataclass(slots=True, kw_only=True)
class FeatureSplit:
    """How features are split, and what that sends."""

    axes: dict[int, int] = field(default_factory=dict)
    """Parameter -> the axis it is cut along, counted in its whole shape."""
    forward_bytes: float = 0.0
    """Added up over the devices in the forward pass, all layers together."""
    forward_joins: float = 0.0
    """In how many sums."""
    backward_bytes: float = 0.0
    backward_joins: float = 0.0
    cut_bytes: float = 0.0
    """Of what the walked function returns, the bytes of which a device has a part."""


def feature_split(
    closed: core.ClosedJaxpr,
    leaves: Collection[int],
    ways: int,
    *,
    parameters: int,
    axes: Mapping[int, int] | None = None,
) -> FeatureSplit:
    """Follows one cut of the features through a function.

    Args:
        closed: the function; its first inputs are the parameters, flattened.
        leaves: which of them may be cut, matrices of layers.
        ways: into how many parts.
        parameters: how many of the inputs are parameters.
        axes: cuts that are settled already.
    """
    found = FeatureSplit(axes=dict(axes or {}))
    walk = _Walk(set(leaves), ways, found)
    jaxpr = closed.jaxpr
    given = [
        Seen(leaf=index, axes=tuple(range(variable.aval.ndim)), free=True)
        if index in walk.leaves
        else Seen(free=index < parameters)
        for index, variable in enumerate(jaxpr.invars)
    ]
    results = walk.run(jaxpr, given, 1.0)
    found.cut_bytes = sum(
        variable_bytes(variable)
        for variable, seen in zip(jaxpr.outvars, results, strict=True)
        if seen.cut is not None
    )
    return found


class _Walk:
    def __init__(self, leaves: set[int], ways: int, found: FeatureSplit) -> None:
        self.leaves, self.ways, self.found = leaves, ways, found

    def run(self, jaxpr: core.Jaxpr, given: Sequence[Seen], times: float) -> list[Seen]:
        known: dict[Any, Seen] = {v: Seen(free=True) for v in jaxpr.constvars}
        known.update(zip(jaxpr.invars, given, strict=True))

        def look(variable: Any) -> Seen:
            if isinstance(variable, core.Var):
                return known.get(variable, Seen())
            return Seen(free=True)

        for equation in jaxpr.eqns:
            seen = [look(v) for v in equation.invars]
            results = self.equation(equation, seen, times)
            known.update(zip(equation.outvars, results, strict=True))
        return [look(v) for v in jaxpr.outvars]

    def equation(self, equation: Any, seen: list[Seen], times: float) -> list[Seen]:
        name = equation.primitive.name
        if name == "dot_general":
            return [self.product(equation, seen, times)]
        if name == "scan":
            return self.scan(equation, seen, times)
        if name == "cond":
            branches = [opened(b) for b in equation.params["branches"]]
            return [self.run(branch, seen[1:], times) for branch in branches][-1]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None and name not in ("while", "pallas_call"):
            body = opened(inner)
            return self.run(body, seen[len(seen) - len(body.invars) :], times)
        moved = self.moved(equation, seen)
        if moved is not None:
            return [moved]
        return self.alike(equation, seen, times)

    def product(self, equation: Any, seen: list[Seen], times: float) -> Seen:
        contract, batch = equation.params["dimension_numbers"]
        sides = [v.aval.ndim for v in equation.invars]
        free = [
            [a for a in range(sides[i]) if a not in contract[i] and a not in batch[i]]
            for i in range(2)
        ]
        out_axes: dict[tuple[int, int], int] = {}
        for position, (left, right) in enumerate(zip(*batch, strict=True)):
            out_axes[0, left] = out_axes[1, right] = position
        place = len(batch[0])
        for side in range(2):
            for axis in free[side]:
                out_axes[side, axis] = place
                place += 1
        weight = next((i for i in (1, 0) if seen[i].leaf is not None), None)
        if weight is None:
            return self.between(equation, seen, contract, out_axes, times)
        other = 1 - weight
        x, w = seen[other], seen[weight]
        pairs = {
            **dict(zip(contract[other], contract[weight], strict=True)),
            **dict(zip(batch[other], batch[weight], strict=True)),
        }
        if x.cut is not None and x.cut in pairs:
            axis = self.settle(w, [pairs[x.cut]], equation.invars[weight].aval.shape)
            if axis == pairs[x.cut] and axis in contract[weight]:
                self.join(equation.outvars[0], times)
                return Seen()
            if axis == pairs[x.cut]:
                return Seen(cut=out_axes[weight, pairs[x.cut]])
        if x.cut is not None:  # parts of rows, or a matrix that is settled otherwise: joined first
            self.join(equation.invars[other], times)
        shape = equation.invars[weight].aval.shape
        axis = self.settle(w, [*free[weight], *contract[weight]], shape)
        if axis is None:
            return Seen()
        if axis in contract[weight]:
            self.join(equation.outvars[0], times)
            return Seen()
        self.found.backward_bytes += times * variable_bytes(equation.invars[other])
        self.found.backward_joins += times
        return Seen(cut=out_axes[weight, axis])

    def settle(self, weight: Seen, wanted: list[int], shape: Sequence[int]) -> int | None:
        """The axis of a matrix that is cut: as settled before, else the first that divides."""
        leaf = weight.leaf
        assert leaf is not None
        if leaf in self.found.axes:
            mine = self.found.axes[leaf]
            return weight.axes.index(mine) if mine in weight.axes else None
        for axis in wanted:
            mine = weight.axes[axis]
            if mine is not None and shape[axis] % self.ways == 0:
                self.found.axes[leaf] = mine
                return axis
        return None

    def between(
        self,
        equation: Any,
        seen: list[Seen],
        contract: Any,
        out_axes: dict[tuple[int, int], int],
        times: float,
    ) -> Seen:
        """A product of activations, such as attention's."""
        for side, one in enumerate(seen):
            if one.cut is not None and one.cut in contract[side]:
                self.join(equation.outvars[0], times)
                return Seen()
        for side, one in enumerate(seen):
            if one.cut is not None:
                return Seen(cut=out_axes[side, one.cut])
        return Seen(free=all(one.free for one in seen))

    def scan(self, equation: Any, seen: list[Seen], times: float) -> list[Seen]:
        body = opened(equation.params["jaxpr"])
        given = []
        for mine, theirs, one in zip(body.invars, equation.invars, seen, strict=True):
            if rank(mine) == rank(theirs):
                given.append(one)
            else:  # taken apart along its leading axis
                cut = None if one.cut in (None, 0) else one.cut - 1
                given.append(Seen(cut=cut, leaf=one.leaf, axes=one.axes[1:], free=one.free))
        results = self.run(body, given, times * equation.params["length"])
        found = []
        for mine, theirs, one in zip(body.outvars, equation.outvars, results, strict=True):
            stacked = rank(mine) != rank(theirs)
            if one.cut is None:
                found.append(Seen())
            elif stacked:
                found.append(Seen(cut=one.cut + 1))
            else:  # handed on whole, as it came
                self.join(theirs, times * equation.params["length"])
                found.append(Seen())
        return found

    def moved(self, equation: Any, seen: list[Seen]) -> Seen | None:
        """What operations that only place axes anew make of one operand."""
        name, params = equation.primitive.name, equation.params
        if name not in ("reshape", "squeeze", "transpose", "broadcast_in_dim", "expand_dims"):
            return None
        old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        one = seen[0]
        if name == "transpose":
            to = {a: i for i, a in enumerate(params["permutation"])}
        elif name == "broadcast_in_dim":
            to = dict(enumerate(params["broadcast_dimensions"]))
        else:
            to = {a: through(old, new, a, self.ways) for a in range(len(old))}
        axes: list[int | None] = [None] * len(new)
        for mine, place in to.items():
            if place is not None and one.leaf is not None:
                axes[place] = one.axes[mine]
        cut = None if one.cut is None else to.get(one.cut)
        free = one.free or (name == "broadcast_in_dim" and math.prod(old) < math.prod(new))
        return Seen(cut=cut, leaf=one.leaf, axes=tuple(axes), free=free and cut is None)

    def alike(self, equation: Any, seen: list[Seen], times: float) -> list[Seen]:
        """Operations whose results have the axes of their operands, or fewer."""
        name, found = equation.primitive.name, []
        cut = [i for i, one in enumerate(seen) if one.cut is not None]
        for out in equation.outvars:
            if not cut:
                leaf = seen[0] if name == "convert_element_type" else Seen()
                free = bool(seen) and all(one.free for one in seen)
                found.append(Seen(leaf=leaf.leaf, axes=leaf.axes, free=free or not seen))
                continue
            operand = equation.invars[cut[0]]
            axis = seen[cut[0]].cut
            assert axis is not None
            reduced = equation.params.get("axes") if name.startswith(("reduce_", "arg")) else None
            if reduced is not None:
                if axis in reduced:
                    self.join(out, times)
                    found.append(Seen())
                else:
                    found.append(Seen(cut=axis - sum(a < axis for a in reduced)))
                continue
            shape = operand.aval.shape
            kept = len(out.aval.shape) == len(shape) and out.aval.shape[axis] == shape[axis]
            whole = [
                one
                for v, one in zip(equation.invars, seen, strict=True)
                if one.cut is None and not one.free and v.aval.shape == shape
            ]
            along = equation.params.get("axis", equation.params.get("dimension"))
            if not kept or along == axis or whole and out.aval.shape == shape:
                self.join(operand, times)
                found.append(Seen())
            else:
                found.append(Seen(cut=axis))
        return found

    def join(self, variable: Any, times: float) -> None:
        self.found.forward_bytes += times * variable_bytes(variable)
        self.found.forward_joins += times


def through(old: Sequence[int], new: Sequence[int], axis: int, ways: int) -> int | None:
    """Where an axis that is cut stands after a reshape; None if its parts are torn apart."""
    before = np.cumprod([1, *old])[axis]
    for place, start in enumerate(np.cumprod([1, *new])[:-1]):
        size = new[place]
        if start == before and size > 1 and size % ways == 0:
            return place if old[axis] % size == 0 or size % old[axis] == 0 else None
    return None
