"""The functions of a layered model, made of the operations of a program that is cut.

Legend: L blocks; x is a dict of the leaves that `carry` names, or the one array where there is but
one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.errors import UsageError
from jaxsys.layered import Layer as LayerInfo
from jaxsys.train.adapt.carry import Chain, Freight, Hold, Mail, Role, Table, freight
from jaxsys.train.adapt.kinds import Computed, Input, Picked, Position, Same, kinds_of
from jaxsys.train.adapt.stages import Stages, cuts
from jaxsys.train.adapt.sums import Sums
from jaxsys.train.adapt.values import (
    BatchLeaf,
    BlockLeaf,
    EdgeLeaf,
    Layer,
    Operation,
    Program,
    Value,
    Whole,
    bind,
    needed,
    run,
    value_of,
)

Leaves = dict[tuple[str, ...], Any]
"""A layer's parameters by name."""


class CutProgram:
    """A program cut into stages, with what is carried between them.

    Attributes:
        layers: blocks in the order in which they run.
        pattern: the role of each.
        roles: what blocks there are.
        sums: what makes summed loss, weight and metrics of the head's outputs; set by the caller.
    """

    def __init__(
        self,
        program: Program,
        layers: Sequence[Layer],
        leaves: dict[Layer, Leaves],
        apart: Mapping[Layer, int] | None = None,
    ):
        """Cuts the program.

        Args:
            program: the whole model and its loss.
            layers: its blocks.
            leaves: layer -> name -> (shape, dtype) of all its parameters.
            apart: see `kinds_of`.

        Raises:
            UsageError: if it cannot be cut.
        """
        self.program = program
        self.sums = Sums(made=lambda values, _: values, samples=0)
        best: tuple[Stages, Freight] | None = None
        for stages in cuts(program, layers):
            found = freight(stages, kinds_of(stages, leaves, apart), program.outputs)
            if best is None or len(found.roles) < len(best[1].roles):
                best = stages, found
        assert best is not None
        self.stages, self.freight = best
        if apart is not None:
            first = {id(role): self.stages.layers[role.stages[0] - 1] for role in best[1].roles}
            best[1].roles.sort(key=lambda role: apart[first[id(role)]])
        self.layers, self.roles = self.stages.layers, self.freight.roles
        role_at = {stage: n for n, role in enumerate(self.roles) for stage in role.stages}
        self.pattern = tuple(role_at[stage] for stage in range(1, len(self.layers) + 1))
        self._prepare()

    def _prepare(self) -> None:
        """What embed, each block and head evaluate."""
        freight, operations = self.freight, self.program.operations
        inside = {
            value for segment in self.stages.segments for op in segment for value in op.outputs
        }
        self.first = [
            *(value for _, value in freight.chains if value is not None),
            *freight.holds,
            *(value for row in freight.tables for value in row),
            *(v for _, values in freight.mails for v in values if v not in inside),
        ]
        self.first = [v for v in self.first if not isinstance(v, BlockLeaf)]
        self.inside = inside
        self.embed_operations = needed(operations, self.first)
        given = [*freight.head, *freight.holds]
        self.head_operations = needed(operations, self.program.outputs, given)
        for place, part in (("embedding", self.embed_operations), ("head", self.head_operations)):
            for operation in part:
                for value in operation.inputs:
                    if isinstance(value, BlockLeaf) and value not in freight.head:
                        raise UsageError(
                            f"the {place} uses {'/'.join(value.name)} of block {value.layer[1]} "
                            "before the block runs; make it a parameter outside the blocks"
                        )
        self.block_operations = [
            needed(operations, _bases(role.kind.inputs.values())) for role in self.roles
        ]

    def embed(self, edge: Sequence[Any], batch: Sequence[Any]) -> Any:
        """x as the first block reads it, from the edge's leaves and the microbatch's."""
        values = self._values(self.embed_operations, self.first, edge, batch)
        run(self.embed_operations, values)

        def there(value: Value | None, shape: Any) -> Any:
            if value is None or value in self.inside or isinstance(value, BlockLeaf):
                return jnp.zeros(*shape)
            return _strong(value_of(value, values))

        freight = self.freight
        return self._packed(
            chain=[there(value, shape) for shape, value in freight.chains],
            hold=[there(value, None) for value in freight.holds],
            table=[jnp.stack([there(value, None) for value in row]) for row in freight.tables],
            mail=[
                jnp.stack([there(value, shape) for value in values])
                for shape, values in freight.mails
            ],
        )

    def block(self, number: int) -> Callable[[Leaves, Any, Sequence[Any], LayerInfo], Any]:
        """The block of a role: (a layer's parameters, x, the microbatch's leaves, layer) -> x."""
        role, operations = self.roles[number], self.block_operations[number]
        kind = role.kind
        layer = self.layers[kind.stages[0] - 1]

        def block(leaves: Leaves, x: Any, batch: Sequence[Any], info: LayerInfo) -> Any:
            parts = self._unpacked(x)
            values = self._values(operations, _bases(kind.inputs.values()), (), batch)
            run(operations, values)
            forms = _Forms(self, role, values, info, parts)
            own: dict[Value, Any] = {}
            made: dict[Position, Any] = {("leaf", *name): leaf for name, leaf in leaves.items()}
            for index, operation in enumerate(kind.operations):
                inputs = []
                for n, value in enumerate(operation.inputs):
                    if (form := kind.inputs.get((index, n))) is not None:
                        inputs.append(forms.value(form))
                    elif isinstance(value, BlockLeaf) and value.layer == layer:
                        inputs.append(leaves[value.name])
                    else:
                        inputs.append(own[value])
                outputs = bind(operation.primitive, operation.parameters, inputs)
                for value, output in zip(operation.outputs, outputs, strict=True):
                    own[value] = made[index, value.place] = output
            for n, position in role.chains.items():
                parts["chain"][n] = _strong(made[position])
            for n, position, slots in role.mails:
                parts["mail"][n] = forms.put(parts["mail"][n], made[position], slots)
            return self._packed(**parts)

        return block

    def head(self, edge: Sequence[Any], x: Any, batch: Sequence[Any]) -> list[Any]:
        """The program's outputs, from the edge's leaves, the last block's x, the microbatch's."""
        parts = self._unpacked(x)
        outputs = self.program.outputs
        values = self._values(self.head_operations, outputs, edge, batch)
        values.update(zip(self.freight.holds, parts["hold"], strict=True))
        for value, place in self.freight.head.items():
            if isinstance(place, Chain):
                values[value] = parts["chain"][place.number]
            elif isinstance(place, Mail):
                values[value] = parts["mail"][place.number][place.slots[0]]
        run(self.head_operations, values)
        return [value_of(value, values) for value in outputs]

    def totals(self, number: int, batch: Sequence[Any], found: Sequence[Any]) -> list[Any]:
        """A microbatch's part of what must be known of the whole batch, see `Sums`.

        Args:
            number: of the round.
            batch: the microbatch's leaves.
            found: what the rounds before have summed up over the whole batch.
        """
        wanted = self.sums.ahead_in(number)
        operations = needed(self.program.operations, wanted)
        handed = self.sums.handed(found) if number else []
        values = self._values(operations, wanted, (), [*batch, *handed])
        run(operations, values)
        own = [] if number else [self.sums.samples]
        found = [*own, *(value_of(value, values) for value in wanted)]
        return [jnp.asarray(value, jnp.float32) for value in found]

    def with_whole(self, batch: Sequence[Any], totals: Sequence[Any] | None) -> list[Any]:
        """A microbatch's leaves and what it is handed of the whole batch.

        Args:
            batch: its leaves.
            totals: of the whole batch; None if it is all there is.
        """
        if not self.sums.wholes:
            return list(batch)
        found = list(totals or ())
        for number in range(self.sums.rounds if totals is None else 0):
            found += self.totals(number, batch, found)
        return [*batch, *self.sums.handed(found)]

    def _values(
        self,
        operations: Iterable[Operation],
        outputs: Iterable[Value],
        edge: Sequence[Any],
        batch: Sequence[Any],
    ) -> dict[Value, Any]:
        """Values of the leaves that operations and outputs read."""
        values: dict[Value, Any] = {}
        read = [value for operation in operations for value in operation.inputs]
        for value in (*read, *outputs):
            if isinstance(value, EdgeLeaf):
                values[value] = edge[value.number]
            elif isinstance(value, BatchLeaf | Whole):
                values[value] = batch[value.number]
        return values

    @property
    def _bare(self) -> bool:
        freight = self.freight
        return len(freight.chains) == 1 and not (freight.holds or freight.tables or freight.mails)

    def _packed(self, **leaves: list[Any]) -> Any:
        if self._bare:
            return leaves["chain"][0]
        return {name: values for name, values in leaves.items() if values}

    def _unpacked(self, x: Any) -> dict[str, list[Any]]:
        if self._bare:
            x = {"chain": [x]}
        return {name: list(x.get(name, [])) for name in ("chain", "hold", "table", "mail")}


