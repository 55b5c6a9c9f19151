"""Public scripts' kinds, a few lines changed, train as they do by themselves; see script_kinds/."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "compared", Path(__file__).parent / "script_kinds" / "compared.py"
)
assert _spec is not None and _spec.loader is not None
compared: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compared)

QUICK = {("mingpt", "weipipe-interleave")}


@pytest.fixture(scope="module")
def plainly():
    """name -> losses and parameters of the script by itself, run once."""
    known: dict[str, Any] = {}

    def trained(name: str) -> Any:
        if name not in known:
            known[name] = compared.script(name).train()
        return known[name]

    return trained


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=() if (name, schedule) in QUICK else pytest.mark.slow)
        for name in compared.KINDS
        for schedule in compared.SCHEDULES
    ],
)
def test_twenty_steps_are_those_of_the_script(name, schedule, plainly):
    if name in compared.NEEDS:
        pytest.importorskip(compared.NEEDS[name])
    found = compared.script(f"{name}_jaxsys").train(schedule=schedule)
    assert compared.differences(found, plainly(name))[0] < 2e-6


@pytest.mark.parametrize("name", compared.KINDS)
def test_few_lines_change(name):
    assert compared.changed_lines(name) <= 14
