"""A headline figure: what its source claims, which result files hold ours, and how they are shown.

Figures come from result files alone, so the same files always give the same page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxsys.results import read_result

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Commands that write result files, and what they need of a machine."""

    name: str
    commands: tuple[str, ...]
    """Shell words. {gpu}, {gpus}: the GPU's name and number; {traces}: the folder of traces."""
    gpus: int = 0
    root: bool = False
    traces: bool = False
    server: bool = False
    """A server that somebody has to start first; never run from here."""

    def needs(self) -> str:
        """In words; empty if nothing."""
        named = {
            f"{self.gpus} or more GPUs": self.gpus > 1,
            "a GPU": self.gpus == 1,
            "root": self.root,
            "--traces": self.traces,
            "a running server": self.server,
        }
        return ", ".join(name for name, needed in named.items() if needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result file, its rows cut down to those a headline is about."""

    name: str
    record: Mapping[str, Any]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure or table."""

    title: str
    kind: Literal["measured", "simulated"]
    claim: str
    """What the source says, and where."""
    files: tuple[str, ...]
    """Patterns of result files."""
    show: Callable[[Sequence[Result]], str]
    """Markdown from the results that have rows."""
    runs: tuple[Run, ...]
    only: Callable[[Row], bool] = lambda row: True
    """Which rows."""
    pictures: tuple[str, ...] = ()
    """Paths from the repository's root, drawn from the same files by the scripts that made them."""

    def results(self, folder: Path) -> list[Result]:
        """The files that have rows for this headline, by name."""
        paths = sorted({path for pattern in self.files for path in folder.glob(pattern)})
        found = []
        for path in paths:
            record = read_result(path)
            rows = [row for row in record["rows"] if self.only(row)]
            if rows and record["kind"] == self.kind:
                found.append(Result(name=path.name, record=record, rows=rows))
        return found


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; None is shown as a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


def number(value: float | None, form: str = ".1f") -> str | None:
    """A figure, or None where there is none."""
    return None if value is None else format(value, form)


def processor(record: Mapping[str, Any]) -> str:
    """The kind of GPU that a result was made on, or "CPU"."""
    gpus = record["hardware"]["gpus"]
    return gpus[0].split(",")[0] if gpus else "CPU"


def origin(record: Mapping[str, Any]) -> str:
    """On what and when a result was made."""
    count, cores = len(record["hardware"]["gpus"]), record["hardware"]["cores"]
    machine = f"{count} x {processor(record)}" if count else f"{cores} cores of a CPU"
    return f"{machine}, JAX {record['versions'].get('jax', '?')}, {record.get('date', 'undated')}"
