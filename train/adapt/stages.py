"""Cuts a flat program into embed, one segment a block, and head, by what depends on what.

An operation can run no earlier than what it reads: parameters of block i are there from stage i on,
everything outside blocks from stage 0 on. The **core** of block i is what its own parameters are
applied to, and what leads up to that from block i-1. Between two cores lies what the model does to
the one's results for the other: it is cut where the least must be carried over, which in a residual
block is after the addition. Around the first and the last core the same operations are looked for,
so that all segments become alike. What later cores do not need runs in the head, unless it makes
what must be kept for the head smaller (a sum for an auxiliary loss).

Legend: L blocks; stage 0 is the embedding, 1 to L the blocks, L + 1 the head.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxsys.train.adapt.flow import Flow
from jaxsys.train.adapt.values import BlockLeaf, Layer, Operation, Program, Value, needed

_TRIES = 6
"""Ways to cut between blocks that are looked at: places that carry equally few bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Which operations a block runs; the rest belongs to the embedding or the head."""

    layers: tuple[Layer, ...]
    """Blocks in the order in which they run."""
    segments: tuple[tuple[Operation, ...], ...]
    """Of each block, in order."""


def cuts(program: Program, layers: Sequence[Layer]) -> Iterator[Stages]:
    """Ways to cut the program, all right, those that carry the fewest bytes, earliest first.

    Args:
        program: the whole model and its loss.
        layers: its blocks, by group and number.

    Raises:
        UsageError: if a block is not used.
    """
    flow = Flow(program, layers)
    ways = flow.narrowest()
    most = max((len(way) for way in ways), default=1)
    for choice in range(min(most, _TRIES)):
        yield _Cut(flow, [way[min(choice, len(way) - 1)] for way in ways]).stages()


def signature(operations: Iterable[Operation], layer: Layer) -> tuple[object, ...]:
    """Equal for segments of two blocks that do the same, whatever they read from outside."""
    numbers: dict[Value, tuple[object, ...]] = {}
    rows = []
    for index, operation in enumerate(operations):
        row: list[object] = [operation.mark]
        for value in operation.inputs:
            own = value.name if isinstance(value, BlockLeaf) and value.layer == layer else None
            row.append(numbers.get(value, own))
        for value in operation.outputs:
            numbers[value] = (index, value.place)
        rows.append(tuple(row))
    return tuple(rows)


class _Cut:
    """One way to cut."""

    def __init__(self, flow: Flow, cuts: Sequence[int]) -> None:
        self.flow = flow
        self.last = len(flow.layers)
        self.core = dict(flow.core)
        self.after = {stage: flow.near[stage][:cut] for stage, cut in enumerate(cuts, 1)}
        self.before = {stage: flow.near[stage - 1][cut:] for stage, cut in enumerate(cuts, 2)}
        self.marks = {s: signature(flow.core[s], flow.layers[s - 1]) for s in flow.core}

    def stages(self) -> Stages:
        flow = self.flow
        model = self._like(self.last, range(self.last - 1, 0, -1))
        if model is not None and (found := self._found(model)) is not None:
            self.after[self.last] = found
        model = self._like(1, range(2, self.last + 1))
        if model is not None and self.before[model]:
            self._copy_before_first(model)
        far = self._far()
        segments = {
            stage: [
                *far[stage],
                *self.before.get(stage, []),
                *self.core[stage],
                *self.after.get(stage, []),
            ]
            for stage in self.core
        }
        self._add_sides(segments)
        segments = {stage: _in_order(operations) for stage, operations in segments.items()}
        return Stages(
            layers=tuple(flow.layers),
            segments=tuple(tuple(segments[stage]) for stage in self.core),
        )

    def _far(self) -> dict[int, list[Operation]]:
        """What each segment takes of what earlier ones made possible.

        The next segment wants it; but where what the cut leaves in this one reads it, it comes
        along.
        """
        far = {stage: list(operations) for stage, operations in self.flow.far.items()}
        for stage in range(1, self.last):
            moved = needed(
                far[stage + 1],
                [value for operation in self.after[stage] for value in operation.inputs],
            )
            far[stage] += moved
            far[stage + 1] = [one for one in far[stage + 1] if one not in moved]
        return far

    def _like(self, stage: int, others: Iterable[int]) -> int | None:
        return next((o for o in others if self.marks[o] == self.marks[stage]), None)

    def _found(self, model: int) -> list[Operation] | None:
        """What the model's segment does after its core, found after the last core."""
        pairs = self._paired(self.core[model], self.core[self.last])
        found: list[Operation] = []
        for operation in self.after[model]:
            taken = {op.outputs[0] for op in (*self.core[self.last], *found)}
            twin = self._twin(operation, pairs, self.last, taken)
            if twin is None or not all(self._is_there(v, taken) for v in twin.inputs):
                return None
            found.append(twin)
        return found

    def _is_there(self, value: Value, taken: set[Value]) -> bool:
        """Whether the last segment can read a value: what no core needs is made in the head."""
        stage, maker = self.flow.stage_of(value), value.maker
        if not stage or maker is None or maker.outputs[0] in taken:
            return True
        return stage < self.last and maker not in self.flow.side[stage]

    def _paired(self, one: Iterable[Operation], other: Iterable[Operation]) -> dict[Value, Value]:
        """Values of the one's operations, and its parameters, with the other's."""
        pairs: dict[Value, Value] = {}
        for a, b in zip(one, other, strict=True):
            pairs.update(zip(a.outputs, b.outputs, strict=True))
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if x.depends and (isinstance(x, BlockLeaf) or self.flow.stage_of(x)):
                    pairs.setdefault(x, y)
        return pairs

    def _twin(
        self, operation: Operation, pairs: dict[Value, Value], stage: int, taken: set[Value]
    ) -> Operation | None:
        """The operation of a stage that does what another stage's does; adds it to the pairs."""
        model = self.flow.earliest[operation]
        anchor = next((n for n, v in enumerate(operation.inputs) if v in pairs), None)
        if anchor is None:
            return None
        for reader in self.flow.readers.get(pairs[operation.inputs[anchor]], []):
            if (
                reader.outputs[0] not in taken
                and self.flow.earliest[reader] == stage
                and reader.mark == operation.mark
                and all(
                    pairs[a] is b
                    if a in pairs
                    else self.flow.stage_of(a) < model and self.flow.stage_of(b) < stage
                    for a, b in zip(operation.inputs, reader.inputs, strict=True)
                )
            ):
                pairs.update(zip(operation.outputs, reader.outputs, strict=True))
                return reader
        return None

    def _copy_before_first(self, model: int) -> None:
        """What the model's segment does before its core, found in the embedding and copied.

        The first segment then reads the copies; the originals stay for whoever else reads them.
        """
        inside = set(self.before[model])
        twins: dict[Operation, Operation] = {}

        def unify(a: Value, b: Value) -> bool:
            if a.maker is None or a.maker not in inside:
                return True
            if b.maker is None or not b.depends or a.place != b.place:
                return False
            if a.maker in twins:
                return twins[a.maker] is b.maker
            if a.maker.mark != b.maker.mark:
                return False
            twins[a.maker] = b.maker
            return all(map(unify, a.maker.inputs, b.maker.inputs))

        for a, b in zip(self.core[model], self.core[1], strict=True):
            if not all(map(unify, a.inputs, b.inputs)):
                return
        if len(twins) != len(inside):
            return
        # Read as the model's segment reads: what it computes twice may be one value here.
        copies: dict[Value, Value] = {}
        first: dict[Value, Value] = {}
        self.before[1] = []

        def rewired(model: Operation, twin: Operation) -> Operation:
            pairs = zip(model.inputs, twin.inputs, strict=True)
            return _with_inputs(twin, tuple(copies.get(a, b) for a, b in pairs))

        for operation in self.before[model]:
            twin = twins[operation]
            copy = rewired(operation, twin)
            copy.outputs = tuple(
                Value(aval=v.aval, maker=copy, place=v.place, depends=True, varies=v.varies)
                for v in twin.outputs
            )
            copies.update(zip(operation.outputs, copy.outputs, strict=True))
            for value, copied in zip(twin.outputs, copy.outputs, strict=True):
                first.setdefault(value, copied)
            self.before[1].append(copy)
        self.core[1] = list(map(rewired, self.core[model], self.core[1]))
        self.after[1] = [_reading(operation, first) for operation in self.after.get(1, [])]

    def _add_sides(self, segments: dict[int, list[Operation]]) -> None:
        """Takes in what shrinks results that only the head reads, where all alike have it."""
        alike: dict[object, list[int]] = {}
        for stage, operations in segments.items():
            alike.setdefault(signature(operations, self.flow.layers[stage - 1]), []).append(stage)
        placed = {op.outputs[0] for operations in segments.values() for op in operations}
        for members in alike.values():
            if members == [self.last]:
                continue
            model = min(members, key=lambda stage: len(self.flow.side[stage]))
            pairs = {s: self._paired(segments[model], segments[s]) for s in members if s != model}
            taken = {s: {op.outputs[0] for op in segments[s]} for s in members}
            added: dict[int, list[Operation]] = {s: [] for s in members}
            inside = {v for operation in segments[model] for v in operation.outputs}
            inside |= {v for op in segments[model] for v in op.inputs if isinstance(v, BlockLeaf)}
            for operation in self.flow.side[model]:
                if operation.outputs[0] in taken[model] or not all(
                    value in inside or not value.depends for value in operation.inputs
                ):
                    continue
                trial = {s: dict(paired) for s, paired in pairs.items()}
                twins = {s: self._twin(operation, trial[s], s, taken[s]) for s in trial}
                if None in twins.values():
                    continue
                for stage, twin in {model: operation, **twins}.items():
                    if twin is not None:
                        added[stage].append(twin)
                        taken[stage].add(twin.outputs[0])
                pairs = trial
                inside.update(operation.outputs)
            keep = self._that_shrink(added[model], placed)
            chosen = {
                s: [op for op, kept in zip(added[s], keep, strict=True) if kept] for s in members
            }
            # A sum over layers must be taken up by every layer on the way.
            while (place := self._unreachable(chosen, placed)) is not None:
                chosen = {s: [*ops[:place], *ops[place + 1 :]] for s, ops in chosen.items()}
            for stage in members:
                segments[stage] += chosen[stage]

    def _unreachable(self, chosen: dict[int, list[Operation]], placed: set[Value]) -> int | None:
        """The place of an operation that reads, in some layer, what no segment makes."""
        here = {op.outputs[0] for ops in chosen.values() for op in ops} | placed
        for ops in chosen.values():
            for place, operation in enumerate(ops):
                for value in operation.inputs:
                    maker = value.maker
                    if maker is None or self.flow.stage_of(value) <= 0:
                        continue
                    if maker.outputs[0] not in here:
                        return place
        return None

    def _that_shrink(self, added: list[Operation], placed: set[Value]) -> list[bool]:
        """Which of the operations to take in, so that the fewest bytes are kept for the head."""
        kept = {*placed, *(operation.outputs[0] for operation in added)}

        def inside(value: Value) -> list[bool]:
            return [reader.outputs[0] in kept for reader in self.flow.readers.get(value, [])]

        for operation in reversed(added):
            if any(any(inside(value)) for value in operation.outputs):
                continue
            # What the head would read instead, if it does not read it anyway.
            others = sum(
                v.bytes
                for v in dict.fromkeys(operation.inputs)
                if v.depends and v not in self.flow.outputs and all(inside(v))
            )
            # As many bytes are worth it: what is summed over layers needs one place, not L.
            if others < sum(v.bytes for v in operation.outputs):
                kept.discard(operation.outputs[0])
        return [operation.outputs[0] in kept for operation in added]


def _in_order(operations: list[Operation]) -> list[Operation]:
    """The operations as they are, but none before what makes what it reads.

    What comes along from far (`_Cut._far`) may read what the cut left to this segment.
    """
    waiting = {value for operation in operations for value in operation.outputs}
    ordered: list[Operation] = []
    rest = operations
    while rest:
        late = []
        for operation in rest:
            if any(value in waiting for value in operation.inputs):
                late.append(operation)
            else:
                ordered.append(operation)
                waiting.difference_update(operation.outputs)
        if len(late) == len(rest):
            return operations
        rest = late
    return ordered


def _reading(operation: Operation, instead: dict[Value, Value]) -> Operation:
    """The operation with other inputs and the same outputs."""
    return _with_inputs(operation, tuple(instead.get(value, value) for value in operation.inputs))


def _with_inputs(operation: Operation, inputs: tuple[Value, ...]) -> Operation:
    return Operation(
        primitive=operation.primitive,
        parameters=operation.parameters,
        inputs=inputs,
        outputs=operation.outputs,
        mark=operation.mark,
        sources=operation.sources,
    )
