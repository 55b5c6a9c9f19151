"""Who reads what in a flat program, how early an operation can run and who wants it.

Legend: L blocks; stage 0 is the embedding, 1 to L the blocks.
"""

from collections.abc import Sequence

from jaxsys.errors import UsageError
from jaxsys.train.adapt.values import BlockLeaf, Layer, Operation, Program, Value


class Flow:
    """Operations sorted by the stage that can run them first and the one that wants them first.

    Attributes:
        layers: blocks in the order in which they run.
        readers: of each value.
        core: stage -> what leads up to a use of its block's parameters, such uses included.
        near: stage -> what it makes possible and the next core wants.
        far: stage -> what earlier stages make possible, but this one wants first.
        side: stage -> what it makes possible and no core wants.
    """

    def __init__(self, program: Program, layers: Sequence[Layer]) -> None:
        self.operations, self.outputs = program.operations, set(program.outputs)
        self.readers: dict[Value, list[Operation]] = {}
        for operation in self.operations:
            for value in dict.fromkeys(operation.inputs):
                self.readers.setdefault(value, []).append(operation)
        self.layers = self._in_order(layers)
        self._stage_of_layer = {layer: stage for stage, layer in enumerate(self.layers, 1)}
        self.earliest: dict[Operation, int] = {}
        for operation in self.operations:
            self.earliest[operation] = max(map(self.stage_of, operation.inputs), default=0)
        stages = range(1, len(self.layers) + 1)
        self.core: dict[int, list[Operation]] = {stage: [] for stage in stages}
        self.near: dict[int, list[Operation]] = {stage: [] for stage in stages}
        self.far: dict[int, list[Operation]] = {stage: [] for stage in stages}
        self.side: dict[int, list[Operation]] = {stage: [] for stage in stages}
        self._sort()

    def stage_of(self, value: Value) -> int:
        """The first stage that has a value."""
        if isinstance(value, BlockLeaf):
            return self._stage_of_layer[value.layer]
        return 0 if value.maker is None else self.earliest.get(value.maker, 0)

    def narrowest(self) -> list[list[int]]:
        """Where to cut between each core and the next, a list for each but the last stage.

        Numbers of `near` operations that the first one's segment takes, all with which the fewest
        bytes cross from the one segment to the other. Gaps of the same operations are cut alike: as
        the last of them, which reads nothing right from the embedding.
        """
        found: dict[tuple[object, ...], list[int]] = {}
        for stage in range(len(self.layers) - 1, 0, -1):
            marks = tuple(operation.mark for operation in self.near[stage])
            if marks not in found:
                found[marks] = self._narrowest(stage)
        stages = range(1, len(self.layers))
        return [found[tuple(operation.mark for operation in self.near[s])] for s in stages]

    def _narrowest(self, stage: int) -> list[int]:
        near = self.near[stage]
        place = {operation: n for n, operation in enumerate(near)}
        following = set(self.core[stage + 1])
        live = [0] * (len(near) + 1)
        # What is read, with what came before the core: it crosses too if it is read after the cut.
        read = [value for operation in (*near, *following) for value in operation.inputs]
        for value in dict.fromkeys(read):
            if not value.depends or self.stage_of(value) > stage or isinstance(value, BlockLeaf):
                continue
            if stage > 1 and not self.stage_of(value):
                continue
            start = place.get(value.maker, -1) + 1 if value.maker else 0
            readers = self.readers[value]
            last = max(place.get(r, len(near) if r in following else -1) for r in readers)
            for position in range(start, last + 1):
                live[position] += value.bytes
        least = min(live)
        return [position for position, size in enumerate(live) if size == least]

    def _in_order(self, layers: Sequence[Layer]) -> list[Layer]:
        """Blocks by the first use of their parameters on something else than parameters."""
        first: dict[Layer, int] = {}
        for place, operation in enumerate(self.operations):
            if not operation.outputs[0].pure:
                for value in operation.inputs:
                    for leaf in value.pure:
                        first.setdefault(leaf[:2], place)
        for layer in layers:
            if layer not in first:
                raise UsageError(
                    f"block {layer[1]} has no effect on the loss: the model's call does not reach "
                    "it; leave out blocks that do not run"
                )
        return sorted(layers, key=lambda layer: first[layer])

    def _uses(self, operation: Operation, stage: int) -> bool:
        """Whether it applies parameters of the stage's block."""
        layer = self.layers[stage - 1]

        def alone(value: Value) -> bool:
            return all(leaf[:2] == layer for leaf in value.pure)

        own = any(value.pure and alone(value) for value in operation.inputs)
        return own and alone(operation.outputs[0])

    def _sort(self) -> None:
        in_core: set[Value] = set()
        wanted_by: dict[Value, int] = {}
        for operation in reversed(self.operations):
            stage = self.earliest[operation]
            if not stage:
                continue
            wanted = min((wanted_by[v] for v in operation.outputs if v in wanted_by), default=0)
            if self._uses(operation, stage) or any(v in in_core for v in operation.outputs):
                self.core[stage].append(operation)
                in_core.update(v for v in operation.inputs if self.stage_of(v) == stage)
                wanted = stage
            elif not wanted:
                self.side[stage].append(operation)
                continue
            elif wanted == stage + 1:
                self.near[stage].append(operation)
            else:
                self.far[wanted].append(operation)
            for value in operation.inputs:
                wanted_by[value] = min(wanted_by.get(value, wanted), wanted)
        for rows in (self.core, self.near, self.far, self.side):
            for row in rows.values():
                row.reverse()
