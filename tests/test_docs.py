"""What the guides say holds: snippets run, commands parse, links lead somewhere."""

import argparse
import functools
import importlib
import importlib.machinery
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from jaxsys.cli import SUBCOMMANDS, split_name
from jaxsys.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\n```python\n.*?^```", re.MULTILINE | re.DOTALL)
"""A snippet that needs what tests have not, with the reason before it."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
NUMBERS = {"N": "2", "I": "0", "S": "60"}
"""What stands for a number in a command."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(path: Path, language: str) -> list[str]:
    text = NOT_RUN.sub("", path.read_text())
    return [code for kind, code in FENCE.findall(text) if kind == language]


@pytest.mark.parametrize("path", [p for p in PAGES if fenced(p, "python")], ids=name)
def test_snippets_run_in_order(path, tmp_path, monkeypatch, quickly_compiled, compiled_once):
    """A page's snippets are one program, as a reader would type it."""
    monkeypatch.chdir(tmp_path)
    program: dict = {"__name__": "__main__"}
    for number, code in enumerate(fenced(path, "python"), 1):
        where = f"{name(path)}, snippet {number}"
        exec(compile(code, where, "exec"), program)  # noqa: S102


def commands(path: Path) -> list[list[str]]:
    """The jaxsys and scripts/ commands of a page, in console blocks or indented."""
    text = path.read_text()
    lines = [line for code in fenced(path, "console") for line in _whole_lines(code)]
    lines += _whole_lines(FENCE.sub("", text))
    found = []
    for line in lines:
        match = re.match(r"(?:\$ |    )(?:srun )?((?:jaxsys |scripts/\w).*)$", line)
        if match:
            found.append(shlex.split(match[1], comments=True))
    return found


def _whole_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


class Parsed(Exception):
    """The command's options were understood."""


@pytest.fixture
def only_parse(monkeypatch):
    """Every argument parser stops the program once it has understood its options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT / "scripts/report")


@pytest.mark.parametrize("path", [p for p in PAGES if commands(p)], ids=name)
def test_commands_have_the_options_they_are_shown_with(path, only_parse, monkeypatch, capsys):
    for program, *words in commands(path):
        options = [NUMBERS.get(word, word) for word in words if word not in ("...", "…")]
        shown = shlex.join([program, *words])
        if program == "jaxsys":
            command, options = split_name(options)
            module = importlib.import_module(SUBCOMMANDS[command][0])
            start = functools.partial(module.main, options, prog=f"jaxsys {command}")
        else:
            script = ROOT / program
            assert script.is_file(), f"{name(path)}: {shown}"
            behind = re.search(r'bin/python" (scripts/\S+)', script.read_text())
            if not script.read_text().startswith("#!/usr/bin/env python"):
                if behind is None:
                    continue  # hands its words to pytest
                script = ROOT / behind[1]
            script = script / "__main__.py" if script.is_dir() else script
            monkeypatch.setattr("sys.argv", [program, *options])
            start = load(script).main
        with pytest.raises((Parsed, SystemExit, UsageError)) as stopped:
            start()
        said = capsys.readouterr().err or stopped.value
        assert stopped.type is Parsed, f"{name(path)}: {shown}: {said}"


def load(script: Path):
    loader = importlib.machinery.SourceFileLoader(
        f"docs_{script.parent.name}_{script.stem}", str(script)
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text())
    for address in LINK.findall(text):
        if "://" in address:
            continue
        file, _, fragment = address.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name(path)}: {address}"
        if fragment:
            assert fragment in anchors(target), f"{name(path)}: {address}"


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(FENCE.sub("", path.read_text())):
        words = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found[words] = found.get(words, -1) + 1
    return {f"{w}-{n}" if n else w for w, last in found.items() for n in range(last + 1)}


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [name(path) for path in PAGES[1:] if f"({name(path)})" not in readme] == []


DOTTED = re.compile(r"(?<![\w./@-])jaxsys(?:\.[A-Za-z_]\w*)+(?![\w/-])")
IMPORTS = re.compile(r"^from (jaxsys[\w.]*) import (\([^)]*\)|[^\n]+)$", re.MULTILINE)
FILE_ENDINGS = (".py", ".md", ".json", ".toml", ".yaml", ".service", ".sock")


GROUPS = {"jaxsys.clock_policies", "jaxsys.routers"}
"""Of entry points, which look like modules."""


def exported(dotted: str) -> bool:
    """Whether a dotted name leads to a module, or to what one has for others to use."""
    names = dotted.split(".")
    for count in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        rest = names[count:]
        listed = getattr(found, "__all__", None)
        if any(part.startswith("_") for part in names) or (
            rest and listed is not None and rest[0] not in listed
        ):
            return False
        for part in rest:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_pages_name_what_is_exported(path):
    """The changelog names what there was."""
    text = path.read_text()
    said = {one for one in DOTTED.findall(text) if not one.endswith(FILE_ENDINGS)} - GROUPS
    for module, names in IMPORTS.findall(text):
        listed = [one.partition(" as ")[0] for one in re.split(r"[\s,()]+(?!as )", names)]
        said |= {f"{module}.{one}" for one in listed if one}
    assert [dotted for dotted in sorted(said) if not exported(dotted)] == []
