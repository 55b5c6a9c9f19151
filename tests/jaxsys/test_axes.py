"""The table of axes: all that is per axis follows from its row, and few files name an axis."""

import ast
import dataclasses
import functools
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from jaxsys.axes import AROUND, AXES, CALLED, MESH, RING, Divided, DividedAround
from jaxsys.errors import UsageError
from jaxsys.mesh import make_mesh
from jaxsys.planner.axes import PLANNED
from jaxsys.planner.plans import Plan
from jaxsys.schedule import Block, Move, Schedule, ScheduleError, Task
from jaxsys.strategies import build
from jaxsys.train.cli import parser

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("train", "serve", "planner")
HOLDERS = {"plan", "base", "parts", "schedule", "split", "around", "asked", "planned"}
"""What plans, schedules and their parts are called."""
OF_PLANS = ("planner/", "jaxsys/lowering/", "jaxsys/schedule/", "jaxsys/strategies/", "jaxsys/mesh")
"""Where the name of an axis as a string means the axis."""
MAKERS = {"Plan", "Schedule", "make_mesh", "Trainer", "AskedLayout", "Split"}
"""What takes an axis by its name."""


def numbers(kind: type) -> set[str]:
    return {one.name for one in dataclasses.fields(kind) if one.default == 1}


def test_plans_schedules_and_the_planner_have_each_axis_of_the_table():
    around = {axis.name for axis in AROUND.values()}
    assert numbers(DividedAround) == around == {*PLANNED}
    assert numbers(Divided) == {*AXES}
    assert issubclass(Plan, Divided) and issubclass(Schedule, DividedAround)
    assert MESH.index("data") < MESH.index(RING) < MESH.index("tensor") == len(MESH) - 1


def test_the_command_asks_for_each_axis_by_its_name_in_the_table():
    words = [word for axis in AROUND.values() for word in (f"--{axis.asked}", "2")]
    found = parser("jaxsys train").parse_args(words)
    assert {getattr(found, axis.asked) for axis in AROUND.values()} == {2}


def test_meshes_have_no_other_axes():
    with pytest.raises(UsageError, match="'wide' is not known; beside ring and data: expert, con"):
        make_mesh(1, wide=2)


def files_that_name(axis) -> set[str]:
    """Modules of the package in whose code an axis stands: its mesh axis, its number of parts, or
    its name as a string where plans and schedules are dealt with.

    The model's own experts (`config.experts`) and the like are no axis.
    """
    (constant,) = (
        target.id
        for node in ast.parse((ROOT / "jaxsys/axes.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and node.value.value == axis.mesh
    )
    found = set()
    for name, tree in _modules().items():
        words = {axis.name} if name.startswith(OF_PLANS) else set()
        # A name like an axis' constant is of something else where it is not imported.
        own = name == "jaxsys/axes.py" or any(
            isinstance(node, ast.ImportFrom)
            and node.module == "jaxsys.axes"
            and constant in {one.name for one in node.names}
            for node in ast.walk(tree)
        )
        if any(_names(node, axis, constant if own else "", words) for node in ast.walk(tree)):
            found.add(name)
    return found


@functools.cache
def _modules() -> dict[str, ast.Module]:
    paths = (path for part in ("jaxsys", *PARTS) for path in (ROOT / part).rglob("*.py"))
    names = {path: path.relative_to(ROOT) for path in paths}
    # In jaxsys/ are links to the other three.
    return {
        str(name): ast.parse(path.read_text())
        for path, name in names.items()
        if name.parts[1] not in PARTS
    }


def _names(node: ast.AST, axis, constant: str, words: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id == constant
    if isinstance(node, ast.Constant):
        return node.value in words
    if isinstance(node, ast.Attribute) and node.attr == axis.name:
        holder = node.value
        name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
        return name in HOLDERS
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        called = called if isinstance(called, str) else getattr(called, "id", "")
        return called in MAKERS and any(
            word.arg in (axis.name, axis.mesh) for word in node.keywords
        )
    if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant):
        # A field that is 1 where nothing is split.
        return getattr(node.target, "id", "") == axis.name and node.value.value == 1
    return False


@pytest.mark.parametrize("name", [axis.name for axis in AROUND.values()])
def test_an_axis_stands_in_few_files(name):
    """Its row, how it is lowered or a decoder is cut along it, and what it costs."""
    found = files_that_name(AXES[name])
    assert len(found) <= 5, found
    assert {"jaxsys/axes.py", f"planner/axes/{name}.py"} <= found


def test_the_page_of_schedules_lists_every_field_of_their_files():
    """Name, type, default, and the option that says the same."""
    page = (ROOT / "docs/schedules.md").read_text().split("## Its file")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`"): [cell.strip(" |") for cell in row[1:]] for row in lines}
    fields = {one.name: one for one in dataclasses.fields(Schedule)}
    assert rows.keys() == {"format", *fields}
    kinds = get_type_hints(Schedule)
    options = {one.name: f"--{one.asked}" for one in AROUND.values()}
    more = [option for axis in AROUND.values() for option in axis.more]
    options |= {one.name: f"--{one.name.replace('_', '-')}" for one in more}
    names = {int: "whole number", str: "string", int | None: "whole number or null"}
    nested = {"owners", "starts", "tasks", "moves"}  # which a file must have, be they empty
    for name, field in fields.items():
        kind, default, _, *option = rows[name]
        needed = field.default is dataclasses.MISSING or name in nested
        written = "null" if field.default is None else field.default
        assert default.strip("`") == ("needed" if needed else str(written) or '""'), name
        if name in options:
            assert option == [f"`{options[name]}`"], name
        legal = next((one.choices for one in more if one.name == name), None)
        if name == "placement":
            legal = [*kinds[name]]
        if legal:
            assert kind == ", ".join(f"`{one}`" for one in legal)
        elif name not in nested:
            assert kind == names[kinds[name]], name
        else:
            assert kind.startswith("array of ")
    parts = {one.name for kind in (Task, Move, Block) for one in dataclasses.fields(kind)}
    said = rows["tasks"][2] + rows["moves"][2] + page.split("A block is an object")[1]
    assert {name for name in parts if f"`{name}`" not in said} == set()


@pytest.mark.parametrize("word", [w for name, axis in AROUND.items() for w in (name, axis.asked)])
def test_a_field_of_a_schedules_file_that_is_not_known_says_which_is_meant(word):
    schedule = build("weipipe-keep", devices=2, microbatches=4)
    value = json.loads(schedule.to_json())
    if word in value:
        word = word[:-1]
    meant = CALLED.get(word, word)
    with pytest.raises(ScheduleError, match=rf"'{word}' is not known \(did you mean '{meant}"):
        Schedule.from_json(json.dumps({**value, word: 2}))