class _Forms:
    """What a block reads besides its parameters, and which rows of tables are its own."""

    def __init__(
        self,
        plan: CutProgram,
        role: Role,
        values: dict[Value, Any],
        info: LayerInfo,
        parts: dict[str, list[Any]],
    ) -> None:
        self.role, self.values, self.info = role, values, info
        # As x came: what the block writes is for those after it.
        self.parts = {name: list(leaves) for name, leaves in parts.items()}
        self.layers = len(plan.layers)
        self.rows = [role.kind.stages.index(stage) for stage in role.stages]
        self.known: dict[Input, Any] = {}

    def number(self, numbers: Sequence[int]) -> Any:
        """The layer's own of numbers, one a layer of the role."""
        if len(set(numbers)) == 1:
            return numbers[0]
        table = np.zeros(self.layers, np.int32)
        table[[stage - 1 for stage in self.role.stages]] = numbers
        return jnp.asarray(table)[self.info.index]

    def pick(self, stack: Any, slots: Sequence[int]) -> Any:
        """The layer's own slot of an array."""
        return lax.dynamic_index_in_dim(stack, self.number(slots), 0, keepdims=False)

    def put(self, stack: Any, value: Any, slots: Sequence[int]) -> Any:
        """The array with the layer's own slot written; -1 writes nothing."""
        slot = self.number(slots)
        value = _strong(value)
        if min(slots) >= 0:
            return lax.dynamic_update_index_in_dim(stack, value, slot, 0)
        written = lax.dynamic_update_index_in_dim(stack, value, jnp.maximum(slot, 0), 0)
        return jnp.where(slot >= 0, written, stack)

    def value(self, form: Input) -> Any:
        """What is read in one place."""
        if form not in self.known:
            self.known[form] = self._value(form)
        return self.known[form]

    def _value(self, form: Input) -> Any:
        if isinstance(form, Same):
            return value_of(form.value, self.values)
        if isinstance(form, Picked):
            row = [form.row[n] for n in self.rows]
            distinct = list(dict.fromkeys(row))
            if len(distinct) == 1:
                return value_of(distinct[0], self.values)
            stack = jnp.stack([jnp.asarray(value_of(value, self.values)) for value in distinct])
            return self.pick(stack, [distinct.index(value) for value in row])
        if isinstance(form, Computed):
            operation, inputs = form.operation, [self.value(one) for one in form.inputs]
            return bind(operation.primitive, operation.parameters, inputs)[form.place]
        place = self.role.reads[form.row]
        if isinstance(place, Chain):
            return self.parts["chain"][place.number]
        if isinstance(place, Hold):
            return self.parts["hold"][place.number]
        leaves = self.parts["table" if isinstance(place, Table) else "mail"]
        return self.pick(leaves[place.number], place.slots)


def _bases(forms: Iterable[Input]) -> list[Value]:
    """Values of the program that forms are made of."""
    found: dict[Value, None] = {}
    for form in forms:
        if isinstance(form, Same):
            found[form.value] = None
        elif isinstance(form, Picked):
            found.update(dict.fromkeys(form.row))
        elif isinstance(form, Computed):
            found.update(dict.fromkeys(_bases(form.inputs)))
    return list(found)


def _strong(value: Any) -> Any:
    """The value with a dtype that no other one overrules; loops carry only such."""
    if isinstance(value, jax.Array) and not getattr(value.aval, "weak_type", False):
        return value
    return lax.convert_element_type(value, jnp.asarray(value).dtype)
