"""Reads a compiled program's text: which collectives it really holds, and what they wait for.

What XLA was asked for and what it made are two things (it merges, hoists and reorders), so claims
about a step are checked on `compiled.as_text()`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

COLLECTIVES = (
    "collective-permute",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
)

MOVES_ONLY = frozenset(
    {
        "parameter",
        "get-tuple-element",
        "tuple",
        "copy",
        "bitcast",
        "reshape",
        "dynamic-slice",
        "slice",
        "constant",
        "partition-id",
        "opt-barrier",
    }
)
"""Operations that only pass values on: what depends on nothing else can start at once."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        """Bytes of its result; of a started collective, of what it will bring."""
        shapes = _SHAPE.findall(self.shape)
        if self.operation.endswith("-start"):  # (operands..., results..., flags)
            shapes = [s for s in shapes if s[1]]
            shapes = shapes[len(shapes) // 2 :]
        return sum(
            math.prod(int(n) for n in dims.split(",") if n) * _BYTES[kind]
            for kind, dims in shapes
            if kind in _BYTES
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """A computation, its instructions in the order of the text (the schedule, once scheduled)."""

    name: str
    entry: bool
    instructions: tuple[Instruction, ...]

    def collectives(self) -> Iterator[Instruction]:
        """Its collectives; of an asynchronous pair, the start."""
        for instruction in self.instructions:
            if instruction.operation.removesuffix("-start") in COLLECTIVES:
                yield instruction

    def waits_for(self, instruction: Instruction) -> set[str]:
        """The operations, moves of values aside, that an instruction depends on in here."""
        by_name = {i.name: i for i in self.instructions}
        seen: set[str] = set()
        todo, found = list(instruction.operands), set()
        while todo:
            name = todo.pop()
            if name in seen or name not in by_name:
                continue
            seen.add(name)
            source = by_name[name]
            if source.operation not in MOVES_ONLY:
                found.add(source.operation)
            todo.extend(source.operands)
        return found


def parse(text: str) -> dict[str, Computation]:
    """Computation name -> computation, of `compiled.as_text()`."""
    found: dict[str, Computation] = {}
    name, entry, lines = "", False, []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, entry, lines = header.group(2), bool(header.group(1)), []
        elif line.startswith("}"):
            found[name] = Computation(name=name, entry=entry, instructions=tuple(lines))
        else:
            match = _INSTRUCTION.match(line)
            if match:
                label, shape, operation, rest = match.groups()
                operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
                lines.append(
                    Instruction(
                        name=label,
                        operation=operation,
                        shape=shape,
                        operands=tuple(operands),
                        text=line,
                    )
                )
    return found


def executions(computations: dict[str, Computation]) -> dict[str, int]:
    """How often each computation runs, while loops multiplied by their known trip count.

    Branches of a conditional count as run each time it is reached.
    """
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for instruction in computations[name].instructions:
            repeats = times
            if instruction.operation == "while":
                trip = re.search(r'known_trip_count[^0-9]*"?n"?:"?(\d+)', instruction.text)
                repeats *= int(trip.group(1)) if trip else 1
            called = re.findall(
                r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)",
                instruction.text,
            )
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            if branches:
                called += re.findall(r"%?([\w.-]+)", branches.group(1))
            for inner in called:
                if inner in computations:
                    visit(inner, repeats)

    visit(next(c.name for c in computations.values() if c.entry), 1)
    return counts


def collective_counts(text: str) -> dict[str, int]:
    """Collective -> how often a run of the program executes it."""
    computations = parse(text)
    counts: dict[str, int] = {}
    for name, times in executions(computations).items():
        for instruction in computations[name].collectives():
            kind = instruction.operation.removesuffix("-start")
            counts[kind] = counts.get(kind, 0) + times
    return counts


def groups_of(instruction: Instruction) -> frozenset[frozenset[int]]:
    """The devices that each of a collective's groups joins; of a permute its pairs."""
    text = instruction.text
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{} ]*\})\}", text)
    if listed:
        rows = re.findall(r"\{([0-9, ]+)\}", listed.group(1))
        return frozenset(frozenset(map(int, row.split(","))) for row in rows)
    # Since JAX 0.11, by the axes of a mesh whose devices are in order.
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if named:
        sizes = dict(part.split("=") for part in named.group(1).replace("'", "").split(","))
        joined = named.group(2).replace("'", "").split(",")
        grid = np.arange(math.prod(map(int, sizes.values()))).reshape(*map(int, sizes.values()))
        apart = [axis for axis, name in enumerate(sizes) if name not in joined]
        together = [axis for axis, name in enumerate(sizes) if name in joined]
        each = math.prod(grid.shape[axis] for axis in together)
        rows = grid.transpose(*apart, *together).reshape(-1, each)
        return frozenset(frozenset(map(int, row)) for row in rows)
    iota = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text)
    if iota is None:
        raise ValueError(f"{instruction.operation} {instruction.name} names no groups")
    shape, grid, order = (
        [int(n) for n in part.split(",")] if part else None for part in iota.groups()
    )
    devices = np.arange(math.prod(grid or ())).reshape(grid or ())
    rows = devices.transpose(order).reshape(shape or ())
    return frozenset(frozenset(map(int, row)) for row in rows)


def spans(computation: Computation) -> dict[str, tuple[int, int]]:
    """Started collective -> positions of its start and its done in the scheduled text."""
    place = {i.name: index for index, i in enumerate(computation.instructions)}
    found = {}
    for instruction in computation.instructions:
        if instruction.operation.endswith("-done"):
            start = instruction.operands[0]
            found[start] = (place[start], place[instruction.name])
    return found


def program_bytes(program: Any) -> int:
    """What XLA gives a compiled program on each device.

    Arguments, temporaries, and results that do not take an argument's place.
    """
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
