"""What x brings from stage to stage, as leaves of its own.

    chain   what one block makes for the next: the residual stream, a state beside it
    hold    what the embedding makes of parameters outside the blocks and blocks read: an encoder's
            output, a bias or a whole module that blocks share; its gradient comes back through x
    table   the same with a value of its own for each layer
    mail    what a block makes for a later one or for the head: the slots of one array, written by
            the block and read by whoever wants them

Every block hands on all leaves, so that x keeps its structure, as schedules demand.
"""

from dataclasses import dataclass, field
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.train.adapt.fingerprint import aval_of_type
from jaxsys.train.adapt.kinds import Kind, Position, Row
from jaxsys.train.adapt.stages import Stages
from jaxsys.train.adapt.values import BlockLeaf, Layer, Value


@dataclass(frozen=True, slots=True)
class Chain:
    """Leaf `number` of x["chain"]."""

    number: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Leaf `number` of x["hold"]."""

    number: int


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of leaf `number` of x["table"], one a layer of the kind."""

    number: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mail:
    """Slots of leaf `number` of x["mail"], one a layer of the kind."""

    number: int
    slots: tuple[int, ...]


Place = Chain | Hold | Table | Mail


@dataclass(slots=True, kw_only=True)
class Role:
    """A kind of blocks that reads and writes x alike."""

    kind: Kind
    stages: tuple[int, ...]
    """Its layers, from 1: all of the kind, or those that hand on the same."""
    reads: dict[Row, Place] = field(default_factory=dict)
    """Where rows of the kind are."""
    chains: dict[int, Position] = field(default_factory=dict)
    """Chain -> what the block leaves in it; others stay."""
    mails: list[tuple[int, Position, tuple[int, ...]]] = field(default_factory=list)
    """(mail, what is written, slot of each of its layers or -1)."""


@dataclass(slots=True, kw_only=True)
class Freight:
    """All that x brings."""

    roles: list[Role]
    chains: list[tuple[Any, Value | None]] = field(default_factory=list)
    """(shape and dtype, what embed puts there or zeros)."""
    holds: list[Value] = field(default_factory=list)
    tables: list[Row] = field(default_factory=list)
    mails: list[tuple[Any, list[Value]]] = field(default_factory=list)
    """(shape and dtype of a slot, the value of each)."""
    head: dict[Value, Place] = field(default_factory=dict)
    """Values of blocks that the head reads."""


def freight(stages: Stages, kinds: list[Kind], outputs: list[Value]) -> Freight:
    """How each value gets from where it is made to where it is read.

    Args:
        stages: the segments.
        kinds: the kinds of these.
        outputs: what the head returns.

    Raises:
        UsageError: if a block needs what a later one makes.
    """
    return _Freight(stages, kinds, outputs).found()


