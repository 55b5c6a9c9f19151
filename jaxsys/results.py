"""Result files: one JSON a benchmark, which tables and plots read and nothing else.

    {"benchmark", "kind": "measured" or "simulated", "date", "hardware", "versions", "config",
     "rows"}

`rows` are flat records of named figures with their units in the names.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxsys.errors import UsageError
from jaxsys.files import read_json, write_whole

PACKAGES = ("jaxsys", "jax", "jaxlib", "flax", "optax", "numpy", "xgboost-cpu")

Row = Mapping[str, Any]


def hardware() -> dict[str, Any]:
    """This machine: processor, cores, and GPUs with their driver where there are any."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": [],
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return found
    found["gpus"] = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    return found


def versions() -> dict[str, str]:
    """Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_result(
    path: str | Path,
    *,
    benchmark: str,
    kind: Literal["measured", "simulated"],
    config: Mapping[str, Any],
    rows: Sequence[Row],
    **more: Any,
) -> Path:
    """Writes a result file at once or not at all, and returns its path.

    Args:
        path: the file, by custom `results/<benchmark>.json`.
        benchmark: what was run.
        kind: `measured` on the hardware of this machine, or `simulated`.
        config: everything needed to run it again.
        rows: flat records.
        **more: further top-level fields, such as raw samples.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": benchmark,
        "kind": kind,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "config": dict(config),
        "rows": [dict(row) for row in rows],
        **more,
    }
    write_whole(target, json.dumps(result, indent=1) + "\n")
    return target


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        UsageError: if it is not one.
    """
    try:
        result = read_json(path)
    except UsageError as error:
        raise UsageError(f"{path} is not a result file: {error}") from error
    if not isinstance(result, dict):
        raise UsageError(f"{path} is not a result file: it holds no JSON object")
    missing = {"benchmark", "kind", "hardware", "versions", "config", "rows"} - set(result)
    if missing:
        raise UsageError(f"{path} is not a result file: it lacks {', '.join(sorted(missing))}")
    return result


def table(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """Rows as aligned text; `columns` maps a field to its format, e.g. {"step_s": ".3f"}."""
    if not rows:
        return "(no rows)"
    names = list(columns) if columns else list(dict.fromkeys(k for row in rows for k in row))
    formats = dict(columns or {})

    def cell(row: Row, name: str) -> str:
        value = row.get(name)
        if value is None:
            return "-"
        return format(value, formats.get(name, "")) if not isinstance(value, bool) else str(value)

    cells = [names, *([cell(row, name) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = []
    for index, line in enumerate(cells):
        padded = [
            text.ljust(width) if index == 0 or _is_text(rows, names[i]) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _is_text(rows: Sequence[Row], name: str) -> bool:
    return any(isinstance(row.get(name), str) for row in rows)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
