"""Along which axis values hold their samples, each sample's part made of that sample alone.

A loss that is a mean can be taken apart only if no sample enters another one's part. Followed from
the microbatch's leaves, whose first axis is the samples', through every operation, scans and calls
included, whatever `vmap` or a transpose did to the axis; see `axes` for what becomes of it.

Legend: B samples in the microbatch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsys.train.adapt.axes import (
    Along,
    Mixed,
    Placed,
    Same,
    State,
    Summed,
    Unknown,
    everything_uneven,
    of_constant,
)
from jaxsys.train.adapt.fingerprint import opened, scan_counts
from jaxsys.train.adapt.picks import (
    SCATTERS,
    at_places,
    counted,
    gathered,
    gathered_uneven,
    placed,
    scattered,
)
from jaxsys.train.adapt.values import Operation

EACH = frozenset(
    ("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh")
    + (
        "bitcast_convert_type",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
    )
    + (
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
    )
    + ("gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt")
    + ("max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or", "population_count")
    + ("pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n")
    + ("shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh")
    + ("sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "sharding_constraint")
    + ("bessel_i0e", "bessel_i1e", "clz", "complex", "conj", "igamma", "igammac", "polygamma")
    + ("igamma_grad_a", "random_gamma_grad", "regularized_incomplete_beta", "zeta")
)
"""Element by element."""

_REDUCE = frozenset(
    ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod")
    + ("reduce_sum", "reduce_xor")
)
_RUNNING = frozenset(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"))
_WINDOW = frozenset(
    ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")
)
_ALGEBRA = frozenset(
    ("cholesky", "eigh", "householder_product", "lu", "qr", "svd", "triangular_solve")
)
"""Of the matrices in the last two axes."""
RANDOM = frozenset(
    ("random_bits", "random_clone", "random_fold_in", "random_gamma", "random_seed")
    + ("random_split", "random_unwrap", "random_wrap", "threefry2x32")
)
_CALLS = frozenset(
    ("checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit")
    + ("custom_vjp_call_jaxpr", "remat", "remat2")
)
_STAY_ZERO = frozenset(
    ("broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze")
    + ("stop_gradient", "transpose")
)
_OF_SUMS = frozenset(
    ("add", "add_any", "concatenate", "convert_element_type", "copy", "copy_p", "expand_dims")
    + ("name", "neg", "reduce_sum", "reshape", "slice", "squeeze", "stack", "sub", "transpose")
)
"""What of sums makes sums."""
_MOST_ROUNDS = 8


class Followed:
    """Follows operations for one number of samples."""

    def __init__(self, samples: int, *, scales: bool = True) -> None:
        """Args: B, and whether a sum times what no sample enters is seen as a sum."""
        self.samples, self.scales = samples, scales
        self.groups: set[int] = set()
        """Sizes of the groups that samples are put into."""
        self.known: dict[Any, Any] = {}
        """What values are that depend on nothing."""

    def operation(
        self, operation: Operation, states: Sequence[State], shapes: Any, outputs: Any
    ) -> list[State]:
        """States of an operation's results; arguments as of `results`."""
        name = operation.primitive.name
        return self.results(name, operation.parameters, states, shapes, outputs)

    def results(
        self, name: str, parameters: Any, states: Sequence[State], shapes: Any, outputs: Any
    ) -> list[State]:
        """States of the results of a primitive.

        Args:
            name: of its primitive.
            parameters: its own.
            states: of what it reads.
            shapes: of what it reads.
            outputs: shapes of its results.
        """
        if name in _CALLS and (inner := _inner(parameters)) is not None:
            return self.jaxpr(*opened(inner), states)
        if name == "optimization_barrier":
            return list(states)
        if name == "scan":
            return self._scan(parameters, states, shapes, outputs)
        if name == "while":
            return self._while(parameters, states)
        if name == "cond":
            return self._cond(parameters, states, outputs)
        if all(isinstance(state, Same) for state in states):
            same: Any = list(states)
            if self._sums_draws(name, same[:1], shapes, outputs):
                return [Summed()]
            return [_same(name, parameters, same, shapes, shape) for shape in outputs]
        for kind in (Mixed, Unknown):
            if any(isinstance(state, kind) for state in states):
                return [kind() for _ in outputs]
        if any(isinstance(state, Placed) for state in states):
            return [at_places(name, parameters, states, shapes) for _ in outputs]
        if any(isinstance(state, Summed) for state in states):
            stays = name in _OF_SUMS and all(
                isinstance(state, Summed) or (isinstance(state, Same) and state.zero)
                for state in states
            )
            if name == "convert_element_type":
                stays = stays and np.issubdtype(parameters["new_dtype"], np.inexact)
            if self.scales and name in ("mul", "div", "dot_general"):
                stays = _is_scaled_sum(name, states)
            return [Summed() if stays else Mixed() for _ in outputs]
        found = self._in_copies(name, parameters, list(states), shapes, outputs[0])
        return [found for _ in outputs]

    def _sums_draws(self, name: str, states: Sequence[Same], shapes: Any, outputs: Any) -> bool:
        """Whether all that was drawn for all samples is added up (a mask that is drawn).

        That the axis is as long as there are samples by more than chance is told by another number
        of samples, see `mean`.
        """
        drawn = name == "reduce_sum" and states[0].drawn and not outputs[0]
        return drawn and shapes[0][:1] == (self.samples,)

    def jaxpr(self, jaxpr: Any, consts: Any, states: Sequence[State]) -> list[State]:
        """States of a jaxpr's outputs."""
        known: dict[Any, State] = dict(zip(jaxpr.invars, states, strict=True))
        known.update(
            (variable, of_constant(const))
            for variable, const in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(atom: Any) -> State:
            return of_constant(atom.val) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            found = self.results(
                equation.primitive.name,
                equation.params,
                [read(atom) for atom in equation.invars],
                [atom.aval.shape for atom in equation.invars],
                [variable.aval.shape for variable in equation.outvars],
            )
            known.update(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _scan(
        self, parameters: Any, states: Sequence[State], shapes: Any, outputs: Any
    ) -> list[State]:
        body = opened(parameters["jaxpr"])
        consts, carry = scan_counts(body[0], shapes, outputs)
        given, xs = list(states[:consts]), states[consts + carry :]
        rows = [_within(state) for state in xs]
        if any(row is None for row in rows):
            # One sample after another: each by itself if nothing is handed on.
            if carry:
                return [Mixed() for _ in outputs]
            if any(not isinstance(s, Same) for s in given) or any(
                not isinstance(s, Same) or 0 in s.uneven
                for s, row in zip(xs, rows, strict=True)
                if row is not None
            ):
                return [Unknown() for _ in outputs]
            alone = [Same() if row is None else row for row in rows]
            inside = self.jaxpr(*body, [*given, *alone])
            return [Along(0) if isinstance(s, Same) else s for s in inside]
        moving = list(states[consts : consts + carry])
        each = [row for row in rows if row is not None]
        for _ in range(_MOST_ROUNDS):
            found = self.jaxpr(*body, [*given, *moving, *each])
            joined = [_joined(a, b) for a, b in zip(moving, found[:carry], strict=True)]
            if joined == moving:
                return [*moving, *(_stacked(state) for state in found[carry:])]
            moving = joined
        return [Unknown() for _ in outputs]

    def _while(self, parameters: Any, states: Sequence[State]) -> list[State]:
        ahead, inside = parameters["cond_nconsts"], parameters["body_nconsts"]
        tested, given = states[:ahead], states[ahead : ahead + inside]
        moving = list(states[ahead + inside :])
        for _ in range(_MOST_ROUNDS):
            outputs = self.jaxpr(*opened(parameters["body_jaxpr"]), [*given, *moving])
            joined = [_joined(a, b) for a, b in zip(moving, outputs, strict=True)]
            if joined == moving:
                (goes_on,) = self.jaxpr(*opened(parameters["cond_jaxpr"]), [*tested, *moving])
                # Else how often it runs is for all samples together.
                if isinstance(goes_on, Same):
                    return moving
                break
            moving = joined
        return [Unknown() for _ in moving]

    def _cond(self, parameters: Any, states: Sequence[State], outputs: Any) -> list[State]:
        chosen, *given = states
        if not isinstance(chosen, Same):
            return [Unknown() for _ in outputs]
        ways = [self.jaxpr(*opened(branch), given) for branch in parameters["branches"]]
        found = ways[0]
        for way in ways[1:]:
            found = [_joined(a, b) for a, b in zip(found, way, strict=True)]
        return found

    def _in_copies(
        self, name: str, parameters: Any, states: list[Any], shapes: Any, output: Sequence[int]
    ) -> State:
        """As `_followed`, where batches may lie one after another along an axis."""
        mine = [
            (state, shape)
            for state, shape in zip(states, shapes, strict=True)
            if isinstance(state, Along)
        ]
        first, shape = mine[0]
        axis, copies = first.axis, first.copies
        group = max(state.group for state, _ in mine)
        if any(group % state.group for state, _ in mine):
            return Mixed()
        if name == "concatenate" and parameters["dimension"] == axis:
            rows = {(s.axis, shape[s.axis] // s.copies) for s, shape in mine}
            alike = len(mine) == len(states) and len(rows) == 1
            return Along(axis, sum(s.copies for s, _ in mine), group) if alike else Mixed()
        if name == "concatenate" and copies == group == 1 and shape[axis] == self.samples:
            found = placed(parameters["dimension"], axis, states, shapes)
            if found is not None:
                return found
        if name == "reshape" and len(mine) == 1:
            return self._reshaped(first, shape, output)
        if {s.copies for s, _ in mine} != {copies}:
            return Mixed()
        strides = parameters.get("strides") if name == "slice" else None
        if copies == group == 1 and strides is not None and strides[axis] > 1:
            # One of each so many in turn, as of rows (-1, stride) a column.
            stride = strides[axis]
            if shape[axis] % stride or output[axis] * stride != shape[axis]:
                return Mixed()
            self.groups.add(stride)
            return Along(axis, 1, stride)
        if copies > 1 and name in ("slice", "split") and output[axis] != shape[axis]:
            rows = shape[axis] // copies
            start = parameters["start_indices"][axis] if name == "slice" else 0
            sizes = {output[axis], *parameters.get("sizes", ())}
            even = len(sizes) == 1 and output[axis] % rows == 0 and start % rows == 0
            whole = (parameters.get("strides") or {axis: 1})[axis] == 1
            mine_alone = name == "slice" or parameters["axis"] == axis
            if not (even and whole and mine_alone):
                return Mixed()
            return Along(axis, output[axis] // rows, group)
        if copies == group == 1:
            return self._followed(name, parameters, states, shapes, output)
        bare = [
            Along(s.axis)
            if isinstance(s, Along)
            else dataclasses.replace(s, uneven=s.uneven - {axis})
            if name in EACH and s.blocks == copies > 1 and len(shapes[n]) > axis
            else s
            for n, s in enumerate(states)
        ]
        found = self._followed(name, parameters, bare, shapes, output)
        return Along(found.axis, copies, group) if isinstance(found, Along) else found

    def _followed(
        self, name: str, parameters: Any, states: list[Any], shapes: Any, output: Any
    ) -> State:
        """Of an operation some of whose inputs are `Along` and the others `Same`."""
        if name in EACH and _fit(shapes, output):
            found = _together(states, shapes)
            if isinstance(found, Along) and any(
                isinstance(state, Along) and shape[found.axis] != output[found.axis]
                for state, shape in zip(states, shapes, strict=True)
            ):
                return Unknown()
            return found
        if name in ("concatenate", "sort"):
            found = _together(states, shapes)
            axis = parameters["dimension"]
            return Mixed() if isinstance(found, Along) and found.axis == axis else found
        if name == "stack":
            found = _together(states, shapes)
            if not isinstance(found, Along):
                return found
            return Along(found.axis + (found.axis >= parameters["axis"]))
        if name == "dot_general":
            return _dot(parameters["dimension_numbers"], states, shapes)
        if name == "gather":
            return gathered(parameters, states, shapes)
        if name in SCATTERS:
            found = scattered(parameters["dimension_numbers"], states, shapes)
            if isinstance(found, Unknown) and name == "scatter-add":
                return counted(parameters["dimension_numbers"], states, shapes)
            return found
        if name in _ALGEBRA:
            found = _together(states, shapes)
            inside = isinstance(found, Along) and found.axis < len(shapes[0]) - 2
            return found if inside else Unknown()
        if name == "conv_general_dilated":
            numbers = parameters["dimension_numbers"]
            lhs, rhs = states
            whole = isinstance(lhs, Along) and lhs.axis == numbers.lhs_spec[0]
            if not (whole and isinstance(rhs, Same)) or parameters["batch_group_count"] != 1:
                return Mixed()
            return Along(numbers.out_spec[0])
        if name == "dynamic_update_slice":
            operand, update, *starts = states
            if any(not isinstance(state, Same) for state in starts):
                return Unknown()
            found = _together([operand, update], shapes[:2])
            if isinstance(found, Along) and shapes[0][found.axis] != shapes[1][found.axis]:
                return Mixed()
            return found
        first = states[0]
        if not isinstance(first, Along) or any(not isinstance(s, Same) for s in states[1:]):
            return Unknown()
        return self._of_one(name, parameters, first.axis, shapes[0], output)

    def _of_one(
        self, name: str, parameters: Any, axis: int, shape: Sequence[int], output: Sequence[int]
    ) -> State:
        """Of an operation whose first input alone is `Along`."""
        if name in _REDUCE:
            axes = parameters["axes"]
            if axis in axes:
                return Summed() if name == "reduce_sum" else Mixed()
            return Along(axis - sum(a < axis for a in axes))
        if name in _RUNNING:
            return Mixed() if parameters["axis"] == axis else Along(axis)
        if name == "broadcast_in_dim":
            moved = parameters["broadcast_dimensions"][axis]
            return Along(moved) if output[moved] == shape[axis] else Unknown()
        if name in ("reshape", "expand_dims"):
            return self._reshaped(Along(axis), shape, output)
        if name == "squeeze":
            gone = [a % len(shape) for a in parameters["dimensions"]]
            return Unknown() if axis in gone else Along(axis - sum(a < axis for a in gone))
        if name == "transpose":
            return Along(parameters["permutation"].index(axis))
        if name == "tile" and len(shape) == len(output):
            return Along(axis) if output[axis] == shape[axis] else Unknown()
        if name == "rev":
            return Mixed() if axis in parameters["dimensions"] else Along(axis)
        if name in ("slice", "dynamic_slice"):
            return Along(axis) if output[axis] == shape[axis] else Mixed()
        if name == "pad":
            return Along(axis) if tuple(parameters["padding_config"][axis]) == (0,) * 3 else Mixed()
        if name == "fft":
            return Along(axis) if axis < len(shape) - len(parameters["fft_lengths"]) else Mixed()
        if name == "top_k":
            return Along(axis) if axis != len(shape) - 1 else Mixed()
        if name in _WINDOW:
            alone = parameters["window_dimensions"][axis] == 1 and output[axis] == shape[axis]
            return Along(axis) if alone else Mixed()
        if name == "split":
            return Mixed() if parameters["axis"] == axis else Along(axis)
        return Unknown()

    def _reshaped(self, state: Along, shape: Sequence[int], output: Sequence[int]) -> State:
        """Rows stay in order: samples lie where as many elements are before them."""
        axis, copies, group = state.axis, state.copies, state.group
        units = self.samples // group
        before = math.prod(shape[:axis])
        here = [n for n in range(len(output)) if math.prod(output[:n]) == before and output[n]]
        ways = [place for place in here if output[place] % (units * copies) == 0]
        same = [place for place in ways if output[place] == shape[axis]]
        if ways:
            return Along((same or ways)[0], copies, group)
        rows = shape[axis] // copies
        for place, length in enumerate(output):
            ahead = math.prod(output[:place])
            # Copies get an axis of their own, or the axis before becomes copies.
            if copies > 1 and ahead == before * copies and length % units == 0 and length:
                return Along(place, 1, group)
            if axis and ahead * shape[axis - 1] == before and length == shape[axis - 1] * rows:
                return Along(place, shape[axis - 1], group) if copies == 1 else Unknown()
        if copies == 1:
            for place in here:
                if self.samples % output[place] == 0:
                    group = self.samples // output[place]
                    self.groups.add(group)
                    return Along(place, 1, group)
        return Unknown()


def _is_scaled_sum(name: str, states: Sequence[State]) -> bool:
    """Whether a product or quotient is a sum over samples times what no sample enters."""
    sums = [isinstance(state, Summed) for state in states]
    rest = [s for s in states if not isinstance(s, Summed)]
    alone = sums == [True, False] or (name != "div" and sums == [False, True])
    return alone and all(isinstance(state, Same) and not state.drawn for state in rest)


def _fit(shapes: Any, output: Sequence[int]) -> bool:
    """Whether operands are scalars, or of the result's shape up to axes of one element."""
    return all(
        not len(shape)
        or (
            len(shape) == len(output)
            and all(a in (1, b) for a, b in zip(shape, output, strict=True))
        )
        for shape in shapes
    )


def _inner(parameters: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if parameters.get(name) is not None:
            return parameters[name]
    return None


def _within(state: State) -> State | None:
    """Of a row of what a scan takes apart; None where rows are samples."""
    if isinstance(state, Same):
        return Same(frozenset(axis - 1 for axis in state.uneven if axis), state.drawn, state.zero)
    if isinstance(state, Along):
        return None if not state.axis else dataclasses.replace(state, axis=state.axis - 1)
    return Mixed() if isinstance(state, Placed) else state


def _stacked(state: State) -> State:
    if isinstance(state, Same):
        return Same(frozenset((0, *(axis + 1 for axis in state.uneven))), state.drawn, state.zero)
    if isinstance(state, Along):
        return dataclasses.replace(state, axis=state.axis + 1)
    return Mixed() if isinstance(state, Placed) else state


def _joined(one: State, other: State) -> State:
    """Of a value that is the one at times, and the other at other times."""
    if one == other:
        return one
    for kind in (Mixed, Unknown):
        if isinstance(one, kind) or isinstance(other, kind):
            return kind()
    if isinstance(one, Same) and isinstance(other, Same):
        drawn, zero = one.drawn or other.drawn, one.zero and other.zero
        return Same(one.uneven | other.uneven, drawn, zero)
    if isinstance(one, Summed) or isinstance(other, Summed):
        sums, rest = (one, other) if isinstance(one, Summed) else (other, one)
        return sums if isinstance(rest, Same) and rest.zero else Mixed()
    if isinstance(one, Along) and isinstance(other, Same):
        one, other = other, one
    if isinstance(one, Same) and isinstance(other, Along):
        return Mixed() if other.axis in one.uneven else other
    return Mixed()


def _together(states: Sequence[Any], shapes: Any) -> State:
    """Of operands of one shape, or scalars."""
    axes = {state.axis for state in states if isinstance(state, Along)}
    if len(axes) != 1:
        return Mixed()
    (axis,) = axes
    for state, shape in zip(states, shapes, strict=True):
        if isinstance(state, Same) and len(shape) and axis in state.uneven:
            return Mixed()
    return Along(axis)


def _dot(numbers: Any, states: Sequence[Any], shapes: Any) -> State:
    contracted, batch = numbers
    pairs = list(zip(*contracted, strict=True))
    if all(isinstance(s, Along) for s in states) and tuple(s.axis for s in states) in pairs:
        return Summed()
    places = []
    for side in (0, 1):
        state = states[side]
        if not isinstance(state, Along):
            continue
        if state.axis in contracted[side]:
            return Mixed()
        if state.axis in batch[side]:
            other = states[1 - side]
            paired = batch[1 - side][list(batch[side]).index(state.axis)]
            if isinstance(other, Same) and paired in other.uneven:
                return Mixed()
        places.append(_place_in_product(side, state.axis, numbers, shapes))
    return Along(places[0]) if len(set(places)) == 1 else Mixed()


def _place_in_product(side: int, axis: int, numbers: Any, shapes: Any) -> int:
    """The axis of a product that an operand's axis, which is not summed over, becomes."""
    contracted, batch = numbers
    if axis in batch[side]:
        return list(batch[side]).index(axis)
    own = [a for a in range(len(shapes[side])) if a not in contracted[side]]
    place = len(batch[side]) + [a for a in own if a not in batch[side]].index(axis)
    return place + side * (len(shapes[0]) - len(contracted[0]) - len(batch[0]))


def _same(
    name: str, parameters: Any, states: Sequence[Same], shapes: Any, output: Sequence[int]
) -> Same:
    """Of an operation that no sample enters."""
    found = _same_but_zero(name, parameters, states, shapes, output)
    zero = name in _STAY_ZERO and all(state.zero for state in states) and bool(states)
    return dataclasses.replace(found, zero=zero)


def _same_but_zero(
    name: str, parameters: Any, states: Sequence[Same], shapes: Any, output: Sequence[int]
) -> Same:
    drawn = any(state.drawn for state in states)
    if name in RANDOM:
        # Draws from the microbatch's key differ by place: so they are meant.
        return Same(drawn=True) if drawn else everything_uneven(output)
    if name in EACH and _fit(shapes, output):
        return Same(frozenset().union(*(state.uneven for state in states)), drawn)
    if name == "iota":
        return Same(frozenset([parameters["dimension"]]))
    if not states:
        return everything_uneven(output)
    (first, shape) = states[0], shapes[0]
    if name == "broadcast_in_dim":
        dimensions = parameters["broadcast_dimensions"]
        return Same(frozenset(dimensions[axis] for axis in first.uneven), drawn)
    if name == "transpose":
        return Same(frozenset(parameters["permutation"].index(a) for a in first.uneven), drawn)
    if name in _REDUCE:
        axes = parameters["axes"]
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        return Same(frozenset(n for n, axis in enumerate(kept) if axis in first.uneven), drawn)
    if name in ("reshape", "expand_dims", "squeeze"):
        return Same(_reshaped_uneven(first.uneven, shape, output), drawn)
    if name in ("slice", "rev") or (name == "tile" and len(shape) == len(output)):
        return Same(first.uneven, drawn)
    if name == "dot_general":
        numbers = parameters["dimension_numbers"]
        moved = (
            _place_in_product(side, axis, numbers, shapes)
            for side, state in enumerate(states)
            for axis in state.uneven
            if axis not in numbers[0][side]
        )
        return Same(frozenset(moved), drawn)
    if name == "concatenate":
        uneven = frozenset().union(*(state.uneven for state in states))
        return Same(uneven | {parameters["dimension"]}, drawn)
    if name == "stack":
        axis = parameters["axis"]
        moved = (a + (a >= axis) for state in states for a in state.uneven)
        return Same(frozenset([axis, *moved]), drawn)
    if name in _RUNNING or name in ("sort", "top_k"):
        along = parameters.get("axis", parameters.get("dimension", len(shape) - 1))
        uneven = frozenset().union(*(state.uneven for state in states))
        return Same(uneven if drawn else uneven | {along % len(shape)}, drawn)
    if name == "gather":
        return Same(gathered_uneven(parameters, states, shapes), drawn)
    if name == "pad":
        padded = (
            n for n, row in enumerate(parameters["padding_config"]) if tuple(row) != (0, 0, 0)
        )
        return Same(first.uneven | frozenset(padded), drawn)
    return everything_uneven(output, drawn=drawn)


def _reshaped_uneven(
    uneven: frozenset[int], shape: Sequence[int], output: Sequence[int]
) -> frozenset[int]:
    """Uneven axes after a reshape: axes are cut and merged in groups of as many elements."""
    found: set[int] = set()
    start = end = 0
    while end < len(output):
        before, after = start, end
        inside, outside = 1, 1
        while start < len(shape) and (inside < outside or inside == outside == 1):
            inside *= shape[start]
            start += 1
            while end < len(output) and outside < inside:
                outside *= output[end]
                end += 1
        if start == before:  # only axes of one element are left
            break
        if any(axis in uneven for axis in range(before, start)):
            found.update(axis for axis in range(after, end) if output[axis] > 1)
    return frozenset(found)