class _Freight:
    def __init__(self, stages: Stages, kinds: list[Kind], outputs: list[Value]) -> None:
        self.stages, self.kinds = stages, kinds
        self.kind_at = {stage: kind for kind in kinds for stage in kind.stages}
        self.number_of_layer: dict[Layer, int] = {
            layer: stage for stage, layer in enumerate(stages.layers, 1)
        }
        self.made: dict[Value, tuple[int, Position]] = {}
        for stage, segment in enumerate(stages.segments, 1):
            for index, operation in enumerate(segment):
                for value in operation.outputs:
                    self.made[value] = (stage, (index, value.place))
        self.head = self._read_by_head(outputs)
        self.freight = Freight(roles=[])
        self.mailed: dict[Value, None] = {}

    def found(self) -> Freight:
        chained = self._sort_rows()
        self._name_chains(chained)
        self._head_reads()
        self._address_mail()
        return self.freight

    def source(self, value: Value) -> tuple[int, Position]:
        """The stage that makes a value, and where in it."""
        if isinstance(value, BlockLeaf):
            return self.number_of_layer[value.layer], ("leaf", *value.name)
        return self.made.get(value, (0, ()))

    def _read_by_head(self, outputs: list[Value]) -> list[Value]:
        """Values of blocks that outputs depend on outside blocks."""
        found: dict[Value, None] = {}
        seen: set[Value] = set()
        waiting = list(outputs)
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.made or isinstance(value, BlockLeaf):
                found[value] = None
            elif value.maker is not None:
                waiting += value.maker.inputs
        return sorted(found, key=lambda value: (self.source(value)[0], str(self.source(value)[1])))

    def _sort_rows(self) -> list[tuple[Kind, Row]]:
        """Finds what is held and tabled; returns what is chained, the rest is mailed."""
        chained = []
        self.reads: dict[int, dict[Row, Any]] = {id(kind): {} for kind in self.kinds}
        for kind in self.kinds:
            for row in kind.carried():
                sources = [self.source(value)[0] for value in row]
                for source, stage in zip(sources, kind.stages, strict=True):
                    if source >= stage:
                        raise UsageError(
                            f"block {stage - 1} reads what block {source - 1} makes; blocks must "
                            "run one after another"
                        )
                if not any(sources):
                    self.reads[id(kind)][row] = self._outside(row)
                elif all(
                    source == stage - 1 and (value.depends or stage == 1)
                    for source, stage, value in zip(sources, kind.stages, row, strict=True)
                ):
                    chained.append((kind, row))
                else:
                    self._mail(kind, row)
        return chained

    def _outside(self, row: Row) -> Place:
        held, tables = self.freight.holds, self.freight.tables
        if all(value is row[0] for value in row):
            if row[0] not in held:
                held.append(row[0])
            return Hold(held.index(row[0]))
        distinct = tuple(dict.fromkeys(row))
        if distinct not in tables:
            tables.append(distinct)
        return Table(tables.index(distinct), tuple(map(distinct.index, row)))

    def _mail(self, kind: Kind, row: Row) -> None:
        self.reads[id(kind)][row] = None
        self.mailed.update(dict.fromkeys(row))

    def _name_chains(self, chained: list[tuple[Kind, Row]]) -> None:
        """Gives rows that feed each other one leaf, and kinds the parts that hand on alike."""
        classes = _Classes()
        for kind, row in chained:
            classes.join(("in", id(kind), row))
            for value, stage in zip(row, kind.stages, strict=True):
                if stage > 1:
                    position = self.source(value)[1]
                    before = self.kind_at[stage - 1]
                    classes.join(("in", id(kind), row), ("out", id(before), position))
        numbers: dict[Any, int] = {}
        taken: set[tuple[int, int]] = set()
        handed: dict[int, dict[int, Position]] = {s: {} for s in self.kind_at}
        for kind, row in chained:
            root = classes.root(("in", id(kind), row))
            number = numbers.setdefault(root, len(numbers))
            if (id(kind), number) in taken:
                self._mail(kind, row)
                continue
            taken.add((id(kind), number))
            self.reads[id(kind)][row] = Chain(number)
            if number == len(self.freight.chains):
                self.freight.chains.append((_shape(row[0]), None))
            for value, stage in zip(row, kind.stages, strict=True):
                if stage == 1:
                    self.freight.chains[number] = (_shape(value), value)
                else:
                    handed[stage - 1][number] = self.source(value)[1]
        for kind in self.kinds:
            roles: list[Role] = []
            for stage in kind.stages:
                for role in roles:
                    mine = handed[stage]
                    if all(role.chains.get(n, p) == p for n, p in mine.items()):
                        role.chains |= mine
                        role.stages += (stage,)
                        break
                else:
                    roles.append(Role(kind=kind, stages=(stage,), chains=dict(handed[stage])))
            self.freight.roles += roles

    def _head_reads(self) -> None:
        last = len(self.stages.layers)
        role = next(role for role in self.freight.roles if last in role.stages)
        for value in self.head:
            stage, position = self.source(value)
            if stage == last:
                free = [
                    number
                    for number, (shape, _) in enumerate(self.freight.chains)
                    if role.chains.get(number, position) == position and shape == _shape(value)
                ]
                chosen = next((n for n in free if n in role.chains), free[0] if free else None)
                if chosen is None:  # nobody reads it on the way: what the last block leaves stays
                    self.freight.chains.append((_shape(value), None))
                    chosen = len(self.freight.chains) - 1
                role.chains[chosen] = position
                self.freight.head[value] = Chain(chosen)
                continue
            self.mailed[value] = None

    def _address_mail(self) -> None:
        mails: dict[Any, list[Value]] = {}
        for value in self.mailed:
            mails.setdefault(_shape(value), []).append(value)
        self.freight.mails = list(mails.items())
        at = {
            value: (number, slot)
            for number, values in enumerate(mails.values())
            for slot, value in enumerate(values)
        }
        for value in self.head:
            if value in at and value not in self.freight.head:
                self.freight.head[value] = Mail(at[value][0], (at[value][1],))
        for role in self.freight.roles:
            reads = self.reads[id(role.kind)]
            for row, place in reads.items():
                if place is None:
                    numbers, slots = zip(*(at[value] for value in row), strict=True)
                    reads[row] = Mail(numbers[0], slots)
            rows = [role.kind.stages.index(stage) for stage in role.stages]
            role.reads = {row: _only(place, rows) for row, place in reads.items()}
            written: dict[tuple[int, Position], dict[int, int]] = {}
            for value, (number, slot) in at.items():
                stage, position = self.source(value)
                if stage in role.stages:
                    written.setdefault((number, position), {})[stage] = slot
            role.mails = [
                (number, position, tuple(slots.get(stage, -1) for stage in role.stages))
                for (number, position), slots in written.items()
            ]


def _only(place: Place, rows: list[int]) -> Place:
    """The place as some of the kind's layers read it."""
    if isinstance(place, Table | Mail):
        return type(place)(place.number, tuple(place.slots[row] for row in rows))
    return place


def _shape(value: Value) -> Any:
    return aval_of_type(value.aval)


class _Classes:
    """Disjoint sets."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def root(self, item: Any) -> Any:
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            item = self.parent[item]
        return item

    def join(self, *items: Any) -> None:
        first = self.root(items[0])
        for item in items[1:]:
            self.parent[self.root(item)] = first
