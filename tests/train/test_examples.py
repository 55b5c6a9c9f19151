"""The example scripts: few lines change when a plain loop becomes a ring, and both learn alike."""

import difflib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts/examples"


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_adoption_touches_fewer_than_fifteen_lines(name):
    plain, ring = ((FOLDER / name / f"{kind}.py").read_text() for kind in ("plain", "ring"))
    difference = difflib.ndiff(plain.splitlines(), ring.splitlines())
    touched = [line for line in difference if line[0] in "+-" and line[2:].strip()]
    touched = [line for line in touched if not line[2:].startswith('"""')]
    assert 0 < len(touched) < 15, touched


def losses(path: Path, steps: int, monkeypatch, capsys) -> list[float]:
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", str(steps)])
    module.main()
    return [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_ring_learns_as_the_plain_loop_does(name, monkeypatch, capsys):
    # The ring script draws one batch to trace the model with, so the two see other batches.
    plain = losses(FOLDER / name / "plain.py", 100, monkeypatch, capsys)
    ring = losses(FOLDER / name / "ring.py", 100, monkeypatch, capsys)
    assert len(plain) == len(ring) == 5
    assert ring[-1] < ring[0] - 1.0
    assert abs(plain[-1] - ring[-1]) < 0.2
