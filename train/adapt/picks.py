"""Where samples lie in what is read and written by index: gathers and scatters.

Legend: B samples in the microbatch.
"""

from collections.abc import Sequence
from typing import Any

from jaxsys.train.adapt.axes import Along, Mixed, Placed, Same, State, Summed, Unknown

SCATTERS = frozenset(
    ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub")
)


def gathered(parameters: Any, states: Sequence[Any], shapes: Any) -> State:
    """Of what is read by index, where samples lie in the operand, the indices or both."""
    numbers = parameters["dimension_numbers"]
    operand, indices = states
    rank = len(numbers.offset_dims) + len(shapes[1]) - 1
    by_index = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    if isinstance(indices, Along):
        if indices.axis == len(shapes[1]) - 1:
            return Unknown()
        batching = list(numbers.start_indices_batching_dims)
        if indices.axis in batching:
            paired = numbers.operand_batching_dims[batching.index(indices.axis)]
            if isinstance(operand, Along):
                return Along(by_index[indices.axis]) if operand.axis == paired else Unknown()
            return Unknown() if paired in operand.uneven else Along(by_index[indices.axis])
        return Along(by_index[indices.axis]) if isinstance(operand, Same) else Unknown()
    axis = operand.axis
    if axis in numbers.operand_batching_dims:
        paired = numbers.start_indices_batching_dims[
            list(numbers.operand_batching_dims).index(axis)
        ]
        return Unknown() if paired in indices.uneven else Along(by_index[paired])
    # The same places of each sample, whose rows are taken whole.
    moved = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if axis in moved or parameters["slice_sizes"][axis] != shapes[0][axis]:
        return Mixed()  # some samples, or in another order
    kept = [a for a in range(len(shapes[0])) if a not in moved]
    return Along(numbers.offset_dims[kept.index(axis)])


def gathered_uneven(parameters: Any, states: Sequence[Same], shapes: Any) -> frozenset[int]:
    """Uneven axes of what is gathered: those of the indices, and what is left of the operand's."""
    numbers = parameters["dimension_numbers"]
    operand, indices = states
    rank = len(numbers.offset_dims) + len(shapes[1]) - 1
    by_index = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    moved = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(shapes[0])) if axis not in moved]
    found = {by_index[axis] for axis in indices.uneven if axis < len(shapes[1]) - 1}
    found |= {numbers.offset_dims[n] for n, axis in enumerate(kept) if axis in operand.uneven}
    paired = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    found |= {by_index[own] for axis, own in paired if axis in operand.uneven}
    return frozenset(found)


def scattered(numbers: Any, states: Sequence[Any], shapes: Any) -> State:
    """Of rows put into, or added to, places that each sample has of its own."""
    operand, indices, updates = states
    windows = list(numbers.update_window_dims)
    rows = [axis for axis in range(len(shapes[2])) if axis not in windows]
    batching = list(numbers.operand_batching_dims)
    paired = [rows[axis] for axis in numbers.scatter_indices_batching_dims]
    moved = (*numbers.inserted_window_dims, *batching)
    kept = [axis for axis in range(len(shapes[0])) if axis not in moved]

    for axis, own in zip(batching, paired, strict=True):
        there = numbers.scatter_indices_batching_dims[batching.index(axis)]
        if _fits(operand, axis) and _fits(indices, there) and _fits(updates, own):
            return Along(axis)
    if isinstance(indices, Along):
        return Unknown()
    # The same places of each sample.
    for axis, own in zip(kept, windows, strict=True):
        whole = shapes[2][own] == shapes[0][axis]
        if whole and _fits(operand, axis) and _fits(updates, own):
            return Along(axis)
    return Unknown()


def counted(numbers: Any, states: Sequence[Any], shapes: Any) -> State:
    """Of rows that are added up by their numbers: counts by class, sums over segments."""
    operand, indices, updates = states
    rows = [a for a in range(len(shapes[2])) if a not in numbers.update_window_dims]
    if numbers.operand_batching_dims or not isinstance(operand, Same) or not operand.zero:
        return Unknown()
    if not isinstance(indices, Along) or indices.axis == len(shapes[1]) - 1:
        return Unknown()
    axis = rows[indices.axis]
    if isinstance(updates, Same):
        return Unknown() if axis in updates.uneven else Summed()
    return Summed() if updates.axis == axis else Unknown()


def placed(dimension: int, axis: int, states: Sequence[Any], shapes: Any) -> Placed | None:
    """Of places put together: numbers of samples beside what each has, `x[arange(B), places]`."""
    if dimension == axis or dimension != len(shapes[0]) - 1:
        return None
    numbers = [
        n for n, state in enumerate(states) if isinstance(state, Same) and state.order == axis
    ]
    if len(numbers) != 1 or shapes[numbers[0]][dimension] != 1:
        return None
    rest = [state for n, state in enumerate(states) if n != numbers[0]]
    if not all(_fits(state, axis) for state in rest):
        return None
    return Placed(axis, sum(shape[dimension] for shape in shapes[: numbers[0]]))


def at_places(name: str, parameters: Any, states: Sequence[Any], shapes: Any) -> State:
    """Of an operation that reads `Placed`."""
    if name in ("convert_element_type", "copy", "stop_gradient"):
        return states[0]
    operand, places = states[:2] if len(states) > 1 else (None, None)
    if not isinstance(places, Placed) or isinstance(operand, Placed):
        return Mixed()
    numbers = parameters.get("dimension_numbers")
    if name == "gather":
        axis = numbers.start_index_map[places.component]
        rank = len(numbers.offset_dims) + len(shapes[1]) - 1
        by_index = [a for a in range(rank) if a not in numbers.offset_dims]
        own = axis in numbers.collapsed_slice_dims
        return Along(by_index[places.axis]) if own and _fits(operand, axis) else Mixed()
    if name in SCATTERS:
        axis = numbers.scatter_dims_to_operand_dims[places.component]
        rows = [a for a in range(len(shapes[2])) if a not in numbers.update_window_dims]
        own = axis in numbers.inserted_window_dims
        fits = _fits(operand, axis) and _fits(states[2], rows[places.axis])
        return Along(axis) if own and fits else Mixed()
    return Mixed()


def _fits(state: Any, axis: int) -> bool:
    """Whether samples lie along an axis, or what is there is alike along it."""
    if isinstance(state, Along):
        return state == Along(axis)
    return isinstance(state, Same) and axis not in state.uneven
