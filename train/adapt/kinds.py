"""Which blocks are alike, and what a kind of blocks reads from outside.

Segments of the same operations on the same places are one kind. What they read elsewhere differs
from layer to layer: each place where a kind reads has a row of values, one a layer of the kind.
Constants that differ (a layer's number, its window, its rotary table) become a table, and so do
values that no parameter enters (the layer's random key, a mask): these are computed again from the
microbatch in each block. The rest is carried in x, see `carry`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxsys.train.adapt.stages import Stages, signature
from jaxsys.train.adapt.values import BlockLeaf, Operation, Value

Row = tuple[Value, ...]
"""What the layers of a kind read in one place."""

Position = tuple[Any, ...]
"""Of a value made in a segment: (operation, result), or the name of a parameter leaf."""


@dataclass(frozen=True, slots=True)
class Same:
    """One value for all layers of a kind, that no parameter enters."""

    value: Value


@dataclass(frozen=True, slots=True)
class Picked:
    """A value of its own for each layer of a kind, that no parameter enters."""

    row: Row


@dataclass(frozen=True, slots=True)
class Computed:
    """Computed in the block, alike in all layers, from inputs of these forms."""

    operation: Operation
    place: int
    inputs: tuple["Input", ...]


@dataclass(frozen=True, slots=True)
class Carried:
    """Depends on parameters outside the block: x brings it."""

    row: Row


Input = Same | Picked | Computed | Carried


@dataclass(slots=True, kw_only=True)
class Kind:
    """Blocks that are alike."""

    stages: tuple[int, ...]
    """Of its layers, from 1."""
    segments: tuple[tuple[Operation, ...], ...]
    """Of each layer."""
    leaves: tuple[tuple[str, ...], ...]
    """Names of a layer's parameters."""
    inputs: dict[tuple[int, int], Input] = field(default_factory=dict)
    """(operation, input) -> what is read there, where it is made outside the segment."""

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The segment of its first layer: what all of them run."""
        return self.segments[0]

    def carried(self) -> Iterator[Row]:
        """Rows that x brings, each once."""
        rows = (form.row for form in self.inputs.values() if isinstance(form, Carried))
        yield from dict.fromkeys(rows)


def kinds_of(
    stages: Stages,
    leaves: dict[Any, dict[tuple[str, ...], Any]],
    apart: Mapping[Any, int] | None = None,
) -> list[Kind]:
    """Blocks by kind, in order of first appearance.

    Args:
        stages: the cut program.
        leaves: layer -> name -> (shape, dtype) of all its parameters, used or not.
        apart: layer -> number; blocks of unlike numbers are kept apart though they be alike.
    """
    members: dict[Any, list[int]] = {}
    for stage, (layer, segment) in enumerate(
        zip(stages.layers, stages.segments, strict=True), start=1
    ):
        parameters = tuple(sorted(leaves[layer].items()))
        kept = None if apart is None else apart[layer]
        members.setdefault((signature(segment, layer), parameters, kept), []).append(stage)
    kinds = []
    for alike in members.values():
        layer = stages.layers[alike[0] - 1]
        kind = Kind(
            stages=tuple(alike),
            segments=tuple(stages.segments[stage - 1] for stage in alike),
            leaves=tuple(sorted(leaves[layer])),
        )
        _find_inputs(kind, stages)
        kinds.append(kind)
    return kinds


def _find_inputs(kind: Kind, stages: Stages) -> None:
    forms: dict[Row, Input] = {}
    made = [{v for op in segment for v in op.outputs} for segment in kind.segments]
    layers = [stages.layers[stage - 1] for stage in kind.stages]
    for index, operation in enumerate(kind.operations):
        for place, value in enumerate(operation.inputs):
            own = isinstance(value, BlockLeaf) and value.layer == layers[0]
            if own or value in made[0]:
                continue
            row = tuple(segment[index].inputs[place] for segment in kind.segments)
            kind.inputs[index, place] = form_of(row, forms)


def form_of(row: Row, forms: dict[Row, Input]) -> Input:
    """How a kind of blocks gets what its layers read in one place."""
    if row not in forms:
        forms[row] = _form(row, forms)
    return forms[row]


def _form(row: Row, forms: dict[Row, Input]) -> Input:
    if any(value.depends for value in row):
        return Carried(row)
    if all(value is row[0] for value in row):
        return Same(row[0])
    makers = [value.maker for value in row]
    first = makers[0]
    if first is not None and all(
        maker is not None and maker.mark == first.mark and value.place == row[0].place
        for maker, value in zip(makers, row, strict=True)
    ):
        columns: Sequence[Row] = list(zip(*(m.inputs for m in makers if m), strict=True))
        # A chain (each layer splits the key that the one before left) never comes to an end alike.
        if not any(value.maker in makers for column in columns for value in column):
            inputs = tuple(form_of(column, forms) for column in columns)
            return Computed(first, row[0].place, inputs)
    return Picked(row)
