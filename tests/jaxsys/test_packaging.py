"""The four folders are one package, and a user's own train.py stays theirs."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("train", "serve", "planner")


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_parts(path: Path) -> set[str]:
    pattern = r"^\s*(?:from|import) jaxsys\.(train|serve|planner)\b"
    text = path.read_text()
    if path == ROOT / "jaxsys/__init__.py":  # names for type checkers, imported when asked for
        text = text.replace(text[text.index("if TYPE_CHECKING") : text.index("try:")], "")
    return set(re.findall(pattern, text, flags=re.MULTILINE))


@pytest.mark.parametrize("part", PARTS)
def test_parts_refuse_their_bare_names(part):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ntry:\n    import {part}\n"
    code += "except ImportError as error:\n    print(error)"
    assert f"import jaxsys.{part}, not {part}" in run(sys.executable, "-c", code, cwd=ROOT)


def test_what_parts_export_is_there_and_serving_begins_without_jax():
    code = "import jaxsys.serve as part, sys; assert 'jax' not in sys.modules"
    run(sys.executable, "-c", code, cwd=ROOT)
    for part in PARTS:
        module = importlib.import_module(f"jaxsys.{part}")
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_what_users_need_is_at_the_top_and_costs_nothing_until_it_is_used():
    code = "import jaxsys, sys; assert 'jax' not in sys.modules; print(*jaxsys.__all__)"
    names = run(sys.executable, "-c", code, cwd=ROOT).split()
    import jaxsys

    assert [name for name in names if not hasattr(jaxsys, name)] == []
    homes = {name: getattr(jaxsys, name) for name in names if name in jaxsys._HOME_OF}
    assert sorted([*homes, "__version__"]) == sorted(names)
    for name, value in homes.items():
        module = importlib.import_module(f"jaxsys.{jaxsys._HOME_OF[name]}")
        assert getattr(module, name) is value and name in getattr(module, "__all__", [name])


def test_a_users_own_module_is_not_shadowed(tmp_path):
    for part in PARTS:
        (tmp_path / f"{part}.py").write_text(f"name = 'my {part}'\n")
    script = tmp_path / "script.py"
    script.write_text("import planner, serve, train, jaxsys\nprint(train.name, serve.name)\n")
    assert run(sys.executable, str(script), cwd=tmp_path) == "my train my serve\n"


def test_the_runtime_imports_none_of_the_parts():
    for path in (ROOT / "jaxsys").rglob("*.py"):
        if path.relative_to(ROOT / "jaxsys").parts[0] in PARTS:
            continue
        assert imported_parts(path) == set(), path


def test_the_planner_imports_neither_trainer_nor_server():
    for path in (ROOT / "planner").rglob("*.py"):
        assert imported_parts(path) <= {"planner"}, path


@pytest.mark.slow
def test_a_wheel_holds_all_parts(tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT))
    run(*command, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in PARTS:
        assert f"jaxsys/{part}/__init__.py" in names
    assert "jaxsys/py.typed" in names
